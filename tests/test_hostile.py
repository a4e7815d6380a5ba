"Whatever lies in a cohort's folder: every file ends as ok, rejected with a reason in plain words, or duplicate, and costs nobody else anything."
import ctypes
import functools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import zipfile
from multiprocessing import forkserver
from pathlib import Path

import cloudpickle
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st

import dicom_files as df
import hostile_files as H
from conftest import mammo, small_project
from mammo_nb.cohort import manifest as M
from mammo_nb.cohort.facts import SEEN_AS, read_many
from mammo_nb.cohort.files import content_hash, list_files, shown_name, source_path
from mammo_nb.cohort.manifest import funnel, read_manifest, scan
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.engine import engine, map_files
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.display import render
from mammo_nb.dicom.read import ReadError, Source, open_source, read_frame, read_header
from mammo_nb.learn.answers import group_inputs

S = load_settings()
KEY = b'k' * 32
APART = multiprocessing.get_context('forkserver')  # imports this file once; each process starts from there
QUICK = [n for n in H.CASES if not re.search(H.SLOW, n)]
TREES = ['archives', 'links', 'pipes', 'names', 'deep', 'sizes']


def _knock():
    "From here on closed doors are closed to root too (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are given up); capabilities(7)"
    if os.geteuid(): return
    libc, who, sets = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert not libc.capget(who, sets)
    for k in range(3): sets[k] &= ~0b110
    assert not libc.capset(who, sets)


def _child(fn, pipe, seconds, memory, knock):
    signal.alarm(seconds)
    if memory: resource.setrlimit(resource.RLIMIT_DATA, (int(re.search(r'VmData:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024 + memory,) * 2)
    if knock: _knock()
    try: out = cloudpickle.loads(fn)()
    except BaseException as e: out = f'{type(e).__name__}: {e}'
    pipe.send(out)


@functools.cache
def _ready():
    "Starts the process that the others are copied from (before Python 3.12 it finds what to import by PYTHONPATH only)"
    old = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [old])])
    APART.set_forkserver_preload(['test_hostile'])
    forkserver.ensure_running()
    os.environ.pop('PYTHONPATH') if old is None else os.environ.update(PYTHONPATH=old)


def apart(fn, seconds=60, memory=None, knock=False):
    "What `fn` gives, from a process of its own that may not crash, hang, or take more than its memory (bytes on top of what it begins with)"
    _ready()
    here, there = APART.Pipe(False)
    p = APART.Process(target=_child, args=(cloudpickle.dumps(fn), there, seconds, memory, knock))
    p.start()
    there.close()
    try: return here.recv()
    except EOFError: p.join(); pytest.fail(f'the process died of signal {-p.exitcode}' + (' (too slow)' if p.exitcode == -signal.SIGALRM else ''))
    finally: p.join()


def through(folder, path, frames=3):
    "A file through the front doors: (status, reason) by scan and pixels, and by inference"
    found = next(f for f in list_files(folder) if f.path == path)
    row = read_many([tuple(getattr(found, k) for k in SEEN_AS)], root=str(folder), key=KEY)[0].row(0, named=True)
    if row['kind'] != 'image': return ['rejected', row['reason']]
    said = []
    for k in range(min(frames, row['frames'])):
        try: render(Path(source_path(folder, path)), 512, k)
        except ReadError as e: said.append(e.reason.rstrip('.'))
        else: said.append(None)
    assert group_inputs([(f'{k:016x}', path, k) for k in range(len(said))], folder, 64, 512, S)[1] == said, 'inference sees it otherwise'
    return ['ok', None] if None in said else ['rejected', said[0]]


def alone(tmp_path, data, **kw):
    (tmp_path/'x.dcm').write_bytes(data)
    return apart(lambda: through(tmp_path, 'x.dcm'), **kw)


# ---- everything at once, by the command that a user types ----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "All quick cases and trees in one folder, preprocessed by the command line; (manifest, expected, folder, what the terminal showed, project)"
    top = tmp_path_factory.mktemp('hostile')
    try: yield _run(top)
    finally: H.remove(top)


def _run(top):
    dicom = top/'dicom'
    want = {f'cases/{p}': (c.status, c.words) for p, c in H.write_cases(dicom/'cases', QUICK).items()} | H.write_trees(dicom, TREES)
    before = listing(dicom)
    project = small_project(top/'study', file_timeout=30)
    done = mammo('run', 'preprocess', '-p', 'cohort=h', '-p', f'dicom_dir={dicom}', cwd=project)
    return dict(df=read_manifest(project/'outputs'/'h') if done.returncode == 0 else None, want=want, dicom=dicom, done=done, project=project, before=before, top=top)


def listing(folder):
    "Names, kinds, sizes and times of everything below a folder, however deep"
    return sorted(subprocess.run(['find', folder, '-printf', r'%p %y %m %s %T@\0'], capture_output=True, check=True).stdout.split(b'\0'))


def test_the_run_ends_well_and_the_terminal_shows_no_traceback(run):
    shown = run['done'].stdout + run['done'].stderr
    assert run['done'].returncode == 0, shown[-2000:]
    assert not re.search(r'Traceback|Error\b|Exception|Warning|Segmentation|\.py', shown), shown[-2000:]


def test_neither_notebook_nor_report_shows_one(run):
    folder = next((run['project']/'outputs'/'h'/'runs').iterdir())
    for f in ('1_preprocess.ipynb', 'report.html'): assert not re.search(r'Traceback|Error:|"output_type": "error"|RuntimeWarning', (folder/f).read_text()), f


def test_every_file_is_answered_for(run):
    rows = set(run['df']['path'])
    for f in list_files(run['dicom']): assert f.path in rows or any(p.startswith(f'{f.path}!/') for p in rows), f.path
    for z in (run['dicom']/'archives').glob('*.zip'):
        try: names = {i.filename for i in zipfile.ZipFile(z).infolist() if not i.is_dir()}
        except Exception: names = {''}
        missing = {n for n in names if not any(p.startswith(f'archives/{z.name}!/{n}') for p in rows)} if f'archives/{z.name}' not in rows else ()
        assert not missing or not names, (z.name, list(missing)[:3])
    f = funnel(run['df'])
    assert f['found'] == f['ok'] + f['rejected'] + f['duplicate']


def test_each_ends_as_it_should(run):
    got, wrong = {}, []
    for p, s, r in run['df'].sort('frame').select('path', 'status', 'reason').iter_rows():
        if got.get(p, ('', ''))[0] != 'ok': got[p] = s, r or ''
    for path, (status, words) in run['want'].items():
        s, r = got.get(path, ('missing', ''))
        if s not in ('ok', 'rejected', 'duplicate') or status != 'any' and s != status or s == 'rejected' and status == 'rejected' and not re.search(words, r): wrong.append((path[:80], status, words, s, r))
    assert not wrong, wrong[:10]


def test_reasons_are_words_for_people(run):
    vague = r'could not be processed|Error|Exception|brought the|took longer|None|nan|\b0x|[<>{}\[\]]|/dev/|\.py'
    for r in run['df'].filter(status='rejected')['reason'].unique():
        assert 8 <= len(r) < 190 and not re.search(vague, r), r
        assert not re.search('passwd|DROP TABLE|DOE|rubbish|H-1', r), r


def test_nothing_is_written_elsewhere(run):
    assert listing(run['dicom']) == run['before'], 'the cohort is only read'
    assert {p.name for p in run['top'].iterdir()} == {'dicom', 'study'} and not any(Path('/').glob('owned*')) and not any(Path(tempfile.gettempdir()).glob('owned*'))
    assert {p.name for p in run['project'].iterdir()} == {'nbs', 'outputs', 'settings.ini', 'pyproject.toml'}


def test_thumbnails_of_good_neighbours_are_there(run):
    ok, store = run['df'].filter(status='ok'), Thumbnails(run['project']/'outputs'/'h'/'thumbnails')
    assert not store.missing(ok['image_id'])
    for p in ('pipes/1.dcm', 'archives/bomb.zip!/good.dcm', 'names/line\nbreak.dcm'):
        i = ok.filter(path=p)['image_id'][0]
        assert np.array_equal(store.get(i), render(Source(source_path(run['dicom'], p)), 256))


def test_inference_answers_the_same(run):
    rows = run['df'].filter((pl.col('status') == 'ok') | (pl.col('step') == 'pixels')).select('image_id', 'path', 'frame', 'reason').sort('path', 'frame').rows()
    rows = [r for r in rows if not re.search('precision', r[1])]
    _, said = group_inputs([r[:3] for r in rows], run['dicom'], 64, 512, S)
    assert [s for s in said] == [r[3] for r in rows]


# ---- what once crashed, hung, or ate all memory ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [n for n in H.CASES if re.search('bomb|claims_4_gb|gigapixels|components_16384|levels_255|precision', n)])
def test_bombs_are_refused_in_little_memory(tmp_path, name):
    status, reason = alone(tmp_path, H.build(name), memory=700 << 20, seconds=60)
    case = H.CASES[name]
    assert case.status == 'any' or status == case.status and re.search(case.words, reason), (status, reason)
    assert 'more memory' not in (reason or '')


@pytest.mark.parametrize('name', [n for n in H.CASES if 'slow_pattern' in n])
def test_long_texts_are_read_at_once(tmp_path, name): assert alone(tmp_path, H.build(name), seconds=20)[0] == 'ok'


@pytest.mark.parametrize('name', [n for n in H.CASES if re.search(r'/nested_|million_items', n)])
def test_deep_and_wide_headers(tmp_path, name):
    status, reason = alone(tmp_path, H.build(name), seconds=60)
    assert H.CASES[name].status in ('any', status) and (status == 'ok' or re.search(H.CASES[name].words, reason)), (status, reason)


def test_the_depth_is_a_setting(tmp_path):
    (tmp_path/'x.dcm').write_bytes(H.build('structure/nested_50'))
    item = next(tuple(getattr(f, k) for k in SEEN_AS) for f in list_files(tmp_path))
    kinds = [read_many([item], root=str(tmp_path), key=KEY, max_depth=n)[0]['kind'][0] for n in (64, 20)]
    assert kinds == ['image', 'bad']
    e = S.engine.model_copy(update=dict(max_depth=20))
    out = S.model_copy(update=dict(engine=e))
    assert 'nested' in group_inputs([('0' * 16, 'x.dcm', 0)], tmp_path, 64, 512, out)[1][0]


def test_only_as_much_is_unpacked_as_a_frame_needs():
    s = open_source(H.build('structure/bomb_in_pixels'))
    assert s.frame().pixels.shape == H.PX.shape and len(s.file.buf) < 5_000_000


def test_tables_that_point_outside_are_not_followed():
    two = H.raw({H.FRAMES: ('IS', '2')}, ts=df.JPEGLL1, pixels=H.packed(H.J, H.J, bot=b'\0\0\0\0\xf0\xff\xff\xff'))
    far = H.raw({H.FRAMES: ('IS', '2')}, ts=df.JPEGLL1, before=H.el(0x7fe00001, 'OV', bytes(8) + b'\xff' * 8), pixels=H.packed(H.J, H.J))
    for data in (two, far):
        for k in (0, 1): assert np.array_equal(read_frame(data, k).pixels, H.PX)


def test_a_zip_of_zips_of_bombs(tmp_path):
    "569 kB or less that unpack to 3.5 GB"
    data = H.zipped({'x.dcm': H.build('structure/bomb_before_pixels'), 'y.dcm': H.good('behind a bomb')})
    assert len(data) < 569_000
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'z.zip').write_bytes(data)
    def go(): return scan(tmp_path/'d', tmp_path/'o', S).select('path', 'status', 'reason').rows()
    (_, one, why), (_, two, _) = apart(go, memory=900 << 20)
    assert (one, two) == ('rejected', 'ok') and 'unpacks to more' in why


@pytest.mark.parametrize('how', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_python_unpacks_without_bound_are_refused(tmp_path, how):
    (tmp_path/'z.zip').write_bytes(H.zipped({'x.dcm': H.raw()[:-len(H.W)] + bytes(1 << 26)}, how))
    assert 'unpack the archive first' in apart(lambda: Source(f'{tmp_path}/z.zip!/x.dcm').frame().pixels.shape, memory=40 << 20)
    assert 'unpack the archive first' in apart(lambda: content_hash(f'{tmp_path}/z.zip!/x.dcm'), memory=40 << 20)


def test_overlapping_members_are_refused_as_a_whole(tmp_path):
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'z.zip').write_bytes(H.overlapping())
    H.put(tmp_path/'d'/'1.dcm', H.good('beside'))
    rows = apart(lambda: scan(tmp_path/'d', tmp_path/'o', S).select('path', 'status', 'reason').rows(), seconds=20)
    assert [r[:2] for r in rows] == [('1.dcm', 'ok'), ('z.zip', 'rejected')] and 'overlap' in rows[1][2]


def test_what_an_archive_calls_dot_dot_stays_in_the_archive(tmp_path):
    "a folder named like the archive would make the name a path"
    (tmp_path/'d'/'a.zip!').mkdir(parents=True)
    (tmp_path/'secret').write_bytes(H.good('outside'))
    (tmp_path/'d'/'a.zip').write_bytes(H.zipped({'../../secret': b'not DICOM'}))
    with Source(tmp_path/'d'/'a.zip!/../../secret') as s: assert s.head == b'not DICOM'


# ---- the file system ------------------------------------------------------------------------------------------------------------------

def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    "swapped between listing and reading"
    d = tmp_path/'d'
    for k in range(3): H.put(d/f'{k}.dcm', H.good(f'swap {k}'))
    real = M.find_files
    def swapped(*a):
        out = list(real(*a))
        (d/'1.dcm').unlink()
        os.mkfifo(d/'1.dcm')
        (d/'2.dcm').unlink()
        return iter(out)
    def go():
        M.find_files = swapped
        return M.scan(d, tmp_path/'o', S).select('status', 'reason').rows()
    rows = apart(go, seconds=20)
    assert [r[0] for r in rows] == ['ok', 'rejected', 'rejected']
    assert 'pipe' in rows[1][1] and 'does not exist (any more)' in rows[2][1]
    for fn in (lambda: content_hash(d/'1.dcm'), lambda: read_header(d/'1.dcm')):
        assert 'pipe' in apart(fn, seconds=10)


def test_a_file_that_vanishes_before_its_pixels_are_read(tmp_path):
    H.put(tmp_path/'d'/'1.dcm', H.good('v1')), H.put(tmp_path/'d'/'2.dcm', H.good('v2'))
    m = scan(tmp_path/'d', tmp_path/'o', S)
    (tmp_path/'d'/'1.dcm').unlink()
    _, said = group_inputs(m.select('image_id', 'path', 'frame').rows(), tmp_path/'d', 64, 512, S)
    assert 'does not exist (any more)' in said[0] and said[1] is None


def test_closed_doors(tmp_path):
    try:
        want = H.write_trees(tmp_path/'dicom', ['doors'])
        rows = dict((p, (s, r)) for p, s, r in apart(lambda: scan(tmp_path/'dicom', tmp_path/'o', S).select('path', 'status', 'reason').rows(), knock=True))
        for p, (s, _) in want.items(): assert rows[p][0] == s
        for p in ('doors/0.dcm', 'doors/200.dcm', 'doors/closed/', 'doors/listed/1.dcm', 'doors/closed.zip'): assert 'permission' in rows[p][1], (p, rows)
    finally: H.remove(tmp_path/'dicom')


def test_names_that_look_like_each_other_stay_apart(tmp_path):
    a, b = os.fsencode(tmp_path) + b'/\xe4.dcm', os.fsencode(tmp_path) + b'/\\xe4.dcm'
    for path, data in ((a, b'bytes'), (b, b'letters'), (b.replace(b'\\', b'\\x5c'), b'escaped')):
        with open(path, 'wb') as f: f.write(data)
    found = [f.path for f in list_files(tmp_path)]
    assert len(set(found)) == 3 and {Path(source_path(tmp_path, p)).read_bytes() for p in found} == {b'bytes', b'letters', b'escaped'}
    (tmp_path/'z.zip').write_bytes(H.zipped({'\\xe4.dcm': b'member'}))
    with Source(source_path(tmp_path, 'z.zip!/\\xe4.dcm')) as s: assert s.head == b'member'


def test_a_link_upwards_does_not_make_the_disk_a_cohort(tmp_path):
    H.put(tmp_path/'other patient'/'1.dcm', b'x')
    d = tmp_path/'cohort'
    H.put(d/'1.dcm', b'y')
    (d/'up').symlink_to('..'), (d/'root').symlink_to('/'), (d/'sys').symlink_to('/proc'), (d/'me').symlink_to('.')
    (d/'farm').symlink_to(tmp_path/'other patient')
    assert [(f.path, bool(f.problem)) for f in list_files(d)] == [('1.dcm', False), ('farm/1.dcm', False), ('root/', True), ('sys/', True), ('up/', True)]


# ---- worker processes -----------------------------------------------------------------------------------------------------------------

def _hungry(n):
    if n: return os.getpid(), len(bytearray(n))
    return os.getpid(), 0


def test_memory_beyond_a_workers_costs_the_file_not_the_worker():
    small = S.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=1, memory_per_worker='1GiB'))))
    with engine(small) as client: rows = list(map_files(_hungry, [0, 8 << 30, 0, 3 << 30, 0], client, chunk=5))
    assert [r[2] and 'memory_per_worker' in r[2] for r in rows] == [None, True, None, True, None]
    assert len({r[1][0] for r in rows if r[1]}) == 1, 'the same process all along'


# ---- made up as it goes ---------------------------------------------------------------------------------------------------------------

WHOLE = {ts: df.make(df.tissue(40, 32) if ts != df.BASELINE else (df.tissue(40, 32) >> 4).astype(np.uint8), ts, bits=8 if ts == df.BASELINE else 12, WindowCenter=900, WindowWidth=1500)
         for ts in [*df.LOSSLESS, *df.LOSSY]}


@hyp(max_examples=int(os.environ.get('HOSTILE_EXAMPLES', 150)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ts=st.sampled_from(sorted(WHOLE)), ops=st.lists(st.tuples(st.sampled_from(sorted(H.SURGERY)), st.integers(0, 2**32 - 1)), min_size=1, max_size=4))
def test_files_damaged_at_random_end_as_ok_or_as_a_sentence(tmp_path_factory, ts, ops):
    data = H.operated(WHOLE[ts], ops)
    d = tmp_path_factory.mktemp('op')
    (d/'x.dcm').write_bytes(data)
    status, reason = through(d, 'x.dcm')
    assert status == 'ok' or reason and not re.search(r'could not be processed|Error', reason), (ts, ops, reason)
    shutil.rmtree(d)
