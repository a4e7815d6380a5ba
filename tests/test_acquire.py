"""Strategies, embeddings, label errors and the stopping advice."""
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import toy_cohort as toy
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import MammoError
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.acquire import COLD_STARTS, STRATEGIES, label_errors, margin, next_batch, pool_frame, stopping_advice, stopping_rounds
from mammo_nb.learn.bundle import write_bundle_json
from mammo_nb.learn.embed import Encoder, LightHead, Squeeze, embeddings, find_encoder, out_of_sample

S = toy.tiny_settings()
EVERY = [*STRATEGIES, *(c for c in COLD_STARTS if c not in STRATEGIES)]
PROBS = [f'prob_{n}' for n in S.names]


def cohort(seed, patients=30, per=6, dims=6):
    "`(manifest with predictions, (ids, X))`; all splits, some rejected"
    rng = np.random.default_rng(seed)
    split = rng.choice(['train', 'valid', 'hold_out'], patients, p=[.7, .15, .15])
    m = pl.DataFrame([dict(image_id=f'{p*per+k:016x}', study_id=f's{p}-{k//4}', patient_id=f'p{p}', laterality='LR'[k % 2], split=str(split[p]),
                           status='ok' if rng.random() > .05 else 'rejected') for p in range(patients) for k in range(per)])
    m = m.with_columns(pl.Series(c, rng.random(m.height)) for c in PROBS)
    return m, (m['image_id'].to_list(), rng.normal(size=(m.height, dims)).astype(np.float32))


def with_train(**kw): return S.model_copy(update=dict(train=S.train.model_copy(update=kw)))


# ---- batches

@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from(EVERY), st.booleans())
@hyp(max_examples=80, deadline=None)
def test_every_strategy_asks_about_unlabelled_training_images_once(seed, n, strategy, know):
    m, vectors = cohort(seed)
    rng = np.random.default_rng(seed)
    train = m.filter((pl.col('split') == 'train') & (pl.col('status') == 'ok'))['image_id'].to_list()
    labelled = [i for i in train if rng.random() < .2]
    pool = pool_frame(m if know else m.drop(PROBS), labelled)
    ask = lambda: next_batch(pool, n, S, seed, embeddings=vectors, strategy=strategy, labelled=labelled)
    b = ask()
    assert len(b) == len(set(b)) == len(b.slices) == min(n, len(train)-len(labelled)) and set(b) <= set(train)-set(labelled)
    again = ask()
    assert b == again and b.slices == again.slices
    if strategy != 'random' and len(b) == n and n < pool['laterality'].len(): assert b.slices.count('random') == max(1, round(n*S.train.random_share))


@given(st.integers(0, 10_000), st.sampled_from(EVERY))
@hyp(max_examples=40, deadline=None)
def test_no_breast_twice_while_there_are_others(seed, strategy):
    m, vectors = cohort(seed, patients=40)
    pool = pool_frame(m.with_columns(split=pl.lit('train')))
    b = next_batch(pool, 20, S, seed, embeddings=vectors, strategy=strategy)
    got = pool.filter(pl.col('image_id').is_in(list(b)))
    assert got.height == 20 and got.group_by('study_id', 'laterality').len()['len'].max() == 1 and got.group_by('study_id').len()['len'].max() <= 2


@pytest.mark.parametrize('share', [0, .1, .25, 1])
@pytest.mark.parametrize('strategy', ['margin', 'badge', 'typiclust'])
def test_the_random_slice_is_exact_and_the_same_whatever_the_strategy(share, strategy):
    m, vectors = cohort(1, patients=60)
    s, pool = with_train(random_share=share), pool_frame(m.with_columns(split=pl.lit('train')))
    b = next_batch(pool, 40, s, 5, embeddings=vectors, strategy=strategy)
    drawn = {i for i, k in zip(b, b.slices) if k == 'random'}
    assert len(drawn) == round(40*share)
    other = next_batch(pool.with_columns(pl.lit(.5).alias(c) for c in PROBS), 40, s, 5, embeddings=vectors, strategy='entropy')
    assert drawn == {i for i, k in zip(other, other.slices) if k == 'random'}, 'the draw does not depend on the model'


def test_margin_asks_the_unsure_and_spreads():
    rng = np.random.default_rng(0)
    n = 400
    X = np.repeat(rng.normal(size=(8, 5))*6, n//8, 0) + rng.normal(size=(n, 5))*.1
    ids, unsure = [f'{i:016x}' for i in range(n)], np.arange(n) % 50 < 12                      # a dozen unsure ones in each of eight heaps
    p = np.where(unsure & (np.arange(n) < 50), .5, np.where(unsure, .47, .02))
    pool = pl.DataFrame(dict(image_id=ids, study_id=ids, prob_biopsy=p, prob_mag=.01))
    b = next_batch(pool, 10, with_train(random_share=0.), 0, embeddings=(ids, X), strategy='margin')
    at = np.array([int(i, 16) for i in b])
    assert unsure[at].sum() >= 9 and len(set(at//50)) >= 7, 'unsure, and of most heaps'
    e = np.array([int(i, 16) for i in next_batch(pool, 10, with_train(random_share=0.), 0, embeddings=(ids, X), strategy='entropy')])
    assert set(e//50) == {0}, 'entropy alone takes them all from one heap'


@pytest.mark.parametrize('strategy', ['typiclust', 'kmeans', 'coreset', 'probcover'])
def test_covering_strategies_see_every_heap(strategy):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(8, 5))*10
    X, ids = np.repeat(centre, [200, 200, 50, 50, 50, 20, 20, 10], 0), [f'{i:016x}' for i in range(600)]
    heap = np.repeat(np.arange(8), [200, 200, 50, 50, 50, 20, 20, 10])
    X = X + rng.normal(size=X.shape)*.3
    pool = pl.DataFrame(dict(image_id=ids, study_id=ids))
    b = next_batch(pool, 8, with_train(random_share=0.), 3, embeddings=(ids, X), strategy=strategy)
    assert len({heap[int(i, 16)] for i in b}) >= 7
    known = [ids[np.flatnonzero(heap == k)[5]] for k in range(4)]
    more = next_batch(pool.filter(~pl.col('image_id').is_in(known)), 4, with_train(random_share=0.), 3, embeddings=(ids, X), strategy=strategy, labelled=known)
    if strategy in ('typiclust', 'coreset'): assert len({heap[int(i, 16)] for i in more} & {4, 5, 6, 7}) >= 3, 'where there is no label yet'


def test_settings_choose_and_names_are_checked():
    m, vectors = cohort(3, patients=60)
    pool = pool_frame(m.with_columns(split=pl.lit('train')))
    blank = pool.drop(PROBS)
    assert next_batch(blank, 20, S, 1, embeddings=vectors) == next_batch(blank, 20, S, 1, embeddings=vectors, strategy='typiclust')
    assert next_batch(pool, 20, with_train(strategy='badge'), 1, embeddings=vectors) == next_batch(pool, 20, S, 1, embeddings=vectors, strategy='badge')
    assert next_batch(pool, 20, S, 1) == next_batch(pool, 20, S, 1, strategy='entropy'), 'without embeddings: uncertainty and caps'
    assert set(next_batch(blank, 20, S, 1).slices) == {'random'} and set(next_batch(pool, 20, S, 1, strategy='random').slices) == {'random'}
    with pytest.raises(MammoError, match=r'\[train\] strategy = margn: .* use margin, entropy'): next_batch(pool, 5, with_train(strategy='margn'))
    with pytest.raises(MammoError, match=r'\[train\] cold_start = typi: .* use typiclust'): next_batch(pool, 5, with_train(cold_start='typi'))
    with pytest.raises(MammoError, match='strategy = nope'): next_batch(pool, 5, S, strategy='nope')


@pytest.mark.parametrize('strategy', EVERY)
def test_embeddings_of_some_are_enough(strategy):
    m, (ids, X) = cohort(4, patients=60)
    pool = pool_frame(m.with_columns(split=pl.lit('train')))
    some = ids[::3]
    b = next_batch(pool, 20, S, 1, embeddings=(some, X[::3]), strategy=strategy)
    assert len(set(b)) == 20 and (strategy in ('random', 'entropy') or {i for i, k in zip(b, b.slices) if k != 'random'} <= set(some))
    assert len(next_batch(pool, 200, S, 1, embeddings=(some, X[::3]), strategy=strategy)) == 200, 'the rest is filled up'
    assert len(next_batch(pool, 20, S, 1, embeddings=(ids[:1], X[:1]), strategy=strategy)) == 20


def test_equal_images_do_not_break_it():
    ids = [f'{i:016x}' for i in range(40)]
    pool = pl.DataFrame(dict(image_id=ids, study_id=ids, prob_biopsy=[0.]*40, prob_mag=[1.]*40))
    for k in EVERY: assert len(set(next_batch(pool, 10, S, 0, embeddings=(ids, np.ones((40, 3))), strategy=k))) == 10, k


def test_acquire_loads_no_torch_for_the_default():
    code = """import sys, numpy as np, polars as pl; from mammo_nb.learn.acquire import next_batch; from mammo_nb.core.settings import load_settings
ids = [f'{i:016x}' for i in range(50)]
pool = pl.DataFrame(dict(image_id=ids, study_id=ids, prob_biopsy=[.3]*50, prob_mag=[.1]*50))
next_batch(pool, 5, load_settings(), embeddings=(ids, np.random.default_rng(0).normal(size=(50, 4))))
bad = {'torch', 'fastai'} & set(sys.modules); assert not bad, bad"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=toy.__file__.rsplit('/tests', 1)[0])


# ---- embeddings

def test_embeddings_are_cached_added_to_and_swept(tmp_path):
    folder, m, _ = toy.toy_cohort(tmp_path/'toy', S, patients=5)
    ids, calls = m['image_id'].to_list(), []
    def run(x): calls.append(len(x)); return x.reshape(len(x), -1)[:, :7].astype(float)
    old, new = Encoder('toy-r001-0123abcd', 64, run, 'a toy'), Encoder('toy-r002-0123abcd', 64, run, 'a toy')
    a = embeddings(folder, S, ids[:12], old)
    b = embeddings(folder, S, ids[::-1], old)
    assert calls == [12, 8] and b[0] == ids[::-1] and np.array_equal(a[1], b[1][::-1][:12]) and b[1].dtype == np.float32
    assert len(list((folder/'embeddings').iterdir())) == 1
    embeddings(folder, S, ids, new)
    assert [p.name[:8] for p in (folder/'embeddings').iterdir()] == ['toy-r002'], 'an older round is cleared away'
    next((folder/'embeddings').iterdir()).write_bytes(b'damaged')
    assert embeddings(folder, S, ids, new)[1].shape == (20, 7), 'a damaged cache is made again'
    assert embeddings(folder, S, ['f'*16], new)[0] == []


def test_the_newest_round_is_the_encoder(tmp_path):
    from mammo_nb.learn.rounds import train_round
    folder, m, truth = toy.toy_cohort(tmp_path/'toy', S, patients=10)
    assert find_encoder(folder, S).id.startswith('plain')
    with pytest.raises(MammoError, match='no trained round'): find_encoder(folder, S, 'round')
    bundle = train_round(folder, S, int8=False, tell=lambda x: None)
    e = find_encoder(folder, S)
    assert e.id.startswith('toy-r001') and 'trained model' in e.note
    ids, X = embeddings(folder, S, encoder='auto')
    assert X.shape[0] == 40 and X.shape[1] > 100 and np.isfinite(X).all() and X.std(0).max() > 0
    one = embeddings(folder, S, ids[3:4], bundle/'model.onnx')[1]
    assert np.allclose(one[0], X[3], atol=1e-4)
    torch_side = _body(folder, bundle, ids, m)
    assert np.allclose(torch_side, X, atol=1e-3), 'the same numbers as the network itself gives'


def _body(folder, bundle, ids, m):
    "what goes into the last layer, by torch"
    import torch
    from mammo_nb.cohort.thumbs import Thumbnails
    from mammo_nb.learn.bundle import load_weights_safely
    from mammo_nb.learn.data import input_batch
    from mammo_nb.learn.rounds import make_model
    info = json.loads((bundle/'bundle.json').read_text())
    net = make_model(info['arch'], 2, info['size'], info['shrink'])
    net.load_state_dict(load_weights_safely(bundle/'weights.safetensors'))
    net[1][-1] = torch.nn.Identity()
    x = torch.from_numpy(input_batch(Thumbnails(folder/'thumbnails'), ids, info['size'])[:, None]).float()/255
    with torch.no_grad(): return net.eval()((x-info['mean'])/info['std']).numpy()


def test_out_of_sample_is():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    X, Y = np.repeat(rng.normal(size=(50, 30)), 4, 0), np.repeat(rng.random((50, 1)) < .5, 4, 0).astype(float)  # whoever knows the patient knows the label
    X += rng.normal(size=X.shape)*.1
    squeeze = Squeeze(X, 30)
    assert ((LightHead(.01).fit(squeeze(X), Y).predict(squeeze(X)) > .5) == Y).mean() > .8
    assert abs(((out_of_sample(X, Y, groups) > .5) == Y).mean() - .5) < .2, 'no patient is on both sides'
    Y[::3] = np.nan
    assert np.isfinite(LightHead().fit(X, Y).predict(X)).all()


# ---- label errors

def test_flipped_labels_are_found_and_the_hold_out_is_refused():
    rng = np.random.default_rng(3)
    truth, flip = rng.random((400, 2)) < .3, rng.random((400, 2)) < .05
    p = np.clip(truth*.8 + .1 + rng.normal(0, .1, truth.shape), .01, .99)
    df = pl.DataFrame(dict(image_id=[f'{i:016x}' for i in range(400)], split=['train', 'valid']*200)).with_columns(
        *(pl.Series(c, (truth ^ flip)[:, f].astype(float)) for f, c in enumerate(S.columns)), *(pl.Series(c, p[:, f]) for f, c in enumerate(PROBS)))
    found = label_errors(df, S)
    hit = sum(bool(flip[int(i, 16), S.names.index(n)]) for i, n in found.select('image_id', 'finding').iter_rows())
    assert hit >= .6*flip.sum() and hit >= .9*found.height and found['quality'].is_sorted()
    with pytest.raises(MammoError): label_errors(df.with_columns(split=pl.lit('hold_out')), S)
    missing = df.with_columns(pl.when(pl.int_range(pl.len()) % 2 == 0).then(None).otherwise(S.columns[0]).alias(S.columns[0]))
    assert all(int(i, 16) % 2 for i in label_errors(missing, S).filter(finding=S.names[0])['image_id'])
    assert label_errors(df.head(5), S).height == 0 and label_errors(df.clear(), S).columns == found.columns


def _bars(x):
    "what tells the toy images apart: bright bars and stripes"
    rows = x.astype(float).mean(2)
    return np.c_[np.sort(rows, 1)[:, -8:], rows[:, ::4], (x > 200).mean((1, 2)), x.reshape(len(x), -1).max(1)]


def test_suspects_get_a_queue_that_asks_again(tmp_path, monkeypatch):
    from mammo_nb.label import find_suspects
    folder, m, truth = toy.toy_cohort(tmp_path/'toy', S, patients=60, label='none')
    wrong = set(truth.filter(pl.col('split') != 'hold_out')['image_id'].to_list()[::17])
    with LabelStore(folder, S) as store:
        for r in truth.iter_rows(named=True):
            y = [r[c] != (r['image_id'] in wrong and k == 1) for k, c in enumerate(S.columns)]
            store.label(r['image_id'], tuple(n for n, v in zip(S.names, y) if v), 'anna', queue='round-001')
        assert find_suspects(store, m, S, folder).height == 0, 'no network yet, no suspicion'
        monkeypatch.setattr('mammo_nb.label.find_encoder', lambda *a: Encoder('toy-r001-0123abcd', 64, _bars, 'a toy'))
        found = find_suspects(store, m, S, folder)
        queue = store.queue('suspects')
        assert set(queue) == set(found['image_id']) and len(set(queue) & wrong) >= .6*len(wrong) and len(queue) < 2.5*len(wrong)
        split = dict(m.select('image_id', 'split').iter_rows())
        assert 'hold_out' not in {split[i] for i in queue}
        assert store.todo('suspects', 'anna') == queue, 'labelled before, and yet to do'
        store.label(queue[0], (), 'anna', queue='suspects')
        assert store.todo('suspects', 'anna') == queue[1:] and list(store.opinions('anna', 'suspects')) == [queue[0]]
        assert len(store.opinions('anna')) == 240


# ---- rounds of the labelling stage

def test_rounds_use_embeddings_and_say_so(tmp_path):
    from mammo_nb.label import next_round
    folder, m, truth = toy.toy_cohort(tmp_path/'toy', S, patients=60, label='none')
    said = []
    with LabelStore(folder, S) as store:
        name = next_round(store, m, S, 20, folder, said.append)
        assert name == 'round-001' and 'typiclust' in said[0] and 'without a network' in said[0]
        split = dict(m.select('image_id', 'split').iter_rows())
        ids = [i for i in store.queue(name) if split[i] == 'train']
        assert len(ids) == 20 and len(store.queue('random-001')) == 2 and set(store.queue('random-001')) <= set(ids)
        for i in ids: store.label(i, (), 'anna', queue=name)
        store.set_predictions(m.select('image_id', prob_biopsy=pl.lit(.4), prob_mag=pl.lit(.1)))
        assert next_round(store, m, S, 20, folder, said.append) == 'round-002' and 'margin' in said[1]
        (folder/'rounds'/'001').mkdir(parents=True)
        for f in ('bundle.json', 'model.onnx'): (folder/'rounds'/'001'/f).write_text('{')
        assert next_round(store, m, S, 20, folder, said.append) == 'round-003' and 'cannot be compared' in said[2]
        with pytest.raises(MammoError, match='use typiclust'): next_round(store, m, with_train(cold_start='nope'), 20, folder)


# ---- when to stop

def rounds_of(noises, errors, n=500):
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 2, (n, 2))
    p = [1/(1+np.exp(-(z+rng.normal(0, k, z.shape)))) for k in noises]
    return [dict(labels=60*(k+1), error=e, probs=pl.DataFrame(dict(image_id=[f'{i}' for i in range(n)], prob_biopsy=q[:, 0], prob_mag=q[:, 1])))
            for k, (q, e) in enumerate(zip(p, errors))]


def test_stopping_advice():
    changing, settled = rounds_of([2, 1, .8, .7], [.2, .15, .1, .08]), rounds_of([1, .01, .01, .01], [.1, .05, .05, .05])
    falling = rounds_of([1, .01, .01, .01], [.4, .2, .13, .1])
    assert not stopping_advice(changing, S)['stop'] and 'change their minds' in stopping_advice(changing, S)['sentence']
    assert stopping_advice(settled, S, worth=.02)['stop'] and 'could stop' in stopping_advice(settled, S, worth=.02)['sentence']
    assert not stopping_advice(falling, S, worth=.005)['stop'] and 'still falling' in stopping_advice(falling, S, worth=.005)['sentence']
    for k in range(3): assert 'Too few' in stopping_advice(settled[:k], S)['sentence']
    once = rounds_of([1, 1, .01, .01], [.1, .05, .05, .05])
    assert not stopping_advice(once, S)['stop'] and 'those before them did not' in stopping_advice(once, S)['sentence']
    alone = [dict(r, probs=r['probs'].filter(pl.col('image_id').cast(pl.Int64) % 4 == k)) for k, r in enumerate(settled)]
    assert not stopping_advice(alone, S)['stop'], 'no image in common, no advice'


def test_stopping_does_not_look_at_the_hold_out(tmp_path):
    for k in range(3):
        d = tmp_path/'rounds'/f'{k+1:03}'
        d.mkdir(parents=True)
        rng = np.random.default_rng(k)
        frame = pl.DataFrame(dict(image_id=[f'{i}' for i in range(60)], split=['valid', 'hold_out', 'train']*20, prob_biopsy=[.2]*60, prob_mag=[.2]*60))
        write_parquet(frame.drop('split'), d/'pool.parquet')
        write_parquet(frame.with_columns(has_biopsy_tool=pl.when(pl.col('split') == 'hold_out').then(1.).otherwise(0.), has_mag_view=pl.lit(float('nan'))), d/'labelled.parquet')
        write_bundle_json(d, dict(labels=dict(train=60*(k+1))))
    (tmp_path/'rounds'/'004').mkdir()
    got = stopping_rounds(tmp_path, S)
    assert [r['labels'] for r in got] == [60, 120, 180] and [r['error'] for r in got] == [0, 0, 0]


def test_margin_by_hand():
    assert margin([[.5, 0], [.9, .2], [0, 1]]).tolist() == pytest.approx([1, .4, 0])


def test_the_spread_begins_at_the_random_slice():
    from mammo_nb.learn.acquire import _Gate, _spread
    Z = np.repeat([[0., 0.], [9., 0.]], 10, 0)
    for seed in range(10):
        gate = _Gate(range(20), range(20), 2, 1)
        assert _spread(Z, np.ones(20), 1, gate, np.random.default_rng(seed), [gate.add(3)])[0] >= 10
