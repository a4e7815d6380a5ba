"Reading: every codec whole and cut short, headers that lie, archives, bombs, and files that are something else."
import io
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import UID

import dicom_files as df
from dicom_files import content, dataset, make, tissue
from mammo_nb.dicom import read
from mammo_nb.dicom.display import render
from mammo_nb.dicom.read import (ReadError, frame_count, get_items, get_number, get_numbers, get_text, get_value, is_dicom, open_source,
                                 read_bytes, read_frame, read_header, split_member, zip_members)

A = tissue(97, 75)
A8 = tissue(97, 75, 8).astype(np.uint8)


def image(ts, **kw): return make(A8 if ts == df.BASELINE else A, ts, bits=8 if ts == df.BASELINE else 12, **kw)


def plain(e):
    "A reason is a sentence, without a traceback's words"
    assert isinstance(e, ReadError) and e.reason[-1] in '.!' and '\n' not in e.reason and 'Traceback' not in e.reason and len(e.reason) < 200
    return e.reason


# ---- codecs -------------------------------------------------------------------------------------------------------------------------

def test_the_fast_decoders_are_the_ones_in_use(monkeypatch):
    "The fallback would hide a fast decoder that stopped working"
    monkeypatch.setattr(read, '_by_pydicom', lambda *a: pytest.fail('fell back to pydicom'))
    for ts in [*df.LOSSLESS, *df.LOSSY]: read_frame(image(ts))


@pytest.mark.parametrize('ts', df.STREAMS)
def test_the_fallback_gives_the_same_pixels(ts, monkeypatch):
    data = image(ts)
    fast = read_frame(data).pixels
    def broken(*a): raise NotImplementedError
    monkeypatch.setattr(read, '_decoder', lambda *a: broken)
    if ts == df.EXTENDED or not pydicom.pixels.get_decoder(UID(ts)).available_plugins: pytest.skip('pydicom has no decoder for it here')
    assert np.abs(read_frame(data).pixels.astype(int) - fast).max() <= (0 if ts in df.LOSSLESS else 2)


@pytest.mark.parametrize('ts', [*df.LOSSLESS, *df.LOSSY])
def test_cut_short_anywhere_is_an_error(ts):
    data = image(ts)
    pixels_at = len(content(dataset(A8 if ts == df.BASELINE else A, df.EXPLICIT, bits=8 if ts == df.BASELINE else 12))) - (A8 if ts == df.BASELINE else A).nbytes
    end = len(data) - (8 if UID(ts).is_encapsulated else 4 if ts == df.DEFLATED else 0)  # nobody misses the last end mark
    for cut in sorted({*range(1, 400, 13), *range(pixels_at, end, max(1, len(data) // 40)), *range(end - 40, end)}):
        try: f = read_frame(data[:cut])
        except ReadError as e: plain(e)
        else: pytest.fail(f'{cut} of {len(data)} bytes gave pixels')


@pytest.mark.parametrize('ts', df.STREAMS)
@pytest.mark.parametrize('background', [0, 4095])
def test_a_short_codestream_in_a_whole_file_is_an_error(ts, background):
    "The file is complete, the codestream in it is not: with and without an end mark, and with a piece missing in the middle"
    a = tissue(97, 75, background=background)
    a = (a >> 4).astype(np.uint8) if ts == df.BASELINE else a
    bits = 8 if ts == df.BASELINE else 12
    stream = df.encode(a, ts, bits)
    head = len(stream) // 5
    short = [stream[:-2 - n] + end for n in (len(stream) // 100 + 2, len(stream) // 3, len(stream) * 3 // 4) for end in (b'', stream[-2:])]
    short += [stream[:head + len(stream) // 4] + stream[head + len(stream) // 2:]]
    for s in short:
        ds = dataset(a, ts, bits=bits)
        ds.PixelData = encapsulate([s + b'\0' * (len(s) % 2)])
        if ts in (df.JLS, df.JLS_NEAR) or ts in (df.J2K, df.J2K_LOSSLESS) or s is not short[-1] or ts == df.RLE:
            with pytest.raises(ReadError) as e: read_frame(content(ds))
            plain(e.value)


def test_a_missing_piece_of_jpeg_lossless_is_noticed():
    "libjpeg fills in what is missing without a word; every predictor, every depth"
    for bits in (8, 12, 16):
        for predictor in range(1, 8):
            a = tissue(97, 75, bits).astype(np.uint8 if bits == 8 else np.uint16)
            s = imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=bits, predictor=predictor)
            whole, cut = dataset(a, df.JPEGLL, bits=bits), dataset(a, df.JPEGLL, bits=bits)
            whole.PixelData, cut.PixelData = encapsulate([s + b'\0' * (len(s) % 2)]), encapsulate([(c := s[:len(s) * 2 // 3] + s[-2:]) + b'\0' * (len(c) % 2)])
            assert np.array_equal(read_frame(content(whole)).pixels, a), (bits, predictor)
            with pytest.raises(ReadError, match='end too early'): read_frame(content(cut))


def test_tiled_jpeg_2000_and_a_missing_tile():
    f = io.BytesIO()
    a = A8[:96, :64].copy()  # Pillow writes tiles of 16 bits wrongly
    Image.fromarray(a).save(f, 'JPEG2000', tile_size=(32, 32), irreversible=False, no_jp2=True)
    s = f.getvalue()
    ds = dataset(a, df.J2K_LOSSLESS, bits=8)
    ds.PixelData = encapsulate([s + b'\0' * (len(s) % 2)])
    assert np.array_equal(read_frame(content(ds)).pixels, a)
    parts = [i for i in range(len(s) - 1) if s[i:i + 4] == b'\xff\x90\0\x0a']
    assert len(parts) == 6
    for gone in (0, 2, 5):
        end = (parts + [len(s) - 2])[gone + 1]
        cut = s[:parts[gone]] + s[end:]
        ds.PixelData = encapsulate([cut + b'\0' * (len(cut) % 2)])
        with pytest.raises(ReadError, match='end too early'): read_frame(content(ds))


def test_a_stream_larger_than_its_header_is_not_decoded(monkeypatch):
    monkeypatch.setattr(read, 'imagecodecs', None)
    monkeypatch.setattr(read, '_by_pydicom', lambda *a: pytest.fail('decoded'))
    for ts in (df.JPEGLL1, df.JLS, df.J2K_LOSSLESS, df.HTJ2K_LOSSLESS, df.EXTENDED):
        ds = dataset(A, ts)
        ds.Columns -= 1
        with pytest.raises(ReadError, match='disagree about the size'): read_frame(content(ds))


def test_decoders_errors_stay_off_the_terminal(capfd):
    for ts in df.STREAMS:
        s = bytearray(image(ts))
        for at in range(len(s) - 600, len(s) - 100, 50): s[at:at + 3] = b'\xff\x7f\xff'
        try: read_frame(bytes(s))
        except ReadError as e: plain(e)
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('flat', [0, 1, 2048, 4095])
def test_a_flat_image_is_whole(flat):
    a = np.full((64, 48), flat, np.uint16)
    for ts in df.LOSSLESS: assert np.array_equal(read_frame(make(a, ts)).pixels, a), ts


def test_odd_shapes():
    for shape in ((1, 1), (1, 9), (9, 1), (3, 2), (17, 31)):
        a = (np.arange(np.prod(shape)) * 37 % 4096).astype(np.uint16).reshape(shape)
        for ts in (df.EXPLICIT, df.RLE, df.JPEGLL1, df.JPEGLL): assert np.array_equal(read_frame(make(a, ts)).pixels, a), (shape, ts)


def test_a_wrong_transfer_syntax_is_seen_through():
    for said, held in ((df.J2K_LOSSLESS, df.JPEGLL1), (df.JPEGLL1, df.J2K_LOSSLESS), (df.JPEGLL1, df.JLS), (df.EXPLICIT, df.JPEGLL1)):
        ds = dataset(A, held)
        data = content(ds)
        old, new = held.encode().ljust(22, b'\0'), said.encode().ljust(22, b'\0')
        assert data.count(old) == 1
        assert np.array_equal(read_frame(data.replace(old, new)).pixels, A), (said, held)


# ---- frames -------------------------------------------------------------------------------------------------------------------------

def frames(n=4): return [tissue(64, 48, seed=i) for i in range(n)]


@pytest.mark.parametrize('ts', [df.EXPLICIT, df.BIG, df.DEFLATED, df.RLE, df.JPEGLL1, df.JLS, df.J2K_LOSSLESS])
def test_one_frame_of_many(ts):
    a = frames()
    data = make(a, ts)
    assert frame_count(read_header(data)) == 4
    with open_source(data) as s:
        for i in (3, 0, 2, 1): assert np.array_equal(s.frame(i).pixels, a[i])
    with pytest.raises(ReadError, match='no frame 5'): read_frame(data, 4)
    assert read_frame(data, 2).index == 2


@pytest.mark.parametrize('ts', [df.JPEGLL1, df.J2K_LOSSLESS, df.JLS])
@pytest.mark.parametrize('how', ['no table', 'table', 'extended', 'fragments', 'fragments, no table', 'wrong table'])
def test_every_way_to_divide_frames(ts, how):
    a = frames()
    streams = [df.encode(f, ts, 12) for f in a]
    ds = dataset(a, ts)
    if how == 'extended': ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    else: ds.PixelData = encapsulate(streams, fragments_per_frame=3 if 'fragments' in how else 1, has_bot=how in ('table', 'fragments', 'wrong table'))
    data = content(ds)
    if how == 'wrong table':
        at = data.index(b'\xfe\xff\x00\xe0\x10\0\0\0') + 8
        data = data[:at] + struct.pack('<4I', 0, 8, 4, 10**6) + data[at + 16:]
    for i in range(4): assert np.array_equal(read_frame(data, i).pixels, a[i]), (ts, how, i)


def test_only_the_frame_that_is_asked_for_is_read(tmp_path, monkeypatch):
    p = tmp_path/'volume'
    a = [tissue(128, 96, seed=i) for i in range(12)]
    for ts in (df.EXPLICIT, df.J2K_LOSSLESS):
        p.write_bytes(make(a, ts))
        read_bytes_n, plain_read = [0], read._Bounded.read
        def counted(self, n=-1):
            out = plain_read(self, n)
            read_bytes_n[0] += len(out)
            return out
        monkeypatch.setattr(read._Bounded, 'read', counted)
        assert np.array_equal(read_frame(p, 11).pixels, a[11])
        monkeypatch.undo()
        assert read_bytes_n[0] < p.stat().st_size / 12 + 8000
        decoded = []
        monkeypatch.setattr(read, '_decode', lambda *x, f=read._decode: decoded.append(1) or f(*x))
        read_frame(p, 5)
        monkeypatch.undo()
        assert decoded == [1]


def test_a_volume_without_a_table_is_walked_once(monkeypatch):
    a = frames()
    ds = dataset(a, df.J2K_LOSSLESS)
    ds.PixelData = encapsulate([df.encode(f, df.J2K_LOSSLESS, 12) for f in a], has_bot=False)
    walks, walk = [], read.fragments
    monkeypatch.setattr(read, 'fragments', lambda *x, **k: walks.append(1) or walk(*x, **k))
    with open_source(content(ds)) as s:
        for i in (2, 0, 3, 1): assert np.array_equal(s.frame(i).pixels, a[i])
    assert len(walks) == 2, 'the table, and the fragments once'


def test_plain_background_at_the_end_is_not_decoded_twice(monkeypatch):
    a = A.copy()
    a[60:] = 0
    decoded, decode = [], imagecodecs.jpeg8_decode
    monkeypatch.setattr(imagecodecs, 'jpeg8_decode', lambda *x: decoded.append(1) or decode(*x))
    for bits in (8, 12, 16):
        for predictor in range(1, 8):
            px = (a >> 4).astype(np.uint8) if bits == 8 else a
            s = imagecodecs.jpeg8_encode(px, lossless=True, bitspersample=bits, predictor=predictor)
            ds = dataset(px, df.JPEGLL, bits=bits)
            ds.PixelData = encapsulate([s + b'\0' * (len(s) % 2)])
            decoded.clear()
            assert np.array_equal(read_frame(content(ds)).pixels, px) and decoded == [1], (bits, predictor)


def test_number_of_frames_that_disagrees_with_the_data():
    for ts in (df.EXPLICIT, df.JPEGLL1):
        ds = dataset(frames(), ts)
        ds.NumberOfFrames = 6
        data = content(ds)
        assert np.array_equal(read_frame(data, 3).pixels, frames()[3])
        with pytest.raises(ReadError) as e: read_frame(data, 5)
        plain(e.value)
        ds.NumberOfFrames = 0
        assert frame_count(ds) == 1


# ---- headers ------------------------------------------------------------------------------------------------------------------------

def changed(**kw):
    ds = dataset(A)
    for k, v in kw.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    return content(ds)


@pytest.mark.parametrize('kw, reason', [
    (dict(Rows=None), 'no image size'), (dict(Columns=0), 'no image size'), (dict(Rows=60000, Columns=60000), 'more than the limit'),
    (dict(BitsAllocated=64), '64 bits'), (dict(BitsAllocated=12), '12 bits'), (dict(SamplesPerPixel=2), '2 samples'),
    (dict(Rows=98), 'pixel data'), (dict(PixelData=b'\0\0'), 'pixel data'), (dict(PixelData=None), 'holds no image'),
])
def test_headers_that_cannot_be(kw, reason):
    with pytest.raises(ReadError, match=reason) as e: read_frame(changed(**kw))
    plain(e.value)


@pytest.mark.parametrize('kw', [dict(PhotometricInterpretation=None), dict(BitsStored=None), dict(BitsStored=40), dict(HighBit=None), dict(HighBit=99),
                                dict(SamplesPerPixel=None), dict(PixelRepresentation=None), dict(NumberOfFrames='')])
def test_headers_that_lack_something(kw): assert np.array_equal(read_frame(changed(**kw)).pixels, A)


def test_size_in_the_stream_must_match():
    for ts in (df.JPEGLL1, df.J2K_LOSSLESS, df.JLS, df.RLE):
        ds = dataset(A, ts)
        ds.Rows += 1
        with pytest.raises(ReadError): read_frame(content(ds))


def test_float_pixels_and_other_objects():
    ds = dataset(A)
    del ds.PixelData
    ds.FloatPixelData = A.astype(np.float32).tobytes()
    with pytest.raises(ReadError, match='floating-point'): read_frame(content(ds))
    ds = dataset(A)
    del ds.PixelData
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.88.33'
    with pytest.raises(ReadError, match='Comprehensive SR'): read_frame(content(ds))


@pytest.mark.parametrize('depth, limit', [*((400, n) for n in range(700, 720)), (400, 20_000), (100, 20_000)])
def test_deep_sequences(depth, limit):
    old = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try: _deep_sequences(depth)
    finally: sys.setrecursionlimit(old)


def _deep_sequences(depth):
    nest = b''.join(b'\x40\0\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff' for _ in range(depth))
    nest += b''.join(b'\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0' for _ in range(depth))
    ds = dataset(A)
    data = content(ds)
    at = data.index(b'\xe0\x7f\x10\0')
    with pytest.raises(ReadError, match='nested too deeply'): read_header(data[:at] + nest + data[at:])


def test_claims_of_four_gigabytes():
    data = make(A)
    at = data.index(b'\xe0\x7f\x10\0')
    huge = data[:at + 8] + struct.pack('<I', 0xFFFFFFFE) + data[at + 12:]
    assert np.array_equal(read_frame(huge).pixels, A), 'the frame itself is whole'
    private = b'\x09\0\x10\x10OB\0\0' + struct.pack('<I', 0xFFFFFFF0) + b'abcd'
    with pytest.raises(ReadError, match='cut short'): read_header(data[:132 + 12] + data[132 + 12:at] + private)


def test_accessors_never_raise():
    ds = read_header(make(A, WindowWidth='12', ViewCodeSequence=[]).replace(b'DS\x02\x0012', b'DS\x02\x00x,'))
    assert get_numbers(ds, 'WindowWidth') == [] and get_number(ds, 'WindowWidth', 7) == 7 and get_value(ds, 'StudyDate', 5) == 5
    assert get_items(ds, 'ViewCodeSequence') == [] and get_items(ds, 'Rows') == [] and get_text(ds, 'Nonsense') == ()
    assert get_value(ds, 'Modality') == 'MG' and get_number(ds, 'Rows') == 97


# ---- bombs and archives -------------------------------------------------------------------------------------------------------------

def test_a_deflated_bomb_is_refused_and_a_header_does_not_inflate_it():
    data = make(A, df.EXPLICIT)
    at = data.index(b'\xe0\x7f\x10\0')
    start = read._dataset_start(data)[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(data[start:at] + b'\xe0\x7f\x10\0OW\0\0\0\0\0\x10')
    for _ in range(256): body += deflate.compress(bytes(1 << 20))
    body += deflate.flush()
    meta = make(A, df.DEFLATED)
    bomb = meta[:read._dataset_start(meta)[0]] + body
    assert len(bomb) < 400_000
    s = open_source(bomb, max_inflated_bytes=10_000_000)
    assert s.header.Rows == 97 and len(s.file.buf) < 3_000_000
    early = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = early.compress(data[start:at] + b'\x01\x7f\x10\x10OB\0\0\0\0\0\x10')
    for _ in range(256): body += early.compress(bytes(1 << 20))
    with pytest.raises(ReadError, match='unpacks to more than 10.0 MB'):
        read_header(meta[:read._dataset_start(meta)[0]] + body + early.flush(), max_inflated_bytes=10_000_000)


def test_zip_members(tmp_path):
    z, data = tmp_path/'exam!.zip', make(A, df.JPEGLL1)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as f: f.writestr('x.dcm', data)
    with zipfile.ZipFile(z, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr('a/b!/IM1', data)
        f.writestr('note.txt', 'not an image')
        f.writestr('inner.zip', inner.getvalue())
        f.writestr('empty', b'')
    assert [n for n, _ in zip_members(z)] == ['a/b!/IM1', 'note.txt', 'inner.zip', 'empty']
    assert split_member(f'{z}!/a/b!/IM1') == (z, 'a/b!/IM1')
    assert is_dicom(f'{z}!/a/b!/IM1') and not is_dicom(f'{z}!/note.txt') and not is_dicom(f'{z}!/nothing')
    assert np.array_equal(read_frame(f'{z}!/a/b!/IM1').pixels, A) and read_bytes(tmp_path, 'exam!.zip!/a/b!/IM1') == data
    for member, reason in (('inner.zip', 'zip'), ('note.txt', 'not a DICOM'), ('empty', 'empty'), ('nothing', 'no such member')):
        with pytest.raises(ReadError, match=reason) as e: read_header(f'{z}!/{member}')
        plain(e.value)
    with pytest.raises(ReadError, match='unpacks to more than'): read_frame(f'{z}!/a/b!/IM1', max_inflated_bytes=1000)
    broken = bytearray(z.read_bytes())
    broken[60:200] = bytes(140)
    (tmp_path/'broken.zip').write_bytes(broken)
    with pytest.raises(ReadError) as e: read_frame(f"{tmp_path/'broken.zip'}!/a/b!/IM1")
    plain(e.value)
    (tmp_path/'none.zip').write_bytes(b'PK\3\4' + bytes(99))
    with pytest.raises(ReadError, match='damaged'): zip_members(tmp_path/'none.zip')


def test_encrypted_zip_member(tmp_path):
    z = tmp_path/'e.zip'
    with zipfile.ZipFile(z, 'w') as f: f.writestr('a', make(A))
    data = bytearray(z.read_bytes())
    data[data.index(b'PK\1\2') + 8] |= 1
    z.write_bytes(data)
    with pytest.raises(ReadError, match='encrypted'): read_header(f'{z}!/a')


# ---- what is DICOM ------------------------------------------------------------------------------------------------------------------

def test_dicom_by_content(tmp_path):
    for ts in df.LOSSLESS: assert is_dicom(image(ts))
    data = make(A)
    for name in ('a.DCM', 'b', 'c.jpg', 'ü ' + 'x' * 200):
        (tmp_path/name).write_bytes(data)
        assert is_dicom(tmp_path/name) and np.array_equal(read_frame(tmp_path/name).pixels, A)
    start = read._dataset_start(data)[0]
    assert is_dicom(data[132:]) and np.array_equal(read_frame(data[132:]).pixels, A), 'without preamble'
    bare = make(A, df.IMPLICIT)
    for d in (bare[read._dataset_start(bare)[0]:], data[start:]):
        assert is_dicom(d) and np.array_equal(read_frame(d).pixels, A), 'without preamble and meta'
    big = make(A, df.BIG)
    assert is_dicom(big[read._dataset_start(big)[0]:])


@pytest.mark.parametrize('data', [b'', b'x', bytes(2000), b'\x89PNG\r\n\x1a\n' + bytes(300), b'PK\3\4' + bytes(300), b'MZ' + bytes(500), b'%PDF-1.7' + b' ' * 400,
                                  b'{"a": 1}' * 99, b'\x02\0\0\0', b'\x08\0' * 300, bytes(range(256)) * 4, b'a,b,c\n1,2,3\n' * 50])
def test_not_dicom(data):
    assert not is_dicom(data)
    with pytest.raises(ReadError) as e: read_header(data)
    plain(e.value)


def test_paths_that_cannot_be_read(tmp_path):
    for p in (tmp_path, tmp_path/'gone', f"{tmp_path/'gone.zip'}!/a"):
        assert not is_dicom(p)
        with pytest.raises(ReadError) as e: read_header(p)
        plain(e.value)


def test_errors_travel_between_processes():
    e = pickle.loads(pickle.dumps(ReadError('is not a DICOM file.', 'a/b.dcm')))
    assert e.reason == 'is not a DICOM file.' and str(e) == 'a/b.dcm: is not a DICOM file.'


def test_a_header_does_not_hold_the_file_open(tmp_path):
    p = tmp_path/'a'
    p.write_bytes(make(A))
    ds = read_header(p)
    p.unlink()
    assert ds.Rows == 97 and pickle.loads(pickle.dumps(ds)).Rows == 97


# ---- the public fuzzing corpus ------------------------------------------------------------------------------------------------------

CORPUS = df.SHARED/'data'/'hostile'/'dicom-fuzzing-corpus-v2.tar.xz'


@pytest.mark.skipif(not CORPUS.is_file(), reason='the shared hostile corpus is not here')
def test_the_hostile_corpus():
    seen = {}
    with tarfile.open(CORPUS) as t:
        for m in t:
            if not m.isfile(): continue
            data = t.extractfile(m).read()
            try:
                with open_source(data, 50_000_000) as s:
                    render(s, 256, max_pixels=20_000_000)
                    seen['ok'] = seen.get('ok', 0) + 1
            except ReadError as e:
                seen[plain(e)[:30]] = seen.get(plain(e)[:30], 0) + 1
    assert sum(seen.values()) > 300
