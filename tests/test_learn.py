"Data, acquisition and rounds: what may enter training, what is asked next, and what a round leaves behind."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from mammo_nb.core.settings import load_settings
from hypothesis import given, settings as hyp, strategies as st

import toy_cohort as toy
from conftest import SHARED
from mammo_nb.core.settings import MammoError
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.acquire import Batch, next_batch, pool_frame, random_queue, uncertainty

S = toy.tiny_settings()
WEIGHTS = SHARED/'weights'/'mobilenet_v2-b0353104.pth'
pytestmark = pytest.mark.usefixtures('one_thread')


def manifest(seed, patients=30, per=4):
    rng = np.random.default_rng(seed)
    rows = [dict(image_id=f'{p*per+k:016x}', study_id=f's{p}', patient_id=f'p{p}', laterality='LR'[k % 2], view='L-CC',
                 split=str(rng.choice(['train', 'valid', 'hold_out'], p=[.6, .2, .2])) if k == 0 else '', status='ok' if rng.random() > .1 else 'rejected')
            for p in range(patients) for k in range(per)]
    m = pl.DataFrame(rows).with_columns(pl.col('split').replace('', None).forward_fill())
    return m.with_columns(prob_biopsy=pl.Series(rng.random(len(m))), prob_mag=pl.Series(rng.random(len(m))))


# ---- what is asked next

@given(st.integers(0, 10_000), st.integers(1, 60), st.booleans())
@hyp(max_examples=60, deadline=None)
def test_a_batch_is_unlabelled_readable_and_from_training_patients(seed, n, known):
    m = manifest(seed)
    rng = np.random.default_rng(seed)
    labelled = [i for i in m['image_id'] if rng.random() < .3]
    skipped = [i for i in m['image_id'] if rng.random() < .1]
    pool = pool_frame(m, labelled, skipped)
    b = next_batch(pool if known else pool.drop('prob_biopsy', 'prob_mag'), n, S, seed)
    ok = m.filter((pl.col('split') == 'train') & (pl.col('status') == 'ok'))['image_id'].to_list()
    fresh = set(ok)-set(labelled)-set(skipped)
    assert len(b) == len(set(b)) == len(b.slices) == min(n, len(fresh) or len(set(ok)-set(labelled)))
    assert set(b) <= (fresh or set(ok)-set(labelled))
    assert b == next_batch(pool if known else pool.drop('prob_biopsy', 'prob_mag'), n, S, seed)


def test_hold_out_rows_are_refused_even_when_handed_over():
    with pytest.raises(MammoError, match='hold-out'): next_batch(manifest(0), 5, S)


def test_uncertainty_looks_at_all_findings():
    p = np.array([[.01, .5], [.5, .01], [.01, .01], [.45, .45]])
    assert np.argsort(-uncertainty(p))[0] == 3 and uncertainty(p)[0] == pytest.approx(uncertainty(p)[1]) and uncertainty(p).argmin() == 2
    pool = pl.DataFrame(dict(image_id=list('abcd'), study_id=list('abcd'), prob_biopsy=p[:, 0], prob_mag=p[:, 1]))
    none = S.model_copy(update=dict(train=S.train.model_copy(update=dict(random_share=0.))))
    assert set(next_batch(pool, 3, none)) == {'a', 'b', 'd'}


def test_the_most_uncertain_are_asked_and_a_slice_is_random():
    m = manifest(1, patients=200).with_columns(status=pl.lit('ok'), split=pl.lit('train'), laterality=pl.lit(''))
    b = next_batch(m, 40, S, 3)
    u = dict(zip(m['image_id'], uncertainty(m.select('prob_biopsy', 'prob_mag').to_numpy())))
    chosen, drawn = [u[i] for i, s in zip(b, b.slices) if s == 'uncertain'], [u[i] for i, s in zip(b, b.slices) if s == 'random']
    assert len(drawn) == 4 and min(chosen) > np.quantile(list(u.values()), .8)
    many = [u[i] for k in range(60) for i, s in zip(*(lambda b: (b, b.slices))(next_batch(m, 40, S, k))) if s == 'random']
    assert abs(np.mean(many)-np.mean(list(u.values()))) < .12, 'the random slice is like the pool'


def test_not_four_views_of_one_breast():
    m = manifest(2).with_columns(status=pl.lit('ok'), split=pl.lit('train'))
    one = m.with_columns(prob_biopsy=pl.when(pl.col('study_id') == 's3').then(.5).otherwise(.02), prob_mag=pl.lit(.01))
    b = next_batch(one, 10, S, 0)
    got = m.filter(pl.col('image_id').is_in(list(b)))
    assert got.group_by('study_id', 'laterality').len()['len'].max() == 1 and got.group_by('study_id').len()['len'].max() <= 2
    many = m.filter(pl.col('image_id').is_in(list(next_batch(one, 10, S, 0, per_breast=4, per_study=2))))
    assert many.group_by('study_id').len()['len'].max() == 2, 'two of a study, though of one breast'
    assert len(next_batch(one.filter(pl.col('study_id') == 's3'), 4, S)) == 4, 'the caps give way when the batch would stay short'


def test_skipped_images_wait_until_nothing_else_is_left():
    m = manifest(3).with_columns(status=pl.lit('ok'), split=pl.lit('train'))
    ids = m['image_id'].to_list()
    assert not set(next_batch(pool_frame(m, ids[10:], ids[:4]), 10, S)) & set(ids[:4])
    assert set(next_batch(pool_frame(m, ids[4:], ids[:4]), 10, S)) == set(ids[:4])
    assert next_batch(pool_frame(m, ids), 10, S) == Batch() and random_queue(m, 'hold_out') == []


def test_acquire_needs_no_torch():
    code = "import sys, mammo_nb.learn.acquire; bad = {'torch', 'fastai'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, '-c', code], check=True)


# ---- data

def test_unreadable_duplicate_and_unanswered_rows_do_not_count():
    from mammo_nb.learn.data import labelled_frame
    m = manifest(4)
    m = pl.concat([m, m.filter(pl.col('status') == 'ok').head(3)])
    labels = pl.DataFrame(dict(image_id=m['image_id'].unique(), has_biopsy_tool=1, has_mag_view=None), schema_overrides=dict(has_mag_view=pl.Int8))
    f = labelled_frame(m, labels, S)
    assert f['image_id'].is_unique().all() and set(f['image_id']) == set(m.filter(pl.col('status') == 'ok')['image_id']) and f['has_mag_view'].is_nan().all()
    none = labels.with_columns(has_biopsy_tool=pl.lit(None, dtype=pl.Int8))
    assert labelled_frame(m, none, S).height == 0


@given(st.integers(0, 10_000))
@hyp(max_examples=25, deadline=None)
def test_augmentation_keeps_horizontal_lines_horizontal(seed):
    from mammo_nb.learn.data import augment
    img = np.zeros((120, 90), np.uint8)
    img[30:34] = 200
    a = augment(img, 64, np.random.default_rng(seed)).astype(float)
    full = a[:, a.max(0) > 60]  # the columns that the line crosses
    if full.size:
        centre = (np.arange(64)[:, None]*full*(full > 30)).sum(0)/(full*(full > 30)).sum(0)
        assert np.ptp(centre) < 1 and full.shape[1] >= 20


def test_missing_answers_do_not_move_the_network():
    import torch
    from mammo_nb.learn.data import FindingsLoss
    z = torch.zeros(2, 2, requires_grad=True)
    FindingsLoss([2., 1.])(z, torch.tensor([[1., float('nan')], [float('nan'), float('nan')]])).backward()
    assert z.grad[0, 0] != 0 and z.grad[0, 1] == 0 and (z.grad[1] == 0).all()
    assert FindingsLoss()(z, torch.full((2, 2), float('nan'))) == 0


# ---- rounds

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "two rounds on a toy cohort; `unlabelled` training images were kept back"
    from mammo_nb.learn.rounds import train_round
    d, m, truth = toy.toy_cohort(tmp_path_factory.mktemp('learn')/'toy', S,
        label=lambda t: t.filter((pl.col('split') != 'train') | (pl.col('image_id').str.slice(-1) < 'a'))['image_id'].to_list())
    said = []
    return d, m, truth, [train_round(d, S, tell=said.append) for _ in range(2)], said


def rounds_sentence(d): return json.loads((d/'rounds'/'.progress.json').read_text())['sentence']


def info(folder): return json.loads((folder/'bundle.json').read_text())


def test_a_round_leaves_a_whole_bundle(trained):
    from mammo_nb.learn.bundle import Bundle, sha256_file
    d, m, truth, (r1, r2), said = trained
    assert (r1.name, r2.name) == ('001', '002') and not said and {p.name for p in (d/'rounds').glob('.*')} == {'.lock', '.progress.json'}
    names = {p.relative_to(r1).as_posix() for p in r1.rglob('*') if p.is_file()}
    assert names == {'model.onnx', 'model.int8.onnx', 'weights.safetensors', 'bundle.json', 'MODEL_CARD.md', 'header_model.json', 'labelled.parquet', 'pool.parquet',
                     'figures/learning_curve.png', 'figures/confusion.png', 'figures/calibration.png'} | ({'figures/failures.png'} if info(r1)['failures'] else set())
    i = info(r1)
    assert all(sha256_file(r1/k) == v for k, v in i['files'].items()) and set(i['files']) == names-{'bundle.json'}
    b = Bundle.load(r1)
    assert b.id == i['id'] and b.id.startswith('toy-r001-') and i['agreement']['fp32']['max_dp'] <= 1e-4 and i['labels']['hold_out'] == 16
    assert i['scores']['image']['n'] == 16 and i['scores']['study']['n'] == 4 and 'hold-out' in (r1/'MODEL_CARD.md').read_text()
    assert sum(sum(v.values()) for v in i['data']['view'].values()) == sum(i['labels'][k] for k in ('train', 'valid', 'hold_out'))


def test_same_labels_and_settings_same_probabilities(trained):
    *_, (r1, r2), _ = trained
    a, b = (pl.read_parquet(r/'labelled.parquet') for r in (r1, r2))
    assert a.equals(b) and a['prob_biopsy'].std() > 0 and info(r1)['label_snapshot'] == info(r2)['label_snapshot']
    assert pl.read_parquet(r1/'pool.parquet').equals(pl.read_parquet(r2/'pool.parquet'))


def test_the_pool_is_what_may_be_asked_and_goes_to_the_store(trained):
    d, m, truth, (r1, r2), _ = trained
    pool = pl.read_parquet(r2/'pool.parquet')
    with LabelStore(d/'labels.sqlite', S) as store: labelled, predicted = set(store.labels()['image_id']), set(store.predictions())
    assert set(pool['image_id']) == set(m.filter(pl.col('split') == 'train')['image_id'])-labelled == predicted and len(pool) > 0
    b = next_batch(pool, 6, S, 1)
    assert len(b) == 6 and b.slices.count('random') == 1


def test_inference_on_thumbnails_gives_what_the_round_recorded(trained):
    from mammo_nb.cohort.thumbs import Thumbnails
    from mammo_nb.dicom.display import model_input
    from mammo_nb.learn.bundle import Bundle
    d, *_, (r1, _), _ = trained
    seen, b, t = pl.read_parquet(r1/'labelled.parquet').head(5), Bundle.load(r1), Thumbnails(d/'thumbnails')
    p = b.predict(np.stack([model_input(t.get(i), b.size) for i in seen['image_id']]))
    assert np.abs(p-seen.select('prob_biopsy', 'prob_mag').to_numpy()).max() < 1e-6


def test_hold_out_labels_change_nothing_but_the_scores(trained, tmp_path):
    "train again with every hold-out answer turned round"
    from mammo_nb.learn.rounds import train_round
    d, m, truth, (r1, _), _ = trained
    turned = truth.with_columns(pl.when(pl.col('split') == 'hold_out').then(1-pl.col(c)).otherwise(c).alias(c) for c in S.columns)
    e, *_ = toy.toy_cohort(tmp_path/'toy', S, label='none')
    with LabelStore(d/'labels.sqlite', S) as store: ids = set(store.labels()['image_id'])
    with LabelStore(e/'labels.sqlite', S) as store:
        for r in turned.filter(pl.col('image_id').is_in(list(ids))).iter_rows(named=True):
            store.label(r['image_id'], tuple(n for n, c in zip(S.names, S.columns) if r[c]), 'anna')
    r = train_round(e, S, int8=False)
    a, b = (pl.read_parquet(x/'labelled.parquet').select('image_id', 'prob_biopsy', 'prob_mag') for x in (r1, r))
    assert a.equals(b) and info(r)['temperature'] == info(r1)['temperature'] and info(r)['thresholds'] == info(r1)['thresholds']
    assert info(r)['scores']['image']['accuracy']['value'] == pytest.approx(1-info(r1)['scores']['image']['accuracy']['value'], abs=1e-5)


def test_no_cohort_no_labels_too_few(tmp_path):
    from mammo_nb.learn.rounds import train_round
    with pytest.raises(MammoError, match='No cohort'): train_round(tmp_path/'nowhere', S)
    d, *_ = toy.toy_cohort(tmp_path/'a', S, patients=6, label='none')
    with pytest.raises(MammoError, match='run 2_label first'): train_round(d, S)
    (d/'labels.sqlite').unlink()
    with pytest.raises(MammoError, match='run 2_label first'): train_round(d, S)
    d, *_ = toy.toy_cohort(tmp_path/'b', S, patients=10, label=lambda t: t.filter(pl.col('split') == 'train')['image_id'][:3].to_list())
    with pytest.raises(MammoError, match='label more'): train_round(d, S)
    assert not list(tmp_path.rglob('rounds/*'))


def test_a_finding_without_positives_and_no_hold_out_still_make_a_bundle(tmp_path):
    from mammo_nb.learn.rounds import train_round
    d, *_ = toy.toy_cohort(tmp_path/'rare', S, patients=8, prevalence=(.5, 0), label=lambda t: t.filter(pl.col('split') != 'hold_out')['image_id'].to_list())
    said = []
    i = info(train_round(d, S, int8=False, tell=said.append))
    assert i['scores'] is None and any('only one kind of answer' in w for w in i['warnings']) and any('hold-out' in w for w in i['warnings'])
    assert any('Magnification' in w for w in said)


def test_softmax_head_end_to_end(tmp_path):
    from mammo_nb.learn.bundle import Bundle
    from mammo_nb.learn.rounds import train_round
    s = S.model_copy(update=dict(study=S.study.model_copy(update=dict(head='softmax'))))
    d, *_ = toy.toy_cohort(tmp_path/'soft', s, patients=10)
    b = Bundle.load(train_round(d, s, int8=False))
    p = b.predict(np.random.default_rng(0).integers(0, 255, (6, 64, 64), dtype=np.uint8))
    assert b.meta['head'] == 'softmax' and p.shape == (6, 2) and (p.sum(1) <= 1+1e-6).all()


def test_a_killed_round_leaves_nothing_half_written(tmp_path):
    d, *_ = toy.toy_cohort(tmp_path/'kill', S, patients=8)
    code = f'''
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import time, toy_cohort as toy
from mammo_nb.learn import rounds
def stop(folder, info): print('now', flush=True); time.sleep(60)
rounds.write_bundle_json = stop
rounds.train_round({str(d)!r}, toy.tiny_settings(), int8=False)
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'now'
    assert list((d/'rounds').glob('.*.tmp')), 'it was in the middle of writing'
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not [q for q in (d/'rounds').iterdir() if q.name.isdigit()]
    from mammo_nb.core.engine import sweep
    left = next((d/'rounds').glob('.*.tmp'))
    assert sweep(d/'rounds') == 1 and not left.exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    import errno
    from mammo_nb.learn import rounds
    d, *_ = toy.toy_cohort(tmp_path/'full', S, patients=8)
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(rounds, 'export_bundle', full)
    with pytest.raises(MammoError, match='the disk is full'): rounds.train_round(d, S)
    assert not [p for p in (d/'rounds').iterdir() if not p.name.startswith('.')] and 'disk is full' in rounds_sentence(d)


# ---- weights

def test_weights_from_scratch_are_one_sentence(monkeypatch, tmp_path):
    from mammo_nb.learn import rounds
    import torch
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(rounds, '_reachable', lambda *a: False)
    monkeypatch.delenv('MAMMO_WEIGHTS', raising=False)
    w, note = rounds.find_weights('resnet18')
    assert w is None and 'MAMMO_WEIGHTS is not set' in note and note.endswith('from scratch.')
    with pytest.raises(MammoError, match='resnet18-f37072fd.pth'): rounds.find_weights('resnet18', 'yes')
    assert rounds.find_weights('resnet18', 'no') == (None, 'trained from scratch.')


def test_local_weights_come_first_and_code_is_not_run(monkeypatch, tmp_path):
    import pickle
    import torch
    import torchvision
    from test_bundle import Bomb
    from mammo_nb.learn import rounds
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    monkeypatch.setattr(rounds, '_reachable', lambda *a: False)
    (tmp_path/'w').mkdir()
    monkeypatch.setenv('MAMMO_WEIGHTS', str(tmp_path/'w'))
    (tmp_path/'w'/'resnet18-0123456789abcdef.pth').write_bytes(pickle.dumps(Bomb()))
    (tmp_path/'w'/'resnet180.pth').write_bytes(b'')
    w, note = rounds.find_weights('resnet18')
    assert w is None and 'refused' in note and not (tmp_path/'fired').exists()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path/'w'/'resnet18.pth')
    w, note = rounds.find_weights('resnet18')
    assert len(w) == 122 and 'resnet18.pth' in note
    with pytest.raises(MammoError, match='do not fit'): rounds.make_model('mobilenet_v2', 2, 96, weights=w)


def test_no_network_does_not_mean_waiting(monkeypatch):
    "a name server that never answers"
    import socket
    from mammo_nb.learn import rounds
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *a, **k: time.sleep(30))
    t = time.monotonic()
    assert not rounds._reachable('example.invalid', 1.) and time.monotonic()-t < 3


@pytest.mark.skipif(not WEIGHTS.exists(), reason='no ../shared/weights beside the checkout')
def test_pretrained_round(monkeypatch, tmp_path):
    from mammo_nb.learn.rounds import train_round
    monkeypatch.setenv('MAMMO_WEIGHTS', str(WEIGHTS.parent))
    s = toy.tiny_settings(arch='mobilenet_v2', pretrained='yes', min_steps=3)
    d, *_ = toy.toy_cohort(tmp_path/'pre', s, patients=10)
    i = info(train_round(d, s, int8=False))
    assert not i['scratch'] and WEIGHTS.name in i['weights'] and i['mean'] == .449 and i['agreement']['fp32']['max_dp'] <= 1e-4


# ---- networks and learning rate

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'shufflenet_v2_x0_5'])
@pytest.mark.parametrize('shrink', [0, 2])
def test_networks_by_name(name, shrink):
    import torch
    from mammo_nb.learn.rounds import make_model
    assert make_model(name, 3, 96, shrink).eval()(torch.zeros(2, 1, 96, 96)).shape == (2, 3)


def test_timm_by_name_and_a_clear_sentence_without_it(monkeypatch):
    from mammo_nb.learn.rounds import make_model
    with pytest.raises(MammoError, match='arch = resnet_typo'): make_model('resnet_typo', 2)
    try: import timm  # noqa: F401
    except ImportError: pytest.skip('timm is not installed')
    import torch
    assert make_model('mobilenetv3_small_050', 2, 96).eval()(torch.zeros(2, 1, 96, 96)).shape == (2, 2)
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(MammoError, match='install timm'): make_model('mobilenetv3_small_050', 2)


def test_the_learning_rate_test_restores_the_network_and_never_says_nonsense(tmp_path):
    import torch
    from mammo_nb.cohort.thumbs import Thumbnails
    from mammo_nb.learn.data import labelled_frame, make_dls, make_loss
    from mammo_nb.learn.rounds import find_lr, make_learner, make_model
    d, m, truth = toy.toy_cohort(tmp_path/'lr', S, patients=10, label='none')
    f = labelled_frame(m, truth, S).filter(pl.col('split') != 'hold_out')
    learn = make_learner(make_dls(f, Thumbnails(d/'thumbnails'), S), make_model('resnet18', 2, 64), make_loss(f, S))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    lr, plot = find_lr(learn, 3e-3, 20)
    assert 1e-4 <= lr <= 1.5e-2 and len(plot['lr']) == len(plot['loss']) > 5
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert not list((tmp_path).rglob('*.pth'))
    assert find_lr(learn, 3e-3, 6)[0] == 3e-3, 'too few points to say anything'


def test_validation_counts_what_was_said_blind(tmp_path):
    from mammo_nb.labels.store import Event, LabelStore
    from mammo_nb.learn.rounds import fair_labels
    s = load_settings()
    m = pl.DataFrame([dict(image_id=f'{k:016x}', path=f'{k}.dcm', study_id=f's{k}', patient_id=f'p{k}', view='L-CC', frame=0, status='ok', split=x)
                      for k, x in enumerate(('train', 'valid', 'valid', 'hold_out'))])
    with LabelStore(tmp_path/'labels.sqlite', s) as store:
        store.sync_images(m)
        store.add(Event('c', 1, 'anna', m['image_id'][2], (), '2026-01-01T00:00:00.000Z', 900))
        for k in range(4): store.add(Event('c', 2 + k, 'anna', m['image_id'][k], ('mag',), '2026-01-02T00:00:00.000Z', 900, saw_model=True))
        got = {r['image_id']: r['has_mag_view'] for r in fair_labels(store, m).iter_rows(named=True)}
    assert got == {m['image_id'][0]: 1, m['image_id'][2]: 0}, 'training takes everything, validation only the blind answer'
