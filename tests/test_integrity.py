"What was damaged, cut short, edited, swapped or changed since is noticed and said in one sentence; nothing wrong is ever read."
import json
import os
import shutil
import sqlite3

import numpy as np
import onnx
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import dicom_files as df
import toy_cohort as toy
from mammo_nb.cohort import manifest as M
from mammo_nb.cohort.files import changed_since, list_files
from mammo_nb.cohort.thumbs import Thumbnails, make_thumbnails
from mammo_nb.core import engine as E
from mammo_nb.core.engine import TableError, read_meta, read_sealed, read_table, write_parquet, write_sealed
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.infer import aggregate, predict, with_status
from mammo_nb.labels.store import LabelStore
from mammo_nb.learn import bundle as B
from mammo_nb.learn.bundle import Bundle, bundle_file, bundle_meta, bundle_table, export_bundle, read_bundle_json, write_bundle_json

S = load_settings()
T = toy.settings_with(image=dict(model_size=48))


def sentence(do, *args, **kwargs):
    "What a `MammoError` says: one line that ends in a full stop"
    with pytest.raises(MammoError) as e: do(*args, **kwargs)
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and ';' in text, text
    return text


def flipped(data, at, bit=0): return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


# ---- tables

def rows(n, tag=0): return pl.DataFrame(dict(x=range(n), tag=[tag]*n, p=[.5*(i % 2) for i in range(n)], text=[f'{i*7919 % 1000}' for i in range(n)]))


@pytest.fixture
def parts(monkeypatch): monkeypatch.setattr(E, 'PARTITION_ROWS', 10)


def test_every_flipped_bit_and_every_truncation_of_a_table_is_noticed(tmp_path):
    p = tmp_path/'m.parquet'
    write_parquet(rows(9), p, S, stage='x')
    whole = p.read_bytes()
    assert read_table(p).equals(rows(9))
    for k in range(len(whole)):
        p.write_bytes(flipped(whole, k, k % 8))
        with pytest.raises(TableError): read_table(p)
    for k in [*range(0, len(whole), 7), *range(len(whole) - 80, len(whole))]:
        p.write_bytes(whole[:k])
        assert 'cut short' in sentence(read_table, p)
    for more in (b'\0', b'PAR1', whole):
        p.write_bytes(whole + more)
        sentence(read_table, p), sentence(read_meta, p)
    p.write_bytes(flipped(whole, len(whole)//2))
    assert 'is damaged or was changed' in sentence(read_table, p) and 'is damaged' in sentence(read_meta, p) and str(p) in sentence(read_table, p)


def test_an_edit_by_another_program_is_noticed(tmp_path):
    p = tmp_path/'m.parquet'
    write_parquet(rows(9), p, S)
    meta = pl.read_parquet_metadata(p)
    rows(9, 1).write_parquet(p)
    assert 'carries no checksum' in sentence(read_table, p)
    rows(9, 1).write_parquet(p, metadata={k: v for k, v in meta.items() if k.startswith('mammo')})
    assert 'was changed' in sentence(read_table, p), 'the old seal over other rows'


def test_a_table_whose_text_looks_like_a_seal(tmp_path):
    evil = pl.DataFrame(dict(text=['mammo_nb.seal\x18@' + 'a'*64, 'mammo_nb.seal": "' + '0'*64, '0'*64]))
    write_parquet(evil, tmp_path/'m.parquet', S)
    assert read_table(tmp_path/'m.parquet').equals(evil)
    whole = (tmp_path/'m.parquet').read_bytes()
    for k in range(0, len(whole), 5):
        (tmp_path/'m.parquet').write_bytes(flipped(whole, k))
        with pytest.raises(TableError): read_table(tmp_path/'m.parquet')


def spoil(p, how, other):
    "Spoils a folder of parts"
    part = sorted(p.iterdir())
    if how == 'missing': part[1].unlink()
    if how == 'last missing': part[-1].unlink()
    if how == 'doubled': shutil.copy(part[1], p/'part-99999-copy.parquet')
    if how == 'one twice': shutil.copy(part[1], part[2])
    if how == 'swapped': part[1].rename(p/'t'); part[2].rename(part[1]); (p/'t').rename(part[2])
    if how == 'of an older table': shutil.copy(sorted(other.iterdir())[1], part[1])
    if how == 'flipped': part[2].write_bytes(flipped(part[2].read_bytes(), 200))
    if how == 'cut': part[2].write_bytes(part[2].read_bytes()[:-1])
    if how == 'emptied': [q.unlink() for q in part]
    if how == 'a foreign one': rows(3).write_parquet(p/'part-00009-x.parquet')
    if how == 'one alone': shutil.copy(part[1], p.parent/'t'); shutil.rmtree(p); (p.parent/'t').rename(p)


@pytest.mark.parametrize('how, words', [
    ('missing', 'holds 3 of its 4 parts'), ('last missing', 'holds 3 of its 4 parts'), ('doubled', '5 files for its 4 parts'), ('one twice', 'lacks part 3'), ('swapped', 'lacks part 2'),
    ('of an older table', 'more than one table'), ('flipped', 'was changed'), ('cut', 'cut short'), ('emptied', 'holds no part'), ('a foreign one', 'no checksum'),
    ('one alone', 'holds 1 of its 4 parts')])
def test_a_folder_of_parts_must_be_one_whole_table(tmp_path, parts, how, words):
    p = tmp_path/'m.parquet'
    write_parquet(rows(35, 7), tmp_path/'old.parquet', S)
    write_parquet(rows(35), p, S)
    assert len(list(p.iterdir())) == 4 and read_table(p).equals(rows(35))
    spoil(p, how, tmp_path/'old.parquet')
    assert words in sentence(read_table, p)


def test_a_table_says_whose_it_is(tmp_path, parts):
    for n in (5, 25):
        write_parquet(rows(n), tmp_path/'m.parquet', S, cohort='abc', model='m1')
        assert read_table(tmp_path/'m.parquet', cohort='abc', model='m1').equals(rows(n)) and read_table(tmp_path/'m.parquet', cohort='').height == n
        assert 'belongs to another cohort' in sentence(read_table, tmp_path/'m.parquet', cohort='xyz')
        assert read_meta(tmp_path/'m.parquet')['model'] == 'm1' and not {'seal', 'part', 'table'} & set(read_meta(tmp_path/'m.parquet'))


@hyp(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_noise_is_never_a_table(tmp_path_factory, noise, how):
    p = tmp_path_factory.mktemp('t')/'m.parquet'
    p.write_bytes([noise, noise + b'PAR1', b'PAR1' + noise + b'PAR1', noise + b'mammo_nb.seal\x18@' + b'a'*64 + b'PAR1'][how])
    sentence(read_table, p), sentence(read_meta, p)


def test_sealed_json(tmp_path):
    p = tmp_path/'a.json'
    write_sealed(p, dict(round=3, why='ü "mammo_nb.seal": "x"'))
    whole = p.read_bytes()
    assert read_sealed(p, 'x')['round'] == 3
    for k in range(len(whole)):
        p.write_bytes(flipped(whole, k))
        sentence(read_sealed, p, 'x')
        p.write_bytes(whole[:k])
        sentence(read_sealed, p, 'x')


# ---- a cohort's tables

@pytest.fixture(scope='module')
def two_cohorts(tmp_path_factory):
    "Two hospitals with equal file names"
    root = tmp_path_factory.mktemp('two')
    for c, n in (('a', 1), ('b', 40)):
        (root/'dicom'/c).mkdir(parents=True)
        for k in range(3): (root/'dicom'/c/f'{k}.dcm').write_bytes(image(n + k))
        m = M.scan(root/'dicom'/c, root/'out'/c, S)
        assert m['status'].to_list() == ['ok']*3
        make_thumbnails(m, root/'dicom'/c, root/'out'/c/'thumbnails', S)
    return root


def image(n, size=40, **kw):
    px = np.random.default_rng(n).integers(0, 4096, (size, size), dtype=np.uint16)
    return df.make(px, SOPInstanceUID=f'1.3.{n}', PatientID=f'P{n}', StudyInstanceUID=f'1.8.{n}', **kw)


def test_another_cohorts_manifest_is_refused(two_cohorts, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(two_cohorts/'out', out)
    shutil.copy(out/'b'/'manifest.parquet', out/'a'/'manifest.parquet')
    assert 'belongs to another cohort' in sentence(M.read_manifest, out/'a')
    assert 'belongs to another cohort' in sentence(M.scan, two_cohorts/'dicom'/'a', out/'a', S)
    assert 'run preprocess again' in sentence(M.source_dir, out/'a')


def test_a_damaged_manifest_stops_everything_with_the_same_sentence(two_cohorts, tmp_path):
    from mammo_nb.core.run import job
    from mammo_nb.infer import cohort_manifest
    out = tmp_path/'out'
    shutil.copytree(two_cohorts/'out', out)
    p = out/'a'/'manifest.parquet'
    p.write_bytes(flipped(p.read_bytes(), 300))
    said = {sentence(M.read_manifest, out/'a'), sentence(M.scan, two_cohorts/'dicom'/'a', out/'a', S), sentence(cohort_manifest, job('a', outputs=str(out)))}
    assert len(said) == 1 and 'is damaged or was changed' in said.pop()


def test_a_damaged_cache_of_facts_is_read_again_from_the_files(two_cohorts, tmp_path):
    "it can be made anew from what it was made of, so nobody has to be bothered"
    out = tmp_path/'out'
    shutil.copytree(two_cohorts/'out', out)
    p, before = out/'a'/'scan'/'facts.parquet', M.read_manifest(out/'a')
    for data in (flipped(p.read_bytes(), 250), p.read_bytes()[:-9], b''):
        p.write_bytes(data)
        assert M.scan(two_cohorts/'dicom'/'a', out/'a', S).equals(before)
        assert read_table(p).height == 3


def test_predictions_of_another_model_or_cohort_or_damaged_ones_are_refused(two_cohorts, tmp_path):
    from mammo_nb.review import read_predictions
    from test_infer import Model
    out = tmp_path/'out'
    shutil.copytree(two_cohorts/'out', out)
    m, folder = M.read_manifest(out/'a'), out/'a'/'predictions'/'m-r001-00000000'
    tag = M.cohort_tag(out/'a')
    def written(cohort=tag, model=folder.name):
        probs, _, _ = predict(m, two_cohorts/'dicom'/'a', Model(), folder, S)
        full = with_status(m, probs)
        facts = dict(cohort=cohort, model=model)
        write_parquet(full, folder/'predictions.parquet', S, **facts)
        write_parquet(aggregate(full, S), folder/'studies.parquet', S, **facts)
        (folder/'studies.csv').write_text('study_id\n')
        shutil.rmtree(folder/'parts', ignore_errors=True)
    written()
    assert read_predictions(out/'a')[0].height == 3 and predict(m, two_cohorts/'dicom'/'a', Model(), folder, S)[1] == 0
    good = (folder/'predictions.parquet').read_bytes()
    (folder/'predictions.parquet').write_bytes(flipped(good, 400))
    assert 'was changed' in sentence(read_predictions, out/'a') and 'run infer again' in sentence(predict, m, two_cohorts/'dicom'/'a', Model(), folder, S)
    (folder/'predictions.parquet').unlink()
    assert 'no such table' in sentence(read_predictions, out/'a')
    for facts, words in ((dict(cohort='0'*16), 'another cohort'), (dict(model='m-r002-11111111'), 'another model')):
        shutil.rmtree(folder)
        written(**facts)
        assert words in sentence(read_predictions, out/'a')


# ---- files that change

def restore(path, st): os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def test_same_size_and_a_restored_time_are_noticed(tmp_path):
    f = tmp_path/'a'
    f.write_bytes(b'some')
    seen, st = list_files(tmp_path)[0][1:4], os.stat(f)
    assert not changed_since(f, seen) and not changed_since(f, ()) and not changed_since(tmp_path/'gone', seen)
    f.write_bytes(b'same')
    restore(f, st)
    assert os.stat(f).st_mtime_ns == st.st_mtime_ns and changed_since(f, seen)


@pytest.mark.parametrize('restored', [False, True])
def test_a_rerun_of_preprocess_notices_other_pixels(tmp_path, restored):
    (tmp_path/'d').mkdir()
    f, out = tmp_path/'d'/'1.dcm', tmp_path/'out'
    f.write_bytes(image(1))
    m = M.scan(tmp_path/'d', out, S)
    assert not len(make_thumbnails(m, tmp_path/'d', out/'thumbnails', S))
    i, before, st = m['image_id'][0], None, os.stat(f)
    before = Thumbnails(out/'thumbnails').get(i)
    other = image(1)[:-3200] + image(2)[-3200:]
    assert len(other) == st.st_size
    f.write_bytes(other)
    if restored: restore(f, st)
    m = M.scan(tmp_path/'d', out, S)
    assert m['image_id'][0] == i and Thumbnails(out/'thumbnails').missing([i]) == [i]
    assert not len(make_thumbnails(m, tmp_path/'d', out/'thumbnails', S)) and (Thumbnails(out/'thumbnails').get(i) != before).any()


def test_a_file_that_was_away_or_unreadable_and_comes_back_changed(tmp_path):
    "its old thumbnail is not shown"
    (tmp_path/'d').mkdir()
    f, out = tmp_path/'d'/'1.dcm', tmp_path/'out'
    for absence in (lambda: f.unlink(), lambda: f.write_bytes(b'\0'*200)):
        f.write_bytes(image(1))
        (tmp_path/'d'/'2.dcm').write_bytes(image(2))
        m = M.scan(tmp_path/'d', out, S)
        make_thumbnails(m, tmp_path/'d', out/'thumbnails', S)
        i = m.filter(path='1.dcm')['image_id'][0]
        before = Thumbnails(out/'thumbnails').get(i)
        absence()
        M.scan(tmp_path/'d', out, S)
        f.write_bytes(image(1)[:-3200] + image(3)[-3200:])
        m = M.scan(tmp_path/'d', out, S)
        make_thumbnails(m, tmp_path/'d', out/'thumbnails', S)
        assert m.filter(path='1.dcm')['image_id'][0] == i and (Thumbnails(out/'thumbnails').get(i) != before).any()


@pytest.mark.parametrize('when', ['before', 'meanwhile'])
def test_thumbnails_and_infer_notice_a_change_since_the_scan(tmp_path, monkeypatch, when):
    from mammo_nb.cohort import thumbs as th
    from mammo_nb.learn import answers as an
    from test_infer import Model
    (tmp_path/'d').mkdir()
    for k in range(3): (tmp_path/'d'/f'{k}.dcm').write_bytes(image(k))
    m, f = M.scan(tmp_path/'d', tmp_path/'out', S), tmp_path/'d'/'1.dcm'
    st, other = os.stat(f), image(1)[:-3200] + image(2)[-3200:]
    def change():
        f.write_bytes(other)
        restore(f, st)
    if when == 'before': change()
    else:
        for module, name in ((th, 'render'), (an, 'render_input')):
            def slow(src, *a, _real=getattr(module, name), **kw):
                out = _real(src, *a, **kw)
                if '1.dcm' in src.name: change()
                return out
            monkeypatch.setattr(module, name, slow)
    probs, _, _ = predict(m, tmp_path/'d', Model(), tmp_path/'p', S)
    p = with_status(m, probs)
    assert p['status'].to_list() == ['ok', 'rejected', 'ok'] and p['reason'][1] == 'was changed since the scan; run preprocess again' and p['prob_biopsy'][1] is None
    failed = make_thumbnails(m, tmp_path/'d', tmp_path/'out'/'thumbnails', S)
    assert failed['reason'].to_list() == ['was changed since the scan; run preprocess again'] and failed['step'].to_list() == ['access']
    assert Thumbnails(tmp_path/'out'/'thumbnails').missing(m['image_id']) == [m['image_id'][1]], 'no picture of two states'
    monkeypatch.undo()
    M.reject(tmp_path/'out', failed, S)
    again = M.scan(tmp_path/'d', tmp_path/'out', S)
    assert again['status'].to_list() == ['ok']*3 and not len(make_thumbnails(again, tmp_path/'d', tmp_path/'out'/'thumbnails', S))
    assert with_status(again, predict(again, tmp_path/'d', Model(), tmp_path/'p', S)[0])['status'].to_list() == ['ok']*3


def test_no_frame_stays_of_a_volume_that_changed_while_it_was_read(tmp_path, monkeypatch):
    from mammo_nb.cohort import thumbs as th
    (tmp_path/'d').mkdir()
    f = tmp_path/'d'/'v.dcm'
    f.write_bytes(df.make([np.full((40, 40), 100*k, np.uint16) for k in range(3)], SOPInstanceUID='1.9', PatientID='P', StudyInstanceUID='1.8'))
    m, real, n = M.scan(tmp_path/'d', tmp_path/'out', S), th.render, []
    def render(src, *a, **kw):
        n.append(1)
        if len(n) == 3: os.utime(f)
        return real(src, *a, **kw)
    monkeypatch.setattr(th, 'render', render)
    failed = make_thumbnails(m, tmp_path/'d', tmp_path/'out'/'thumbnails', S)
    assert len(n) == 3 and failed['image_id'].to_list() == sorted(m['image_id']) and not Thumbnails(tmp_path/'out'/'thumbnails').ids()


# ---- bundles

@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    "Two bundles of the same study with tables, as two rounds leave them"
    from test_bundle import network, pictures
    root = tmp_path_factory.mktemp('bundles')
    for n in (1, 2):
        meta = bundle_meta(T, 'leeds', n, mean=.1*n, std=.3, label_snapshot=f'{n}')
        agree = export_bundle(network(seed=n), root/f'00{n}', meta, pictures())
        ids = dict(image_id=[f'{i}' for i in range(5)])
        for name in ('labelled', 'pool'): write_parquet(pl.DataFrame(ids | dict(prob_biopsy=[.1*n]*5)), root/f'00{n}'/f'{name}.parquet', T)
        write_bundle_json(root/f'00{n}', meta | dict(id=Bundle.load(root/f'00{n}').id, agreement=agree, int8=dict(use=True)))
    return root


@pytest.fixture
def pair(bundles, tmp_path):
    shutil.copytree(bundles, tmp_path/'r')
    return tmp_path/'r'/'001', tmp_path/'r'/'002'


OPEN = {'model.onnx': lambda d: Bundle.load(d, provider='cpu'), 'model.int8.onnx': lambda d: Bundle.load(d, 'int8', provider='cpu'),
        'bundle.json': lambda d: Bundle.load(d, provider='cpu'), 'weights.safetensors': lambda d: bundle_file(d, 'weights.safetensors'),
        'labelled.parquet': lambda d: bundle_table(d, 'labelled'), 'pool.parquet': lambda d: bundle_table(d, 'pool')}


@pytest.mark.parametrize('name', OPEN)
def test_any_file_of_a_bundle_flipped_cut_grown_swapped_or_gone(pair, name):
    one, two = pair
    f, whole = one/name, (one/name).read_bytes()
    OPEN[name](one)
    places = np.random.default_rng(0).integers(0, len(whole), 60).tolist() + [0, len(whole) - 1]
    for k in places:
        f.write_bytes(flipped(whole, k, k % 8))
        assert str(f.name) in sentence(OPEN[name], one)
        f.write_bytes(whole[:k])
        sentence(OPEN[name], one)
    f.write_bytes(whole + b'\0')
    sentence(OPEN[name], one)
    shutil.copy(two/name, f)
    assert 'checksum differs' in sentence(OPEN[name], one)
    f.unlink()
    assert 'no such file' in sentence(OPEN[name], one)


@pytest.mark.parametrize('name', ['model.onnx', 'model.int8.onnx'])
def test_a_lone_onnx_file_knows_whether_it_is_whole(pair, tmp_path, name):
    f = tmp_path/'m.onnx'
    shutil.copy(pair[0]/name, f)
    whole = f.read_bytes()
    Bundle.load(f, provider='cpu')
    for k in [*np.random.default_rng(1).integers(0, len(whole), 60).tolist(), len(whole) - 1]:
        f.write_bytes(flipped(whole, k, k % 8))
        sentence(Bundle.load, f, provider='cpu')
        f.write_bytes(whole[:k])
        sentence(Bundle.load, f, provider='cpu')


def test_edited_metadata_is_noticed(pair, tmp_path):
    m = onnx.load(pair[0]/'model.onnx')
    next(p for p in m.metadata_props if p.key == 'thresholds').value = '[0.1, 0.1]'
    f = tmp_path/'m.onnx'
    f.write_bytes(m.SerializeToString())
    assert 'is damaged or was changed' in sentence(Bundle.load, f)
    del m.metadata_props[-1]
    f.write_bytes(m.SerializeToString())
    assert 'carries no checksum' in sentence(Bundle.load, f), 'an old or foreign file'
    js = pair[0]/'bundle.json'
    js.write_text(js.read_text().replace('"use": true', '"use": null'))
    assert 'was changed' in sentence(Bundle.load, pair[0], 'auto')


def test_int8_of_another_bundle_that_was_listed_anew(pair):
    one, two = pair
    shutil.copy(two/'model.int8.onnx', one/'model.int8.onnx')
    write_bundle_json(one, read_bundle_json(one))
    assert 'made from another model.onnx' in sentence(Bundle.load, one, 'int8', provider='cpu')


def test_bundle_tables_of_another_round_are_refused_though_whole(pair):
    one, two = pair
    shutil.copy(two/'pool.parquet', one/'pool.parquet')
    assert read_table(one/'pool.parquet').height == 5 and 'checksum differs' in sentence(bundle_table, one, 'pool')


def test_a_note_of_a_rollback_is_not_forgotten_silently(pair):
    d = pair[0].parents[1]
    shutil.move(pair[0].parent, d/'rounds')
    assert B.current_number(d) == 2
    write_sealed(d/'rounds'/'current.json', dict(round=1, newest=2))
    assert B.current_number(d) == 1
    whole = (d/'rounds'/'current.json').read_bytes()
    for bad in (whole[:20], flipped(whole, 12), b'', b'{}'):
        (d/'rounds'/'current.json').write_bytes(bad)
        assert 'roll back again' in sentence(B.current_number, d)


# ---- labels

def test_a_damaged_label_store_says_so(tmp_path):
    p = tmp_path/'labels.sqlite'
    with LabelStore(p, S) as s:
        s.sync_images(pl.DataFrame([dict(image_id=f'{i:016x}', path=f'{i}.dcm', study_id='s', patient_id='p', frame=0, status='ok', split='train', view='L-CC') for i in range(400)]))
        for i in range(300): s.label(f'{i:016x}', ('biopsy',) if i % 2 else (), 'anna')
    for side in tmp_path.glob('labels.sqlite-*'): side.unlink()
    whole = p.read_bytes()
    for k in (10, 100, 5000, len(whole)//2, len(whole) - 5000):
        p.write_bytes(whole[:k])
        with pytest.raises(MammoError) as e: LabelStore(p, S).close()
        assert '\n' not in str(e.value)
    for at in (0, 18, 50):
        p.write_bytes(whole[:at] + os.urandom(3000) + whole[at + 3000:])
        with pytest.raises(MammoError): LabelStore(p, S).close()
    p.write_bytes(whole)
    with LabelStore(p, S) as s:
        s.check()
        good = s.labels()
    assert good.height == 300
    seen = wrong = 0
    for k in np.random.default_rng(0).integers(0, len(whole), 150):
        for side in tmp_path.glob('labels.sqlite-*'): side.unlink()
        p.write_bytes(flipped(whole, k, k % 8))
        try:
            with LabelStore(p, S) as s:
                s.check()
                wrong += not s.labels().equals(good)
        except MammoError as e:
            seen += 1
            assert '\n' not in str(e)
    for k in (whole.rindex(b'CREATE VIEW') + 60, whole.index(b'CREATE TABLE') + 60):  # SQL that is no UTF-8 any more
        for side in tmp_path.glob('labels.sqlite-*'): side.unlink()
        p.write_bytes(whole[:k] + b'\xc5\xff' + whole[k + 2:])
        try:
            with LabelStore(p, S) as s: s.labels()
        except MammoError as e: assert '\n' not in str(e)
    assert seen > 10 > wrong, 'a bit inside a value that no index repeats cannot be seen; SQLite keeps no checksums'


# ---- a training that was interrupted

def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path):
    from types import SimpleNamespace
    import torch
    from mammo_nb.learn import resume
    f = tmp_path/'training.safetensors'
    keep = resume.Keep(tmp_path)
    keep.learn = SimpleNamespace(model=torch.nn.Linear(3, 2), opt=None, mixed_precision=None)
    resume_chance, resume_opt = resume.chance_of, resume._opt_state
    try:
        resume.chance_of, resume._opt_state = lambda learn: ({}, {}), lambda opt: ({}, [])
        keep.losses = list
        keep.save(3)
    finally: resume.chance_of, resume._opt_state = resume_chance, resume_opt
    whole = f.read_bytes()
    assert resume.Keep(tmp_path).epoch0 == 3
    for k in range(len(whole)):
        f.write_bytes(flipped(whole, k, k % 8))
        assert resume.Keep(tmp_path).epoch0 == 0, k


def test_a_damaged_truth_is_no_oracle(tmp_path):
    from mammo_nb.labels.store import Oracle
    p, truth = tmp_path/'truth.parquet', pl.DataFrame(dict(image_id=['a', 'b']) | {c: [0, 1] for c in S.columns})
    write_parquet(truth, p, S)
    with LabelStore(tmp_path/'labels.sqlite', S) as store:
        assert len(Oracle(store, p).truth) == 2
        whole = p.read_bytes()
        p.write_bytes(flipped(whole, 60))
        assert 'is damaged or was changed' in sentence(Oracle, store, p)
        truth.write_parquet(p)
        assert len(Oracle(store, p).truth) == 2, "anybody's table will do"
