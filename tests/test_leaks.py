"""No patient in two splits, no hold-out image in any step that learns or asks: over random cohorts, in a real round, and with leaks planted
at every step, each of which must be seen before anything is written."""
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import toy_cohort as toy
from mammo_nb.cohort.splits import check_split, split_of
from mammo_nb.core.settings import MammoError
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.acquire import label_errors, next_batch, pool_frame, random_queue
from mammo_nb.metrics.thresholds import choose_thresholds

S = toy.tiny_settings()


pytestmark = pytest.mark.usefixtures('one_thread')


class Grey:
    "thumbnails of nothing"
    def get(self, i): return np.full((20, 16), 90, np.uint8)


# ---- random cohorts

@st.composite
def cohorts(draw):
    "a manifest as a scan makes it, with odd names, several sites, duplicates and rejects, and labels for some images (the hold-out's among them)"
    key = draw(st.binary(min_size=1, max_size=16))
    shares = SimpleNamespace(splits=SimpleNamespace(hold_out=draw(st.floats(.1, .5)), valid=draw(st.floats(.1, .4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=24, unique=True))
    rows, k = [], 0
    for p in names:
        for study in range(rng.integers(1, 4)):
            site = rng.choice(['north', 'south', ''])   # a patient may be known at both
            for _ in range(rng.integers(1, 5)):
                rows.append(dict(image_id=f'{k:016x}', study_id=f'{p}/{study}', patient_id=p, site=site, laterality='LR'[k % 2], view=f'{"LR"[k % 2]}-CC', path=f'{k}.dcm',
                                 split=split_of(p, key, shares), status=rng.choice(['ok', 'ok', 'ok', 'ok', 'rejected', 'duplicate'])))
                k += 1
    twice = [rows[i] for i in rng.integers(0, k, rng.integers(0, 4))]
    m = pl.DataFrame(rows + twice)
    some = [i for i in m['image_id'].unique(maintain_order=True) if rng.random() < .7]
    y = pl.DataFrame(dict(image_id=some, **{c: rng.integers(0, 2, len(some)) for c in S.columns}), schema=dict(image_id=pl.String, **{c: pl.Int8 for c in S.columns}))
    return m, y, rng


def chain(m, y, rng):
    "what every step of learning and asking gets to see: {step: image ids}"
    from mammo_nb.learn.data import labelled_frame, make_dls, make_loss
    from mammo_nb.learn.rounds import seen_rows
    from mammo_nb.learn.sites import without_site
    frame = labelled_frame(m, y, S)
    seen = seen_rows(frame, m)
    out = dict(training=seen['image_id'].to_list())
    if (seen['split'] == 'train').any():
        make_loss(seen, S)
        dls = make_dls(seen, Grey(), S)
        out |= dict(batches=[*dls.train.items, *dls.valid.items])
    p = lambda d: d.with_columns(pl.Series(f'prob_{n}', rng.random(d.height), dtype=pl.Float64) for n in S.names)
    valid = p(seen.filter(pl.col('split') == 'valid'))
    choose_thresholds(valid, S)
    out['thresholds'] = valid['image_id'].to_list()
    skipped = [i for i in m['image_id'] if rng.random() < .1]
    pool = pool_frame(m, y['image_id'], skipped)
    out |= dict(first_batch=list(next_batch(pool, 9, S, 1)), next_batch=list(next_batch(p(pool), 9, S, 1)), suspects=label_errors(p(seen), S)['image_id'].to_list())
    out |= {f'without {s}': without_site(seen, s, m)['image_id'].to_list() for s in ('north', 'south')}
    return out, frame


@given(cohorts())
@hyp(max_examples=60, deadline=None)
def test_no_hold_out_image_in_any_step_whatever_the_cohort(cohort):
    m, y, rng = cohort
    assert m.group_by('patient_id').agg(pl.col('split').n_unique())['split'].max() == 1
    held = m.filter(pl.col('split') == 'hold_out')
    images, patients, of = set(held['image_id']), set(held['patient_id']), dict(m.select('image_id', 'patient_id').iter_rows())
    got, frame = chain(m, y, rng)
    for step, ids in got.items(): assert not images & set(ids) and not patients & {of[i] for i in ids}, step
    split, site = dict(m.select('image_id', 'split').iter_rows()), dict(m.select('image_id', 'site').iter_rows())
    assert {split[i] for i in got['first_batch'] + got['next_batch']} <= {'train'} and {split[i] for i in got['thresholds']} <= {'valid'}
    for s in ('north', 'south'):
        known = {of[i] for i in m['image_id'] if site[i] == s}
        assert not known & {of[i] for i in got[f'without {s}']}, 'nobody whom the site knows'
    assert {split[i] for i in random_queue(m, 'hold_out')} <= {'hold_out'}


@given(cohorts(), st.data())
@hyp(max_examples=60, deadline=None)
def test_one_hold_out_row_under_another_name_is_seen(cohort, data):
    "a hold-out row called training, or a hold-out patient among the training rows, anywhere in a random cohort"
    from mammo_nb.learn.data import labelled_frame
    from mammo_nb.learn.rounds import seen_rows
    m, y, rng = cohort
    frame = labelled_frame(m, y, S)
    held = frame.filter(pl.col('split') == 'hold_out')
    if not held.height: return
    leak = data.draw(st.sampled_from(held['image_id'].to_list()))
    other = data.draw(st.sampled_from(['train', 'valid']))
    mine = pl.col('image_id') == leak
    renamed = frame.with_columns(split=pl.when(mine).then(pl.lit(other)).otherwise('split'))
    with pytest.raises(MammoError, match='no result was written'): seen_rows(renamed, m)
    with pytest.raises(MammoError, match='no result was written'): seen_rows(renamed.drop('patient_id'), m)   # by the image alone
    moved = m.with_columns(split=pl.when(mine).then(pl.lit(other)).otherwise('split'))   # the manifest itself is wrong: one image of a patient
    if m.filter(pl.col('split') == 'hold_out', pl.col('patient_id') == held.filter(mine)['patient_id'][0])['image_id'].n_unique() > 1:
        with pytest.raises(MammoError, match='no result was written'): seen_rows(renamed, moved)


@given(st.lists(st.sampled_from(['train', 'valid', 'hold_out', None, 'Hold_Out', '']), max_size=12), st.sampled_from([('train', 'valid'), ('valid',), ('train',)]))
def test_the_guard_counts_what_must_not_be_there(splits, allowed):
    f = pl.DataFrame(dict(split=splits), schema=dict(split=pl.String))
    bad = sum(s not in allowed for s in splits)
    if not bad: assert check_split(f, allowed) is f
    else:
        with pytest.raises(MammoError, match=rf'handed {bad} of {len(splits)} rows'): check_split(f, allowed)


# ---- a real round, watched

def test_what_a_round_looks_at_while_it_learns(tmp_path, monkeypatch):
    "which thumbnails are opened in which step; only the scoring at the end may open the hold-out's"
    from mammo_nb.learn import rounds
    d, m, truth = toy.toy_cohort(tmp_path/'toy', S, label=lambda t: t.filter(pl.col('image_id').str.slice(-1) < 'b')['image_id'].to_list())
    step, seen = ['other'], {}
    class Spy(rounds.Thumbnails):
        def get(self, i): seen.setdefault(step[-1], set()).add(i); return super().get(i)
    monkeypatch.setattr(rounds, 'Thumbnails', Spy)
    def watch(name):
        old = getattr(rounds, name)
        def new(*a, **k):
            step.append(name)
            try: return old(*a, **k)
            finally: step.pop()
        monkeypatch.setattr(rounds, name, new)
    for name in ('_train', '_calibrated', '_export', '_reference', '_probs', 'error_sheet'): watch(name)
    rounds.train_round(d, S, int8=True)
    split = dict(m.select('image_id', 'split').iter_rows())
    got = {k: {split[i] for i in v} for k, v in seen.items()}
    assert got['_train'] == {'train'} and got['_calibrated'] == {'valid'} and got['_export'] == {'train', 'valid'} and 'hold_out' not in got['_reference']
    assert got['_probs'] == {'train', 'valid', 'hold_out'} and got.pop('error_sheet', {'hold_out'}) == {'hold_out'}   # pictures in the card
    assert set(got) == {'_train', '_calibrated', '_export', '_reference', '_probs'}


# ---- planted leaks

def hold_out_as(split):
    "`labelled_frame` with one hold-out row called something else"
    def plant(monkeypatch, rounds):
        old = rounds.labelled_frame
        def leaky(*a):
            f = old(*a)
            first = f.filter(pl.col('split') == 'hold_out')['image_id'][0]
            return f.with_columns(split=pl.when(pl.col('image_id') == first).then(pl.lit(split)).otherwise('split'))
        monkeypatch.setattr(rounds, 'labelled_frame', leaky)
    return plant


def all_rows(monkeypatch, rounds): monkeypatch.setattr(rounds, 'seen_rows', lambda frame, manifest: frame)   # the guard itself is gone


def into_calibration(monkeypatch, rounds):
    old = rounds._calibrated
    monkeypatch.setattr(rounds, '_export', leaky_export(rounds))


def leaky_export(rounds):
    old = rounds._export
    def new(tmp, cohort_dir, number, model, mean, std, seen, thumbs, s, facts, int8):
        more = seen.head(1).with_columns(image_id=pl.lit(f'{0:016x}'), split=pl.lit('valid'))
        real = pl.concat([seen, more])
        calibrated = rounds._calibrated
        def planted(model, valid, *a): return calibrated(model, valid.with_columns(split=pl.when(pl.col('image_id') == f'{0:016x}').then(pl.lit('hold_out')).otherwise('split')), *a)
        rounds._calibrated, kept = planted, calibrated
        try: return old(tmp, cohort_dir, number, model, mean, std, real, thumbs, s, facts, int8)
        finally: rounds._calibrated = kept
    return new


def into_thresholds(monkeypatch, rounds):
    old = rounds.choose_thresholds
    monkeypatch.setattr(rounds, 'choose_thresholds', lambda d, s: old(pl.concat([d, d.head(1).with_columns(split=pl.lit('hold_out'))]), s))


def into_pool(monkeypatch, rounds):
    old = rounds.pool_frame
    monkeypatch.setattr(rounds, 'pool_frame', lambda m, *a: pl.concat([old(m, *a), m.filter(pl.col('split') == 'hold_out').with_columns(skipped=False)]))


def into_export(monkeypatch, rounds):
    old = rounds._export
    def new(tmp, cohort_dir, number, model, mean, std, seen, *a):
        held = seen.with_columns(split=pl.when(pl.col('split') == 'train').then(pl.lit('hold_out')).otherwise('split'))
        return old(tmp, cohort_dir, number, model, mean, std, held, *a)
    monkeypatch.setattr(rounds, '_export', new)


LEAKS = {'a row called train': (hold_out_as('train'), 'training'), 'a row called valid': (hold_out_as('valid'), 'training'), 'the batches': (all_rows, 'training'),
         'calibration': (into_calibration, 'calibration'), 'thresholds': (into_thresholds, 'choice of thresholds'),
         'the pool': (into_pool, 'shift reference|next batch|pool'), 'the export': (into_export, 'The export')}


@pytest.mark.parametrize('where', LEAKS)
def test_a_planted_leak_stops_the_round_and_nothing_is_written(tmp_path, monkeypatch, where):
    from mammo_nb.learn import rounds
    plant, words = LEAKS[where]
    quick = toy.tiny_settings(min_steps=1)
    d, *_ = toy.toy_cohort(tmp_path/'toy', quick, patients=10, label=lambda t: t.filter((pl.col('split') != 'train') | (pl.col('image_id').str.slice(-1) < 'c'))['image_id'].to_list())
    plant(monkeypatch, rounds)
    with pytest.raises(MammoError, match=words): rounds.train_round(d, quick, int8=False)
    assert not [p for p in (d/'rounds').glob('*') if p.name.isdigit() or p.name.endswith('.tmp')]
    with LabelStore(d/'labels.sqlite', quick) as s: assert s.predictions() == {}


def test_a_hold_out_patient_with_a_training_image_stops_the_round(tmp_path):
    "the manifest itself is wrong: one image of a hold-out patient says train"
    from mammo_nb.core.engine import write_parquet
    from mammo_nb.learn import rounds
    d, m, _ = toy.toy_cohort(tmp_path/'toy', S, patients=10)
    first = m.filter(pl.col('split') == 'hold_out')['image_id'][0]
    write_parquet(m.with_columns(split=pl.when(pl.col('image_id') == first).then(pl.lit('train')).otherwise('split')), d/'manifest.parquet', S)
    with pytest.raises(MammoError, match='1 images of hold-out patients; no result was written'): rounds.train_round(d, S, int8=False)


def test_hold_out_rows_are_refused_by_every_function_that_learns_or_asks():
    from mammo_nb.learn.data import make_dls, make_loss
    from mammo_nb.learn.sites import light_model, without_site
    rng = np.random.default_rng(0)
    n = 40
    f = pl.DataFrame(dict(image_id=[f'{i:016x}' for i in range(n)], study_id=[f's{i}' for i in range(n)], patient_id=[f'p{i}' for i in range(n)], site='a', laterality='L', status='ok',
                          split=['train']*20 + ['valid']*19 + ['hold_out'], **{c: rng.integers(0, 2, n).astype(float) for c in S.columns}, **{f'prob_{k}': rng.random(n) for k in S.names}))
    for call in (lambda: make_dls(f, None, S), lambda: make_loss(f, S), lambda: choose_thresholds(f, S), lambda: next_batch(f, 5, S), lambda: label_errors(f, S),
                 lambda: without_site(f, 'b'), lambda: light_model(f, f, {}, S)):
        with pytest.raises(MammoError): call()


# ---- other hospitals

@pytest.fixture(scope='module')
def hospitals(tmp_path_factory):
    "a cohort of two sites; patient p2 is known at both"
    from mammo_nb.core.engine import write_parquet
    d, m, _ = toy.toy_cohort(tmp_path_factory.mktemp('sites')/'toy', S, patients=30)
    p = pl.col('patient_id').str.slice(1).cast(pl.Int64)
    m = m.with_columns(site=pl.when((p % 2 == 0) & ~((p == 2) & (pl.col('laterality') == 'R'))).then(pl.lit('east')).otherwise(pl.lit('west')))
    write_parquet(m, d/'manifest.parquet', S)
    return d, m


@pytest.mark.parametrize('method', ['full', 'light'])
def test_leave_one_site_out(hospitals, monkeypatch, method):
    from mammo_nb.learn import sites
    d, m = hospitals
    trained, name = [], 'full_model' if method == 'full' else 'light_model'
    old = getattr(sites, name)
    def spy(frame, test, *a):
        trained.append((frame, test))
        return old(frame, test, *a)
    monkeypatch.setattr(sites, name, spy)
    said = []
    t = sites.leave_one_site_out(d, S, method=method, n=100, tell=said.append)
    assert t.height == 2*2*3 and set(t['site']) == {'east', 'west'} and set(t['sample']) == {'random'} and t['small'].all() and len(said) == 2
    (ref, _), *out = trained
    assert set(ref['site']) == {'east', 'west'}
    for site, (rows, test) in zip(('east', 'west'), out):
        assert site not in set(rows['site']) and set(rows['split']) == {'train', 'valid'} and 'p2' not in set(rows['patient_id'])
        assert set(test['site']) == {site} and set(test['split']) == {'hold_out'} and not set(test['patient_id']) & set(rows['patient_id'])
    auc = t.filter(pl.col('score') == 'roc_auc').drop_nulls('value')
    assert (auc['low'] <= auc['value']).all() and (auc['gap'] - (auc['value']-auc['all_sites'])).abs().max() < 2e-4
    assert len(sites.plot_sites(t).axes) == 2


def test_leaving_out_says_what_it_cannot(hospitals, tmp_path):
    from mammo_nb.learn.sites import leave_one_site_out
    d, m = hospitals
    with pytest.raises(MammoError, match='No labelled image of site moon; there are east, west'): leave_one_site_out(d, S, sites=['moon'])
    with pytest.raises(MammoError, match='use full or light'): leave_one_site_out(d, S, method='quick')
    one, *_ = toy.toy_cohort(tmp_path/'toy', S, patients=6)
    with pytest.raises(MammoError, match='labels of 1 site; leaving one out needs at least two'): leave_one_site_out(one, S)
