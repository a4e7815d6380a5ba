"De-identification: every attribute of the standard's table at every depth gets its action, pixels stay, nothing names anybody, and whatever comes in comes out."
import copy
import csv
import functools
import hashlib
import os
import re
import struct
import tempfile
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID

import dicom_files as df
import hostile_files as H
from conftest import ROOT
from mammo_nb.cohort.facts import pseudonym
from mammo_nb.core.engine import engine, map_files
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom import text
from mammo_nb.dicom.phantom import make_cohort, phantom_image
from mammo_nb.dicom.read import Source, open_source, read_frame
from mammo_nb.edge import deidentify as D

KEY = b'k' * 32
ALL = ('clean_descriptors', 'clean_pixels', 'device_pseudonyms', 'modified_dates', 'retain_safe_private')
TABLE = [r for r in csv.DictReader(l for l in open(ROOT/'mammo_nb/edge/static/ps3_15_2026c.csv', encoding='utf-8') if l[0] != '#')]  # read by ourselves
TEXTS = {'LO', 'SH', 'LT', 'ST', 'UT', 'UC', 'CS', 'AE', 'PN'}


def machine(*options, key=KEY, **edge):
    s = load_settings(ROOT/'settings.ini')
    return D.Deidentifier(s.model_copy(update=dict(edge=s.edge.model_copy(update=dict(options=options, **edge)))), key)


def mammogram(ts=df.EXPLICIT, px=None, **kw):
    "A small mammogram of somebody"
    ds = df.dataset(df.tissue(64, 48) if px is None else px, ts, **{k: v for k, v in kw.items() if k in ('bits', 'signed')})
    who = dict(PatientName='DOE^JANE', PatientID='P-4711', PatientBirthDate='19550214', PatientSex='F', StudyInstanceUID='1.2.3.4', SeriesInstanceUID='1.2.3.4.5', StudyDate='20240131',
               StudyTime='0930', AccessionNumber='ACC12345', DeviceSerialNumber='SN-900', StationName='ROOM1', InstitutionName='St Elsewhere')
    for k, v in (who | {k: v for k, v in kw.items() if k not in ('bits', 'signed')}).items(): setattr(ds, k, v)
    return ds


def through(ds, folder, m=None, out=None):
    "A dataset through the engine: what `file` says, and what came out"
    m, src = m or machine('device_pseudonyms', 'modified_dates'), folder/'in.dcm'
    src.write_bytes(ds if isinstance(ds, bytes) else df.content(ds))
    r = m.file(src, out or tempfile.mkdtemp(dir=folder, prefix='out'))
    return r, pydicom.dcmread(r.path) if r.path else None


# --- the table

def test_the_table_has_both_editions_rows():
    assert len(TABLE) == 656 and len(D.PROFILE) == 656  # edition 2026c: 655 attributes and the row of the private ones
    assert sum(not r['since'] for r in TABLE) == 621  # those of 2024
    assert Counter(r['basic'] for r in TABLE) == {'X': 416, 'D': 93, 'U': 55, 'Z': 42, 'X/D': 23, 'X/Z': 11, 'X/Z/D': 8, 'Z/D': 6, 'X/Z/U*': 2}


@pytest.mark.parametrize('edition', ['2024b', '2026c'])
def test_the_table_agrees_with_dicom_anonymizer(edition):
    pytest.importorskip('dicomanonymizer', reason='dicom-anonymizer is not installed')
    from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
    theirs = dicom_anonymization_database_selector(f'dicomfields_{edition}')
    mine = {r['tag']: r['basic'] for r in TABLE}
    for name, tags in theirs.items():
        if name == 'ALL_TAGS': continue
        action = name.removesuffix('_TAGS').replace('_STAR', '*').replace('_', '/')
        for t in tags:
            tag = f'({t[0]:04X},{t[1]:04X})' if len(t) == 2 else '(50xx,xxxx)' if t[0] == 0x5000 else f'(60xx,{t[1]:04X})'
            assert mine[tag] == action.replace('U/*', 'U*'), tag


# --- every attribute, at every depth, under several sets of options

def vr_of(tag): return dictionary_VR(tag).split()[0] if dictionary_has_tag(tag) else 'LO'


def old_value(tag, vr):
    "A value of somebody's, different for every attribute"
    n = int(tag)
    return {'DA': f'2021{n % 12 + 1:02}{n % 28 + 1:02}', 'TM': f'{n % 24:02}1501', 'DT': f'2020{n % 12 + 1:02}{n % 28 + 1:02}1015', 'UI': f'1.2.3.{n}', 'AS': '063Y', 'DS': '7.5', 'IS': '77',
            'UR': f'http://old/{n:x}', 'SQ': None, 'AT': 0x00100010, 'PN': f'WAS^N{n:x}'}.get(vr) or (f'OLD {n:x}'[:16] if vr in TEXTS else b'OLD\0' + struct.pack('<I', n)
            if vr in ('OB', 'OW', 'UN') else 77)


def put_all(ds, tags):
    for tag in tags:
        vr = vr_of(tag)
        if vr == 'SQ':
            item = Dataset()
            item.PatientName, item.ReferencedSOPInstanceUID, item.CodeValue = 'WAS^NESTED', '1.2.3.99', 'KEPT'
            ds.add_new(tag, 'SQ', Sequence([item]))
        elif tag == 0x00080201: ds.add_new(tag, 'SH', '+0100')
        else: ds.add_new(tag, vr, old_value(tag, vr))
    return ds


def tag_of(row): return Tag(int(row['tag'][1:5] + row['tag'][6:10], 16)) if re.fullmatch(r'\([0-9A-F,]{9}\)', row['tag']) else None


TAGS = {tag_of(r): r for r in TABLE if tag_of(r)}
BODY = [t for t in TAGS if t.group > 4]  # commands, file meta and media directories have no place in an image's header
NEEDED = ('SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID', 'PatientID', 'PatientName')


def everything():
    "A file that carries every attribute at top level, nested in a standard sequence and nested in a private one"
    ds = put_all(mammogram(), BODY)
    for nest in (inner := Dataset(), private := Dataset()): put_all(nest, BODY)
    for t in (0x50000005, 0x50003000, 0x60003000, 0x60024000): [d.add_new(t, 'OW' if t & 0xffff == 0x3000 else 'US' if t & 0xffff == 5 else 'LO', b'OLD!' if t & 0xffff == 0x3000 else 7 if t & 0xffff == 5 else 'OLD plane')
                                                                for d in (ds, inner, private)]
    deep = Dataset()
    deep.SharedFunctionalGroupsSequence = [inner]
    ds.PerFrameFunctionalGroupsSequence = [deep]  # two levels down
    block = ds.private_block(0x0019, 'OUR MAKER', create=True)
    block.add_new(0x10, 'SQ', Sequence([private]))
    block.add_new(0x11, 'LO', 'SAFE TEXT')
    item = Dataset()
    item.PrivateGroupReference, item.PrivateCreatorReference, item.BlockIdentifyingInformationStatus = 0x0019, 'OUR MAKER', 'SAFE'
    ds.PrivateDataElementCharacteristicsSequence = [item]
    return ds


def expected(row, vr, options):
    "Actions that the table allows, with what options ask for"
    o, basic = set(options), row['basic']
    if row['tag'] in ('(0010,0010)', '(0010,0020)'): return {'patient'}
    if row['modified_dates'] and 'modified_dates' in o and (vr in ('DA', 'TM', 'DT') or row['tag'] == '(0008,0201)'): return {'shift'}
    if row['device'] == 'K' and 'retain_device' in o: return {'U*' if vr == 'SQ' else 'K'}  # a sequence is entered
    if row['device'] and {'device_pseudonyms', 'retain_device'} & o and vr == 'UI': return {'U'}
    if row['device'] and {'device_pseudonyms', 'retain_device'} & o and vr in TEXTS: return {'pseudonym'}
    if row['descriptors'] and 'clean_descriptors' in o and vr in TEXTS: return {'clean'}
    if row['descriptors'] and 'clean_descriptors' in o and vr == 'SQ': return {'U*'}
    return set(basic.split('/'))


def done(ds, tag, old, patient, days):
    "Which action has been taken, judged by the values alone"
    if tag not in ds: return 'X'
    e, was, vr = ds[tag], old[tag], vr_of(tag)
    if vr == 'SQ':
        if not e.value: return 'Z'
        assert 'WAS' not in str(e) and '1.2.3.99' not in str(e)
        return 'U*' if 'CodeValue' in e.value[0] and e.value[0].CodeValue == 'KEPT' and e.value[0].ReferencedSOPInstanceUID == D.new_uid(KEY, '1.2.3.99') else 'D'
    if e.is_empty: return 'Z'
    text = str(e.value)
    if tag in (0x00100010, 0x00100020) and text == patient: return 'patient'
    if text == str(was.value): return 'shift' if vr == 'TM' or int(tag) == 0x00080201 else 'K'
    if vr == 'UI': return 'U' if text == D.new_uid(KEY, str(was.value)) and re.fullmatch(r'2\.25\.[1-9]\d{0,38}', text) and UID(text).is_valid else '?'
    if vr in ('DA', 'DT'):
        d = lambda t: date(int(t[:4]), int(t[4:6]), int(t[6:8]))
        if d(text) - d(str(was.value)) == timedelta(days) and text[8:] == str(was.value)[8:]: return 'shift'
    if re.fullmatch('[0-9A-F]{12}', text) and vr in TEXTS: return 'pseudonym'
    assert 'OLD' not in text and 'old' not in text and 'WAS' not in text
    return 'D'


@pytest.mark.parametrize('options', [(), ('device_pseudonyms', 'modified_dates'), ('retain_device', 'modified_dates'), ('clean_descriptors', 'retain_safe_private'), ALL,
                                     (*ALL[:2], 'retain_device', *ALL[3:])], ids=lambda o: '+'.join(x[:12] for x in o) or 'basic')
def test_every_attribute_at_every_depth_gets_its_action(options, tmp_path, capsys):
    source, m = everything(), machine(*options)
    r, new = through(source, tmp_path, m)
    assert r.status == 'ok', r.reason
    patient = pseudonym(KEY, str(source.PatientID))
    days = D.shift_days(KEY, patient)
    depths = [('top', new, source), ('nested', new.PerFrameFunctionalGroupsSequence[0].SharedFunctionalGroupsSequence[0], source.PerFrameFunctionalGroupsSequence[0].SharedFunctionalGroupsSequence[0])]
    assert ((0x0019, 0x1010) in new) == ('retain_safe_private' in options) == ((0x0019, 0x1011) in new)
    if 'retain_safe_private' in options: depths.append(('private', new[0x00191010].value[0], source[0x00191010].value[0]))
    count = {}
    for name, got, old in depths:
        taken = {t: done(got, t, old, pseudonym(KEY, str(old.PatientID)), days) for t in BODY}
        wrong = {}
        for t, what in taken.items():
            want, vr = expected(TAGS[t], vr_of(t), options), vr_of(t)
            if want == {'clean'}: want = {'Z'}  # no word of these is on the list
            if 'D' in want and vr == 'UI': want |= {'U'}
            if name == 'top' and keyword_for_tag(t) in NEEDED: want |= {'patient', 'U'} & {what}
            if what not in want: wrong[str(t), TAGS[t]['name'], vr] = (what, want)
        assert not wrong, (name, wrong)
        assert not any(t.group // 256 in (0x50, 0x60) for t in got.keys())
        count[name] = Counter(taken.values())
    print({k: (sum(v.values()), dict(v)) for k, v in count.items()})
    assert all(sum(v.values()) == len(BODY) == 648 for v in count.values())
    got = Path(r.path).read_bytes()
    assert b'WAS^' not in got and (b'OLD' not in got or 'retain_device' in options)
    assert set(r.counts) >= ({0, 1, 2} if 'retain_safe_private' in options else {0, 2})


def test_private_attributes_go_with_everything_in_them(tmp_path):
    r, new = through(everything(), tmp_path)
    assert not any(t.is_private for t in new.keys()) and b'OUR MAKER\0' not in r.path.read_bytes()


@pytest.mark.parametrize('syntax', [df.IMPLICIT, df.BIG, df.DEFLATED])
def test_every_attribute_in_other_encodings(syntax, tmp_path):
    ds = everything()
    del ds.PrivateDataElementCharacteristicsSequence, ds[0x00191010]
    for nest in (ds, ds.PerFrameFunctionalGroupsSequence[0].SharedFunctionalGroupsSequence[0]):
        for t in [t for t in nest.keys() if not t.is_private and not dictionary_has_tag(t)]: del nest[t]
    a, b = through(ds, tmp_path)[1], None
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    if syntax == df.BIG: ds.PixelData = np.frombuffer(ds.PixelData, '<u2').astype('>u2').tobytes()
    old = tmp_path/syntax
    old.mkdir()
    r, b = through(ds, old)
    assert r.status == 'ok' and b.file_meta.TransferSyntaxUID == syntax
    for d in (a, b):
        d.file_meta.TransferSyntaxUID = UID(df.EXPLICIT)
        del d.PixelData
    assert a.to_json() == b.to_json()


# --- which choice, by the kind of object

def test_a_choice_is_made_by_what_the_object_must_have(tmp_path):
    more = dict(ContentDate='20240131', SeriesDate='20240131', DetectorID='D1', OperatorsName='OP^ER', ReferencedPerformedProcedureStepSequence=[])
    ds = mammogram(**more)
    _, mg = through(ds, tmp_path, machine())
    assert mg.ContentDate == '' and not any(k in mg for k in ('DeviceSerialNumber', 'InstitutionName', 'DetectorID', 'SeriesDate', 'OperatorsName', 'StationName'))
    ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.13.1.3'  # tomosynthesis: serial number and content date are type 1
    _, dbt = through(ds, tmp_path, machine())
    assert dbt.DeviceSerialNumber == 'ANONYMIZED' and dbt.ContentDate == '19000101' and 'InstitutionName' not in dbt
    ds.SOPClassUID = '1.2.3.4'  # of an unknown kind: valid whatever it is
    _, other = through(ds, tmp_path, machine())
    assert other.DeviceSerialNumber == other.InstitutionName == other.DetectorID == 'ANONYMIZED'


# --- names, dates and UIDs

def test_a_patient_is_the_same_one_everywhere_and_another_for_another_key(tmp_path):
    out = [through(mammogram(SOPInstanceUID=f'1.2.9.{i}', PatientID=p), tmp_path, machine(key=k))[1] for i, (p, k) in enumerate([('P-4711', KEY), (' P-4711 ', KEY), ('P-4712', KEY), ('P-4711', b'x' * 32)])]
    ids = [o.PatientID for o in out]
    assert ids[0] == ids[1] == pseudonym(KEY, 'P-4711') and len(set(ids)) == 3 and all(o.PatientName == o.PatientID for o in out)
    assert out[0].StudyInstanceUID == out[1].StudyInstanceUID != out[3].StudyInstanceUID


def test_intervals_stay_and_every_date_of_a_patient_moves_alike(tmp_path):
    m = machine('modified_dates', max_shift=30)
    dates, moved = ['20231230', '20240229', '20240301'], []
    for i, d in enumerate(dates):
        ds = mammogram(SOPInstanceUID=f'1.2.9.{i}', StudyInstanceUID=f'1.2.8.{i}', StudyDate=d, AcquisitionDateTime=f'{d}101500.25+0100', ContentDate='not a date', SeriesDate='2024.02.28')
        _, new = through(ds, tmp_path, m)
        moved.append(new.StudyDate)
        assert new.AcquisitionDateTime == new.StudyDate + '101500.25+0100' and new.ContentDate == '' and new.StudyTime == '0930' and new.PatientBirthDate == ''
        assert new.LongitudinalTemporalInformationModified == 'MODIFIED'
    at = lambda t: date(int(t[:4]), int(t[4:6]), int(t[6:]))
    days = {at(b) - at(a) for a, b in zip(dates, moved)}
    assert days == {timedelta(D.shift_days(KEY, pseudonym(KEY, 'P-4711'), 30))} and 0 < abs(next(iter(days)).days) <= 30
    shifts = [D.shift_days(KEY, f'{i:016x}', 30) for i in range(4000)]
    assert set(shifts) == set(range(-30, 31)) - {0}
    assert through(mammogram(), tmp_path, machine())[1].LongitudinalTemporalInformationModified == 'REMOVED'


@pytest.mark.parametrize('vr, old, days, new', [('DA', '20240228', 2, '20240301'), ('DA', '00010101', -1, ''), ('DA', '99991231', 1, ''), ('DA', '20240230', 1, ''), ('DA', '٢٠٢٤٠١٠١', 1, ''),
    ('DT', '2024', 400, '2025'), ('DT', '202401', 1, '202401'), ('DT', '20240131', 1, '20240201'), ('DT', '2024013110', 1, '2024020110'), ('DT', '20240131-0500', 1, '20240201-0500'),
    ('DT', '2024.5', 1, ''), ('TM', '10:15:01.5', 9, '10:15:01.5'), ('TM', 'DOE', 9, ''), ('DA', '', 9, '')])
def test_dates(vr, old, days, new): assert D.shifted(old, vr, days) == new


def test_uids_are_valid_distinct_and_join_up(tmp_path):
    assert len({D.new_uid(KEY, f'1.2.3.{i}') for i in range(20000)}) == 20000
    assert D.new_uid(KEY, '1.23') != D.new_uid(KEY, '12.3') and D.new_uid(KEY, '1.2.840.10008.1.4.1.1') == '1.2.840.10008.1.4.1.1'  # a well-known frame of reference
    ref = df.sequence_item(ReferencedSOPClassUID='1.2.840.10008.5.1.4.1.1.1.2', ReferencedSOPInstanceUID='1.2.9.1')
    a, b = (through(mammogram(SOPInstanceUID=u, SourceImageSequence=[ref] if u.endswith('2') else []), tmp_path)[1] for u in ('1.2.9.1', '1.2.9.2'))
    assert b.SourceImageSequence[0].ReferencedSOPInstanceUID == a.SOPInstanceUID == a.file_meta.MediaStorageSOPInstanceUID
    assert b.SourceImageSequence[0].ReferencedSOPClassUID == b.SOPClassUID and UID(a.SOPInstanceUID).is_valid
    multi = through(mammogram(IrradiationEventUID=['1.2.3', '1.2.4']), tmp_path)[1]
    assert list(multi.IrradiationEventUID) == [D.new_uid(KEY, '1.2.3'), D.new_uid(KEY, '1.2.4')]


def test_without_patient_study_or_series_a_file_still_has_its_own(tmp_path):
    ds = mammogram()
    for k in ('PatientID', 'PatientName', 'StudyInstanceUID', 'SeriesInstanceUID'): delattr(ds, k)
    new = [through(ds, tmp_path)[1] for _ in range(2)]
    assert new[0].StudyInstanceUID.startswith('2.25.') and new[0].SeriesInstanceUID.startswith('2.25.') and new[0].PatientID and new[0].StudyInstanceUID == new[1].StudyInstanceUID
    r, _ = through(mammogram(PatientID='ANONYMOUS'), tmp_path)  # a filler is nobody's number: the study stands for the patient, as in the manifest
    assert pydicom.dcmread(r.path).PatientID == pseudonym(KEY, '1.2.3.4', 'study')


# --- texts

def test_names_are_taken_out_of_texts_that_stay(tmp_path):
    code = df.sequence_item(CodeValue='1', CodingSchemeDesignator='99X', CodeMeaning='view of jane doe, left')
    ds = mammogram(PaddleDescription='for DOE^JANE', ManufacturerModelName='Model of Doering', AnatomicRegionSequence=[code], SoftwareVersions=['P-4711', '1.0'], FilterType='DOE')
    _, new = through(ds, tmp_path)
    assert new.PaddleDescription == 'for' and new.ManufacturerModelName == 'Model of Doering' and new.SoftwareVersions[1] == '1.0' and 'P-4711' not in str(new)
    assert re.fullmatch(r'view of\s*, left', new.AnatomicRegionSequence[0].CodeMeaning) and 'DOE' not in str(new).upper().replace('DOERING', '').replace('FILTER TYPE', '').replace("CS: 'DOE'", '')
    ds = mammogram(PaddleDescription='DOE', RequestAttributesSequence=[df.sequence_item(ScheduledPerformingPhysicianName='X^HOUSEMAN')], DetectorDescription='calibrated by Houseman')
    new = through(ds, tmp_path)[1]
    assert new.PaddleDescription == 'REMOVED' and new.DetectorDescription == 'calibrated by'


def test_cleaned_descriptions_keep_known_words_only(tmp_path):
    _, new = through(mammogram(StudyDescription='MAMMO screening for Jane, *1955', SeriesDescription='L CC'), tmp_path, machine('clean_descriptors'))
    assert new.StudyDescription == 'MAMMO screening for' and new.SeriesDescription == 'L CC'
    assert 'StudyDescription' not in through(mammogram(StudyDescription='MAMMO'), tmp_path)[1]


def test_names_of_persons_that_the_table_forgets_are_emptied_and_unknown_attributes_go(tmp_path):
    ds = mammogram(EvaluatorName='EVA^LUATOR', PatientBirthDateInAlternativeCalendar='5715')
    ds.add_new(0x00080001, 'UL', 7)
    ds.add_new(0x0018f123, 'LO', 'of no dictionary')
    _, new = through(ds, tmp_path)
    assert new.EvaluatorName == '' and not any(t in new for t in (0x00080001, 0x0018f123, 0x00100033))


def test_other_alphabets(tmp_path):
    ds = mammogram(SpecificCharacterSet='ISO_IR 192', PatientName='Müller^Jürgen=山田', PatientID='Ä-1', PaddleDescription='Paddel von Müller, groß')
    _, new = through(ds, tmp_path)
    assert new.PatientID == pseudonym(KEY, 'Ä-1') and new.PaddleDescription == 'Paddel von , groß' and 'Müller' not in str(new)


# --- devices, provenance, what the file says of itself

def test_scanners_are_told_apart_and_not_named(tmp_path):
    a, b, c = (through(mammogram(DeviceSerialNumber=s), tmp_path)[1] for s in ('SN-900', 'SN-901', 'SN-900'))
    assert a.DeviceSerialNumber == c.DeviceSerialNumber != b.DeviceSerialNumber and re.fullmatch('[0-9A-F]{12}', a.DeviceSerialNumber) and a.StationName != 'ROOM1'
    kept = through(mammogram(), tmp_path, machine('retain_device'))[1]
    assert kept.DeviceSerialNumber == 'SN-900' and kept.StationName == 'ROOM1'


def test_what_was_done_is_written_down(tmp_path):
    before = df.sequence_item(Manufacturer='ARCHIVE', InstitutionName='St Elsewhere', StationName='ARCH1')
    _, new = through(mammogram(ContributingEquipmentSequence=[before], DeidentificationMethod='somebody else'), tmp_path, machine(*ALL, station='TRUCK 7'))
    assert new.PatientIdentityRemoved == 'YES' and '2026c' in new.DeidentificationMethod
    assert [(c.CodeValue, c.CodingSchemeDesignator) for c in new.DeidentificationMethodCodeSequence] == [(c, 'DCM') for c in ('113100', '113105', '113101', '113109', '113107', '113111')]
    old, here = new.ContributingEquipmentSequence
    assert new.StationName == here.StationName == 'TRUCK 7' and here.PurposeOfReferenceCodeSequence[0].CodeValue == '109104' and old.Manufacturer == 'ARCHIVE' and 'Elsewhere' not in str(new)
    assert new.BurnedInAnnotation == 'NO' and 'ARCH1' not in str(new)
    plain = through(mammogram(), tmp_path, machine())[1]
    assert [c.CodeValue for c in plain.DeidentificationMethodCodeSequence] == ['113100'] and 'ContributingEquipmentSequence' not in plain and 'BurnedInAnnotation' not in plain


def test_the_files_head_is_our_own(tmp_path):
    ds = mammogram()
    ds.file_meta.SourceApplicationEntityTitle, ds.file_meta.ImplementationVersionName = 'ELSEWHERE', 'OF DOE'
    data = df.content(ds)
    r, new = through(b'DOE^JANE'.ljust(128, b'!') + data[128:], tmp_path)
    got = r.path.read_bytes()
    assert got[:128] == bytes(128) and got[128:132] == b'DICM'
    assert {int(t) for t in new.file_meta.keys()} == {0x00020000, 0x00020001, 0x00020002, 0x00020003, 0x00020010, 0x00020012, 0x00020013}
    assert b'DOE' not in got and new.file_meta.MediaStorageSOPClassUID == new.SOPClassUID
    assert r.sha256 == hashlib.sha256(got).hexdigest() and re.fullmatch(r'[0-9a-f]{32}\.dcm', r.path.name) and r.path.parent.name == r.path.name[:2]


# --- private attributes

def test_private_attributes_known_to_be_safe_may_stay(tmp_path):
    def source():
        ds = mammogram()
        b = ds.private_block(0x0045, 'GEMS_SENO_02', create=True)
        b.add_new(0x1b, 'CS', 'LMLO'); b.add_new(0x1c, 'LO', 'not on the list')
        ds.private_block(0x0019, 'UNHEARD OF', create=True).add_new(0x01, 'LO', 'secret')
        h = ds.private_block(0x0019, 'HOLOGIC, Inc.', create=True)
        h.add_new(0x8a, 'SQ', Sequence([df.sequence_item(PatientName='DOE^JANE', CodeValue='1')])); h.add_new(0x26, 'LO', 'paddle of DOE')
        return ds
    for ts in (df.EXPLICIT, df.IMPLICIT):
        ds = source()
        ds.file_meta.TransferSyntaxUID = UID(ts)
        r, new = through(ds, tmp_path, machine('retain_safe_private'))
        private = {(t.group, t.element & 0xff) for t in new.keys() if t.is_private and not t.is_private_creator}
        assert private == {(0x45, 0x1b), (0x19, 0x8a), (0x19, 0x26)}, ts
        got = r.path.read_bytes()
        assert b'UNHEARD' not in got and b'DOE' not in got and b'paddle of' in got and new.DeidentificationMethodCodeSequence[1].CodeValue == '113111'


def test_a_block_may_be_safe_in_part(tmp_path):
    ds = mammogram()
    b = ds.private_block(0x0021, 'OUR MAKER', create=True)
    for e in (1, 2, 3): b.add_new(e, 'LO', f'text {e}')
    item = df.sequence_item(PrivateGroupReference=0x0021, PrivateCreatorReference='OUR MAKER', BlockIdentifyingInformationStatus='MIXED', NonidentifyingPrivateElements=[1, 3])
    ds.PrivateDataElementCharacteristicsSequence = [item]
    _, new = through(ds, tmp_path, machine('retain_safe_private'))
    assert sorted(str(e.value) for e in new if e.tag.group == 0x21) == ['OUR MAKER', 'text 1', 'text 3']
    item.BlockIdentifyingInformationStatus = 'UNSAFE'
    assert not any(t.is_private for t in through(ds, tmp_path, machine('retain_safe_private'))[1].keys())


# --- pixels

@pytest.mark.parametrize('ts', df.LOSSLESS + df.LOSSY, ids=lambda t: H.NAMES.get(t, t))
@pytest.mark.parametrize('frames', [1, 3])
def test_pixels_and_transfer_syntax_stay(ts, frames, tmp_path):
    a = [df.tissue(64, 48, seed=i) for i in range(frames)]
    if ts == df.BASELINE: a = [(x >> 4).astype(np.uint8) for x in a]
    r, new = through(mammogram(ts, a, bits=8 if ts == df.BASELINE else 12), tmp_path, machine('clean_pixels'))
    assert r.status == 'ok' and not r.masked and new.file_meta.TransferSyntaxUID == ts
    was = pydicom.dcmread(tmp_path/'in.dcm').PixelData
    changed = sum(a != b for a, b in zip(new.PixelData, was))
    assert len(new.PixelData) == len(was) and changed <= 40 * frames * (b'OpenJP' in was)  # the encoder's own comment
    with open_source(tmp_path/'in.dcm') as x, open_source(r.path) as y: assert all(np.array_equal(x.frame(i).pixels, y.frame(i).pixels) for i in range(frames))


def burnt(size=(900, 700), lines=('DOE^JANE ID 0815-4711', '*14.02.1955 F 29 kV')):
    import cv2
    img = phantom_image('CC', 'R', size, seed=70)[0]
    ink = np.zeros(size, np.uint8)
    for i, line in enumerate(lines): cv2.putText(ink, line, (30, 60 + 40 * i), cv2.FONT_HERSHEY_SIMPLEX, .8, 255, 2, cv2.LINE_AA)
    return (img + (4095. - img) * (ink / 255)).astype(np.uint16)


@pytest.mark.parametrize('ts, out', [(t, t) for t in (df.IMPLICIT, df.EXPLICIT, df.BIG, df.DEFLATED)] + [(t, df.J2K_LOSSLESS) for t in (df.RLE, df.JPEGLL1, df.JLS, df.J2K_LOSSLESS, df.J2K, df.HTJ2K_LOSSLESS)],
                         ids=lambda t: H.NAMES.get(t, t))
def test_text_in_the_picture_is_painted_over_and_all_else_stays(ts, out, tmp_path):
    r, new = through(mammogram(ts, burnt(), BurnedInAnnotation='YES', ImageType=['ORIGINAL', 'PRIMARY']), tmp_path, machine('clean_pixels'))
    assert r.status == 'ok' and r.masked and new.file_meta.TransferSyntaxUID == out and new.BurnedInAnnotation == 'NO' and new.ImageType[0] == 'DERIVED'
    before, after = read_frame(tmp_path/'in.dcm').pixels, read_frame(r.path).pixels
    inside = np.zeros(before.shape, bool)
    for f, top, left, bottom, right in r.masked:
        inside[top:bottom, left:right] = True
        assert f == 0 and len(np.unique(after[top:bottom, left:right])) == 1
    assert np.array_equal(before[~inside], after[~inside]) and inside[40:105, 30:250].mean() > .95 and inside.mean() < .2
    with open_source(r.path) as s: assert not text.has_text(D.render(s, 1024))


def test_text_on_one_frame_of_several_signed_colour_and_planar(tmp_path):
    plain = phantom_image('CC', 'R', (900, 700), seed=71)[0]
    for ts in (df.EXPLICIT, df.JLS):
        r, new = through(mammogram(ts, [plain, burnt(), plain]), tmp_path, machine('clean_pixels'))
        assert r.status == 'ok' and {b[0] for b in r.masked} == {1} and int(new.NumberOfFrames) == 3
        with open_source(r.path) as s: assert np.array_equal(s.frame(0).pixels, plain) and np.array_equal(s.frame(2).pixels, plain) and not np.array_equal(s.frame(1).pixels, burnt())
    for ts in (df.EXPLICIT, df.JPEGLL1):
        r, _ = through(mammogram(ts, burnt().astype(np.int16) - 2048, signed=True), tmp_path, machine('clean_pixels'))
        a, b = read_frame(tmp_path/'in.dcm').pixels, read_frame(r.path).pixels
        assert r.masked and a.dtype.kind == b.dtype.kind == 'i' and a.min() < 0 and (a != b).mean() < .2
    rgb = np.dstack([burnt() >> 4] * 3).astype(np.uint8)
    for planar in (0, 1):
        ds = mammogram(px=burnt(), SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=planar, BitsAllocated=8, BitsStored=8, HighBit=7)
        ds.PixelData = (np.moveaxis(rgb, 2, 0) if planar else rgb).tobytes()
        r, new = through(ds, tmp_path, machine('clean_pixels'))
        (_, top, left, bottom, right), = r.masked[:1]
        assert len(np.unique(new.pixel_array[top:bottom, left:right].reshape(-1, 3), axis=0)) == 1 and (new.pixel_array != rgb).mean() < .2


def test_a_claim_of_text_that_nobody_finds_is_rejected(tmp_path):
    for options, words in ((('clean_pixels',), 'none was found'), ((), 'add clean_pixels')):
        r, _ = through(mammogram(BurnedInAnnotation='YES'), tmp_path, machine(*options))
        assert r.status == 'rejected' and words in r.reason and r.path is None and not list(tmp_path.glob('out*/*/*'))
    r, new = through(mammogram(px=burnt()), tmp_path, machine())  # and where nobody asked, nothing is painted and nothing is claimed
    assert r.status == 'ok' and not r.masked and 'BurnedInAnnotation' not in new and np.array_equal(new.pixel_array, burnt())


def test_what_hides_in_and_behind_the_pixels_does_not_come_along(tmp_path):
    ds = mammogram(px=df.tissue(64, 48) | 0x8000)  # an overlay in the highest bit
    for t, vr, v in ((0x60000010, 'US', 64), (0x60000011, 'US', 48), (0x60000100, 'US', 16), (0x60000102, 'US', 15), (0x60000022, 'LO', 'DOE')): ds.add_new(t, vr, v)
    ds.PixelData += b'DOE^JANE'
    ds.add_new(0xfffcfffc, 'OB', b'DOE^JANE')
    for ts, order in ((df.EXPLICIT, '<'), (df.BIG, '>')):
        d = copy.deepcopy(ds)
        d.file_meta.TransferSyntaxUID = UID(ts)
        if order == '>': d.PixelData = np.frombuffer(d.PixelData, '<u2').byteswap().tobytes()
        r, new = through(d, tmp_path)
        assert b'DOE' not in r.path.read_bytes() and not any(t.group == 0x6000 for t in new.keys())
        assert np.array_equal(np.frombuffer(new.PixelData, order + 'u2').reshape(64, 48), df.tissue(64, 48))


def test_bytes_behind_the_last_frame_stay_behind(tmp_path):
    ds = mammogram()
    ds.PixelData += b'DOE^JANE'
    r, new = through(ds, tmp_path)
    assert b'DOE' not in r.path.read_bytes() and np.array_equal(new.pixel_array, df.tissue(64, 48))


def test_comments_in_a_codestream_are_blanked(tmp_path):
    px = df.tissue(64, 48)
    for ts in (df.JPEGLL1, df.JLS, df.J2K_LOSSLESS):
        data, note = df.encode(px, ts, 12), b'PATIENT DOE^JANE'
        if ts == df.J2K_LOSSLESS:
            at = 4 + int.from_bytes(data[4:6])
            data = data[:at] + b'\xff\x64' + struct.pack('>HH', len(note) + 4, 1) + note + data[at:]
        else: data = data[:2] + b'\xff\xfe' + struct.pack('>H', len(note) + 2) + note + b'\xff\xe1' + struct.pack('>H', len(note) + 2) + note + data[2:]
        ds = mammogram(ts, px)
        ds.PixelData = pydicom.encaps.encapsulate([data])
        r, new = through(ds, tmp_path)
        assert b'DOE' not in r.path.read_bytes() and np.array_equal(read_frame(r.path).pixels, px)


# --- the form

def loose(ts=df.EXPLICIT):
    "Somebody's file in another form: undefined lengths, texts padded with more than they need or with zeros, group lengths, padding behind the pixels"
    ds = mammogram(ts, BodyPartExamined='BREAST', Manufacturer='ACME', KVP='29', ImageType=['ORIGINAL', 'PRIMARY'],
                   ViewCodeSequence=[df.sequence_item(CodeValue='1', CodeMeaning='view', ViewModifierCodeSequence=[df.sequence_item(CodeValue='x')])])
    for e in (ds['ViewCodeSequence'], ds.ViewCodeSequence[0]['ViewModifierCodeSequence']):
        e.is_undefined_length = e.value[0].is_undefined_length_sequence_item = True
    ds.add_new(0xfffcfffc, 'OB', b'\0' * 64)
    data = df.content(ds)
    for k, v in dict(BodyPartExamined=b'BREAST      ', Manufacturer=b'ACME\0\0', KVP=b'29  ', Modality=b'MG \0', SOPClassUID=ds.SOPClassUID.encode() + b' ').items():
        at = data.index(struct.pack('<HH', Tag(k).group, Tag(k).element), 200) + (4 if ts == df.IMPLICIT else 6)
        size = '<I' if ts == df.IMPLICIT else '<H'
        n, = struct.unpack_from(size, data, at)
        data = data[:at] + struct.pack(size, len(v)) + v + data[at + struct.calcsize(size) + n:]
    at = data.index(b'\x10\0\x10\0')  # the patient's group
    return data[:at] + (b'\x10\0\0\0' + (b'UL\4\0' if ts != df.IMPLICIT else b'\4\0\0\0') + b'\x40\0\0\0') + data[at:]


@pytest.mark.parametrize('ts', [df.EXPLICIT, df.IMPLICIT])
def test_the_form_is_the_one_that_servers_write(ts, tmp_path):
    data = loose(ts)
    assert data.count(b'BREAST      ') == 1 == data.count(b'ACME\0\0') and data.count(b'\xfe\xff\xdd\xe0') == 2 and data.endswith(b'\0' * 64)
    r, new = through(data, tmp_path)
    got = r.path.read_bytes()
    assert not got.count(b'\xfe\xff\xdd\xe0') + got.count(b'\xfe\xff\x0d\xe0') + got.count(b'\xfc\xff\xfc\xff') and not any(t.element == 0 for t in new.keys())
    assert got.endswith(pydicom.dcmread(tmp_path/'in.dcm').PixelData) and new.ViewCodeSequence[0].ViewModifierCodeSequence[0].CodeValue == 'x'
    held = {k: new.get_item(k).value for k in ('BodyPartExamined', 'Manufacturer', 'KVP', 'Modality', 'SOPClassUID')}
    assert held == dict(BodyPartExamined=b'BREAST', Manufacturer=b'ACME', KVP=b'29', Modality=b'MG', SOPClassUID=b'1.2.840.10008.5.1.4.1.1.1.2\0')


# --- sources, results, the two readers

def test_the_walk_and_pydicom_agree_to_the_byte(tmp_path, monkeypatch):
    files = [df.content(mammogram(ts, (df.tissue(64, 48) >> 4).astype(np.uint8) if ts == df.BASELINE else None, bits=8 if ts == df.BASELINE else 12)) for ts in df.LOSSLESS + df.LOSSY]
    files += [df.content(everything())] + [H.build(n) for n in QUICK if H.CASES[n].status == 'ok']
    quick = 0
    def results(sub):
        out = []
        for i, data in enumerate(files):
            folder = tmp_path/sub/str(i)
            folder.mkdir(parents=True)
            (folder/'in.dcm').write_bytes(data)
            out.append(machine(*set(ALL) - {'clean_pixels'}).file(folder/'in.dcm', folder))
        return [(r.status, r.sha256) for r in out]
    seen, walked = [], D._walked
    def spy(s, most):
        out = walked(s, most)
        seen.append(1)
        return out
    monkeypatch.setattr(D, '_walked', spy)
    a = results('walk')
    def unusual(*_): raise D._Unusual
    monkeypatch.setattr(D, '_walked', unusual)
    b = results('pydicom')
    assert a == b and len(seen) > 15 and sum(s == 'ok' for s, _ in a) > 15


def test_dataset_does_what_file_does_and_leaves_its_argument_alone(tmp_path):
    m = machine(*ALL)
    ds = everything()
    was = ds.to_json()
    new = m.dataset(ds)
    assert ds.to_json() == was
    _, out = through(everything(), tmp_path, m)
    del out.PixelData
    assert new.to_json() == out.to_json() and new.file_meta.MediaStorageSOPInstanceUID == out.SOPInstanceUID
    src = pydicom.dcmread(tmp_path/'in.dcm')
    assert m.dataset(src).to_json() == new.to_json()


def test_sources_are_left_alone_and_the_same_comes_out_again(tmp_path):
    src = tmp_path/'in.dcm'
    src.write_bytes(df.content(everything()))
    src.chmod(0o444)
    was = src.read_bytes(), src.stat().st_mtime_ns
    a, b, c = (machine(*ALL).file(src, tmp_path/f) for f in ('a', 'b', 'a'))
    assert (src.read_bytes(), src.stat().st_mtime_ns) == was and a.sha256 == b.sha256 == c.sha256 and a.path == c.path
    assert [p.name for p in tmp_path.rglob('*') if p.name.startswith('.')] == []


def test_of_two_images_with_one_uid_the_first_stays(tmp_path):
    a, _ = through(mammogram(KVP=29), tmp_path, out=tmp_path/'out')
    was = a.path.read_bytes()
    b, _ = through(mammogram(KVP=30), tmp_path, out=tmp_path/'out')
    assert b.status == 'rejected' and 'same SOP Instance UID' in b.reason and a.path.read_bytes() == was
    c, new = through(mammogram(KVP=30), tmp_path, machine('modified_dates'), tmp_path/'out')  # with other settings it is the same work done anew
    assert c.status == 'ok' and new.KVP == 30


def test_a_member_of_an_archive_and_a_file_without_preamble(tmp_path):
    import zipfile
    data = df.content(mammogram())
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('x/y.dcm', data)
    m = machine()
    r = m.file(f'{tmp_path}/a.zip!/x/y.dcm', tmp_path/'out')
    assert r.status == 'ok' and m.file(f'{tmp_path}/a.zip', tmp_path/'out').status == 'rejected'
    (tmp_path/'bare').write_bytes(data[data.index(b'\x08\0\x16\0UI'):])
    bare = m.file(tmp_path/'bare', tmp_path/'bare_out')
    assert bare.status == 'ok' and bare.sha256 == r.sha256


def test_errors_of_the_disk_are_raised_and_those_of_the_source_returned(tmp_path):
    from mammo_nb.core.settings import MammoError
    (tmp_path/'in.dcm').write_bytes(df.content(mammogram()))
    (tmp_path/'out').write_text('a file where a folder should be')
    with pytest.raises(MammoError, match='Cannot write'): machine().file(tmp_path/'in.dcm', tmp_path/'out')
    for bad, words in ((tmp_path/'missing', 'does not exist'), (tmp_path, 'folder')):
        r = machine().file(bad, tmp_path/'other')
        assert r.status == 'rejected' and words in r.reason and str(tmp_path) not in r.reason


# --- whatever comes in

QUICK = [n for n in H.CASES if not re.search(H.SLOW, n)]


SOME = [n for n in QUICK if H.CASES[n].status == 'ok'] + [n for n in QUICK if H.CASES[n].status != 'ok'][::1 if os.environ.get('ALL_CASES') else 4]


def _hostile(path, out, options): return machine(*options).file(path, out)


def test_hostile_files_come_out_or_say_why_not(tmp_path):
    cases = {tmp_path/'in'/p: c for p, c in H.write_cases(tmp_path/'in', SOME).items()}
    settings = load_settings(ROOT/'settings.ini')
    settings = settings.model_copy(update=dict(engine=settings.engine.model_copy(update=dict(workers=2))))
    fn, seen = functools.partial(_hostile, out=tmp_path/'out', options=('device_pseudonyms', 'modified_dates', 'clean_pixels')), {}
    with engine(settings) as client:
        for path, r, error in map_files(fn, list(cases), client, chunk=8, timeout=20): seen[path] = (r, error)
    assert set(seen) == set(cases)
    for path, case in cases.items():
        r, error = seen[path]
        if r is None:
            assert case.status != 'ok' and error, (path.name, error)
            continue
        assert r.status == 'ok' or r.reason and not re.search(r'/tmp|Traceback|Error\b', r.reason), path.name
        if r.status == 'ok':
            new = pydicom.dcmread(r.path)
            assert new.PatientIdentityRemoved == 'YES' and new.PixelData and r.sha256 == hashlib.sha256(r.path.read_bytes()).hexdigest()
    good = sum(r is not None and r.status == 'ok' for r, _ in seen.values())
    print(len(cases), 'hostile files,', good, 'de-identified')
    assert good > 20 and not [p for p in (tmp_path/'out').rglob('*.tmp')]
    wrong = {p.stem: seen[p][0].reason for p, c in cases.items() if c.status == 'ok' and seen[p][0].status != 'ok'}
    assert set(wrong) == {'uid_missing', 'groups_per_frame_missing'}, wrong  # without a UID, and with fewer frames than claimed: to be looked at, not to be shipped


@pytest.mark.parametrize('seed', range(4))
def test_operated_files_never_keep_a_name(seed, tmp_path):
    import random
    rng, kept = random.Random(seed), 0
    base = df.content(mammogram(PatientComments='DOE^JANE'))
    for i in range(60):
        data = H.operated(base, [(rng.choice([k for k in H.SURGERY if k not in ('flip', 'hole', 'relength', 'retype', 'flip_pixels')]), rng.random()) for _ in range(rng.choice([1, 2]))])
        r, _ = through(data, tmp_path, machine('modified_dates'))
        if r.status == 'ok':
            assert b'DOE^JANE' not in r.path.read_bytes(), i
            r.path.unlink()
            kept += 1
    assert kept > 5


def test_sequences_as_deep_as_the_limit(tmp_path):
    for n, ok in ((60, True), (70, False)):
        inner = df.sequence_item(PatientName='DOE^JANE', CodeValue='1')
        for _ in range(n - 1): inner = df.sequence_item(ConceptCodeSequence=[inner])
        r, new = through(mammogram(ConceptCodeSequence=[inner]), tmp_path)
        assert (r.status == 'ok') == ok and (ok or 'nested too deeply' in r.reason)
        if ok: assert b'DOE' not in r.path.read_bytes() and max(r.counts) == n
        if r.path: r.path.unlink()


def test_a_whole_cohort(tmp_path):
    make_cohort(tmp_path/'dicom', patients=6, image_size=192, seed=5, workers=1)
    files = [p for p in sorted((tmp_path/'dicom').rglob('*')) if p.is_file()]
    m = machine('device_pseudonyms', 'modified_dates', 'clean_pixels')
    results = [m.file(p, tmp_path/'out') for p in files]
    assert Counter(r.status for r in results)['ok'] > .6 * len(files) and all(r.reason for r in results if r.status != 'ok')
    before = {w for p, r in zip(files, results) if r.path for e in [pydicom.dcmread(p, stop_before_pixels=True)] for w in (str(e.PatientName), str(e.PatientID), str(e.SOPInstanceUID), str(e.StudyInstanceUID if 'StudyInstanceUID' in e else '-' * 9))}
    for r in results:
        if r.path:
            data = r.path.read_bytes()
            assert not any(w.encode() in data for w in before if len(w) > 4)


def test_a_row_that_a_wire_crosses_is_painted_over_whole(tmp_path):
    import cv2
    px = burnt()
    px[:, 300:305] = 4000  # a wire, from top to bottom; behind it there is only a letter's rest
    r, _ = through(mammogram(px=px), tmp_path, machine('clean_pixels'))
    assert r.status == 'ok'
    inside = np.zeros(px.shape, bool)
    for _, top, left, bottom, right in r.masked: inside[top:bottom, left:right] = True
    ink = (burnt() > phantom_image('CC', 'R', (900, 700), seed=70)[0] + 600.) & ~(px == 4000)
    assert inside[ink].all() and inside.mean() < .2, inside[ink].mean()


def test_identifiers_that_are_none_are_refused(tmp_path):
    for change, words in ((dict(SOPClassUID='DOE^JANE'), 'SOP Class'), (dict(SOPClassUID=''), 'SOP Class'), (dict(SOPInstanceUID=''), 'SOP Instance')):
        r, _ = through(mammogram(**change), tmp_path)
        assert r.status == 'rejected' and words in r.reason, change
    data = df.content(mammogram(df.JLS))
    for ts in (b'1.2.DOE', b'1.2.840.10008.1.2'):
        r, _ = through(data.replace(df.JLS.encode(), ts.ljust(len(df.JLS), b'\0')), tmp_path)
        assert r.status == 'rejected', ts


def test_numbers_are_taken_out_of_coded_words_too(tmp_path):
    _, new = through(mammogram(ViewPosition='P-4711', PatientOrientation=['A', 'DOE'], FilterType='ACC12345 X', BodyPartExamined='JANE'), tmp_path)
    assert new.ViewPosition == '' and new.FilterType == 'X' and list(new.PatientOrientation) == ['A', 'DOE'] and new.BodyPartExamined == 'JANE'  # words of names may be terms
