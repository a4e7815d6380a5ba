"The label store: what is pressed is what it holds, in whatever order, number and company it arrives."
import random, signal, subprocess, sys, threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, settings as hyp, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
import tempfile

from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.labels.store import Event, LabelStore, Oracle, StoreError

S = load_settings(Path(__file__).parent.parent/'settings.ini')
COLUMNS = 'id filename study_id thumbnail_path frame_number has_biopsy_tool has_mag_view labeled_at confidence_biopsy confidence_mag predicted_at'.split()


def manifest(n=12, per_patient=4, hold_out=4):
    return pl.DataFrame([dict(image_id=f'{i:016x}', path=f'p{i//per_patient}/{i}.dcm', study_id=f's{i//per_patient}', patient_id=f'p{i//per_patient}',
                              frame=0, view='L-CC', split='hold_out' if i >= n - hold_out else 'train', status='ok') for i in range(n)])


def make(path, m=None, settings=S):
    store = LabelStore(path, settings)
    store.sync_images(manifest() if m is None else m)
    return store


@pytest.fixture
def store(tmp_path):
    with make(tmp_path/'labels.sqlite') as s: yield s


def view(store, where='1'): return [dict(zip(COLUMNS, r)) for r in store._all(f'SELECT * FROM labels WHERE {where}')]


# ---- the schema


def test_view_has_the_original_columns(store):
    assert [r[1] for r in store._all('PRAGMA table_info(labels)')] == COLUMNS
    ids = store.images()['image_id']
    store.label(ids[0], ('biopsy',), 'a'), store.label(ids[1], (), 'a'), store.label(ids[2], 'skip', 'a')
    got = {r['id']: (r['has_biopsy_tool'], r['has_mag_view'], r['labeled_at'] is not None) for r in view(store)}
    assert got[ids[0]] == (1, 0, True) and got[ids[1]] == (0, 0, True) and got[ids[2]] == got[ids[3]] == (None, None, False) and len(got) == 12


def three_findings(tmp_path):
    text = (Path(__file__).parent.parent/'settings.ini').read_text().replace('findings = biopsy, mag', 'findings = biopsy, mag, implant')
    text = text.replace('[keys]', '[finding.implant]\ntitle = Implant\ncolumn = has_implant\n\n[keys]\n5 = implant')
    (tmp_path/'three.ini').write_text(text)
    return load_settings(tmp_path/'three.ini')


def test_three_findings_three_columns_and_old_labels_stay(tmp_path):
    s3, p = three_findings(tmp_path), tmp_path/'labels.sqlite'
    with make(p) as two: two.label(f'{0:016x}', ('mag',), 'a')
    with LabelStore(p, s3) as three:
        cols = [r[1] for r in three._all('PRAGMA table_info(labels)')]
        assert cols[5:] == ['has_biopsy_tool', 'has_mag_view', 'has_implant', 'labeled_at', 'confidence_biopsy', 'confidence_mag', 'confidence_implant', 'predicted_at']
        assert three.labels().select(s3.columns).row(0) == (0, 1, None)  # the new finding is unlabelled, not 'no'
        three.label(f'{1:016x}', ('implant',), 'a')
    with LabelStore(p, S) as two: assert two.labels().select(S.columns).rows() == [(0, 1), (0, 0)]


def test_nothing_is_changed_or_deleted(store):
    i = store.images()['image_id'][0]
    store.label(i, (), 'a'), store.undo('a'), store.label(i, ('mag',), 'a'), store.set_queue('q', [i]), store.set_queue('q', [])
    store.set_predictions(pl.DataFrame(dict(image_id=[i], prob_biopsy=[.1], prob_mag=[.2])))
    store.take_lease('a', 'p')
    for table in ('images', 'events', 'queues', 'queue_items', 'predictions', 'leases', 'facts'):
        assert store._one(f'SELECT count(*) FROM {table}')[0] > 0
        for sql in (f'DELETE FROM {table}', f'UPDATE {table} SET rowid = rowid + 100'):
            with pytest.raises(StoreError, match='append-only'): store._all(sql)
    assert store._one('SELECT count(*) FROM events')[0] == 3 and store._one('PRAGMA journal_mode')[0] == 'wal' and store._one('PRAGMA synchronous')[0] == 2


# ---- meaning of events


def test_sources_rank(store):
    i, has = store.images()['image_id'][0], lambda: store.labels().select(*S.columns, 'source').rows()
    store.label(i, {'mag': 1}, 'header', source='header')
    assert has() == [(None, 1, 'header')]
    store.label(i, {'biopsy': 1, 'mag': 0}, 'csv', source='import')
    assert has() == [(1, 0, 'import')]
    store.label(i, {'biopsy': 0}, 'a')  # a human who only speaks about biopsy
    assert has() == [(0, 0, 'human')]
    store.undo('a')
    assert has() == [(1, 0, 'import')]


def test_tie_is_unlabelled_until_settled_and_undo_reopens(store):
    i = store.images()['image_id'][0]
    store.label(i, ('biopsy',), 'a'), store.label(i, (), 'b')
    assert store.labels().select(S.columns).rows() == [(None, 0)] and store.queue('disagreements') == [i]
    assert store.disagreements().row(0, named=True) == {'image_id': i, 'a': 'biopsy', 'b': 'none'}
    store.label(i, ('biopsy',), 'a', queue='disagreements')
    assert store.labels().select(S.columns).rows() == [(1, 0)] and store.queue('disagreements') == []
    assert store.kappa('mag').row(0, named=True)['images'] == 1  # settling does not rewrite what the raters had said
    store.undo('a', queue='disagreements')
    assert store.queue('disagreements') == [i]
    store.label(i, ('biopsy',), 'b')  # or one of them changes their mind
    assert store.queue('disagreements') == [] and store.labels()['rater'].to_list() == ['a b']


def test_skip_undo_queue_and_split(store):
    ids = store.images()['image_id'][:4].to_list()
    store.set_queue('round-001', ids)
    store.label(ids[0], 'skip', 'a', queue='round-001'), store.label(ids[1], ('mag',), 'a', queue='round-001')
    assert store.todo('round-001', 'a') == ids[2:] and store.queue('skipped', 'a') == [ids[0]] and store.todo('round-001', 'b') == ids
    before = store.images().rows()
    undone = store.undo('a')
    assert undone.image_id == ids[1] and undone.queue == 'round-001' and store.todo('round-001', 'a') == ids[1:]
    assert store.undo('a').image_id == ids[0] and store.queue('skipped', 'a') == [] and store.undo('a') is None
    assert store.images().rows() == before and store.queue('round-001') == ids
    store.label(ids[0], 'skip', 'a'), store.label(ids[0], (), 'b')
    assert store.queue('skipped', 'a') == [ids[0]] and store.queue('skipped') == []


def test_clock_set_back_does_not_reorder(store, monkeypatch):
    import mammo_nb.labels.store as m
    i = store.images()['image_id'][0]
    store.label(i, ('biopsy',), 'a')
    monkeypatch.setattr(m, 'now_utc', lambda: '2001-01-01T00:00:00.000Z')
    store.label(i, ('mag',), 'a')
    assert store.labels().select(S.columns).rows() == [(0, 1)]
    assert store.undo('a').label == {'biopsy': 0, 'mag': 1} and store.labels().select(S.columns).rows() == [(1, 0)]


def test_one_number_two_contents_is_an_error_not_a_lost_label(store):
    a, b = store.images()['image_id'][:2]
    e = Event('c', 1, 'a', a, (), time='2025-01-01T00:00:00Z')
    assert store.add(e) and not store.add(e) and not store.add(Event('c', 1, 'a', a, ()))
    with pytest.raises(StoreError, match='already used'): store.add(Event('c', 1, 'a', b, ()))
    with pytest.raises(StoreError): store.add_many([Event('c', 2, 'a', b, ()), Event('c', 3, 'a', 'nowhere', ())])
    assert len(store.history('a')) == 1  # all or none


@pytest.mark.parametrize('change, words', [
    (dict(label=('clip',)), 'no finding'), (dict(label={'mag': 2}), 'must be 0, 1'), (dict(label={}), 'nothing about'), (dict(label=None), 'must be names'),
    (dict(label='undo'), 'must name'), (dict(undoes=('c', 1)), 'must name'), (dict(source='guess'), 'source'), (dict(time='today'), 'no time'),
    (dict(rater=' '), 'rater'), (dict(seq='1'), 'whole'), (dict(image_id='?'), 'not in this cohort')])
def test_bad_events(store, change, words):
    e = dict(client='c', seq=9, rater='a', image_id=store.images()['image_id'][0], label=('mag',)) | change
    with pytest.raises(StoreError, match=words): store.add(e)


# ---- the state machine: a dictionary of events is the whole truth

RANK = dict(human=30, oracle=20, header=10)
IMAGES = [f'{i:016x}' for i in range(5)]
NAMES = S.names


class Model:
    "The rules once more, as plainly as possible"
    def __init__(self): self.events = {}

    def live(self):
        es = self.events.values()
        undone = {(e.undoes, e.rater) for e in es if e.undoes}
        return [e for e in es if not e.undoes and ((e.client, e.seq), e.rater) not in undone]

    def latest(self):
        out = {}
        for e in sorted(self.live(), key=lambda e: (e.time, e.client, e.seq)):
            out[e.image_id, e.rater, RANK[e.source] + 5*(e.queue == 'disagreements')] = e
        return out

    def votes(self, image, name):
        "rank -> values, the strongest rank that says anything"
        by = {}
        for (i, _, rank), e in self.latest().items():
            if i == image and e.label != 'skip' and e.label.get(name) is not None: by.setdefault(rank, []).append(e.label[name])
        return by[max(by)] if by else []

    def labels(self):
        out = {}
        for i in IMAGES:
            v = [self.votes(i, n) for n in NAMES]
            v = tuple(None if not x or 2*sum(x) == len(x) else int(2*sum(x) > len(x)) for x in v)
            if any(x is not None for x in v): out[i] = v
        return out

    def disputed(self): return {i for i in IMAGES if any(0 < sum(v) < len(v) for v in (self.votes(i, n) for n in NAMES) if v)}

    def skipped(self):
        last = [(i, e.label) for (i, *_), e in self.latest().items()]
        return {i for i, l in last if l == 'skip'} - {i for i, l in last if l != 'skip'}


def check(store, model):
    got = {r[0]: tuple(r[1:]) for r in store.labels().select('image_id', *S.columns).iter_rows()}
    assert got == model.labels()
    assert {r['id']: (r['has_biopsy_tool'], r['has_mag_view']) for r in view(store, 'labeled_at IS NOT NULL')} == got
    assert set(store.queue('disagreements')) == model.disputed() and set(store.queue('skipped')) == model.skipped()
    assert store.counts()['labelled'] == len(got)


def state(store): return store.snapshot_hash(), store.labels().rows(), store.queue('disagreements'), store.queue('skipped'), \
    [store.history(r) for r in 'ab'], [store.labels(r).rows() for r in 'ab']


class Machine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.tmp = tempfile.TemporaryDirectory()
        self.store, self.model, self.n = make(Path(self.tmp.name)/'l.sqlite', manifest(5)), Model(), 0

    def put(self, **kw):
        self.n += 1
        t = f'2025-01-01T00:{self.n//60:02}:{self.n%60:02}.000Z'
        e = Event(seq=self.n, time=t, **kw)
        assert self.store.add(e)
        label = e.label if isinstance(e.label, (str, dict)) else {n: int(n in e.label) for n in NAMES}
        self.model.events[e.client, e.seq] = Event(**{**e.__dict__, 'label': label})
        return e

    who = dict(client=st.sampled_from(['p1', 'p2', 'p3']), rater=st.sampled_from('ab'), image_id=st.sampled_from(IMAGES))

    @rule(label=st.sampled_from([(), ('biopsy',), ('mag',), ('biopsy', 'mag'), {'mag': 1}, {'biopsy': 0, 'mag': None}, 'skip']),
          source=st.sampled_from(['human', 'human', 'human', 'oracle', 'header']), queue=st.sampled_from([None, 'round-001', 'disagreements']), **who)
    def label(self, **kw): self.put(**kw)

    @rule(data=st.data(), rater=st.sampled_from('ab'))
    def undo_some(self, data, rater):
        if not self.model.events: return
        e = data.draw(st.sampled_from(sorted(self.model.events.values(), key=lambda e: e.time)))
        self.put(client='p1', rater=rater, image_id=e.image_id, label='undo', undoes=(e.client, e.seq))  # perhaps another's event: no effect

    @rule(rater=st.sampled_from('ab'))
    def undo_last(self, rater):
        live = sorted((e for e in self.model.live() if e.rater == rater), key=lambda e: (e.time, e.client, e.seq))
        hist = self.store.history(rater, n=1)
        assert [(e.client, e.seq) for e in hist] == [(e.client, e.seq) for e in live[-1:]]
        if live: self.put(client='p2', rater=rater, image_id=live[-1].image_id, label='undo', undoes=(live[-1].client, live[-1].seq))

    @rule(data=st.data())
    def replay(self, data):
        if self.model.events: assert not self.store.add(data.draw(st.sampled_from(sorted(self.model.events.values(), key=lambda e: e.time))))

    @invariant()
    def agrees(self):
        if hasattr(self, 'store'): check(self.store, self.model)

    def teardown(self):
        if not hasattr(self, 'store'): return
        es = list(self.model.events.values())
        es = es + random.Random(self.n).choices(es, k=len(es)) if es else es
        random.Random(self.n).shuffle(es)
        with make(Path(self.tmp.name)/'twin.sqlite', manifest(5)) as twin:
            for e in es: twin.add(e)
            assert state(twin) == state(self.store)
        self.store.close()
        self.tmp.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = hyp(max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_machine_can_fail(tmp_path):
    "A model with one rule wrong is told apart"
    store, model = make(tmp_path/'l.sqlite', manifest(5)), Model()
    for n, (r, l) in enumerate([('a', 'skip'), ('a', {'biopsy': 1, 'mag': 0}), ('b', {'biopsy': 0, 'mag': 0})]):
        e = Event('c', n, r, IMAGES[0], l, time=f'2025-01-01T00:00:0{n}.000Z')
        store.add(e)
        model.events['c', n] = e
    check(store, model)
    model.events.pop(('c', 2))
    with pytest.raises(AssertionError): check(store, model)


# ---- many at once, and sudden ends

WRITER = '''
import sys; from pathlib import Path
from mammo_nb.core.settings import load_settings; from mammo_nb.labels.store import LabelStore, Event
store = LabelStore(sys.argv[1], load_settings(sys.argv[2])); ids = store.images()['image_id'].to_list()
for n in range(int(sys.argv[4])):
    store.add(Event(sys.argv[3], n, sys.argv[3], ids[n % len(ids)], ('mag',) if n % 2 else ()))
    print(n, flush=True)
'''


def writer(path, client, n):
    return subprocess.Popen([sys.executable, '-c', WRITER, str(path), str(S.root/'settings.ini'), client, str(n)], stdout=subprocess.PIPE, text=True)


def test_threads_and_processes_together(store):
    procs, ids = [writer(store.path, f'proc{k}', 30) for k in range(2)], store.images()['image_id']
    def work(k):
        for n in range(40): store.add(Event(f'thread{k}', n, f'thread{k}', ids[n % 12], ()))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(p.wait(60) == 0 for p in procs)
    for p in procs: p.stdout.close()
    assert dict(store._all('SELECT client, count(*) FROM events GROUP BY client')) == dict(thread0=40, thread1=40, thread2=40, proc0=30, proc1=30)


def test_sigkill_loses_nothing_acknowledged(store):
    p = writer(store.path, 'victim', 100000)
    acked = [int(p.stdout.readline()) for _ in range(25)]
    p.send_signal(signal.SIGKILL)
    acked += [int(x) for x in p.stdout.read().split('\n')[:-1]]
    p.wait()
    p.stdout.close()
    kept = [n for n, in store._all("SELECT seq FROM events WHERE client = 'victim' ORDER BY seq")]
    assert kept[:len(acked)] == acked and len(kept) <= len(acked) + 1
    assert store._one('PRAGMA integrity_check')[0] == 'ok'


# ---- trouble in one sentence


def test_locked(store):
    with LabelStore(store.path, S, timeout=.1) as other:
        with store._write():
            with pytest.raises(StoreError, match='in use by another program'): other.label(f'{0:016x}', (), 'a')
        other.label(f'{0:016x}', (), 'a')


def test_read_only(store):
    store._all('PRAGMA query_only = ON')
    with pytest.raises(StoreError, match="can't be written"): store.label(f'{0:016x}', (), 'a')


def test_full_disk(store):
    store._all(f"PRAGMA max_page_count = {store._one('PRAGMA page_count')[0]}")
    with pytest.raises(StoreError, match='full'):
        for n in range(5000): store.label(f'{n%12:016x}', (), 'a' * 60)
    before = len(store.history('a' * 60))
    store._all('PRAGMA max_page_count = 100000')
    store.label(f'{0:016x}', (), 'a' * 60)
    assert len(store.history('a' * 60)) == before + 1


@pytest.mark.parametrize('content', [b'no database at all' * 100, b'SQLite format 3\0' + bytes(4000)])
def test_not_a_database(tmp_path, content):
    (tmp_path/'l.sqlite').write_bytes(content)
    with pytest.raises(StoreError, match='damaged'): LabelStore(tmp_path/'l.sqlite', S)


def test_damaged_middle(tmp_path):
    with make(tmp_path/'l.sqlite', manifest(3000)) as s: s.set_queue('q', s.images()['image_id'])
    data = bytearray((tmp_path/'l.sqlite').read_bytes())
    data[4096*3:-4096] = b'\xa5' * len(data[4096*3:-4096])
    (tmp_path/'l.sqlite').write_bytes(data)
    with pytest.raises(MammoError) as e, LabelStore(tmp_path/'l.sqlite', S) as s: s.images(), s.label(f'{0:016x}', (), 'a')
    assert 'damaged' in str(e.value) and str(e.value).count('\n') == 0


def test_missing_folder_newer_version_closed(tmp_path):
    with pytest.raises(StoreError, match='1_preprocess'): LabelStore(tmp_path/'nowhere'/'labels.sqlite', S)
    s = make(tmp_path/'l.sqlite')
    s._all('PRAGMA user_version = 99')
    s.close()
    with pytest.raises(StoreError, match='was closed'): s.labels()
    with pytest.raises(StoreError, match='newer'): LabelStore(tmp_path/'l.sqlite', S)


# ---- images and queues


def test_sync_is_idempotent_takes_moves_and_refuses_new_splits(store):
    m = manifest()
    assert store.sync_images(m) == 0
    moved = m.with_columns(pl.when(pl.col('image_id') == f'{0:016x}').then(pl.lit('elsewhere.dcm')).otherwise('path').alias('path'))
    assert store.sync_images(moved) == 1 and len(store.images()) == 12 and view(store, f"id = '{0:016x}'")[0]['filename'] == 'elsewhere.dcm'
    with pytest.raises(StoreError, match='frozen'): store.sync_images(m.with_columns(pl.lit('train').alias('split')))
    bad = m.with_columns(status=pl.lit('rejected'), image_id=pl.col('image_id') + 'x')
    assert store.sync_images(bad) == 0
    with pytest.raises(StoreError, match="no column 'split'"): store.sync_images(m.drop('split'))


def test_queues(store):
    ids = store.images()['image_id'].to_list()
    store.set_queue('round-001', ids[:3]), store.set_queue('round-001', ids[1:4]), store.set_queue('mine', [ids[11], ids[0], ids[0]])
    assert store.queue('round-001') == ids[1:4] and store.queue('mine') == [ids[11], ids[0]]
    assert store.queues()[:2] == ['mine', 'round-001'] and store._one('SELECT count(*) FROM queues')[0] == 3
    with pytest.raises(StoreError, match='hold-out'): store.set_queue('round-002', ids)
    with pytest.raises(StoreError, match='not in this cohort'): store.set_queue('x', ['?'])
    for name in ('hold_out', 'skipped', 'disagreements', ''):
        with pytest.raises(StoreError, match="can't be named"): store.set_queue(name, ids[:1])
    with pytest.raises(StoreError, match='There is no queue'): store.queue('round-009')


def test_hold_out_order_is_random_and_stable(tmp_path):
    with make(tmp_path/'l.sqlite', manifest(400, hold_out=200)) as s:
        q = s.queue('hold_out')
        assert sorted(q) == [f'{i:016x}' for i in range(200, 400)] and q == s.queue('hold_out')
        rank = np.argsort(np.argsort(q))
        assert abs(np.corrcoef(rank, np.arange(200))[0, 1]) < .2  # unrelated to the order of the files
        s.set_predictions(pl.DataFrame(dict(image_id=q, prob_biopsy=np.linspace(0, 1, 200), prob_mag=np.linspace(1, 0, 200))))
        assert s.queue('hold_out') == q  # and to what a model says


def test_predictions_newest_shows_older_stay(store):
    i = store.images()['image_id'][0]
    store.set_predictions(pl.DataFrame(dict(image_id=[i, 'unknown'], prob_biopsy=[.1, .1], prob_mag=[.2, .2])), 'm1')
    store.set_predictions(pl.DataFrame(dict(image_id=[i], biopsy=[.7], mag=[.8])), 'm2')
    assert store.predictions() == store.predictions([i, '?']) == {i: {'biopsy': .7, 'mag': .8}} and store.predictions([]) == {} and store._one('SELECT count(*) FROM predictions')[0] == 2
    row = view(store, 'predicted_at IS NOT NULL')
    assert len(row) == 1 and (row[0]['confidence_biopsy'], row[0]['confidence_mag']) == (.7, .8)
    with pytest.raises(StoreError, match='prob_biopsy, prob_mag'): store.set_predictions(pl.DataFrame(dict(image_id=[i])))


def test_newest_page_holds_the_lease(store):
    assert store.lease('a') is None
    store.take_lease('a', 'p1'), store.take_lease('b', 'p9'), store.take_lease('a', 'p2')
    with LabelStore(store.path, S) as other: assert (other.lease('a'), other.lease('b'), other.store_id) == ('p2', 'p9', store.store_id)


# ---- CSV


def test_csv_round_trip(tmp_path, store):
    rng, ids = random.Random(1), store.images()['image_id'].to_list()
    for i in ids[:9]: store.label(i, rng.choice([(), ('mag',), ('biopsy', 'mag')]), 'a, "b"\n')
    store.label(ids[9], {'mag': 1}, 'c'), store.label(ids[10], 'skip', 'c')
    assert store.export_csv(tmp_path/'o.csv') == 10
    with make(tmp_path/'twin.sqlite') as twin:
        r = twin.import_csv(tmp_path/'o.csv')
        assert (r.added, r.known, r.bad) == (10, 0, []) and twin.snapshot_hash() == store.snapshot_hash()
        cols = ['image_id', *S.columns, 'labeled_at', 'rater']
        assert twin.labels().select(cols).rows() == store.labels().select(cols).rows()
        assert twin.import_csv(tmp_path/'o.csv')[:2] == (0, 10)  # twice is once
        twin.export_csv(tmp_path/'o2.csv')
        strip = lambda p: pl.read_csv(p).drop('source').rows()
        assert strip(tmp_path/'o2.csv') == strip(tmp_path/'o.csv')
    assert sorted(p.name for p in tmp_path.glob('*o*.csv')) == ['o.csv', 'o2.csv']


def test_csv_bad_rows_are_named_by_line(tmp_path, store):
    i = store.images()['image_id'].to_list()
    (tmp_path/'x.csv').write_text('\ufefffilename,frame_number,has_mag_view,has_biopsy_tool,rater\n'  # 1
        'p0/0.dcm,0,yes,no,\n'            # 2 good
        'p0/1.dcm,,1,,zoe\n'              # 3 good, one finding only
        'p0/9.dcm,0,1,0,\n'               # 4 unknown
        'p0/2.dcm,0,perhaps,0,\n'         # 5 bad value
        'p0/2.dcm,0,,,\n'                 # 6 says nothing
        'p0/2.dcm,0,1\n'                  # 7 too few
        'p0/2.dcm,0,1,0,a,b\n'            # 8 too many
        'p0/0.dcm,0,0,0,\n'               # 9 twice
        'p0/2.dcm,x,1,0,\n'               # 10 frame
        'p0/3.dcm,0,FALSE,True,\n')       # 11 good
    r = store.import_csv(tmp_path/'x.csv', rater='old')
    assert r.added == 3 and [l for l, _ in r.bad] == [4, 5, 6, 7, 8, 9, 10]
    assert {(x[0], *x[1:]) for x in store.labels().select('image_id', *S.columns, 'rater').rows()} == {(i[0], 0, 1, 'old'), (i[1], None, 1, 'zoe'), (i[3], 1, 0, 'old')}


@pytest.mark.parametrize('content, words', [(b'\xff\xfe\x00', 'UTF-8'), (b'', 'none of the columns'), (b'a,b\n1,2\n', 'none of the columns'),
                                            (b'has_mag_view\n1\n', 'image_id nor a filename')])
def test_csv_unusable(tmp_path, store, content, words):
    (tmp_path/'x.csv').write_bytes(content)
    with pytest.raises(StoreError, match=words): store.import_csv(tmp_path/'x.csv')
    with pytest.raises(StoreError, match="can't be read"): store.import_csv(tmp_path/'none.csv')

    with pytest.raises(MammoError): store.export_csv(tmp_path)


# ---- agreement and the oracle


def test_kappa_by_hand_and_interval(tmp_path):
    with make(tmp_path/'l.sqlite', manifest(50, per_patient=1, hold_out=5)) as s:
        table = [('biopsy', 'biopsy')] * 20 + [('biopsy', None)] * 5 + [(None, 'biopsy')] * 10 + [(None, None)] * 15
        for i, (a, b) in zip(s.images()['image_id'], table):
            s.label(i, (a,) if a else (), 'a'), s.label(i, (b,) if b else (), 'b')
        k = s.kappa('biopsy').row(0, named=True)
        assert (k['rater_a'], k['rater_b'], k['images'], k['agreement']) == ('a', 'b', 50, .7) and abs(k['kappa'] - .4) < 1e-12
        se = np.sqrt(.7 * .3 / (50 * .5**2))  # the textbook's large-sample error for this table
        assert abs(k['low'] - (.4 - 1.96*se)) < .06 and abs(k['high'] - (.4 + 1.96*se)) < .06
        m = s.kappa('mag').row(0, named=True)  # both said no 50 times: agreement is full, kappa undefined
        assert m['agreement'] == 1 and m['kappa'] is None and m['low'] is None
        assert len(s.disagreements()) == 15
        with pytest.raises(StoreError): s.kappa('clip')


def test_kappa_needs_common_images(store):
    store.label(f'{0:016x}', (), 'a'), store.label(f'{1:016x}', (), 'b')
    assert store.kappa('mag').is_empty() and store.disagreements().is_empty()


def test_oracle(tmp_path):
    m, rng = manifest(1000, hold_out=100), np.random.default_rng(0)
    truth = m.select('image_id').with_columns(has_biopsy_tool=pl.Series(rng.integers(0, 2, 1000)), has_mag_view=pl.Series(rng.integers(0, 2, 1000)))
    truth[:900].write_parquet(tmp_path/'truth.parquet')
    ids = m['image_id'].to_list()
    with make(tmp_path/'l.sqlite', m) as s:
        o = Oracle(s, tmp_path/'truth.parquet')
        assert o.label(ids[:500], queue='round-001') == 500 and o.label(ids[:500]) == 0 and o.label(ids) == 400
        assert s.labels().select('image_id', *S.columns).rows() == truth[:900].rows()
        noisy = Oracle(s, tmp_path/'truth.parquet', error_rate=.1, seed=3)
        noisy.label(ids, rater='noisy')
        assert noisy.answer(ids[0]) == Oracle(s, tmp_path/'truth.parquet', error_rate=.1, seed=3).answer(ids[0])
        wrong = (s.labels('noisy').select(S.columns).to_numpy() != truth[:900].select(S.columns).to_numpy()).mean(0)
        assert ((wrong > .06) & (wrong < .14)).all()
        assert abs(s.kappa('biopsy').row(0, named=True)['kappa'] - .8) < .08
        with pytest.raises(StoreError, match='no such file'): Oracle(s, tmp_path/'x.parquet')
        with pytest.raises(StoreError, match='between 0 and 1'): Oracle(s, tmp_path/'truth.parquet', error_rate=2)
        m.write_parquet(tmp_path/'t2.parquet')
        with pytest.raises(StoreError, match='has_biopsy_tool'): Oracle(s, tmp_path/'t2.parquet')


def test_snapshot_hash_follows_labels_only(tmp_path, store):
    empty = store.snapshot_hash()
    store.label(f'{0:016x}', ('mag',), 'a')
    one = store.snapshot_hash()
    store.undo('a')
    assert store.snapshot_hash() == empty != one
    store.label(f'{0:016x}', ('mag',), 'someone else')
    assert store.snapshot_hash() == one
