"A patient belongs to one split, for good, whatever else is in the cohort."
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

import dicom_files as df
from mammo_nb.cohort.manifest import scan
from mammo_nb.cohort.splits import SPLITS, split_of, uniform
from mammo_nb.core.settings import load_settings

S = load_settings()
TINY = np.zeros((4, 4), np.uint16)


def shares(hold_out=.2, valid=.2): return SimpleNamespace(splits=SimpleNamespace(hold_out=hold_out, valid=valid))


def with_shares(hold_out, valid): return S.model_copy(update=dict(splits=S.splits.model_copy(update=dict(hold_out=hold_out, valid=valid))))


def write(folder, images):
    "`images`: (patient, study) pairs, a file each"
    for i, (patient, study) in enumerate(images):
        path = folder/f'{patient}'/f'{study}'/f'{i}.dcm'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(df.make(TINY, PatientID=f'P-{patient}', StudyInstanceUID=f'1.2.{patient}.{study}', SOPInstanceUID=f'1.3.{patient}.{study}.{i}'))


@given(st.text(), st.binary(min_size=1, max_size=64), st.floats(.01, .5), st.floats(.01, .4))
def test_every_patient_gets_one_split_always_the_same(patient, key, hold_out, valid):
    s = shares(hold_out, valid)
    assert split_of(patient, key, s) in SPLITS and split_of(patient, key, s) == split_of(patient, key, s)


@given(st.text(), st.binary(min_size=1, max_size=64), st.floats(.01, .4), st.floats(.01, .3), st.floats(.01, .2))
def test_raising_the_valid_share_never_opens_the_hold_out(patient, key, hold_out, valid, more):
    a, b = split_of(patient, key, shares(hold_out, valid)), split_of(patient, key, shares(hold_out, valid + more))
    assert (a == 'hold_out') == (b == 'hold_out')


def test_shares_are_what_the_settings_ask_for():
    n = 20_000
    got = [split_of(f'{i}', b'k', shares(.15, .25)) for i in range(n)]
    assert abs(got.count('hold_out') / n - .15) < .01 and abs(got.count('valid') / n - .25) < .01


def test_another_key_is_another_draw():
    u = np.array([[uniform(k, str(i)) for i in range(2000)] for k in (b'a', b'b')])
    assert abs(np.corrcoef(u)[0, 1]) < .08 and 0 <= u.min() and u.max() < 1


cohorts = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=25)


@hyp(max_examples=12, deadline=None)
@given(first=cohorts, then=cohorts, hold_out=st.floats(.1, .5))
def test_no_patient_in_two_splits_and_growth_moves_nobody(tmp_path_factory, first, then, hold_out):
    d = tmp_path_factory.mktemp('grow')
    write(d/'dicom', first)
    before = scan(d/'dicom', d/'cohort', S)
    write(d/'dicom', first + then)
    after = scan(d/'dicom', d/'cohort', with_shares(hold_out, .2))  # other shares: for new patients only
    for m in (before, after):
        assert m.group_by('patient_id').agg(pl.col('split').n_unique())['split'].max() == 1
        assert m.group_by('study_id').agg(pl.col('split').n_unique())['split'].max() == 1
    old = dict(before.select('image_id', 'split').iter_rows())
    assert all(split == old[i] for i, split in after.select('image_id', 'split').iter_rows() if i in old)


def test_a_frozen_split_differs_from_what_the_new_shares_would_say(tmp_path):
    "the test above can fail: without freezing, these patients would move"
    write(tmp_path/'dicom', [(p, 0) for p in range(40)])
    before = scan(tmp_path/'dicom', tmp_path/'cohort', with_shares(.1, .1))
    after = scan(tmp_path/'dicom', tmp_path/'cohort', with_shares(.6, .1))
    fresh = scan(tmp_path/'dicom', tmp_path/'other', with_shares(.6, .1))
    assert before['split'].equals(after['split']) and (fresh['split'] == 'hold_out').sum() > 2 * (after['split'] == 'hold_out').sum()


def test_left_and_right_breast_of_cbis_ddsm_share_a_split(tmp_path):
    names = [f'{kind}_P_{p:05d}_{side}_{view}' for p in range(12) for kind in ('Mass-Test', 'Calc-Training') for side in ('LEFT', 'RIGHT') for view in ('CC', 'MLO')]
    for i, n in enumerate(names):
        (tmp_path/'d'/n).mkdir(parents=True)
        (tmp_path/'d'/n/'1.dcm').write_bytes(df.make(TINY, PatientID=n, StudyInstanceUID=f'1.2.{i}', SOPInstanceUID=f'1.3.{i}'))
    m = scan(tmp_path/'d', tmp_path/'c', S)
    assert m['patient_id'].n_unique() == 12
    m = m.with_columns(p=pl.col('path').str.extract(r'P_(\d+)'))
    assert m.group_by('p').agg(pl.col('split').n_unique())['split'].max() == 1


@pytest.mark.parametrize('filler', ['', 'ANONYMOUS', '0000', 'Anonymized', 'DE-IDENTIFIED', 'xxxx', ' unknown '])
def test_one_name_for_everybody_is_no_name(tmp_path, filler):
    "an archive in which every PatientID is ANONYMOUS is not one patient"
    for i in range(6): (tmp_path/f'{i}.dcm').write_bytes(df.make(TINY, PatientID=filler, StudyInstanceUID=f'1.2.{i // 2}', SOPInstanceUID=f'1.3.{i}'))
    m = scan(tmp_path, tmp_path/'..'/f'{tmp_path.name}-cohort', S)
    assert m['patient_id'].n_unique() == 3 and m.group_by('study_id').agg(pl.col('patient_id').n_unique())['patient_id'].max() == 1
