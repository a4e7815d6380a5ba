"""What several tests share: a small project of its own, and where the real images lie."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'
SMALL = dict(thumbnail_size=256, model_size=64, epochs=2, min_steps=8, queue_size=16, patients=10, patients_b=5, image_size=256, rounds=2)


def small_project(folder: Path, **changes) -> Path:
    "A copy of the project's notebooks and settings in `folder`, with a demo of a few small images"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', folder)
    text = (ROOT/'settings.ini').read_text()
    for key, value in (SMALL | changes).items():
        text, n = re.subn(rf'(?m)^{key} = .*$', f'{key} = {value}', text)
        assert n == 1, f'settings.ini has {n} keys named {key}'
    (folder/'settings.ini').write_text(text)
    return folder


def mammo(*args, cwd, timeout=900, **env):
    "Runs the command line in `cwd`"
    cmd = [sys.executable, '-c', 'from mammo_nb.core.run import main; main()', *map(str, args)]
    return subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | env)


# --- two processes share the suite (-n auto in pyproject.toml): whole files, longest first; `-n 0` runs everything in one

os.environ.setdefault('OMP_NUM_THREADS', '1')   # before torch is loaded, here and in every process that a test starts: two suites on two cores
LONGEST = 'stages kills rounds_cli code_execution labeler_browser notebooks privacy cluster header_model explain outbox learn train_browser review_browser weak leaks run hostile display edge_pictures deidentify verify fleet'.split()
TOGETHER = dict(test_review='test_stages', test_heads='test_explain')   # they share what takes longest to make: the demo's project, two trained phantom models
SLOW = '04_explain', '01_rounds', '07_sites', '06_replay'   # of the notebooks


def unit(path):
    "What is never split between processes: a test file, or several that share something expensive"
    return TOGETHER.get(Path(path).stem, Path(path).stem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "Two on every machine, since each loads torch; none for a file or two"
    return 2 if any(Path(a).is_dir() for a in config.args) or len({a.split('::')[0] for a in config.args}) > 2 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Units in the order of collection; notebooks are independent of each other"
    from xdist.scheduler import LoadScopeScheduling
    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks' in nodeid else unit(nodeid.split('::')[0])
    config.option.loadscopereorder = False
    return Units(config, log)


def pytest_collection_modifyitems(items):
    "Longest first, so that neither process waits for the other at the end"
    rank = {f'test_{name}': k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda i: (rank.get(unit(i.path), len(rank)), unit(i.path) == 'test_notebooks' and not any(s in i.name for s in SLOW)))


@pytest.fixture(scope='session')
def shared():
    "The folder of real images beside the checkout"
    if not (SHARED/'data'/'mg').is_dir(): pytest.skip('no ../shared/data/mg beside the checkout')
    return SHARED


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    "A small project in which every stage has run once through the command line; read only"
    folder = small_project(tmp_path_factory.mktemp('project')/'study')
    done = mammo('demo', cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder/'demo.txt').write_text(done.stdout)
    return folder


@pytest.fixture(scope='module')
def one_thread():
    "torch with one thread, so that small trainings do not fight over two cores"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def executed(source, folder, how):
    "text of a notebook with one cell, executed by papermill or nbconvert as if nobody were there"
    import nbformat
    cell = nbformat.v4.new_code_cell(source)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=dict(kernelspec=dict(name='python3', display_name='p', language='python'))), folder/'in.ipynb')
    cmd = dict(papermill=['papermill', 'in.ipynb', 'out.ipynb', '--no-progress-bar'],
               nbconvert=['nbconvert', '--to', 'notebook', '--execute', 'in.ipynb', '--output', 'out.ipynb'])[how]
    env = {k: v for k, v in os.environ.items() if not k.startswith(('JPY_', 'MAMMO_'))} | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-m', *cmd], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return (folder/'out.ipynb').read_text()


@pytest.fixture
def counting(tmp_path, monkeypatch):
    "A project with one tiny stage whose last cell is given by the test"
    from nbformat import v4
    def make(code, params='cohort = "a"\nn = 2', title='# Count\n\n> Counts.'):
        cells = [v4.new_markdown_cell(title), v4.new_code_cell(params, metadata={'tags': ['parameters']}),
                 v4.new_markdown_cell('## Run'), v4.new_code_cell(code)]
        small_project(tmp_path/'p')
        for old in (tmp_path/'p'/'nbs').glob('[0-9]_*.ipynb'): old.unlink()
        (tmp_path/'p'/'nbs'/'1_count.ipynb').write_text(json.dumps(v4.new_notebook(cells=cells)))
        monkeypatch.chdir(tmp_path/'p')
        return tmp_path/'p'
    return make
