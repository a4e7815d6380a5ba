"""Replays of the query strategies on a phantom cohort, from the DICOM files on: the figures that nbs/learn/06_replay.ipynb shows.

    python tests/benchmarks/replay.py --out nbs/data/replay.parquet

makes a hospital to train the encoder on (60 patients of site d), the cohort to replay (500 patients of sites a, b, c; 15 % of the images show
something), embeds it once per encoder and replays it. About a quarter of an hour on two cores. `--seed 101` is the cohort on which the default
strategy was chosen; the figures are of 202, which nothing was chosen on. ImageNet weights are used where MAMMO_WEIGHTS has them.
"""
import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import polars as pl

from mammo_nb.core.engine import engine, write_parquet
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.phantom import make_cohort
from mammo_nb.preprocess import preprocess

RARE = dict(biopsy=.08, mag=.08, both=.01)
ROOT = Path(__file__).resolve().parents[2]


def settings():
    s = load_settings(ROOT/'settings.ini')
    return s.model_copy(update=dict(image=s.image.model_copy(update=dict(thumbnail_size=512))))


def cohort(work, name, client, **kw):
    "`(folder, truth)` of a preprocessed phantom cohort"
    truth = make_cohort(work/'dicom'/name, image_size=512, broken=0, **kw)
    j = replace(job(name), folder=work/name, dicom_dir=work/'dicom'/name, settings=settings())
    preprocess(j, j.dicom_dir, client)
    return j.folder, truth


def hospital_encoder(folder, dicom):
    "a model of the other hospital, trained as a lab would after its first study"
    from mammo_nb.labels.store import LabelStore, Oracle
    from mammo_nb.cohort.manifest import read_manifest
    from mammo_nb.dicom.phantom import truth_path
    from mammo_nb.learn.rounds import train_round
    s = settings()
    s = s.model_copy(update=dict(train=s.train.model_copy(update=dict(pretrained='no'))))
    if done := sorted(folder.glob('rounds/[0-9]*/model.onnx')): return done[-1].parent
    with LabelStore(folder/'labels.sqlite', s) as store:
        store.sync_images(read_manifest(folder))
        oracle = Oracle(store, truth_path(dicom), 0., s.study.seed)
        for q in ('train', 'valid', 'hold_out'): oracle.label(store.queue(q), queue=q)
    return train_round(folder, s)


def main():
    a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    a.add_argument('--work', type=Path, default=ROOT/'outputs'/'replay', help='where cohorts and embeddings are kept')
    a.add_argument('--out', type=Path, required=True, help='the Parquet file with a row per encoder, strategy, seed and number of labels')
    a.add_argument('--seed', type=int, default=202, help='of the cohort')
    a.add_argument('--patients', type=int, default=500)
    a.add_argument('--seeds', type=int, default=50)
    a.add_argument('--encoders', default='hospital,imagenet,plain')
    a.add_argument('--strategies', default='margin,entropy,badge,random+margin,coreset')
    a.add_argument('--first', type=int, default=50)
    a.add_argument('--step', type=int, default=25)
    a.add_argument('--last', type=int, default=600)
    a = a.parse_args()
    from mammo_nb.learn.replay import labels_needed, paired, replay, replay_data
    work, s, parts = a.work.resolve(), settings(), []
    began = time.time()
    tell = lambda *x: print(f'{time.time()-began:6.0f} s ', *x, flush=True)
    with engine(s) as client:
        name = f'cohort{a.seed}'
        folder, truth = cohort(work, name, client, patients=a.patients, seed=a.seed, sites=('a', 'b', 'c'), prevalence=RARE)
        any_yes = (truth['has_biopsy_tool'] | truth['has_mag_view']).mean()
        tell(f'{len(truth)} images, {100*any_yes:.1f} % show something')
        for kind in a.encoders.split(','):
            if kind == 'hospital': encoder = hospital_encoder(cohort(work, 'encoder', client, patients=60, seed=303, sites=('d',))[0], work/'dicom'/'encoder')
            else: encoder = kind
            path = work/f'{name}-{kind}.parquet'
            try: rows = replay_data(folder, s, truth, path, encoder)
            except MammoError as e: tell(f'{kind} left out: {e}'); continue
            tell(f"{kind}: {rows['embedding'].dtype.shape[0]} numbers per image; {(rows['split'] == 'train').sum()} to ask about, {(rows['split'] == 'hold_out').sum()} hold-out")
            r = replay(path, a.strategies.split(','), a.seeds, client, ROOT/'settings.ini', first=a.first, step=a.step, last=a.last)
            tell(f'{kind}: replayed')
            parts.append(r.with_columns(encoder=pl.lit(kind)))
            for score in ('accuracy', 'balanced', 'auc'):
                print(score, labels_needed(r, score, min(500, a.last)).drop('target').join(paired(r, score=score), on='strategy', how='left').with_columns(pl.selectors.float().round(4)))
    df = pl.concat(parts).with_columns(pl.col('accuracy').round(4).cast(pl.Float32), pl.col('balanced', 'auc').round(3).cast(pl.Float32), pl.col('seed', 'labels', 'positives').cast(pl.Int16))
    write_parquet(df, a.out, s, cohort=f'phantoms, seed {a.seed}, {len(truth)} images, {100*any_yes:.1f} % with a finding')
    tell(f'{a.out}: {a.out.stat().st_size/1000:.0f} kB')


if __name__ == '__main__':
    pl.Config.set_tbl_cols(20).set_tbl_width_chars(200).set_tbl_rows(40).set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True)
    main()
