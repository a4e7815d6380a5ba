"""A small cohort with thumbnails and labels, made in seconds without DICOM: what learn/ needs and no more."""
from pathlib import Path

import numpy as np
import polars as pl

from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.engine import write_json, write_parquet
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.display import PREPROCESSING_VERSION
from mammo_nb.labels.store import LabelStore


def settings_with(**sections):
    "The project's settings with some values changed, e.g. `image=dict(model_size=64)`"
    s = load_settings(Path(__file__).resolve().parents[1]/'settings.ini')
    return s.model_copy(update={k: getattr(s, k).model_copy(update=v) for k, v in sections.items()})


def tiny_settings(**train):
    "64 pixels, a small network, a few steps"
    return settings_with(image=dict(model_size=64, thumbnail_size=96), train=dict(arch='shufflenet_v2_x0_5', epochs=1, min_steps=4, batch_size=8, lr=3e-3, pretrained='no') | train)


def toy_image(rng, tool, mag, h=96, w=72):
    "A bright half disc; a tool is a white bar, a magnification view has horizontal lines"
    y, x = np.mgrid[:h, :w]
    a = 120*(np.hypot((y-h/2)/(h*.45), x/(w*.8)) < 1) + rng.normal(0, 6, (h, w))
    if mag: a[h//6::h//3] += 70
    if tool:
        r, c = int(rng.integers(h//4, 3*h//4)), int(rng.integers(5, w//2))
        a[r:r+4, c:c+14] = 255
    return np.clip(a, 0, 255).astype(np.uint8)


def toy_cohort(folder, settings, patients=20, per=4, seed=0, label='all', prevalence=(.4, .4)):
    "`(cohort_dir, manifest, truth)`; `label`: 'all', 'none', or a function of the truth table that gives the ids to label"
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    thumbs, rows = Thumbnails(folder/'thumbnails'), []
    write_json(folder/'thumbnails'/'meta.json', dict(preprocessing_version=PREPROCESSING_VERSION, long_edge=96))
    for p in range(patients):
        split = 'hold_out' if p % 5 == 0 else 'valid' if p % 5 == 1 else 'train'
        for k in range(per):
            i, side = f'{p*per+k:016x}', 'LR'[k % 2]
            y = [int(rng.random() < q) for q in prevalence]
            thumbs.put(i, toy_image(rng, *y))
            rows.append(dict(image_id=i, path=f'{p}/{k}.dcm', study_id=f's{p}', patient_id=f'p{p}', site='a', laterality=side, view=f'{side}-CC', frame=0,
                             split=split, status='ok', reason='', **dict(zip(settings.columns, y))))
    truth = pl.DataFrame(rows)
    manifest = truth.drop(settings.columns)
    write_parquet(manifest, folder/'manifest.parquet', settings)
    store = LabelStore(folder/'labels.sqlite', settings)
    store.sync_images(manifest)
    ids = [] if label == 'none' else truth['image_id'].to_list() if label == 'all' else label(truth)
    for r in truth.filter(pl.col('image_id').is_in(ids)).iter_rows(named=True):
        store.label(r['image_id'], tuple(n for n, c in zip(settings.names, settings.columns) if r[c]), 'anna')
    store.close()
    return folder, manifest, truth
