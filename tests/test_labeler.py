"The labeler's kernel side, and what it is where no page is: papermill, nbconvert, viewers without widgets."
import base64
import json
import os
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from conftest import executed
from labeler_page import ROOT, image_id, labeler_cell, make_cohort
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.labels.store import LabelStore
from mammo_nb.labels.widget import Labeler, has_page

S = load_settings(ROOT/'settings.ini')


@pytest.fixture
def cohort(tmp_path): return make_cohort(tmp_path/'demo_a', n=24, hold_out=8, rows=80, cols=64)


class Ear:
    "A labeler whose messages are kept instead of sent"
    def __init__(self, *args, **kw):
        self.label, self.heard = Labeler(*args, **kw), []
        self.label.send = lambda content, buffers=None: self.heard.append((content, buffers))

    def ask(self, do, client='p1', **m):
        self.heard.clear()
        self.label._on_message(self.label, dict(m, do=do, client=client), [])
        return [m for m, _ in self.heard]


def press(seq, n, label=('mag',), **kw): return dict(client='p1', seq=seq, image_id=image_id(n), label=label if isinstance(label, str) else list(label),
                                                     time=f'2030-01-01T00:00:{seq:02}Z', ms=500, queue='round-001', saw_model=False) | kw


def test_hello_commits_leftovers_first_and_tells_all(cohort):
    e = Ear(cohort, S, 'anna')
    ack, lease, init = e.ask('hello', take=True, events=[press(1, 0), press(2, 1, 'skip')])
    assert ack['re'] == 'ack' and ack['acks'] == [('p1', 1), ('p1', 2)] and lease == dict(re='lease', to=None, holder='p1') and init['to'] == 'p1'
    assert init['mine'] == {image_id(0): ('mag',), image_id(1): 'skip'} and len(init['ids']) == 16 and init['holder'] == 'p1' and not init['blind']
    assert init['studies'][5] == (2, 2, 4) and init['views'][2] == 'L-MLO' and init['history'][0] == ('p1', 1, image_id(0), ('mag',))
    text = json.dumps([init, ack])
    assert not any(x in text for x in ('patient-', '1.2.840', '.dcm'))   # neither patients nor studies nor files
    assert e.ask('hello', 'p2', queue='hold_out', take=False)[0]['blind']


def test_events_are_acked_once_stored_and_refused_in_words(cohort):
    e = Ear(cohort, S, 'anna')
    assert e.ask('events', events=[press(1, 0), press(1, 0)])[0]['acks'] == [('p1', 1)] * 2
    a = e.ask('events', events=[press(2, 1), dict(client='p1', seq=3), press(4, 99), press(5, 2, ('clip',)), press(6, 3)])[0]
    assert a['acks'] == [('p1', 2), ('p1', 6)] and [r[1] for r in a['refused']] == [3, 4, 5] and a['error'] is None
    e.label.store._all('PRAGMA query_only = ON')
    a = e.ask('events', events=[press(7, 4)])[0]
    assert not a['acks'] and not a['refused'] and "can't be written" in a['error']     # the page keeps it and tries again
    e.label.store._all('PRAGMA query_only = OFF')
    a = e.ask('events', events=[press(7, 4), press(8, 4, 'undo', undoes=['p1', 7])])[0]
    assert a['acks'] == [('p1', 7), ('p1', 8)] and a['mine'] == {image_id(4): None}


def test_whatever_breaks_is_said(cohort, monkeypatch):
    e = Ear(cohort, S, 'anna')
    assert e.ask('hello', queue='round-009')[0]['text'].startswith("There is no queue 'round-009'")
    monkeypatch.setattr(e.label.store, 'lease', lambda rater: 1/0)
    assert 'ZeroDivisionError' in e.ask('ping')[0]['text']
    assert e.ask('format_the_disk') == []
    img, = e.ask('images', ids=['nonsense'])
    assert "not in the cohort" in img['error']


def test_predictions_never_for_hold_out(cohort):
    e = Ear(cohort, S, 'anna')
    assert e.ask('model', id=image_id(0))[0]['probs'] == [('Biopsy tool', .91), ('Magnification view', .07)]
    assert 'never shown' in e.ask('model', id=image_id(20))[0]['reason']     # in whatever queue
    assert not any('prob' in json.dumps(m) for m in e.ask('hello', queue='round-001', take=True))


def test_queues_lists_and_studies_together(cohort):
    ids = [image_id(i) for i in (7, 0, 4, 1, 12)]
    one = Ear(cohort, S, 'anna', queue=ids)
    assert one.ask('hello', take=True)[-1]['ids'] == ids and Labeler(cohort, S, 'anna', queue=ids).queue == one.label.queue
    two = Labeler(cohort, S, 'anna', queue=ids, keep_studies=True)
    assert two.queue_ids(two.queue) == [image_id(i) for i in (7, 4, 0, 1, 12)]
    assert Labeler(cohort, S, 'anna').queue == 'round-001'
    for bad, words in ((dict(queue='nope'), 'There is no queue'), (dict(rater=' '), "rater's name")):
        with pytest.raises(MammoError, match=words): Labeler(cohort, S, **dict(rater='anna') | bad)


def test_reserved_keys(cohort, tmp_path):
    (tmp_path/'s.ini').write_text((ROOT/'settings.ini').read_text().replace('4 = biopsy + mag', 'm = biopsy + mag'))
    with pytest.raises(MammoError, match=r'\[keys\] m'): Labeler(cohort, load_settings(tmp_path/'s.ini'), 'anna')


def test_missing_cohort(tmp_path):
    with pytest.raises(MammoError): Labeler(tmp_path/'nowhere', S, 'anna')


def test_detail_is_the_file_at_full_size(tmp_path):
    c = make_cohort(tmp_path/'demo_a', n=4, hold_out=1, dicom=True)
    label = Labeler(c, S, 'anna')
    whole = label.detail.whole(image_id(1))
    assert whole.shape == (1280, 1024)
    png, x, y, w, h = label.detail.cut(image_id(1), .1, .2, .05, .1)
    part = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    x0, y0 = round(x*1024), round(y*1280)
    assert (part == whole[y0:y0+part.shape[0], x0:x0+part.shape[1]]).all() and x <= .1 and x + w >= .15 and y <= .2 and y + h >= .3
    small = cv2.imdecode(np.frombuffer(label.detail.cut(image_id(1), 0, 0, 1, 1, .25)[0], np.uint8), cv2.IMREAD_UNCHANGED)
    assert small.shape == (320, 256)
    wide = label.detail.whole(image_id(1), 'wide')
    assert wide.max() == 255 and np.median(wide) < 40 and whole[640, 1020] == 255
    assert len(label.detail._whole) == 2
    (tmp_path/'dicom'/'2.dcm').write_bytes(b'')
    with pytest.raises(MammoError): label.detail.cut(image_id(2), 0, 0, 1, 1)


def test_thumbnail_path_of_the_view_is_where_the_cache_keeps_it(cohort):
    with LabelStore(cohort/'labels.sqlite', S) as s:
        for i, path in s._all('SELECT id, thumbnail_path FROM labels'):
            store, name = (cohort/path).parent, (cohort/path).name
            assert name == i and (Thumbnails(store).get(name) == Thumbnails(cohort/'thumbnails').get(i)).all()


def test_where_a_page_is():
    assert not has_page({}) and has_page(dict(JPY_SESSION_NAME='a.ipynb')) and has_page(dict(SERVER_SOFTWARE='voila/0.5.8'))
    assert not has_page(dict(JPY_SESSION_NAME='a.ipynb', MAMMO_RUN_DIR='runs/1')) and not has_page(dict(JPY_SESSION_NAME='a.ipynb', MAMMO_STATIC='1'))


# ---- no page


def outputs(nb): return [o for c in nb['cells'] for o in c.get('outputs', [])]


def sheet_of(nb):
    "The contact sheet in a notebook that was executed without a page"
    shown = [o['data'] for o in outputs(nb) if 'image/png' in o.get('data', {})]
    assert len(shown) == 1 and 'application/vnd.jupyter.widget-view+json' not in json.dumps(nb)
    assert 'round-001: 1 of 16 done (mag 1), 15 to go' in ''.join(shown[0]['text/plain'])
    png = base64.b64decode(''.join(shown[0]['image/png']))
    assert len(png) < 150_000
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)


@pytest.mark.parametrize('how', ['papermill', 'nbconvert'])
def test_static_sheet_without_a_page(cohort, tmp_path, how):
    with LabelStore(cohort/'labels.sqlite', S) as s: s.label(image_id(0), ('mag',), 'anna', queue='round-001')
    img = sheet_of(json.loads(executed(labeler_cell(cohort), tmp_path, how)))
    assert (img > 240).any() and (img < 30).mean() > .3


def test_viewers_without_widgets_get_the_sheet_beside_the_widget(cohort, monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', 'x.ipynb')
    got = Labeler(cohort, S, 'anna')._repr_mimebundle_()
    assert {'application/vnd.jupyter.widget-view+json', 'image/png', 'text/plain'} <= set(got)
    assert not Path(os.getcwd(), 'x.ipynb').exists()


# ---- which images a round asks about


def made(folder, n):
    "A model, as far as the labelling stage looks"
    (folder/'rounds'/f'{n:03}').mkdir(parents=True)
    (folder/'rounds'/f'{n:03}'/'bundle.json').write_text('{}')


def test_rounds(tmp_path):
    from mammo_nb.label import label_table, next_round, pick_queue
    m = pl.DataFrame([dict(image_id=image_id(i), path=f'{i}.dcm', study_id=f's{i//4}', patient_id=f'p{i//4}', laterality='LR'[i % 2], frame=0, status='ok', view='L-CC',
                           split='hold_out' if i < 40 else 'valid' if i < 80 else 'train') for i in range(200)])
    split = dict(m.select('image_id', 'split').iter_rows())
    with LabelStore(tmp_path/'labels.sqlite', S) as s:
        s.sync_images(m)
        pick = lambda q='round': pick_queue(s, m, S, tmp_path, q, 12)
        assert pick() == pick() == 'round-001'              # run twice, or killed in between: the same questions
        one = s.queue('round-001')
        assert [split[i] for i in one].count('train') == 12 and [split[i] for i in one].count('valid') == 4 and 'hold_out' not in [split[i] for i in one]
        s.label(one[0], 'skip', 'anna')
        for i in one[1:]: s.label(i, ('mag',), 'anna', queue='round-001')
        assert pick() == 'round-001'                        # labelled, but nothing learnt from it yet
        made(tmp_path, 1), made(tmp_path, 2)                # trained, twice
        unsure = [image_id(i) for i in range(150, 200)]
        s.set_predictions(m.select('image_id', prob_biopsy=pl.when(pl.col('image_id').is_in(unsure)).then(.5).otherwise(.001), prob_mag=pl.lit(.001)))
        assert pick() == pick() == 'round-002'              # one new round, however many models there are
        two = [i for i in s.queue('round-002') if split[i] == 'train']
        assert not set(two) & set(one) and sum(i in unsure for i in two) >= 10, 'asks about what the model is unsure of; skipped ones do not come straight back'
        assert pick('next') == 'round-003' and pick('all') == 'all' and len(s.queue('all')) == 200 and pick('hold_out') == 'hold_out'
        with pytest.raises(MammoError, match='no queue'): pick('nope')
        for i in m.filter(split='train')['image_id']: s.label(i, (), 'anna')
        for i in s.queue('valid'): s.label(i, (), 'anna')
        assert next_round(s, m, S) == ''                    # nothing left to ask
        t = label_table(s)
        assert t['split'].to_list() == ['train', 'valid', 'hold_out'] and t['labelled'].to_list() == [120, 40, 0]
