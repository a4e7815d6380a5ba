"""Kill -9 at random moments of preprocess, train, export and infer; after each kill nothing half-written may be readable, and a restart must
end with what an undisturbed run gives, without repeating more than the piece in flight.

    python tests/faults/kills.py --seed 6 --save

Most kills hit a stage's function in a process of its own (forked from this one, which has loaded everything): at a random moment, before a
random file operation, or before a random piece of work (a header, an image, a training step). `engine` runs have two Dask workers, of which
single ones are killed too; `command` runs are `mammo run`, of which driver, kernel or a worker is killed."""
import os

os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1', POLARS_MAX_THREADS='1')

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

CHUNK = 4          # files per group and images per shard here, instead of 2500 and 64
PLAN = dict(preprocess=26, train=16, export=10, infer=22, engine_preprocess=8, engine_infer=8, command_preprocess=6, command_train=4, command_infer=6)


# ---------------------------------------------------------------- processes

def tree(pid):
    "All descendants of a process"
    children = {}
    for p in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            children.setdefault(int(Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[1]), []).append(int(p))
    out, todo = [], [pid]
    while todo:
        more = children.get(todo.pop(), [])
        out += more
        todo += more
    return out


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError: return False


def what(pid):
    "kernel, worker, or other"
    try: line = Path(f'/proc/{pid}/cmdline').read_text()
    except OSError: return 'other'
    return 'kernel' if 'ipykernel' in line else 'worker' if 'spawn_main' in line else 'other'


def gone(pids, patience):
    "Seconds until all of them are gone, None if they stay"
    began = time.monotonic()
    while any(map(alive, pids)):
        if time.monotonic() - began > patience: return None
        time.sleep(.05)
    return time.monotonic() - began


def forked(fn, *args, kill=None, limit=300, out=None):
    "`('done', value)`, `('failed', text)` or `('killed', pids of its children)` of a function in a child of this process; `kill`: seconds, ('operation', k) or ('piece', k)"
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(r)
        os.setsid()
        try:
            if out: os.dup2(os.open(out, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), 1), os.dup2(1, 2)
            if isinstance(kill, tuple): die_at_operation(kill[1]) if kill[0] == 'operation' else FATAL.append(kill[1])
            text = json.dumps(['done', fn(*args)])
        except BaseException: text = json.dumps(['failed', traceback.format_exc()])
        os.write(w, text.encode()[:60_000])
        os._exit(0)
    os.close(w)
    end, orphans = time.monotonic() + (kill if isinstance(kill, (int, float)) else limit), []
    import select
    got = b''
    while True:
        left = end - time.monotonic()
        if left <= 0:
            orphans = tree(pid)
            os.kill(pid, signal.SIGKILL)
            break
        if select.select([r], [], [], min(left, .5))[0]:
            data = os.read(r, 65536)
            if not data: break
            got += data
    os.close(r)
    os.waitpid(pid, 0)
    if got: return tuple(json.loads(got))
    if kill is None: return 'failed', 'hangs'
    return 'killed', orphans


FATAL = []   # before which piece of work this process is to die
OPERATIONS = ('replace', 'rename', 'link', 'fsync', 'unlink', 'mkdir', 'rmdir')


def die_at_operation(k):
    "This process ends by SIGKILL before its k-th file operation"
    left = [k]
    for name in OPERATIONS:
        def op(*a, _real=getattr(os, name), **kw):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return _real(*a, **kw)
        setattr(os, name, op)


def count_operations(fn, *args):
    "How many file operations a calm run makes, its seconds, and its value"
    n = [0]
    for name in OPERATIONS:
        def op(*a, _real=getattr(os, name), **kw):
            n[0] += 1
            return _real(*a, **kw)
        setattr(os, name, op)
    began = time.monotonic()
    value = fn(*args)
    return n[0], time.monotonic() - began, value


# ---------------------------------------------------------------- the stages, small

def settings(root):
    from mammo_nb.core.settings import load_settings
    s = load_settings(root)
    with_ = lambda k, **v: {k: getattr(s, k).model_copy(update=v)}
    return s.model_copy(update=with_('image', thumbnail_size=128, model_size=64) | with_('infer', batch_size=8) | with_('engine', workers=2) |
        with_('train', arch='shufflenet_v2_x0_5', epochs=5, min_steps=1, batch_size=8, lr=3e-3, pretrained='no', mlflow=''))


def small_pieces(counter):
    "Little work per group, so that there is something to be interrupted; every unit of work leaves a byte in `counter`"
    import mammo_nb.cohort.facts as F
    import mammo_nb.cohort.thumbs as T
    import mammo_nb.infer as I
    import mammo_nb.learn.answers as A
    import mammo_nb.learn.rounds as R
    fd, done = os.open(counter, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), []
    def counted(module, name, mark):
        real = getattr(module, name)
        def f(*a, **k):
            os.write(fd, mark)
            done.append(1)
            if FATAL and len(done) > FATAL[0]: os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        setattr(module, name, f)
    F.PART_ROWS, F.GROUP_FILES, T.IMAGES_PER_SHARD = CHUNK, CHUNK, CHUNK
    counted(F, '_beginning', b'h'), counted(T, 'render', b'd'), counted(A, 'render_input', b'a'), counted(R._Watch, 'after_batch', b's')
    R.Keep.__init__.__defaults__ = (None, 0.)
    I.predict.__defaults__ = (None, 0.)


def job(home, cohort, s, **kw):
    from mammo_nb.core.run import Job
    return Job(s, cohort, home/cohort, kw.get('dicom'), None, kw.get('bundle'))


def preprocess(world, home, engine=False):
    from mammo_nb.core import engine as E
    from mammo_nb.preprocess import preprocess as run
    s = settings(world)
    if not engine: small_pieces(home/'.counter')
    with E.engine(s) if engine else contextlib.nullcontext() as client: run(job(home, 'demo_a', s), world/'dicom', client)


def train(world, home):
    from mammo_nb.learn.rounds import train_round
    import torch
    torch.set_num_threads(1)
    small_pieces(home/'.counter')
    if os.environ.get('KILLS_QUICK'):   # torch's older exporter takes a second instead of five
        real = torch.onnx.export
        torch.onnx.export = lambda *a, dynamo=False, **k: 1/0 if dynamo else real(*a, dynamo=False, **k)
    train_round(home/'demo_a', settings(world), int8=False, tell=lambda text: None, shown=False)


export = train


def infer(world, home, engine=False):
    import mammo_nb.infer as I
    s = settings(world)
    if not engine:
        small_pieces(home/'.counter')
        I.engine = lambda *a: contextlib.nullcontext()
    I.infer(job(home, 'demo_b', s, dicom=world/'dicom', bundle=world/'bundle'), 'fp32')


def label(world, home):
    "The truth of the phantoms as labels"
    from mammo_nb.cohort.manifest import read_manifest
    from mammo_nb.dicom.phantom import truth_path
    from mammo_nb.labels.store import LabelStore, Oracle
    m = read_manifest(home/'demo_a')
    with LabelStore(home/'demo_a', settings(world)) as store:
        store.sync_images(m)
        Oracle(store, truth_path(world/'dicom')).label(m.filter(status='ok')['image_id'][:-6])


def until_export(world, home):
    "A round up to the end of its training"
    import mammo_nb.learn.rounds as R
    def stop(*a, **k): raise KeyboardInterrupt
    R._write = stop
    with contextlib.suppress(KeyboardInterrupt): train(world, home)
    (home/'.counter').unlink()


# ---------------------------------------------------------------- what came of it

def digest(*things):
    h = hashlib.sha256()
    for x in things: h.update(x if isinstance(x, bytes) else repr(x).encode())
    return h.hexdigest()[:16]


def rows(df): return digest(df.columns, *(df.write_json().encode(),))


def result(home, made_anew=False):
    "Everything that must not depend on kills, as `{what: digest}`; where the DICOM files were made anew, their times are others"
    import onnx
    import polars as pl
    from mammo_nb.cohort.thumbs import Thumbnails
    from mammo_nb.core.engine import has_table, read_table
    from mammo_nb.learn.bundle import load_weights_safely
    out = {}
    for cohort in sorted(p for p in home.glob('demo_*') if p.is_dir()):
        put = lambda name, value: out.update({f'{cohort.name}/{name}': value})
        for p in [cohort/'manifest.parquet', cohort/'scan'/'facts.parquet', *cohort.glob('predictions/*/*.parquet'), *cohort.glob('rounds/[0-9]*/*.parquet')]:
            if has_table(p):
                df = read_table(p)
                if made_anew: df = df.drop('mtime_ns', 'ctime_ns', strict=False)
                put(f'{p.parent.parent.name}/{p.parent.name}/{p.name}' if 'predictions' in p.parts else p.relative_to(cohort).as_posix(), rows(df.sort('path') if p.name == 'facts.parquet' else df))
        for p in cohort.glob('predictions/*/studies.csv'): put('studies.csv', digest(p.read_bytes()))
        if (cohort/'thumbnails').exists():
            t = Thumbnails(cohort/'thumbnails')
            put('thumbnails', digest(*(x for i in sorted(t.ids()) for x in (i, t.get(i).shape, t.get(i).tobytes()))))
        for r in sorted(cohort.glob('rounds/[0-9]*')):
            put(f'{r.name} weights', digest(*(x for k, v in sorted(load_weights_safely(r/'weights.safetensors').items()) for x in (k, v.numpy().tobytes()))))
            m = onnx.load(r/'model.onnx')
            del m.metadata_props[:]
            put(f'{r.name} onnx', digest(m.SerializeToString(deterministic=True)))
            info = json.loads((r/'bundle.json').read_text())
            put(f'{r.name} scores', digest(*(json.dumps(info[k], sort_keys=True) for k in ('losses', 'thresholds', 'temperature', 'scores', 'labels', 'steps', 'label_snapshot'))))
        if (cohort/'labels.sqlite').exists():
            import sqlite3
            with contextlib.closing(sqlite3.connect(cohort/'labels.sqlite')) as db:
                newest = db.execute('SELECT image_id, probs FROM predictions WHERE version = (SELECT max(version) FROM predictions) ORDER BY image_id').fetchall()
                put('predictions in the label store', digest(newest, db.execute('SELECT count(*) FROM events').fetchone()))
    return out


def half_files(home):
    "Files that a reader would open and that are not whole"
    bad = []
    for p in sorted(home.rglob('*')):
        parts = p.relative_to(home).parts
        if not p.is_file() or any(x.startswith('.') and x.endswith('.tmp') for x in parts) or p.name in ('.lock', '.counter', '.train.log'): continue
        try: whole(p)
        except Exception as e: bad.append(f'{p.relative_to(home)}: {type(e).__name__}: {str(e)[:200]}')
    return bad


def whole(p):
    "Raises where a file is not whole"
    import numpy as np
    import onnx
    import polars as pl
    from PIL import Image
    from mammo_nb.cohort.thumbs import _contents
    from mammo_nb.core.engine import read_table
    from safetensors import safe_open
    if p.suffix == '.parquet': read_table(p) if not p.parent.suffix else pl.read_parquet(p)
    elif p.suffix in ('.json', '.ipynb'): json.loads(p.read_text())
    elif p.suffix == '.csv': assert p.read_text().endswith('\n') and len({line.count(',') for line in p.read_text().splitlines()}) == 1
    elif p.suffix == '.shard': assert _contents(p) is not None
    elif p.suffix == '.onnx': onnx.checker.check_model(onnx.load(p))
    elif p.suffix == '.safetensors':
        with safe_open(p, 'pt') as f: [f.get_tensor(k) for k in f.keys()]
    elif p.suffix == '.npz': np.load(p, allow_pickle=False).values()
    elif p.suffix == '.png': Image.open(p).load()
    elif p.suffix == '.html': assert p.read_text().rstrip().endswith('</html>')
    elif p.suffix == '.sqlite':
        import sqlite3
        with contextlib.closing(sqlite3.connect(p)) as db: assert db.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    elif p.name == 'key': assert len(p.read_bytes()) == 32 and p.stat().st_mode & 0o77 == 0
    elif p.suffix == '.md': assert p.read_text().endswith('\n')


def leftovers(home):
    "Temporary files and marks of killed runs"
    return [str(p.relative_to(home)) for p in home.rglob('*') if p.name.endswith('.tmp') or p.name in ('.lock', '.progress', 'parts.tmp') and p.parent.name != 'rounds']


# ---------------------------------------------------------------- the campaign

class Campaign:
    def __init__(self, folder, seed, say=print):
        self.folder, self.rng, self.say, self.base, self.want, self.facts = Path(folder), random.Random(seed), say, {}, {}, {}
        self.orphans = 0.

    def make(self, stages):
        "A small study, and what each stage gives undisturbed"
        from conftest import small_project
        world = self.world = small_project(self.folder/'study', patients=8, image_size=192)
        def cohort():
            from mammo_nb.dicom.phantom import make_cohort
            make_cohort(world/'dicom', patients=8, image_size=192, seed=42, broken=.12, workers=1)
        self.ok(forked(cohort))
        empty, self.keyed = self.folder/'empty', self.folder/'keyed'
        empty.mkdir()
        (self.keyed/'demo_b').mkdir(parents=True)   # pseudonyms hang on the cohort's key, which is made at random
        (self.keyed/'demo_b'/'key').write_bytes(bytes(range(32)))
        (self.keyed/'demo_b'/'key').chmod(0o600)
        need = lambda *names: any(n.split('_')[-1] in names for n in stages)
        self.calm('preprocess', preprocess, empty)
        labelled = self.copy(self.folder/'calm-preprocess', 'labelled')
        self.ok(forked(label, world, labelled))
        if need('train', 'export', 'infer'): self.calm('train', train, labelled)
        if need('export'):
            trained = self.copy(labelled, 'trained')
            self.ok(forked(until_export, world, trained))
            self.calm('export', export, trained)
        if need('infer'):
            shutil.copytree(self.folder/'calm-train'/'demo_a'/'rounds'/'001', world/'bundle')
            self.calm('infer', infer, self.keyed)
        for name, base in dict(preprocess=empty, infer=self.keyed).items():
            if f'engine_{name}' in stages: self.calm(f'engine_{name}', globals()[name], base, True)

    def ok(self, said):
        if said[0] != 'done': raise AssertionError(said[1])
        return said[1]

    def copy(self, src, name):
        shutil.rmtree(self.folder/name, ignore_errors=True)
        return Path(shutil.copytree(src, self.folder/name))

    def calm(self, name, fn, base, *more):
        home = self.copy(base, f'calm-{name}')
        ops, seconds, _ = self.ok(forked(count_operations, fn, self.world, home, *more))
        units = self.units(home)
        self.base[name] = dict(fn=fn, base=base, more=more, ops=ops, seconds=seconds, units=units)
        self.want[name] = self.ok(forked(result, home))
        self.say(f'{name}: {seconds:.1f} s, {ops} file operations, work {units}, {len(self.want[name])} results', flush=True)

    def units(self, home):
        text = (home/'.counter').read_text() if (home/'.counter').exists() else ''
        (home/'.counter').unlink(missing_ok=True)
        return {w: text.count(m) for m, w in dict(h='headers', d='decodes', a='answers', s='steps').items() if m in text}

    def check(self, name, home, done):
        "Compares a finished run with the undisturbed one"
        f, got = self.facts[name], self.ok(forked(result, home, done is None))
        differ = sorted(k for k in got.keys() | self.want[name].keys() if got.get(k) != self.want[name].get(k))
        if differ: f['diverged'] += 1; f['what'] += [f'{name}: {k}' for k in differ]
        f['finished'] += 1
        rest = leftovers(home)
        if rest: f['left'] += rest

    def stage(self, name, kills):
        "Kills one stage so many times: some kills, then to the end, then compare, and again"
        b = self.base[name]
        f = self.facts[name] = dict(kills=0, finished=0, diverged=0, half=[], what=[], left=[], repeated={}, most_at_once=0, orphans=0, errors=[])
        while f['kills'] < kills:
            home, n, worked = self.copy(b['base'], f'at-{name}'), self.rng.randint(1, 5), {}
            before = f['kills']
            while True:
                kill = None
                if f['kills'] - before < n and f['kills'] < kills:
                    kill = self.moment(b)
                try: said = self.run(name, b, home, kill)
                except AssertionError as e:
                    f['errors'].append(str(e)[-1500:])
                    f['kills'] += kill is not None
                    if len(f['errors']) > 5: raise
                    continue
                for k, v in self.units(home).items(): worked[k] = worked.get(k, 0) + v
                if said == 'done': break
                f['kills'] += 1
            self.check(name, home, worked)
            for k, v in worked.items():
                extra = v - b['units'].get(k, 0)
                f['repeated'][k] = f['repeated'].get(k, 0) + extra
                if f['kills'] > before: f['most_at_once'] = max(f['most_at_once'], extra / (f['kills'] - before))
        self.say(f"{name}: {f}", flush=True)

    def moment(self, b):
        "Seconds, a file operation, or a piece of work"
        ways = ['time'] if b['more'] else ['time', 'operation'] + ['piece'] * bool(b['units'])
        way = self.rng.choice(ways)
        if way == 'time': return self.rng.uniform(.02, 1) * b['seconds']
        return way, self.rng.randrange(b['ops'] if way == 'operation' else sum(b['units'].values()))

    def run(self, name, b, home, kill):
        f, target = self.facts[name], None
        if b['more'] and kill is not None and self.rng.random() < .5: return self.worker_killed(name, b, home, kill)
        said, value = forked(b['fn'], self.world, home, *b['more'], kill=kill)
        if said == 'failed': raise AssertionError(f'{name}: {value}')
        if said == 'killed':
            if value and self.rng.random() < .5: self.vanish(f, value)   # else the next run starts beside what is left of this one
            f['half'] += self.ok(forked(half_files, home))
        return said

    def vanish(self, f, pids):
        seconds = gone(pids, 30)
        if seconds is None: f['orphans'] += 1; [os.kill(p, 9) for p in pids if alive(p)]
        else: self.orphans = max(self.orphans, seconds)

    def worker_killed(self, name, b, home, kill):
        "A single worker of the stage is killed while the driver goes on"
        r, w = os.pipe()
        pid = os.fork()
        if not pid:
            os.setsid()
            try: b['fn'](self.world, home, *b['more'])
            except BaseException: os.write(w, traceback.format_exc().encode()[-4000:])
            os._exit(0)
        os.close(w)
        time.sleep(kill)
        workers, f = [p for p in tree(pid) if what(p) == 'worker'], self.facts[name]
        if workers: os.kill(self.rng.choice(workers), signal.SIGKILL); f['kills'] += 1
        with open(r) as got: text = got.read()
        os.waitpid(pid, 0)
        if text: raise AssertionError(f'{name}: a killed worker ended the run: {text}')
        return 'done'

    # ---- the command line

    def make_command(self, stages):
        from conftest import small_project
        root = self.root = small_project(self.folder/'project', patients=6, patients_b=3, image_size=192, workers=2)
        (root/'outputs').mkdir()
        for k, (stage, *args) in dict(preprocess=['preprocess'], label=['label', '-p', 'rater=oracle'], train=['train'], infer=['infer']).items():
            base = self.copy(root/'outputs', f'base-{k}')
            began = time.monotonic()
            self.mammo(stage, *args)
            seconds = time.monotonic() - began
            for cohort in ('demo_a', 'demo_b'): shutil.rmtree(root/'outputs'/cohort/'runs', ignore_errors=True)
            self.base[f'command_{k}'] = dict(base=base, args=(stage, *args), seconds=seconds)
            self.want[f'command_{k}'] = self.ok(forked(result, root/'outputs', True))
            self.say(f'command_{k}: {seconds:.1f} s', flush=True)
            if not any(f'command_{x}' in stages for x in ('train', 'infer')): break
            if k == 'train' and 'command_infer' not in stages: break

    def start(self, stage, *args):
        return subprocess.Popen([sys.executable, '-c', 'from mammo_nb.core.run import main; main()', 'run', stage, *args], cwd=self.root, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))

    def mammo(self, stage, *args):
        p = self.start(stage, *args)
        out, err = p.communicate(timeout=300)
        if p.returncode: raise AssertionError(f'mammo run {stage}: {p.returncode}\n{out[-1000:]}\n{err[-3000:]}')

    def command(self, name, kills):
        b = self.base[name]
        f = self.facts[name] = dict(kills=0, finished=0, diverged=0, half=[], what=[], left=[], orphans=0, targets={}, exit_codes={})
        outputs = self.root/'outputs'
        while f['kills'] < kills:
            shutil.rmtree(outputs)
            shutil.copytree(b['base'], outputs)
            for _ in range(self.rng.randint(1, 3)):
                if f['kills'] >= kills: break
                p = self.start(*b['args'])
                time.sleep(self.rng.uniform(.1, .95) * b['seconds'])
                if p.poll() is not None: p.communicate(); continue
                below, target = tree(p.pid), self.rng.choice(['driver', 'driver', 'kernel', 'worker'])
                at = [q for q in below if what(q) == target] or [p.pid]
                target = target if at != [p.pid] else 'driver'
                os.kill(self.rng.choice(at), signal.SIGKILL)
                f['kills'] += 1
                f['targets'][target] = f['targets'].get(target, 0) + 1
                if target == 'driver': p.wait(); p.stdout.close(); p.stderr.close()
                else:
                    out, err = p.communicate(timeout=300)
                    f['exit_codes'][f'{target}: {p.returncode}'] = f['exit_codes'].get(f'{target}: {p.returncode}', 0) + 1
                    if 'Traceback' in err: raise AssertionError(f'{name}: {err}')
                if target != 'driver' or self.rng.random() < .5: self.vanish(f, below)
                f['half'] += self.ok(forked(half_files, outputs))
            self.mammo(*b['args'])
            for cohort in ('demo_a', 'demo_b'):
                for run in (outputs/cohort/'runs').glob('*'): f['left'] += [p.name for p in run.iterdir() if p.name.startswith('.') or p.suffix == '.tmp']
                shutil.rmtree(outputs/cohort/'runs', ignore_errors=True)
            self.check(name, outputs, None)
        self.say(f"{name}: {f}", flush=True)


def run(folder, seed=6, plan=PLAN, say=print):
    "The facts of a campaign"
    with io.StringIO() as hush:
        import mammo_nb.infer, mammo_nb.preprocess, mammo_nb.learn.rounds, mammo_nb.core.run, distributed, onnx  # noqa: loaded once, for all children
    c, began = Campaign(folder, seed, say), time.monotonic()
    direct, commands = {k: n for k, n in plan.items() if not k.startswith('command')}, {k: n for k, n in plan.items() if k.startswith('command')}
    if direct: c.make(direct)
    for k, n in direct.items(): c.stage(k, n)
    if commands: c.make_command(commands)
    for k, n in commands.items():
        try: c.command(k, n)
        except AssertionError as e: c.facts[k].setdefault('errors', []).append(str(e)[-1500:])
    total = lambda key: sum(len(f[key]) if isinstance(f[key], list) else f[key] for f in c.facts.values())
    return dict(seed=seed, kills=total('kills'), restarts_to_the_end=total('finished'), divergences=total('diverged'), half_files=total('half'), left_behind=total('left'),
                orphans_that_stayed=total('orphans'), orphans_gone_after_seconds=round(c.orphans, 1),
                runs_that_failed=sum(len(f.get('errors', ())) for f in c.facts.values()), minutes=round((time.monotonic() - began) / 60, 1), stages=c.facts,
                undisturbed={k: dict(b.get('units', {}), file_operations=b.get('ops')) for k, b in c.base.items()})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seed', type=int, default=6)
    p.add_argument('--only', nargs='*', help=f'stages: {", ".join(PLAN)}')
    p.add_argument('--times', type=float, default=1., help='that many times the kills')
    p.add_argument('--save', action='store_true', help='write nbs/data/reliability/kills.json')
    a = p.parse_args()
    plan = {k: max(1, round(n * a.times)) for k, n in PLAN.items() if not a.only or k in a.only}
    with tempfile.TemporaryDirectory() as d: facts = run(Path(d), a.seed, plan)
    text = json.dumps(facts, indent=1) + '\n'
    print(text)
    if a.save:
        path = ROOT/'nbs'/'data'/'reliability'/'kills.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 1 if facts['divergences'] or facts['half_files'] or facts['left_behind'] or facts['runs_that_failed'] or facts['orphans_that_stayed'] else 0


if __name__ == '__main__': sys.exit(main())
