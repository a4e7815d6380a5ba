"""The verifier catches what an engine may do wrong: results of the real engine pass, and each planted fault is found. MIDI-B's ten checks in short."""
import ast
import base64
import copy
import hashlib
import io
import json
import re
import shutil
import struct
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames

import dicom_files as df
import hostile_files
from faults import edge_midi
from conftest import ROOT
from mammo_nb.core.settings import load_settings
from mammo_nb.edge import verify
from mammo_nb.edge.deidentify import Deidentifier
from mammo_nb.edge.verify import OPTIONS, verify_file, verify_links

warnings.filterwarnings('ignore')
KEY = bytes(range(32))
item = df.sequence_item


def settings(**edge):
    s = load_settings(ROOT/'settings.ini')
    return s.model_copy(update=dict(edge=s.edge.model_copy(update=dict(options=OPTIONS) | edge)))


def source(ts=df.EXPLICIT, frames=1, who=1, k=1, text=False, **header):
    "A mammogram of somebody, with what tempts an engine to err"
    px = [df.tissue(331, 253, seed=7 + i) for i in range(frames)]
    if text: px = [burn(a) for a in px]
    code = lambda meaning: item(CodeValue='76752008', CodingSchemeDesignator='SCT', CodeMeaning=meaning)
    ds = df.dataset(px, ts, SpecificCharacterSet='ISO_IR 100', StudyInstanceUID=f'1.2.826.0.1.55.{who}.1', SeriesInstanceUID=f'1.2.826.0.1.55.{who}.1.{k}',
        PatientName='Morgenstern^Idaline^^Dr' if who == 1 else f'Kowalczyk{who}^Nora', PatientID=f'HOSP-4711{who}', PatientBirthDate='19550214', PatientSex='F', AccessionNumber=f'ACC98765{who}',
        StudyDate='20210305', SeriesDate='20210305', AcquisitionDate='20210306', ContentDate='20210306', AcquisitionDateTime='20210306101500.25+0100', StudyTime='090000', ContentTime='091500',
        ReferringPhysicianName='Petrovic^Olga', InstitutionName='Saint Quilombo', InstitutionAddress='1 Nowhere Road', StationName='ROOM-MG7', DeviceSerialNumber='SN-88123', Manufacturer='Acme',
        ManufacturerModelName='Senso 3', KVP='29', BodyPartExamined='BREAST', ImageLaterality='L', ViewPosition='CC', PaddleDescription='24CM SCREEN', StudyDescription='MAMMOGRAPHY SCREENING',
        PatientComments='call her sister', FrameOfReferenceUID=f'1.2.826.0.1.55.{who}.9', DetectorID='DET-5550', BurnedInAnnotation='YES' if text else 'NO', StudyID='S-100200', SoftwareVersions='1.0',
        ImageType=['ORIGINAL', 'PRIMARY'], PatientOrientation=['A', 'R'], LossyImageCompression='00', WindowCenter='2000', WindowWidth='3000', UserContentLabel='label of mine',
        AnatomicRegionSequence=[item(**vars_of(code('Breast')), PatientName='Morgenstern^Idaline')], RequestAttributesSequence=[item(RequestedProcedureID='RP-20305', ScheduledProcedureStepID='SPS-1')],
        DateOfLastCalibration=['20210101', '20210201'], FailedSOPInstanceUIDList=[f'1.2.826.0.1.55.{who}.7', '1.2.840.10008.1.1', f'1.2.826.0.1.55.{who}.8'], AcquisitionDeviceProcessingDescription='MAMMO routine',
        SourceImageSequence=[item(ReferencedSOPClassUID='1.2.840.10008.5.1.4.1.1.1.2', ReferencedSOPInstanceUID=f'1.2.826.0.1.55.{who}.1.{k}.77')],
        ReferencedInstanceSequence=[item(ReferencedSOPClassUID='1.2.840.10008.5.1.4.1.1.1.2', ReferencedSOPInstanceUID=f'1.2.826.0.1.55.{who}.1.{k}.5'), item(ReferencedSOPInstanceUID='1.2.826.0.1.55.1.1.1.79')])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.826.0.1.55.{who}.1.{k}.5'
    ds.file_meta.SourceApplicationEntityTitle, ds.preamble = 'TRUCK_NORTH', b'PETROVIC OLGA'.ljust(128, b'\0')
    block = ds.private_block(0x0019, 'ACME 1.0', create=True)
    block.add_new(1, 'LO', 'Morgenstern in private')
    block.add_new(2, 'SQ', [item(PatientName='Morgenstern^Idaline', KVP='29')])
    for key, v in header.items(): setattr(ds, key, v)
    return ds


def vars_of(ds): return {e.keyword: e.value for e in ds}


def burn(a, value=4000):
    "Two rows of text beside the breast"
    ink = np.zeros(a.shape, np.uint8)
    for y in (20, 40): cv2.putText(ink, 'MORGENSTERN ID 4711', (70, y), cv2.FONT_HERSHEY_PLAIN, .9, 255, 1)
    return np.where(ink > 100, value, a).astype(a.dtype)


class Case(SimpleNamespace):
    "A source, the engine's result, and what the verifier says of a faulty copy"
    def fresh(self): return pydicom.dcmread(self.dst)
    def says(self, data, masked=None, options=None, **kw):
        bad = self.folder/'bad'/self.dst.name
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(data if isinstance(data, bytes) else df.content(data))
        return verify_file(self.src, bad, self.masked if masked is None else masked, options or self.options, **dict(reader=False) | kw)   # what reads is tried in test_ocr


def done(folder, ds, **edge):
    "A source through the engine"
    folder.mkdir(parents=True, exist_ok=True)
    src, s = folder/'in.dcm', settings(**edge)
    src.write_bytes(df.content(ds))
    r = Deidentifier(s, KEY).file(src, folder/'out')
    assert r.status == 'ok', r.reason
    return Case(src=src, dst=r.path, masked=r.masked, folder=folder, old=ds, options=s.edge.options)


@pytest.fixture(scope='module')
def plain(tmp_path_factory): return done(tmp_path_factory.mktemp('plain'), source())

@pytest.fixture(scope='module')
def packed(tmp_path_factory): return done(tmp_path_factory.mktemp('packed'), source(df.JPEGLL1))

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Two frames with burnt-in text"
    c = done(tmp_path_factory.mktemp('written'), source(frames=2, text=True))
    assert {m[0] for m in c.masked} == {0, 1}
    return c


# ---- what is right passes

@pytest.mark.parametrize('ts', [df.EXPLICIT, df.IMPLICIT, df.DEFLATED, df.BIG, df.RLE, df.JPEGLL1, df.JLS, df.J2K_LOSSLESS, df.J2K, df.HTJ2K_LOSSLESS])
@pytest.mark.parametrize('text', [False, True])
def test_a_right_result_passes(tmp_path, ts, text):
    c = done(tmp_path, source(ts, text=text))
    assert bool(c.masked) == text
    assert verify_file(c.src, c.dst, c.masked, c.options) == []


@pytest.mark.parametrize('options', [(), ('modified_dates',), ('device_pseudonyms',), ('retain_device',), ('clean_descriptors',), ('clean_pixels',), ('retain_safe_private',),
                                     ('retain_device', 'modified_dates', 'clean_descriptors', 'clean_pixels', 'retain_safe_private')])
def test_every_option_passes_and_is_told_from_the_others(tmp_path, options):
    c = done(tmp_path, source(), options=options)
    assert verify_file(c.src, c.dst, c.masked, options) == []
    for other in ({'modified_dates'}, {'clean_pixels'}, {'clean_descriptors'}): assert verify_file(c.src, c.dst, c.masked, tuple(set(options) ^ other))


def test_a_result_saved_by_pydicom_passes_too(plain, packed, written):
    for c in (plain, packed, written): assert c.says(c.fresh()) == []


def test_what_goes_beyond_the_table_and_what_becomes_a_dummy_passes_too(tmp_path):
    c = done(tmp_path, source(PatientAlternativeCalendar='HEBREW', PatientBirthDateInAlternativeCalendar='5715', NTPSourceAddress='10.0.0.1', PersonIdentificationCodeSequence=[item(CodeMeaning='of somebody')]))
    assert 'PatientAlternativeCalendar' not in c.fresh() and c.fresh().PersonIdentificationCodeSequence[0].CodeMeaning == 'ANONYMIZED'
    assert verify_file(c.src, c.dst, c.masked, c.options) == []


def test_it_shares_no_code_with_the_engine():
    names = [n.module or '' if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(ast.parse(Path(verify.__file__).read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not any('edge' in n or 'cohort' in n for n in names) and any('dicom' in n for n in names)


# ---- planted faults in one file: (what the engine did, what the verifier has to say)

def open_length(keyword, item=False):
    "A sequence, or its items, that go on until a delimiter"
    def make(c):
        ds = c.fresh()
        if item:
            for i in ds[keyword].value: i.is_undefined_length_sequence_item = True
        else: ds[keyword].is_undefined_length = True
        return df.content(ds)
    return make


def changed(**kw):
    def f(c):
        ds = c.fresh()
        for k, v in kw.items(): setattr(ds, k, v(c) if callable(v) else v)
        return ds
    return f

def dropped(*keys):
    def f(c):
        ds = c.fresh()
        for k in keys: delattr(ds, k)
        return ds
    return f

def nested(seq, **kw):
    def f(c):
        ds = c.fresh()
        for k, v in kw.items(): setattr(ds[seq].value[0], k, v(c) if callable(v) else v)
        return ds
    return f

def private(c, where=lambda ds: ds, add=lambda b: b.add_new(1, 'LO', 'harmless')):
    ds = c.fresh()
    add(where(ds).private_block(0x19, 'ACME 1.0', create=True))
    return ds

def bytes_(f):
    "A change of the file's bytes"
    return lambda c: f(c.dst.read_bytes(), c)

def meta(**kw):
    def f(c):
        ds = c.fresh()
        for k, v in kw.items(): setattr(ds.file_meta, k, v(c) if callable(v) else v)
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=False, implicit_vr=False, little_endian=True) if 'TransferSyntaxUID' in kw else pydicom.dcmwrite(out, ds, enforce_file_format='MediaStorageSOPInstanceUID' not in kw)
        return out.getvalue()
    return f

def original(key): return lambda c: getattr(c.old, key)
def other_uid(c): return '2.25.' + str(int.from_bytes(b'another one here'))
def hashed(c): return f"2.25.{int.from_bytes(hashlib.sha256(c.old.SeriesInstanceUID.encode()).digest()[:16])}"
def sha(c): return hashlib.sha256(c.old.PatientID.encode()).hexdigest()[:16]

def in_syntax(ts):
    def f(c):
        ds = c.fresh()
        ds.file_meta.TransferSyntaxUID = ts
        out = io.BytesIO()
        ds.save_as(out, implicit_vr=ts == df.IMPLICIT, little_endian=True)
        return out.getvalue()
    return f

def one_pixel(c):
    ds = c.fresh()
    a = ds.pixel_array.copy()
    a[..., 100, 100] ^= 1
    ds.PixelData = a.tobytes()
    return ds

def overlay_bits(c):
    ds = c.fresh()
    a = ds.pixel_array.copy()
    a[5, 5] |= 0x8000
    ds.PixelData = a.tobytes()
    return ds

def commented(c):
    ds = c.fresh()
    j, note = next(generate_frames(ds.PixelData, number_of_frames=1)), b'Morgenstern, Ida'
    ds.PixelData = encapsulate([j[:2] + b'\xff\xfe' + struct.pack('>H', len(note) + 2) + note + j[2:]])
    return ds

def elsewhere(text, key='DerivationDescription'):
    return lambda c: changed(**{key: text(c) if callable(text) else text})(c)

def ocular(data):
    "A new element of bytes in a group that stays"
    def f(c):
        ds = c.fresh()
        ds.add_new(0x00282000, 'OB', data(c) if callable(data) else data)   # ICC Profile
        return ds
    return f

def odd_length(data, c):
    at = data.index(struct.pack('<HH', 0x18, 0x60) + b'DS')
    n = struct.unpack_from('<H', data, at + 6)[0]
    return data[:at + 6] + struct.pack('<H', n + 1) + data[at + 8:at + 8 + n] + b' ' + data[at + 8 + n:]

def out_of_order(data, c):
    a, b = (data.index(struct.pack('<HH', *t)) for t in ((0x18, 0x60), (0x20, 0x0d)))
    m = a + 8 + struct.unpack_from('<H', data, a + 6)[0]
    return data[:a] + data[m:b] + data[a:m] + data[b:]

def wrong_meta_length(data, c): return data[:140] + struct.pack('<I', struct.unpack_from('<I', data, 140)[0] + 2) + data[144:]

def longer_pixels(data, c): return data[:-331 * 253 * 2 - 4] + struct.pack('<I', 331 * 253 * 2 + 20) + data[-331 * 253 * 2:] + b'MORGENSTERN^IDALINE '[:20]

FAULTS = dict(
    name_kept=(changed(PatientName=original('PatientName')), 'PatientName is unchanged'),
    name_in_lower_case=(changed(PatientName='morgenstern'), 'is in PatientName'),
    id_kept=(changed(PatientID=original('PatientID')), 'PatientID is unchanged'),
    id_with_a_prefix=(changed(PatientID=lambda c: 'anon-' + c.old.PatientID), 'still contains'),
    id_emptied=(changed(PatientID=''), 'PatientID is empty'),
    id_hashed_without_key=(changed(PatientID=sha), 'hash without a key'),
    birth_date_kept=(changed(PatientBirthDate='19550214'), 'PatientBirthDate is unchanged'),
    birth_date_elsewhere=(elsewhere('born 14.02.1955', 'PaddleDescription'), 'PatientBirthDate'),
    accession_number_missing=(dropped('AccessionNumber'), 'AccessionNumber is missing'),
    nested_name_kept=(nested('AnatomicRegionSequence', PatientName='Morgenstern^Idaline'), 'AnatomicRegionSequence[0] > PatientName is unchanged'),
    removed_sequence_kept=(changed(RequestAttributesSequence=original('RequestAttributesSequence')), 'RequestAttributesSequence is still there'),
    removed_attribute_emptied=(changed(PatientComments=''), 'PatientComments is still there'),
    removed_attribute_replaced=(changed(PatientComments='nothing to say'), 'PatientComments is still there'),
    dummy_forgotten=(changed(UserContentLabel=''), 'UserContentLabel is empty'),
    private_element=(private, 'is private'),
    private_in_a_sequence=(lambda c: private(c, lambda ds: ds.AnatomicRegionSequence[0]), 'in the result and not in the source'),
    private_sequence_with_a_name=(lambda c: private(c, add=lambda b: b.add_new(2, 'SQ', [item(PatientName='Morgenstern^Idaline')])), 'PatientName is in (0019,1002)[0] > PatientName'),
    kept_attribute_lost=(dropped('KVP'), 'KVP is missing'),
    kept_attribute_changed=(changed(ImageLaterality='R'), 'ImageLaterality has changed'),
    kept_attribute_emptied=(changed(BodyPartExamined=''), 'BodyPartExamined is empty'),
    item_lost=(lambda c: changed(ReferencedInstanceSequence=c.fresh().ReferencedInstanceSequence[:1])(c), 'number of items'),
    attribute_invented=(changed(PatientSpeciesDescription='human'), 'not in the source'),
    uid_kept=(changed(SeriesInstanceUID=original('SeriesInstanceUID')), 'SeriesInstanceUID is unchanged'),
    uid_of_another_form=(changed(StudyInstanceUID='1.2.3.4.5.6'), '2.25'),
    uid_too_long=(changed(StudyInstanceUID='2.25.' + '9' * 39), '2.25'),
    uid_with_a_leading_zero=(changed(StudyInstanceUID='2.25.0123'), '2.25'),
    uid_hashed_without_key=(changed(SeriesInstanceUID=hashed), 'hash without a key'),
    uids_merged=(changed(SeriesInstanceUID=lambda c: c.fresh().StudyInstanceUID), 'two UIDs of the source became one'),
    nested_uid_kept=(nested('ReferencedInstanceSequence', ReferencedSOPInstanceUID=lambda c: c.old.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID), '[0] > ReferencedSOPInstanceUID is unchanged'),
    class_uid_replaced=(changed(SOPClassUID=other_uid), 'SOPClassUID has changed'),
    old_uid_in_a_text=(elsewhere(original('StudyInstanceUID'), 'PaddleDescription'), 'StudyInstanceUID is in'),
    date_kept=(changed(StudyDate='20210305'), 'StudyDate is unchanged'),
    all_dates_kept=(changed(StudyDate='20210305', SeriesDate='20210305', AcquisitionDate='20210306', ContentDate='20210306', AcquisitionDateTime='20210306101500.25+0100'), 'AcquisitionDateTime is unchanged'),
    intervals_lost=(changed(ContentDate='20190101'), 'not all moved by the same'),
    time_of_day_changed=(changed(AcquisitionDateTime=lambda c: c.fresh().AcquisitionDateTime[:8] + '111500.25+0100'), 'time of day'),
    dates_of_several_lost=(changed(DateOfLastCalibration=lambda c: c.fresh().DateOfLastCalibration[:1]), 'number of dates'),
    date_is_a_word=(bytes_(lambda d, c: retext(d, b'\x08\0\x21\0DA', b'SOMETIME')), 'no date that was moved'),
    time_changed=(changed(ContentTime='100000'), 'ContentTime has changed'),
    date_emptied=(changed(StudyDate=''), 'StudyDate is empty'),
    device_kept=(changed(DeviceSerialNumber='SN-88123'), 'DeviceSerialNumber is unchanged'),
    device_forgotten=(changed(DeviceSerialNumber=''), 'DeviceSerialNumber is empty'),
    station_kept=(changed(StationName='ROOM-MG7'), 'StationName'),
    name_in_a_kept_text=(elsewhere('24cm for Idaline', 'PaddleDescription'), 'PatientName is in PaddleDescription'),
    physician_in_a_new_text=(elsewhere('seen by petrovic'), 'ReferringPhysicianName'),
    description_moved=(elsewhere('MAMMOGRAPHY SCREENING', 'DeidentificationMethod'), 'StudyDescription'),
    address_in_bytes=(ocular(b'..1 Nowhere Road..'), 'InstitutionAddress'),
    name_in_utf16=(ocular('Morgenstern^Idaline^^Dr'.encode('utf-16-le') + b'  '), 'another spelling'),
    id_in_base64=(ocular(lambda c: base64.b64encode(b'{"id":"' + c.old.PatientID.encode() + b'"}').ljust(40)), 'another spelling'),
    trailing_padding=(lambda c: (ds := c.fresh(), ds.add_new(0xfffcfffc, 'OB', b'Morgenstern^'))[0], 'PatientName'),
    charset_dropped=(dropped('SpecificCharacterSet'), 'SpecificCharacterSet is missing'),
    identity_removed_unsaid=(dropped('PatientIdentityRemoved'), 'PatientIdentityRemoved'),
    method_unsaid=(dropped('DeidentificationMethod'), 'DeidentificationMethod is missing'),
    option_unsaid=(lambda c: changed(DeidentificationMethodCodeSequence=c.fresh().DeidentificationMethodCodeSequence[:-1])(c), 'does not name the options'),
    dates_unsaid=(changed(LongitudinalTemporalInformationModified='UNMODIFIED'), 'what became of the dates'),
    study_uid_missing=(dropped('StudyInstanceUID'), 'StudyInstanceUID, which every image needs'),
    ae_title=(meta(SourceApplicationEntityTitle='TRUCK_NORTH'), 'SourceApplicationEntityTitle of the file meta'),
    private_meta=(meta(PrivateInformationCreatorUID='1.2.3', PrivateInformation=b'harmless'), 'PrivateInformation of the file meta'),
    implementation_names_somebody=(meta(ImplementationVersionName='MORGENSTERN'), 'names somebody'),
    meta_keeps_the_uid=(bytes_(lambda d, c: stale_uid(d, c)), 'MediaStorageSOPInstanceUID is not'),
    preamble=(bytes_(lambda d, c: b'PETROVIC OLGA'.ljust(128, b'\0') + d[128:]), 'preamble'),
    meta_length_wrong=(bytes_(wrong_meta_length), 'length of the file meta'),
    meta_without_implementation=(bytes_(lambda d, c: without_meta(d, b'\2\0\x12\0UI')), 'ImplementationClassUID of the file meta information is missing'),
    meta_of_another_class=(bytes_(lambda d, c: retext(d, b'\2\0\2\0UI', b'1.2.840.10008.5.1.4.1.1.1.1')), 'MediaStorageSOPClassUID is not'),
    syntax_unknown=(bytes_(lambda d, c: retext(d, b'\2\0\x10\0UI', b'1.2.826.0.10.1.2.1')), 'none of the standard'),
    class_emptied=(bytes_(lambda d, c: retext(d, b'\x08\0\x16\0UI', bytes(27))), 'SOPClassUID is empty'),
    id_too_long=(changed(PatientID='7' * 65), 'longer than 64'),
    codes_of_another_scheme=(nested('DeidentificationMethodCodeSequence', CodingSchemeDesignator='99X'), 'not coded as the standard'),
    odd_length=(bytes_(odd_length), 'odd length'),
    out_of_order=(bytes_(out_of_order), 'out of order'),
    cut_short=(bytes_(lambda d, c: d[:-1000]), 'cannot be verified'),
    bytes_behind=(bytes_(lambda d, c: d + b'MORGENSTERN'), 'cannot be verified'),
    empty_file=(bytes_(lambda d, c: b''), 'no preamble'),
    dates_moved_by_nothing=(changed(AcquisitionDateTime='20210306101500.250+0100'), 'dates were not moved'),
    other_syntax=(in_syntax(df.IMPLICIT), 'transfer syntax is another'),
    one_pixel=(one_pixel, 'pixels differ'),
    pixels_too_long=(bytes_(longer_pixels), 'more pixel data'),
    pixels_gone=(dropped('PixelData'), 'pixel data are missing'),
    rows_changed=(changed(Rows=330), 'Rows has changed'),
    document_enclosed=(changed(EncapsulatedDocument=b'%PDF'), 'encapsulated document'),
    group_length=(bytes_(lambda d, c: insert(d, b'\x18\0\x15\0CS', struct.pack('<HH2sHI', 0x18, 0, b'UL', 4, 4))), 'group length'),
    command=(bytes_(lambda d, c: insert(d, b'\x08\0\x05\0CS', struct.pack('<HH2sH', 0, 0x1000, b'UI', 0))), 'command group'),
    sequence_lost=(dropped('ReferencedInstanceSequence'), 'ReferencedInstanceSequence is missing'),
    sequence_emptied=(changed(AnatomicRegionSequence=[]), 'AnatomicRegionSequence has lost its items'),
    sequence_is_bytes=(lambda c: (ds := c.fresh(), ds.__delitem__('AnatomicRegionSequence'), ds.add_new('AnatomicRegionSequence', 'OB', b'1234'))[0], 'AnatomicRegionSequence'),
    uid_of_several_lost=(changed(FailedSOPInstanceUIDList=lambda c: c.fresh().FailedSOPInstanceUIDList[:2]), 'number of UIDs'),
    uid_of_several_kept=(changed(FailedSOPInstanceUIDList=lambda c: [*c.fresh().FailedSOPInstanceUIDList[:2], '1.2.826.0.1.55.1.8']), 'holds a UID that is unchanged'),
    a_sequence_without_a_length=(open_length('ReferencedInstanceSequence'), 'ReferencedInstanceSequence has no length'),
    an_item_without_a_length=(open_length('ReferencedInstanceSequence', item=True), 'an item of a sequence has no length'),
    a_group_length=(lambda c: insert(c.dst.read_bytes(), b'\x18\0\x15\0CS', b'\x18\0\0\0UL\4\0\x40\0\0\0'), 'group length'),
    padding_behind_the_pixels=(lambda c: c.dst.read_bytes() + b'\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0', 'padding'),
    more_padding_than_needed=(lambda c: c.dst.read_bytes().replace(b'CS\6\0BREAST', b'CS\10\0BREAST  '), 'BodyPartExamined has more or other padding'),
    padding_of_another_kind=(lambda c: c.dst.read_bytes().replace(b'LO\x08\0Senso 3 ', b'LO\x08\0Senso 3\0'), 'ManufacturerModelName has more or other padding'),
    uid_of_the_standard_replaced=(changed(FailedSOPInstanceUIDList=lambda c: [(l := c.fresh().FailedSOPInstanceUIDList)[0], other_uid(c), l[2]]), 'that the standard defines'),
    one_uid_became_two=(nested('ReferencedInstanceSequence', ReferencedSOPInstanceUID=other_uid), 'another UID than the same one'),
    masked_in_words_only=(changed(BurnedInAnnotation='YES'), 'BurnedInAnnotation has changed'),
)


def insert(data, before, element):
    "Bytes before a top-level element"
    at = data.index(before)
    return data[:at] + element + data[at:]


def retext(data, head, value):
    "Another value of the same length for an element of a short VR"
    at = data.index(head) + 8
    return data[:at] + value + data[at + len(value):]


def without_meta(data, head):
    "The file without one element of its meta group, the group's length put right"
    at = data.index(head)
    n = 8 + struct.unpack_from('<H', data, at + 6)[0]
    return data[:140] + struct.pack('<I', struct.unpack_from('<I', data, 140)[0] - n) + data[144:at] + data[at + n:]


def stale_uid(data, c):
    e = data.index(b'UI', data.index(b'\2\0\3\0'))
    n = struct.unpack_from('<H', data, e + 2)[0]
    old = c.old.SOPInstanceUID.encode()
    assert len(old) <= n
    return data[:e + 4] + old.ljust(n, b'\0') + data[e + 4 + n:]


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_in_a_header_is_caught(plain, fault):
    make, words = FAULTS[fault]
    said = plain.says(make(plain))
    assert any(words.casefold() in s.casefold() for s in said), said
    told = ' '.join(said).casefold()
    for value in ('morgenstern', 'idaline', 'petrovic', '4711', '1955', '98765', 'quilombo', 'nowhere', '88123', '1.2.826'): assert value not in told


def test_a_comment_in_the_codestream_is_caught(packed):
    assert any('between the pixel data' in s for s in packed.says(commented(packed)))


def test_another_size_in_the_codestream_is_caught(packed):
    ds = packed.fresh()
    ds.PixelData, ds.Rows = encapsulate([df.encode(df.tissue(300, 253), df.JPEGLL1, 12)]), 300
    assert any('another size' in s for s in packed.says(ds))


def test_changed_pixels_of_floats_are_caught(plain, tmp_path):
    files = []
    for ds, value in ((copy.deepcopy(plain.old), 1.), (plain.fresh(), 1.), (plain.fresh(), 2.)):
        del ds.PixelData
        ds.add_new('FloatPixelData', 'OF', np.full((331, 253), value, '<f4').tobytes())
        files.append(tmp_path/f'{len(files)}.dcm')
        files[-1].write_bytes(df.content(ds))
    assert not any('pixel' in s for s in verify_file(files[0], files[1], options=plain.options))
    assert any('pixel data are not the source' in s for s in verify_file(files[0], files[2], options=plain.options))


def test_an_overlay_in_unused_bits_is_caught(tmp_path):
    c = done(tmp_path, (ds := source(), ds.add_new(0x60000100, 'US', 16), ds.add_new(0x60000102, 'US', 15), ds.add_new(0x60000010, 'US', 331), ds.add_new(0x60000011, 'US', 253))[0])
    assert c.says(c.dst.read_bytes()) == []
    assert any('Bits that no pixel uses' in s for s in c.says(overlay_bits(c)))


def unmasked(c, frame=None, grow=0):
    "The result with the source's pixels back in place"
    ds, old = c.fresh(), df.content(c.old)
    a, b = ds.pixel_array.copy(), pydicom.dcmread(io.BytesIO(old)).pixel_array
    for k in range(len(a)):
        if frame in (None, k): a[k] = b[k]
        if grow: a[k, 200:200 + grow, 10:90] = 0
    ds.PixelData = a.tobytes()
    return ds


def smudged(c):
    ds = c.fresh()
    a = ds.pixel_array.copy()
    _, top, left, bottom, right = c.masked[0]
    a[0, top:bottom, left:right] = (a[0, top:bottom, left:right] + np.arange(right - left) % 7).astype(a.dtype)
    ds.PixelData = a.tobytes()
    return ds


def lossy(c):
    ds = c.fresh()
    ds.PixelData = encapsulate([df.encode(np.ascontiguousarray(f), df.J2K, 12) for f in ds.pixel_array])
    ds['PixelData'].VR, ds.file_meta.TransferSyntaxUID = 'OB', df.J2K
    return ds


MASKS = dict(
    not_masked=(unmasked, None, 'are the source\'s'),
    one_frame_not_masked=(lambda c: unmasked(c, 1), None, 'masked area of frame 2 still shows'),
    text_is_still_seen=(unmasked, [], 'text can still be seen'),
    flag_of_the_source_ignored=(unmasked, [], 'the source says that text is burnt in'),
    more_masked_than_said=(lambda c: unmasked(c, 9, grow=9), None, 'outside masked areas'),
    masks_not_told=(lambda c: c.fresh(), [], 'outside masked areas'),
    mask_shows_something=(smudged, None, 'still shows something'),
    mask_outside=(lambda c: c.fresh(), [(0, 0, 0, 9000, 10)], 'outside the image'),
    packed_with_loss=(lossy, None, 'not stored losslessly'),
    flag_unchanged=(changed(BurnedInAnnotation='YES'), None, 'BurnedInAnnotation is not NO'),
    flag_missing=(dropped('BurnedInAnnotation'), None, 'BurnedInAnnotation is not NO'),
)


@pytest.mark.parametrize('fault', MASKS)
def test_a_fault_in_masked_pixels_is_caught(written, fault):
    make, masked, words = MASKS[fault]
    said = written.says(make(written), masked)
    assert any(words.casefold() in s.casefold() for s in said), said


def test_a_cleaned_description_says_nothing_new(tmp_path):
    c = done(tmp_path, source(), options=('clean_descriptors',))
    assert c.says(c.dst.read_bytes()) == [] and c.fresh().StudyDescription
    assert any('did not say before' in s for s in c.says(changed(StudyDescription='MAMMOGRAPHY OF A FRIEND')(c)))


def test_private_attributes_stay_only_where_they_are_safe(tmp_path):
    ds = source()
    block = ds.private_block(0x45, 'GEMS_SENO_02', create=True)
    for e, vr, v in ((0x06, 'DS', '15'), (0x1b, 'CS', 'RCC'), (0x99, 'LO', 'not of the list')): block.add_new(e, vr, v)
    c = done(tmp_path, ds, options=('retain_safe_private',))
    assert c.says(c.dst.read_bytes()) == [] and c.fresh()[0x45, 0x1006].value == 15
    def with_private(element, vr, v):
        ds = c.fresh()
        ds.private_block(0x45, 'GEMS_SENO_02').add_new(element, vr, v)
        return ds
    assert any('private and was not removed' in s for s in c.says(with_private(0x99, 'LO', 'not of the list')))
    assert any('private and has changed' in s for s in c.says(with_private(0x06, 'DS', '16')))


def test_private_attributes_that_a_file_calls_safe_may_stay(tmp_path):
    says = item(PrivateGroupReference=0x19, PrivateCreatorReference='ACME 1.0', BlockIdentifyingInformationStatus='MIXED', NonidentifyingPrivateElements=[3])
    ds = source(PrivateDataElementCharacteristicsSequence=[says])
    ds.private_block(0x19, 'ACME 1.0').add_new(3, 'LO', 'a grid')
    c = done(tmp_path, ds, options=('retain_safe_private',))
    assert c.says(c.dst.read_bytes()) == [] and (0x19, 0x1003) in c.fresh() and (0x19, 0x1001) not in c.fresh()
    bad = c.fresh()
    bad.private_block(0x19, 'ACME 1.0').add_new(1, 'LO', 'harmless')
    assert any('private and was not removed' in s for s in c.says(bad))


def test_options_that_were_not_asked_for_are_caught(plain):
    assert any('not the pseudonym' in s for s in plain.says(plain.dst.read_bytes(), station='TRUCK 9'))
    assert any('further than' in s for s in plain.says(plain.dst.read_bytes(), max_shift=0))


# ---- planted faults across files

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "Four patients with two images each, the second of a pair refers to the first"
    d, out = tmp_path_factory.mktemp('cohort'), []
    for who in range(1, 5):
        for k in (1, 2):
            ds = source(who=who, k=k, StudyDate=f'202103{who + 9:02}', DeviceSerialNumber=f'SN-881{who % 2}')
            if k == 2: ds.SourceImageSequence[0].ReferencedSOPInstanceUID = f'1.2.826.0.1.55.{who}.1.1.5'
            out.append(done(d/f'{who}{k}', ds))
    assert verify_links([(c.src, c.dst) for c in out]) == []
    return out


def fault_in(cohort, tmp_path, *which, **kw):
    "What `verify_links` says where some files have been changed"
    pairs = []
    for i, c in enumerate(cohort):
        dst = tmp_path/f'{i}.dcm'
        shutil.copy(c.dst, dst)
        if i in which: dst.write_bytes(df.content(changed(**kw)(c)))
        pairs.append((c.src, dst))
    return verify_links(pairs)


def moved(days):
    def f(c):
        return (datetime.strptime(c.old.StudyDate, '%Y%m%d') + timedelta(days)).strftime('%Y%m%d')
    return f


@pytest.mark.parametrize('which,kw,words', [
    ((2,), dict(StudyInstanceUID=other_uid), 'a UID got another replacement'),
    ((2,), dict(SOPInstanceUID=other_uid), 'a UID got another replacement'),
    ((0, 2), dict(SOPInstanceUID=other_uid), 'got the replacement of another'),
    ((3,), dict(PatientID='SOMEBODY-ELSE'), 'a patient\'s id got another replacement'),
    ((2, 3), dict(PatientID=lambda c: 'EVERYBODY'), None),
    ((0, 1, 2, 3), dict(PatientID='EVERYBODY'), 'a patient\'s id got the replacement of another'),
    ((4,), dict(StudyDate='20200101'), 'another number of days'),
    (range(8), dict(StudyDate=moved(11)), 'days'),
    ((6,), dict(DeviceSerialNumber='OTHER'), 'a device got another replacement'),
    (range(8), dict(DeviceSerialNumber='THE-SAME'), 'a device got the replacement of another'),
])
def test_a_fault_across_files_is_caught(cohort, tmp_path, which, kw, words):
    said = fault_in(cohort, tmp_path, *which, **kw)
    assert any(words.casefold() in s.casefold() for s in said) if words else said == [], said
    assert 'HOSP' not in ' '.join(said) and '1.2.826' not in ' '.join(said)


def test_what_cannot_be_read_and_names_of_files_are_told(cohort, tmp_path):
    (tmp_path/'x.dcm').write_bytes(b'nothing')
    assert any('cannot be read' in s for s in verify_links([(cohort[0].src, tmp_path/'x.dcm')]))
    shutil.copy(cohort[0].dst, tmp_path/'morgenstern.dcm')
    assert verify_file(cohort[0].src, tmp_path/'morgenstern.dcm') == ['The name of the file holds a name or id of the source.']


def test_two_sources_that_became_one_file_are_noticed(cohort):
    assert any('became one file' in s for s in verify_links([(cohort[0].src, cohort[0].dst), (cohort[1].src, cohort[0].dst)]))


def test_one_shift_for_everybody_is_noticed(cohort, tmp_path):
    pairs = []
    for i, c in enumerate(cohort):
        ds = c.fresh()
        for e in ds:
            if e.VR in ('DA', 'DT') and e.VM == 1 and e.keyword in c.old: e.value = str(int(str(getattr(c.old, e.keyword))[:4]) + 4) + str(getattr(c.old, e.keyword))[4:]
        del ds.DateOfLastCalibration
        (tmp_path/f'{i}.dcm').write_bytes(df.content(ds))
        pairs.append((c.src, tmp_path/f'{i}.dcm'))
    assert any('All patients' in s for s in verify_links(pairs))


# ---- other people's files

def test_hostile_sources_never_raise(tmp_path):
    names = sorted(n for n in hostile_files.CASES if not re.search(hostile_files.SLOW, n))
    s, rng, good, refused = settings(), np.random.default_rng(5), 0, []
    engine = Deidentifier(s, KEY)
    for name in hostile_files.write_cases(tmp_path/'in', [names[i] for i in rng.permutation(len(names))[:150]] + ['identity/slow_pattern_implicit']):
        r = engine.file(tmp_path/'in'/name, tmp_path/'out')
        if r.status != 'ok': continue
        said = verify_file(tmp_path/'in'/name, r.path, r.masked, s.edge.options)
        good, refused = good + (not said), refused + [name] * bool(said)
    assert good > 40 and len(refused) <= .1 * good, refused


def test_damaged_results_never_raise_and_pixels_are_never_lost(plain, packed):
    rng = np.random.default_rng(6)
    for c in (plain, packed):
        data = c.dst.read_bytes()
        begin = data.index(b'\xe0\x7f\x10\0')
        for k in range(60):
            bad = bytearray(data)
            at = int(rng.integers(132, begin + 12) if k % 2 else rng.integers(begin + 30, len(data) - 30))
            bad[at] ^= 1 << int(rng.integers(8))
            said = c.says(bytes(bad))
            assert isinstance(said, list) and (k % 2 or said), (c.dst.name, at)
        for cut in rng.integers(1, len(data), 10): assert c.says(data[:cut])


def test_fillers_are_no_secrets_and_titles_no_names(tmp_path):
    c = done(tmp_path, source(PatientName='ANONYMOUS^TEST', PatientID='000000', PaddleDescription='TEST PADDLE FOR DR X', ReferringPhysicianName='Kim^^^Dr'))
    assert verify_file(c.src, c.dst, c.masked, c.options) == []


# ---- MIDI-B's ten checks, in short; the campaign is tests/faults/edge_midi.py

def test_midi_b(tmp_path):
    got = edge_midi.campaign(tmp_path, files=9, size=768, seed=1, say=lambda _: None)
    assert got['written'] == got['files'] == 9 and got['masked'] >= got['with_text'] == 3 and not got['rejected']
    assert all(asked > 0 and passed == asked for passed, asked in got['checks'].values()), got['failed']
    assert got['verifier'] == {}


def test_the_saved_campaign_is_whole():
    path = ROOT/'nbs'/'data'/'edge'/'midi.json'
    got = json.loads(path.read_text())
    assert got['files'] == got['written'] == 200 and list(got['checks']) == edge_midi.CHECKS and got['verifier'] == {}
    assert all(good == asked > 0 for good, asked in got['checks'].values())
    assert got['hidden']['free'][1] > 40 and got['hidden']['over_tissue'][1] > 0 and got['reader']
