"""A small cohort of phantom images with thumbnails, labels and the tools' places, made in seconds without DICOM: what explanations need."""
import atexit
import functools
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.engine import write_json, write_parquet
from mammo_nb.dicom.display import PREPROCESSING_VERSION
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.labels.store import LabelStore

BOX = ('tool_x0', 'tool_y0', 'tool_x1', 'tool_y1')


def phantom_cohort(folder, settings, patients=60, per=5, seed=0, prevalence=(.5, .5), tools=('needle', 'clip', 'wire'), size=(192, 148), label=True):
    "The truth: the manifest's columns, the label columns, tool and `BOX` as shares; a finding is drawn independently of the other"
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    thumbs, rows = Thumbnails(folder/'thumbnails'), []
    write_json(folder/'thumbnails'/'meta.json', dict(preprocessing_version=PREPROCESSING_VERSION, long_edge=size[0]))
    for p in range(patients):
        split = ['hold_out', 'valid', 'train', 'train', 'train'][p % 5]
        for k in range(per):
            i, side, y = f'{seed*100_000+p*per+k:016x}', 'LR'[k % 2], [int(rng.random() < q) for q in prevalence]
            tool, view = tools[int(rng.integers(len(tools)))] if y[0] else None, ('CC', 'ML')[k//2 % 2]
            extra = tuple(d for d in ('text', 'calcifications', 'bb') if rng.random() < .2)
            img, info = phantom_image(view, side, size, tool=tool, magnification=bool(y[1]), distractors=extra, seed=seed*100_000+p*per+k)
            thumbs.put(i, (img >> 4).astype(np.uint8))
            rows.append(dict(image_id=i, path=f'{p}/{k}.dcm', study_id=f's{p}', patient_id=f'p{p}', site='a', laterality=side, view=f'{side}-{view}', frame=0, split=split,
                             status='ok', reason='', tool=tool, **dict(zip(settings.columns, y)), **dict(zip(BOX, info['tool_box'] or [None]*4))))
    truth = pl.DataFrame(rows, schema_overrides=dict.fromkeys(BOX, pl.Float64) | dict(tool=pl.String))
    manifest = truth.drop(settings.columns, 'tool', *BOX)
    write_parquet(manifest, folder/'manifest.parquet', settings)
    with LabelStore(folder/'labels.sqlite', settings) as store:
        store.sync_images(manifest)
        if label:
            for r in truth.iter_rows(named=True):
                store.label(r['image_id'], tuple(n for n, c in zip(settings.names, settings.columns) if r[c]), 'anna')
    return truth


def trained(head='sigmoid'):
    "`(bundle's folder, truth of all images, settings)` of a round on 180 labelled phantoms at 96 pixels; half a minute on one core, once per test run and head"
    return _trained(head)


@functools.cache
def _trained(head):
    import torch

    import toy_cohort as toy
    from mammo_nb.learn.rounds import train_round
    s = toy.settings_with(image=dict(model_size=96, thumbnail_size=192), study=dict(head=head),
                          train=dict(arch='resnet18', epochs=1, min_steps=150, batch_size=16, lr=3e-3, pretrained='no', shrink=2))
    tmp = tempfile.TemporaryDirectory()
    atexit.register(tmp.cleanup)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        truth = phantom_cohort(Path(tmp.name)/'toy', s)
        return train_round(Path(tmp.name)/'toy', s, int8=False, tell=lambda text: None), truth, s
    finally: torch.set_num_threads(n)
