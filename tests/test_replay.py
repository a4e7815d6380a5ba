"""Replays: what they may see, that they repeat, and that their figures are right."""
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import toy_cohort as toy
from mammo_nb.core.engine import engine, write_parquet
from mammo_nb.core.settings import MammoError
from mammo_nb.learn import replay as R
from mammo_nb.learn.replay import areas, curves, labels_needed, paired, plot_replay, quick_scores, replay, replay_data, replay_one

S = toy.settings_with()


def points(path, patients=160, per=4, seed=0, dims=10):
    "embeddings with two rare findings on the edge of a cloud"
    rng, n = np.random.default_rng(seed), patients*per
    X = rng.normal(size=(n, dims))
    Y = np.stack([X[:, 0] + .4*X[:, 1] > 1.4, X[:, 2] - X[:, 3] > 2], 1)
    p = np.repeat(np.arange(patients), per)
    df = pl.DataFrame(dict(image_id=[f'{i:016x}' for i in range(n)], study_id=[f's{k}' for k in p], patient_id=[f'p{k}' for k in p],
                           laterality=['LR'[i % 2] for i in range(n)], split=[['hold_out', 'valid', 'train', 'train'][k % 4] for k in p],
                           **{c: Y[:, f].astype(int) for f, c in enumerate(S.columns)}))
    write_parquet(df.with_columns(pl.Series('embedding', X, dtype=pl.Array(pl.Float32, dims))), path, S)
    return df


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp('replay')/'points.parquet'
    points(path)
    return replay(path, ('margin', 'entropy', 'badge'), seeds=6, first=20, step=20, last=160)


def test_margin_beats_random(rows):
    a = dict(areas(rows, 'balanced').group_by('strategy').agg(pl.col('area').mean()).iter_rows())
    assert min(a[k] for k in ('margin', 'entropy', 'badge')) > a['random'] + .03
    p = paired(rows, score='balanced').filter(strategy='margin').row(0, named=True)
    assert p['low'] > 0 and p['p'] < .05 and p['better'] == 1
    need = labels_needed(rows, 'balanced', at=160).filter(strategy='margin').row(0, named=True)
    assert need['low'] <= need['ratio'] <= need['high'] < .9


def test_random_is_always_there_and_starts_at_random(rows, tmp_path):
    assert rows['strategy'].unique(maintain_order=True).to_list() == ['random', 'margin', 'entropy', 'badge']
    assert rows.group_by('strategy', 'seed').agg(pl.col('labels')).select(pl.col('labels').list.len().unique())['labels'].to_list() == [8]
    axes = plot_replay(rows, ('accuracy', 'auc'), at=100).axes
    assert len(axes) == 2 and 'random' in [t.get_text() for t in axes[-1].get_legend().get_texts()]


def test_the_engine_gives_the_same_rows(rows, tmp_path):
    path = tmp_path/'points.parquet'
    points(path)
    with engine(toy.settings_with(engine=dict(workers=2))) as client:
        again = replay(path, ('margin',), seeds=2, client=client, first=20, step=20, last=80)
    want = rows.filter(pl.col('strategy').is_in(['random', 'margin']), pl.col('seed') < 2, pl.col('labels') <= 80)
    assert again.equals(want)


@given(st.integers(0, 1000), st.sampled_from(['random', 'margin', 'entropy', 'badge', 'coreset', 'probcover', 'kmeans+margin', 'random+margin']))
@hyp(max_examples=16, deadline=None)
def test_only_training_rows_are_asked_about(tmp_path_factory, seed, strategy):
    path = tmp_path_factory.mktemp('leak')/'points.parquet'
    df = points(path, patients=40, seed=seed)
    data, asked = R._Data(path, S), []
    split = dict(df.select('image_id', 'split').iter_rows())
    def fit(known, k):
        asked.append([data.ids[i] for i in known])
        return R._light(data, known, k)
    replay_one(data, S, strategy, seed, 10, 10, 50, fit)
    assert len(asked[-1]) == len(set(asked[-1])) == 50 and {split[i] for i in asked[-1]} == {'train'}
    assert set(data.ids).isdisjoint(data.held['image_id']) and all(a == b[:len(a)] for a, b in zip(asked, asked[1:]))


def test_hold_out_labels_do_not_change_what_is_asked(tmp_path):
    a, b = tmp_path/'a.parquet', tmp_path/'b.parquet'
    points(a, patients=40)
    df = pl.read_parquet(a)
    flip = pl.col('split') != 'train'
    write_parquet(df.with_columns(*(pl.when(flip).then(1-pl.col(c)).otherwise(c).alias(c) for c in S.columns),
                                  pl.when(flip).then(pl.col('embedding').shift(7)).otherwise('embedding').alias('embedding').fill_null(strategy='backward')), b, S)
    def asked(path):
        data, out = R._Data(path, S), []
        replay_one(data, S, 'margin', 3, 10, 10, 60, lambda k, s: (out.append(list(k)), R._light(data, k, s))[1])
        return out
    assert asked(a) == asked(b)


def test_seeds_repeat_and_differ(tmp_path):
    points(p := tmp_path/'p.parquet', patients=40)
    one = lambda seed: replay_one(R._Data(p, S), S, 'margin', seed, 10, 10, 40)
    assert one(1) == one(1) and one(1) != one(2)


def test_scores_by_hand():
    q = quick_scores(np.array([[1, 0], [0, 0], [1, 1], [0, 1]]), np.array([[.9, .2], [.1, .6], [.4, .7], [.2, .6]]))
    assert q['accuracy'] == 6/8 and q['balanced'] == pytest.approx(np.mean([.5, 1, 1, .5])) and q['auc'] == pytest.approx(np.mean([1, (1+1+1+.5)/4]))
    assert np.isnan(quick_scores(np.zeros((4, 1)), np.full((4, 1), .2))['auc'])


def hand_rows(curves_):
    return pl.DataFrame([dict(strategy=k, seed=s, labels=n, accuracy=v+.001*s, balanced=v, auc=v, positives=1)
                         for k, c in curves_.items() for s in range(4) for n, v in c.items()])


def test_labels_needed_by_hand():
    r = hand_rows(dict(random={100: .5, 200: .6, 300: .7}, good={100: .6, 200: .8, 300: .9}, bad={100: .4, 200: .5, 300: .6}))
    n = labels_needed(r, 'balanced', at=300)
    assert n['labels'].to_list() == [300, pytest.approx(150), np.inf] and n['ratio'][1] == pytest.approx(.5)
    assert labels_needed(r, 'balanced', at=150)['target'][0] == pytest.approx(.55)
    assert areas(r, 'balanced').filter(strategy='good')['area'][0] == pytest.approx((.7+.85)/2)
    assert curves(r).filter(strategy='good', labels=100)['mean'][0] == pytest.approx(.6015)
    with pytest.raises(MammoError, match='100 to 300'): labels_needed(r, at=500)
    with pytest.raises(MammoError, match='not replayed'): labels_needed(r, against='nobody')


def test_a_cohort_becomes_a_replay(tmp_path):
    s = toy.tiny_settings()
    folder, manifest, truth = toy.toy_cohort(tmp_path/'toy', s, patients=25)
    df = replay_data(folder, s, truth, tmp_path/'r.parquet', 'plain')
    assert df.height == 100 and set(df['split']) == {'train', 'valid', 'hold_out'}
    r = replay(tmp_path/'r.parquet', ('margin',), seeds=1, first=10, step=10, last=40)
    assert r['labels'].unique().to_list() == [10, 20, 30, 40]
    with pytest.raises(MammoError, match='fully labelled'): replay_data(folder, s, truth.clear(), tmp_path/'x.parquet', 'plain')
    with pytest.raises(MammoError, match='use margin'): replay(tmp_path/'r.parquet', ('nonsense',))


def test_the_whole_network_on_request(tmp_path):
    s = toy.tiny_settings()
    folder, _, truth = toy.toy_cohort(tmp_path/'toy', s, patients=15)
    replay_data(folder, s, truth, tmp_path/'r.parquet', 'plain')
    data = R._Data(tmp_path/'r.parquet', s)
    import functools
    rows = replay_one(data, s, 'margin', 0, 12, 12, 24, functools.partial(R._full, data, folder, s, 1))
    assert [r['labels'] for r in rows] == [12, 24] and all(0 <= r['accuracy'] <= 1 for r in rows)


def test_random_sampling_starts_at_random(tmp_path):
    points(p := tmp_path/'p.parquet', patients=40)
    data, first = R._Data(p, S), {}
    for k in ('random', 'margin', 'random+margin'):
        got = []
        replay_one(data, S, k, 2, 10, 10, 10, lambda known, seed: (got.append([data.ids[i] for i in known]), R._light(data, known, seed))[1])
        first[k] = got[0]
    assert first['random'] == first['random+margin'] == R.next_batch(data.pool, 10, S, 2*1009, strategy='random') and first['margin'] != first['random']
