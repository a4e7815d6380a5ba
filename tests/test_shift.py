"Shift: what moved is seen, what did not move raises no alarm, and three images are too few to say."
import json
from time import perf_counter

import numpy as np
import polars as pl
import pytest

from mammo_nb.core.settings import MammoError
from mammo_nb.dicom.phantom import phantom_image
from mammo_nb.metrics.shift import FEATURES, VERDICTS, intensity_features, plot_shift, shift_reference, shift_report

SAME, LITTLE, LOT, FEW = VERDICTS


def cohort(patients, seed, moved=0., wide=1., per=(1, 2, 4, 4, 6), icc=.5, site='s'):
    "seven features of patients whose images resemble each other; `px_mean` may move (in standard deviations) or widen"
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), rng.choice(per, patients))
    v = {}
    for c in (*FEATURES, 'prob_biopsy', 'prob_mag'):
        z = np.sqrt(icc)*rng.normal(size=patients)[who] + np.sqrt(1-icc)*rng.normal(size=len(who))
        if c == 'px_mean': z = moved + wide*z
        v[c] = np.maximum(z-1, 0) if c == 'px_white' else 1/(1+np.exp(2-z)) if c.startswith('prob') else 100+15*z
    return pl.DataFrame(dict(site=site, patient_id=who, **{k: x.astype(np.float32) for k, x in v.items()}))


def verdicts(r, c='px_mean'): return r.filter(pl.col('feature') == c)['verdict'].to_list()


@pytest.mark.parametrize('patients', [25, 60, 300])
def test_the_same_distribution_raises_no_alarm(patients):
    "300 sites without any shift: at most 2 % are called different in any of seven features"
    home, alarms = shift_reference(cohort(200, 10_000)), 0
    for seed in range(300):
        if seed % 30 == 0: home = shift_reference(cohort(200, 10_000+seed))
        r = shift_report(home, cohort(patients, seed))
        alarms += (r['verdict'].is_in([LITTLE, LOT])).any()
    assert alarms/300 <= .02, alarms


@pytest.mark.parametrize('patients,moved,wide,least', [(60, 1., 1., .95), (60, 0., 2.5, .9), (200, .6, 1., .95), (25, 2., 1., .95)])
def test_a_shift_is_seen(patients, moved, wide, least):
    home, seen, others = shift_reference(cohort(300, 10_000)), 0, 0
    for seed in range(60):
        r = shift_report(home, cohort(patients, seed, moved, wide))
        seen += verdicts(r)[0] in (LITTLE, LOT)
        others += r.filter(pl.col('feature') != 'px_mean')['verdict'].is_in([LITTLE, LOT]).any()
    assert seen/60 >= least and others <= 3


def test_alike_images_would_raise_alarms_if_they_counted_in_full():
    home = shift_reference(cohort(200, 10_000, per=(8,), icc=.9))
    count = lambda patient: sum((shift_report(home, cohort(40, s, per=(8,), icc=.9), patient=patient)['p'] < .01/7).any() for s in range(60))
    assert count('patient_id') <= 3 and count('nobody') > 15


def test_images_are_worth_what_they_add():
    home, alone = shift_reference(cohort(200, 0)), cohort(300, 1, per=(1,))
    four = pl.concat([alone]*4)
    worth = lambda d: shift_report(home, d)['worth'].to_numpy()
    assert np.allclose(worth(alone), 300, rtol=.005), 'an image per patient counts in full'
    assert np.allclose(worth(four), 300, rtol=.005), 'four copies count once'
    assert (worth(cohort(300, 2, per=(4,), icc=.5)) > 400).all() and (worth(cohort(300, 2, per=(4,), icc=.5)) < 1100).all()


def test_three_images_are_too_few_and_none_is_no_error():
    home = shift_reference(cohort(200, 0))
    blank = cohort(5, 3, site='blank').with_columns(pl.lit(float('nan'), pl.Float32).alias('px_mean'))
    new = pl.concat([cohort(3, 1, moved=5., site='tiny'), cohort(80, 2, site='ok'), blank])
    r = shift_report(home, new)
    v = {(a, b): c for a, b, c in r.select('site', 'feature', 'verdict').rows()}
    assert v['tiny', 'px_mean'] == FEW == v['blank', 'px_mean'] and v['ok', 'px_mean'] == SAME
    assert len(plot_shift(home, new)._repr_png_()) < 150_000
    assert set(shift_report(home, new, by=None)['site']) == {'all'} and set(shift_report(home, new.drop('site'))['site']) == {'all'}


def test_a_million_images_need_an_effect_not_only_significance():
    rng = np.random.default_rng(0)
    d = lambda n, m: pl.DataFrame(dict(px_mean=rng.normal(m, 1, n)))
    r = shift_report(shift_reference(d(100_000, 0)), d(300_000, .05), by=None)
    assert r['p'][0] < 1e-6 and r['verdict'][0] == SAME


def test_the_verdict_takes_off_what_chance_adds():
    r = pl.concat([shift_report(shift_reference(cohort(200, 10_000)), cohort(n, s, .7)) for s in range(60) for n in (30, 150)])
    far, p = r['psi']-r['by_chance'], r['p'] < .01/7
    want = [FEW if w < 20 else SAME if not q or f < .1 else LITTLE if f < .25 else LOT for w, f, q in zip(r['worth'], far, p)]
    assert want == r['verdict'].to_list() and {SAME, LITTLE, LOT} <= set(want)
    same = pl.concat([shift_report(shift_reference(cohort(200, 10_000+s)), cohort(60, s)) for s in range(40)])
    assert same['psi'].mean() == pytest.approx(same['by_chance'].mean(), rel=.35), 'what chance adds is what it is said to add'


def test_distances_are_what_they_say():
    rng = np.random.default_rng(1)
    home, new = rng.normal(0, 2, 50_000), rng.normal(1, 2, 50_000)
    r = shift_report(shift_reference(pl.DataFrame(dict(px_mean=home))), pl.DataFrame(dict(px_mean=new)), by=None).row(0, named=True)
    edges = np.r_[-np.inf, np.quantile(home, np.arange(1, 10)/10), np.inf]
    a, b = np.histogram(home, edges)[0]/50_000, np.histogram(new, edges)[0]/50_000
    assert r['psi'] == pytest.approx(((b-a)*np.log(b/a)).sum(), rel=.01) and r['wasserstein'] == pytest.approx(.5, abs=.02)
    assert r['ks'] == pytest.approx(max(abs((home <= t).mean()-(new <= t).mean()) for t in np.linspace(-3, 4, 300)), abs=.02)
    assert 'higher' in r['says'] and r['verdict'] == LITTLE or r['verdict'] == LOT


def test_the_reference_is_small_plain_json():
    home = shift_reference(cohort(300, 0))
    text = json.dumps(home, allow_nan=False)
    assert len(text) < 12_000
    a, b = (shift_report(h, cohort(50, 1, 1.)) for h in (home, json.loads(text)))
    assert a.equals(b)
    constant = shift_reference(pl.DataFrame(dict(px_mean=[5.]*50)))
    assert shift_report(constant, pl.DataFrame(dict(px_mean=[5.]*50)), by=None)['verdict'][0] == SAME
    assert shift_report(constant, pl.DataFrame(dict(px_mean=[9.]*50)), by=None)['verdict'][0] == LOT
    assert shift_reference(pl.DataFrame(dict(other=[1.]))) == {}
    with pytest.raises(MammoError, match='share no'): shift_report(home, pl.DataFrame(dict(other=[1.])))


def test_intensity_features():
    img = np.stack([(phantom_image(size=(224, 224), seed=s)[0] >> 4).astype(np.uint8) for s in range(3)])
    f = intensity_features(img)
    assert set(f) == set(FEATURES) and all(v.dtype == np.float32 and v.shape == (3,) and np.isfinite(v).all() for v in f.values())
    brighter = intensity_features(np.where(img > 8, np.minimum(img.astype(int)+30, 255), img).astype(np.uint8))
    assert (brighter['px_mean'] > f['px_mean']+20).all() and np.allclose(brighter['px_background'], f['px_background'])
    noisy = intensity_features(np.clip(img+np.random.default_rng(0).normal(0, 15, img.shape)*(img > 20), 0, 255).astype(np.uint8))
    assert (noisy['px_detail'] > f['px_detail']+3).all()
    black, white = (intensity_features(np.full((1, 64, 64), v, np.uint8)) for v in (0, 255))
    assert black['px_background'][0] == 1 and black['px_mean'][0] == 0 and white['px_white'][0] == 1 and white['px_mean'][0] == 255
    assert intensity_features(np.zeros((0, 64, 64), np.uint8))['px_mean'].shape == (0,)
    assert np.array_equal(intensity_features(img[:, None])['px_mean'], f['px_mean'])
    with pytest.raises(MammoError, match='uint8'): intensity_features(img.astype(np.float32))


def test_intensity_features_cost_a_fraction_of_a_millisecond():
    x = np.random.default_rng(0).integers(0, 256, (300, 224, 224), dtype=np.uint8)
    t = min((lambda t0: (intensity_features(x), perf_counter()-t0)[1])(perf_counter()) for _ in range(3))
    assert t/300 < .001, 'about 0.1 ms on a free core'
