"The fleet: a scanner that drifts is found and named, chance seldom raises an alarm, and names and dates stay out of it."
import functools
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mammo_nb.cohort.facts import cohort_key
from mammo_nb.cohort.manifest import scan
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.dicom.read import read_header
from mammo_nb.edge import fleet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'/'benchmarks'))
import fleet as bench  # noqa: E402


@pytest.fixture(scope='module')
def settings(): return load_settings(ROOT/'settings.ini')


# --- statistics

def test_what_the_page_promises_was_measured():
    "1,000 fleets of each kind; the benchmark writes the file"
    facts = json.loads((ROOT/'nbs'/'data'/'edge'/'fleet.json').read_text())
    assert facts['charts'] >= 100 and facts['scanners'] == 10
    for kind in ('plain', 'skewed', 'together'):
        assert facts['found'][kind]['found']['of'] == facts['false_alarms'][kind]['of'] == 1000
        assert facts['found'][kind]['found']['share'] >= .9 and facts['found'][kind]['named_first']['share'] >= .9
    assert all(f['share'] <= .05 for f in facts['false_alarms'].values())


def test_a_shift_of_one_sd_is_found_and_named_in_simulated_fleets():
    out = bench.found(30, first=10**7)
    assert out['found']['share'] >= .8 and out['named_first']['share'] >= .8   # 96.7 % in the campaign: 24 of 30 or fewer in one of 20,000 runs


def test_a_fleet_without_a_shift_is_silent():
    for kind in ('plain', 'skewed', 'studies'):
        assert bench.silent_fleets(25, kind, first=2*10**7)[0]['share'] <= .2, kind   # 2.6 % in the campaign: more than 5 of 25 in one of 50,000 runs


@pytest.mark.parametrize('baseline', [100, 200])
def test_the_table_of_heights_is_what_a_simulation_gives(baseline):
    "at a chance of 0.5 % per chart and period, where 20,000 charts say enough"
    peaks = fleet.simulated_peaks(baseline, 20_000, seed=99)
    p = .005
    h = fleet.height(baseline, 1, p)
    assert .8*p < fleet.chance_of(peaks, h) < 1.25*p
    assert fleet.height(baseline, 100, .05) > h > fleet.height(baseline, 1, .05)


watch = functools.partial(fleet.watch, false_alarms=.001)   # several periods are watched below


def simple(n=400, seed=1, scanners=3, **shift):
    "One picture a study; `shift` = {feature: (scanner, from, by)}"
    rng, rows = np.random.default_rng(seed), []
    for s in range(scanners):
        x = {f: rng.normal(10*s, 1 + s, n) for f in ('px_mean', 'px_noise', 'hd_kvp')}
        for f, (who, start, by) in shift.items():
            if who == s: x[f][start:] += by*(1 + s)
        rows.append(pl.DataFrame(dict(scanner=f's{s}', image_id=[f'{s}-{k}' for k in range(n)], study_id=[f'{s}-{k}' for k in range(n)], **x)))
    return pl.concat(rows)


def test_an_alarm_says_who_what_when_and_which_way():
    for by, way in ((2., 'higher'), (-2., 'lower')):
        a = watch(simple(px_noise=(1, 300, by))).alarms
        assert a.height == 1 and a.row(0)[:2] == ('s1', 'px_noise')
        assert abs(a['since'][0] - 300) <= 8 and 300 <= a['alarm_at'][0] < 320 and a['way'][0] == way
        assert 'noise in the background' in a['says'][0] and way in a['says'][0]


def test_charts_depend_on_ranks_only():
    df = simple(px_noise=(1, 300, 1.5))
    odd = df.with_columns((pl.col('px_noise')/8).exp(), -pl.col('px_mean')**3)
    one, two = (watch(d, features=['px_noise']).alarms.select('scanner', 'feature', 'alarm_at', 'since') for d in (df, odd))
    assert one.equals(two) and len(one) == 1


def test_one_mad_value_raises_no_alarm_and_is_listed():
    df = simple().with_columns(px_mean=pl.when(pl.col('image_id') == '1-350').then(10.**9).otherwise('px_mean'))
    assert watch(df).alarms.is_empty()
    far = fleet.outliers(df)
    assert far['image_id'].to_list() == ['1-350'] and far['scanner'][0] == 's1' and far['feature'][0] == 'px_mean'


def test_a_field_that_never_changed_and_does_now():
    df = simple().with_columns(hd_kvp=pl.when((pl.col('scanner') == 's0') & (pl.int_range(pl.len()).over('scanner') >= 300)).then(30.).otherwise(28.))
    a = watch(df).alarms
    assert a.select('scanner', 'feature').rows() == [('s0', 'hd_kvp')] and a['alarm_at'][0] < 310
    assert watch(df.with_columns(hd_kvp=pl.lit(28.))).alarms.is_empty()


def test_images_of_a_study_are_not_taken_for_independent():
    rng, alarms = np.random.default_rng(5), {True: 0, False: 0}
    for k in range(40):
        study = np.arange(400)//4
        x = np.sqrt(.8)*rng.normal(size=100)[study] + np.sqrt(.2)*rng.normal(size=400)
        df = pl.DataFrame(dict(scanner='s', image_id=[str(i) for i in range(400)], px_mean=x))
        for known in alarms: alarms[known] += len(fleet.watch(df.with_columns(study_id=pl.Series([f's{i}' for i in (study if known else range(400))]))).alarms) > 0
    c = fleet.watch(df.with_columns(study_id=pl.Series([f's{i}' for i in study]))).charts[0]
    assert abs(c.alike - .8) < .1 and c.independent < 80
    assert alarms[True] <= 14 and alarms[False] >= 20, alarms   # four periods of at most 5 % each; who overlooks it raises false alarms all day


def test_scanners_without_a_baseline_and_a_new_one_after_a_repair():
    df = simple(px_mean=(2, 250, 3.))
    w = watch(pl.concat([df, simple(50).with_columns(scanner=pl.lit('new')).head(50)]))
    assert w.early == {'new': 50} and set(w.alarms['scanner']) == {'s2'}
    again = watch(df, baseline=100, restart=dict(s2=250))
    assert again.alarms.is_empty() and min(c.place[0] for c in again.charts if c.scanner == 's2') == 250
    with pytest.raises(MammoError, match='30 are the least'): watch(df, baseline=20)
    assert watch(df.head(0)).alarms.is_empty() and fleet.clusters(df.head(5)).is_empty()


def test_values_that_are_missing_or_no_numbers():
    df = simple().with_columns(px_noise=pl.when(pl.int_range(pl.len()) % 2 == 0).then('px_noise'), px_mean=pl.when(pl.int_range(pl.len()) % 50 == 0).then(float('nan')).otherwise('px_mean'))
    w = watch(df)
    assert {c.feature for c in w.charts} == {'px_mean', 'hd_kvp'} and w.alarms.is_empty()


# --- pictures and headers

@pytest.fixture(scope='module')
def files(tmp_path_factory, settings):
    at = tmp_path_factory.mktemp('fleet')
    fleet.phantom_fleet(at/'dicom', scanners=2, pictures=8, drift=-1, size=(160, 124))
    (at/'dicom'/'cut').write_bytes((at/'dicom'/'scanner0'/'0000').read_bytes().replace(b'2.25.1000000000', b'2.25.1000009999')[:-8000])
    m = scan(at/'dicom', at/'c', settings)
    return at, m, fleet.fleet_features(at/'c', m, settings)


def test_every_file_has_a_row(files):
    at, m, df = files
    assert len(df) == m['path'].n_unique() == 17 and df['scanner'].drop_nulls().n_unique() == 2
    bad = df.filter(pl.col('status') != 'ok')
    assert len(bad) == 1 and 'cut short' in bad['reason'][0]
    ok = df.filter(pl.col('status') == 'ok')
    assert all(fleet.picture_path(at/'c'/'edge'/'quality'/'pictures', i).is_file() for i in ok['image_id'])


def test_no_date_serial_number_or_name_leaves_the_header(files):
    at, m, df = files
    key, ok = cohort_key(at/'c'), df.filter(pl.col('status') == 'ok')
    assert all(m and len(m) == 14 for m in ok['scanner'].str.extract('^(scanner-[0-9a-f]{6})$')) and set(df.columns) == set(fleet.SCHEMA)
    since = fleet._seconds('20240101', '000000')
    assert (ok['taken'] - since).abs().min() > 86400*30 and ok['taken'].max() - ok['taken'].min() <= 86400*3
    ds = read_header(at/'dicom'/'scanner0'/'0005')
    assert fleet.taken_at(ds, key) != fleet.taken_at(ds, b'x'*32) and fleet.scanner_name(ds, key) != fleet.scanner_name(ds, b'x'*32)
    order = ok.filter(pl.col('scanner') == fleet.scanner_name(ds, key)).join(m.select('image_id', 'path'), on='image_id')['path'].to_list()
    assert order == sorted(order)


def test_what_was_measured_is_not_measured_again(files, settings, monkeypatch):
    at, m, df = files
    asked = []
    monkeypatch.setattr(fleet, 'scan_features', lambda item, **kw: asked.append(item) or dict(px_mean=.5))
    assert fleet.fleet_features(at/'c', m, settings).equals(df) and not asked
    changed = m.with_columns(mtime_ns=pl.when(pl.col('path') == 'scanner0/0003').then(1).otherwise('mtime_ns'))
    again = fleet.fleet_features(at/'c', changed, settings)
    assert [Path(a[0]).name for a in asked] == ['0003'] and len(again) == len(df)


def test_features_feel_what_they_should():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:400, :300]
    img = np.where(np.hypot((y - 200)/160, x/200) < 1, 1500 + 300*np.sin(x/3)*np.sin(y/4), 100) + rng.normal(0, 10, (400, 300))
    plain = fleet.pixel_features(img.astype(np.uint16))
    more = lambda **kw: fleet.pixel_features(**({'stored': img.astype(np.uint16)} | kw))
    assert fleet.pixel_features((img*1.5).astype(np.uint16))['px_mean'] > 1.4*plain['px_mean']
    assert fleet.pixel_features((img + rng.normal(0, 20, img.shape)).clip(0).astype(np.uint16))['px_noise'] > 1.8*plain['px_noise']
    assert fleet.pixel_features(np.where(img > 1500, 4095, img).astype(np.uint16))['px_saturated'] > .05 > plain['px_saturated']
    assert np.isclose(more(stored=(4095 - img).astype(np.uint16), inverted=True)['px_mean'], plain['px_mean'], atol=.01)
    assert np.isclose(more(stored=(img - 2048).astype(np.int16), signed=True)['px_mean'], plain['px_mean'], atol=.01)
    assert np.isnan(fleet.pixel_features(np.zeros((50, 50), np.uint16))['px_mean'])


def test_the_pictures_of_a_report():
    df = simple(px_noise=(1, 300, 2.))
    w = watch(df)
    for fig in (fleet.plot_watch(w), fleet.plot_alarms(w), fleet.plot_clusters(fleet.clusters(df))): assert 3000 < len(fig._repr_png_()) < 150_000
    assert fleet.plot_alarms(watch(simple())) is None and fleet.plot_clusters(fleet.clusters(df.head(3))) is None
    odd = df.with_columns(px_mean=pl.when(pl.col('image_id') == '1-350').then(10.**9).otherwise('px_mean'), view=pl.lit('L-CC'))
    asked = []
    sheet = fleet.outlier_sheet(odd, fleet.outliers(odd), lambda i: asked.append(i) or np.zeros((40, 30), np.uint8))
    assert asked[0] == '1-350' and asked[1].startswith('1-') and len(sheet._repr_png_()) > 1000
