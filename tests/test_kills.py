"""Crash safety: kill -9 at random moments, orphans, two runs at once, full and read-only disks, locked files, clocks that jump, Ctrl+C. The long campaign is tests/faults/kills.py."""
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest

import mammo_nb.core.engine as E
import mammo_nb.labels.store as store_module
import toy_cohort as toy
from conftest import ROOT, small_project
from faults.kills import alive, gone, leftovers, tree, what
from mammo_nb.core.engine import atomic_path, only_run, sweep, unfinished, write_json, write_parquet
from mammo_nb.core.run import Job
from mammo_nb.core.settings import MammoError
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.background import round_lock
from mammo_nb.learn.bundle import write_bundle_json

S = toy.tiny_settings(epochs=2)
pytestmark = pytest.mark.usefixtures('one_thread')
ENV = os.environ | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT/"tests"}', OMP_NUM_THREADS='1')


def child(code, **kw): return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, **kw)


def all_gone(pids, patience=20):
    "Whether they end by themselves; those that do not are ended"
    stay = gone(pids, patience) is None
    for p in filter(alive, pids): os.kill(p, signal.SIGKILL)
    return not stay


def shot(code, signum=signal.SIGKILL):
    "Starts a process, waits until it says something, and kills it"
    p = child(code)
    said = p.stdout.readline().strip()
    p.send_signal(signum)
    p.wait()
    p.stdout.close(), p.stderr.close()
    assert said, 'it ended before it could be shot'
    return said


def hardly_anything(tmp, d, number, *a):
    "In place of what a round writes"
    write_parquet(pl.DataFrame(dict(image_id=[], prob_biopsy=[], prob_mag=[])), tmp/'pool.parquet', S)
    return write_bundle_json(tmp, dict(id=f'toy-r{number:03d}-00000000'))


# ---- kill -9 at random moments

def test_kills_at_random_moments_change_nothing(tmp_path):
    "a short version of the campaign, in a process of its own since it forks"
    p = subprocess.run([sys.executable, ROOT/'tests'/'faults'/'kills.py', '--only', 'preprocess', 'train', 'infer', '--times', '.16', '--seed', '1'],
                       capture_output=True, text=True, env=ENV | dict(TMPDIR=str(tmp_path), KILLS_QUICK='1'), timeout=600)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-3000:]
    facts = json.loads(p.stdout[p.stdout.index('\n{') + 1:])
    assert facts['kills'] >= 10 and facts['divergences'] == facts['half_files'] == facts['left_behind'] == facts['orphans_that_stayed'] == 0
    for name, f in facts['stages'].items(): assert f['most_at_once'] <= 2 * 8, f'{name} repeated {f["repeated"]}'


def test_a_round_whose_run_was_killed_while_it_drew_is_not_trained_again(tmp_path, monkeypatch):
    import mammo_nb.learn.rounds as R
    d, manifest, truth = toy.toy_cohort(tmp_path/'toy', S, patients=10, label=lambda t: t['image_id'][:30].to_list())
    said, trained, go = [], [], lambda **kw: R.train_round(d, S, int8=False, tell=said.append, **kw)
    monkeypatch.setattr(R, '_train', lambda *a: (None, 0, 1, dict(scratch=False)) if trained.append(1) is None else 0)
    monkeypatch.setattr(R, '_write', hardly_anything)
    first = go(shown=False)
    assert go(shown=False) == first and 'was finished by a run that was ended' in said[-1] and len(trained) == 1
    assert go() == first and len(trained) == 1 and go().name == '002', 'seen by then, so the next one is a new one'
    go(shown=False)
    R.round_shown(d)
    assert not (d/'rounds'/'.work').exists()
    last = go(shown=False)
    with LabelStore(d, S) as store: store.label(truth['image_id'][35], ('mag',), 'anna')
    assert go().name == f'{int(last.name) + 1:03d}', 'a label more asks for a round more'
    with round_lock(d): R.round_shown(d)   # another round is being trained: its work is left alone
    (d/'rounds'/'.work').mkdir()
    (d/'rounds'/'.work'/'plan.json').write_text('{"number": 99}')
    R.round_shown(d)
    assert (d/'rounds'/'.work').exists(), 'nor is that of a round that was interrupted'


def test_workers_that_are_killed_before_they_have_started(monkeypatch):
    import distributed
    tries = []
    class Broken(distributed.LocalCluster):
        def __init__(self, *a, **kw):
            tries.append(1)
            if len(tries) < 3: raise RuntimeError('Nanny failed to start.')
            super().__init__(*a, **kw)
    monkeypatch.setattr(distributed, 'LocalCluster', Broken)
    with E.engine(S.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=1))))) as client: assert client.submit(len, 'abc').result() == 3
    monkeypatch.setattr(Broken, '__init__', lambda *a, **kw: 1/0 if len(tries) > 9 else (_ for _ in ()).throw(RuntimeError('Nanny failed to start.')))
    with pytest.raises(MammoError, match='worker processes do not start .*lower .engine. workers'):
        with E.engine(S): pass


# ---- what killed processes leave

def test_the_mark_of_a_writer_goes_with_its_process_whatever_the_clock_says(tmp_path):
    code = f'''
import time
from mammo_nb.core.engine import unfinished
with unfinished({str(tmp_path/"a.csv")!r}) as f, unfinished({str(tmp_path/"below"/"b")!r}, folder=True) as d:
    f.write_text('half'); (d/'x').write_text('half'); print('now', flush=True); time.sleep(60)'''
    (tmp_path/'below').mkdir()
    shot(code)
    with unfinished(tmp_path/'c.csv') as mine, unfinished(tmp_path/'d', folder=True) as folder:
        (folder/'x').write_text('')
        for t in (0, 4e9): [os.utime(p, (t, t)) for p in (mine, folder)]
        assert len(list(tmp_path.rglob('*.tmp'))) == 4
        assert sweep(tmp_path) == 2 and set(tmp_path.rglob('*.tmp')) == {mine, folder}
    assert not list(tmp_path.rglob('*.tmp'))


def test_leftovers_of_other_machines_go_by_age_in_both_directions(tmp_path):
    for name, age in dict(old=4000, young=10, future=-4000).items():
        (tmp_path/f'.{name}.0000{"0" * 8}.tmp').write_text('half')
        os.utime(tmp_path/f'.{name}.0000{"0" * 8}.tmp', (time.time() - age,) * 2)
    assert sweep(tmp_path) == 2 and [p.name.split('.')[1] for p in tmp_path.iterdir()] == ['young']


PAGE = '''
import os, time
from mammo_nb.core.engine import engine, only_run
from mammo_nb.core.run import job
from mammo_nb.core.settings import load_settings
j = job(cohort)
with only_run(j.folder), engine(j.settings) as client:
    client.run(os.getpid)
    (j.folder.parent/'started').touch()
    time.sleep(wait)
'''


@pytest.fixture
def command(tmp_path):
    "A project with one stage that has two workers and waits"
    import nbformat.v4 as v4
    root = small_project(tmp_path/'p', workers=2)
    for old in (root/'nbs').glob('[0-9]_*.ipynb'): old.unlink()
    cells = [v4.new_markdown_cell('# Wait\n\n> Waits.'), v4.new_code_cell('cohort = "a"\nwait = 60.0', metadata={'tags': ['parameters']}), v4.new_code_cell(PAGE)]
    (root/'nbs'/'1_wait.ipynb').write_text(json.dumps(v4.new_notebook(cells=cells)))
    (tmp_path/'tmp').mkdir()
    env = ENV | dict(TMPDIR=str(tmp_path/'tmp'))
    def start(*args):
        return subprocess.Popen([sys.executable, '-c', 'from mammo_nb.core.run import main; main()', 'run', 'wait', *args], cwd=root, text=True, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    def started():
        end = time.monotonic() + 60
        while not (root/'outputs'/'started').exists() and time.monotonic() < end: time.sleep(.05)
        (root/'outputs'/'started').unlink()
    return root, start, started, tmp_path/'tmp'


def test_nothing_of_a_killed_command_stays(command):
    root, start, started, tmp = command
    p = start()
    started()
    below = tree(p.pid)
    assert len(below) >= 3
    p.kill(), p.wait(), p.stdout.close(), p.stderr.close()   # whoever stays would hold the pipes
    assert all_gone(below), 'kernel and workers end by themselves'
    assert list(tmp.rglob('*.tmp')) and leftovers(root/'outputs')
    p = start('-p', 'wait=0')
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    assert not leftovers(root/'outputs') and not [x for x in tmp.rglob('*') if x.is_file()], 'the next run clears it away'
    runs = sorted((root/'outputs'/'a'/'runs').iterdir())
    json.loads((runs[0]/'1_wait.ipynb').read_text())


def test_a_kernel_killed_while_it_starts_is_one_sentence(command, monkeypatch):
    import papermill
    from mammo_nb.core.run import StageFailed, run_stage
    def dead(*a, **k): raise RuntimeError('Kernel died before replying to kernel_info')
    monkeypatch.setattr(papermill, 'execute_notebook', dead)
    monkeypatch.chdir(command[0])
    with pytest.raises(StageFailed, match='its kernel died .* run again to resume'): run_stage('wait', {}, command[0])


@pytest.mark.skipif(sys.platform != 'linux', reason='orphans are given to another process on Linux only')
def test_a_kernel_orphaned_while_it_starts_does_not_stay(command):
    "where orphans go to a subreaper (a systemd session, some containers) ipykernel's own watch does not see that its parent was gone before it looked"
    code = f'''
import ctypes, subprocess, sys, time
from faults.kills import gone, tree, what
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
p = subprocess.Popen([sys.executable, '-c', 'from mammo_nb.core.run import main; main()', 'run', 'wait'], cwd={str(command[0])!r})
while not (kernel := [q for q in tree(p.pid) if what(q) == 'kernel']): time.sleep(.01)
p.kill(), p.wait()
print(gone(kernel, 15))
[__import__('os').kill(q, 9) for q in kernel if gone([q], 0) is None]'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() not in ('', 'None'), done.stdout + done.stderr


@pytest.mark.parametrize('signum, code, word', [(signal.SIGINT, 130, 'Interrupted'), (signal.SIGTERM, 143, 'Ended')])
def test_interrupts_are_one_sentence_and_leave_no_process(command, signum, code, word):
    root, start, started, tmp = command
    p = start()
    started()
    below = tree(p.pid)
    p.send_signal(signum)
    out, err = p.communicate(timeout=60)
    assert p.returncode == code and err.strip() == f'mammo: {word}; what was done is kept, run the same command again to go on.', err
    assert all_gone(below) and not leftovers(root/'outputs') and not [x for x in tmp.rglob('*') if x.is_file()]


def test_the_pool_that_makes_phantoms_ends_with_its_driver(tmp_path):
    p = child(f'from mammo_nb.dicom.phantom import make_cohort\nif __name__ == "__main__": make_cohort({str(tmp_path/"c")!r}, 60, 512, workers=2, progress=lambda n, of: print(n, flush=True))')
    assert p.stdout.readline()
    below = tree(p.pid)
    p.kill(), p.wait(), p.stdout.close(), p.stderr.close()   # whoever stays would hold the pipes
    assert len(below) >= 2 and all_gone(below)


def test_the_labelers_server_ends_with_its_command(study, tmp_path):
    pytest.importorskip('voila')
    root = small_project(tmp_path/'p')
    shutil.copytree(study/'toy', root/'outputs'/'toy')
    p = subprocess.Popen([sys.executable, '-c', 'from mammo_nb.core.run import main; main()', 'label', 'toy', '--rater', 'anna'], cwd=root, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV | dict(TMPDIR=str(tmp_path)))
    assert 'http://127.0.0.1' in p.stdout.readline()
    below = tree(p.pid)
    p.kill(), p.wait(), p.stdout.close(), p.stderr.close()   # whoever stays would hold the pipes
    assert below and all_gone(below)


# ---- two runs at once

def test_a_second_run_waits_then_refuses_and_a_killed_one_blocks_nobody(tmp_path):
    hold = f'''
import time
from mammo_nb.core.engine import only_run
with only_run({str(tmp_path/"leeds")!r}): print('now', flush=True); time.sleep(%s)'''
    p = child(hold % 2)
    assert p.stdout.readline()
    with pytest.raises(MammoError, match=rf'Another run is at work on .*leeds \(since .*, process {p.pid}\); wait until it is done'):
        with only_run(tmp_path/'leeds', patience=.3): pass
    with only_run(tmp_path/'leeds', patience=20): assert p.poll() is not None or p.wait(5) == 0
    p.stdout.close(), p.stderr.close()
    shot(hold % 60)
    assert (tmp_path/'leeds'/'.lock').exists()
    began = time.monotonic()
    with only_run(tmp_path/'leeds', patience=5): assert time.monotonic() - began < 4
    assert not (tmp_path/'leeds').exists() or not list((tmp_path/'leeds').iterdir())


def test_what_comes_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with only_run(tmp_path/'new'): 1/0
    assert not (tmp_path/'new').exists()


def test_stages_take_turns(tmp_path, monkeypatch):
    from mammo_nb.infer import infer
    from mammo_nb.preprocess import preprocess
    monkeypatch.setattr(only_run.__wrapped__, '__defaults__', (.1,))
    (tmp_path/'dicom').mkdir()
    (tmp_path/'dicom'/'a.dcm').write_bytes(b'x')
    with only_run(tmp_path/'c'):
        with pytest.raises(MammoError, match='Another run is at work'): preprocess(Job(S, 'c', tmp_path/'c', tmp_path/'dicom', None, None), tmp_path/'dicom')
        import mammo_nb.infer as I
        monkeypatch.setattr(I.Bundle, 'load', lambda *a, **k: type('B', (), dict(names=S.names, path=tmp_path))())
        with pytest.raises(MammoError, match='Another run is at work'): infer(Job(S, 'c', tmp_path/'c', tmp_path/'dicom', None, tmp_path))


def test_two_beginners_get_one_key(tmp_path, monkeypatch):
    "the second to write it takes the first one's, else pseudonyms of one cohort would come from two keys"
    from mammo_nb.cohort.facts import cohort_key
    real = dict(link=os.link, replace=os.replace)
    def late(name):
        def put(src, dst):
            for k, f in real.items(): monkeypatch.setattr(os, k, f)
            keys.append(cohort_key(tmp_path/'c'))   # another run is faster
            return real[name](src, dst)
        return put
    keys = []
    for k in real: monkeypatch.setattr(os, k, late(k))
    key = cohort_key(tmp_path/'c')
    assert keys == [key] and key == (tmp_path/'c'/'key').read_bytes() == cohort_key(tmp_path/'c') and (tmp_path/'c'/'key').stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path/'c') == ['key']


# ---- disks

@contextlib.contextmanager
def small_disk(folder, size):
    if sys.platform != 'linux' or os.geteuid() != 0: pytest.skip('needs root on Linux to mount a small file system')
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('tmpfs cannot be mounted here')
    try: yield folder
    finally: subprocess.run(['umount', '-l', folder], check=True)


def remount(folder, options): subprocess.run(['mount', '-o', f'remount,{options}', folder], check=True)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "DICOM files, and a cohort that is labelled"
    from mammo_nb.dicom.phantom import make_cohort
    d = tmp_path_factory.mktemp('study')
    make_cohort(d/'dicom', patients=5, image_size=160, seed=3, workers=1)
    toy.toy_cohort(d/'toy', S, label=lambda t: t['image_id'][:60].to_list())
    return d


def one_sentence(fn, words):
    with pytest.raises(MammoError) as e: fn()
    text = str(e.value)
    assert words in text and '\n' not in text and text.endswith('.'), text


def test_a_full_disk_while_preprocessing(study, tmp_path):
    from mammo_nb.preprocess import preprocess
    run = lambda folder: preprocess(Job(S, 'demo_a', folder/'demo_a', None, None, None), study/'dicom')
    calm = run(tmp_path/'calm')
    with small_disk(tmp_path/'disk', '4k') as disk:
        for kb in (8, 40, 120, 200):
            remount(disk, f'size={kb}k')
            one_sentence(lambda: run(disk), 'the disk is full')
            assert not leftovers(disk)
        remount(disk, 'size=50m')
        assert run(disk).equals(calm)


def test_a_full_disk_while_training(study, tmp_path):
    from mammo_nb.learn.rounds import train_round
    with small_disk(tmp_path/'disk', '60m') as disk:
        shutil.copytree(study/'toy', disk/'toy')
        used = int(subprocess.run(['du', '-sk', disk], capture_output=True, text=True).stdout.split()[0])
        for kb in (16, 1200):   # no room for anything; for neither checkpoint nor model
            remount(disk, f'size={used + kb}k')
            one_sentence(lambda: train_round(disk/'toy', S, int8=False, tell=lambda s: None), 'full')
            assert not leftovers(disk) and not list((disk/'toy').glob('rounds/[0-9]*'))


def test_a_limit_for_file_sizes_is_a_sentence_too(study, tmp_path):
    "where nothing can be mounted: the same through RLIMIT_FSIZE"
    code = f'''
import resource, sys
from pathlib import Path
import toy_cohort as toy
from mammo_nb.core.run import Job
from mammo_nb.core.settings import MammoError
from mammo_nb.preprocess import preprocess
S = toy.tiny_settings(epochs=2)
for limit in (200, 3000, 30000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try: preprocess(Job(S, 'c', Path({str(tmp_path/"out"/"c")!r}), None, None, None), Path({str(study/"dicom")!r}))
    except MammoError as e: print(limit, e)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV, timeout=120)
    lines = out.stdout.splitlines()
    assert out.returncode == 0 and len(lines) == 3 and all('would be larger than this file system or your limit' in x for x in lines), out.stdout + out.stderr
    assert not leftovers(tmp_path/'out')


def test_a_read_only_folder_is_one_sentence_at_every_stage(study, tmp_path, monkeypatch):
    from mammo_nb.infer import infer
    from mammo_nb.label import open_store
    from mammo_nb.learn.background import start_round
    from mammo_nb.learn.rounds import train_round
    from mammo_nb.learn.versions import rollback
    from mammo_nb.preprocess import preprocess
    import mammo_nb.infer as I
    monkeypatch.setattr(I.Bundle, 'load', lambda *a, **k: type('B', (), dict(names=S.names, path=tmp_path))())
    with small_disk(tmp_path/'disk', '60m') as disk:
        shutil.copytree(study/'toy', disk/'toy')
        (disk/'toy'/'labels.sqlite').chmod(0o644)
        remount(disk, 'ro')
        j = Job(S, 'toy', disk/'toy', None, None, tmp_path)
        for fn in (lambda: preprocess(j, study/'dicom'), lambda: preprocess(Job(S, 'new', disk/'new', None, None, None), study/'dicom'), lambda: infer(j),
                   lambda: train_round(disk/'toy', S), lambda: start_round(disk/'toy', S), lambda: open_store(j)):
            with pytest.raises(MammoError) as e: fn()
            assert re.search("read-only|can't be written|can't be opened", str(e.value)) and str(e.value).endswith('.'), str(e.value)


# ---- SQLite in somebody else's hands

def test_a_locked_label_store(study, tmp_path, monkeypatch):
    from mammo_nb.label import open_store
    from mammo_nb.learn.rounds import train_round
    import mammo_nb.learn.rounds as R
    d = Path(shutil.copytree(study/'toy', tmp_path/'toy'))
    monkeypatch.setattr(LabelStore.__init__, '__defaults__', (.2,))
    run = lambda: train_round(d, S, int8=False, tell=lambda s: None)
    with contextlib.closing(sqlite3.connect(d/'labels.sqlite', isolation_level=None)) as other:
        other.execute('PRAGMA locking_mode = EXCLUSIVE')
        other.execute('BEGIN EXCLUSIVE')
        for fn in (run, lambda: open_store(Job(S, 'toy', d, None, None, None)), lambda: LabelStore(d, S).label('0' * 16, (), 'anna')): one_sentence(fn, 'in use by another program')
        other.execute('ROLLBACK')
    # somebody writes for long just when the round wants to leave its predictions: the round is finished later, nothing is trained twice
    other, steps = sqlite3.connect(d/'labels.sqlite', isolation_level=None), []
    monkeypatch.setattr(R, '_write', lambda *a: (other.execute('BEGIN IMMEDIATE'), hardly_anything(*a))[1])
    one_sentence(run, 'in use by another program')
    assert not list(d.glob('rounds/[0-9]*')) and not leftovers(d)
    other.execute('ROLLBACK'), other.close()
    monkeypatch.setattr(R, '_write', hardly_anything)
    after = R._Watch.after_batch
    monkeypatch.setattr(R._Watch, 'after_batch', lambda self: (steps.append(1), after(self))[1])
    assert run().name == '001' and not steps


# ---- clocks

@pytest.mark.parametrize('years', [-9, 9])
def test_a_clock_that_jumps_changes_no_order(study, tmp_path, monkeypatch, years):
    from mammo_nb.label import _trained
    now = [datetime.now(timezone.utc)]
    def tick():
        now[0] += timedelta(milliseconds=5)
        return now[0].isoformat(timespec='milliseconds').replace('+00:00', 'Z')
    monkeypatch.setattr(store_module, 'now_utc', tick)
    def round_(n, store):
        (tmp_path/'rounds'/n).mkdir(parents=True)
        write_json(tmp_path/'rounds'/n/'bundle.json', dict(labels_utc=tick(), queues=store.queue_version()))
    m = pl.read_parquet(study/'toy'/'manifest.parquet').filter(split='train')
    with LabelStore(tmp_path/'l.sqlite', S) as store:
        store.sync_images(m)
        store.set_queue('round-001', m['image_id'][:4])
        assert not _trained(store, tmp_path, 'round-001')
        now[0] += timedelta(days=365 * years)
        round_('001', store)
        assert _trained(store, tmp_path, 'round-001'), 'trained after it was drawn, whatever the clock said'
        now[0] -= timedelta(days=365 * years)
        store.set_queue('round-002', m['image_id'][4:8])
        assert not _trained(store, tmp_path, 'round-002'), 'drawn after the round was trained'
        # a second look counts as one although the clock was set back after the queue was made, and a look before it does not
        i = m['image_id'][0]
        store.label(i, ('mag',), 'anna', queue='suspects')
        now[0] += timedelta(days=365 * years)
        store.set_queue('suspects', [i])
        assert store.todo('suspects', 'anna') == [i]
        now[0] -= timedelta(days=365 * years)
        store.label(i, (), 'anna', queue='suspects')
        assert store.todo('suspects', 'anna') == [] and store.labels('anna').filter(image_id=i)['has_mag_view'][0] == 0


@pytest.mark.parametrize('seconds', [-3e8, 3e8])
def test_a_clock_that_jumps_between_runs_repeats_and_loses_nothing(study, tmp_path, monkeypatch, seconds):
    import mammo_nb.cohort.facts as F
    import mammo_nb.cohort.thumbs as T
    from mammo_nb.preprocess import preprocess
    run = lambda: preprocess(Job(S, 'demo_a', tmp_path/'demo_a', None, None, None), study/'dicom')
    calm = run()
    for p in (tmp_path/'demo_a').rglob('*'): os.utime(p, (time.time() + seconds,) * 2)   # what was written before the clock was set
    read, real, at = [], T.render, time.time
    monkeypatch.setattr(T, 'render', lambda *a: (read.append(1), real(*a))[1])
    monkeypatch.setattr(F, '_beginning', lambda *a: read.append(1) or b'')
    monkeypatch.setattr(time, 'time', lambda: at() + seconds)
    assert run().equals(calm) and not read and not leftovers(tmp_path)


def test_a_round_is_resumed_whatever_the_clock_says(study, tmp_path, monkeypatch):
    from mammo_nb.learn.background import Handle, Note, progress_of
    d = Path(shutil.copytree(study/'toy', tmp_path/'toy'))
    (d/'rounds').mkdir()
    note = Note(d)
    monkeypatch.setattr(time, 'time', lambda: note.facts['began'] - 1e8)
    note(state='training', batch=1, batches=2)
    assert Handle(d, os.getpid()).status()['seconds'] >= 0 and progress_of(d)['batch'] == 1


# ---- a power cut

@pytest.mark.parametrize('folder', [False, True])
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, folder):
    synced, real, put = set(), os.fsync, os.replace
    ident = lambda st: (st.st_dev, st.st_ino)
    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.add(ident(os.fstat(fd))), real(fd))[1])
    def replace(src, dst):
        assert {ident(p.stat()) for p in (src, *src.rglob('*'))} <= synced, 'files, and the folders that name them'
        assert ident((tmp_path).stat()) in synced and ident((tmp_path/'new').stat()) in synced, 'folders that were made for it'
        synced.clear()
        put(src, dst)
    monkeypatch.setattr(os, 'replace', replace)
    with atomic_path(tmp_path/'new'/'deep'/'x', folder) as tmp:
        if folder:
            (tmp/'figures').mkdir()
            (tmp/'figures'/'a.png').write_bytes(b'x')
        else: tmp.write_text('x')
    assert ident((tmp_path/'new'/'deep').stat()) in synced, 'and the name itself'


def test_labels_are_written_through(study):
    with LabelStore(study/'toy'/'labels.sqlite', S) as store:
        assert store._one('PRAGMA synchronous')[0] == 2 and store._one('PRAGMA journal_mode')[0] == 'wal'


# what writes without the one way, and why that is all right
ELSEWHERE = {'core/engine.py', 'dicom/phantom.py', 'labels/serve.py', 'learn/bundle.py'} | {
    ('learn/background.py', 'tmp.write_text(json.dumps(self.facts))'), ('learn/background.py', 'os.replace(tmp, self.path)'), ('learn/background.py', "try: log = open(d/'rounds'/'.train.log', 'w')"),
    ('edge/deidentify.py', "with open(tmp, 'wb') as f:")}


def test_there_is_one_way_to_write():
    "engine: the way itself; phantom: the same by hand; serve: a temporary folder; bundle: into a folder that appears whole; background: how far it is; deidentify: what `atomic_path` gave"
    for path in sorted((ROOT/'mammo_nb').rglob('*.py')):
        name, lines = path.relative_to(ROOT/'mammo_nb').as_posix(), path.read_text().splitlines()
        for k, line in enumerate(lines):
            if not re.search(r"\.write_(text|bytes|csv|parquet)\(|open\([^)]*['\"][wax]b?\+?['\"]|os\.(replace|rename)\(|\bsave_file\(|np\.savez?\(", line): continue
            near = ' '.join(lines[max(0, k - 6):k + 1])
            fine = name in ELSEWHERE or (name, line.strip()) in ELSEWHERE or 'atomic_path(' in near or 'tmp/' in line or 'devnull' in line or '.write_csv()' in line or 'write_csv(float_precision=6))' in line
            assert fine, f'{name}: {line.strip()}'
