"Rounds in processes of their own: killed and resumed, started beside a labeler, rolled back, compared, logged with MLflow."
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

import toy_cohort as toy
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import MammoError
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.acquire import next_batch
from mammo_nb.learn.background import is_running, last_round, progress_of, round_lock, running_round, start_round
from mammo_nb.learn.bundle import write_bundle_json
from mammo_nb.learn.versions import compare_rounds, current_number, current_round, rollback, round_numbers

S = toy.tiny_settings(epochs=5)
HERE = os.path.dirname(__file__)


pytestmark = pytest.mark.usefixtures('one_thread')


def some(t): return t.filter((pl.col('split') != 'train') | (pl.col('image_id').str.slice(-1) < 'a'))['image_id'].to_list()


def cohort(folder, label=some, settings=S): return toy.toy_cohort(folder, settings, label=label)[0]


def result(round): return [pl.read_parquet(round/f'{k}.parquet').sort('image_id') for k in ('labelled', 'pool')]


def same(a, b): return all(x.equals(y) for x, y in zip(result(a), result(b)))


def info(round): return json.loads((round/'bundle.json').read_text())


# a child that says where it is and waits there to be shot
CHILD = '''
import sys, time
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
import toy_cohort as toy
from mammo_nb.learn import rounds
rounds.Keep.__init__.__defaults__ = (None, 0.)
def stop(): print('now', flush=True); time.sleep(120)
where, n = {where!r}, 0
def wrap(module, name, after=False):
    old = getattr(module, name)
    def new(*a, **k):
        if not after: stop()
        out = old(*a, **k)
        stop()
        return out
    setattr(module, name, new)
if where.startswith('batch'):
    old = rounds._Watch.after_batch
    def new(self):
        global n
        old(self); n += 1
        if n == int(where[5:]): stop()
    rounds._Watch.after_batch = new
elif where == 'writing': wrap(rounds, 'score_report')
elif where == 'predictions': wrap(rounds.LabelStore, 'set_predictions', after=True)
elif where == 'folder': wrap(rounds.Work, 'drop')
rounds.train_round({d!r}, toy.tiny_settings(epochs=5), int8=False, tell=lambda s: None)
'''


def killed(d, where):
    "starts a round and kills it with SIGKILL at one point"
    p = subprocess.Popen([sys.executable, '-c', CHILD.format(here=HERE, where=where, d=str(d))], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'now'
    assert is_running(d)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    assert not is_running(d)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "an uninterrupted round"
    from mammo_nb.learn.rounds import train_round
    d = cohort(tmp_path_factory.mktemp('whole')/'toy')
    return d, train_round(d, S, int8=False)


# ---- killed at any moment

@pytest.mark.parametrize('points', [['batch1'], ['batch10'], ['batch8', 'batch5', 'writing'], ['predictions']])
def test_a_killed_round_ends_like_one_that_was_not(whole, tmp_path, points):
    from mammo_nb.learn.rounds import train_round
    d, (_, want) = cohort(tmp_path/'toy'), whole
    for p in points: killed(d, p)
    assert round_numbers(d) == [] and (last_round(d).status()['state'] == 'killed')
    said = []
    r = train_round(d, S, int8=False, tell=said.append)
    assert r.name == '001' and same(r, want) and info(r)['losses'] == info(want)['losses'] and info(r)['thresholds'] == info(want)['thresholds']
    assert [s for s in said if 'interrupted' in s] == ([] if points == ['batch1'] else ['Going on with round 1, which was interrupted.'])
    assert info(r)['resumed'] == (points != ['batch1']) and not (d/'rounds'/'.work').exists()
    with LabelStore(d/'labels.sqlite', S) as a, LabelStore(whole[0]/'labels.sqlite', S) as b: assert a.predictions() == b.predictions()


def test_labels_given_since_wait_and_changed_ones_start_anew(whole, tmp_path):
    from mammo_nb.learn.rounds import train_round
    d, (_, want), said = cohort(tmp_path/'toy'), whole, []
    killed(d, 'batch10')
    new = pl.read_parquet(d/'manifest.parquet').filter(pl.col('split') == 'train')
    with LabelStore(d/'labels.sqlite', S) as s:
        ids = [i for i in new['image_id'] if i not in set(s.labels()['image_id'])]
        for i in ids[:3]: s.label(i, ('mag',), 'anna')
    r = train_round(d, S, int8=False, tell=said.append)
    assert 'Going on with round 1, which was interrupted. 3 labels given since are left for the next round.' in said
    assert result(r)[0].equals(result(want)[0]) and info(r)['label_snapshot'] == info(want)['label_snapshot'] and not set(ids[:3]) & set(result(r)[1]['image_id'])
    # a setting of the training is changed, or an answer of the round itself: what was learned is dropped
    killed(d, 'batch10')
    said.clear()
    other = train_round(d, toy.tiny_settings(epochs=5, lr=1e-3), int8=False, tell=said.append)
    assert any('dropped, because settings of the training have changed' in x for x in said) and other.name == '002' and not info(other)['resumed']
    killed(d, 'batch10')
    with LabelStore(d/'labels.sqlite', S) as s:
        i, was = s.labels().filter(pl.col('image_id').is_in(new['image_id'].to_list())).select('image_id', 'has_mag_view').row(0)
        s.label(i, () if was else ('mag',), 'anna')
    said.clear()
    r = train_round(d, S, int8=False, tell=said.append)
    assert any('dropped, because some of its labels have changed' in x for x in said) and not info(r)['resumed'] and r.name == '003'


# ---- beside the labeler

def test_a_round_in_a_process_of_its_own(whole, tmp_path):
    d, (_, want) = cohort(tmp_path/'toy'), whole
    assert running_round(d) is None and last_round(d) is None
    h = start_round(d, S, int8=False)
    assert running_round(d).pid == h.pid, 'found from its first moment'
    with pytest.raises(MammoError, match='is being trained already'): start_round(d, S)
    with pytest.raises(MammoError, match='is being trained already'):
        from mammo_nb.learn.rounds import train_round
        train_round(d, S)
    with pytest.raises(MammoError, match='not waited for any longer'): h.wait(.1)
    seen, took = set(), []
    with LabelStore(d/'labels.sqlite', S) as s: said = tuple(n for n, v in zip(S.names, s.labels().row(0)[1:]) if v)   # the same answer again: the round may or may not read it
    while h.running:   # labels go on meanwhile
        began = time.monotonic()
        with LabelStore(d/'labels.sqlite', S) as s: s.label(f'{0:016x}', said, 'ben')
        took.append(time.monotonic()-began)
        seen.add(h.status()['state'])
        time.sleep(.1)
    r = h.wait()
    assert {'starting', 'training'} <= seen and np.median(took) < .5 and h.status()['state'] == 'done' and str(h).startswith('Round 1 is done')
    assert r.name == '001' and same(r, want) and running_round(d) is None and os.getpgid(0) != h.pid


def test_the_round_outlives_whoever_started_it_and_is_found_again(tmp_path):
    d = cohort(tmp_path/'toy')
    code = (f"import sys; sys.path.insert(0, {HERE!r})\nimport toy_cohort as toy\nfrom mammo_nb.learn.background import start_round\n"
            f"import os, signal\nh = start_round({str(d)!r}, toy.tiny_settings(epochs=5), int8=False)\nprint(h.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    pid = int(p.stdout)
    h = running_round(d)
    assert p.returncode == -9 and h.pid == pid and os.getsid(pid) == pid
    assert h.wait(120).name == '001' and info(d/'rounds'/'001')['labels']['train'] > 0


def test_stopped_and_gone_on(whole, tmp_path):
    d, (_, want) = cohort(tmp_path/'toy'), whole
    h = start_round(d, S, int8=False)
    while h.status()['batch'] < 2: time.sleep(.02); assert h.running
    s = h.stop()
    assert s['state'] == 'stopped' and 'goes on where' in s['sentence'] and not h.running and round_numbers(d) == []
    with pytest.raises(MammoError, match='goes on where'): h.wait()
    assert same(start_round(d, S, int8=False).wait(120), want)


def test_what_goes_wrong_is_one_sentence(tmp_path):
    with pytest.raises(MammoError, match='run 1_preprocess first'): start_round(tmp_path/'nowhere', S)
    d = cohort(tmp_path/'toy', label='none')
    h = start_round(d, S)
    with pytest.raises(MammoError, match='has no labels; run 2_label first'): h.wait(60)
    assert h.status()['state'] == 'failed' and progress_of(d)['state'] == 'failed'
    with round_lock(d) as note:
        assert running_round(d).pid == os.getpid()
        note(state='training', round=1, batch=3, batches=9)
        assert running_round(d).status()['sentence'].startswith('Round 1 is being trained, batch 3 of 9')
    assert not is_running(d) and last_round(d).status()['state'] == 'killed'


# ---- earlier rounds

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "two rounds, the second on more labels, and the second cohort's state"
    from mammo_nb.learn.rounds import train_round
    d = cohort(tmp_path_factory.mktemp('two')/'toy', label=lambda t: t.filter((pl.col('split') != 'train') | (pl.col('image_id').str.slice(-1) < '6'))['image_id'].to_list())
    train_round(d, S, int8=False)
    left = pl.read_parquet(d/'rounds'/'001'/'pool.parquet')['image_id'].to_list()
    with LabelStore(d/'labels.sqlite', S) as s:
        for i in left[:8]: s.label(i, ('mag',), 'anna')
    train_round(d, S, int8=False)
    return d


def test_rolling_back_and_forth(three):
    from mammo_nb.learn.rounds import train_round
    d = three
    before = {p: p.stat().st_mtime_ns for p in (d/'rounds').rglob('*') if p.is_file() and '.' != p.name[0]}
    with LabelStore(d/'labels.sqlite', S) as s: second, labels = s.predictions(), s.snapshot_hash()
    assert current_round(d).name == '002'
    assert rollback(d, 1, S).name == '001' and current_round(d).name == '001' and current_number(d) == 1
    old = {r[0]: r[1:] for r in pl.read_parquet(d/'rounds'/'001'/'pool.parquet').select('image_id', 'prob_biopsy', 'prob_mag').iter_rows()}
    with LabelStore(d/'labels.sqlite', S) as s:
        now = s.predictions()
        assert s.snapshot_hash() == labels and all((p['biopsy'], p['mag']) == pytest.approx(old[i]) for i, p in now.items() if i in old) and now != second
    with pytest.raises(MammoError, match='has no round 9; it has 1, 2'): rollback(d, 9, S)
    rollback(d, 2, S)
    with LabelStore(d/'labels.sqlite', S) as s: assert current_number(d) == 2 and {i: s.predictions()[i] for i in second} == second
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), 'nothing was touched'
    rollback(d, 1, S)
    assert train_round(d, S, int8=False).name == '003' and current_round(d).name == '003', 'the next number, and it is the current one'
    with round_lock(d), pytest.raises(MammoError, match='when it is done'): rollback(d, 1, S)


def test_images_that_came_later_get_the_old_rounds_predictions_too(tmp_path, three):
    import shutil
    d = tmp_path/'toy'
    shutil.copytree(three, d)
    pool = pl.read_parquet(d/'rounds'/'001'/'pool.parquet')
    write_parquet(pool[2:], d/'rounds'/'001'/'pool.parquet')
    write_bundle_json(d/'rounds'/'001', info(d/'rounds'/'001'))
    with LabelStore(d/'labels.sqlite', S) as s: left = [i for i in pool['image_id'][:2] if i not in set(s.labels()['image_id'])]
    rollback(d, 1, S)
    want = {r[0]: r[1] for r in pool.select('image_id', 'prob_mag').iter_rows()}
    with LabelStore(d/'labels.sqlite', S) as s: assert all(s.predictions()[i]['mag'] == pytest.approx(want[i], abs=1e-6) for i in left)


def test_two_rounds_compared_on_what_both_know(three):
    c = compare_rounds(three, 1, 2)
    held = pl.read_parquet(three/'rounds'/'002'/'labelled.parquet').filter(pl.col('split') == 'hold_out')
    assert set(c.table['images']) == {held.height} and c.table.height == 8 and set(c.images['image_id']) <= set(held['image_id'])
    acc = c.table.filter(pl.col('score') == 'accuracy')
    for name, a, b in acc.select('finding', 'a', 'b').iter_rows():
        k = S.names[[f.title for f in S.findings].index(name)]
        for r, v in ((1, a), (2, b)):
            i = info(three/'rounds'/f'{r:03d}')
            assert v == pytest.approx(i['scores']['image']['findings'][k]['accuracy']['value'], abs=1e-3)
    n = sum((c.images['finding'] == f.title).sum() for f in S.findings)
    assert n == c.images.height and (c.table['low'].drop_nulls() <= c.table.filter(pl.col('low').is_not_null())['difference']).all()
    assert compare_rounds(three, 2, 2).table['difference'].drop_nulls().to_list() == [0.]*compare_rounds(three, 2, 2).table['difference'].drop_nulls().len()


def test_the_scores_say_how_the_hold_out_was_come_by(tmp_path):
    from mammo_nb.cohort.manifest import read_manifest
    from mammo_nb.learn.data import labelled_frame
    from mammo_nb.learn.rounds import sampling_of
    d = cohort(tmp_path/'toy', label='none')
    m = read_manifest(d)
    def how():
        with LabelStore(d/'labels.sqlite', S) as s: return sampling_of(s, labelled_frame(m, s.labels(), S), m)
    assert how() == dict(train='none', valid='none', hold_out='none')
    with LabelStore(d/'labels.sqlite', S) as s:
        ids = s.queue('hold_out')
        for i in ids[:5]: s.label(i, (), 'anna', queue='hold_out')
        s.label(s.queue('train')[0], (), 'anna', queue='round-001')
    assert how() == dict(train='chosen', valid='none', hold_out='random')
    with LabelStore(d/'labels.sqlite', S) as s: s.label(ids[0], ('mag',), 'bert', queue='review')
    assert how()['hold_out'] == 'random', 'a correction changes an answer, not the sample'
    with LabelStore(d/'labels.sqlite', S) as s: s.label(ids[5], ('mag',), 'bert', queue='review')
    assert how()['hold_out'] == 'mixed'
    with LabelStore(d/'labels.sqlite', S) as s:
        for i in ids[6:]: s.label(i, (), 'bert')
    assert how()['hold_out'] == 'all'


# ---- MLflow

def test_a_missing_or_failing_mlflow_never_costs_the_round(tmp_path, monkeypatch):
    from mammo_nb.learn.rounds import train_round
    d, said = cohort(tmp_path/'a'/'toy'), []
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    monkeypatch.setitem(sys.modules, 'mlflow.entities', None)
    r = train_round(d, toy.tiny_settings(mlflow='local'), int8=False, tell=said.append)
    assert (r/'bundle.json').exists() and any("pip install 'mammo_nb[mlflow]'" in s and 'its bundle is complete' in s for s in said)
    from mammo_nb.learn.tracking import log_round
    assert 'write local, or the address' in log_round(info(r), r, toy.tiny_settings(mlflow='somewhere'), d)
    assert not (tmp_path/'a'/'mlflow'/'mlflow.db').exists()


needs_mlflow = pytest.mark.skipif(not importlib.util.find_spec('mlflow') or not importlib.util.find_spec('sqlalchemy'), reason="MLflow is not installed (pip install -e '.[mlflow]')")


@needs_mlflow
def test_rounds_in_a_local_mlflow_store(tmp_path):
    from mammo_nb.learn.rounds import train_round
    s, said = toy.tiny_settings(mlflow='local'), []
    d = cohort(tmp_path/'out'/'toy', settings=s)
    rounds = [train_round(d, s, int8=False, tell=said.append) for _ in range(2)]
    assert not said
    from mlflow.tracking import MlflowClient
    c = MlflowClient(f"sqlite:///{tmp_path/'out'/'mlflow'/'mlflow.db'}")
    runs = c.search_runs([c.get_experiment_by_name(s.study.name).experiment_id])
    assert {r.info.run_name for r in runs} == {info(r)['id'] for r in rounds} and {r.info.status for r in runs} == {'FINISHED'}
    one = next(r for r in runs if r.data.tags['round'] == '1')
    i = info(rounds[0])
    assert one.data.metrics['image_accuracy'] == pytest.approx(i['scores']['image']['accuracy']['value']) and one.data.params['label_snapshot'] == i['label_snapshot']
    assert len(c.get_metric_history(one.info.run_id, 'training_loss')) == i['steps']
    assert {f.path for f in c.list_artifacts(one.info.run_id, 'figures')} == {f'figures/{k}.png' for k in ('learning_curve', 'confusion', 'calibration')}


@needs_mlflow
def test_a_tracking_server_that_is_down_is_said_within_seconds(tmp_path):
    from mammo_nb.learn.tracking import log_round
    example = dict(id='toy-r001-0', cohort='toy', round=1, findings=['biopsy'], thresholds=[.5], labels=dict(train=1, valid=1, hold_out=1))
    began = time.monotonic()
    said = log_round(example, tmp_path, toy.tiny_settings(mlflow='http://127.0.0.1:9'), tmp_path/'toy')
    assert 'MLflow did not take the round' in said and time.monotonic()-began < 30
