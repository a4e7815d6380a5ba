"""The outbox: nothing lost, nothing twice, delivered only what the far end has been asked about. The first half needs no server (a far end of our own, with
every kind of trouble), the second has real ones behind a bad line."""
import io
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

pytest.importorskip('tenacity', reason="no extra [edge] here (pip install 'mammo_nb[edge]')")

from faults import edge_ship
from faults.edge_ship import ACCESS, KINDS, SECRET, Far, make_files, start
from proxy import Proxy, always, bad
from servers import Seaweed

from mammo_nb.core.settings import MammoError
from mammo_nb.edge import destinations, outbox
from mammo_nb.edge.destinations import ABSENT, OTHER, SAME, Away, Refused, content_hash, likeness, parcel
from mammo_nb.edge.outbox import Outbox, backoff, in_window

ROOT = Path(__file__).resolve().parents[1]
HERE = 'https://far.example.org/dicom-web'
QUICK = dict(pause=.01, patience=.3, desc=None)


@pytest.fixture(scope='module')
def files(tmp_path_factory): return make_files(tmp_path_factory.mktemp('files'), 12, 1, most=120)


@pytest.fixture
def box(tmp_path):
    with Outbox(tmp_path/'outbox') as b: yield b


class Memory:
    "A far end that keeps the first content of a UID, like Orthanc; `trouble(what, parcel)` may raise before, or return what to raise after"
    def __init__(self, group=1, trouble=lambda what, p: None):
        self.group, self.trouble, self.held, self.sent, self.asked = group, trouble, {}, [], 0

    def __call__(self, address, throttle, stall):
        self.throttle = throttle
        return self

    def send(self, p, *_):
        late = self.trouble('send', p)
        self.throttle(p.bytes)
        self.sent.append(p.id)
        self.held.setdefault(p.name, p.path.read_bytes())
        if late: raise late

    def check(self, parcels):
        out = {}
        for p in parcels:
            self.asked += 1
            if late := self.trouble('check', p): raise late
            got = self.held.get(p.name)
            out[p.id] = (ABSENT if got is None else SAME if likeness(p, got) else OTHER), 'memory'
        return out

    def probe(self):
        if late := self.trouble('probe', None): raise late

    def close(self): pass


@pytest.fixture
def far(monkeypatch):
    f = Memory()
    monkeypatch.setattr(outbox, 'open_destination', lambda *a: f(*a))
    return f


def ship(box, **kw): return box.ship(HERE, **QUICK | kw)


# ---------------------------------------------------------------- in

def test_every_file_that_comes_in_is_a_row(box, files, tmp_path):
    bare, junk, empty, twin, nameless = (tmp_path/n for n in ('bare', 'junk', 'empty', 'twin', 'nameless'))
    bare.write_bytes(files[0].read_bytes()[132:])
    junk.write_bytes(random.Random(0).randbytes(500))
    empty.write_bytes(b'')
    ds = pydicom.dcmread(files[1])
    ds.PatientID = 'another'
    ds.save_as(twin)
    del ds.SeriesInstanceUID
    ds.save_as(nameless)
    ids = [box.add(p) for p in (*files, bare, junk, empty, twin, nameless)]
    assert ids == [box.add(p) for p in (*files, bare, junk, empty, twin, nameless)] and len(set(ids)) == 17
    rows = box.rows()
    assert rows['id'].to_list() == ids and rows['state'].to_list() == ['waiting'] * 12 + ['dead'] * 5
    assert [r[:20] for r in rows['reason'][12:]] == ['is no DICOM file wit'] * 3 + ['another file with th', 'lacks a UID that eve']
    assert box.again() == 0 and box.progress()['waiting'] == 12
    assert sorted(p.stem for p in box.folder.glob('files/*/*')) == sorted(ids[:12])
    with pytest.raises(MammoError, match='cannot be read'): box.add(tmp_path/'nobody')


def test_the_copy_is_the_outboxs_own_unless_linked(box, files, tmp_path):
    (src := tmp_path/'a.dcm').write_bytes(files[0].read_bytes())
    before = src.stat()
    id = box.add(src)
    assert src.stat().st_mtime_ns == before.st_mtime_ns and box.copy_of(id).stat().st_ino != before.st_ino
    src.write_bytes(b'')
    assert box.copy_of(id).read_bytes() == files[0].read_bytes()
    linked = box.copy_of(box.add(files[1], link=True))
    assert linked.stat().st_ino == files[1].stat().st_ino


def test_several_may_add_at_once_and_a_kill_while_adding_leaves_nothing_half(files, tmp_path):
    code = "import sys; from mammo_nb.edge.outbox import Outbox\nb = Outbox(sys.argv[1])\nwhile True:\n  for p in sys.argv[2:]: b.add(p); print(1, flush=True)"
    run = [subprocess.Popen([sys.executable, '-c', code, tmp_path/'o', *fs], cwd=ROOT, stdout=subprocess.PIPE) for fs in (files, files[::-1])]
    for k, p in enumerate(run): [p.stdout.readline() for _ in range(3 + k)]
    for p in run:
        p.kill()
        p.wait()
        p.stdout.close()
    with Outbox(tmp_path/'o') as b:
        assert {b.add(p) for p in files} == set(b.rows()['id']) and len(b.rows()) == len(files)
        assert all(b.copy_of(parcel(p).id).read_bytes() == p.read_bytes() for p in files)


# ---------------------------------------------------------------- out, to a far end of our own

def test_delivered_only_after_the_far_end_was_asked(box, files, far):
    for p in files: box.add(p)
    far.trouble = lambda what, p: far.held.clear() if what == 'check' else None  # says yes to everything and keeps nothing
    said = ship(box, attempts=3)
    assert said['delivered'] == 0 and said['dead'] == 12 and set(box.dead()['reason']) == {'the destination said yes and does not have it'}
    far.trouble = lambda what, p: None
    assert box.again() == 12 and ship(box)['delivered'] == 12 and sorted(far.held.values()) == sorted(p.read_bytes() for p in files)


def test_priority_first_then_in_order_of_arrival(box, files, far):
    ids = [box.add(p) for p in files]
    box.add(files[7], priority=1)
    box.add(files[9], priority=5)
    box.add(files[9])
    ship(box)
    assert far.sent == [ids[9], ids[7], *(i for i in ids if i not in (ids[9], ids[7]))]


def test_a_lost_answer_does_not_send_a_file_twice(box, files, far):
    for p in files: box.add(p)
    lost = set()
    def trouble(what, p):
        if what == 'send' and p.id not in lost:
            lost.add(p.id)
            return Away('the line broke')
    far.trouble = trouble
    assert ship(box)['delivered'] == 12 and len(far.sent) == 12


def test_a_night_without_a_line_costs_no_file_a_try(box, files, far):
    for p in files: box.add(p)
    def trouble(what, p): raise Away('the line broke')
    far.trouble = trouble
    for _ in range(3): said = ship(box, attempts=1)
    assert said['waiting'] == 12 and 'The destination is away: the line broke' in said['problem'] and box.rows()['tries'].max() == 0
    far.trouble = lambda what, p: None
    assert ship(box, attempts=1)['delivered'] == 12


def test_a_file_that_breaks_the_line_every_time_is_put_aside_and_holds_nobody_up(box, files, far):
    ids = [box.add(p) for p in files]
    def trouble(what, p):
        if what != 'probe' and p.id == ids[0]: raise Away('the line broke')
    far.trouble = trouble
    said = ship(box, attempts=4)
    assert said['delivered'] == 11 and box.dead()['id'].to_list() == ids[:1] and box.dead()['tries'][0] == 4
    assert far.sent[:11] == ids[1:], 'the others did not wait for it'


def test_a_refused_file_is_not_sent_twenty_times(box, files, far):
    ids = [box.add(p) for p in files[:2]]
    tries = []
    def trouble(what, p):
        if what == 'send' and p.id == ids[0]:
            tries.append(1)
            raise Refused('it does not take this file (HTTP 409)')
    far.trouble = trouble
    assert ship(box)['dead'] == 1 and len(tries) == 3 and 'HTTP 409' in box.dead()['reason'][0]


def test_another_content_at_the_far_end_is_noticed(box, files, far):
    id = box.add(files[0])
    far.held[parcel(files[0]).name] = files[1].read_bytes()
    assert ship(box)['dead'] == 1 and 'holds another content' in box.dead()['reason'][0]
    far.held.clear()  # a person has it removed there
    assert box.again([id]) == 1 and ship(box)['delivered'] == 1


def test_a_copy_that_changed_in_the_outbox_is_not_sent(box, files, far):
    ids = [box.add(p) for p in files[:3]]
    with open(box.copy_of(ids[0]), 'rb+') as f:
        f.seek(-9, 2)
        f.write(b'?')
    box.copy_of(ids[1]).unlink()
    assert ship(box)['dead'] == 2 and far.sent == [ids[2]]
    assert set(box.dead()['reason']) == {'its copy in the outbox was changed or lost; add the file again'}
    assert [box.add(p) for p in files[:3]] == ids and ship(box)['delivered'] == 3


def test_what_takes_the_process_down_is_put_aside_in_the_end(box, files, far):
    "The count goes up before the file is sent"
    ids = [box.add(p) for p in files[:3]]
    class Killed(BaseException): "as far as the queue is concerned"
    def trouble(what, p):
        if what == 'send' and p.id == ids[1]: raise Killed
    far.trouble = trouble
    for _ in range(4):
        with Outbox(box.folder) as b, pytest.raises(Killed): ship(b, attempts=4)
    assert ship(box, attempts=4)['delivered'] == 2 and box.dead()['id'].to_list() == [ids[1]] and 'the process ended' in box.dead()['reason'][0]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), group=st.sampled_from([1, 3, 8]), share=st.floats(0, .7))
def test_whatever_happens_every_file_arrives_once_as_it_was(files, tmp_path_factory, seed, group, share):
    rng = random.Random(seed)
    def trouble(what, p):
        if rng.random() >= share * (.5 if what == 'probe' else 1): return None
        err = rng.choice([Away('the line broke'), Away('it cannot be reached', sure=True), KeyError('a library')])
        if what == 'send' and rng.random() < .5: return err
        raise err
    far = Memory(group, trouble)
    with Outbox(tmp_path_factory.mktemp('b')/'outbox') as b, pytest.MonkeyPatch.context() as m:
        m.setattr(outbox, 'open_destination', lambda *a: far(*a))
        m.setattr(outbox, 'backoff', lambda n, pause=1.: 0)
        for p in files[:8]: b.add(p, link=True)
        while (said := ship(b, attempts=1000, patience=0))['waiting']: pass
        assert said['delivered'] == 8 and sorted(far.held.values()) == sorted(p.read_bytes() for p in files[:8])


def test_bandwidth_window_and_backoff(box, files, far, monkeypatch):
    for p in files[:4]: box.add(p)
    began, size = time.monotonic(), box.progress()['bytes']
    said = ship(box, bandwidth=size * 2)
    assert .4 < time.monotonic() - began and said['bytes'] == size
    box.add(files[5])
    hour = time.localtime().tm_hour
    closed = f'{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00'
    assert not in_window(closed) and ship(box, window=closed)['problem'].startswith('The upload window is closed') and box.progress(HERE)['waiting'] == 1
    assert ship(box, window=f'{hour:02}:00-{(hour + 2) % 24:02}:00')['delivered'] == 5
    waits = [[backoff(n) for _ in range(20)] for n in range(1, 12)]
    assert all(2**n <= w <= 2**n + 1 for n, ws in enumerate(waits[:8]) for w in ws) and max(waits[-1]) == 300 and len(set(waits[0])) > 10
    for wrong in (dict(bandwidth='fast'), dict(bandwidth=-1), dict(window='20-06')):
        with pytest.raises(MammoError, match=r'\[edge\] '): ship(box, **wrong)


def test_a_clock_that_jumps_back_holds_nothing_up(box, files, far):
    box.add(files[0])
    far.trouble = lambda what, p: Away('the line broke') if what == 'send' and not far.sent else None
    box._do("INSERT INTO deliveries (file, destination, state, tries, next_try, changed) VALUES (?, ?, 'waiting', 1, ?, '')", box.rows()['id'][0], HERE, time.time() + 10 * 86400)
    assert ship(box)['delivered'] == 1


def test_destinations_are_independent_and_only_one_ships_to_each(box, files, far):
    for p in files[:2]: box.add(p)
    assert ship(box)['delivered'] == 2 and box.ship('https://other.example.org/dicom-web', **QUICK)['delivered'] == 2
    assert len(box.rows()) == 4 and box.progress(HERE) == dict(files=2, bytes=box.progress(HERE)['bytes'], waiting=0, sent=0, delivered=2, dead=0, bytes_delivered=box.progress(HERE)['bytes'])
    inside, go = threading.Event(), threading.Event()
    box.add(files[2])
    far.trouble = lambda what, p: (inside.set(), go.wait(30)) and None
    t = threading.Thread(target=ship, args=(box,))
    t.start()
    inside.wait(30)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(outbox, 'only_run', lambda folder: __import__('mammo_nb.core.engine', fromlist=['']).only_run(folder, patience=.2))
    try:
        with Outbox(box.folder) as other, pytest.raises(MammoError, match='Another run is at work'): ship(other)
    finally:
        monkey.undo()
        go.set()
        t.join()
    assert box.clear(HERE) == 3 and not list(box.folder.glob('files/*/*.dcm')) and box.progress(HERE)['delivered'] == 3


def test_withdrawn_files_stay(box, files, far):
    ids = [box.add(p) for p in files[:2]]
    box.withdraw(ids[0])
    assert ship(box)['delivered'] == 1 and far.sent == [ids[1]] and box.dead()['reason'].to_list() == ['was withdrawn'] and not box.copy_of(ids[0]).exists()
    with pytest.raises(MammoError, match='has left'): box.withdraw(ids[1])


def test_a_damaged_or_foreign_queue_is_said_in_one_sentence(tmp_path):
    (tmp_path/'o').mkdir()
    (tmp_path/'o'/'outbox.sqlite').write_bytes(b'no database' * 500)
    with pytest.raises(MammoError, match='is damaged or no outbox'): Outbox(tmp_path/'o')


def test_nothing_of_the_header_is_written_or_said(tmp_path, far, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    p = make_files(tmp_path/'in', 1, plain=True)[0]
    ds = pydicom.dcmread(p)
    ds.PatientID, ds.PatientName = 'MARK1', 'MARK2^X'
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.31415926535'
    ds.save_as(q := tmp_path/'in'/'MARK3.dcm')
    q.rename(twin := tmp_path/'in'/'MARK4.dcm')
    with Outbox(tmp_path/'o') as b:
        b.add(twin)
        ds.PatientID = 'MARK5'
        ds.save_as(q)
        b.add(q)
        far.trouble = lambda what, p: (_ for _ in ()).throw(KeyError('MARK6'))
        said = b.ship(HERE, pause=.01, patience=.1)
        text = str(said) + b.rows().write_csv()
    out, err = capfd.readouterr()
    text += out + err + caplog.text
    for f in (tmp_path/'o').iterdir():
        if f.is_file(): text += f.read_bytes().decode('latin-1')
    assert 'KeyError' in text and not [m for m in ('MARK', '31415926535', 'in/') if m in text]


def test_missing_packages_are_named_once_and_for_all(monkeypatch):
    for url, module in (('https://a/b', 'requests'), ('dicom://A@b:104', 'pynetdicom'), ('s3://b', 'boto3')):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(MammoError, match=r"pip install 'mammo_nb\[edge\]'"): destinations.open_destination(destinations.parse_address(url), destinations.Throttle())


# ---------------------------------------------------------------- real servers behind a line

@pytest.fixture(scope='module')
def credentials():
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AWS_ACCESS_KEY_ID', ACCESS)
        m.setenv('AWS_SECRET_ACCESS_KEY', SECRET)
        yield


_fars = {}

@pytest.fixture(scope='module')
def servers(tmp_path_factory, credentials):
    "One of each kind for all tests below"
    def one(kind):
        if kind not in _fars: _fars[kind] = Far(kind, tmp_path_factory.mktemp(kind)).__enter__()
        return _fars[kind]
    yield one
    while _fars: _fars.popitem()[1].__exit__()


@pytest.fixture(params=KINDS)
def real(request, servers):
    if why := Far.missing(request.param): pytest.skip(why)
    f = servers(request.param)
    f.line.faults = lambda n: None
    yield f
    f.line.faults = lambda n: None


BACK = 'storage commitment, read back by C-GET, '
HOW = dict(stow={'MD5 at Orthanc'}, dimse={BACK + 'data set byte for byte', BACK + 'equal content in another form'}, s3={'SHA-256 at the store'})
LIVE = dict(pause=.02, stall=2, patience=20, desc=None)


def test_every_destination_holds_what_was_sent(real, box, tmp_path):
    files = make_files(tmp_path/'f', 12, 21, most=120)
    for p in files: box.add(p)
    said = box.ship(real.url, **LIVE)
    judged = real.judge(files)
    assert said['delivered'] == 12 == judged['content_identical'] and not judged['other_content'] + judged['twice'] + judged['missing']
    assert judged['bytes_identical'] == (0 if real.kind == 'dimse' else 12), 'Orthanc writes the file meta of C-STORE anew'
    assert set(box.rows()['how']) == HOW[real.kind] and set(box.audit(real.url)['found']) == {SAME}


def test_de_identified_files_come_back_byte_for_byte(servers, box, tmp_path):
    "C-STORE carries the data set alone: written as servers write it, it is the same at the far end; the sources are not, one of them also because of its padding"
    if why := Far.missing('dimse'): pytest.skip(why)
    far, sources = servers('dimse'), make_files(tmp_path/'f', 12, 32, most=100, loose=True)
    files = edge_ship.de_identified(sources, tmp_path/'clean')
    for p in files: box.add(p)
    assert box.ship(far.url, **LIVE)['delivered'] == 12 and set(box.rows()['how']) == {BACK + 'data set byte for byte'}
    judged = far.judge(files)
    assert judged['dataset_bytes_identical'] == 12 == judged['dataset_stream_identical'] + 2 and not judged['bytes_identical'], 'behind two deflated ones Orthanc stores zeros'
    with Outbox(tmp_path/'other') as other:
        for p in sources: other.add(p)
        assert other.ship(far.url, **LIVE)['delivered'] == 12 and set(other.rows()['how']) == HOW['dimse']


@pytest.mark.parametrize('change, form', [(lambda d: d, destinations.FILE), (lambda d: b'x' * 128 + d[128:], destinations.DATA_SET), (lambda d: d.replace(b'MG', b'CR'), ''), (lambda d: d[:-2], ''), (lambda d: d + b'\0\0', destinations.CONTENT),
                                          (lambda d: d[:140] + b'\xff\xff\0\0' + d[144:], destinations.CONTENT), (lambda d: b'', '')])
def test_what_comes_back_is_compared(change, form, files):
    p = parcel(files[0])
    assert destinations.likeness(p, change(p.path.read_bytes())) == form
    assert destinations.likeness(p, destinations.data_set(p.path.read_bytes()), p.syntax) == destinations.DATA_SET


def test_a_bad_line_kills_and_restarts(real, tmp_path, servers):
    "The short version of faults/edge_ship.py"
    files, b = make_files(tmp_path/'f', 16, 22, most=100), Outbox(tmp_path/'outbox')
    for p in files: b.add(p)
    real.line.faults = bad(3, most=150_000)
    how, kills = dict(patience=60, attempts=100, pause=.02, stall=.7), [6]
    while True:
        run = start(b.folder, real.url, **how)
        while run.poll() is None:
            if kills and b.progress(real.url)['delivered'] >= kills[0]:
                kills.pop(0)
                run.kill()
                if real.kind != 's3': real.server.restart(signal.SIGKILL)  # SeaweedFS takes its time
            time.sleep(.01)
        out, err = run.communicate()
        if run.returncode != -signal.SIGKILL: break
    assert run.returncode == 0, err[-2000:]
    real.line.faults = lambda n: None
    judged = real.judge(files)
    assert json.loads(out)['delivered'] == 16 == judged['content_identical'] and not judged['other_content'] + judged['twice'] + judged['missing'] and not kills
    b.close()


def test_a_bit_that_is_flipped_on_the_way_is_noticed(real, box, tmp_path):
    "Orthanc takes it and says yes, SeaweedFS does not"
    files = make_files(tmp_path/'f', 1, 23, plain=True, least=120, most=121)
    id = box.add(files[0])
    real.line.drop()
    real.line.faults = lambda n: always('flip', 9000)(n) if n == first else None
    first = real.line.n + 1
    said = box.ship(real.url, **LIVE)
    assert real.line.seen['flip'] == 1
    real.line.seen.clear()
    if real.kind == 's3': assert said['delivered'] == 1 == real.judge(files)['bytes_identical']
    else:
        assert said['dead'] == 1 and 'holds another content' in box.dead()['reason'][0] and real.judge(files)['other_content'] == 1
        [real.server.delete(i) for i, uid in real.server.instances().items() if uid == parcel(files[0]).sop_uid]
        assert box.again([id]) == 1 and box.ship(real.url, **LIVE)['delivered'] == 1 == real.judge(files)['content_identical']


def test_the_same_uid_with_other_content_is_never_delivered(real, tmp_path):
    "Orthanc answers success and keeps the first"
    files = make_files(tmp_path/'f', 1, 24, plain=True)
    ds = pydicom.dcmread(files[0])
    ds.BodyPartExamined = 'another'
    ds.save_as(twin := tmp_path/'twin.dcm')
    with Outbox(tmp_path/'a') as a, Outbox(tmp_path/'b') as b:
        a.add(files[0])
        b.add(twin)
        assert a.ship(real.url, **LIVE)['delivered'] == 1
        said = b.ship(real.url, **LIVE)
        assert said['dead'] == 1 and 'another content' in b.dead()['reason'][0]
        judged = real.judge(files)
        assert judged['content_identical'] == 1 and not judged['twice'] + judged['other_content']
        if real.kind == 's3': return
        ds.PatientID += 'x'  # under another patient Orthanc keeps both
        ds.save_as(twin)
        with Outbox(tmp_path/'c') as c:
            c.add(twin)
            assert c.ship(real.url, **LIVE)['dead'] == 1 and 'another content' in c.dead()['reason'][0] and real.judge(files)['twice'] == 1


def test_what_changes_at_the_far_end_is_found_by_an_audit(real, box, tmp_path):
    files = make_files(tmp_path/'f', 3, 25, plain=True)
    ids = [box.add(p) for p in files]
    assert box.ship(real.url, **LIVE)['delivered'] == 3
    other = files[1].read_bytes()[:-2] + b'??'
    if real.kind == 's3':
        key = lambda i: f't1/{parcel(files[i]).name[:2]}/{parcel(files[i]).name}.dcm'
        c = real.server.client()
        c.delete_object(Bucket=Seaweed.bucket, Key=key(0))
        c.put_object(Bucket=Seaweed.bucket, Key=key(1), Body=other)
    else:
        at = {uid: i for i, uid in real.server.instances().items()}
        for p in files[:2]: real.server.delete(at[parcel(p).sop_uid])
        (tmp_path/'other.dcm').write_bytes(other)
        with Outbox(tmp_path/'o2') as o2:
            o2.add(tmp_path/'other.dcm')
            o2.ship(real.url, **LIVE)
    found = dict(box.audit(real.url).select('id', 'found').iter_rows())
    assert [found[i] for i in ids] == [ABSENT, OTHER, SAME]


def test_a_hanging_line_is_left_in_time(real, box, tmp_path):
    files = make_files(tmp_path/'f', 1, 26, plain=True, least=300)
    box.add(files[0])
    real.line.drop()
    real.line.faults, began = always('hang', 20_000), time.monotonic()
    said = box.ship(real.url, **LIVE | dict(stall=.5, patience=1, attempts=2))
    assert said['delivered'] == 0 and time.monotonic() - began < 15 and set(box.rows()['reason']) == {'the line broke'}
    real.line.faults = lambda n: None
    real.line.drop()
    box.again()
    assert box.ship(real.url, **LIVE)['delivered'] == 1


def test_a_bandwidth_is_kept(real, box, tmp_path):
    files = make_files(tmp_path/'f', 2, 27, plain=True, least=150, most=160)
    for p in files: box.add(p)
    size, began = box.progress()['bytes'], time.monotonic()
    said = box.ship(real.url, **LIVE | dict(bandwidth=size / 1.5))
    assert 1.4 < time.monotonic() - began < 6 and said['delivered'] == 2 and size <= said['bytes'] < 1.2 * size


def test_a_wrong_address_or_password_blames_no_file(real, tmp_path):
    p = make_files(tmp_path/'f', 1, 28, plain=True)[0]
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        wrong = dict(stow=[real.url.replace('dicom-web', 'elsewhere')], s3=[real.url.replace('//truck', '//nobody')],
                     dimse=[real.url.partition('listen=')[0].rstrip('&?')])[real.kind] + [real.url.replace(f':{real.line.port}', f':{s.getsockname()[1]}')]
        for k, url in enumerate(wrong):
            with Outbox(tmp_path/str(k)) as b:
                b.add(p)
                said = b.ship(url, **LIVE | dict(patience=.2))
                if k or real.kind != 'dimse': assert said['waiting'] == 1 and 'The destination is away' in said['problem'] and b.rows()['tries'].max() == 0
                else: assert said['delivered'] == 1 and b.rows()['how'][0] == BACK[20:] + 'data set byte for byte'  # no listen: no storage commitment, read back only


def test_wrong_s3_credentials(servers, box, tmp_path, monkeypatch):
    if why := Far.missing('s3'): pytest.skip(why)
    far = servers('s3')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'wrong')
    box.add(make_files(tmp_path/'f', 1, 29, plain=True)[0])
    said = box.ship(far.url, **LIVE | dict(patience=.2))
    assert said['waiting'] == 1 and 'other credentials' in said['problem'] and box.rows()['tries'].max() == 0


def test_wado_read_back_where_a_server_has_no_md5(servers, box, tmp_path):
    if why := Far.missing('stow'): pytest.skip(why)
    far = servers('stow')
    files = make_files(tmp_path/'f', 6, 30)
    for p in files: box.add(p)
    assert box.ship(far.url + '?verify=wado', **LIVE)['delivered'] == 6 and set(box.rows()['how']) == {'read back by WADO-RS, byte for byte'}


def test_a_server_that_never_reports_its_commitments(servers, box, tmp_path, monkeypatch):
    monkeypatch.setattr(destinations.Dimse, 'patience', .5)
    if why := Far.missing('dimse'): pytest.skip(why)
    far = servers('dimse')
    box.add(make_files(tmp_path/'f', 1, 31, plain=True)[0])
    elsewhere = far.url.replace(f'listen={far.listen}', f'listen={edge_ship.free_ports(1)[0]}')
    said = box.ship(elsewhere, **LIVE | dict(stall=.5, patience=1))
    assert said['waiting'] == 1 and 'storage commitment did not come' in said['problem']
    assert box.ship(far.url + '&read_back=no', **LIVE)['delivered'] == 1 and box.rows()['how'][0] == 'storage commitment'
