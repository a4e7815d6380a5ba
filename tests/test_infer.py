"""Inference: fixed groups, resumption, rejected images, aggregation; each a mistake that public pipelines of this idea make."""
import dataclasses
import functools
import os

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import mammo_nb.infer as infer_module
import mammo_nb.learn.answers as answers_module
from conftest import small_project
from mammo_nb.cohort.manifest import funnel, scan
from mammo_nb.core.engine import engine
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.phantom import SITES_B, make_cohort
from mammo_nb.infer import aggregate, cohort_shift, infer, newest_bundle, predict, shift_table, with_status, write_csv
from mammo_nb.learn.answers import group_size, groups_of
from mammo_nb.learn.bundle import Bundle, bundle_meta, export_bundle
from mammo_nb.metrics.shift import shift_reference


class Model:
    "Answers with the mean of the image, so that every image has its own probability; asked in this process, as one on a GPU is"
    provider, path = 'CUDAExecutionProvider', '.'
    names, size, thresholds, id, precision, meta = ('biopsy', 'mag'), 64, (.3, .5), 'mean-r001-00000000', 'fp32', dict(preprocessing_version=1)
    choices, reference = dict(biopsy=dict(flag=.3), mag=dict(flag=.5)), None

    def __init__(self): self.seen = 0

    def predict(self, x):
        self.seen += len(x)
        m = x.reshape(len(x), -1).mean(1, dtype=np.float64) / 255
        return np.stack([m, 1 - m], 1).astype(np.float32)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "A scanned cohort of small phantoms, some of them broken"
    root = small_project(tmp_path_factory.mktemp('infer')/'p')
    s = load_settings(root)
    s = s.model_copy(update=dict(infer=s.infer.model_copy(update=dict(batch_size=4))))
    make_cohort(root/'dicom', patients=6, image_size=160, seed=3, sites=SITES_B, broken=.15, workers=1)
    return s, root/'dicom', scan(root/'dicom', root/'outputs'/'c', s)


def test_every_image_is_predicted_once_in_fixed_groups(cohort):
    s, _, manifest = cohort
    groups = list(groups_of(manifest, 4))
    ids = [r[0] for g in groups for r in g]
    assert ids == manifest.filter(status='ok')['image_id'].to_list() and len(set(ids)) == len(ids)
    assert {len(g) for g in groups[:-1]} == {4}


def test_found_is_predicted_plus_rejected_plus_duplicate(cohort, tmp_path):
    s, dicom, manifest = cohort
    probs, n, _ = predict(manifest, dicom, Model(), tmp_path, s)
    p = with_status(manifest, probs)
    f = funnel(p)
    assert f['found'] == manifest.height == f['ok'] + f['rejected'] + f['duplicate'] and f['rejected'] >= 2
    assert p.filter(status='ok')['prob_biopsy'].null_count() == 0 and p.filter(pl.col('status') != 'ok')['prob_biopsy'].null_count() == f['found'] - f['ok']
    assert p.filter(status='rejected')['reason'].null_count() == 0


@pytest.mark.parametrize('stop_after', [1, 3])
def test_stopped_and_started_again_gives_the_same_rows_and_repeats_little(cohort, tmp_path, stop_after):
    s, dicom, manifest = cohort
    whole, _, _ = predict(manifest, dicom, Model(), tmp_path/'a', s)

    class Stops(Model):
        def predict(self, x):
            if self.seen >= stop_after * 4: raise KeyboardInterrupt
            return super().predict(x)
    with pytest.raises(KeyboardInterrupt): predict(manifest, dicom, Stops(), tmp_path/'b', s, every=0)
    again = Model()
    resumed, n, _ = predict(manifest, dicom, again, tmp_path/'b', s)
    assert resumed.sort('image_id').equals(whole.sort('image_id'))
    assert n == again.seen <= manifest.filter(status='ok').height - (stop_after - 1) * 4


def test_a_changed_file_is_read_again(cohort, tmp_path):
    s, dicom, manifest = cohort
    predict(manifest, dicom, Model(), tmp_path, s)
    first = manifest.filter(status='ok')['path'][0]
    touched = manifest.with_columns(mtime_ns=pl.when(pl.col('path') == first).then(pl.col('mtime_ns') + 1).otherwise('mtime_ns'))
    model = Model()
    _, n, _ = predict(touched, dicom, model, tmp_path, s)
    assert 0 < n <= 8


def test_a_failing_group_costs_only_the_guilty_image(cohort, tmp_path, monkeypatch):
    s, dicom, manifest = cohort
    guilty, real = list(groups_of(manifest, 4))[1][2][0], answers_module.group_inputs

    def crash(rows, **kw):
        if any(r[0] == guilty for r in rows): raise MemoryError
        return real(rows, **kw)
    monkeypatch.setattr(answers_module, 'group_inputs', crash)
    probs, _, _ = predict(manifest, dicom, Model(), tmp_path, s)
    p = with_status(manifest, probs)
    lost = p.filter((manifest['status'] == 'ok') & (p['status'] == 'rejected'))
    alone = with_status(manifest, predict(manifest.filter(pl.col('image_id') != guilty), dicom, Model(), tmp_path/'ok', s)[0])
    others = pl.col('image_id') != guilty
    assert 'memory' in lost.filter(image_id=guilty)['reason'][0]
    assert p.filter(others)['status'].equals(alone.filter(others)['status'])


def test_another_model_never_keeps_the_first_ones_answers(cohort, tmp_path, monkeypatch):
    s, dicom, manifest = cohort

    class Other(Model):
        id = 'other-r002-11111111'
        def predict(self, x): return 1 - super().predict(x)
    j = dataclasses.replace(job('c', settings=str(s.root/'settings.ini')), settings=s)
    monkeypatch.setattr(infer_module, 'newest_bundle', lambda folder: None)
    rows = {}
    for m in (Model(), Other()):
        monkeypatch.setattr(infer_module.Bundle, 'load', lambda *a, m=m, **k: m)
        rows[m.id] = infer(j)
    a, b = (r['predictions'].filter(status='ok')['prob_biopsy'].to_numpy() for r in rows.values())
    assert np.allclose(a, 1 - b) and len({r['folder'] for r in rows.values()}) == 2
    assert not list(rows[Model.id]['folder'].glob('parts/*'))
    head = (rows[Model.id]['folder']/'studies.csv').read_text().splitlines()
    assert head[0] == 'study_id,has_biopsy_tool,has_mag_view,max_prob_biopsy,max_prob_mag,image_count'
    assert len(head) - 1 == manifest['study_id'].n_unique()


def test_a_study_is_flagged_by_any_image_and_unknown_without_one(tmp_path):
    s = load_settings()
    p = pl.DataFrame(dict(study_id=['a', 'a', 'b', 'c', 'c'], status=['ok', 'ok', 'ok', 'rejected', 'duplicate'],
                          prob_biopsy=[.1, .5, .2, None, None], prob_mag=[.3, .2, .49999, None, None]))
    st = aggregate(p, s)
    assert st['has_biopsy_tool'].to_list() == [True, False, None] and st['has_mag_view'].to_list() == [False, False, None]
    assert st['image_count'].to_list() == [2, 1, 0] and st['rejected_count'].to_list() == [0, 0, 1] and st['duplicate_count'].to_list() == [0, 0, 1]
    write_csv(st, tmp_path/'studies.csv', s)
    assert (tmp_path/'studies.csv').read_text() == ('study_id,has_biopsy_tool,has_mag_view,max_prob_biopsy,max_prob_mag,image_count\n'
                                                    'a,true,false,0.500000,0.300000,2\nb,false,false,0.200000,0.499990,1\nc,,,,,0\n')


def test_thresholds_of_the_model_count():
    p = pl.DataFrame(dict(study_id=['a'], status=['ok'], prob_biopsy=[.4], prob_mag=[.4]))
    assert aggregate(p, load_settings(), dict(biopsy=dict(flag=.3), mag=dict(flag=.5))).select('has_biopsy_tool', 'has_mag_view').row(0) == (True, False)


def test_two_thresholds_and_the_size_of_a_study():
    p = pl.DataFrame(dict(study_id=['a', 'b', 'c', *['d']*8, 'e'], status=['ok']*11 + ['rejected'], prob_biopsy=[.9, .5, .1, *[.7]*8, None], prob_mag=[.1]*11 + [None]))
    two = aggregate(p, load_settings(), dict(biopsy=dict(flag=.6, clear=.3), mag=dict(flag=.5)))
    assert two['decision_biopsy'].to_list() == ['flag', 'review', 'clear', 'flag', None] and 'decision_mag' not in two.columns
    sized = aggregate(p, load_settings(), dict(biopsy=dict(flag=.6, clear=.3, size=dict(slope=1., images=1)), mag=dict(flag=.5)))
    assert sized['decision_biopsy'].to_list() == ['flag', 'review', 'clear', 'clear', None], 'eight images at .7 are no more than chance'
    assert sized['has_biopsy_tool'].to_list() == [True, False, False, False, None]


def test_shift_names_the_site_that_differs():
    rng = np.random.default_rng(0)
    def rows(n, site, mean): return pl.DataFrame(dict(patient_id=[f'{site}{i}' for i in range(n)], site=[site]*n, status=['ok']*n,
                                                      prob_biopsy=rng.random(n).astype(np.float32), px_mean=rng.normal(mean, 10, n).astype(np.float32)))
    home, away = rows(400, 'home', 90), pl.concat([rows(150, 'leeds', 90), rows(150, 'york', 130), rows(9, '', 90).with_columns(status=pl.lit('rejected'))])
    report, seen = cohort_shift(away, shift_reference(home))
    table = shift_table(report, dict(prob_biopsy='Biopsy tool')).rows_by_key('site', named=True, unique=True)
    assert set(table) == {'leeds', 'york'} and len(seen) == 300
    assert table['leeds']['what'] == 'all as in training' and table['york']['what'] == 'tissue brightness differs a lot'
    assert cohort_shift(away, None) is None


def test_no_model_is_one_sentence(tmp_path):
    with pytest.raises(MammoError, match='No trained model under .* run mammo run train, or name one with bundle=PATH'): newest_bundle(tmp_path/'x')


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A real bundle of a tiny network"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    s, folder = load_settings(), tmp_path_factory.mktemp('bundle')/'001'
    s = s.model_copy(update=dict(image=s.image.model_copy(update=dict(model_size=64))))
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64), dtype=np.uint8)
    export_bundle(net, folder, bundle_meta(s, 'toy', 1), images)
    return folder


def test_workers_and_this_process_and_a_gpu_give_the_same_numbers(cohort, bundle, tmp_path):
    s, dicom, manifest = cohort
    s = s.model_copy(update=dict(infer=s.infer.model_copy(update=dict(batch_size=16)), engine=s.engine.model_copy(update=dict(workers=2))))
    model = Bundle.load(bundle, provider='cpu')
    here = predict(manifest, dicom, model, tmp_path/'a', s)[0].sort('image_id')
    with engine(s) as client:
        there = predict(manifest, dicom, model, tmp_path/'b', s, client)[0].sort('image_id')
        one = type('OnGPU', (), dict(provider='CUDAExecutionProvider', __getattr__=lambda self, k: getattr(model, k)))()
        gpu = predict(manifest, dicom, one, tmp_path/'c', s, client)[0].sort('image_id')
    assert here.height > 16 and here.drop('failed').equals(there.drop('failed')) and here['failed'].is_null().equals(there['failed'].is_null())
    assert np.allclose(gpu['prob_biopsy'].drop_nulls(), here['prob_biopsy'].drop_nulls(), atol=1e-6)


@pytest.mark.parametrize('n, most, workers', [(5, 64, 2), (240, 64, 2), (240, 64, 1), (10**6, 64, 2), (10**6, 4, 2), (1000, 100, 7)])
def test_group_sizes_share_their_borders(n, most, workers):
    size = group_size(n, most, workers)
    assert 1 <= size <= most and (size % 8 == 0 or size == most < 8)


def test_a_worker_that_dies_costs_only_the_guilty_image(cohort, bundle, tmp_path):
    s, dicom, manifest = cohort
    s = s.model_copy(update=dict(infer=s.infer.model_copy(update=dict(batch_size=16)), engine=s.engine.model_copy(update=dict(workers=2))))
    model = Bundle.load(bundle, provider='cpu')
    whole = predict(manifest, dicom, model, tmp_path/'a', s)[0].sort('image_id')
    guilty = whole.filter(pl.col('failed').is_null())['image_id'][11]
    with engine(s) as client:
        client.run(crash_on, guilty)
        client.register_worker_callbacks(functools.partial(crash_on, guilty))
        got = predict(manifest, dicom, model, tmp_path/'b', s, client)[0].sort('image_id')
    lost = pl.col('image_id') == guilty
    assert 'brought the reading process down' in got.filter(lost)['failed'][0]
    assert got.filter(~lost).select('prob_biopsy', 'prob_mag').equals(whole.filter(~lost).select('prob_biopsy', 'prob_mag'))


def crash_on(guilty):
    "Makes this process die when it reads one image"
    import mammo_nb.learn.answers as a
    real = a._one_file
    a._one_file = lambda rows, *args: os._exit(9) if any(r[0] == guilty for r in rows) else real(rows, *args)


def test_a_worker_with_another_model_says_so(bundle, tmp_path):
    with pytest.raises(MammoError, match='is another model on this worker'): answers_module._session(str(bundle), 'fp32', 'f'*64)
