"Scores, intervals and thresholds: against scikit-learn, against simulation, and where a class is missing."
from time import perf_counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, recall_score, roc_auc_score

from mammo_nb.metrics.scores import (all_scores, binary_scores, bootstrap_ci, exact_interval, patient_weights, score_report, score_table, to_studies,
                                     weighted_scores)
from mammo_nb.metrics.thresholds import threshold_for_sensitivity, youden

SCORES = ('sensitivity', 'specificity', 'accuracy', 'balanced_accuracy', 'roc_auc', 'brier')


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
    s = binary_scores(y, p, .5)
    ref = dict(sensitivity=recall_score(y, p >= .5), specificity=recall_score(y, p >= .5, pos_label=0), accuracy=accuracy_score(y, p >= .5),
               balanced_accuracy=balanced_accuracy_score(y, p >= .5), roc_auc=roc_auc_score(y, p), brier=brier_score_loss(y, p))
    w = weighted_scores(y, p, .5, np.ones((1, n+2)))
    for k in SCORES: assert s[k] == pytest.approx(ref[k], abs=1e-12) and w[k][0] == pytest.approx(ref[k], abs=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 30))
@hyp(max_examples=40, deadline=None)
def test_weights_mean_repetition(seed, n):
    rng = np.random.default_rng(seed)
    y, p, w = np.r_[0, 1, rng.integers(0, 2, n)], rng.random(n+2).round(1), rng.integers(1, 4, n+2)
    rep = binary_scores(np.repeat(y, w), np.repeat(p, w), .5)
    got = weighted_scores(y, p, .5, w[None])
    for k in SCORES: assert got[k][0] == pytest.approx(rep[k], abs=1e-9)


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


def test_coverage():
    "about 95 % of the intervals hold the truth (a small simulation; wide limits)"
    truth, hit = binary_scores(*cohort(20_000, 4, 99).select('has_x', 'prob_x').to_numpy().T)['accuracy'], 0
    for k in range(150):
        _, lo, hi = bootstrap_ci(scores_of, cohort(60, 4, k), n=300, seed=k)['accuracy']
        hit += lo <= truth <= hi
    assert .88 <= hit/150 <= .995


def test_perfection_on_ten_patients_is_not_certainty():
    d = pl.DataFrame(dict(patient_id=range(20), study_id=range(20), has_x=[1.]*10+[0.]*10, prob_x=[.9]*10+[.1]*10))
    s = score_report(d, ['x'], ['has_x'], [.5])['image']['findings']['x']
    assert s['sensitivity']['value'] == 1 and s['sensitivity']['low'] == pytest.approx(exact_interval(10, 10)[0], abs=1e-5) and s['sensitivity']['low'] < .75
    assert s['roc_auc']['low'] < .75


def test_mean_accuracy_and_exact_match():
    y, p = np.array([[0, 1], [1, 0], [0, np.nan], [1, 1]]), np.array([[.1, .9], [.8, .7], [.6, .2], [.9, .7]])
    s = all_scores(y, p, [.5, .5], ['a', 'b'])
    assert s['accuracy'] == pytest.approx((3/4 + 2/3)/2) and s['exact_match'] == pytest.approx(2/3)
    d = pl.DataFrame(dict(patient_id=range(4), study_id=range(4), ya=y[:, 0], yb=y[:, 1], prob_a=p[:, 0], prob_b=p[:, 1]))
    rep = score_report(d, ['a', 'b'], ['ya', 'yb'], [.5, .5], n=20)
    assert rep['image']['accuracy']['value'] == pytest.approx(s['accuracy'], abs=1e-6) and rep['image']['exact_match']['value'] == pytest.approx(2/3, abs=1e-6)


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
