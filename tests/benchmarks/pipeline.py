"""DICOM to a 512-pixel thumbnail and a probability, against what a researcher would write first, in one run.

    python tests/benchmarks/pipeline.py [--images 64] [--repeat 5] [--size 3328x2560] [--syntaxes explicit,jpeg_lossless,jpeg2000]

The reference: pydicom's pixel_array, apply_modality_lut, apply_voi_lut, min-max in float64, Pillow LANCZOS, ONNX Runtime fp32 in batches of 32, joblib on all
cores. Both sides use the same model and the same number of processes, are warmed up first, and take turns. Figures are medians; only the ratios travel."""
import argparse
import os
import shutil
import tempfile
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
from mammo_nb.learn.answers import answered, group_size, groups_of
from mammo_nb.learn.bundle import Bundle, bundle_meta, export_bundle
from mammo_nb.learn.rounds import make_model
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import generate_uid
from turns import medians

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


def ours(manifest, folder, bundle, settings, client, workers):
    groups = groups_of(manifest, group_size(len(manifest), settings.infer.batch_size, workers))
    return sum(len(g) - sum(map(bool, reasons)) for g, _, reasons in answered(groups, bundle, folder, THUMB, settings, client))


def cohort(folder, syntax, n, size):
    for k in range(n):
        img, _ = phantom_image('CC', 'LR'[k % 2], size, tool='clip' if k % 3 else None, seed=k % 6)
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PhotometricInterpretation = '1.2.840.10008.5.1.4.1.1.1.2', generate_uid(), 'MG', 'MONOCHROME2'
        ds.WindowCenter, ds.WindowWidth = 2000, 3000
        write_dicom(folder/f'{k}.dcm', img, ds, syntax)
    rows = [dict(image_id=f'{k:016x}', path=f'{k}.dcm', frame=0, status='ok') for k in range(n)]
    return pl.DataFrame(rows)


def row(work, reference, a, b, unit, bar):
    return dict(work=work, reference=reference, reference_value=round(a, 2), ours_value=round(b, 2), unit=unit, ratio=round(b/a, 2), bar=bar, ok=b/a >= bar)


BARS = dict(explicit=('uncompressed', 6, 10), jpeg_lossless=('JPEG Lossless', 5, 6), jpeg2000=('JPEG 2000 lossless', 14, 18))
REFERENCE = 'pydicom, float64, Pillow LANCZOS, ONNX fp32, joblib'


def model_rows(folder, repeat, sample):
    "The model alone on one core"
    one = {p: Bundle.load(folder, p, provider='cpu', threads=1) for p in ('fp32', 'int8')}
    med = medians({p: lambda b=b: b.predict(sample, 32) for p, b in one.items()}, repeat)
    return [row(f'ResNet18 at {MODEL} alone, one core, int8', 'the same in fp32', *(len(sample)/med[p] for p in ('fp32', 'int8')), 'images/s', 2.5)]


def rows(repeat=5, small=False, images=64, size=(3328, 2560), syntaxes=tuple(BARS), cores=None):
    "The table's rows: every syntax in fp32 and int8 against the reference, and the model alone"
    if small: repeat, images, size = 1, 16, (832, 640)
    cores, s, out = cores or len(os.sched_getaffinity(0)), load_settings(), []
    s = s.model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=cores))))
    with tempfile.TemporaryDirectory() as d, Parallel(n_jobs=cores) as joblib, engine(s) as client:
        d = Path(d)
        sample = np.random.default_rng(0).integers(0, 256, (32, MODEL, MODEL), dtype=np.uint8)
        export_bundle(make_model('resnet18', 2, MODEL, shrink=0).eval(), d/'model', bundle_meta(s, 'bench', 1, std=.25), sample)
        session = ort.InferenceSession(str(d/'model'/'model.onnx'), providers=['CPUExecutionProvider'])
        models = {p: Bundle.load(d/'model', p, provider='cpu') for p in ('fp32', 'int8')}
        out += model_rows(d/'model', repeat, sample)
        for name in syntaxes:
            (d/name).mkdir()
            manifest, paths = cohort(d/name, name, images, size), [d/name/f'{k}.dcm' for k in range(images)]
            sides = dict(reference=lambda: reference(paths, session, joblib)) | {p: lambda b=b: ours(manifest, d/name, b, s, client, cores) for p, b in models.items()}
            assert all(fn() == images for p, fn in sides.items() if p in models)
            med, (title, *bars) = medians(sides, repeat), BARS.get(name, (name, 0, 0))
            for p, bar in zip(models, bars):
                out.append(row(f'DICOM to {THUMB} thumbnail and probability, {title} {size[0]}x{size[1]}, {p}', REFERENCE, images/med['reference'], images/med[p], 'images/s', bar))
            shutil.rmtree(d/name)
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--images', type=int, default=64)
    a.add_argument('--repeat', type=int, default=5)
    a.add_argument('--size', default='3328x2560')
    a.add_argument('--syntaxes', default=','.join(BARS))
    a.add_argument('--small', action='store_true')
    a = a.parse_args()
    pl.Config.set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True).set_tbl_cols(12).set_tbl_width_chars(180).set_fmt_str_lengths(90).set_tbl_rows(99)
    print(pl.DataFrame(rows(a.repeat, a.small, a.images, tuple(map(int, a.size.split('x'))), a.syntaxes.split(','))).drop('reference'))


if __name__ == '__main__': main()
