"""Leave-one-site-out on the phantoms' four hospitals: pixels, header and both (`learn/15_header_model` shows the table that `--save` writes).

    python tests/benchmarks/header_model.py [--patients 480] [--labels 600] [--wrong 0 0.2] [--work FOLDER] [--save]

Each hospital in turn is unknown to the pixel network (trained on the others), the choice of header features, the trees, the weights and the thresholds.
The truth of all phantoms is known, so all images of the hospital that is left out are scored, and not its hold-out only.
`--wrong`: the share of site b's images without a finding that carry its code all the same, for each finding (0: none)."""
import argparse
import time
from pathlib import Path

import numpy as np
import polars as pl

from mammo_nb.cohort.manifest import scan
from mammo_nb.cohort.thumbs import Thumbnails, make_thumbnails
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import make_cohort
from mammo_nb.learn.data import labelled_frame
from mammo_nb.learn.header_model import source_scores, sources_at_new_sites
from mammo_nb.learn.sites import full_model

ROOT = Path(__file__).resolve().parents[2]


def study(size=128):
    s = load_settings(ROOT/'settings.ini')
    return s.model_copy(update=dict(image=s.image.model_copy(update=dict(thumbnail_size=2*size, model_size=size)),
                                    train=s.train.model_copy(update=dict(pretrained='no', arch='resnet18'))))


def cohort(folder, patients, s):
    "`(labelled rows, manifest, thumbnails)` of phantoms from sites a to d, every image labelled"
    truth = make_cohort(folder/'dicom', patients=patients, image_size=s.image.thumbnail_size, seed=7, sites=('a', 'b', 'c', 'd'), broken=0., workers=1)
    m = scan(folder/'dicom', folder/'cohort', s, seed=1)
    make_thumbnails(m, folder/'dicom', folder/'cohort'/'thumbnails', s)
    site = pl.col('path').str.split('/').list.first()   # the hospitals' own letters instead of pseudonyms
    m = m.with_columns(site=site)
    frame = labelled_frame(m, truth.select('image_id', *s.columns).unique('image_id'), s)
    return frame, m, Thumbnails(folder/'cohort'/'thumbnails')


def fewer(frame, n, seed=0):
    "`n` training and n/3 validation images of randomly drawn patients, as many from each site: what a small study labels"
    parts, sites = [], frame['site'].n_unique()
    for split, most in (('train', n), ('valid', n/3)):
        for (_,), d in frame.filter(split=split).sort('image_id').group_by('site', maintain_order=True):
            order = np.random.default_rng(seed).permutation(d['patient_id'].unique().sort())
            d = d.with_columns(pl.col('patient_id').replace_strict(dict(zip(order, range(len(order))))).alias('turn')).sort('turn', 'image_id')
            parts.append(d.head(round(most/sites)).drop('turn'))
    return pl.concat(parts).sort('image_id')


def miscoded(m, frame, share, seed=0):
    "the manifest with wrong codes at site b: both rules that say yes, in a share of the images that show neither"
    rng, y = np.random.default_rng(seed), dict(zip(frame['image_id'], frame.select('has_biopsy_tool', 'has_mag_view').rows()))
    def rules(i, site, fired):
        if site != 'b' or i not in y: return fired
        out = [r for r in (fired or '').split(',') if r]
        for value, rule in zip(y[i], ('postbiopsy', 'magnification')):
            if not value and rng.random() < share: out = [r for r in out if r != 'contact'] + [rule]
        return ','.join(out)
    return m.with_columns(header_rules=pl.Series([rules(*r) for r in m.select('image_id', 'site', 'header_rules').iter_rows()], dtype=pl.String))


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--patients', type=int, default=480)
    a.add_argument('--labels', type=int, nargs='*', default=[600], help='training images that are labelled, of all sites together; 0: all')
    a.add_argument('--size', type=int, default=128, help="the network's input, pixels")
    a.add_argument('--epochs', type=int, default=0, help='of each training; 0: as settings say')
    a.add_argument('--wrong', type=float, nargs='*', default=[0., .2])
    a.add_argument('--work', type=Path, help='folder for the phantoms; default: a temporary one')
    a.add_argument('--save', action='store_true', help='write nbs/data/header_model.parquet')
    a = a.parse_args()
    import tempfile
    import torch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        s, began, parts = study(a.size), time.time(), []
        full, m, thumbs = cohort(a.work or Path(tmp), a.patients, s)
        everything = lambda f, site: (full.filter(pl.col('site') == site), 'random')
        for n in a.labels:
            frame, asked = fewer(full, n) if n else full, {}
            def pixel(rest, rows):   # trained once per hospital, whatever its headers say
                key = tuple(sorted(rest['site'].unique()))
                if key not in asked:
                    asked[key] = full_model(rest, rows, thumbs, s, a.epochs, s.study.seed)[0]
                    print(f'{time.time()-began:.0f} s: pixel model of {", ".join(key)} from {rest.filter(split="train").height} images', flush=True)
                return asked[key]
            for share in a.wrong:
                rows = sources_at_new_sites(frame, miscoded(m, full, share), s, pixel, everything)
                if a.work: rows.write_parquet(a.work/f'rows-{n}-{share}.parquet')
                parts.append(source_scores(rows).with_columns(wrong=pl.lit(share), labels=pl.lit(n or full.filter(split='train').height)))
        table = pl.concat(parts)
    with pl.Config(tbl_rows=60, tbl_cols=30, tbl_width_chars=250): print(table)
    if a.save: write_parquet(table, ROOT/'nbs'/'data'/'header_model.parquet', s)


if __name__ == '__main__': main()
