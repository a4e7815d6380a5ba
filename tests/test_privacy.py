"""No name, id, date or address of a header leaves the cohort's folder of DICOM files: not into any file of any stage, not to the terminal, not to a page;
what may be left in a de-identified file; where paths may go; who may read what; text burnt into the pixels."""
import base64
import csv
import functools
import gzip
import io
import logging
import os
import re
import shutil
import sqlite3
import stat
import struct
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import polars as pl
import pytest
from PIL import Image, PngImagePlugin
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset

import dicom_files as df
import marked
from conftest import ROOT, mammo, small_project
from mammo_nb.cohort.facts import cohort_key, header_facts, read_facts, read_many
from mammo_nb.cohort.manifest import read_manifest, reject, scan
from mammo_nb.cohort.thumbs import Thumbnails, make_thumbnails
from mammo_nb.core.engine import write_parquet
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.display import PREPROCESSING_VERSION, render
from mammo_nb.dicom.phantom import make_cohort, phantom_image
from mammo_nb.labels.store import LabelStore

S = load_settings(ROOT/'settings.ini')
PERSON = 'QZXWHO'   # in names of folders, files and archive members
MAY_HOLD_PATHS = re.compile(r'marked/(manifest\.parquet|scan/|labels\.sqlite)')   # by contract: manifest, its memory, the column `filename` of the label store


def with_(settings, **sections): return settings.model_copy(update={k: getattr(settings, k).model_copy(update=v) for k, v in sections.items()})


# ---- a cohort in which every field bears a mark goes through every stage

def plant(folder, marks, patients=8, size=192):
    "The cohort: phantoms with filled headers, files that fail at every stage, archives, and folders called after a person"
    make_cohort(folder, patients=patients, image_size=size, seed=3, broken=.1, workers=1)
    n = 0
    for f in sorted(folder.rglob('*')):
        if not f.is_file() or f.read_bytes()[128:132] != b'DICM': continue
        try: marked.mark_file(f, marks, f.parent.name, nested=n % 8 == 0)
        except Exception: continue   # broken on purpose
        n += 1
    assert n > 3 * patients
    logging.disable(logging.CRITICAL)   # pydicom, while the bad files are made
    bad = marked.broken_files(marks)
    logging.disable(logging.NOTSET)
    for name, data in bad.items(): put(folder/'bad'/f'{PERSON}^JANE'/name, data)
    ok = marked.saved(marked.small(marks, 'zip member', '1.2.826.0.1.96.1'), marks, 'zip member')
    put(folder/'bad'/f'{PERSON}.zip', marked.archive(marks, {f'{PERSON}/one.dcm': ok, 'cut.dcm': ok[:3000]}))
    for k in range(3):
        bare = marked.small(marks, 'no study', f'1.2.826.0.1.95.{k}', StudyInstanceUID='')
        put(folder/'bare'/f'{PERSON}^ANNA 1937'/f'{PERSON}{k}.dcm', marked.saved(bare, marks, 'no study'))


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


TABLE = {r['tag'].strip('()').replace(',', '').lower(): r['basic'] for r in csv.DictReader(l for l in open(ROOT/'mammo_nb'/'edge'/'static'/'ps3_15_2026c.csv', encoding='utf-8') if l[0] != '#')}
SHIPPED, TABLES = ('marked/edge/deidentified', 'marked/edge/outbox/files'), 'marked/edge/quality'
MEASURED = '''KVP Exposure ExposureInmAs ExposureInuAs ExposureTime ExposureTimeInms BodyPartThickness CompressionForce OrganDose EntranceDoseInmGy EntranceDose ExposureIndex
    RelativeXRayExposure DeviationIndex'''.split()


def stays(where):
    "Whether the standard's table leaves a field alone, and the sequences that it lies in"
    *path, last = where.removeprefix('text in ').split('/')
    row = lambda k: TABLE.get(f'{keyword_dict[k]:08x}')
    if last not in keyword_dict or any(k not in keyword_dict for k in path[1:]) or dictionary_VR(last) == 'PN': return False
    return row(last) is None and all(row(k) is None or 'U*' in row(k) for k in path[1:])


class Ran:
    "A project in which everything was run on the marked cohort, and what was said on the way"
    def __init__(self, root, patients=4, size=128):
        self.marks, self.root, self.dicom, self.said = marked.Marks(), small_project(root/'study', workers=1, min_steps=2, epochs=1, arch='shufflenet_v2_x0_5'), root/'dicom', {}
        plant(self.dicom, self.marks, patients, size)
        self.search = marked.Search(self.marks)
        self.out = self.root/'outputs'

    def run(self, *args, fails=False, **env):
        done = mammo(*args, cwd=self.root, **env)
        self.said[' '.join(args)] = done.stdout + done.stderr
        assert bool(done.returncode) == fails, done.stdout[-1000:] + done.stderr[-2000:]

    def stages(self):
        c = '-p', 'cohort=marked'
        self.run('run', 'preprocess', *c, '-p', f'dicom_dir={self.dicom}', PYTHONWARNINGS='always')
        self.run('run', 'label', *c, '-p', 'rater=oracle', '-p', 'queue=all')
        self.run('run', 'train', *c)
        self.run('run', 'infer', *c)
        self.run('run', 'review', *c, '-p', 'rater=anna')
        for stage in ('edge', 'quality'): self.run('run', stage, *c, '-p', f'dicom_dir={self.dicom}', PYTHONWARNINGS='always')
        for wrong in (('run', 'train', *c, '-p', 'epochs=many'), ('run', 'label', *c, '-p', 'queue=nothing', '-p', 'rater=bob')): self.run(*wrong, fails=True)
        with LabelStore(self.out/'marked'/'labels.sqlite', load_settings(self.root)) as store: store.export_csv(self.out/'marked'/'labels.csv')
        return self

    def leaks(self):
        "Marks in what the stages wrote, de-identified files apart; the tables of stage 7 hold what it measures, exposure and dose"
        measured = marked.Search(self.marks, lambda where: where.split('/')[-1].removeprefix('text in ') in MEASURED)
        out = self.search.folder(self.out, skip=(*SHIPPED, TABLES)) + measured.folder(self.out/TABLES)
        self.search.files, self.search.bytes = self.search.files + measured.files, self.search.bytes + measured.bytes
        return out

    def results(self):
        "De-identified files; the outbox holds the same ones"
        made, sent = ([p for p in sorted((self.out/f).rglob('*')) if p.is_file()] for f in SHIPPED)
        assert {p.read_bytes() for p in sent} <= {p.read_bytes() for p in made} and not self.search.found(' '.join(p.name for p in (*made, *sent)).encode())
        return made

    def in_result(self, path):
        "Marks in a de-identified file beside those that may stay: `[(file, place, mark, field)]`, and how many stay. (Not dates: moved, one may be another field's; `test_deidentify` judges them.)"
        data, kept, out = path.read_bytes(), 0, []
        if df.DEFLATED.encode() in data[:400]: data += zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[144 + int.from_bytes(data[140:144], 'little'):])
        mark = re.compile(f'(?:{marked.WORD}|{re.escape(marked.ROOT)}|{marked.NUMBER})([0-9]{{5}})'.encode())
        def mask(m):
            nonlocal kept
            where = self.marks.where.get(int(m[1]), '')
            kept += (ok := stays(where))
            if not ok: out.append((path.name, '', m[0].decode(), where))
            return b'#' * len(m[0])
        data = mark.sub(mask, data)
        for n in self.doubles: data = data.replace(n, b'#' * 8)
        out += [(path.name, *f) for f in self.undated.inside(data)]
        return out, kept

    @functools.cached_property
    def undated(self): return marked.Search(self.marks, dates=False)

    @functools.cached_property
    def doubles(self):
        "Numbers that may stay, as they lie in a file"
        numbers = [int(f'{marked.NUMBER}{n:05d}') for n, where in self.marks.where.items() if stays(where) and dictionary_VR(where.split('/')[-1].removeprefix('text in ')) in ('FD', 'SV', 'UV')]
        return {struct.pack(f, n) for n in numbers for f in ('<d', '>d', '<q', '>q')}


@pytest.fixture(scope='module')
def ran(tmp_path_factory): return Ran(tmp_path_factory.mktemp('privacy')).stages()


def test_the_marked_cohort_is_read_and_fails_everywhere(ran):
    m = read_manifest(ran.out/'marked')
    assert (m['status'] == 'ok').sum() > 20 and m.filter(status='rejected')['reason'].n_unique() > 9 and m['status'].n_unique() == 3
    assert len(ran.marks.where) > 8000 and len(ran.marks.dates) > 100
    assert all(ran.search.inside(p.read_bytes()) for p in (ran.dicom/'bad'/f'{PERSON}^JANE').glob('*.dcm')), 'a file without a mark'
    done = {p.name.split('-')[1] for p in (ran.out/'marked'/'runs').iterdir()}
    assert done == {'preprocess', 'label', 'train', 'infer', 'review', 'edge', 'quality'} and list(ran.out.rglob('*.onnx')) and list(ran.out.rglob('studies.csv')) and list(ran.out.rglob('*.shard'))


def test_no_mark_in_any_file(ran):
    leaks = ran.leaks()
    assert ran.search.files > 50 and not leaks, leaks[:20]
    assert {'marked/edge/checks.parquet', 'marked/edge/outbox/outbox.sqlite', 'marked/edge/quality/outliers.parquet'} <= {p.relative_to(ran.out).as_posix() for p in ran.out.rglob('*')}


def test_de_identified_files_hold_only_what_the_table_keeps(ran):
    "Files that leave may say what the standard's table does not name; no other mark, in whatever guise"
    judged = [ran.in_result(p) for p in ran.results()]
    leaks = [f for found, _ in judged for f in found]
    assert len(judged) > 40 and sum(n for _, n in judged) > 1000 and not leaks, leaks[:20]
    assert {'edge', 'quality'} <= {p.name.split('-')[1] for p in (ran.out/'marked'/'runs').iterdir()}


def test_the_search_sees_what_a_de_identified_file_must_not_hold(ran):
    source = next(p for p in sorted(ran.dicom.rglob('*')) if p.is_file() and ran.search.inside(p.read_bytes()[:132] + b'x'))
    fields = {f for *_, f in ran.in_result(source)[0]}
    assert len(fields) > 200 and {'image/PatientID', 'image/InstitutionName', 'image/private/0009/LO', 'image/preamble'} <= fields, sorted(fields)[:20]


def test_no_mark_in_the_terminal(ran):
    for what, text in ran.said.items(): assert text and not ran.search.inside(text.encode()), (what, ran.search.inside(text.encode())[:5])


def test_paths_stay_where_the_contract_puts_them(ran):
    person = marked.Search(marked.Marks())
    person.guises, person.plain, person.numbers = {g: PERSON for g in marked._spellings(PERSON)}, re.compile(b'(?!)'), []
    held = {rel for rel, *_ in person.folder(ran.out)}
    assert 'marked/manifest.parquet' in held, 'the search must see them there'
    assert not [r for r in held if not MAY_HOLD_PATHS.match(r)], held
    for what, text in ran.said.items(): assert not person.found(text.encode()), what
    m = read_manifest(ran.out/'marked').filter(pl.col('path').str.contains('ANNA'))
    assert m['study_id'].str.contains(r'^folder-[0-9a-f]{16}$').all() and m['study_id'].n_unique() >= 1


def test_no_window_and_no_page_bears_a_mark(ran):
    pytest.importorskip('voila')
    code = 'from mammo_nb.core.run import main; main()'
    for what in ('label', 'review')[:1 + bool(os.environ.get('CI'))]:   # one after the other takes a while
        proc = subprocess.Popen([sys.executable, '-c', code, what, 'marked', '--rater', 'anna'], cwd=ran.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            line = ''
            while proc.poll() is None and 'http' not in line: line = proc.stdout.readline()
            page = urllib.request.urlopen(re.search(r'http\S+', line)[0], timeout=60).read()
            assert b'<title>' in page and not ran.search.inside(page) and not ran.search.inside(line.encode()) and PERSON.encode() not in page
        finally:
            proc.terminate()
            proc.wait(20)
            proc.stdout.close()


def test_who_may_read_it(ran):
    mode = lambda p: stat.S_IMODE(p.stat().st_mode)
    c = ran.out/'marked'
    assert mode(c/'key') == 0o600 and not mode(c) & 0o007, 'nobody outside the group looks into the cohort'


# ---- reading says nothing, whatever comes

def test_reading_and_rendering_print_warn_and_log_nothing(ran, capfd, recwarn, caplog):
    warnings.simplefilter('always')
    files = [p for p in sorted(ran.dicom.rglob('*')) if p.is_file()][::2]
    items = [(p.relative_to(ran.dicom).as_posix(), p.stat().st_size, p.stat().st_mtime_ns, getattr(p.stat(), 'st_ctime_ns', 0)) for p in files]
    from mammo_nb.cohort.facts import SEEN_AS
    facts, _ = read_many([i[:len(SEEN_AS)] for i in items], str(ran.dicom), bytes(32))
    why = []
    for p in files:
        try: render(p, 128)
        except MammoError as e: why.append(e.reason)
    out = ''.join(capfd.readouterr()) + caplog.text + ' '.join(str(w.message) for w in recwarn.list) + ' '.join(why) + ' '.join(str(v) for r in facts.drop('path').rows() for v in r)
    assert len(why) > 8 and 'Unknown encoding' not in out and not ran.search.inside(out.encode()), ran.search.inside(out.encode())[:5]


def test_a_library_that_quotes_a_header_is_not_quoted(tmp_path, monkeypatch):
    import mammo_nb.cohort.facts as F
    put(tmp_path/'a.dcm', df.make(df.tissue(32, 32), PatientName=marked.WORD))
    def quote(ds, *a): raise ValueError(f'cannot convert {ds.PatientName}')
    monkeypatch.setattr(F, 'header_facts', quote)
    st = (tmp_path/'a.dcm').stat()
    got, _ = read_many([('a.dcm', st.st_size, st.st_mtime_ns, st.st_ctime_ns)[:len(F.SEEN_AS)]], str(tmp_path), bytes(32))
    assert got['reason'][0] and marked.WORD not in str(got.rows())


@pytest.mark.parametrize('value', ['19370214', '14.02.1937', '2.11.1937', '1.2.37', '0049 351 1234567', '4711', 'DOE^JANE', '3.14159265', '1..2', '1.2.', '.1.2', 'QZX', '1.2.3\n4'])
def test_what_is_no_uid_is_not_kept_as_one(value, tmp_path):
    ds = Dataset()
    for k in ('SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            setattr(ds, k, value)
    facts = header_facts(ds, bytes(32))
    assert all(facts[k].startswith('invalid-') for k in ('sop_uid', 'study_uid', 'series_uid'))
    from mammo_nb.cohort.facts import Unusual, _uid_of
    with pytest.raises(Unusual): _uid_of(value.encode())


@pytest.mark.parametrize('value', ['1.2.840.113619.2.66.2158408118.16050010109105933.20000', '2.25.329800735698586629295641978511506172918', '1.2.3', '1.2', '1.3.6.1.4.1.9590.100.1.2.0123'])
def test_what_is_a_uid_stays(value):
    from mammo_nb.cohort.facts import _uid_of
    ds = Dataset()
    ds.StudyInstanceUID = value
    assert header_facts(ds, bytes(32))['study_uid'] == value == _uid_of(value.encode())


def test_the_demo_cohorts_known_key_is_not_used_for_patients(tmp_path):
    put(tmp_path/'demo'/'1.dcm', df.make(df.tissue(32, 32), PatientID='A', SOPInstanceUID='1.2.3'))
    put(tmp_path/'real'/'1.dcm', df.make(df.tissue(32, 32), PatientID='B', SOPInstanceUID='1.2.4'))
    scan(tmp_path/'demo', tmp_path/'out'/'demo_a', S, seed=S.study.seed)
    assert len(scan(tmp_path/'demo', tmp_path/'out'/'demo_a', S)) == 1, 'the same files again are all right'
    with pytest.raises(MammoError, match='made-up patients.*another cohort'): scan(tmp_path/'real', tmp_path/'out'/'demo_a', S)
    assert len(scan(tmp_path/'real', tmp_path/'out'/'leeds', S)) == 1


# ---- the search finds what is there

def png(text):
    f, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text('Comment', text, zip=True)
    Image.new('L', (9, 9)).save(f, 'png', pnginfo=info)
    return f.getvalue()


def zipped(name, data):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(name, data)
    return f.getvalue()


W = f'a word {marked.WORD}00001 and more '.encode() * 3
HIDDEN = dict(raw=W, lower=W.lower(), utf16=W.decode().encode('utf-16-le'), utf16be=W.decode().encode('utf-16-be'), utf32=W.decode().encode('utf-32-le'), hex=W.hex().encode(),
    **{f'base64_{k}': base64.b64encode(b'x' * k + W) for k in range(3)}, urlsafe=base64.urlsafe_b64encode(b'\xff' * 2 + W), percent=''.join(f'%{b:02X}' for b in W).encode(),
    json=''.join(f'\\u{b:04x}' for b in W).encode(), html=''.join(f'&#{b};' for b in W).encode(), zlib=zlib.compress(W), gzip=gzip.compress(W), zstd=imagecodecs.zstd_encode(W),
    lz4=imagecodecs.lz4f_encode(W), zip=zipped('a', W), zipname=zipped(f'{marked.WORD}00001', b''), nested=zipped('b', base64.b64encode(zlib.compress(W))), png=png(W.decode()),
    shifted=b'abc' + gzip.compress(W) + b'def', notebook=f'{{"image/png": "{base64.b64encode(png(W.decode())).decode()}"}}'.encode(), uid=f'"{marked.ROOT}00001"'.encode(),
    reversed=W[::-1], birth_date=b'born 1937-02-14.', number=f'[{marked.NUMBER}00001]'.encode(), double=b'\0' * 3 + np.float64(f'{marked.NUMBER}00001').tobytes())


@pytest.fixture(scope='module')
def search():
    marks = marked.Marks()
    marks.word('PatientName')
    return marked.Search(marks)


@pytest.mark.parametrize('how', HIDDEN)
def test_the_search_sees_what_is_hidden(search, how):
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    assert search.inside(noise + HIDDEN[how] + noise) if how not in ('zip', 'zipname', 'nested') else search.inside(HIDDEN[how]), how


def test_the_search_sees_into_our_own_files(search, tmp_path):
    word, thumbs = f'{marked.WORD}00001', Thumbnails(tmp_path/'thumbnails')
    write_parquet(pl.DataFrame(dict(x=['a'] * 5000 + [word])), tmp_path/'a.parquet')
    write_parquet(pl.DataFrame(dict(x=[1])), tmp_path/'b.parquet', note=word)
    db = sqlite3.connect(tmp_path/'c.sqlite')
    db.execute('PRAGMA secure_delete = OFF')
    db.execute('CREATE TABLE t (x)')
    db.executemany('INSERT INTO t VALUES (?)', [(word,), ('b',)])
    db.commit()
    db.execute("DELETE FROM t WHERE x <> 'b'")   # a free page still holds it
    db.commit()
    db.close()
    thumbs.put('0' * 16, np.frombuffer((word * 100).encode().ljust(4096), np.uint8).reshape(64, 64))
    np.savez_compressed(tmp_path/'d.npz', x=np.array([word]))
    (tmp_path/f'{word}.txt').write_text('')
    found = {rel.split('/')[0] for rel, *_ in search.folder(tmp_path)}
    assert found == {'a.parquet', 'b.parquet', 'c.sqlite', 'thumbnails', 'd.npz', f'{word}.txt'}
    assert 'PatientName' in {f for *_, f in search.folder(tmp_path)}


def test_the_search_does_not_cry_wolf(search):
    rng = np.random.default_rng(1)
    assert not search.inside(rng.integers(0, 256, 4_000_000, np.uint8).tobytes()) and not search.inside(' '.join(map(repr, rng.random(100_000).tolist())).encode())
