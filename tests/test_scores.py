"Scores, intervals and thresholds: against scikit-learn, against simulation, and where a class is missing."
from time import perf_counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from sklearn.metrics import (accuracy_score, average_precision_score, balanced_accuracy_score, brier_score_loss, cohen_kappa_score, precision_score,
                             recall_score, roc_auc_score)

from mammo_nb.metrics.scores import (_leave_out, _patients_of, all_scores, binary_scores, bootstrap_ci, calibration_curve_of, ece_of, exact_interval,
                                     patient_weights, plot_calibration, predictive_values, sampling_of, score_report, score_table, to_breasts, to_studies, weighted_gaps, weighted_scores)
from mammo_nb.metrics.thresholds import threshold_for_sensitivity, youden

SCORES = ('sensitivity', 'specificity', 'accuracy', 'balanced_accuracy', 'roc_auc', 'brier', 'ppv', 'npv', 'kappa', 'pr_auc', 'ece', 'ppv_at',
          'npv_at')


def same(a, b, tol=1e-9): return a == pytest.approx(b, abs=tol) or (np.isnan(a) and np.isnan(b))


# Slow and literal on purpose: what the fast code must equal.
def slow_auc(y, p):
    pairs = [1. if a > b else .5 if a == b else 0. for a in p[y == 1] for b in p[y == 0]]
    return sum(pairs)/len(pairs)


def slow_ece(y, p, bins=10):
    total = 0.
    for k in range(bins):
        inside = [i for i in range(len(p)) if (k <= p[i]*bins < k+1) or (k == bins-1 and p[i] == 1)]
        if inside: total += len(inside)/len(p)*abs(sum(y[i] for i in inside)/len(inside) - sum(p[i] for i in inside)/len(inside))
    return total


def slow_brier(y, p): return sum((b-a)**2 for a, b in zip(y, p))/len(y)


def cohort(patients=80, per=4, seed=0, prevalence=.3):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), per)
    y = ((rng.random(patients) < prevalence)[who] & (rng.random(len(who)) < .8)).astype(float)
    p = np.clip(.25 + .4*y + .1*rng.normal(size=patients)[who] + .15*rng.normal(size=len(who)), 0, 1)
    return pl.DataFrame(dict(patient_id=who, study_id=who, has_x=y, prob_x=p))


def scores_of(d, w): return weighted_scores(d['has_x'], d['prob_x'], .5, w)


@given(st.integers(0, 10_000), st.integers(2, 60), st.booleans())
@hyp(max_examples=60, deadline=None)
def test_scores_equal_scikit_learn(seed, n, ties):
    rng = np.random.default_rng(seed)
    y, p = np.r_[0, 1, rng.integers(0, 2, n)], rng.random(n+2)
    if ties: p = p.round(1)
    s, yes = binary_scores(y, p, .5, prevalence=.1), p >= .5
    nan = float('nan')
    ref = dict(sensitivity=recall_score(y, yes), specificity=recall_score(y, yes, pos_label=0), accuracy=accuracy_score(y, yes),
               balanced_accuracy=balanced_accuracy_score(y, yes), roc_auc=roc_auc_score(y, p), brier=brier_score_loss(y, p),
               ppv=precision_score(y, yes, zero_division=nan), npv=precision_score(y, yes, pos_label=0, zero_division=nan),
               kappa=cohen_kappa_score(y, yes), pr_auc=average_precision_score(y, p), ece=slow_ece(y, p))
    a, b = ref['sensitivity'], ref['specificity']
    ref |= dict(ppv_at=a*.1/(a*.1+(1-b)*.9) if a or b < 1 else nan, npv_at=b*.9/(b*.9+(1-a)*.1) if b or a < 1 else nan)
    w = weighted_scores(y, p, .5, np.ones((1, n+2)), prevalence=.1)
    for k in SCORES: assert same(s[k], ref[k]) and same(w[k][0], ref[k]), k


@given(st.integers(0, 100_000), st.integers(2, 80), st.sampled_from([1, 2, 16]))
@hyp(max_examples=80, deadline=None)
def test_auc_ece_and_brier_equal_their_definitions(seed, n, digits):
    "counting pairs, looping over bins: to 1e-9 on random inputs, with and without ties"
    rng = np.random.default_rng(seed)
    y, p = np.r_[0, 1, rng.integers(0, 2, n)], rng.beta(.5, .5, n+2).round(digits)
    s, w = binary_scores(y, p), weighted_scores(y, p, .5, np.ones((1, n+2)))
    for k, ref in (('roc_auc', slow_auc(y, p)), ('ece', slow_ece(y, p)), ('brier', slow_brier(y, p))):
        assert abs(s[k]-ref) < 1e-9 and abs(w[k][0]-ref) < 1e-9, k
    assert abs(np.abs(weighted_gaps(y, p, np.ones((1, n+2)))).sum() - slow_ece(y, p)) < 1e-9


def test_a_sure_model_that_is_right_has_no_calibration_error():
    assert ece_of([0, 1, 1], [0, 1, 1]) == 0 and ece_of([1, 1], [0., 0.]) == 1 and np.isnan(ece_of([], []))


@given(st.integers(0, 10_000), st.integers(1, 30))
@hyp(max_examples=40, deadline=None)
def test_weights_mean_repetition(seed, n):
    rng = np.random.default_rng(seed)
    y, p, w = np.r_[0, 1, rng.integers(0, 2, n)], rng.random(n+2).round(1), rng.integers(1, 4, n+2)
    rep = binary_scores(np.repeat(y, w), np.repeat(p, w), .5, prevalence=.2)
    got = weighted_scores(y, p, .5, w[None], prevalence=.2)
    for k in SCORES: assert same(got[k][0], rep[k]), k


@pytest.mark.parametrize('y', [[], [0, 0, 0], [1, 1], [np.nan, np.nan], [0, np.nan]])
def test_a_missing_class_is_nan_and_never_an_error(y):
    p = np.linspace(.1, .9, len(y))
    s = binary_scores(y, p)
    has = {v for v in y if v == v}
    assert np.isnan(s['sensitivity']) == (1 not in has) and np.isnan(s['specificity']) == (0 not in has) and np.isnan(s['roc_auc'])
    d = pl.DataFrame(dict(patient_id=list(range(len(y))), study_id=list(range(len(y))), has_x=np.array(y, float), prob_x=p),
                     schema=dict(patient_id=pl.Int64, study_id=pl.Int64, has_x=pl.Float64, prob_x=pl.Float64))
    rep = score_report(d, ['x'], ['has_x'], [.5], n=50)
    assert rep['image']['findings']['x']['roc_auc']['value'] is None
    score_table(rep), score_table(rep, 'study')


def test_resampling_is_by_patient():
    w = patient_weights(['b', 'a', 'b', 'c', 'a'], n=200, seed=3)
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 1] == w[:, 4]).all() and (w[:, [0, 1, 3]].sum(1) == 3).all()
    rows = patient_weights(np.arange(5), n=200, seed=3)
    assert (rows.sum(1) == 5).all() and rows.std() > .5


def test_intervals_are_seeded_and_fast():
    d = cohort(500, 4)
    t = perf_counter()
    a = bootstrap_ci(scores_of, d, n=1000, seed=1)
    assert perf_counter()-t < 10, 'a thousand resamples of 2,000 images'
    assert a == bootstrap_ci(scores_of, d, n=1000, seed=1) != bootstrap_ci(scores_of, d, n=1000, seed=2)
    assert all(lo <= v <= hi for v, lo, hi in a.values())


def test_patients_not_images_set_the_width():
    "four identical images per patient are worth one"
    one = cohort(60, 1)
    four = pl.concat([one]*4)
    a, b = (bootstrap_ci(scores_of, d, seed=0)['accuracy'] for d in (one, four))
    assert a[2]-a[1] == pytest.approx(b[2]-b[1], abs=1e-6)
    naive = bootstrap_ci(scores_of, four.with_columns(patient_id=pl.int_range(pl.len())), seed=0)['accuracy']
    assert naive[2]-naive[1] < .7*(b[2]-b[1])


def clustered(rng, patients):
    "1 to 6 images per patient that resemble each other; a patient with the finding shows it on some of them"
    n = rng.integers(1, 7, patients)
    who = np.repeat(np.arange(patients), n)
    y = ((rng.random(patients) < .35)[who] & (rng.random(len(who)) < .7)).astype(float)
    z = -1.6 + 2.6*y + .7*rng.normal(size=patients)[who] + rng.normal(size=len(who))
    return pl.DataFrame(dict(patient_id=who, y=y, p=1/(1+np.exp(-z))))


def all_of(d, w): return weighted_scores(d['y'], d['p'], .5, w, prevalence=.02) | dict(ece=weighted_gaps(d['y'], d['p'], w))


def coverage(studies, patients, resamples=400, seed=0):
    "share of simulated studies whose 95 % interval holds the truth, per score"
    rng = np.random.default_rng(seed)
    big = clustered(rng, 200_000)
    truth = {k: float(np.abs(np.asarray(v)[0]).sum()) for k, v in all_of(big, np.ones((1, big.height))).items()}
    hit = dict.fromkeys(truth, 0)
    for i in range(studies):
        ci = bootstrap_ci(all_of, clustered(rng, patients), n=resamples, seed=i, patients=_patients_of('y', 'p', .5))
        for k, (_, lo, hi) in ci.items(): hit[k] += lo <= truth[k] <= hi
    return {k: v/studies for k, v in hit.items()}


def test_coverage():
    "1,000 simulated cohorts of 100 patients: every score's interval holds the truth in 93 to 97 % (the calibration error's errs wide: to 98.5 %)"
    got = coverage(1000, 100)
    print({k: round(v, 3) for k, v in got.items()})
    assert set(got) == set(SCORES)
    off = {k: v for k, v in got.items() if not .93 <= v <= (.985 if k == 'ece' else .97)}
    assert not off, off


def test_the_calibration_errors_interval_says_something():
    "far from 0 where the model is far off, at 0 where it is not, although chance alone makes the value positive"
    rng = np.random.default_rng(0)
    p = rng.random(1200)
    d = pl.DataFrame(dict(patient_id=np.arange(1200)//4, y=(rng.random(1200) < p).astype(float), p=p))
    fn = lambda c: lambda e, w: dict(ece=weighted_gaps(e['y'], e[c], w))
    good, bad = bootstrap_ci(fn('p'), d)['ece'], bootstrap_ci(fn('q'), d.with_columns(q=pl.col('p')*.5+.5))['ece']
    assert good[0] > .01 and good[1] < .004 and good[2] < .06 and .2 < bad[1] < bad[0] <= bad[2] < .3


@pytest.mark.parametrize('patients', [1, 7, 199, 450])
def test_the_jackknife_leaves_everybody_out_once(patients):
    who = np.repeat(np.arange(patients), 3)
    w = _leave_out(who)
    assert len(w) == min(patients, 200) and ((w == 0).sum(0) == 1).all() and (w[:, ::3] == w[:, 1::3]).all()


def test_perfection_on_ten_patients_is_not_certainty():
    d = pl.DataFrame(dict(patient_id=range(20), study_id=range(20), has_x=[1.]*10+[0.]*10, prob_x=[.9]*10+[.1]*10))
    s = score_report(d, ['x'], ['has_x'], [.5])['image']['findings']['x']
    sens = s['sensitivity']
    assert sens['value'] == 1 and sens['low'] == pytest.approx(exact_interval(10, 10)[0], abs=1e-5) and sens['low'] < .75
    assert s['roc_auc']['low'] < .75


def test_mean_accuracy_and_exact_match():
    y, p = np.array([[0, 1], [1, 0], [0, np.nan], [1, 1]]), np.array([[.1, .9], [.8, .7], [.6, .2], [.9, .7]])
    s = all_scores(y, p, [.5, .5], ['a', 'b'])
    assert s['accuracy'] == pytest.approx((3/4 + 2/3)/2) and s['exact_match'] == pytest.approx(2/3)
    d = pl.DataFrame(dict(patient_id=range(4), study_id=range(4), ya=y[:, 0], yb=y[:, 1], prob_a=p[:, 0], prob_b=p[:, 1]))
    rep = score_report(d, ['a', 'b'], ['ya', 'yb'], [.5, .5], n=20)
    assert rep['image']['accuracy']['value'] == pytest.approx(s['accuracy'], abs=1e-6)
    assert rep['image']['exact_match']['value'] == pytest.approx(2/3, abs=1e-6)


def test_studies():
    d = pl.DataFrame(dict(study_id=['s', 's', 't', 't', 'u'], patient_id=list('aabbc'), has_x=[1, None, 0, None, 0], prob_x=[.1, .9, .2, .3, .4]))
    out = to_studies(d, ['x'], ['has_x'])
    assert out['has_x'].to_list() == [1, None, 0] and out['prob_x'].to_list() == [.9, .3, .4] and out['images'].to_list() == [2, 2, 1]


@given(st.integers(0, 10_000), st.floats(.01, 1))
@hyp(max_examples=80, deadline=None)
def test_threshold_reaches_its_sensitivity_and_no_higher_one_does(seed, target):
    rng = np.random.default_rng(seed)
    y, p = np.r_[1, rng.integers(0, 2, 30)], rng.random(31).round(2)
    t = threshold_for_sensitivity(y, p, target)
    sens = lambda c: (p[y == 1] >= c).mean()
    assert sens(t) >= target-1e-9
    assert all(sens(c) < target for c in np.unique(p) if c > t)


def test_youden_is_the_best_cut():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    p = np.clip(.3*y + rng.random(200)*.6, 0, 1)
    j = lambda c: (p[y == 1] >= c).mean() - (p[y == 0] >= c).mean()
    assert j(youden(y, p)) == pytest.approx(max(map(j, np.unique(p))))
    assert youden([1, 1], [.3, .4], .7) == .7 and threshold_for_sensitivity([0], [.2], default=.4) == .4


# Levels, sampling, reports

def rows(n=40, seed=0):
    d = cohort(n, 4, seed)
    return d.with_columns(laterality=pl.Series(['L', 'L', 'R', 'R']*n), has_z=1-pl.col('has_x'), prob_z=1-pl.col('prob_x'))


def test_breasts_are_study_and_side():
    d = pl.DataFrame(dict(study_id=list('sssst'), patient_id=list('aaaab'), laterality=['L', 'L', 'R', None, 'B'], has_x=[0, 1, 0, 1, 1],
                          prob_x=[.1, .8, .3, .9, .9]))
    b = to_breasts(d, ['x'], ['has_x'])
    assert b.select('study_id', 'laterality', 'has_x', 'prob_x', 'images').rows() == [('s', 'L', 1, .8, 2), ('s', 'R', 0, .3, 1)]
    rep = score_report(rows(), ['x', 'z'], ['has_x', 'has_z'], [.5, .5], n=50)
    assert [rep[k]['n'] for k in ('image', 'breast', 'study')] == [160, 80, 40]
    assert 'breast' not in score_report(rows().drop('laterality'), ['x'], ['has_x'], [.5], n=20)


def test_the_report_has_every_score_with_an_interval_at_every_level():
    rep = score_report(rows(), ['x', 'z'], ['has_x', 'has_z'], [.5, .5], n=200, prevalence=dict(x=.02))
    for level in ('image', 'breast', 'study'):
        for name in 'xz':
            f = rep[level]['findings'][name]
            assert set(SCORES) - {k for k, v in f.items() if isinstance(v, dict)} == (set() if name == 'x' else {'ppv_at', 'npv_at'})
            for k, v in f.items():
                if isinstance(v, dict) and v['value'] is not None: assert v['low'] <= v['value'] <= v['high'], (level, name, k)
    assert rep['image']['findings']['x']['ppv_at']['value'] < rep['image']['findings']['x']['ppv']['value']


def test_a_report_of_a_hundred_images_is_quick():
    t = perf_counter()
    score_report(rows(25), ['x', 'z'], ['has_x', 'has_z'], [.5, .5], n=1000)
    assert perf_counter()-t < 4


def test_many_patients_do_not_cost_a_quadratic_jackknife():
    t = perf_counter()
    bootstrap_ci(scores_of, cohort(20_000, 2), n=20)
    assert perf_counter()-t < 20


def test_predictive_values_at_another_prevalence():
    assert predictive_values(.9, .9, .5)[0] == pytest.approx(.9) and predictive_values(.9, .9, .01)[0] == pytest.approx(.0833, abs=1e-4)
    d = pl.DataFrame(dict(patient_id=range(40), study_id=range(40), has_x=[1.]*20+[0.]*20, prob_x=[.9]*20+[.1]*20))
    f = score_report(d, ['x'], ['has_x'], [.5], n=100, prevalence=.01)['image']['findings']['x']
    assert f['ppv_at']['value'] == 1 and f['ppv_at']['low'] < .1, 'twenty clear negatives say little about a PPV among a hundred times as many'
    assert f['npv_at']['low'] > .99


def test_two_patients_are_not_a_sample():
    d = pl.DataFrame(dict(patient_id=list('aabb')+[str(i) for i in range(30)], study_id=range(34), has_x=[1.]*4+[0.]*30,
                          prob_x=[.9, .9, .9, .1]+[.1]*29+[.8]))
    s = score_report(d, ['x'], ['has_x'], [.5], n=300)['image']['findings']['x']['sensitivity']
    assert s['low'] < .2 and s['high'] > .95


def test_chosen_labels_are_marked():
    d = rows()
    held, chosen = (d.with_columns(split=pl.lit(s)) for s in ('hold_out', 'train'))
    assert sampling_of(held) == 'random' and sampling_of(chosen) == 'active' == sampling_of(pl.concat([held, chosen]))
    sl = chosen.with_columns(slice=pl.Series(['random', 'uncertain']*80))
    assert sampling_of(sl) == 'active' and sampling_of(sl.filter(pl.col('slice') == 'random')) == 'random'
    assert sampling_of(sl.with_columns(slice=pl.lit(None, pl.String))) == 'active', 'nobody knows how it was drawn'
    good, bad = (score_report(x, ['x'], ['has_x'], [.5], n=20) for x in (held, chosen))
    assert good['sampling'] == 'random' and 'unbiased' in good['note'] and bad['sampling'] == 'active' and 'not an estimate' in bad['note']
    for level in ('image', 'breast', 'study'):
        assert '*' not in str(score_table(good, level).rows()) and all(v.endswith('*') for v in score_table(bad, level).rows()[0][3:])
    assert score_report(chosen, ['x'], ['has_x'], [.5], n=20, sampling='random')['sampling'] == 'random'
    assert set(SCORES) - {'ppv_at', 'npv_at'} <= set(score_table(good, scores='all').columns)


def test_calibration_curve_and_figure():
    rng = np.random.default_rng(0)
    p = rng.random(4000)
    y = (rng.random(4000) < p).astype(float)
    c = calibration_curve_of(np.r_[y, np.nan], np.r_[p, .5])
    assert c['n'].sum() == 4000 and np.abs(c['predicted']-c['observed']).max() < .08
    assert ((c['low'] <= c['predicted']) & (c['predicted'] <= c['high'])).sum() >= 8
    d = pl.DataFrame(dict(has_x=y, has_z=[None]*4000, prob_x=p, prob_z=p))
    png = plot_calibration(d, ['x', 'z'], ['has_x', 'has_z'], ['a', 'b'])._repr_png_()
    assert png[:4] == b'\x89PNG' and len(png) < 150_000
