"The stages at the edge as a whole, the tissue pictures, and what the inspector shows and does not show."
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pydicom
import pytest

import hostile_files
from mammo_nb import quality, ship
from mammo_nb.core.engine import only_run, read_table
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError
from mammo_nb.dicom.phantom import Anatomy, make_cohort, phantom_image
from mammo_nb.edge import inspect, segment as seg
from mammo_nb.edge.outbox import Outbox
from servers import Orthanc

ROOT = Path(__file__).resolve().parents[1]


# --- tissue

def breast(density, seed=8, size=(768, 590), **kw): return (phantom_image('CC', 'L', size, anatomy=Anatomy(density=density), seed=seed, **kw)[0] >> 4).astype(np.uint8)


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_colours_mean_the_same_and_dense_breasts_are_denser(seed):
    found = [seg.segment(breast(d, seed)) for d in (-.8, -.2, .4, .9)]
    assert found[-1].dense > found[0].dense + 5
    for t, d in zip(found, (-.8, -.2, .4, .9)):
        means = [breast(d, seed)[t.labels == k].mean() for k in range(3)]
        assert means == sorted(means) and t.names == ('background', 'fatty', 'dense') and list(t.centres) == sorted(t.centres) and abs(sum(t.shares) - 1) < 1e-9


def test_labels_and_letters_beside_the_breast_are_background():
    img = breast(.4)
    with_label = img.copy()
    cv2.putText(with_label, 'L CC', (420, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.2, 255, 4)
    with_label[-6:] = 250   # the edge of a film
    a, b = seg.segment(img), seg.segment(with_label)
    assert (b.labels[:80, 400:] == 0).all() and (b.labels[-6:, 300:] == 0).all() and abs(a.dense - b.dense) < 3


def test_a_ct_without_bone_has_none():
    n = 256
    y, x = np.mgrid[:n, :n]/n - .5
    hu = np.where(np.hypot(x, y) < .4, np.where(np.hypot(x, y) < .3, 45., -95.), -1000.)
    t = seg.segment(np.clip(seg._from_hu(hu), 0, 255).astype(np.uint8), 'ct')
    assert t.names == ('air', 'soft tissue', 'bone') and t.shares[2] == 0 and .4 < t.shares[1] < .6 and t.dense is None
    hu[np.hypot(x, y + .15) < .07] = 800
    assert .01 < seg.segment(np.clip(seg._from_hu(hu), 0, 255).astype(np.uint8), 'ct').shares[2] < .03


@pytest.mark.parametrize('img', [np.zeros((64, 48), np.uint8), np.full((64, 48), 255, np.uint8), np.zeros((1, 1), np.uint8), np.eye(3, dtype=np.uint8)*200,
                                 np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)])
def test_odd_pictures_have_a_tissue_picture_too(img):
    t = seg.segment(img)
    assert t.labels.shape == img.shape and abs(sum(t.shares) - 1) < 1e-9 and seg.show_tissue(img, t) is not None
    with pytest.raises(MammoError): seg.segment(img.astype(float))


def test_real_pictures(shared):
    for name, dense in (('ge_essential_rmlo_jpegll_sigmoid.dcm', (5, 40)), ('wg04_lmlo_film_j2k_lossy.dcm', (50, 90))):
        img, t = seg.tissue_of(shared/'data'/'mg'/name)
        assert dense[0] < t.dense < dense[1] and .1 < t.shares[1] + t.shares[2] < .7


# --- the stages

@pytest.fixture(scope='module')
def came(tmp_path_factory):
    "A small cohort through both stages, in this process"
    at = tmp_path_factory.mktemp('edge')
    j = replace(job('toy', settings=str(ROOT/'settings.ini')), folder=at/'outputs'/'toy', dicom_dir=at/'dicom')
    make_cohort(at/'dicom', patients=3, image_size=192, broken=.1, workers=1, seed=3)
    hostile_files.write_cases(at/'dicom'/'hostile', list(hostile_files.CASES)[:25])
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in at.joinpath('dicom').rglob('*') if p.is_file()}
    return j, ship.ship(j, at/'dicom'), before


def test_every_file_that_comes_in_comes_out(came):
    j, (fate, checks, said), before = came
    names = [Path(p).name for p in fate['path']]
    assert fate['path'].is_unique().all() and {p.name for p in before} - {'truth.parquet'} <= {n for n in names} | {Path(p.split('!/')[0]).name for p in fate['path']}
    assert set(fate['fate']) <= {'waiting', 'rejected', 'duplicate'} and 'waiting' in set(fate['fate']) and said['problem'].startswith('No destination')
    assert fate.filter(fate='rejected')['reason'].null_count() == 0
    t = dict(ship.fate_table(fate).iter_rows())
    assert t['found'] == len(fate) == sum(t[f'  {f}'] for f in ('delivered', 'waiting', 'duplicate', 'rejected', 'dead'))


def test_sources_stay_as_they_are(came):
    assert all((p.read_bytes(), p.stat().st_mtime_ns) == was for p, was in came[2].items())


def test_no_name_goes_into_what_the_stages_write(came):
    j, _, before = came
    marks = set()
    for p in before:
        try: ds = pydicom.dcmread(p, stop_before_pixels=True, force=True)
        except Exception: continue
        marks |= {str(v).encode() for k in ('PatientName', 'PatientID', 'AccessionNumber', 'StudyInstanceUID') if (v := ds.get(k)) and len(str(v)) > 5}
    uids = {m for m in marks if m.startswith((b'1.', b'2.'))}
    assert len(marks - uids) > 4 and len(uids) > 2
    for p in (j.folder/'edge').rglob('*'):
        if p.is_file():
            data = p.read_bytes() + p.name.encode()
            assert not any(m in data for m in (marks - uids if p.suffix == '.parquet' else marks)), p.name   # study_id is what the manifest calls it


def test_running_again_changes_nothing(came, monkeypatch):
    j, (fate, checks, _), _ = came
    monkeypatch.setattr(ship, '_one', lambda *a, **k: pytest.fail('done again'))
    again = ship.ship(j, j.dicom_dir)
    assert again[0].equals(fate) and again[1].equals(checks) and read_table(j.folder/'edge'/'checks.parquet').equals(checks)


def copy_of(came, at):
    j = came[0]
    shutil.copytree(j.folder, at/'toy')
    return replace(j, folder=at/'toy')


def test_what_the_verifier_objects_to_does_not_leave(came, tmp_path, monkeypatch):
    j = replace(came[0], folder=tmp_path/'toy')
    real, bad = ship.verify_file, []
    def strict(src, dst, *a):
        if not bad: bad.append(dst)
        return ['A made-up objection.'] if dst == bad[0] else real(src, dst, *a)
    monkeypatch.setattr(ship, 'verify_file', strict)
    fate, checks, _ = ship.ship(j, j.dicom_dir)
    row = checks.filter(step='verify').row(0, named=True)
    assert row['reason'] == 'A made-up objection.' and row['file'] is None and not bad[0].exists()
    assert fate.filter(image_id=row['image_id'])['fate'].to_list() == ['rejected']
    with Outbox(j.folder/'edge'/'outbox') as box: assert len(box.rows()) == (checks['status'] == 'ready').sum()


def test_what_does_not_join_up_does_not_leave(came, tmp_path, monkeypatch):
    j = replace(came[0], folder=tmp_path/'toy')
    monkeypatch.setattr(ship, 'verify_links', lambda pairs, options: [f'{Path(pairs[2][1]).name.capitalize()}: a UID got another replacement than in a file before.'])
    fate, checks, _ = ship.ship(j, j.dicom_dir)
    assert checks.filter(step='links')['reason'].to_list() == ['A UID got another replacement than in a file before.'] and checks.filter(step='links')['file'].null_count() == 1


def test_a_lost_or_changed_file_is_made_again(came, tmp_path):
    j = copy_of(came, tmp_path)
    folder, first = j.folder/'edge'/'deidentified', came[1][1].filter(status='ready').row(0, named=True)
    (folder/first['file']).unlink()
    fate, checks, _ = ship.ship(j, j.dicom_dir)
    assert (folder/first['file']).is_file() and checks.filter(image_id=first['image_id'])['sha256'][0] == first['sha256']
    with Outbox(j.folder/'edge'/'outbox') as box: assert len(box.rows()) == (checks['status'] == 'ready').sum()


def test_flagged_studies_go_first(came, tmp_path, monkeypatch):
    j, checks = replace(came[0], folder=tmp_path/'toy'), came[1][1]
    study = checks.filter(status='ready')['study_id'][0]
    monkeypatch.setattr(ship, 'read_predictions', lambda folder: (None, pl.DataFrame({'study_id': [study, 'x'], **{c: [1, 0] for c in j.settings.columns}}), None))
    shutil.copytree(came[0].folder/'edge'/'deidentified', j.folder/'edge'/'deidentified')
    with Outbox(j.folder/'edge'/'outbox') as box:
        ids = ship.queued(j, checks, box)
        first = set(box.rows().filter(pl.col('priority') > 0)['id'])
    assert first == {ids[i] for i in checks.filter(status='ready', study_id=study)['image_id']} and len(first) < len(ids)


@pytest.mark.skipif(bool(Orthanc.missing()), reason=Orthanc.missing() or 'x')
def test_it_arrives(came, tmp_path):
    j = copy_of(came, tmp_path)
    with Orthanc(tmp_path/'pacs') as far:
        fate, checks, said = ship.ship(j, j.dicom_dir, f'{far.url}/dicom-web')
        ready = checks.filter(status='ready')
        assert not said['problem'] and (fate['fate'] == 'delivered').sum() == len(ready) == said['delivered']
        assert set(far.instances().values()) == set(ready['sop_uid'])
        assert (ship.ship(j, j.dicom_dir, f'{far.url}/dicom-web')[0]['fate'] == 'delivered').sum() == len(ready)


def test_quality_answers_for_every_file(came, tmp_path):
    j = copy_of(came, tmp_path)
    df, features = quality.measured(j, j.dicom_dir)
    t = dict(quality.files_table(df, features).iter_rows())
    assert t['found'] == df['path'].n_unique() and t['  measured'] > 10
    ok = features.filter(pl.col('status') == 'ok')
    a = quality.kept_picture(j, ok['image_id'][0])
    assert a.ndim == 3 and quality.kept_picture(j, ok['image_id'][0], True).shape == (a.shape[0], a.shape[1]//2) and quality.kept_picture(j, '0'*16) is None
    assert len(quality.tissue_sheet(j, features)._repr_png_()) < 150_000
    from mammo_nb.edge.fleet import watch
    states = quality.scanner_table(features, watch(features), 200)['state'].to_list()
    assert all('of 200 pictures' in s for s in states)


@pytest.mark.parametrize('text', ['scanner-3f9a1c', 'scanner-3f9a1c:0', 'scanner-xyz:3', '3', 'scanner-3f9a1c:5;x'])
def test_a_restart_that_means_nothing_is_refused(text):
    with pytest.raises(MammoError, match='as in scanner-'): quality.restarts(text)


# --- the inspector

def test_headers_are_shown_without_what_they_say(came):
    j, (fate, checks, _), before = came
    p = next(p for p in before if p.suffix != '.zip' and 'hostile' not in p.parts and p.read_bytes()[128:132] == b'DICM' and b'DICOMDIR' not in p.name.encode())
    ds = pydicom.dcmread(p)
    for t in (inspect.header_table(p), inspect.header_groups(p)):
        text = t.write_csv()
        assert not any(str(ds.get(k)) in text for k in ('PatientName', 'PatientID', 'StudyInstanceUID', 'StudyDate') if ds.get(k))
    assert str(ds.PatientName) in inspect.header_table(p, values=True)['value'].to_list()
    t = inspect.header_table(p)
    assert set(t.filter(pl.col('tag').is_in(['(0010,0010)', '(0010,0020)', '(0020,000D)']))['identifying']) - {''} == set(t.filter(pl.col('tag').is_in(['(0010,0010)', '(0010,0020)', '(0020,000D)']))['identifying'])
    assert [inspect.identifying(t) for t in (0x00020003, 0x00020002, 0x00100010, 0x00091001, 0x50000022, 0x60000010, 0x60003000, 0x00120011, 0x00280010)] == ['U', '', 'Z', *'XXXXX', '']  # patterns, overlays whole, what the standard does not know
    assert t.filter(pl.col('tag') == '(0028,0010)')['identifying'].to_list() == [''] and 'Organ Dose' in inspect.missing(p)


def test_a_pair_says_what_became_of_each_element(came):
    j, (fate, checks, _), _ = came
    r = checks.filter(status='ready').join(fate.select('image_id', 'path'), on='image_id').row(0, named=True)
    src, dst = j.dicom_dir/r['path'], j.folder/'edge'/'deidentified'/r['file']
    t = inspect.what_changed(src, dst)
    became = dict(t.filter(depth=0).select('tag', 'became').iter_rows())
    assert became['(0010,0010)'] in ('replaced', 'emptied') and became['(0008,0018)'] == 'replaced' and became['(0012,0062)'] == 'added'
    n = inspect.change_table(src, dst)
    assert (n.select(pl.exclude('group')).min_horizontal() >= 0).all() and n.select('kept', 'replaced', 'emptied', 'removed').sum_horizontal().sum() == len(inspect.header_table(src))
    assert len(inspect.show_pair(src, dst)._repr_png_()) < 150_000 and len(inspect.show_file(dst)._repr_png_()) < 150_000


def test_what_was_painted_over_is_not_shown_in_the_picture_before(came, tmp_path, monkeypatch):
    j, (fate, checks, _), _ = came
    r = checks.filter(pl.col('masked').fill_null('[]') != '[]').join(fate.select('image_id', 'path'), on='image_id').row(0, named=True)
    src, dst = j.dicom_dir/r['path'], j.folder/'edge'/'deidentified'/r['file']
    seen = []
    real = inspect.framed
    monkeypatch.setattr(inspect, 'framed', lambda img, rows: seen.append(img) or real(img, rows))
    inspect.show_pair(src, dst)
    a, b = (inspect.render(p, None, 0) for p in (src, dst))
    assert (a != b).any() and (seen[0][a != b] == b[a != b]).all()


def test_the_viewer_pages_and_answers_nonsense(came):
    j, (fate, checks, _), _ = came
    v = ship.outbox_viewer(j, fate, checks, j.dicom_dir)
    sent = []
    v.send = lambda msg, buffers=None: sent.append((msg, buffers))
    for msg in (dict(at=0), dict(at=10**9), dict(at=-5), dict(at='x'), dict(kind='source'), dict(kind='rm -rf'), dict(do='problem'), {}): v._asked(v, msg, [])
    assert [m['at'] for m, _ in sent[:4]] == [0, len(v.items) - 1, 0, 0] and all(b and b[0][:4] == b'\x89PNG' for m, b in sent[:3])
    assert sent[5][0]['kind'] == 'out' and sent[6][0]['problem'] or not any(i['problem'] for i in v.items)
    assert 'PNG' not in str(v.get_state()) and len(v.still()._repr_png_()) < 150_000
    empty = inspect.Viewer([])
    assert empty.answer(3)[0]['title'] == 'nothing here' and empty.still() is not None
