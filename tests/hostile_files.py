"""Files that want to break a reader: one small recipe each, with what has to become of it.

`CASES` holds single files, `TREES` what a folder can do to a reader (archives, links, pipes, names). `write_cases` and `write_trees` put
them into a folder and say what is expected: `ok`, `rejected` with words the reason must hold, or `any` where both are fine."""
import bz2
import functools
import gzip
import hashlib
import io
import os
import random
import socket
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np

import dicom_files as df

MG = '1.2.840.10008.5.1.4.1.1.1.2'
LONG = set('OB OW SQ UN UT UC UR OF OD OL OV SV UV'.split())
ITEM, ITEM_END, SEQ_END = 0xfffee000, 0xfffee00d, 0xfffee0dd
OPEN = 0xffffffff
PX = df.tissue(48, 40)


class Case(NamedTuple):
    "What a file is made by, and what becomes of it"
    make: object  # () -> bytes
    status: str  # ok | rejected | any
    words: str  # regular expression for the reason


CASES, TREES = {}, {}
_name = ''


def case(name, status='rejected', words='', **kw):
    "Registers a recipe: a function, or the arguments of `raw`"
    def add(fn):
        assert name not in CASES, name
        CASES[name] = Case(fn, status, words)
        return fn
    return add(functools.partial(raw, **kw)) if kw else add


def build(name):
    "The bytes of a case; its UIDs come from its name, so that no two are duplicates by accident"
    global _name
    _name = name
    return CASES[name].make()


def write_cases(folder, names=None):
    "Writes cases below `folder`, one subfolder per theme; gives {path: Case}"
    out = {}
    for name in names or CASES:
        path = Path(folder)/f'{name}.dcm'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(build(name))
        out[f'{name}.dcm'] = CASES[name]
    return out


# ---- elements, byte by byte ---------------------------------------------------------------------------------------------------------

def uid(k=1): return f'1.2.826.0.1.3680043.8.498.{int(hashlib.sha256(_name.encode()).hexdigest()[:12], 16)}.{k}'


def value(vr, v, order='<'):
    "A value as bytes: text is padded, numbers are packed by their VR"
    if isinstance(v, bytes): return v
    if isinstance(v, str): v = v.encode(); return v + (b'\0' if vr == 'UI' else b' ') * (len(v) % 2)
    kind = dict(US='H', SS='h', UL='I', SL='i', FL='f', FD='d', AT='I', OW='H').get(vr, 'H')
    return b''.join(struct.pack(order + kind, x) for x in (v if isinstance(v, (list, tuple)) else [v]))


def el(tag, vr, v=b'', n=None, order='<', implicit=False):
    "An element; `n` is the length it claims"
    v = value(vr, v, order)
    head, n = struct.pack(order + 'HH', tag >> 16, tag & 0xffff), len(v) if n is None else n
    if implicit or tag >> 16 == 0xfffe: return head + struct.pack(order + 'I', n) + v
    if vr in LONG: return head + vr.encode() + b'\0\0' + struct.pack(order + 'I', n) + v
    return head + (vr.encode() if isinstance(vr, str) else vr) + struct.pack(order + 'H', n & 0xffff) + v


def meta(ts=df.EXPLICIT, sop=MG, more=b'', length=None):
    body = el(0x00020001, 'OB', b'\0\1') + el(0x00020002, 'UI', sop) + el(0x00020003, 'UI', uid()) + (el(0x00020010, 'UI', ts) if ts is not None else b'') + more
    return bytes(128) + b'DICM' + el(0x00020000, 'UL', len(body) if length is None else length) + body


def header(px=PX, **_):
    "Elements of a plain mammogram by tag: (VR, value[, claimed length])"
    return {0x00080016: ('UI', MG), 0x00080018: ('UI', uid()), 0x00080020: ('DA', '20200101'), 0x00080060: ('CS', 'MG'), 0x00100020: ('LO', 'H-1'),
            0x0020000d: ('UI', uid(2)), 0x0020000e: ('UI', uid(3)), 0x00280002: ('US', 1), 0x00280004: ('CS', 'MONOCHROME2'), 0x00280010: ('US', px.shape[0]),
            0x00280011: ('US', px.shape[1]), 0x00280100: ('US', 16), 0x00280101: ('US', 12), 0x00280102: ('US', 11), 0x00280103: ('US', 0)}


def raw(change={}, drop=(), pixels=None, ts=df.EXPLICIT, tail=b'', order='<', implicit=False, before=b'', sop=MG, px=PX, head=None):
    "A file: a plain mammogram with elements changed, dropped, or put in front of the pixels (`before`)"
    els = {k: v for k, v in (header(px) | {0x00080016: ('UI', sop)} | change).items() if k not in drop}
    body = b''.join(el(t, *v, order=order, implicit=implicit) for t, v in sorted(els.items()))
    if pixels is None: pixels = el(0x7fe00010, 'OW', px.astype(order + 'u2').tobytes(), order=order, implicit=implicit)
    return (meta(ts, sop) if head is None else head) + body + before + pixels + tail


def frag(data, n=None): return el(ITEM, '', data, n)


def packed(*parts, bot=b'', end=el(SEQ_END, '')):
    "Encapsulated pixel data of these fragments"
    return el(0x7fe00010, 'OB', b'', OPEN) + frag(bot) + b''.join(frag(p + b'\0' * (len(p) % 2)) for p in parts) + end


@functools.lru_cache(64)
def stream(ts, shape=PX.shape, bits=12): return df.encode(df.tissue(*shape, bits=bits) if ts != df.BASELINE else (df.tissue(*shape) >> 4).astype(np.uint8), ts, bits)


def encapsulated(ts, data=None, change={}, **kw):
    "A compressed mammogram around a codestream"
    bits = {0x00280100: ('US', 8), 0x00280101: ('US', 8), 0x00280102: ('US', 7)} if ts == df.BASELINE else {}
    return raw(bits | change, ts=ts, pixels=packed(stream(ts) if data is None else data), **kw)


def sequence(tag, *items, n=OPEN):
    return el(tag, 'SQ', b''.join(el(ITEM, '', i) for i in items) + (el(SEQ_END, '') if n == OPEN else b''), n if n == OPEN else None)


def deflated(data, level=9):
    z = zlib.compressobj(level, zlib.DEFLATED, -15)
    return z.compress(data) + z.flush()


@functools.lru_cache(2)
def _zeros_block(n=1 << 24):
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    z.compress(b'')
    return z.compress(bytes(n)) + z.flush(zlib.Z_FULL_FLUSH)


def zeros(n):
    "A raw deflate stream of `n` zeros, repeated blocks of 16 MB (a thousandth of the size), made at once"
    return _zeros_block() * (n >> 24) + deflated(bytes(n & (1 << 24) - 1))


def started(data):
    "The beginning of a deflate stream, to be gone on with"
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    return z.compress(data) + z.flush(zlib.Z_FULL_FLUSH)


def body(**kw): return raw(pixels=b'', head=b'', **kw)


# ---- the image's shape --------------------------------------------------------------------------------------------------------------

ROWS, COLS, ALLOC, STORED, HIGH, SIGN, SAMPLES, PHOTO, FRAMES = (0x00280000 + i for i in (0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 2, 4, 8))
for tag, name in ((ROWS, 'rows'), (COLS, 'columns')):
    case(f'shape/{name}_0', words='image', change={tag: ('US', 0)})
    case(f'shape/{name}_missing', words='image', drop=[tag])
    case(f'shape/{name}_empty', words='image', change={tag: ('US', b'')})
    case(f'shape/{name}_65535', words='pixel', change={tag: ('US', 65535)})
    case(f'shape/{name}_two_values', 'any', change={tag: ('US', [48, 40])})
    case(f'shape/{name}_one_byte', 'any', change={tag: ('US', b'\x30')})
    case(f'shape/{name}_negative', words='image', change={tag: ('SS', -5)})
    for text in ('1e308', 'NaN', '-1', '4294967296', '9' * 400, 'abc'): case(f'shape/{name}_as_text_{text[:9]}', words='image|pixel', change={tag: ('DS', text)})
case('shape/gigapixels', words='pixels', change={ROWS: ('US', 65535), COLS: ('US', 65535)})
case('shape/needle_1x200m', words='image|rows|pixel', change={ROWS: ('UL', 1), COLS: ('UL', 200_000_000)})
case('shape/one_pixel', 'ok', change={ROWS: ('US', 1), COLS: ('US', 1)})
case('shape/one_row_of_65535', 'ok', change={ROWS: ('US', 1), COLS: ('US', 65535)}, px=np.zeros((1, 65535), np.uint16))
case('shape/one_column_of_65535', 'ok', change={ROWS: ('US', 65535), COLS: ('US', 1)}, px=np.zeros((65535, 1), np.uint16))
for n in (0, 3, 7, 9, 12, 24, 48, 64, 128, 65535): case(f'shape/bits_allocated_{n}', words='bits', change={ALLOC: ('US', n)})
case('shape/bits_allocated_1', 'any', change={ALLOC: ('US', 1), STORED: ('US', 1), HIGH: ('US', 0)})
case('shape/bits_allocated_32', words='less pixel data', change={ALLOC: ('US', 32)})
for n in (0, 1, 17, 40, 65535): case(f'shape/bits_stored_{n}', 'ok', change={STORED: ('US', n)})
for n in (0, 5, 15, 16, 255, 65535): case(f'shape/high_bit_{n}', 'ok', change={HIGH: ('US', n)})
for n in (2, 255, 65535): case(f'shape/pixel_representation_{n}', 'ok', change={SIGN: ('US', n)})
for n in (0, 2, 4, 65535): case(f'shape/samples_{n}', words='samples', change={SAMPLES: ('US', n)})
case('shape/samples_3_in_grey_data', words='pixel data', change={SAMPLES: ('US', 3)})
for text, status in (('0', 'ok'), ('-1', 'ok'), ('', 'ok'), ('abc', 'ok'), ('1e3', 'any'), ('1\\2', 'ok'), ('999999', 'rejected'), ('2147483648', 'rejected'),
                     ('9' * 400, 'any'), ('9' * 5000, 'any'), ('3', 'any')):
    case(f'shape/frames_{text[:10] or "empty"}_{len(text)}', status, 'frame' if status == 'rejected' else '', change={FRAMES: ('IS', text)})
case('shape/everything_missing', words='image', drop=[*(0x00280000 + i for i in (2, 4, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103))])
case('shape/shape_in_the_wrong_vr', 'any', change={ROWS: ('LO', '48'), COLS: ('IS', '40'), ALLOC: ('DS', '16.0')})
case('shape/negative_overlay_origin', 'ok', before=el(0x60000010, 'US', 48) + el(0x60000011, 'US', 40) + el(0x60000050, 'SS', [-5, -7]) + el(0x60003000, 'OW', bytes(240)))
case('shape/overlay_65535', 'ok', before=el(0x60000010, 'US', 65535) + el(0x60000011, 'US', 65535) + el(0x60003000, 'OW', bytes(64)))
case('shape/overlay_claims_4_gb', words='cut short', before=el(0x60003000, 'OW', bytes(64), 0xfffffffe), pixels=b'')
case('shape/overlays_sixteen', 'ok', before=b''.join(el(0x60000010 + (k << 17), 'US', 48) + el(0x60003000 + (k << 17), 'OW', bytes(1 << 20)) for k in range(16)))

# ---- how it wants to be shown --------------------------------------------------------------------------------------------------------

CENTRE, WIDTH, SLOPE, ICEPT, FUNCTION, PAD, PADTO = 0x00281050, 0x00281051, 0x00281053, 0x00281052, 0x00281056, 0x00280120, 0x00280121
for text in ('1,8', 'NaN', 'nan', 'inf', '-inf', '1e308', '-1e308', '1e-320', '1e400', '', ' ', '0', '-0', '-1', 'abc', '\\', '1\\', '\\1', '1\\2\\3', '0x10', '1_000', '٣',
             '1' * 300, '+' * 16, '1d3', '.', 'e'):
    shown = text.replace('\\', '_').replace(' ', 'blank').encode('ascii', 'replace').decode().replace('?', 'u')[:12] or 'empty'
    for name, tag in (('slope', SLOPE), ('intercept', ICEPT)):
        other = ICEPT if tag == SLOPE else SLOPE
        case(f'display/{name}_{shown}', 'any', 'rescale|Rescale', change={tag: ('DS', text), other: ('DS', '1')})
    for name, tag in (('centre', CENTRE), ('width', WIDTH)):
        other = CENTRE if tag == WIDTH else WIDTH
        case(f'display/window_{name}_{shown}', 'ok', change={tag: ('DS', text), other: ('DS', '2000')})
for f in ('SIGMOID', 'LINEAR_EXACT', 'LINEAR', 'rubbish', ''):
    for w in ('0', '1', '1e-300', '1e308', '2000'): case(f'display/function_{f or "empty"}_{w}', 'ok', change={CENTRE: ('DS', '1000'), WIDTH: ('DS', w), FUNCTION: ('CS', f)})
case('display/windows_3_and_2', 'ok', change={CENTRE: ('DS', '1\\2\\3'), WIDTH: ('DS', '0\\2000')})
case('display/windows_thousands', 'ok', change={CENTRE: ('DS', '1\\' * 16000 + '1'), WIDTH: ('DS', '0\\' * 16000 + '2000')})
case('display/slope_and_window_at_the_edge', 'any', 'Rescale', change={SLOPE: ('DS', '1e308'), ICEPT: ('DS', '-1e308'), CENTRE: ('DS', '-1e308'), WIDTH: ('DS', '1e308')})
for lo, hi in ((0, 65535), (-32768, 32767), (4095, 0)): case(f'display/padding_{lo}_{hi}', 'ok', change={PAD: ('SS' if lo < 0 else 'US', lo), PADTO: ('SS' if lo < 0 else 'US', hi)})
case('display/padding_as_text', 'ok', change={PAD: ('DS', '1e308'), PADTO: ('DS', 'NaN')})
case('display/presentation_shape_rubbish', 'ok', change={0x20500020: ('CS', 'RUBBISH\\INVERSE')})
_lut = lambda d, t, vr='OW': el(0x00283002, 'US', d) + el(0x00283006, vr, t)
for name, item in dict(of_0=_lut([0, 0, 16], list(range(0, 65536))), of_0_too_short=_lut([0, 0, 16], [1, 2, 3]), empty=_lut([16, 0, 12], b''), no_data=el(0x00283002, 'US', [16, 0, 12]),
                       no_descriptor=el(0x00283006, 'OW', bytes(32)), two_numbers=_lut([16, 0], bytes(32)), bits_0=_lut([16, 0, 0], bytes(32)), bits_255=_lut([16, 0, 255], bytes(32)),
                       first_65535=_lut([16, 65535, 12], list(range(16))), one=_lut([1, 0, 12], [5]), odd=_lut([16, 0, 8], bytes(15)), too_long=_lut([4, 0, 12], bytes(60_000)),
                       as_text=_lut([16, 0, 12], 'rubbish rubbish!', 'LO'), as_numbers=_lut([4, 0, 12], [1, 2, 3, 4], 'US'), as_decimals=_lut([4, 0, 12], '1\\2\\x\\NaN', 'DS'),
                       as_sequence=el(0x00283002, 'US', [4, 0, 12]) + sequence(0x00283006, el(0x00283006, 'OW', bytes(8))), descriptor_as_text=el(0x00283002, 'LO', '1e308\\NaN\\12') + el(0x00283006, 'OW', bytes(8)),
                       all_zero=_lut([16, 0, 16], bytes(32)), nothing=b'').items():
    case(f'display/voi_lut_{name}', 'ok', change={0x00283010: ('SQ', el(ITEM, '', item))})
    case(f'display/modality_lut_{name}', 'ok', change={0x00283000: ('SQ', el(ITEM, '', item))})
case('display/lut_sequence_as_text', 'ok', change={0x00283010: ('LO', 'rubbish'), 0x00283000: ('US', 7)})
case('display/lut_sequence_empty', 'ok', change={0x00283010: ('SQ', b''), 0x00283000: ('SQ', b'')})
_voi = lambda *i: sequence(0x00289132, *i)
case('display/groups_per_frame_missing', 'ok', change={FRAMES: ('IS', '2')}, px=np.vstack([PX, PX]), before=b'', )
for name, groups in dict(one_for_two=sequence(0x52009230, _voi(el(CENTRE, 'DS', '9') + el(WIDTH, 'DS', '2000'))), empty=el(0x52009230, 'SQ'), empty_items=sequence(0x52009230, b'', b''),
                         as_text=el(0x52009230, 'LO', 'rubbish'), shared_twice=sequence(0x52009229, _voi(), _voi()), thousands=sequence(0x52009230, *[b''] * 20_000)).items():
    case(f'display/groups_{name}', 'ok', change={FRAMES: ('IS', '2'), ROWS: ('US', 24)}, before=groups)

# ---- pixel data ---------------------------------------------------------------------------------------------------------------------

W = PX.tobytes()
case('pixels/missing', words='pixel|image', pixels=b'')
case('pixels/empty', words='pixel data', pixels=el(0x7fe00010, 'OW'))
case('pixels/one_byte', words='pixel data', pixels=el(0x7fe00010, 'OW', b'x'))
case('pixels/half', words='pixel data', pixels=el(0x7fe00010, 'OW', W[:len(W) // 2]))
case('pixels/half_of_what_is_claimed', words='cut short', pixels=el(0x7fe00010, 'OW', W[:len(W) // 2], len(W)))
case('pixels/claims_4_gb', 'any', pixels=el(0x7fe00010, 'OW', W, 0xfffffffe))
case('pixels/claims_4_gb_and_ends', words='cut short|pixel data', pixels=el(0x7fe00010, 'OW', b'', 0xfffffffe))
case('pixels/ten_times_too_much', 'ok', pixels=el(0x7fe00010, 'OW', W * 10))
case('pixels/odd_length', 'any', pixels=el(0x7fe00010, 'OW', W + b'x'))
case('pixels/as_ob', 'ok', pixels=el(0x7fe00010, 'OB', W))
case('pixels/as_text', 'any', pixels=el(0x7fe00010, 'UT', W))
case('pixels/as_sequence', words='pixel', pixels=el(0x7fe00010, 'SQ', b'', OPEN) + el(SEQ_END, ''))
case('pixels/odd_vr', 'any', pixels=b'\xe0\x7f\x10\0??\0\0' + struct.pack('<I', len(W)) + W)
case('pixels/no_length', words='pixel|divided', pixels=el(0x7fe00010, 'OW', W, OPEN))
case('pixels/float', words='floating', pixels=el(0x7fe00008, 'OF', PX.astype('f4').tobytes()))
case('pixels/double', words='floating', pixels=el(0x7fe00009, 'OD', PX.astype('f8').tobytes()))
case('pixels/group_without_pixels', words='pixel', pixels=el(0x7fe00020, 'OW', W))
case('pixels/twice', 'ok', tail=el(0x7fe00010, 'OW', W))
case('pixels/trailing_rubbish', 'ok', tail=bytes(range(256)) * 9)
for ts in (df.JPEGLL1, df.J2K_LOSSLESS, df.RLE, df.JLS, df.HTJ2K_LOSSLESS): case(f'pixels/native_in_{ts[-4:]}', 'any', ts=ts)
for ts in (df.EXPLICIT, df.IMPLICIT, df.BIG, df.DEFLATED): case(f'pixels/compressed_in_{ts[-6:]}', 'any', ts=ts, pixels=packed(stream(df.JPEGLL1)))
case('pixels/deflated_big_endian', 'any')(lambda: meta(df.DEFLATED) + deflated(raw(order='>', head=b'')))
case('pixels/big_endian_said_little', 'any', order='>')
case('pixels/little_endian_said_big', 'any', ts=df.BIG)
J = stream(df.JPEGLL1) + b'\0' * (len(stream(df.JPEGLL1)) % 2)
for name, px in dict(fragment_without_length=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'') + frag(J, OPEN), fragment_claims_4_gb=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'') + frag(J, 0xfffffffe),
                     table_claims_4_gb=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'', 0xfffffffe) + frag(J), no_table=el(0x7fe00010, 'OB', b'', OPEN) + frag(J) + el(SEQ_END, ''),
                     no_fragments=packed(), nothing=el(0x7fe00010, 'OB', b'', OPEN), only_zero_fragments=packed(b'', b'', b''), rubbish_between=packed(J)[:20] + b'rubbish!' + packed(J)[20:],
                     item_of_a_wrong_tag=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'') + el(0xfffee0aa, '', J)).items():
    case(f'pixels/{name}', 'rejected', 'compressed|pixel data|JPEG|cut short|image data', pixels=px, ts=df.JPEGLL1)
case('pixels/no_end_mark', 'ok', pixels=packed(J, end=b''), ts=df.JPEGLL1)
case('pixels/ten_thousand_fragments', 'ok', pixels=packed(*[J[i:i + 2] for i in range(0, len(J), 2)]), ts=df.JPEGLL1)
for name, bot in dict(outside=[0, 1 << 30], far_outside=[0, 0xfffffff0], falling=[500, 0], odd=[0, 3], too_many=list(range(0, 4000, 4)), one_of_two=[0]).items():
    case(f'pixels/table_{name}', 'any', 'frame|table|compressed|JPEG|pixel data|image data', pixels=packed(J, J, bot=struct.pack(f'<{len(bot)}I', *bot)), ts=df.JPEGLL1, change={FRAMES: ('IS', '2')})
for name, eot in dict(outside=struct.pack('<2Q', 0, 1 << 40), far_outside=struct.pack('<2Q', 0, 2**64 - 1), odd=bytes(13), text=b'rubbish!', huge=bytes(1 << 20)).items():
    case(f'pixels/extended_table_{name}', 'any', 'frame|table|compressed|JPEG|pixel data', before=el(0x7fe00001, 'OV', eot) + el(0x7fe00002, 'OV', eot), pixels=packed(J, J), ts=df.JPEGLL1, change={FRAMES: ('IS', '2')})
case('pixels/three_frames_claimed_one_held', 'any', 'frame', pixels=packed(J), ts=df.JPEGLL1, change={FRAMES: ('IS', '3')})
case('pixels/hundred_frames_claimed', 'any', 'frame|pixel data', change={FRAMES: ('IS', '100')})

# ---- codestreams ---------------------------------------------------------------------------------------------------------------------

NAMES = {df.RLE: 'rle', df.BASELINE: 'jpeg', df.EXTENDED: 'jpeg12', df.JPEGLL: 'jpegll', df.JPEGLL1: 'jpegll1', df.JLS: 'jpegls', df.JLS_NEAR: 'jpegls_near', df.J2K_LOSSLESS: 'j2k',
         df.J2K: 'j2k_lossy', df.HTJ2K_LOSSLESS: 'htj2k', df.HTJ2K: 'htj2k_lossy'}
for ts, name in NAMES.items():
    for k in (0, 1, 2, 4, 10, 30, 60, 90, 99): case(f'stream/{name}_cut_{k}')(functools.partial(lambda ts, k: encapsulated(ts, stream(ts)[:len(stream(ts)) * k // 100]), ts, k))
    for k in range(6):
        def flipped(ts=ts, k=k):
            rng, data = random.Random(f'{ts}{k}'), bytearray(stream(ts))
            for _ in range(1 + k): data[rng.randrange(len(data) if k > 2 else 200)] ^= 1 << rng.randrange(8)
            return encapsulated(ts, bytes(data))
        case(f'stream/{name}_flipped_{k}', 'any')(flipped)
    case(f'stream/{name}_zeros', words='image data|JPEG|RLE')(functools.partial(lambda ts: encapsulated(ts, bytes(2000)), ts))
    case(f'stream/{name}_noise', words='image data|JPEG|RLE')(functools.partial(lambda ts: encapsulated(ts, random.Random(7).randbytes(5000)), ts))
    case(f'stream/{name}_twice_the_header_size', 'any' if ts == df.RLE else 'rejected', 'size|JPEG|image data')(functools.partial(lambda ts: encapsulated(ts, stream(ts, (96, 80))), ts))
    case(f'stream/{name}_said_colour', 'any', 'colour|JPEG|image data|samples')(functools.partial(lambda ts: encapsulated(ts, change={SAMPLES: ('US', 3), PHOTO: ('CS', 'RGB')}), ts))
    case(f'stream/{name}_said_palette', 'any', 'palette')(functools.partial(lambda ts: encapsulated(ts, change={PHOTO: ('CS', 'PALETTE COLOR')}), ts))


def j2k(ts=df.J2K_LOSSLESS, size=None, comps=None, layers=None, levels=None, tile=None, siz=None, said=None):
    "A JPEG 2000 codestream whose main header lies"
    d = bytearray(stream(ts))
    at, cod = d.index(b'\xff\x51'), d.index(b'\xff\x52')
    if size: struct.pack_into('>II', d, at + 6, *size)
    if tile: struct.pack_into('>II', d, at + 22, *tile)
    if comps is not None: struct.pack_into('>H', d, at + 38, comps)
    if siz is not None: d[at + 40] = siz
    if layers: struct.pack_into('>H', d, cod + 6, layers)
    if levels is not None: d[cod + 9] = levels
    said = said or (size and (size[1], size[0]))
    return encapsulated(ts, bytes(d), {ROWS: ('US', said[0]), COLS: ('US', said[1])} if said else {})


for ts, name in ((df.J2K_LOSSLESS, 'j2k'), (df.HTJ2K_LOSSLESS, 'htj2k')):
    for what, kw in dict(gigapixels=dict(size=(65535, 65535)), four_gigapixels_in_a_small_header=dict(size=(0xffffffff, 0xffffffff), said=PX.shape), large=dict(size=(14000, 14000)),
                         large_tile=dict(size=(14000, 14000), tile=(14000, 14000)), components_0=dict(comps=0), components_3=dict(comps=3), components_16384=dict(comps=16384),
                         layers_65535=dict(layers=65535), levels_33=dict(levels=33), levels_255=dict(levels=255), tile_0=dict(tile=(0, 0)), tile_1=dict(tile=(1, 1)), tile_huge=dict(tile=(0xffffffff, 0xffffffff)),
                         precision_38=dict(siz=37), precision_128=dict(siz=127), signed=dict(siz=0x8b)).items():
        case(f'stream/{name}_{what}', 'any' if what in ('signed', 'tile_huge', 'layers_65535', 'large_tile') else 'rejected', 'JPEG 2000|pixels|size|image data|memory')(functools.partial(j2k, ts, **kw))


def sof(data, rows=None, cols=None, comps=None, precision=None):
    "A JPEG stream whose frame header lies"
    d = bytearray(data)
    at = next(i for i in range(len(d)) if d[i] == 0xff and d[i + 1] in (0xc0, 0xc1, 0xc3, 0xf7))
    if precision: d[at + 4] = precision
    if rows is not None: struct.pack_into('>H', d, at + 5, rows)
    if cols is not None: struct.pack_into('>H', d, at + 7, cols)
    if comps is not None: d[at + 9] = comps
    return bytes(d)


for ts in (df.BASELINE, df.EXTENDED, df.JPEGLL1, df.JLS):
    for what, kw in dict(gigapixels=dict(rows=65535, cols=65535), rows_0=dict(rows=0), components_255=dict(comps=255), components_0=dict(comps=0), precision_255=dict(precision=255)).items():
        case(f'stream/{NAMES[ts]}_{what}', words='JPEG|size|image data')(functools.partial(lambda ts, kw: encapsulated(ts, sof(stream(ts), **kw)), ts, kw))
    big = {ROWS: ('US', 14000), COLS: ('US', 14000)}
    case(f'stream/{NAMES[ts]}_large_and_said_so', words='JPEG|size|image data')(functools.partial(lambda ts, big: encapsulated(ts, sof(stream(ts), 14000, 14000), big), ts, big))
case('stream/rle_segments_255', words='RLE|image data')(lambda: encapsulated(df.RLE, struct.pack('<16I', 255, *[64] * 15) + bytes(900)))
case('stream/rle_offsets_outside', words='RLE|image data')(lambda: encapsulated(df.RLE, struct.pack('<16I', 2, 64, 0xfffffff0, *[0] * 13) + bytes(900)))
case('stream/rle_offsets_backwards', words='RLE|image data')(lambda: encapsulated(df.RLE, struct.pack('<16I', 2, 900, 64, *[0] * 13) + bytes(900)))
case('stream/rle_bomb', 'any')(lambda: encapsulated(df.RLE, struct.pack('<16I', 2, 64, 100_000, *[0] * 13) + b'\x81\0' * 100_000))
case('stream/deflated_frame', 'ok')(lambda: encapsulated('1.2.840.10008.1.2.8.1', deflated(W)))
case('stream/deflated_frame_bomb', 'any', 'deflated|image data')(lambda: encapsulated('1.2.840.10008.1.2.8.1', zeros(1 << 30)))
case('stream/deflated_frame_large', 'ok')(lambda: encapsulated('1.2.840.10008.1.2.8.1', zeros(2 * 14000**2), {ROWS: ('US', 14000), COLS: ('US', 14000)}))
case('stream/deflated_frame_cut', words='deflated|image data')(lambda: encapsulated('1.2.840.10008.1.2.8.1', deflated(W)[:-300]))
case('stream/progressive_jpeg_thousand_scans', 'any')(lambda: encapsulated(df.BASELINE, _scans(stream(df.BASELINE), 1000)))
for n in (55, 60, 76, 92, 100, 101, 102, 103, 107, 108, 203, 205): case(f'stream/syntax_4_{n}', 'any', 'image data|video|transfer syntax|JPEG', ts=f'1.2.840.10008.1.2.4.{n}', pixels=packed(J))
for name, ts in dict(private='1.2.840.113619.5.2', unknown='1.2.3.4.5', text='rubbish', path='../../../etc/passwd', blank='', none=None, long='1.' * 30_000 + '1', sop=MG, control='1.2\n\x1b[31m').items():
    case(f'stream/syntax_{name}', 'any', 'transfer syntax|image data|JPEG|damaged|header', ts=ts)
    case(f'stream/syntax_{name}_compressed', 'any', 'transfer syntax|image data|JPEG|damaged|header|pixel data', ts=ts, pixels=packed(J))


def _scans(data, n):
    sos, end = data.index(b'\xff\xda'), data.rindex(b'\xff\xd9')
    return data[:sos] + data[sos:end] * n + data[end:]


# ---- colour --------------------------------------------------------------------------------------------------------------------------

RGB = np.dstack([PX >> 4] * 3).astype(np.uint8).tobytes()
_c = {SAMPLES: ('US', 3), ALLOC: ('US', 8), STORED: ('US', 8), HIGH: ('US', 7)}
for photo in ('RGB', 'YBR_FULL', 'YBR_ICT', 'YBR_RCT', 'YBR_PARTIAL_422', 'ARGB', 'CMYK', 'HSV', 'rubbish', ''):
    for planar in (0, 1, 2, 65535): case(f'colour/{photo or "empty"}_{planar}', 'any', 'colour|image data', change=_c | {PHOTO: ('CS', photo), 0x00280006: ('US', planar)}, pixels=el(0x7fe00010, 'OB', RGB))
case('colour/ybr_422', 'ok', change=_c | {PHOTO: ('CS', 'YBR_FULL_422'), 0x00280006: ('US', 0)}, pixels=el(0x7fe00010, 'OB', RGB[:len(RGB) * 2 // 3]))
case('colour/ybr_422_odd', 'any', 'colour|image data|pixel data', change=_c | {PHOTO: ('CS', 'YBR_FULL_422'), COLS: ('US', 39), 0x00280006: ('US', 0)}, pixels=el(0x7fe00010, 'OB', RGB))
case('colour/no_planar_configuration', 'ok', change=_c | {PHOTO: ('CS', 'RGB')}, pixels=el(0x7fe00010, 'OB', RGB))
case('colour/16_bits', 'any', change={SAMPLES: ('US', 3), PHOTO: ('CS', 'RGB'), 0x00280006: ('US', 0)}, pixels=el(0x7fe00010, 'OW', np.dstack([PX] * 3).tobytes()))
case('colour/32_bits', 'any', change={SAMPLES: ('US', 3), ALLOC: ('US', 32), STORED: ('US', 32), HIGH: ('US', 31), PHOTO: ('CS', 'RGB')}, pixels=el(0x7fe00010, 'OW', bytes(12 * PX.size)))
case('colour/photometric_missing', 'ok', drop=[PHOTO])
for photo in ('rubbish', '', 'RGB', 'YBR_FULL', 'YBR_FULL_422', 'PALETTE COLOR', 'monochrome1', 'MONOCHROME2\\MONOCHROME1', 'MONOCHROME3'): case(f'colour/grey_said_{photo.replace(" ", "_")[:30] or "empty"}', 'any', 'palette|colour|pixel data', change={PHOTO: ('CS', photo)})
_pal = lambda d, t: {0x00281101 + i: ('US', d) for i in range(3)} | {0x00281201 + i: ('OW', t) for i in range(3)} | {PHOTO: ('CS', 'PALETTE COLOR')}
for name, p in dict(whole=_pal([256, 0, 16], bytes(512)), of_0=_pal([0, 0, 16], bytes(131072)), short=_pal([256, 0, 16], bytes(8)), bits_99=_pal([256, 0, 99], bytes(512)), none=_pal([256, 0, 16], b'')).items():
    case(f'colour/palette_{name}', 'any', 'palette', change=p | {ALLOC: ('US', 8), STORED: ('US', 8), HIGH: ('US', 7)}, pixels=el(0x7fe00010, 'OB', W[:PX.size]))

# ---- structure -----------------------------------------------------------------------------------------------------------------------

_deep = lambda n: b''.join(el(0x0040a730, 'SQ', b'', OPEN) + el(ITEM, '', b'', OPEN) for _ in range(n)) + (el(ITEM_END, '') + el(SEQ_END, '')) * n
_deep_i = lambda n: b''.join(el(0x0040a730, 'SQ', b'', OPEN, implicit=True) + el(ITEM, '', b'', OPEN) for _ in range(n)) + (el(ITEM_END, '') + el(SEQ_END, '')) * n


def _deep_known(n, tag=0x0040a730):
    inner = b''
    for _ in range(n): inner = el(tag, 'SQ', el(ITEM, '', inner))
    return inner


for n in (50, 200, 1000, 20_000):
    status = 'ok' if n < 64 else 'rejected'
    case(f'structure/nested_{n}', status, 'nested', before=_deep(n))
    case(f'structure/nested_{n}_in_un', 'any', 'nested', before=el(0x00410010, 'UN', b'', OPEN) + el(ITEM, '', b'', OPEN) + _deep_i(n) + el(ITEM_END, '') + el(SEQ_END, ''))
    case(f'structure/nested_{n}_implicit', status, 'nested', ts=df.IMPLICIT, implicit=True, before=_deep_i(n))
    case(f'structure/nested_{n}_unclosed', words='nested|cut short|damaged', before=_deep(n)[:20 * n], pixels=b'')
for n in (50, 200, 2000):
    case(f'structure/nested_{n}_known_lengths', 'any', 'nested', before=_deep_known(n))
    case(f'structure/nested_{n}_in_the_view', 'any', 'nested', change={0x00540220: ('SQ', el(ITEM, '', _deep_known(n, 0x00540222)))})
case('structure/nested_in_deflated', words='nested')(lambda: meta(df.DEFLATED) + deflated(raw(head=b'', before=_deep(20_000))))
case('structure/hundred_thousand_items', 'any', before=sequence(0x0040a730, *[b''] * 100_000))
case('structure/hundred_thousand_elements', 'any', before=b''.join(el((0x0041 + 2 * (i >> 15) << 16) | 0x1000 + (i & 0x7fff), 'LO', 'x ') for i in range(100_000)))
case('structure/million_items', 'any', 'elements', before=sequence(0x0040a730, *[b''] * 1_500_000))
case('structure/no_sequence_end', words='cut short|damaged|pixel', before=el(0x0040a730, 'SQ', b'', OPEN) + el(ITEM, '', b'', OPEN) + el(0x0040a043, 'LO', 'x '))
case('structure/stray_ends', 'any', before=el(SEQ_END, '') + el(ITEM_END, '') + el(ITEM, '', b'abcd'))
case('structure/pixels_inside_a_sequence', 'any', before=sequence(0x0040a730, el(0x7fe00010, 'OW', W)))
case('structure/pixels_only_inside_a_sequence', words='pixel|image', before=sequence(0x0040a730, el(0x7fe00010, 'OW', W)), pixels=b'')
case('structure/icon_instead_of_image', words='pixel|image', before=sequence(0x00880200, body() + el(0x7fe00010, 'OW', W)), pixels=b'', drop=[ROWS, COLS])
for n in (0xfffffffe, 0x7fffffff, 0x10000): case(f'structure/private_claims_{n:x}', words='cut short', before=el(0x00411010, 'OB', b'abcd', n), pixels=b'')
case('structure/private_claims_4_gb_before_pixels', words='cut short', before=el(0x00411010, 'OB', b'abcd', 0xfffffff0))
case('structure/short_vr_length_too_long', 'any', before=el(0x00411010, 'LO', b'ab', 60_000))
case('structure/unknown_vr', 'any', before=el(0x00411010, 'ZZ', b'abcd'))
case('structure/vr_zero', 'any', before=b'\x41\0\x10\x10\0\0\4\0abcd')
case('structure/group_lengths_wrong', 'any', change={0x00080000: ('UL', 0), 0x00280000: ('UL', 0xffffffff)})
case('structure/duplicate_elements', 'any', before=el(ROWS, 'US', 5) + el(0x00100020, 'LO', 'OTHER '))
case('structure/tags_falling', 'any', before=el(0x00080060, 'CS', 'MG') + el(0x00080005, 'CS', 'ISO_IR 100'))
case('structure/command_group', 'any', before=el(0x00000000, 'UL', 4) + el(0x00000002, 'UI', MG))
case('structure/group_ffff', 'any', tail=el(0xffffffff, 'LO', 'x '))
case('structure/meta_inside', 'any', before=el(0x00020010, 'UI', df.JPEGLL1))
for n in (0, 1, 0xffffffff, 50, 100_000): case(f'structure/meta_length_{n}', 'any')(functools.partial(lambda n: meta(length=n) + raw(head=b''), n))
case('structure/meta_only', words='image|header|cut')(lambda: meta())
case('structure/meta_missing', 'any')(lambda: bytes(128) + b'DICM' + raw(head=b''))
case('structure/meta_twice', 'any')(lambda: meta() + meta()[132:] + raw(head=b''))
case('structure/meta_element_claims_4_gb', words='')(lambda: meta(more=el(0x00020102, 'OB', b'abcd', 0xfffffffe)) + raw(head=b''))
for vr in ('ZZ', '??', 'sq', '\0\0', 'UN'): case(f'structure/meta_vr_{vr.encode().hex()}', 'any')(functools.partial(lambda vr: meta().replace(b'\x02\0\x10\0UI', b'\x02\0\x10\0' + vr.encode()) + raw(head=b''), vr))
case('structure/no_preamble', 'any')(lambda: raw()[132:])
case('structure/preamble_127', 'any')(lambda: raw()[1:])
case('structure/preamble_program', 'ok')(lambda: b'MZ' + bytes(58) + b'\x80\0\0\0' + raw()[64:])
case('structure/preamble_elf', 'ok')(lambda: b'\x7fELF' + raw()[4:])
case('structure/preamble_script', 'ok')(lambda: b'#!/bin/sh\necho owned\n'.ljust(128, b'#') + raw()[128:])
case('structure/preamble_pdf', 'ok')(lambda: b'%PDF-1.7\n'.ljust(128) + raw()[128:])
case('structure/preamble_tiff', 'ok')(lambda: b'II*\0' + raw()[4:])
case('structure/preamble_zip', 'any')(lambda: b'PK\3\4' + raw()[4:])
case('structure/zip_behind', 'ok')(lambda: raw() + zipped(dict(a=b'x')))
case('structure/deflated', 'ok')(lambda: meta(df.DEFLATED) + deflated(raw(head=b'')))
case('structure/deflated_cut', words='')(lambda: meta(df.DEFLATED) + deflated(raw(head=b''))[:300])
case('structure/deflated_cut_in_pixels', words='')(lambda: meta(df.DEFLATED) + deflated(raw(head=b''))[:-300])
case('structure/deflated_damaged', words='')(lambda: (lambda d: d[:200] + bytes([d[200] ^ 255]) + d[201:])(meta(df.DEFLATED) + deflated(raw(head=b''))[20:]))
case('structure/deflated_rubbish', words='deflated|damaged|header')(lambda: meta(df.DEFLATED) + random.Random(1).randbytes(3000))
case('structure/deflated_nothing', words='')(lambda: meta(df.DEFLATED))
case('structure/deflated_not', 'any')(lambda: meta(df.DEFLATED) + raw(head=b''))
_small = lambda n: body() + el(0x7fe00010, 'OW', b'', n)
case('structure/bomb_in_pixels', 'any', 'unpacks')(lambda: meta(df.DEFLATED) + started(_small(0xe0000000)) + zeros(0xe0000000))
case('structure/bomb_before_pixels', words='unpacks')(lambda: meta(df.DEFLATED) + started(body() + el(0x60013000, 'OW', b'', 0xe0000000)) + zeros(0xe0000000))
case('structure/bomb_in_sequence', words='unpacks|elements|damaged')(lambda: meta(df.DEFLATED) + started(body() + el(0x60011010, 'UN', b'', OPEN)) + zeros(0xe0000000))
case('structure/bomb_of_fragments', words='')(lambda: meta(df.DEFLATED) + started(body() + el(0x7fe00010, 'OB', b'', OPEN) + frag(b'') + frag(b'', 0xe0000000)) + zeros(0xe0000000))
case('structure/bomb_in_a_table', words='')(lambda: meta(df.DEFLATED) + started(body() + el(0x7fe00010, 'OB', b'', OPEN) + frag(b'', 0xe0000000)) + zeros(0xe0000000))
case('structure/bomb_of_elements', words='elements|unpacks')(lambda: meta(df.DEFLATED) + started(body()) + deflated(b''.join(el(0x60011000 + (i & 0xfff), 'LO') for i in range(1000)) * 2000))

# ---- whose it is, and words ----------------------------------------------------------------------------------------------------------

for name, text in dict(path='../../../etc/passwd', absolute='/etc/passwd', empty='', long='1.' * 30_000, line='1.2\n3', escape='1.2\x1b[2J', quote="1.2'; DROP TABLE images; --", blank='   ', letters='DOE^JANE',
                       zero='1.2\0003', arabic='١.٢', windows='..\\..\\boot.ini').items():
    for tag, what in ((0x00080018, 'sop'), (0x0020000d, 'study'), (0x0020000e, 'series'), (0x00080016, 'class')):
        case(f'identity/{what}_uid_{name}', 'any', 'SOPInstanceUID|image', change={tag: ('UI', text.encode())})
    case(f'identity/patient_{name}', 'ok', change={0x00100020: ('LO', text.encode()[:60_000]), 0x00080050: ('SH', text.encode()[:60_000]), 0x00080080: ('LO', text.encode()[:60_000])})
case('identity/uid_missing', 'ok', drop=[0x00080018, 0x0020000d, 0x0020000e])
case('identity/twin', 'any', change={0x00080018: ('UI', '1.2.3.4')})
case('identity/twin_of_other_content', 'any', change={0x00080018: ('UI', '1.2.3.4'), 0x00080020: ('DA', '19990101')})
for n, text in enumerate(('-' * 60_000 + 'A', ' -' * 30_000 + 'A', 'X' * 60_000 + '!A', '0' * 60_000 + 'A', '_' * 60_000, 'A' * 65_534, '\\' * 60_000)):
    case(f'identity/slow_pattern_{n}', 'ok', change={0x00100020: ('LO', text), 0x0008103e: ('LO', text), 0x00185101: ('CS', text[:60_000]), 0x00200020: ('CS', text), 0x00080070: ('LO', text), 0x00081090: ('LO', text)})
case('identity/slow_pattern_implicit', 'ok', ts=df.IMPLICIT, implicit=True, change={0x00100020: ('LO', '-' * 5_000_000 + 'A'), 0x0008103e: ('LO', 'MLO ' * 1_000_000)})
for n, cs in enumerate(('ISO 2022 IR 87', 'ISO_IR 999', 'rubbish', '\\' * 500, 'ISO 2022 IR 149\\ISO 2022 IR 58', 'GB18030', 'utf-7', 'rot13', 'idna', '../x')):
    case(f'identity/charset_{n}', 'ok', change={0x00080005: ('CS', cs), 0x0008103e: ('LO', b'\x1b$B\xff\xfe\x80L MLO'), 0x00100020: ('LO', b'\xff\xfe\xed\xa0\x80')})
case('identity/text_in_numbers', 'ok', change={0x00181114: ('DS', 'a' * 500), 0x00181110: ('DS', '1e308'), 0x00181111: ('DS', '1e-308'), 0x00280301: ('CS', '\x00')})
case('identity/year_99999', 'ok', change={0x00080020: ('DA', '209999999999999')})
case('identity/format_strings', 'ok', change={0x0008103e: ('LO', '%s%n{{7*7}}$(id)`id`'), 0x00100020: ('LO', '%08x{0.__class__}')})

# ---- what is no mammogram ------------------------------------------------------------------------------------------------------------

_doc = dict(drop=[ROWS, COLS, ALLOC, STORED, HIGH, SIGN, SAMPLES, PHOTO], pixels=b'')
for modality, sop, words in (('SR', '1.2.840.10008.5.1.4.1.1.88.33', 'report'), ('KO', '1.2.840.10008.5.1.4.1.1.88.59', 'key'), ('PR', '1.2.840.10008.5.1.4.1.1.11.1', 'presentation'), ('SEG', '1.2.840.10008.5.1.4.1.1.66.4', 'segment'),
                             ('ECG', '1.2.840.10008.5.1.4.1.1.9.1.1', 'curve'), ('CT', '1.2.840.10008.5.1.4.1.1.2', 'CT'), ('MG', '1.2.840.10008.5.1.4.1.1.66', 'image'), ('', '1.2.840.10008.5.1.4.1.1.88.22', 'image')):
    case(f'other/{modality or "none"}_{sop[-5:]}', words=words, change={0x00080060: ('CS', modality)}, sop=sop, **_doc)
case('other/ct_image', words='CT', change={0x00080060: ('CS', 'CT')})
case('other/pdf_document', words='document', sop='1.2.840.10008.5.1.4.1.1.104.1', before=el(0x00420011, 'OB', b'%PDF-1.4'), **_doc)
case('other/dicomdir', words='DICOMDIR|index', sop='1.2.840.10008.1.3.10', before=el(0x00041220, 'SQ', b'', OPEN) + el(SEQ_END, ''), **(_doc | dict(drop=list(header()))))
case('other/video', words='video|image data|transfer', ts='1.2.840.10008.1.2.4.100', pixels=packed(b'\0\0\1\xb3' * 500))
for name, data, words in (('empty', b'', 'empty'), ('one_byte', b'D', 'not a DICOM'), ('131_bytes', bytes(131), 'not a DICOM'), ('dicm_only', bytes(128) + b'DICM', 'header|image|DICOM|cut'), ('dicm_at_0', b'DICM' + bytes(400), 'not a DICOM'),
                          ('elf', b'\x7fELF' + bytes(900), 'program'), ('pe', b'MZ' + bytes(900), 'program'), ('pdf', b'%PDF-1.4' + bytes(900), 'PDF'), ('png', b'\x89PNG\r\n\x1a\n' + bytes(900), 'PNG'), ('jpeg', b'\xff\xd8\xff' + bytes(900), 'JPEG'),
                          ('gzip', gzip.compress(bytes(900)), 'gzip'), ('bzip2', bz2.compress(bytes(900)), 'bzip2'), ('noise', random.Random(3).randbytes(5000), 'not a DICOM'), ('ones', b'\xff' * 5000, 'not a DICOM'),
                          ('html', b'<html>', 'text'), ('sqlite', b'SQLite format 3\0' + bytes(900), 'database'), ('nifti', b'n+1\0'.rjust(348), 'not a DICOM')):
    case(f'other/{name}', words=words)(functools.partial(bytes, data))


def _tar():
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w') as t: t.addfile(tarfile.TarInfo('../../x.dcm'), io.BytesIO(b''))
    return f.getvalue()


case('other/tar', words='tar')(_tar)


# ---- archives ------------------------------------------------------------------------------------------------------------------------

def zipped(members, how=zipfile.ZIP_DEFLATED):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', how) as z:
        for name, data in members.items(): z.writestr(name, data)
    return f.getvalue()


def overlapping(members=2000, size=1 << 27, data=None, method=8):
    "A zip whose members all are the same deflate stream: small, and terabytes unpacked"
    data = zeros(size) if data is None else data
    local = lambda name: struct.pack('<4s5H3I2H', b'PK\3\4', 20, 0, method, 0, 0, 0, len(data), size, len(name), 0) + name
    first, central = local(b'0' * 8), b''
    for i in range(members):
        name = f'{i:08}'.encode()
        central += struct.pack('<4s6H3I5H2I', b'PK\1\2', 20, 20, 0, method, 0, 0, 0, len(data), size, len(name), 0, 0, 0, 0, 0, 0) + name
    n = min(members, 65535)
    return first + data + central + struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, n, n, len(central), len(first) + len(data), 0)


def tree(name):
    def add(fn): TREES[name] = fn; return fn
    return add


def put(path, data=b''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def good(k):
    "A mammogram in order, the innocent neighbour"
    global _name
    _name = f'good {k}'
    return raw()


@tree('archives')
def _(d):
    "Zips of every kind; each with a good neighbour where it can have one"
    inner = zipped({'deep.dcm': good('in zip in zip')})
    out = {}
    def zip_(name, data, **want): put(d/name, data); out.update(want.get('want', {}))
    zip_('good.zip', zipped({'a/1.dcm': good('z1'), 'a/2.dcm': good('z2')}), want={'good.zip!/a/1.dcm': ('ok', ''), 'good.zip!/a/2.dcm': ('ok', '')})
    zip_('nested.zip', zipped({'inner.zip': inner, 'x.dcm': good('z3')}), want={'nested.zip!/inner.zip': ('rejected', 'inside a zip'), 'nested.zip!/x.dcm': ('ok', '')})
    names = {'../../../../owned.dcm': good('z4'), '/owned2.dcm': good('z5'), 'C:\\owned.dcm': good('z6'), 'line\nbreak.dcm': good('z7'), '-rf': good('z8'), 'n' * 300 + '.dcm': good('z9'),
             './././x': good('z10'), 'a//b': good('z11'), '日本.dcm': good('z12'), 'x!/y.dcm': good('z13'), '..': good('z14'), '.': good('z15')}
    zip_('names.zip', zipped(names), want={f'names.zip!/{n}': ('ok', '') for n in names})
    for how, name in ((zipfile.ZIP_BZIP2, 'bzip2'), (zipfile.ZIP_LZMA, 'lzma'), (zipfile.ZIP_STORED, 'stored')):
        zip_(f'{name}.zip', zipped({'1.dcm': good(name)}, how), want={f'{name}.zip!/1.dcm': ('ok', '') if how == zipfile.ZIP_STORED else ('rejected', 'deflate')})
    whole = zipped({'1.dcm': good('z16'), '2.dcm': good('z17')})
    zip_('cut.zip', whole[:-30], want={'cut.zip': ('rejected', 'zip archive is damaged')})
    zip_('cut_at_100.zip', whole[:100], want={'cut_at_100.zip': ('rejected', 'zip archive is damaged')})
    zip_('damaged_inside.zip', whole[:300] + b'rubbish!' * 10 + whole[380:])
    zip_('crc.zip', whole.replace(struct.pack('<I', zlib.crc32(good('z16'))), b'oops'))
    zip_('encrypted.zip', whole.replace(b'PK\3\4\x14\0\0\0', b'PK\3\4\x14\0\1\0').replace(b'PK\1\2\x14\3\x14\0\0\0', b'PK\1\2\x14\3\x14\0\1\0'),
         want={'encrypted.zip!/1.dcm': ('rejected', 'encrypted'), 'encrypted.zip!/2.dcm': ('rejected', 'encrypted')})
    zip_('method_99.zip', whole.replace(b'\x14\0\0\0\x08\0', b'\x14\0\0\0\x63\0'))
    zip_('comment.zip', whole[:-2] + b'\xff\xff' + b'PK\5\6' * 100)
    zip_('offset.zip', whole[:-6] + b'\xff\xff\xff\x7f\0\0', want={'offset.zip!/1.dcm': ('rejected', 'zip archive')})
    zip_('count.zip', whole[:-14] + b'\xff\xff\xff\xff' + whole[-10:])
    zip_('not_utf8.zip', zipped({'ä.dcm': good('z18')}).replace('ä'.encode(), b'\xff\xfe'))
    zip_('empty.zip', zipped({}), want={'empty.zip': ('rejected', 'without files')})
    zip_('no_extension', zipped({'1.dcm': good('z19')}), want={'no_extension!/1.dcm': ('ok', '')})
    zip_('bomb.zip', zipped({'zeros.dcm': bytes(1 << 26), 'good.dcm': good('z20')}), want={'bomb.zip!/good.dcm': ('ok', '')})
    zip_('overlap.zip', overlapping(), want={'overlap.zip': ('rejected', 'overlap')})
    zip_('bzip2_bomb.zip', zipped({'zeros.dcm': raw()[:-len(W)] + bytes(1 << 26)}, zipfile.ZIP_BZIP2))
    zip_('many.zip', zipped({f'{i:06}.txt': b'' for i in range(3000)}))
    put(d/'same.zip', zipped({'f': good('z21')}))
    put(d/'same.zip!'/'f', good('z22'))
    twice = io.BytesIO()
    import warnings
    with warnings.catch_warnings(), zipfile.ZipFile(twice, 'w') as z:
        warnings.simplefilter('ignore')
        z.writestr('t.dcm', good('z23')); z.writestr('t.dcm', good('z24'))
    put(d/'twice.zip', twice.getvalue())
    put(d/'selfextracting.exe', b'MZ' + bytes(500) + whole)
    return out


@tree('links')
def _(d):
    "Links in circles, out of the folder, to nowhere, to the system"
    put(d/'site'/'1.dcm', good('l1'))
    for name, to in dict(circle='.', up='..', nowhere='nothing', self='self', root='/', proc='/proc', dev='/dev', zero='/dev/zero', tty='/dev/tty', passwd='/etc/passwd', mem='/proc/self/mem', fds='/proc/self/fd',
                         again='site', file='site/1.dcm').items(): (d/name).symlink_to(to)
    (d/'ping').symlink_to('pong')
    (d/'pong').symlink_to('ping')
    (d/'site'/'circle').symlink_to(d)
    os.link(d/'site'/'1.dcm', d/'hardlink.dcm')
    return {'site/1.dcm': ('any', ''), 'nowhere': ('rejected', 'link'), 'self': ('rejected', 'link'), 'ping': ('rejected', 'link'), 'zero': ('rejected', 'no regular file'), 'root/': ('rejected', 'link')}


@tree('pipes')
def _(d):
    "What would wait for ever when opened"
    put(d/'1.dcm', good('p1'))
    os.mkfifo(d/'pipe.dcm')
    (d/'link_to_pipe').symlink_to('pipe.dcm')
    s, here = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(d)  # a socket's path may have 107 bytes
    try: s.bind('socket.dcm')
    finally: os.chdir(here)
    s.close()
    out = {'1.dcm': ('ok', ''), 'pipe.dcm': ('rejected', 'pipe'), 'link_to_pipe': ('rejected', 'pipe'), 'socket.dcm': ('rejected', 'pipe, socket')}
    try:
        os.mknod(d/'zero.dcm', 0o600 | 0o020000, os.makedev(1, 5))
        out['zero.dcm'] = ('rejected', 'device')
    except OSError: pass
    return out


@tree('names')
def _(d):
    "Names as they come out of old systems, and as an attacker would choose them"
    from mammo_nb.cohort.files import shown_name
    out = {}
    for n in (b'\xe4\xf6\xfc.dcm', b'\xff\xfe\xfd', b'line\nbreak.dcm', b'tab\t.dcm', b'\x1b[31mred.dcm', b'-rf', b'--help', b'a' * 255, b'b' * 251 + b'.dcm', b' ', b'...', b'$(id)', b'`id`', b"'quote'", b'"quote"', b'a;b', b'*',
              b'\\xe4.dcm', b'\\\\', b'x!', b'%s%n', b'{0}', b'\x7f', b'\xe2\x80\xae cod.exe', b'con', b'nul.dcm', b'.hidden.dcm', b'\xed\xa0\x80', b'\\xe4\\xf6\\xfc.dcm', b'1.2.840.113619', b'\xc3\xa4.dcm', b'a\xcc\x88.dcm'):
        with open(os.fsencode(d) + b'/' + n, 'wb') as f: f.write(good(f'n{n!r}'))
        out[shown_name(os.fsdecode(n))] = ('ok', '')
    for n in (b'folder\n\xff', b'a.zip!', b'-'):
        os.mkdir(os.fsencode(d) + b'/' + n)
        with open(os.fsencode(d) + b'/' + n + b'/1.dcm', 'wb') as f: f.write(good(f'nf{n!r}'))
        out[shown_name(os.fsdecode(n)) + '/1.dcm'] = ('ok', '')
    return out


@tree('deep')
def _(d):
    "2,200 folders in each other, deeper than a path may be long"
    put(d/'1.dcm', good('d1'))
    here = os.getcwd()
    os.chdir(d)
    try:
        for k in range(2200):
            os.mkdir('d')
            os.chdir('d')
            if k in (100, 1500, 2199): put(Path('deep.dcm'), good(f'd{k}'))
    finally: os.chdir(here)
    return {'1.dcm': ('ok', ''), 'd/' * 101 + 'deep.dcm': ('ok', '')}


@tree('sizes')
def _(d):
    "Sparse files that claim a hundred gigabytes"
    def sparse(name, data, size=100 << 30):
        global _name
        _name = name
        with open(put(d/name, data() if callable(data) else data), 'r+b') as f: f.truncate(size)
    sparse('zeros.dcm', b'')
    sparse('noise.bin', b'rubbish')
    sparse('image.dcm', good('s1'))
    sparse('private_4_gb.dcm', lambda: raw(before=el(0x00411010, 'OB', b'', 0xfffffffe), pixels=b''))
    sparse('sequence.dcm', lambda: raw(before=el(0x00411010, 'SQ', b'', OPEN), pixels=b''))
    sparse('undefined.dcm', lambda: raw(before=el(0x00411010, 'OB', b'', OPEN), pixels=b''))
    sparse('table_4_gb.dcm', lambda: raw(ts=df.JPEGLL1, pixels=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'', 0xfffffff0)))
    sparse('fragment_4_gb.dcm', lambda: raw(ts=df.JPEGLL1, pixels=el(0x7fe00010, 'OB', b'', OPEN) + frag(b'') + frag(J, 0xfffffff0)))
    sparse('fragments.dcm', lambda: raw(ts=df.JPEGLL1, pixels=el(0x7fe00010, 'OB', b'', OPEN)))
    sparse('archive.zip', zipped({'1.dcm': good('s2')}))
    put(d/'1.dcm', good('s3'))
    return {'1.dcm': ('ok', ''), 'image.dcm': ('any', '')}


@tree('doors')
def _(d):
    "What may not be opened (by anybody but root)"
    for k, mode in enumerate((0o000, 0o200, 0o444)): put(d/f'{mode:o}.dcm', good(f'm{k}')).chmod(mode)
    put(d/'closed'/'1.dcm', good('m3'))
    put(d/'listed'/'1.dcm', good('m4'))
    put(d/'1.dcm', good('m5'))
    put(d/'closed.zip', zipped({'1.dcm': good('m6')})).chmod(0)
    (d/'closed').chmod(0)
    (d/'listed').chmod(0o444)
    return {'1.dcm': ('ok', ''), '444.dcm': ('ok', '')}


def write_trees(folder, names=None):
    "Makes the trees below `folder`; gives {path: (status, words)} of what is said for sure"
    out = {}
    for name in names or TREES:
        (Path(folder)/name).mkdir(parents=True)
        out |= {f'{name}/{p}': want for p, want in TREES[name](Path(folder)/name).items()}
    return out


SLOW = r'bomb|million|thousand|_large|slow_pattern_implicit|overlays_sixteen|gigapixels'  # a second or more each; the campaign has them all


def remove(folder):
    "Deletes a folder however deep it is"
    import subprocess
    if subprocess.run(['rm', '-rf', str(folder)], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(['chmod', '-R', 'u+rwX', str(folder)], stderr=subprocess.DEVNULL)
        subprocess.run(['rm', '-rf', str(folder)], check=True)


# ---- surgery: what the mutator does to whole files ------------------------------------------------------------------------------------

def elements(data):
    "Places of the top-level elements of a file: (start, end), pixel data as the last one; by pydicom's own reading where that works"
    import pydicom, warnings
    out, f = [], io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds = pydicom.dcmread(f, force=True, stop_before_pixels=True)
        at = [ds.get_item(t).value_tell if hasattr(ds.get_item(t), 'value_tell') else ds.get_item(t).file_tell for t in ds.keys()]
        heads = [a - (8 if ds.original_encoding[0] or data[a - 4:a - 2] in _shorts else 12) for a in at if a]
        out = list(zip(heads, [*heads[1:], f.tell()])) + [(f.tell(), len(data))]
    except Exception: pass
    return [(a, b) for a, b in out if 0 <= a < b <= len(data)] or [(0, len(data))]


_shorts = {v.encode() for v in 'AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US'.split()}
_values = [b'', b'\0' * 8, b'\xff' * 8, b'1e308 ', b'NaN ', b'-1\\1,8', b'../../../etc/passwd ', b'\xff\xfe\xfd\xfc', b'9' * 400, b"'; DROP"]


def _pick(data, rng): return rng.choice(elements(data))


def _insert(data, rng, piece): a, _ = _pick(data, rng); return data[:a] + piece + data[a:]


def _flip(data, rng, n=8):
    d = bytearray(data)
    for _ in range(rng.randrange(1, n)):
        if d: d[rng.randrange(len(d))] ^= 1 << rng.randrange(8)
    return bytes(d)


def _relength(data, rng):
    a, b = _pick(data, rng)
    d = bytearray(data)
    at, kind = (a + 8, '<I') if data[a + 4:a + 6].decode('latin-1') in LONG else (a + 6, '<H') if data[a + 4:a + 6] in _shorts else (a + 4, '<I')
    if at + 4 <= len(d): struct.pack_into(kind, d, at, rng.choice([0, 1, 7, 0xffff, 0x7fff] if kind == '<H' else [0, 1, 7, 0xffffffff, 0xfffffffe, 0x7fffffff, len(d), 1 << 20]))
    return bytes(d)


def _retype(data, rng):
    a, _ = _pick(data, rng)
    return data[:a + 4] + rng.choice(['SQ', 'UN', 'OB', 'US', 'DS', 'LO', 'UI', 'ZZ', '\0\0', 'UT', 'OW', 'FD']).encode() + data[a + 6:]


def _revalue(data, rng):
    a, b = _pick(data, rng)
    v = rng.choice(_values)
    v += b' ' * (len(v) % 2)
    return data[:a] + el(int.from_bytes(data[a:a + 2], 'little') << 16 | int.from_bytes(data[a + 2:a + 4], 'little'), data[a + 4:a + 6].decode('latin-1') if data[a + 4:a + 6] in _shorts else 'LO', v) + data[b:]


def _cutat(data, rng): a, b = _pick(data, rng); return data[:rng.choice([a, a + 4, a + 8, b, (a + b) // 2])]


def _delete(data, rng): a, b = _pick(data, rng); return data[:a] + data[b:]


def _twice(data, rng): a, b = _pick(data, rng); return data[:b] + data[a:b] + data[b:]


def _move(data, rng): (a, b), (c, _) = _pick(data, rng), _pick(data, rng); return data[:a] + data[b:] if a <= c < b else data[:c] + data[a:b] + data[c:a] + data[b:] if c < a else data[:a] + data[b:c] + data[a:b] + data[c:]


def _in_pixels(data, rng):
    a, b = elements(data)[-1]
    return data[:a] + _flip(data[a:b], rng, 20) + data[b:]


def _cut_pixels(data, rng): a, b = elements(data)[-1]; return data[:rng.randrange(a, b)]


def _hole(data, rng): a, b = elements(data)[-1]; k = rng.randrange(a, b); return data[:k] + data[min(b, k + rng.choice([1, 2, 64, 700])):]


def _other_syntax(data, rng):
    a = data.find(b'1.2.840.10008.1.2')
    new = rng.choice([*df.LOSSLESS, *df.LOSSY, '1.2.840.10008.1.2.4.100', '1.2.3']).encode()
    n = data[a:a + 30].split(b'\0')[0]
    return data.replace(n, new.ljust(len(n), b'\0')[:len(n)], 1) if a >= 0 else data


SURGERY = dict(flip=_flip, relength=_relength, retype=_retype, revalue=_revalue, cut=_cutat, delete=_delete, twice=_twice, move=_move, flip_pixels=_in_pixels, cut_pixels=_cut_pixels, hole=_hole,
               syntax=_other_syntax, nest=lambda d, rng: _insert(d, rng, _deep(rng.choice([3, 70, 300]))), private=lambda d, rng: _insert(d, rng, el(0x00411010, 'UN', b'x' * rng.randrange(40), rng.choice([None, 0xfffffffe, OPEN]))),
               number=lambda d, rng: _insert(d, rng, el(rng.choice([ROWS, COLS, ALLOC, STORED, HIGH, SIGN, SAMPLES]), 'US', rng.choice([0, 1, 3, 12, 255, 65535]))),
               decimal=lambda d, rng: _insert(d, rng, el(rng.choice([CENTRE, WIDTH, SLOPE, ICEPT, FRAMES]), 'DS', rng.choice(['0', '-1', '1e308', 'NaN', '1,8', '', '1e-308', '2\\0']))))


def operated(data, ops):
    "A file after some operations `(name, seed)`"
    for name, seed in ops:
        try: data = SURGERY[name](data, random.Random(seed))
        except (ValueError, struct.error, UnicodeEncodeError): pass  # nothing left to operate on
    return data
