"The train notebook in a real JupyterLab, a labeler live above it: while the round is trained in a process of its own, keys are taken and acknowledged."
import json
import os
import re
import shutil
import time

import numpy as np
import polars as pl
import pytest

import toy_cohort as toy
from labeler_page import ARGS, CHROMIUM, ROOT, Page, Server, labeler_cell, missing
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import load_settings
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.background import is_running, last_round, progress_of

if missing() and os.environ.get('CI'): pytest.fail(f'CI is set, but {missing()}', pytrace=False)
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or 'runs')
SMALL = dict(thumbnail_size=96, model_size=64, arch='shufflenet_v2_x0_5', pretrained='no', epochs=1, min_steps=120)


@pytest.fixture
def server(tmp_path):
    s = Server(tmp_path/'lab')
    yield s
    s.stop()


def study(folder):
    "settings of a quick training, and a cohort labelled but for a queue of forty"
    folder.mkdir()
    text = (ROOT/'settings.ini').read_text()
    for key, value in SMALL.items():
        text, n = re.subn(rf'(?m)^{key} = .*$', f'{key} = {value}', text)
        assert n == 1, key
    (folder/'settings.ini').write_text(text)
    s = load_settings(folder/'settings.ini')
    keep = lambda t: t.filter((pl.col('split') != 'train') | (pl.col('image_id').str.slice(-1) < '8'))['image_id'].to_list()
    d, m, _ = toy.toy_cohort(folder/'outputs'/'toy', s, patients=30, label=keep)
    write_parquet(m.with_columns(rows=pl.lit(96), columns=pl.lit(72)), d/'manifest.parquet', s)
    with LabelStore(d/'labels.sqlite', s) as store:
        have = set(store.labels()['image_id'])
        store.set_queue('round-002', [i for i in m.filter(pl.col('split') == 'train')['image_id'] if i not in have])
    return d, s, len(have)


def train_cells(folder):
    "the code cells of 3_train, for the toy cohort and in the background"
    nb = json.loads((ROOT/'nbs'/'3_train.ipynb').read_text())
    params = f'cohort = "toy"\ndicom_dir = ""\noutputs = ""\nsettings = {str(folder/"settings.ini")!r}\nscheduler = ""\nepochs = 0\nbackground = True'
    cells = [params if 'parameters' in c['metadata'].get('tags', []) else ''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    assert params in cells
    return cells


def outputs(p):
    "(errors, pictures, text) of all cells"
    got = p.page.evaluate('''() => window.jupyterapp.shell.currentWidget.content.widgets.filter((c) => c.model.type === "code")
        .flatMap((c) => c.model.outputs.toJSON())''')
    text = lambda o: ''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/plain', ''))
    return [(o['ename'], o['evalue']) for o in got if o['output_type'] == 'error'], sum('image/png' in o.get('data', {}) for o in got), '\n'.join(map(text, got))


def count(d, s):
    with LabelStore(d/'labels.sqlite', s) as store: return store._one("SELECT count(*) FROM events WHERE rater = 'anna' AND queue = 'round-002'")[0]


def test_labels_are_acknowledged_while_the_train_notebook_trains(server, tmp_path):
    from playwright.sync_api import sync_playwright
    folder = tmp_path/'study'
    d, s, labelled = study(folder)
    cells = train_cells(folder)
    shutil.copy(folder/'settings.ini', server.folder/'notebooks')   # for the examples, as a notebook in a project finds it
    go = next(k for k, c in enumerate(cells) if c.startswith('j = job('))
    server.notebook('train', labeler_cell(d, queue='round-002').replace(repr(str(ROOT/'settings.ini')), repr(str(folder/'settings.ini'))), *cells)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        p = Page(browser.new_context(viewport=dict(width=1280, height=860)).new_page()).open(server.url('train'))
        for k in range(1, go+1): p.run(k)   # everything up to the definitions
        p.run(0).state('ready').focus()
        p.press('12').saved()
        p.run(go+1)
        assert is_running(d) and last_round(d).pid != os.getpid(), 'the cell is over, the round goes on'
        p.root.focus()   # no click: JupyterLab is still scrolling to the cell that ran
        took, while_training, before = [], 0, count(d, s)
        while is_running(d) and while_training < 8:
            began = time.monotonic()
            p.press('1' if len(took) % 2 else '3').saved()
            took.append(time.monotonic()-began)
            training = progress_of(d).get('state') == 'training' and is_running(d)
            while_training += training
            time.sleep(.15 if training else 1)
        assert while_training >= 3 and count(d, s) == before+len(took), (while_training, len(took), progress_of(d))
        assert np.median(took) < 1, took
        assert last_round(d).wait(120).name == '001'
        for k in range(go+2, len(cells)+1): p.run(k)   # the figures
        errors, pictures, text = outputs(p)
        browser.close()
    assert not errors and pictures >= 6, (errors, pictures)
    assert 'Round 1 is being' in text or 'The round is being' in text
    info = json.loads((d/'rounds'/'001'/'bundle.json').read_text())
    n = sum(info['labels'][k] for k in ('train', 'valid', 'hold_out'))
    assert labelled <= n <= labelled+2+len(took)-while_training and info['id'] in text, 'what was labelled while it trained is for the next round'
    with LabelStore(d/'labels.sqlite', s) as store: assert set(store.predictions())
