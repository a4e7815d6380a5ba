"""One script, one table: what this project promises about speed, side by side with what a researcher would write first.

    python tests/benchmarks/table.py [--repeat 5] [--small] [--only decode,store] [--save]

Every part takes turns with its reference in the same run; figures are medians, and only the ratios travel to another machine. A part runs in a process of its own, so that
none inherits another's memory. --save writes nbs/data/benchmarks.json, from which the page "How far it goes" is made; without it nothing is written."""
import argparse
import importlib.util
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1]/'nbs'/'data'
PARTS = 'pipeline', 'workers', 'stages', 'decode', 'headers', 'store', 'scale'
HERE_PARTS = 'workers', 'stages'
KEYS = 'work', 'reference', 'reference_value', 'ours_value', 'unit', 'ratio', 'bar', 'ok'
LIBRARIES = 'numpy', 'pydicom', 'imagecodecs', 'opencv-python-headless', 'onnxruntime', 'polars', 'distributed', 'pillow'


# --- what the machine gives

def cgroup_cores():
    "Cores that the control group grants; None: no limit"
    for path, parse in (('cpu.max', lambda t: t.split()), ('cpu/cpu.cfs_quota_us', lambda t: (t, Path('/sys/fs/cgroup/cpu/cpu.cfs_period_us').read_text()))):
        try: quota, period = parse((Path('/sys/fs/cgroup')/path).read_text())
        except (OSError, ValueError): continue
        return None if quota.strip() in ('max', '-1') else int(quota)/int(period)


def granted():
    "Cores that this process may use: its affinity, and the control group's share of time"
    mine = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return min(mine, cgroup_cores() or mine)


def processor():
    try: return next(line.split(':', 1)[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): return platform.machine()


def facts():
    "What the figures were measured on; nothing that names the machine"
    libs = {}
    for name in LIBRARIES:
        try: libs[name] = version(name)
        except PackageNotFoundError: pass
    return dict(cores=granted(), processor=processor(), python=platform.python_version(), system=platform.system(), libraries=libs,
                measured_utc=datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%MZ'))


def burn(n=3_000_000):
    "CPU seconds and wall seconds of plain arithmetic"
    w, c, x = time.perf_counter(), time.process_time(), 0
    for i in range(n): x += i*i % 7
    return time.process_time() - c, time.perf_counter() - w


def two_against_one(pool, repeat):
    "How many times as much two processes get done as one, doing nothing but arithmetic: what the machine itself gives"
    got = []
    for _ in range(repeat):
        one, t = pool.submit(burn).result()[1], time.perf_counter()
        list(pool.map(burn, [3_000_000]*2))
        got.append(2*one/(time.perf_counter() - t))
    return statistics.median(got)


# --- two workers against one, from DICOM to probability

def cpu_seconds(client): return sum(client.run(time.process_time).values()) + time.process_time()


def workers_rows(repeat=5, small=False, images=48, size=(3328, 2560)):
    "Decoding and the model in one worker process and in two"
    import numpy as np
    import pipeline as P
    if small: repeat, images, size = 1, 16, (832, 640)
    base, out = P.load_settings(), []
    with_workers = lambda n: base.model_copy(update=dict(engine=base.engine.model_copy(update=dict(workers=n))))
    with ProcessPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as d, P.engine(with_workers(1)) as one, P.engine(with_workers(2)) as two:
        d = Path(d)
        P.export_bundle(P.make_model('resnet18', 2, P.MODEL, shrink=0).eval(), d/'model', P.bundle_meta(base, 'bench', 1, std=.25),
                        np.random.default_rng(0).integers(0, 256, (32, P.MODEL, P.MODEL), dtype=np.uint8))
        model, manifest = P.Bundle.load(d/'model', 'fp32', provider='cpu'), P.cohort(d, 'jpeg_lossless', images, size)
        sides, walls, cpus = {1: (one, with_workers(1)), 2: (two, with_workers(2))}, {1: [], 2: []}, []
        for turn in range(repeat + 1):
            for n, (client, s) in sides.items():
                cpu, wall = cpu_seconds(client), time.perf_counter()
                assert P.ours(manifest, d, model, s, client, n) == images
                wall = time.perf_counter() - wall
                if turn: walls[n].append(wall)   # the first turn warms up
                if turn and n == 2: cpus.append((cpu_seconds(client) - cpu)/wall)
        machine, cores = two_against_one(pool, repeat), granted()
    got, rate = statistics.median(cpus), {n: images/statistics.median(w) for n, w in walls.items()}
    there = cores >= 2 and machine >= 1.9
    return [row(f'DICOM to probability, JPEG Lossless {size[0]}x{size[1]}, two workers', f'one worker; {cores:g} cores granted, {got:.2f} used by two', rate[1], rate[2], 'images/s', 1.85 if there else None),
            row('two processes of plain arithmetic', 'one process: what the machine itself gives', 1, machine, 'work', None)]


# --- what the stages cost, for the page "How far it goes"; no bars

def stages_rows(repeat=5, small=False, images=24, size=(3328, 2560)):
    "Thumbnails kept per second, megabytes per file and kilobytes per thumbnail by transfer syntax, and what one client hands out"
    import shutil
    import pipeline as P
    from mammo_nb.cohort.thumbs import make_thumbnails
    from mammo_nb.core.engine import map_files
    if small: repeat, images, size = 1, 8, (832, 640)
    cores, s, out = int(granted()), P.load_settings(), []
    s = s.model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=cores))))
    with tempfile.TemporaryDirectory() as d, P.engine(s) as client:
        d, edge = Path(d), s.image.thumbnail_size
        for name, (title, *_) in P.BARS.items():
            (d/name).mkdir()
            manifest, took = P.cohort(d/name, name, images, size), []
            weight = sum(f.stat().st_size for f in (d/name).iterdir())/images
            for turn in range(repeat + 1):
                began = time.perf_counter()
                assert not make_thumbnails(manifest, d/name, d/'thumbnails', s, client).height
                if turn: took.append(time.perf_counter() - began)
                kept = sum(f.stat().st_size for f in (d/'thumbnails').rglob('*') if f.is_file())/images
                shutil.rmtree(d/'thumbnails')
            out += [figure(f'thumbnails of {edge} px kept, {title}', images/statistics.median(took), 'images/s'),
                    figure(f'a file of {size[0]}x{size[1]}, {title}', weight/1e6, 'MB'), figure(f'its thumbnail of {edge} px, {title}', kept/1e3, 'kB')]
            shutil.rmtree(d/name)
        n, took = 200 if small else 2000, []
        for turn in range(repeat + 1):
            began = time.perf_counter()
            assert sum(1 for _ in map_files(operator.neg, range(n), client, chunk=1)) == n
            if turn: took.append(time.perf_counter() - began)
    return out + [figure('tasks that one client and scheduler hand out and take back', n/statistics.median(took), 'tasks/s')]


def figure(work, value, unit): return dict(work=work, reference='', reference_value=None, ours_value=float(f'{value:.4g}'), unit=unit, ratio=None, bar=None, ok=None)


def row(work, reference, a, b, unit, bar):
    return dict(work=work, reference=reference, reference_value=round(a, 2), ours_value=round(b, 2), unit=unit, ratio=round(b/a, 2), bar=bar, ok=None if bar is None else b/a >= bar)


# --- the table

def part_rows(name, repeat, small):
    "Rows of one part, in this process"
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parent))
    if name in HERE_PARTS: return globals()[f'{name}_rows'](repeat, small)
    spec = importlib.util.spec_from_file_location(name, HERE/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.rows(repeat=repeat, small=small)


def measured(name, repeat, small):
    "Rows of one part, from a process of its own; a part that fails says so in the table"
    with tempfile.TemporaryDirectory() as d:
        cmd = [sys.executable, __file__, '--part', name, '--repeat', str(repeat), '--into', f'{d}/rows.json'] + ['--small']*small
        done = subprocess.run(cmd, capture_output=True, text=True)
        if done.returncode == 0: return [{k: r.get(k) for k in KEYS} for r in json.loads(Path(f'{d}/rows.json').read_text())]
    print(done.stderr[-2000:], file=sys.stderr)
    return [dict.fromkeys(KEYS) | dict(work=f'{name}: failed, see above', reference='', unit='', ok=False)]


def number(x): return '' if x is None else f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3g}'


def text(rows, judged=True):
    "The table, as Markdown that also reads well in a terminal"
    head, cells = ['work', 'reference', 'reference is', 'ours is', 'unit', 'ratio', 'bar', ''], []
    for r in rows:
        verdict = '' if r['ok'] is None or not judged else 'ok' if r['ok'] else 'MISSED'
        cells.append([r['work'], r['reference'] or '', number(r['reference_value']), number(r['ours_value']), r['unit'] or '', number(r['ratio']), number(r['bar']), verdict])
    width = [max(len(c[i]) for c in [head, *cells]) for i in range(len(head))]
    line = lambda c: '| ' + ' | '.join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(c, width))) + ' |'
    return '\n'.join([line(head), line(['-'*w for w in width]), *map(line, cells)])


def save(name, rows, repeat):
    "Puts one part's rows into nbs/data/benchmarks.json; the others keep theirs"
    path = DATA/'benchmarks.json'
    parts = (json.loads(path.read_text())['parts'] if path.exists() else {}) | {name: rows}
    DATA.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts() | dict(repeat=repeat, parts={k: parts[k] for k in PARTS if k in parts}), indent=1) + '\n')


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeat', type=int, default=5)
    a.add_argument('--small', action='store_true', help='a quick smoke run; its figures mean nothing')
    a.add_argument('--only', default=','.join(PARTS), help='parts, separated by commas')
    a.add_argument('--save', action='store_true', help='write nbs/data/benchmarks.json; parts that are not run keep their rows')
    a.add_argument('--part', help=argparse.SUPPRESS)
    a.add_argument('--into', help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.part: return Path(a.into).write_text(json.dumps(part_rows(a.part, a.repeat, a.small), default=lambda x: x.item()))
    asked, got = a.only.split(','), {}
    if unknown := set(asked) - set(PARTS): sys.exit(f"No part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    for name in asked:
        if name not in HERE_PARTS and not (HERE/f'{name}.py').exists(): continue
        began = time.monotonic()
        got[name] = measured(name, a.repeat, a.small)
        print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)
        if a.save and not a.small: save(name, got[name], a.repeat)
    f = facts()
    print(f"{f['cores']:g} cores granted, {f['processor']}; Python {f['python']}, {', '.join(f'{k} {v}' for k, v in f['libraries'].items())}; {'a smoke run, its figures mean nothing' if a.small else f'medians of {a.repeat}'}\n")
    print(text([r for rows in got.values() for r in rows], judged=not a.small))
    missed = 0 if a.small else sum(r['ok'] is False for rows in got.values() for r in rows)
    if missed: sys.exit(f'{missed} missed')


if __name__ == '__main__': main()
