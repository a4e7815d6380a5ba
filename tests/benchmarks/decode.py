"""Decoding alone, against what a researcher would write: a 512-pixel thumbnail per transfer syntax, a tomosynthesis volume, and the memory of one worker.

    python tests/benchmarks/decode.py [--repeat 5] [--small]

Times are CPU times of one process, medians; only their ratios travel. Memory is the peak above what the imports take, in a process of its own."""
import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import dicom_files as df
import numpy as np
import pydicom
from mammo_nb.dicom.display import render
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.dicom.read import open_source
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from turns import medians

THUMB = 512
SYNTAXES = {'uncompressed': df.EXPLICIT, 'big endian': df.BIG, 'deflated': df.DEFLATED, 'RLE': df.RLE, 'JPEG baseline, 8 bits': df.BASELINE,
            'JPEG extended, 12 bits': df.EXTENDED, 'JPEG Lossless': df.JPEGLL1, 'JPEG-LS': df.JLS, 'JPEG 2000 lossless': df.J2K_LOSSLESS,
            'JPEG 2000 lossy': df.J2K, 'HTJ2K lossless': df.HTJ2K_LOSSLESS}
WINDOW = dict(WindowCenter=2000, WindowWidth=3000)


def shown(x):
    "Float pixels to a thumbnail as most scripts do it"
    x = ((x - x.min())/max(1e-9, x.max() - x.min())*255).astype(np.uint8)
    k = THUMB/max(x.shape)
    return np.asarray(Image.fromarray(x).resize((round(x.shape[1]*k), round(x.shape[0]*k)), Image.LANCZOS))


def reference(path):
    ds = pydicom.dcmread(path)
    return shown(apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64))


def reference_volume(path):
    ds = pydicom.dcmread(path)
    x = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64)
    x = (x - x.min())/(x.max() - x.min())*255
    return [shown(f) for f in x]


def volume(path):
    with open_source(path) as s: return [render(s, THUMB, i) for i in range(s.image_layout().frames)]


def write(path, frames, ts, **kw):
    "A mammogram (or volume) as a file"
    a = [f >> 4 for f in frames] if ts == df.BASELINE else frames
    a = [f.astype(np.uint8) for f in a] if ts == df.BASELINE else a
    window = dict(WindowCenter=125, WindowWidth=188) if ts == df.BASELINE else WINDOW
    path.write_bytes(df.make(a if len(a) > 1 else a[0], ts, bits=8 if ts == df.BASELINE else 12, **window, **kw))
    return path


def slices(n, size):
    "A volume of slices with the noise of each, which a blur of the reconstruction has correlated"
    base, rng = phantom_image('MLO', 'L', size, tool='clip', seed=3)[0].astype(np.float32), np.random.default_rng(0)
    noise = [cv2.GaussianBlur(rng.normal(0, 60, size).astype(np.float32), (0, 0), .6) for _ in range(4)]
    out = (np.where(base > 0, cv2.GaussianBlur(base, (0, 0), .4 + .15*abs(i - n/2)) + np.roll(noise[i % 4], 37*i, 0), 0) for i in range(n))
    return [np.clip(f, 0, 4095).astype(np.uint16) for f in out]


PEAK = '''
import sys, decode
from mammo_nb.dicom.display import render
from mammo_nb.dicom.read import open_source
def field(name): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(name))/1024
before = field('VmRSS')
getattr(decode, sys.argv[2])(sys.argv[1])
print(max(0, field('VmHWM') - before))
'''


def thumbnail(path): return render(path, THUMB)


def peak_mb(path, what):
    "Peak memory in MB of a fresh process that makes thumbnails of a file, above what it had after its imports"
    here = Path(__file__).resolve()
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(here.parent), str(here.parents[2])]))
    return float(subprocess.run([sys.executable, '-c', PEAK, str(path), what], env=env, capture_output=True, text=True, check=True).stdout)


def row(work, against, ref, ours, unit, bar=None, less=False):
    ratio = ref/ours if ref is not None else None
    ok = None if bar is None else bool(ours <= bar if less else ratio >= bar)
    rnd = lambda v: None if v is None else round(v, 1)
    return dict(work=work, reference=against, reference_value=rnd(ref), ours_value=rnd(ours), unit=unit, ratio=rnd(ratio), bar=bar, ok=ok)


def rows(repeat: int = 5, small: bool = False) -> list[dict]:
    size, big, (n, deep) = ((640, 512), (640, 512), (4, (512, 400))) if small else ((3328, 2560), (4096, 3328), (60, (2457, 1996)))
    out, naive = [], 'pydicom, float64, min-max, LANCZOS'
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        a, b = phantom_image('MLO', 'L', size, tool='clip', seed=1)[0], phantom_image('MLO', 'L', big, tool='clip', seed=2)[0]
        for name, ts in SYNTAXES.items():
            p = write(d/'a', [a], ts)
            try: reference(p)
            except Exception: sides = dict(ours=functools.partial(render, p, THUMB))  # pydicom has no decoder of its own for it
            else: sides = dict(ref=functools.partial(reference, p), ours=functools.partial(render, p, THUMB))
            *ref, ours = medians(sides, repeat, time.process_time).values()
            out.append(row(f'thumbnail of {size[0]}×{size[1]}, {name}', naive if ref else 'none: pydicom cannot', ref[0]*1e3 if ref else None, ours*1e3, 'CPU ms'))
        for name, ts in SYNTAXES.items():
            out.append(row(f'peak memory, {big[0]}×{big[1]}, {name}', 'limit', None, peak_mb(write(d/'a', [b], ts), 'thumbnail'), 'MB', 120, less=True))
        p = write(d/'v', slices(n, deep), df.J2K_LOSSLESS)
        sides = dict(ref=functools.partial(reference_volume, p), ours=functools.partial(volume, p))
        ref, ours = medians(sides, 1 if not small else repeat, time.process_time).values()  # the reference takes a minute
        text = f'{n} frames of {deep[0]}×{deep[1]}, JPEG 2000'
        out.append(row(f'thumbnails of {text}', naive + ', the whole stack', ref, ours, 'CPU s', 20 if not small else None))
        out.append(row(f'peak memory, {text}', 'limit', None, peak_mb(p, 'volume'), 'MB', 100, less=True))
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeat', type=int, default=5)
    a.add_argument('--small', action='store_true')
    a = a.parse_args()
    for r in rows(a.repeat, a.small):
        ok = {None: '', True: 'ok', False: 'MISSED'}[r['ok']]
        print(f"{r['work']:58} {r['reference_value'] or '':>9} {r['ours_value']:>8} {r['unit']:7} {r['ratio'] or '':>6} {r['bar'] or '':>5} {ok}", flush=True)


if __name__ == '__main__': main()
