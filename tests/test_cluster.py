"""A Dask cluster started by hand on loopback gives the rows that the embedded one gives, whatever dies on the way; one that cannot do the work is refused in one sentence."""
import contextlib
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import numpy as np
import polars as pl
import pytest
import yaml

import mammo_nb
import toy_cohort as toy
from conftest import ROOT, mammo, small_project
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core import engine as E
from mammo_nb.core.engine import engine, map_files
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.phantom import SITES_B, make_cohort
from mammo_nb.infer import infer
from mammo_nb.learn.bundle import bundle_meta, export_bundle, write_bundle_json
from mammo_nb.preprocess import preprocess
from test_bundle import network, pictures

HERE = Path(__file__).parent
S = toy.tiny_settings()


class Cluster:
    "A scheduler and workers, each a process of its own on loopback, as somebody would start them in two terminals"
    def __init__(self, folder, workers=2, **env):
        self.folder, self.env, self.procs = Path(folder), os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])), OMP_NUM_THREADS='1') | env, []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scheduler = self.start('scheduler', '--port', '0', '--scheduler-file', self.folder/'scheduler.json', '--no-show')
        self.address = self._wait(lambda: (self.folder/'scheduler.json').exists() and json.loads((self.folder/'scheduler.json').read_text())['address'])
        for _ in range(workers): self.worker()

    def _wait(self, what, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(ValueError, KeyError):
                if got := what(): return got
            time.sleep(.05)
        raise AssertionError('the scheduler did not start: ' + (self.folder/'log').read_text()[-2000:])

    def start(self, what, *args, before='', **env):
        code = f'{before}\nfrom distributed.cli.dask_{what} import main; main()'
        with open(self.folder/'log', 'ab') as log:
            p = subprocess.Popen([sys.executable, '-c', code, *map(str, args), '--host', '127.0.0.1', '--no-dashboard'], cwd=self.folder, env=self.env | env, stdout=log, stderr=log)
        self.procs.append(p)
        return p

    def worker(self, *args, **kw): return self.start('worker', self.address, '--nthreads', '1', '--local-directory', self.folder, *args, **kw)

    def kill_a_worker(self, client, nanny=True):
        "SIGKILL to one worker by its own process id; to its nanny first, so that it does not come back"
        pids, nannies = client.run(os.getpid), client.run(os.getppid)
        address = sorted(pids)[0]
        if nanny: os.kill(nannies[address], signal.SIGKILL)
        os.kill(pids[address], signal.SIGKILL)
        return pids[address]

    def stop(self):
        for p in reversed(self.procs):   # the scheduler last
            p.terminate()
            try: p.wait(5)
            except subprocess.TimeoutExpired: p.kill(); p.wait()


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    c = Cluster(tmp_path_factory.mktemp('cluster'))
    yield c
    c.stop()


@pytest.fixture
def started(tmp_path):
    "Clusters of a test's own"
    made = []
    def start(*args, **kw): return made.append(Cluster(tmp_path/f'dask{len(made)}', *args, **kw)) or made[-1]
    yield start
    for c in made: c.stop()


# --- the same rows

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A project, its DICOM files (some broken), a bundle, and what the embedded cluster makes of them"
    root = small_project(tmp_path_factory.mktemp('study')/'p', thumbnail_size=128, workers=2)
    ini = (root/'settings.ini').read_text()
    (root/'settings.ini').write_text(ini.replace('batch_size = 64', 'batch_size = 8'))
    make_cohort(root/'dicom', patients=8, image_size=160, seed=3, sites=SITES_B, broken=.15, workers=1)
    s = load_settings(root)
    meta = bundle_meta(s, 'c', 1, mean=.1, std=.3)
    agree = export_bundle(network(size=64), root/'bundle', meta, pictures(64))
    write_bundle_json(root/'bundle', meta | dict(agreement=agree))
    return root, run(root, 'embedded')


def at(root, name, scheduler=None):
    "a job whose patients get the same pseudonyms as all the others'"
    j = job('c', str(root/'dicom'), str(root/name), str(root/'settings.ini'), scheduler or '', str(root/'bundle'))
    key = next(root.glob('*/c/key'), None)
    j.folder.mkdir(parents=True, exist_ok=True)
    if key and key.parent != j.folder: shutil.copy(key, j.folder)
    return j


def run(root, name, scheduler=None):
    j = at(root, name, scheduler)
    with engine(j.settings, j.scheduler) as client: preprocess(j, j.dicom_dir, client)
    infer(j)
    return rows(j.folder)


def rows(folder):
    "manifest, thumbnails, predictions and studies of a cohort's folder"
    thumbs, out = Thumbnails(folder/'thumbnails'), next(folder.glob('predictions/*'))
    assert not list(folder.rglob('*.tmp')) and not list(out.glob('parts/*.parquet'))
    return dict(manifest=pl.read_parquet(folder/'manifest.parquet'), pictures={i: thumbs.get(i) for i in sorted(thumbs.ids())},
                predictions=pl.read_parquet(out/'predictions.parquet'), studies=pl.read_parquet(out/'studies.parquet'), csv=(out/'studies.csv').read_bytes())


def assert_same(got, want):
    for k in ('manifest', 'predictions', 'studies'): assert got[k].equals(want[k]), k
    assert got['csv'] == want['csv'] and got['pictures'].keys() == want['pictures'].keys()
    assert all(np.array_equal(got['pictures'][i], want['pictures'][i]) for i in want['pictures'])


def test_the_cohort_has_what_a_cohort_has(study):
    want = study[1]
    status = dict(want['predictions']['status'].value_counts().iter_rows())
    assert status['ok'] == len(want['pictures']) > 24 and status['rejected'] >= 2 and want['predictions'].height == want['manifest'].height


def test_two_workers_started_by_hand_give_the_same_rows(study, cluster):
    root, want = study
    assert_same(run(root, 'by_hand', cluster.address), want)


def test_the_command_line_on_a_cluster(study, cluster):
    root, want = study
    folder = at(root, 'cli').folder
    here = ('-p', 'cohort=c', '-p', f'dicom_dir={root/"dicom"}', '-p', f'outputs={root/"cli"}', '-p', f'scheduler={cluster.address}')
    for args in (('preprocess', *here), ('infer', *here, '-p', f'bundle={root/"bundle"}')):
        done = mammo('run', *args, cwd=root)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    assert_same(rows(folder), want)


@pytest.mark.parametrize('stage, when', [('preprocess', 40), ('infer', 12)])
def test_a_worker_killed_in_the_middle_costs_nothing(study, started, monkeypatch, stage, when):
    root, want = study
    c, seen, real = started(), [0], E.Progress.update
    def update(self, n=1):
        real(self, n)
        seen[0] += n
        if len(seen) == 1 and seen[0] >= when: seen.append(c.kill_a_worker(client))
    with engine(S, c.address) as client:
        client.wait_for_workers(2, timeout=60)
        if stage == 'infer': preprocess(at(root, f'killed_{stage}'), root/'dicom')
        monkeypatch.setattr(E.Progress, 'update', update)
        got = run(root, f'killed_{stage}', c.address)
        assert len(seen) == 2 and len(client.nthreads()) == 1, 'one worker was killed and stayed away'
    assert_same(got, want)


# --- files that take their worker with them

def touch(item):
    "None; kills or hangs its process, as a native decoder does"
    if item == 'crash': os.kill(os.getpid(), signal.SIGSEGV)
    if item == 'hang': time.sleep(60)
    time.sleep(.01)
    return item


@pytest.mark.parametrize('where, guilty, limit', [('embedded', ['crash', 'hang'], 3), ('by hand', ['crash'], 60)])
def test_a_file_that_crashes_or_hangs_costs_only_itself(cluster, where, guilty, limit):
    items = [*range(9), guilty[0], *range(9, 30), *guilty[1:]]
    with engine(toy.settings_with(engine=dict(workers=2)), cluster.address if where == 'by hand' else None) as client:
        client.wait_for_workers(2, timeout=60)
        got = list(map_files(touch, items, client, chunk=4, timeout=limit))
    assert sorted(str(i) for i, _, _ in got) == sorted(map(str, items)), 'each exactly once'
    bad = {i: e for i, _, e in got if e}
    assert set(bad) == set(guilty) and all(r == i for i, r, e in got if not e)
    assert 'hang' not in bad or bad['hang'].startswith('took longer than 3 s')
    assert bad['crash'].startswith('brought the reading process down' if where == 'by hand' else ('brought the reading process down', 'took longer'))


@pytest.mark.parametrize('again', [True, False])
def test_a_task_that_dask_loses_is_not_waited_for(monkeypatch, again):
    "a future that no worker has, with idle workers; a slow one is waited for"
    from distributed import Future
    monkeypatch.setattr(E, 'ASK', .4)
    s = S.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=2))))
    with engine(s) as client:
        submit, sent = client.submit, []
        def lossy(*args, **kw):
            sent.append(args)
            return Future('nobody-has-it', client) if len(sent) == 2 else submit(*args, **kw)
        monkeypatch.setattr(client, 'submit', lossy)
        got = sorted(map_files(nap, [.1, 3., .2, .3, .4], client, chunk=1, again=again))
    assert [g[0] for g in got] == [.1, .2, .3, .4, 3.] and sum(bool(error) for *_, error in got) == (not again)
    assert len(sent) == 5 + again


def nap(seconds):
    time.sleep(seconds)
    return seconds


def test_nothing_is_lost_among_many_small_tasks(cluster):
    with engine(S, cluster.address) as client:
        assert sorted(r for _, r, _ in map_files(operator.neg, range(800), client, chunk=2)) == list(range(-799, 1))


# --- a cluster that goes away, or never was

@pytest.fixture
def impatient():
    with dask.config.set({'distributed.scheduler.no-workers-timeout': '3s'}): yield


def test_without_workers_one_sentence_instead_of_waiting_for_ever(started, impatient):
    c = started(workers=0)
    with pytest.raises(MammoError, match=f'cluster at {c.address} has had no worker for 3 s; start some .* and run the same command again'):
        with engine(S, c.address): pass


def test_all_workers_gone_in_the_middle(started, impatient):
    c, got = started(workers=1), []
    with pytest.raises(MammoError, match='has had no worker for 3 s'), engine(S, c.address) as client:
        for it, _, error in map_files(touch, range(400), client, chunk=2):
            got.append((it, error))
            if len(got) == 10: c.kill_a_worker(client)
    assert 10 <= len(got) < 400 and not any(e for _, e in got), 'no file is blamed'


def test_the_scheduler_gone_in_the_middle(started):
    c, got = started(workers=1), []
    with pytest.raises(MammoError, match=f'The Dask scheduler at {c.address} is gone; start the cluster again and run the same command'), engine(S, c.address) as client:
        for it, _, error in map_files(touch, range(400), client, chunk=2):
            got.append((it, error))
            if len(got) == 10: c.scheduler.kill()
    assert 10 <= len(got) < 400 and not any(e for _, e in got), 'no file is blamed'


def test_no_scheduler_is_one_sentence(tmp_path):
    done = mammo('run', 'infer', '-p', 'scheduler=nowhere', '-p', 'cohort=c', cwd=small_project(tmp_path/'p'))
    assert done.returncode == 1 and 'Traceback' not in done.stderr and done.stderr.startswith('mammo: '), done.stderr


OLD = "import distributed.versions as v; v._version_cached = lambda package: '2020.1.0'"


def other_code(folder):
    shutil.copytree(Path(mammo_nb.__file__).parent, folder/'mammo_nb', ignore=shutil.ignore_patterns('__pycache__'))
    with open(folder/'mammo_nb'/'infer.py', 'a') as f: f.write('\n# edited here and not there\n')


def no_package(folder):
    (folder/'mammo_nb').mkdir()
    (folder/'mammo_nb'/'__init__.py').write_text('raise ModuleNotFoundError')


@pytest.mark.parametrize('args, kw, path, words', [
    (['--no-nanny'], dict(before=OLD), None, r'The worker tcp://\S+ has dask 2020.1.0, this side has .*; install the same versions'),
    ([], {}, other_code, r'The worker tcp://\S+ has other code than this side'),
    ([], {}, no_package, r'The worker tcp://\S+ cannot load mammo_nb .*; install it on the whole cluster'),
    (['--nthreads', '3'], {}, None, r'The worker tcp://\S+ has 3 threads; start workers with --nthreads 1')], ids=['old-dask', 'other-code', 'no-mammo_nb', 'threads'])
def test_a_cluster_that_cannot_do_the_work_is_refused(started, tmp_path, args, kw, path, words):
    c, env = started(workers=0), {}
    if path:
        (tmp_path/'lib').mkdir()
        path(tmp_path/'lib')
        env = dict(PYTHONPATH=str(tmp_path/'lib'))
    c.worker(*args, **kw, **env)
    with pytest.raises(MammoError, match=words):
        with engine(S, c.address): pass


# --- encrypted

def test_an_encrypted_cluster_through_dasks_own_configuration(started, tmp_path):
    if not shutil.which('openssl'): pytest.skip('no openssl to make a certificate with')
    pem, key = tmp_path/'cert.pem', tmp_path/'key.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost', '-out', pem, '-keyout', key], check=True, capture_output=True)
    tls = {'ca-file': pem, 'scheduler.cert': pem, 'scheduler.key': key, 'worker.cert': pem, 'worker.key': key, 'client.cert': pem, 'client.key': key}
    env = {'DASK_DISTRIBUTED__COMM__TLS__' + k.upper().replace('-', '_').replace('.', '__'): str(v) for k, v in tls.items()} | {'DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME': 'tls'}
    c = started(workers=1, **env)
    assert c.address.startswith('tls://')
    with pytest.raises(MammoError, match='is encrypted, but Dask knows no certificate'):
        with engine(S, c.address): pass
    with dask.config.set({f'distributed.comm.tls.{k}': str(v) for k, v in tls.items()}), engine(S, c.address) as client:
        assert [r for _, r, _ in map_files(touch, range(5), client, chunk=5)] == list(range(5))


# --- the recipes under cluster/ and the container file, as far as they can be tried without SLURM, Kubernetes and a container engine

def test_the_slurm_script_asks_for_single_threaded_workers():
    pytest.importorskip('dask_jobqueue')
    done = subprocess.run([sys.executable, ROOT/'cluster'/'slurm.py', '--workers', '32', '--memory', '96GB', '--partition', 'cpu', '--walltime', '12:00:00', '--before', 'module load x',
                           '--dry-run'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in ('#SBATCH -p cpu', '#SBATCH --cpus-per-task=32', '#SBATCH -t 12:00:00', 'module load x\n', '--nthreads 1 ', '--nworkers 32 ', '--nanny', 'tcp://'): assert words in done.stdout, words


def test_the_kubernetes_resource_has_what_the_operator_wants():
    dask_cluster, job_, policy = yaml.safe_load_all((ROOT/'cluster'/'kubernetes.yaml').read_text())
    assert (dask_cluster['apiVersion'], dask_cluster['kind'], set(dask_cluster['spec'])) == ('kubernetes.dask.org/v1', 'DaskCluster', {'scheduler', 'worker'})
    worker, scheduler = dask_cluster['spec']['worker'], dask_cluster['spec']['scheduler']
    assert worker['replicas'] > 0 and {p['name'] for p in scheduler['service']['ports']} == {'tcp-comm', 'http-dashboard'}
    args = worker['spec']['containers'][0]['args']
    assert args[args.index('--nthreads') + 1] == '1' and args[args.index('--name') + 1] == '$(DASK_WORKER_NAME)'
    pods = worker['spec'], scheduler['spec'], job_['spec']['template']['spec']
    for pod in pods: assert pod['securityContext']['runAsNonRoot'] and 'memory' in pod['containers'][0]['resources']['limits']
    for pod in (pods[0], pods[2]): assert {m['mountPath']: m.get('readOnly', False) for m in pod['containers'][0]['volumeMounts']} == {'/data': True, '/study/outputs': False}
    assert f"tcp://{dask_cluster['metadata']['name']}-scheduler:8786" in job_['spec']['template']['spec']['containers'][0]['args'][-1]
    assert policy['kind'] == 'NetworkPolicy' and policy['spec']['podSelector']['matchLabels'] == {'dask.org/cluster-name': dask_cluster['metadata']['name']}


def test_the_image_holds_what_runs_and_no_data():
    text, allowed = (ROOT/'Containerfile').read_text(), {line[1:] for line in (ROOT/'.dockerignore').read_text().splitlines() if line.startswith('!')}
    assert allowed == {'mammo_nb', 'nbs', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE'} and all((ROOT/p).exists() for p in allowed)
    assert (ROOT/'.dockerignore').read_text().splitlines()[1] == '*', 'everything else stays out'
    copied = {w for line in text.splitlines() if line.startswith('COPY ') and '--from' not in line for w in line.split()[1:-1] if not w.startswith('--')} - {'.'}
    assert copied <= allowed and 'USER mammo' in text.split('FROM')[-1] and 'ENTRYPOINT ["mammo"]' in text
