"""How often the map's peak lies on the tool: made-up patients are drawn, read, labelled and trained on as in the demo, and the game is played on images of
patients the network never saw: its own validation and hold-out patients, and a second cohort of another seed. From nothing, about six minutes on one core.

    python tests/benchmarks/pointing_game.py [--seed 7] [--fresh 8] [--patients 60] [--image-size 768] [--labels 0] [--keep FOLDER]
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from mammo_nb.cohort.manifest import reject, scan
from mammo_nb.cohort.thumbs import Thumbnails, make_thumbnails
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import SITES_A, make_cohort, truth_path
from mammo_nb.labels.store import LabelStore, Oracle
from mammo_nb.learn.explain import BOX, Explainer, pointing_game, pointing_scores
from mammo_nb.learn.rounds import make_model, train_round

SETTINGS = Path(__file__).resolve().parents[2]/'settings.ini'


def cohort(root, seed, patients, size):
    "`(cohort's folder, its manifest, images with a tool, settings)`"
    dicom = root/'dicom'/f'seed{seed}'
    make_cohort(dicom, patients, size, seed, SITES_A, broken=0., workers=1)
    settings, folder = load_settings(SETTINGS), root/f'seed{seed}'
    manifest = scan(dicom, folder, settings, seed=seed)  # the seed makes the splits the same every time
    manifest = reject(folder, make_thumbnails(manifest, dicom, folder/'thumbnails', settings), settings)
    tools = pl.read_parquet(truth_path(dicom)).filter('has_biopsy_tool').unique('image_id').select('image_id', 'tool', *BOX)
    rows = manifest.filter(status='ok').select('image_id', 'patient_id', 'split').join(tools, on='image_id').sort('image_id')
    return folder, manifest, rows, settings


def label(folder, manifest, dicom, settings, most):
    "The truth as labels: all images, or the first `most` training images and the rest of the splits"
    ok = manifest.filter(status='ok').sort('image_id')
    train = ok.filter(split='train')['image_id'].to_list()
    for old in folder.glob('labels.sqlite*'): old.unlink()
    with LabelStore(folder/'labels.sqlite', settings) as store:
        store.sync_images(manifest)
        return Oracle(store, truth_path(dicom)).label(train[:most or None] + ok.filter(pl.col('split') != 'train')['image_id'].to_list())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seed', type=int, default=7, help='of the patients trained on')
    p.add_argument('--fresh', type=int, default=8, help='of the second cohort')
    p.add_argument('--patients', type=int, default=60)
    p.add_argument('--image-size', type=int, default=768)
    p.add_argument('--labels', type=int, default=0, help='training labels; 0: all')
    p.add_argument('--random', type=int, default=5, help='untrained networks to compare with')
    p.add_argument('--bar', type=float, default=.8)
    p.add_argument('--keep', help='a folder to work in and to leave; default: a temporary one')
    a = p.parse_args()
    torch.set_num_threads(1)
    pl.Config.set_tbl_hide_dataframe_shape(True), pl.Config.set_tbl_hide_column_data_types(True), pl.Config.set_tbl_width_chars(140), pl.Config.set_tbl_rows(20)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(a.keep or tmp)
        folder, manifest, rows, settings = cohort(root, a.seed, a.patients, a.image_size)
        label(folder, manifest, root/'dicom'/f'seed{a.seed}', settings, a.labels)
        bundle = train_round(folder, settings, int8=False)
        ex, unseen = Explainer.load(bundle), rows.filter(pl.col('split') != 'train')
        fresh_folder, _, fresh, _ = cohort(root, a.fresh, a.patients, a.image_size)
        parts = [('own', unseen, Thumbnails(folder/'thumbnails')), ('fresh', fresh, Thumbnails(fresh_folder/'thumbnails'))]

        def play(ex, **k): return pl.concat([pointing_game(ex, r, t, **k).with_columns(patient_id=pl.lit(w)+pl.col('patient_id')) for w, r, t in parts])
        began = time.process_time()
        played = play(ex)
        seconds = (time.process_time()-began)/max(1, played.height)
        n = sum(len(r) for _, r, _ in parts)
        print(f'\n{bundle.name}: {ex}; {played.height} of {n} unseen images with a tool are flagged; {seconds:.2f} s of one core per image\n')
        only, others = set(played['image_id']), [('averaged, last layer', play(ex, classic=True))]
        for s in range(a.random):
            torch.manual_seed(s)
            net = make_model(settings.train.arch, len(ex.names), ex.size, settings.train.shrink)
            others.append((f'untrained {s}', play(Explainer(net, ex.meta), only=only)))
        print(pl.concat([pointing_scores(played), *[pointing_scores(d, by='').with_columns(kind=pl.lit(k)) for k, d in others]]))
        rate = played['hit'].mean() if played.height else 0.
        print(f'\nPeak on the tool, strictly: {played["hit"].sum()} of {played.height} = {rate:.3f} (bar {a.bar})')
        return 0 if rate >= a.bar else 1


if __name__ == '__main__': sys.exit(main())
