"A real JupyterLab and a real Chromium for the labeler's tests and its benchmark. Every picture carries its number in its pixels."
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import load_settings
from mammo_nb.labels.store import LabelStore

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((p for p in (shutil.which(n) for n in ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
ARGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync '
        '--disable-dev-shm-usage').split()
TOKEN = 'labeler-test'


def missing():
    "Why browser tests can't run here, '' if they can"
    try: import playwright.sync_api  # noqa: F401
    except ImportError: return "playwright is not installed (pip install -e '.[dev]')"
    try: import jupyterlab  # noqa: F401
    except ImportError: return 'jupyterlab is not installed'
    return '' if CHROMIUM else "no Chromium on this machine (Debian: apt install chromium)"


# ---- pictures that say which they are

GRID = 4  # 16 squares: 12 bits of number, 4 of checksum


def bits(n): return [(n >> k) & 1 for k in range(12)] + [((n ^ (n >> 4) ^ (n >> 8) ^ 5) >> k) & 1 for k in range(4)]


def marked_image(n, rows=320, cols=256, texture=None):
    "uint8 picture number `n`: grey, with a field of black and white squares in the middle half of the width"
    img = np.full((rows, cols), 90, np.uint8) if texture is None else texture.copy()
    side = cols // 2 // GRID
    y0, x0 = (rows - side*GRID) // 2, (cols - side*GRID) // 2
    for k, b in enumerate(bits(n)):
        y, x = y0 + k // GRID*side, x0 + k % GRID*side
        img[y:y+side, x:x+side] = 255 if b else 0
    return img


READ_MARK = '''(root) => {
  const c = root.querySelector("canvas"), g = c.getContext("2d"), rows = window.mmRows || 320, cols = window.mmCols || 256;
  const fit = Math.min(c.width / cols, c.height / rows), x0 = (c.width - cols*fit)/2, y0 = (c.height - rows*fit)/2, side = Math.floor(cols/2/4);
  const by = Math.floor((rows - side*4)/2), bx = Math.floor((cols - side*4)/2), bit = [];
  for (let k = 0; k < 16; k++) {
    const y = by + (Math.floor(k/4) + .5)*side, x = bx + (k%4 + .5)*side, v = g.getImageData(Math.round(x0 + x*fit), Math.round(y0 + y*fit), 1, 1).data[0];
    if (v > 60 && v < 200) return null;
    bit.push(v > 128 ? 1 : 0);
  }
  let n = 0, s = 0;
  for (let k = 0; k < 12; k++) n |= bit[k] << k;
  for (let k = 0; k < 4; k++) s |= bit[12+k] << k;
  return s === ((n ^ (n >> 4) ^ (n >> 8) ^ 5) & 15) ? n : null;
}'''

# notes, before the widget sees the key, which picture is on the screen, and after it whether the key was taken
RECORD = '''() => {
  window.mmLog ??= [];
  const read = ''' + READ_MARK + ''', root = [...document.querySelectorAll(".mm-root")].at(-1), seq = () => +(root.dataset.seq || 0);
  if (root.recorded) return;
  root.recorded = true;
  let note = null;
  root.parentElement.addEventListener("keydown", (e) => { note = { key: e.key, mark: read(root), before: seq() }; }, true);
  root.addEventListener("keydown", (e) => { if (seq() > note.before) window.mmLog.push([note.key, note.mark]); });  // after the widget's own
}'''


def image_id(n): return f'{n:016x}'


def make_cohort(folder, n=40, hold_out=8, rows=320, cols=256, dicom=False, predictions=True, image=marked_image, pictures=None):
    "`outputs/<cohort>` with `n` marked pictures of 4-view studies; the last `hold_out` are hold-out. `dicom`: files behind them as well; `pictures`: only so many of them"
    folder = Path(folder)
    folder.mkdir(parents=True)
    s = load_settings(ROOT/'settings.ini')
    m = pl.DataFrame([dict(image_id=image_id(i), path=f'{i}.dcm', study_id=f'1.2.840.{i//4}', patient_id=f'patient-{i//4}', frame=0, status='ok', rows=rows*(4 if dicom else 1),
                           columns=cols*(4 if dicom else 1), view=['L-CC', 'R-CC', 'L-MLO', 'R-MLO'][i % 4], split='hold_out' if i >= n - hold_out else 'train')
                      for i in range(n)])
    if dicom:
        (folder.parent/'dicom').mkdir()
        for i in range(n): write_dicom(folder.parent/'dicom'/f'{i}.dcm', i, rows*4, cols*4)
        write_parquet(m, folder/'manifest.parquet', s, dicom_dir=str(folder.parent/'dicom'))
    thumbs = Thumbnails(folder/'thumbnails')
    for i in range(n if pictures is None else pictures): thumbs.put(image_id(i), image(i, rows, cols))
    with LabelStore(folder/'labels.sqlite', s) as store:
        store.sync_images(m)
        store.set_queue('round-001', [image_id(i) for i in range(n - hold_out)])
        if predictions: store.set_predictions(pl.DataFrame(dict(image_id=m['image_id'], prob_biopsy=[.91]*n, prob_mag=[.07]*n)), 'toy')
    return folder


def write_dicom(path, n, rows, cols):
    "12 bits; the left half of the file is a fine checkerboard that no thumbnail can show, and values above the window exist"
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.1.2', f'1.2.826.0.1.{n}'
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    px = marked_image(n, rows, cols).astype(np.uint16)*4  # 0, 360, 1020
    px[::2, :cols//8] = 1000
    px[1::2, :cols//8] = 0
    px[:, -cols//16:] = 4000  # beyond the window
    for k, v in dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, Modality='MG', PatientName='Doe^Jane', PatientID='4711',
                     Rows=rows, Columns=cols, BitsAllocated=16, BitsStored=12, HighBit=11, PixelRepresentation=0, SamplesPerPixel=1,
                     PhotometricInterpretation='MONOCHROME2', WindowCenter=512, WindowWidth=1024, PixelData=px.tobytes()).items(): setattr(ds, k, v)
    ds['PixelData'].VR = 'OW'
    ds.save_as(path, enforce_file_format=True)


# ---- servers and pages

def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(check, seconds=30, what='', every=.05):
    "The first true value of `check()`"
    end = time.monotonic() + seconds
    while True:
        got = check()
        if got: return got
        if time.monotonic() > end: raise AssertionError(f'waited {seconds} s in vain: {what or check}')
        time.sleep(every)


class Server:
    "A JupyterLab of its own in `folder`, ended by its own pid"
    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()
        (self.folder/'notebooks').mkdir(parents=True)
        d = self.folder/'jupyter'
        quiet = d/'lab'/'@jupyterlab'/'apputils-extension'
        quiet.mkdir(parents=True)
        (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
        keep = d/'lab'/'@jupyter-widgets'/'jupyterlab-manager'
        keep.mkdir(parents=True)
        (keep/'plugin.jupyterlab-settings').write_text('{"saveState": true}')
        env = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'JPY_', 'MAMMO'))}
        env |= dict(JUPYTER_CONFIG_DIR=str(d/'config'), JUPYTER_DATA_DIR=str(d/'data'), JUPYTER_RUNTIME_DIR=str(d/'runtime'), IPYTHONDIR=str(d/'ipython'),
                    JUPYTERLAB_SETTINGS_DIR=str(d/'lab'), JUPYTERLAB_WORKSPACES_DIR=str(d/'workspaces'), JUPYTER_PREFER_ENV_PATH='1',
                    PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))), OPENBLAS_NUM_THREADS='1')
        cmd = [sys.executable, '-m', 'jupyterlab', f'--ServerApp.root_dir={self.folder/"notebooks"}', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={self.port}',
               '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', '--no-browser', '--allow-root', '--expose-app-in-browser',
               '--LabApp.extension_manager=readonly', '--LabApp.news_url=None', '--KernelRestarter.time_to_dead=0.5',
               '--KernelRestarter.restart_limit=1000']
        self.log = open(self.folder/'server.log', 'w')
        self.proc = subprocess.Popen(cmd, env=env, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder)
        try: wait_for(self._up, 60, 'JupyterLab to start', .2)
        except AssertionError: raise AssertionError((self.folder/'server.log').read_text()[-2000:]) from None

    def _up(self):
        assert self.proc.poll() is None, (self.folder/'server.log').read_text()[-2000:]
        try: return urllib.request.urlopen(f'http://127.0.0.1:{self.port}/api/status?token={TOKEN}', timeout=2).status == 200
        except OSError: return False

    def notebook(self, name, *cells):
        "Writes a notebook of code cells"
        nb = dict(cells=[dict(cell_type='code', id=f'c{k}', metadata={}, source=c, outputs=[], execution_count=None) for k, c in enumerate(cells)],
                  metadata=dict(kernelspec=dict(name='python3', display_name='Python 3 (ipykernel)', language='python')), nbformat=4, nbformat_minor=5)
        (self.folder/'notebooks'/f'{name}.ipynb').write_text(json.dumps(nb))

    def url(self, name): return f'http://127.0.0.1:{self.port}/lab/workspaces/{name}-{time.monotonic_ns()}/tree/{name}.ipynb?token={TOKEN}'
    def path(self, name): return self.folder/'notebooks'/f'{name}.ipynb'

    def stop(self):
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGCONT)
            self.proc.terminate()
            try: self.proc.wait(15)
            except subprocess.TimeoutExpired: self.proc.kill(), self.proc.wait()
        self.log.close()


def labeler_cell(folder, rater='anna', queue='round-001', **more):
    args = ''.join(f', {k}={v!r}' for k, v in more.items())
    return (f"import os\nfrom pathlib import Path\nfrom mammo_nb.core.settings import load_settings\nfrom mammo_nb.labels.widget import Labeler\n"
            f"Path({str(folder)!r}, 'pid').write_text(str(os.getpid()))\n"
            f"label = Labeler({str(folder)!r}, load_settings({str(ROOT/'settings.ini')!r}), {rater!r}, queue={queue!r}{args})\nlabel")


KERNEL_IDLE = '''() => { const w = window.jupyterapp?.shell?.currentWidget; return !!(w?.content?.widgets?.length &&
            w.sessionContext?.isReady && w.sessionContext?.session?.kernel?.status === "idle"); }'''


class Page:
    "One browser page with a notebook open in JupyterLab"
    def __init__(self, page): self.page = page

    def open(self, url, ready=True):
        self.page.goto(url)
        if ready: self.wait_kernel()
        return self

    def wait_kernel(self):
        self.page.wait_for_function(KERNEL_IDLE, timeout=60000)

    def run(self, k=0, wait=True):
        "Runs cell number `k`"
        self.page.evaluate('''async ([k, wait]) => { const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = k; nb.mode = "command";
            const p = window.jupyterapp.commands.execute("notebook:run-cell"); if (wait) await p; }''', [k, wait])
        return self

    def source(self): return self.page.evaluate('() => window.jupyterapp.shell.currentWidget.content.widgets.map((c) => [c.model.type, c.model.sharedModel.getSource()])')

    def save(self):
        self.page.evaluate('() => window.jupyterapp.commands.execute("docmanager:save")')
        return self

    @property
    def root(self): return self.page.locator('.mm-root').last

    def data(self, name): return self.root.get_attribute(f'data-{name}', timeout=30000)

    def state(self, *states, seconds=30):
        "Waits until the labeler is in one of the states"
        self.page.wait_for_function('''(s) => { const r = [...document.querySelectorAll(".mm-root")].at(-1); return r && s.includes(r.dataset.state); }''', arg=list(states),
                                    timeout=seconds*1000)
        return self

    def focus(self):
        self.root.scroll_into_view_if_needed()
        box = self.root.locator('.mm-stage').bounding_box()
        self.page.mouse.click(box['x'] + box['width']/2, box['y'] + 12)
        assert self.data('focus') == 'yes'
        self.page.evaluate(RECORD)
        return self

    def shown(self):
        "The number of the picture on the screen"
        return self.root.evaluate(READ_MARK)

    def press(self, keys, ready=True):
        "Presses keys one by one, each when the picture is there"
        for k in keys:
            if ready: self.state('ready', 'done')
            self.page.keyboard.press(k)
        return self

    def saved(self, seconds=30):
        self.page.wait_for_function('() => { const r = [...document.querySelectorAll(".mm-root")].at(-1); return r && r.dataset.unsaved === "0"; }', timeout=seconds*1000)
        return self

    def taken(self):
        "(key, number of the picture) of every key the labeler took"
        return [tuple(x) for x in self.page.evaluate('() => window.mmLog || []')]


class Bare:
    "Chromium without Playwright, whose network log grows in the page's process: for measuring memory"
    def __init__(self, folder, url):
        import websocket
        port = free_port()
        self.proc = subprocess.Popen([CHROMIUM, *ARGS, '--headless', f'--remote-debugging-port={port}', '--remote-allow-origins=*', f'--user-data-dir={folder}',
                                      '--window-size=1280,860', url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        def target():
            try: return [t for t in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page' and '/lab' in t['url']]
            except OSError: return None
        self.socket, self.n = websocket.create_connection(wait_for(target, 30)[0]['webSocketDebuggerUrl'], timeout=300), 0

    def call(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get('id') == self.n: return answer.get('result', {})

    def evaluate(self, js): return self.call('Runtime.evaluate', expression=js, awaitPromise=True, returnByValue=True)['result'].get('value')

    def megabytes(self):
        "Private memory of the browser's largest page process, garbage collected"
        self.call('HeapProfiler.collectGarbage')
        parents, mine = {}, {self.proc.pid}
        for p in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError): parents[int(p.name)] = int((p/'stat').read_text().rsplit(')', 1)[1].split()[1])
        for _ in range(4): mine |= {p for p, up in parents.items() if up in mine}
        sizes = [0]
        for p in mine:
            with contextlib.suppress(OSError):
                if '--type=renderer' in Path(f'/proc/{p}/cmdline').read_text():
                    sizes += [int(line.split()[1]) / 1024 for line in Path(f'/proc/{p}/status').read_text().splitlines() if line.startswith('RssAnon')]
        return max(sizes)

    def stop(self):
        self.socket.close()
        self.proc.terminate()
        self.proc.wait(15)


KEYS = {'1': ('biopsy',), '2': ('mag',), '3': (), '4': ('biopsy', 'mag'), 's': 'skip', 'u': 'undo'}


def events(folder, rater='anna'):
    "(label, number of the picture) of all events of a rater in the order in which they were pressed"
    with LabelStore(Path(folder)/'labels.sqlite', load_settings(ROOT/'settings.ini')) as s:
        rows = s._all('SELECT label, image_id FROM events WHERE rater = ? ORDER BY time, client, seq', rater)
    read = lambda l: l if l in ('skip', 'undo') else tuple(n for n, v in json.loads(l).items() if v)
    return [(read(l), int(i, 16)) for l, i in rows]


def kernel_pid(folder): return int((Path(folder)/'pid').read_text())


# ---- fixtures, for the tests that import them

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    s = Server(tmp_path_factory.mktemp('lab'))
    yield s
    s.stop()


VIEW = dict(viewport=dict(width=1280, height=860))


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.fixture(scope='module')
def common(browser): return browser.new_context(**VIEW)   # JupyterLab's scripts are fetched once


class Lab:
    "Notebooks in pages, closed with their kernels when the test is over"
    def __init__(self, server, common, folder): self.server, self.common, self.folder, self.own = server, common, folder, []

    def context(self, **kw):
        "A browser of its own"
        self.own.append(self.common.browser.new_context(**VIEW | kw))
        return self.own[-1]

    def cohort(self, name='demo_a', **kw): return make_cohort(self.folder/name, **kw)

    def open(self, name, *cells, context=None):
        "A new notebook, its first cell run, the labeler ready and focused"
        self.server.notebook(name, *cells)
        p = Page((context or self.common).new_page()).open(self.server.url(name)).run(0)
        return p.state('ready', 'readonly', 'done').focus()

    def close(self):
        for p in [p for c in (self.common, *self.own) for p in c.pages]:
            try: p.evaluate('() => window.jupyterapp?.serviceManager.sessions.shutdownAll()')
            except Exception: pass   # a page that was left half-way
            p.close()
        for c in self.own: c.close()


@pytest.fixture
def lab(server, common, tmp_path):
    l = Lab(server, common, tmp_path)
    yield l
    l.close()
