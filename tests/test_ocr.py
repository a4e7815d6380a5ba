"The reader: text anywhere, crossed by lines and turned; no lead letters, vessels or plates; offline, silent, and not needed."
import subprocess
import sys

import cv2
import numpy as np
import pytest

import dicom_files as df
from conftest import ROOT
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom import ocr
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.dicom.text import find_text
from mammo_nb.edge.deidentify import Deidentifier
from mammo_nb.edge.verify import legible, verify_file
from mammo_nb.dicom.read import open_source
from test_text import burn, ink, lookalikes, markers

pytest.importorskip('rapidocr')
LINES = 'JANKOWSKI CLOTHILDE', 'PAT84766435  19.06.1947'


def texts(img): return [r for r in ocr.text_in(img) if r.kind == 'text']


def written(img, at=(60, 60), turn=0, grey=235, px=20):
    "The picture with two lines, and where their ink is"
    rows = [ink(t, 'DejaVuSans.ttf', px) for t in LINES]
    wide = max(r.shape[1] for r in rows)
    m = np.rot90(np.vstack([np.pad(r, ((0, 8), (0, wide - r.shape[1]))) for r in rows]), turn) > 100
    out, where = img.copy(), np.zeros(img.shape, bool)
    where[at[0]:at[0] + m.shape[0], at[1]:at[1] + m.shape[1]] = m
    out[where] = grey
    return out, where


def covered(rows, where, grow=4):
    mask = np.zeros(where.shape, bool)
    for r in rows: mask[max(0, r.y - grow):r.y + r.h + grow, max(0, r.x - grow):r.x + r.w + grow] = True
    return (mask & where).sum() / where.sum(), (mask & ~cv2.dilate(where.astype(np.uint8), np.ones((41, 41))).astype(bool)).sum()


@pytest.mark.parametrize('turn', [0, 1, 2, 3])
@pytest.mark.parametrize('dark', [False, True])
def test_text_in_the_middle_is_read_upright_and_turned(turn, dark):
    img, where = written(np.full((640, 640), 30, np.uint8), (180, 180), turn)
    if dark: img = 255 - img
    share, beyond = covered(texts(img), where)
    assert share > .99 and not beyond


def test_text_that_a_line_crosses_is_read_and_the_line_stays():
    img = cv2.GaussianBlur(np.random.default_rng(0).integers(20, 60, (500, 600), np.uint8), (0, 0), 4)
    img, where = written(img)
    img[70:72] = 180
    share, beyond = covered(texts(img), where)
    assert share > .99 and not beyond


def test_lead_letters_are_markers():
    seen = [ocr.text_in(m) for m in list(markers())[::5]]
    assert not any(r.kind == 'text' for rows in seen for r in rows) and sum(map(bool, seen)) > .8 * len(seen)


def test_what_only_looks_like_text_is_none():
    vessel, x = np.full((500, 500), 40, np.uint8), np.arange(60, 300)
    for k in range(0, 240, 10): cv2.line(vessel, (60 + k, 80 + k % 7), (66 + k, 81 + k % 7), 190, 2)
    assert not any(map(texts, (vessel, *lookalikes((640, 500)))))


@pytest.mark.parametrize('words, sure, kind', [('DOE^JANE', .9, 'text'), ('ANNA', .9, 'text'), ('LILLI', .8, 'text'), ('11.11.1911', .9, 'text'), ('DOE^JANE', .4, 'unsure'), ('R MLO', .9, 'lead'), ('LMLQ', .9, 'lead'), ('LCcc', .7, 'lead'), ('rcc', .9, 'lead'),
                                               ('XCCL', .9, 'lead'), ('63Y', .9, 'short'), ('二二二二', .9, 'strokes'), ('1l1I1', .9, 'strokes'), ('IIIIII', .4, ''), ('--', 1., ''), ('', 0., '')])
def test_what_counts_as_text(words, sure, kind): assert ocr._kind(words, sure) == kind


def test_small_rows_are_read_in_the_full_picture():
    rng, full = np.random.default_rng(2), np.full((3328, 2560), 8, np.uint8)
    img, (x0, y0, x1, y1) = burn(full, rng, 14, 1, corner='tl', n=24, face='DejaVuSans.ttf')
    small, asked = cv2.resize(img, (788, 1024), interpolation=cv2.INTER_AREA), []
    rows = [r for r in ocr.text_in(small, lambda: asked.append(1) or img) if r.kind == 'text']
    assert asked == [1] and rows and all(x0 / 3.25 - 8 <= r.x and r.x + r.w <= x1 / 3.25 + 8 and abs(r.y + r.h / 2 - (y0 + y1) / 6.5) < 5 for r in rows)
    assert not texts(cv2.resize(cv2.GaussianBlur(np.where(rng.random(full.shape) < .001, 255, full).astype(np.uint8), (0, 0), 2), (788, 1024)))


def test_letters_of_other_alphabets():
    for words in ('ПЕТРОВА АННА', 'ΠΑΠΑΔΟΠΟΥΛΟΥ', 'Жданова Щукина'):
        img, m = np.full((400, 480), 6, np.uint8), ink(words, 'DejaVuSans.ttf', 20)
        img[40:40 + m.shape[0], 30:30 + m.shape[1]] = np.maximum(m, 6)
        assert texts(img), words


def test_no_reader_no_difference(monkeypatch):
    monkeypatch.setattr(ocr, '_reader', lambda: None)
    img, _ = written(np.full((640, 640), 30, np.uint8))
    assert ocr.text_in(img) == find_text(img) != [] and ocr.text_in(img, read=False) == find_text(img)


def test_it_asks_no_network_and_says_nothing():
    code = '''import socket, sys
def no(*a, **k): raise OSError('a network was asked for')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no
import numpy as np, cv2
from mammo_nb.dicom.ocr import text_in
img = cv2.putText(np.zeros((500, 500), np.uint8), 'DOE^JANE 14.02.1955', (60, 250), cv2.FONT_HERSHEY_SIMPLEX, .8, 255, 2)
assert any(r.kind == 'text' for r in text_in(img))
assert not [m for m in ('torch', 'paddle', 'openvino') if m in sys.modules]'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


# ---- in the engine and the verifier

@pytest.fixture(scope='module')
def middle(tmp_path_factory):
    "A mammogram with a name in its middle, where `find_text` does not look"
    d = tmp_path_factory.mktemp('middle')
    img, where = written((phantom_image('CC', 'R', (640, 500), seed=70)[0] >> 4).astype(np.uint8), (300, 150), px=18)
    (d/'in.dcm').write_bytes(df.make(img.astype(np.uint16) * 16, WindowCenter=2048, WindowWidth=4096, PatientID='4711', SOPInstanceUID='1.2.9.1', StudyDate='20240101'))
    return d, where


def through(d, reader):
    s = load_settings(ROOT/'settings.ini')
    s = s.model_copy(update=dict(edge=s.edge.model_copy(update=dict(reader=reader))))
    m = Deidentifier(s, b'k' * 32)
    r = m.file(d/'in.dcm', d/f'out{reader}')
    assert r.status == 'ok', r.reason
    return m, r, lambda reader: verify_file(d/'in.dcm', r.path, r.masked, s.edge.options, reader=reader)


def test_a_text_that_only_the_reader_sees_is_painted_over(middle):
    d, where = middle
    m, r, said = through(d, True)
    mask = np.zeros(where.shape, bool)
    for _, top, left, bottom, right in r.masked: mask[top:bottom, left:right] = True
    assert (mask & where).sum() > .99 * where.sum() and mask.mean() < .1 and said(True) == said(False) == []
    assert through(d, False)[0].method != m.method, 'done again when the reader comes or goes'


def test_the_verifier_catches_a_mask_that_misses_such_a_text(middle):
    _, r, said = through(middle[0], False)
    assert not r.masked and said(False) == [] and said(True) == ['Text can still be seen in frame 1.']
    with open_source(r.path) as s: assert legible(s, 0) and not legible(s, 0, reader=False)
