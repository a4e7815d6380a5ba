"The reviewer's kernel side: which studies, what is written, what the hold-out keeps to itself, the list as CSV; and what it is where no page is."
import base64
import json
import shutil
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from conftest import executed, mammo
from labeler_page import ROOT, image_id, make_cohort
from review_page import review_cell, review_cohort, studies_of
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.labels.review import MOST, Reviewer, hanging_order, review_list, reviewed, write_reviewed_csv
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn.data import labelled_frame

S = load_settings(ROOT/'settings.ini')


@pytest.fixture
def cohort(tmp_path): return review_cohort(tmp_path/'demo_b', rows=80, cols=64)


class Ear:
    "A reviewer whose messages are kept instead of sent, and a page that presses keys"
    def __init__(self, cohort, rater='anna', client='p1', **kw):
        p = pl.read_parquet(cohort/'predictions.parquet')
        kw = dict(studies=review_list(studies_of(p), S, borderline=1), predictions=p) | kw
        self.w, self.heard, self.client, self.seq = Reviewer(cohort, kw.pop('settings', S), rater, **kw), [], client, 0
        self.w.send = lambda content, buffers=None: self.heard.append((content, buffers))

    def ask(self, do, **m):
        self.heard.clear()
        self.w._on_message(self.w, dict(m, do=do, client=self.client), [])
        return [m for m, _ in self.heard]

    def events(self, second, *labels, **kw):
        "Events of one press"
        out = []
        for i, label in labels:
            self.seq += 1
            out.append(dict(client=self.client, seq=self.seq, image_id=i, label=label, time=f'2030-01-01T00:00:{second:02}Z', ms=700, queue='review', saw_model=True) | kw)
        return out

    def agree(self, k, second):
        "What `a` sends in study `k`"
        s = self.ask('hello', take=True)[-1]
        return self.events(second, *[(i, s['images'][i]['says']) for i in s['studies'][k]['ids'] if i not in s['mine']])

    def send(self, events): return self.ask('events', events=events)[0]

    def wait(self, n, seconds=20):
        "The first `n` messages that come by themselves"
        end = time.monotonic() + seconds
        while len(self.heard) < n:
            assert time.monotonic() < end, f'{len(self.heard)} of {n} messages'
            time.sleep(.01)
        return self.heard[:n]


# ---- which studies, in which order

def test_list_holds_the_flagged_and_then_the_nearest(cohort):
    studies = pl.read_parquet(cohort/'studies.parquet')
    l = review_list(studies, S, borderline=2)
    assert l['study_id'].to_list()[:4] == ['1.2.840.4', '1.2.840.0', '1.2.840.1', '1.2.840.2'] and l['kind'].to_list() == ['flagged']*3 + ['borderline']*2
    assert l['finding'].to_list()[:4] == ['biopsy', 'biopsy', 'mag', 'biopsy'] and l['prob'][2] == .88
    between = studies.with_columns(decision_biopsy=pl.when(study_id='1.2.840.3').then(pl.lit('review')).otherwise(pl.lit('clear')))
    assert review_list(between, S)['study_id'].to_list()[3:] == ['1.2.840.3']                                     # two thresholds say what is borderline
    assert review_list(studies, S, thresholds=[.95, .9], borderline=0).height == 3                                # the flags are stage 4's
    by_size = review_list(studies.with_columns(image_count=pl.Series([4, 4, 40, 4, 4, 4])), S, lambda n: dict(biopsy=.9 if n < 9 else .5, mag=.8))
    assert by_size['study_id'][3] == '1.2.840.2' and by_size['threshold'].to_list()[:4] == [.8, .9, .9, .5]
    nothing = studies.with_columns(max_prob_biopsy=None, max_prob_mag=None)
    assert review_list(nothing, S).height == 0


def test_hanging_order():
    order = lambda *views: [v for _, v in hanging_order(list(enumerate(views)))]
    assert order('L-MLO', 'R-MLO', 'L-CC', 'R-CC') == ['R-CC', 'L-CC', 'R-MLO', 'L-MLO']
    assert order('', 'L-CC', 'L-CC', 'R-ML', 'R-CC', 'L-ML') == ['R-CC', 'L-CC', 'L-CC', 'R-ML', 'L-ML', '']
    assert hanging_order([(0, None), (1, 'L-MLO')]) == [(1, 'L-MLO'), (0, None)] and hanging_order([]) == []


def test_a_large_study_shows_its_most_suspicious_images(tmp_path):
    c = make_cohort(tmp_path/'c', n=40, hold_out=4, rows=40, cols=32)
    p = pl.DataFrame([dict(image_id=image_id(i), path=f'{i:03}.dcm', frame=0, study_id='one', status='ok', prob_biopsy=.9 - i/100, prob_mag=.01) for i in range(30)])
    w = Reviewer(c, S, 'anna', ['one'], p)
    s, = w._list
    assert len(s['ids']) == MOST and s['of'] == 30 and set(s['ids']) == {image_id(i) for i in range(MOST)} and s['kind'] == 'chosen'


# ---- the conversation

def test_page_learns_what_it_shows_and_nothing_else(cohort):
    e = Ear(cohort)
    lease, init = e.ask('hello', take=True)
    assert [s['why'] for s in init['studies']] == ['flagged: Biopsy tool 0.97, Magnification view 0.60', 'flagged: Biopsy tool 0.93', 'flagged: Magnification view 0.88',
                                                   'borderline: Biopsy tool 0.47, threshold 0.50']
    assert [s['held'] for s in init['studies']] == [True, False, False, False] and [int(i, 16) for i in init['studies'][1]['ids']] == [1, 0, 3, 2]
    assert init['images'][image_id(1)]['says'] == ['biopsy'] and init['images'][image_id(0)]['says'] == [] and not init['explains'] and init['queue'] == 'review'
    assert not any(x in json.dumps([init, lease]) for x in ('patient-', '1.2.840', '.dcm'))
    assert 'not in' in e.ask('images', ids=['nonsense', image_id(1)])[0].get('error', 'not in') and e.heard[-1][1][0][1:4] == b'PNG'
    assert e.ask('model', id=image_id(1)) == []         # a question of the labeler's


def test_agree_is_the_models_answer_image_by_image_and_one_undo_takes_it_back(cohort):
    e = Ear(cohort)
    ack = e.send(agree := e.agree(1, 1))
    assert len(ack['acks']) == 4 and e.send(agree)['acks'] == ack['acks']               # sent again: nothing new
    rows = e.w.store._all('SELECT image_id, saw_model, queue, source FROM events')
    assert len(rows) == 4 and {r[1:] for r in rows} == {(1, 'review', 'human')}
    assert e.w.store.labels().select('image_id', 'has_biopsy_tool', 'has_mag_view').rows() == [(image_id(i), int(i == 1), 0) for i in range(4)]
    init = e.ask('hello', take=True)[-1]
    assert len({(h[0], h[4]) for h in init['history']}) == 1                            # one press, one time: what `u` takes back
    undo = e.events(2, *[(h[2], 'undo') for h in init['history']])
    for x, h in zip(undo, init['history']): x['undoes'] = h[:2]
    assert e.send(undo)['mine'] == {image_id(i): None for i in range(4)}
    assert e.w.store.labels().height == 0 and len(e.w.store.history('anna')) == 0


def test_a_label_given_before_stays(cohort):
    with LabelStore(cohort/'labels.sqlite', S) as s:
        s.label(image_id(0), ('mag',), 'anna', queue='round-001')
        s.label(image_id(2), 'skip', 'anna', queue='round-001')
        s.label(image_id(3), ('mag',), 'ben', queue='round-001')
    e = Ear(cohort)
    init = e.ask('hello', take=True)[-1]
    assert init['mine'] == {image_id(0): ('mag',)} and init['theirs'] == {image_id(3): ['mag']}     # a skip in the labeler is still to be answered here
    e.send(e.agree(1, 1))
    assert e.w.store.opinions('anna')[image_id(0)] == ('mag',) and e.w.store.opinions('anna')[image_id(2)] == ()
    assert e.w.store.queue('disagreements') == [image_id(3)]                                        # ben said otherwise: somebody settles it
    assert e.w.reviewed('anna').filter(study_id='1.2.840.0')['outcome'].item() == 'corrected'


def test_a_killed_kernel_loses_nothing_that_was_acked_and_takes_the_rest_again(cohort):
    first = Ear(cohort)
    a, b = first.agree(1, 1), first.events(2, (image_id(6), []))
    first.send(a)
    first.w.store._db.close()                           # gone, without a word
    second = Ear(cohort, client='p2')
    ack, _, init = second.ask('hello', take=True, events=[*a, *b])      # what the page still holds, sent again by the reloaded page
    assert len(ack['acks']) == 5 and len(init['mine']) == 5 and init['holder'] == 'p2' and len(init['history']) == 5
    assert second.w.store._one('SELECT count(*) FROM events')[0] == 5


def test_a_press_is_one_transaction(cohort, monkeypatch):
    e = Ear(cohort)
    a = e.agree(1, 1)
    e.w.store._all('PRAGMA query_only = ON')
    ack = e.send(a)
    assert not ack['acks'] and "can't be written" in ack['error']
    e.w.store._all('PRAGMA query_only = OFF')
    a[2] = a[2] | dict(image_id='f'*16)
    ack = e.send(a)
    assert len(ack['acks']) == 3 and ack['refused'][0][1] == a[2]['seq']


# ---- the hold-out keeps its own counsel

def test_what_is_said_of_hold_out_images_decides_nothing(cohort):
    blind = [(17, ('biopsy',)), (16, ())]
    with LabelStore(cohort/'labels.sqlite', S) as s:
        for i, l in blind: s.label(image_id(i), l, 'anna', queue='hold_out')
        before, snapshot = s.labels(), s.snapshot_hash()
    e = Ear(cohort)
    ids = e.ask('hello', take=True)[-1]['studies'][0]['ids']
    e.send(e.events(1, *[(i, ['mag']) for i in ids]))
    s = e.w.store
    assert s.labels().equals(before) and s.snapshot_hash() == snapshot and s.labels(blind=True).equals(before)
    assert s.opinions('anna')[image_id(17)] == ('biopsy',) and s.opinions('anna', 'review')[image_id(17)] == ('mag',)
    assert e.ask('hello', take=True)[-1]['mine'] == {i: ('mag',) for i in ids} and s.kappa('biopsy').height == 0
    row = e.w.reviewed('anna').row(0, named=True)
    assert row['outcome'] == 'corrected' and row['reviewed_biopsy'] == 0 and row['reviewed_mag'] == 1               # it is in the list, though
    e.send([x | dict(label='undo', undoes=[x['client'], x['seq'] - 4]) for x in e.events(2, *[(i, 'undo') for i in ids])])
    assert s.opinions('anna', 'review')[image_id(17)] == ('biopsy',) and s.labels().equals(before)


def test_a_correction_feeds_the_next_round_and_blind_labels_alone_score(cohort):
    manifest = pl.read_parquet(cohort/'predictions.parquet').with_columns(patient_id='study_id')
    with LabelStore(cohort/'labels.sqlite', S) as s: s.label(image_id(1), (), 'ben', queue='round-001', source='oracle')
    e = Ear(cohort)
    e.send(e.events(1, (image_id(1), ['mag']), (image_id(17), ['mag'])))
    frame = labelled_frame(manifest, e.w.store.labels(), S)
    assert frame.select('image_id', 'split', 'has_biopsy_tool', 'has_mag_view').rows() == [(image_id(1), 'train', 0, 1)]
    assert e.w.store.labels(blind=True).select('image_id', 'has_mag_view', 'source').rows() == [(image_id(1), 0, 'oracle')]


# ---- the list as CSV

def test_reviewed_list(cohort, tmp_path):
    e = Ear(cohort)
    e.send(e.agree(1, 1))
    e.send(e.events(2, (image_id(6), [])))
    e.send(e.events(3, *[(image_id(i), 'skip') for i in range(16, 20)]))
    ben = Ear(cohort, 'ben', 'p9')
    ben.send(ben.events(4, (image_id(0), [])))
    df = e.w.reviewed()
    assert df.columns == ['study_id', 'kind', 'model_biopsy', 'model_mag', 'max_prob_biopsy', 'max_prob_mag', 'reviewed_biopsy', 'reviewed_mag', 'outcome', 'rater', 'reviewed_at',
                          'images', 'images_labelled']
    got = df.select('study_id', 'outcome', 'rater', 'reviewed_biopsy', 'reviewed_mag', 'images_labelled').rows()
    assert got == [('1.2.840.4', 'skipped', 'anna', None, None, 0), ('1.2.840.0', 'agreed', 'anna', 1, 0, 4), ('1.2.840.0', 'partly', 'ben', None, None, 1),
                   ('1.2.840.1', 'corrected', 'anna', None, None, 1), ('1.2.840.2', 'unseen', None, None, None, 0)]
    assert df['reviewed_at'][1] == '2030-01-01T00:00:01.000Z'
    path = e.w.export()
    assert path == cohort/'reviewed.csv' and not list(cohort.glob('*.tmp'))
    back = pl.read_csv(path)
    assert back['study_id'].to_list() == df['study_id'].to_list() and back['model_mag'].to_list() == [1, 0, 0, 1, 0] and 'anna' in path.read_text()
    p = pl.read_parquet(cohort/'predictions.parquet')
    nobody = reviewed(tmp_path/'nowhere', S, review_list(studies_of(p), S), p)
    assert set(nobody['outcome']) == {'unseen'} and write_reviewed_csv(nobody, tmp_path/'r.csv') == nobody.height
    said, = e.ask('export')
    assert said['rows'] == 5 and said['text'] == 'reviewed.csv written: 3 of 4 studies reviewed' and str(cohort) not in said['text']


def test_a_full_disk_is_said(cohort):
    e = Ear(cohort, csv=cohort/'labels.sqlite'/'x.csv')
    m, = e.ask('export')
    assert m['re'] == 'error' and m['text']


# ---- pictures and heat

def test_a_cohort_that_was_only_inferred_is_read_from_its_files(tmp_path):
    c = review_cohort(tmp_path/'demo_b', dicom=True, thumbnails=False)
    e = Ear(c, settings=S.model_copy(update=dict(image=S.image.model_copy(update=dict(thumbnail_size=320)))))
    assert (c/'labels.sqlite').exists() and len(e.w.store.images()) == 24              # made from the manifest
    (tmp_path/'dicom'/'0.dcm').write_bytes(b'')
    me = threading.get_ident()
    reads = []
    path_of = e.w.pictures.path_of
    e.w.pictures.path_of = lambda i: (reads.append(threading.get_ident()), path_of(i))[1]
    e.ask('images', ids=[image_id(1), image_id(0), image_id(3)])
    got = {m['id']: (m, b) for m, b in e.wait(3)}
    png = cv2.imdecode(np.frombuffer(got[image_id(1)][1][0], np.uint8), cv2.IMREAD_UNCHANGED)
    assert png.shape == (320, 256) and png.std() > 20 and got[image_id(1)][0]['rows'] == 1280 and 'error' in got[image_id(0)][0]
    assert len(reads) == 3 and me not in reads                                          # beside the conversation
    e.ask('images', ids=[image_id(1)])
    e.wait(1)
    assert len(reads) == 3


def test_heat_on_demand_and_words_where_there_is_none(cohort):
    asked = []
    def cam(i, finding):
        asked.append((i, finding))
        if finding == 'mag': return None
        if i == image_id(2): raise MammoError('this bundle has no map')
        if i == image_id(3): raise ValueError('x')
        return np.full((600, 480), 200, np.uint8)
    e = Ear(cohort, cam=cam)
    assert e.ask('hello', take=True)[-1]['explains'] and asked == []
    e.ask('heat', ids=[image_id(i) for i in range(4)], finding='biopsy')
    got = {m['id']: (m, b) for m, b in e.wait(4)}
    png = cv2.imdecode(np.frombuffer(got[image_id(0)][1][0], np.uint8), cv2.IMREAD_UNCHANGED)
    assert png.shape == (384, 307) and (png == 200).all()                               # small: it is smooth anyway
    assert got[image_id(2)][0]['reason'] == 'this bundle has no map' and 'ValueError' in got[image_id(3)][0]['reason']
    e.ask('heat', ids=[image_id(0)], finding='mag')
    assert 'cannot say' in e.wait(1)[0][0]['reason']


def test_own_keys_are_not_the_studys(cohort, tmp_path):
    for key in 'acn':
        (tmp_path/'s.ini').write_text((ROOT/'settings.ini').read_text().replace('4 = biopsy + mag', f'{key} = biopsy + mag'))
        with pytest.raises(MammoError, match=rf'\[keys\] {key} is needed by the reviewer'): Ear(cohort, settings=load_settings(tmp_path/'s.ini'))
    with pytest.raises(MammoError, match="rater's name"): Ear(cohort, rater=' ')


# ---- no page

@pytest.mark.parametrize('how', ['papermill', 'nbconvert'])
def test_a_sheet_and_never_a_dead_widget(cohort, tmp_path, how):
    e = Ear(cohort)
    e.send(e.agree(1, 1))
    text = executed(review_cell(cohort), tmp_path, how)
    shown, = [o['data'] for c in json.loads(text)['cells'] for o in c['outputs'] if 'image/png' in o.get('data', {})]
    assert 'widget-view' not in text and 'review: 1 of 4 studies seen (agreed 1), 3 to go' in ''.join(shown['text/plain'])
    png = base64.b64decode(''.join(shown['image/png']))
    assert len(png) < 150_000 and (cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) > 240).any()


def test_viewers_without_widgets_get_the_sheet_beside_the_widget(cohort, monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', 'x.ipynb')
    assert {'application/vnd.jupyter.widget-view+json', 'image/png', 'text/plain'} <= set(Ear(cohort).w._repr_mimebundle_())


def test_page_files_are_packaged():
    import mammo_nb.labels
    from mammo_nb.labels.widget import Labeler
    static = Path(mammo_nb.labels.__file__).parent/'static'
    names = {p.name for p in static.iterdir()}
    assert {'shared.js', 'widget.js', 'review.js', 'widget.css', 'review.css'} <= names
    for w, last in ((Labeler, 'widget.js'), (Reviewer, 'review.js')): assert str(w._esm).startswith((static/'shared.js').read_text()[:80]) and str(w._esm).endswith((static/last).read_text())


# ---- a page of its own

def test_served_page(cohort, tmp_path):
    from mammo_nb.labels.serve import main, page_notebook, serve_labeler
    code = page_notebook(cohort, 'zoe', ROOT/'settings.ini', review=True, bundle='b/001')['cells'][0]['source']
    compile(code, 'cell', 'exec')
    assert 'open_review(job(' in code and "'zoe'" in code and repr(str(cohort.parent)) in code and "bundle='b/001'" in code
    assert 'Labeler(' in page_notebook(cohort, 'zoe', ROOT/'settings.ini')['cells'][0]['source']
    pytest.importorskip('voila')
    with pytest.raises(MammoError, match='Nothing to review'): serve_labeler(cohort.name, 'zoe', str(ROOT/'settings.ini'), outputs=str(cohort.parent), review=True)
    assert main([cohort.name, '--rater', 'zoe', '--review', '--outputs', str(cohort.parent), '--settings', str(ROOT/'settings.ini')]) == 1


# ---- the stage

def test_stage_with_a_rater_writes_the_list_and_scores_by_blind_labels_only(project, tmp_path):
    root = tmp_path/'study'
    shutil.copytree(project, root)
    b = root/'outputs'/'demo_b'
    from mammo_nb.core.run import job
    from mammo_nb.review import open_review
    j = job('demo_b', outputs=str(root/'outputs'), settings=str(root/'settings.ini'))
    plain = json.loads(sorted(b.glob('runs/*-review/metrics.json'))[-1].read_text())
    w = open_review(j, 'anna')
    s = w._list[0]
    for i in s['ids']: w.store.label(i, tuple(w._says[i][1]), 'anna', queue='review', saw_model=True)
    assert w.cam(s['ids'][0], s['finding']).shape == w.pictures.get(s['ids'][0]).shape         # the bundle explains itself
    w.close()
    done = mammo('run', 'review', '-p', 'cohort=demo_b', '-p', 'rater=anna', cwd=root)
    assert done.returncode == 0, done.stderr
    run = sorted(b.glob('runs/*-review'))[-1]
    got, text = json.loads((run/'metrics.json').read_text()), (run/'5_review.ipynb').read_text()
    assert got['reviewed'] == 1 and got['labelled'] == plain['labelled'] and got['accuracy'] == plain['accuracy'], 'what was said with the model in sight scores nothing'
    assert 'widget-view' not in text and 'rater anna · review: 1 of' in text and '<script' not in (run/'report.html').read_text()
    df = pl.read_csv(next(b.glob('predictions/*/reviewed.csv')))
    assert df['outcome'].to_list().count('agreed') == 1 and df.height == w.studies.height and set(df['kind']) <= {'flagged', 'borderline'}
