"Small DICOM files for the tests, in every transfer syntax, and the slow reference that the display is held to."
import copy
import io
import warnings
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_encoder
from pydicom.uid import UID

SHARED = Path(__file__).resolve().parents[1].parent/'shared'
MG = SHARED/'data'/'mg'

IMPLICIT, EXPLICIT, DEFLATED, BIG, RLE = ('1.2.840.10008.1.2', '1.2.840.10008.1.2.1', '1.2.840.10008.1.2.1.99', '1.2.840.10008.1.2.2',
                                          '1.2.840.10008.1.2.5')
BASELINE, EXTENDED, JPEGLL, JPEGLL1, JLS, JLS_NEAR, J2K_LOSSLESS, J2K, HTJ2K_LOSSLESS, HTJ2K = (
    f'1.2.840.10008.1.2.4.{i}' for i in (50, 51, 57, 70, 80, 81, 90, 91, 201, 203))
LOSSLESS = [IMPLICIT, EXPLICIT, DEFLATED, BIG, RLE, JPEGLL, JPEGLL1, JLS, J2K_LOSSLESS, HTJ2K_LOSSLESS]
LOSSY = [BASELINE, EXTENDED, JLS_NEAR, J2K, HTJ2K]
STREAMS = [RLE, BASELINE, EXTENDED, JPEGLL, JPEGLL1, JLS, JLS_NEAR, J2K_LOSSLESS, J2K, HTJ2K_LOSSLESS, HTJ2K]


def tissue(h=331, w=253, bits=12, seed=0, background=0):
    "A left breast of smooth tissue and noise, uint16, with bright points and a dark background"
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:h, :w]
    inside = ((y - h / 2) / (h * .46))**2 + (x / (w * .8))**2 < 1
    low = cv2.GaussianBlur(rng.normal(size=(h, w)), (0, 0), h / 30) * h / 10
    a = 2**bits * (.45 + .12 * low + .02 * rng.normal(size=(h, w)))
    for _ in range(12): cv2.circle(a, (int(rng.integers(w // 2)), int(rng.integers(h))), int(rng.integers(1, 4)), 2**bits * .97, -1)
    return np.where(inside, np.clip(a, 2**bits * .05, 2**bits - 1), background).astype(np.uint16)


def rle(a):
    "DICOM's run lengths by pydicom's own encoder, row by row"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = *a.shape, a.itemsize * 8, a.itemsize * 8, a.itemsize * 8 - 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.PixelData = a.tobytes()
    ds['PixelData'].VR = 'OW'
    return get_encoder(UID(RLE)).encode(ds, index=0, encoding_plugin='pydicom')  # gdcm's ends the process on some images


def encode(a, ts, bits):
    "One frame's bytes; `a` is what the container holds (unsigned)"
    if ts == RLE: return rle(a)
    if ts in (JPEGLL, JPEGLL1): return imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=bits, predictor=1 if ts == JPEGLL1 else 6)
    if ts == BASELINE: return imagecodecs.jpeg8_encode(a, level=95)
    if ts == EXTENDED: return imagecodecs.jpeg8_encode(a, level=98, bitspersample=12)
    if ts == JLS: return imagecodecs.jpegls_encode(a)
    if ts == JLS_NEAR: return imagecodecs.jpegls_encode(a, level=2)
    if ts == J2K_LOSSLESS: return imagecodecs.jpeg2k_encode(a, codecformat='j2k', reversible=True, bitspersample=bits, resolutions=6)
    if ts == J2K: return imagecodecs.jpeg2k_encode(a, level=60, codecformat='j2k', reversible=False, bitspersample=bits, resolutions=6)
    if ts == HTJ2K_LOSSLESS: return imagecodecs.htj2k_encode(a, reversible=True)
    if ts == HTJ2K: return imagecodecs.htj2k_encode(a, level=.0005, reversible=False)
    return (a.astype(a.dtype.newbyteorder('>')) if ts == BIG else a).tobytes()


def dataset(frames, ts=EXPLICIT, bits=12, signed=False, **header):
    "A mammogram of one or several frames (arrays of stored values) as a pydicom dataset with pixels"
    frames = [frames] if isinstance(frames, np.ndarray) else list(frames)
    a = frames[0]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(ts)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1.2'
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.826.0.1.3680043.8.498.1'
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = 'MG', 'MONOCHROME2', 1
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = *a.shape, a.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(signed)
    if len(frames) > 1: ds.NumberOfFrames = len(frames)
    words = [np.ascontiguousarray(f).view(f'u{a.itemsize}') for f in frames]
    if signed and UID(ts).is_encapsulated and ts != RLE: words = [f & (2**bits - 1) for f in words]
    parts = [encode(f, ts, bits) for f in words]
    ds.PixelData = encapsulate(parts) if UID(ts).is_encapsulated else b''.join(parts)
    if len(ds.PixelData) % 2: ds.PixelData += b'\0'
    ds['PixelData'].VR = 'OB' if UID(ts).is_encapsulated or bits <= 8 else 'OW'
    for k, v in header.items(): setattr(ds, k, v)
    return ds


def content(ds):
    "A dataset as the bytes of a file"
    f = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.save_as(f, enforce_file_format=True)
    return f.getvalue()


def make(frames, ts=EXPLICIT, **kw): return content(dataset(frames, ts, **kw))


def lut_item(first, data, bits, signed=False):
    ds = Dataset()
    ds.add_new('LUTDescriptor', 'SS' if signed else 'US', [len(data) % 65536, first, bits])
    ds.add_new('LUTData', 'OW', np.asarray(data, '<u2').tobytes())
    return ds


def sequence_item(**kw):
    ds = Dataset()
    for k, v in kw.items(): setattr(ds, k, v)
    return ds


def shared_groups(ds, frame=0):
    "The display attributes of an enhanced multi-frame object lifted to the top, where pydicom's functions look"
    ds = copy.copy(ds)
    for seq in ('SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence'):
        for g in list(ds.get(seq) or [])[slice(0, 1) if seq[0] == 'S' else slice(frame, frame + 1)]:
            for name in ('PixelValueTransformationSequence', 'FrameVOILUTSequence'):
                for i in g.get(name) or []:
                    for e in i: ds[e.tag] = e
    return ds


def reference(ds, stored, long_edge=None, frame=0):
    "pydicom's modality and VOI functions in float64, the window's output range to 8 bits, then the same area downscale"
    ds = shared_groups(ds, frame)
    y = apply_voi_lut(apply_modality_lut(stored, ds), ds).astype(np.float64)
    lo, hi = (-2**(ds.BitsStored - 1), 2**(ds.BitsStored - 1) - 1) if ds.PixelRepresentation else (0, 2**ds.BitsStored - 1)
    if ds.get('VOILUTSequence'): lo, hi = 0, 2**ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get('ModalityLUTSequence'): lo, hi = 0, 2**ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    elif 'RescaleSlope' in ds: lo, hi = (v * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for v in (lo, hi))
    img = np.round(np.clip((y - lo) / (hi - lo), 0, 1) * 255)
    if ds.PhotometricInterpretation == 'MONOCHROME1' or ds.get('PresentationLUTShape') == 'INVERSE': img = 255 - img
    return shrink(img.astype(np.uint8), long_edge)


def shrink(img, long_edge):
    h, w = img.shape
    if not long_edge or max(h, w) <= long_edge: return img
    s = long_edge / max(h, w)
    return cv2.resize(img, (int(w * s + .5), int(h * s + .5)), interpolation=cv2.INTER_AREA)


def worst(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.abs(a.astype(int) - b).max())
