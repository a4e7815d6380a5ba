"""DICOM to a 512-pixel thumbnail and a probability, against what a researcher would write first, in one run.

    python tests/benchmarks/pipeline.py [--images 24] [--repeat 5] [--size 3328x2560] [--syntaxes explicit,jpeg_lossless,jpeg2000]

The reference: pydicom's pixel_array, apply_modality_lut, apply_voi_lut, min-max in float64, Pillow LANCZOS, ONNX Runtime fp32 in batches of 32, joblib on all
cores. Both sides use the same model and the same number of processes, are warmed up first, and take turns. Figures are medians; only the ratios travel."""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import onnxruntime as ort
import polars as pl
import pydicom
from joblib import Parallel, delayed
from mammo_nb.core.engine import engine
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import phantom_image, write_dicom
from mammo_nb.infer import groups_of, prepared
from mammo_nb.learn.bundle import Bundle, bundle_meta, export_bundle
from mammo_nb.learn.rounds import make_model
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import generate_uid

THUMB, MODEL = 512, 224


def reference_image(path):
    ds = pydicom.dcmread(path)
    x = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64)
    if ds.PhotometricInterpretation == 'MONOCHROME1': x = x.max() - x
    x = ((x - x.min())/max(1e-9, x.max() - x.min())*255).astype(np.uint8)
    k = THUMB/max(x.shape)
    thumb = Image.fromarray(x).resize((round(x.shape[1]*k), round(x.shape[0]*k)), Image.LANCZOS)
    k = MODEL/max(thumb.size)
    small, out = np.asarray(thumb.resize((round(thumb.width*k), round(thumb.height*k)), Image.LANCZOS)), np.zeros((MODEL, MODEL), np.uint8)
    top, left = (MODEL - small.shape[0])//2, (MODEL - small.shape[1])//2
    out[top:top+small.shape[0], left:left+small.shape[1]] = small
    return out


def reference(paths, session, workers):
    x = np.stack(workers(delayed(reference_image)(p) for p in paths))[:, None]
    return np.concatenate([session.run(['prob'], {'image': x[i:i+32]})[0] for i in range(0, len(x), 32)])


def ours(manifest, folder, bundle, settings, client):
    return np.concatenate([bundle.predict(x) for _, x, reasons in prepared(groups_of(manifest, 8), folder, MODEL, THUMB, settings, client) if not any(reasons)])


def cohort(folder, syntax, n, size):
    for k in range(n):
        img, _ = phantom_image('CC', 'LR'[k % 2], size, tool='clip' if k % 3 else None, seed=k % 6)
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PhotometricInterpretation = '1.2.840.10008.5.1.4.1.1.1.2', generate_uid(), 'MG', 'MONOCHROME2'
        ds.WindowCenter, ds.WindowWidth = 2000, 3000
        write_dicom(folder/f'{k}.dcm', img, ds, syntax)
    rows = [dict(image_id=f'{k:016x}', path=f'{k}.dcm', frame=0, status='ok') for k in range(n)]
    return pl.DataFrame(rows)


def timed(fn, repeat):
    out = []
    for _ in range(repeat):
        t = time.perf_counter()
        fn()
        out.append(time.perf_counter() - t)
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--images', type=int, default=24)
    a.add_argument('--repeat', type=int, default=5)
    a.add_argument('--size', default='3328x2560')
    a.add_argument('--syntaxes', default='explicit,jpeg_lossless,jpeg2000')
    a = a.parse_args()
    size, s, cores = tuple(map(int, a.size.split('x'))), load_settings(), len(os.sched_getaffinity(0))
    s = s.model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=cores))))
    rows = []
    with tempfile.TemporaryDirectory() as d, Parallel(n_jobs=cores) as workers, engine(s) as client:
        d = Path(d)
        sample = np.random.default_rng(0).integers(0, 256, (32, MODEL, MODEL), dtype=np.uint8)
        export_bundle(make_model('resnet18', 2, MODEL, shrink=0).eval(), d/'model', bundle_meta(s, 'bench', 1, std=.25), sample)
        session = ort.InferenceSession(str(d/'model'/'model.onnx'), providers=['CPUExecutionProvider'])
        models = {p: Bundle.load(d/'model', p, provider='cpu') for p in ('fp32', 'int8')}
        one = {p: Bundle.load(d/'model', p, provider='cpu', threads=1) for p in models}
        alone = {p: statistics.median(timed(lambda: b.predict(sample), a.repeat)) for p, b in one.items() if b.predict(sample) is not None}
        for name in a.syntaxes.split(','):
            (d/name).mkdir()
            manifest, paths = cohort(d/name, name, a.images, size), [d/name/f'{k}.dcm' for k in range(a.images)]
            sides = dict(reference=lambda: reference(paths, session, workers)) | {p: lambda b=b: ours(manifest, d/name, b, s, client) for p, b in models.items()}
            times = {k: [] for k in sides}
            for fn in sides.values(): fn()
            for _ in range(a.repeat):
                for k, fn in sides.items(): times[k] += timed(fn, 1)
            med = {k: statistics.median(v) for k, v in times.items()}
            rows.append({'syntax': name} | {f'{k}, images/s': round(a.images/v, 1) for k, v in med.items()} | {f'{p}, times': round(med['reference']/med[p], 1) for p in models})
    print(f'{a.size}, {a.images} images, medians of {a.repeat}, {cores} processes')
    pl.Config.set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True).set_tbl_cols(12).set_tbl_width_chars(140)
    print(pl.DataFrame(rows))
    print(f"ResNet18 at {MODEL} alone, one thread: int8 is {alone['fp32']/alone['int8']:.2f} times as fast as fp32 ({len(sample)/alone['fp32']:.0f} images/s)")


if __name__ == '__main__': main()
