"""The audit against what was planted: fill rates, silence, contradictions, sides, impossible values."""
import datetime

import numpy as np
import polars as pl
import pytest

from mammo_nb.cohort.audit import contradictions, fill_chart, fill_rates, impossible, interval, sides, who_speaks, year_chart
from mammo_nb.cohort.manifest import scan
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import make_cohort, truth_path


def row(i, **kw):
    base = dict(image_id=f'{i:016x}', site='a', manufacturer='GE', year=2020, status='ok', frame=0, rows=3328, columns=2560, bits_stored=12, laterality='L', view='L-CC',
                patient_id=f'p{i}', study_id=f's{i}', header_filled='ViewPosition', header_biopsy=None, header_mag=None, header_rules='', header_conflict=False)
    return base | kw


def table(rows): return pl.DataFrame(rows, schema_overrides=dict(header_biopsy=pl.Boolean, header_mag=pl.Boolean, manufacturer=pl.String, year=pl.Int32))


def test_planted_rates_lie_in_the_intervals():
    "Three sites whose headers speak always, in 60 % and never; 95 % intervals hold the planted rate in about 95 % of 200 cohorts"
    hit = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        df = table([row(k, site=s, header_mag=bool(rng.random() < .2) if rng.random() < p else None) for s, p in (('always', 1.), ('sometimes', .6), ('never', 0.)) for k in range(120)])
        got = {r['site']: r for r in who_speaks(df).filter(finding='mag').iter_rows(named=True)}
        assert (got['always']['said'], got['never']['said']) == (1, 0) and got['always']['low'] > .96 and got['never']['high'] < .04
        assert [got[s]['speaks'] for s in ('always', 'sometimes', 'never')] == ['always', 'sometimes', 'never']
        hit += got['sometimes']['low'] <= .6 <= got['sometimes']['high']
    assert hit >= 186, hit  # 95 % of 200, less three standard deviations


def test_only_no_is_no_knowledge():
    df = table([row(k, header_mag=False, header_biopsy=None) for k in range(10)])
    assert dict(who_speaks(df).select('finding', 'speaks').rows()) == dict(biopsy='never', mag='only no')


def test_interval():
    assert interval(0, 0) == (0, 1) and interval(0, 10)[0] == 0 and interval(10, 10)[1] == 1
    assert interval(8, 10) == pytest.approx((.4439, .9748), abs=1e-4)  # Clopper & Pearson, as tabulated


def test_phantom_sites(tmp_path):
    "What the phantoms' headers were told to say is what the audit reports"
    s = load_settings()
    make_cohort(tmp_path/'dicom', patients=18, image_size=96, seed=5, broken=0, workers=1)
    df = scan(tmp_path/'dicom', tmp_path/'out', s)
    truth = pl.read_parquet(truth_path(tmp_path/'dicom')).filter(pl.col('frame') == 0).select('image_id', 'said_biopsy', 'said_mag', place='site')
    both = df.filter(pl.col('status') == 'ok', pl.col('frame') == 0).join(truth, on='image_id')
    assert len(both) > 60
    want = {(p, f): n for p, *ns in both.group_by('place').agg(pl.sum('said_biopsy'), pl.sum('said_mag')).rows() for f, n in zip(('biopsy', 'mag'), ns)}
    got = {(r['place'], r['finding']): r['yes'] for r in who_speaks(both, 'place').iter_rows(named=True)}
    assert got == want and sum(want.values()) > 10 and want['c', 'biopsy'] == want['c', 'mag'] == 0


def test_fill_rates_count_files_not_frames_and_leave_out_what_is_rejected():
    df = table([row(0), row(1, header_filled='Grid,ViewPosition', year=2021), row(1, frame=1), row(2, status='rejected'), row(3, manufacturer=None, header_filled=None)])
    r = fill_rates(df)
    assert r.select('origin', 'images', 'ViewPosition', 'Grid').rows() == [('a · GE', 2, 1, .5), ('a · unknown', 1, 0, 0)]
    assert fill_rates(df, ('site', 'year')).select('site', 'year', 'images').rows() == [('a', 2020, 2), ('a', 2021, 1)]


def test_contradictions():
    df = table([row(0, header_conflict=True, header_rules='magnification,spot_compression,contact'), row(1, header_rules='magnification,contact'), row(2), row(3, site='b', header_conflict=True, header_rules='gone')])
    assert contradictions(df).rows() == [('a', 'magnification × contact', 1, 1/3)]


def test_sides(tmp_path):
    thumbs = Thumbnails(tmp_path/'thumbnails')
    (tmp_path/'thumbnails').mkdir(exist_ok=True)
    for i in range(8):
        img = np.zeros((64, 48), np.uint8)
        img[8:56, :20] = 150
        thumbs.put(f'{i:016x}', img[:, ::-1].copy() if i % 4 == 3 else img)
    df = table([row(i) for i in range(8)] + [row(9), row(10, laterality=None)])
    assert sides(df, thumbs).select('images', 'differ', 'rate').rows() == [(8, 2, .25)]
    assert sides(df, thumbs, most=3)['differ'].item() == 0


def test_impossible():
    now = datetime.date.today().year
    df = table([row(0), row(1, year=1899), row(2, year=now + 1), row(3, bits_stored=32), row(4, rows=100, columns=5000), row(5, laterality=None), row(6, view='L'),
                row(7, study_id='x'), row(8, study_id='x', site='b'), row(9, study_id=None), row(10, study_id=None), row(11, year=None)])
    got = {r['what']: (r['images'], r['examples']) for r in impossible(df).iter_rows(named=True)}
    assert got == {f'study date before 1980 or after {now}': (2, f'{1:016x} {2:016x}'), 'study date missing': (1, f'{11:016x}'), 'more than 16 or fewer than 8 bits stored': (1, f'{3:016x}'),
                   'shorter edge below 500 pixels': (1, f'{4:016x}'), 'longer edge more than four times the shorter': (1, f'{4:016x}'), 'side neither left nor right': (1, f'{5:016x}'),
                   'view unknown': (1, f'{6:016x}'), 'one study, several patients': (2, f'{7:016x} {8:016x}'), 'one study, several hospitals': (2, f'{7:016x} {8:016x}')}


@pytest.mark.parametrize('rows', [[], [row(0)], [row(0, year=None)], [row(k, year=2000 + k, header_filled='Grid' if k % 2 else '') for k in range(9)]], ids=['none', 'one', 'no year', 'varied'])
def test_charts_of_anything(rows):
    import matplotlib.pyplot as plt
    df = table(rows) if rows else table([row(0)]).clear()
    fill_chart(df), year_chart(df)
    plt.close('all')
