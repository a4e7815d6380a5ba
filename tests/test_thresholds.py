"Thresholds: every method keeps its promise, says what it cannot know, and never sees another split's rows."
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from scipy.special import expit

from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.metrics.scores import to_studies
from mammo_nb.metrics.thresholds import (choose_thresholds, fit_size, plot_inflation, plot_reading_load, reading_load, size_table, study_threshold,
                                         temperature_of, threshold_for_budget, triage)

S = load_settings()


def with_(**kw): return S.model_copy(update=dict(thresholds=S.thresholds.model_copy(update=kw)))


def images(studies=300, seed=0, prevalence=.25, effect=3., alike=.3, sizes=(2, 4, 4, 4, 8)):
    "validation images; a positive study shows the finding on at most two images"
    rng = np.random.default_rng(seed)
    n = rng.choice(sizes, studies)
    sid = np.repeat(np.arange(studies), n)
    first = np.arange(len(sid)) - np.repeat(np.cumsum(n)-n, n) < 2
    y = ((rng.random(studies) < prevalence)[sid] & first).astype(float)
    z = -2.5 + effect*y + np.sqrt(alike)*rng.normal(size=studies)[sid] + np.sqrt(1-alike)*rng.normal(size=len(sid))
    p = expit(z).astype(np.float32)
    return pl.DataFrame(dict(image_id=np.arange(len(sid)), study_id=sid, patient_id=sid, split='valid', has_biopsy_tool=y, has_mag_view=1-y,
                             prob_biopsy=p, prob_mag=1-p))


def studies_of(df): return to_studies(df, ['biopsy'], ['has_biopsy_tool'])


def done(df, choice):
    "flags of the studies with a chosen entry, as inference would set them"
    s = studies_of(df)
    return s['prob_biopsy'].to_numpy() >= study_threshold(choice['flag'], s['images'].to_numpy(), choice['size']), s['has_biopsy_tool'].to_numpy()


def test_only_validation_rows():
    df = images(60)
    for split in ('hold_out', 'train', None):
        with pytest.raises(MammoError, match='rows that must not be there'):
            choose_thresholds(pl.concat([df, df.head(1).with_columns(split=pl.lit(split, pl.String))]), S)
    with pytest.raises(MammoError, match='split'): choose_thresholds(df.drop('split'), S)


@given(st.integers(0, 10_000), st.sampled_from([.8, .9, .95, .98, 1.]), st.booleans())
@hyp(max_examples=25, deadline=None)
def test_sensitivity_is_reached_and_no_higher_line_reaches_it(seed, target, aware):
    df = images(150, seed, sizes=(1, 2, 4, 4, 8, 16))
    c = choose_thresholds(df, with_(target=target, min_positives=5, size_aware=aware))['biopsy']
    flags, y = done(df, c)
    assert flags[y == 1].mean() >= target-1e-9 and flags[y == 1].mean() == pytest.approx(c['sensitivity'], abs=1e-6)
    assert flags.mean() == pytest.approx(c['flagged_share'], abs=1e-6)
    if not aware:
        s = studies_of(df)
        p, y = s['prob_biopsy'].to_numpy(), s['has_biopsy_tool'].to_numpy()
        assert all((p[y == 1] >= t).mean() < target for t in np.unique(p) if t > p[p >= c['flag']].min())


def test_a_rounding_error_flips_no_study():
    df = images()
    t = choose_thresholds(df, S)['biopsy']['flag']
    p = studies_of(df)['prob_biopsy'].to_numpy()
    assert np.abs(p-t).min() > 1e-5 and ((p >= t) == (p+1e-6 >= t)).all() and ((p >= t) == (p-1e-6 >= t)).all()


def test_the_other_methods():
    df = images()
    for budget in (.05, .1, .3):
        c = choose_thresholds(df, with_(method='budget', budget=budget))['biopsy']
        assert budget-.01 < c['flagged_share'] <= budget and c['method'] == 'budget'
    y = choose_thresholds(df, with_(method='youden'))['biopsy']
    s = studies_of(df)
    p, lab = s['prob_biopsy'].to_numpy(), s['has_biopsy_tool'].to_numpy()
    assert y['sensitivity']+y['specificity'] == pytest.approx(max((p[lab == 1] >= t).mean() + (p[lab == 0] < t).mean() for t in p), abs=1e-5)
    f = choose_thresholds(df, with_(method='fixed'))['biopsy']
    assert f['flag'] == S.findings[0].threshold and f['method'] == 'fixed' and "own number" in f['note']


def test_budget_as_share_or_count_and_with_ties():
    p = np.r_[np.full(50, .9), np.full(50, .1)]
    assert (p >= threshold_for_budget(p, .2)).sum() == 0, 'fifty equal ones do not fit into twenty'
    assert (p >= threshold_for_budget(p, .5)).sum() == 50 and (p >= threshold_for_budget(p, 1.)).sum() == 100
    q = np.random.default_rng(0).random(1000)
    assert (q >= threshold_for_budget(q, 20)).sum() == 20 and (q >= threshold_for_budget(q, 20, of=100_000)).sum() == 0
    assert (q >= threshold_for_budget(q, 5000, of=100_000)).sum() == 50
    with pytest.raises(MammoError, match='budget'): threshold_for_budget([], .1)


def test_few_positives_fall_back_and_say_so():
    c = choose_thresholds(images(40), S)['biopsy']
    assert c['positives'] < 20 and c['flag'] == .5 and c['method'] == 'fixed' and str(c['positives']) in c['note'] and '20' in c['note']
    for df in (images(20).head(0), images(20).with_columns(prob_biopsy=pl.lit(None, pl.Float32), prob_mag=pl.lit(None, pl.Float32)),
               images(30).with_columns(has_biopsy_tool=pl.lit(float('nan')))):
        for m in ('sensitivity', 'youden', 'budget', 'fixed'):
            c = choose_thresholds(df, with_(method=m, clear=.99, size_aware=True))['biopsy']
            assert c['positives'] == 0 and c['sensitivity'] is None and c['clear'] is None and 0 <= c['flag'] <= 1
            json.dumps(c, allow_nan=False)
    no_negative = choose_thresholds(images(60, prevalence=1.), with_(method='youden'))['biopsy']
    assert no_negative['method'] == 'fixed'


def test_the_note_promises_what_new_studies_will_show():
    "with k of n missed on validation, the next positive is found with chance (n-k)/(n+1), not (n-k)/n"
    rng, seen, n = np.random.default_rng(0), [], 25
    for _ in range(2000):
        x = np.sort(rng.normal(size=n))
        t = x[int(np.floor(.02*n+1e-9))]
        seen.append((rng.normal(size=200) >= t).mean())
    assert np.mean(seen) == pytest.approx(25/26, abs=.003)
    c = choose_thresholds(images(100), S)['biopsy']
    k = round(c['sensitivity']*c['positives'])
    assert f"expect {100*k/(c['positives']+1):.3g} %" in c['note'] and c['sensitivity_low'] < c['sensitivity']


def test_two_lines_make_three_piles():
    df = images(effect=2.)
    c = choose_thresholds(df, with_(method='youden', clear=.98))['biopsy']
    s = studies_of(df)
    pile, y = triage(s['prob_biopsy'], s['images'], c), s['has_biopsy_tool'].to_numpy()
    assert c['clear'] < c['flag'] and set(pile) == {'clear', 'review', 'flag'}
    assert ((pile == 'clear') & (y == 1)).sum() == c['missed_clear'] <= .02*c['positives']
    assert (pile == 'review').mean() == pytest.approx(c['review_share'], abs=1e-6)
    assert triage([.2, np.nan], [4, 0], dict(flag=.1)).tolist() == ['flag', '']
    high = choose_thresholds(df, with_(target=.999, clear=.9))['biopsy']
    assert high['clear'] <= high['flag'], 'the lower line never lies above the upper one'


def test_more_images_flag_more_negatives_and_a_line_that_knows_the_size_does_not():
    sizes = (1, 2, 4, 4, 6, 8, 12, 24)
    train, new = images(800, 1, .15, sizes=sizes), images(20_000, 2, .15, sizes=sizes)
    plain, aware = (choose_thresholds(train, with_(size_aware=a))['biopsy'] for a in (False, True))
    a, b = (size_table(new, 'biopsy', 'has_biopsy_tool', c['flag'], c['size'], bins=(1, 2, 4, 6, 12, 24)) for c in (plain, aware))
    assert a['flagged'][-1] > 5*a['flagged'][0], 'inflation'
    assert b['flagged'].max() < 2.2*b['flagged'].min() and b['flagged'].max()-b['flagged'].min() < .4*(a['flagged'].max()-a['flagged'].min())
    assert min(plain['sensitivity'], aware['sensitivity']) >= .98


@pytest.mark.parametrize('alike,low,high', [(0., .85, 1.), (.95, 0., .2)])
def test_theta_tells_alike_images_from_independent_ones(alike, low, high):
    m = fit_size(images(600, 3, 0., alike=alike, sizes=(1, 2, 4, 8, 16)), 'biopsy', 'has_biopsy_tool')
    assert low <= m.theta <= high


def test_the_size_curve_is_the_size_model():
    df = images(500, 4, sizes=(1, 2, 4, 8, 16, 32))
    c = choose_thresholds(df, with_(size_aware=True, clear=1.))['biopsy']
    m = fit_size(df, 'biopsy', 'has_biopsy_tool')
    n = np.array([1, 2, 4, 8, 16, 32])
    line = m.score(c['flag'], m.usual)
    assert np.allclose(study_threshold(c['flag'], n, c['size']), m.threshold(line, n), atol=2e-5)
    for k in n: assert m.score(m.threshold(line, k), k) == pytest.approx(line, abs=1e-6), 'there and back'
    t = study_threshold(c['flag'], np.arange(1, 400), c['size'])
    assert (np.diff(t) >= 0).all() and 0 < t[0] < c['flag'] < t[-1] < 1
    assert study_threshold(c['flag'], m.usual, c['size']) == pytest.approx(c['flag'], abs=1e-6) and study_threshold(.3, [0, 5]).tolist() == [.3, .3]
    moved = study_threshold(.9, n, c['size'])
    assert (np.diff(moved) > 0).all() and study_threshold(.9, m.usual, c['size']) == pytest.approx(.9, abs=1e-6)
    assert (study_threshold(c['clear'], n, c['size']) <= study_threshold(c['flag'], n, c['size'])).all()
    assert study_threshold(.5, [1, np.e], dict(slope=1., images=1)).tolist() == pytest.approx([.5, expit(1)])
    back = json.loads(json.dumps(c, allow_nan=False))
    assert study_threshold(back['flag'], 7, back['size']) == study_threshold(c['flag'], 7, c['size'])


def test_one_size_cannot_teach_size():
    c = choose_thresholds(images(sizes=(4,)), with_(size_aware=True))['biopsy']
    assert c['size'] is None and 'study size' in c['note'] and c['method'] == 'sensitivity'


def test_how_many_studies_would_i_read():
    s = studies_of(images(1000))
    t = reading_load(s['has_biopsy_tool'], s['prob_biopsy'], 5000, budgets=(100, .1, .5, 1.))
    assert t['read'].to_list() == [100, 500, 2500, 5000] and t['sensitivity'].is_sorted() and t['sensitivity'][-1] == 1
    assert (t['low'] <= t['sensitivity']).all() and (t['sensitivity'] <= t['high']).all()
    for fig in (plot_reading_load(s['has_biopsy_tool'], s['prob_biopsy'], dict(a=.3)), plot_inflation(images(), 'biopsy', 'has_biopsy_tool', .3)):
        assert len(fig._repr_png_()) < 150_000


def literal_loss(z, y, head, t):
    total, n = 0., 0
    for zi, yi in zip(z/t, y):
        p = [1/(1+np.exp(-v)) for v in zi] if head == 'sigmoid' else (np.exp(zi-zi.max())/np.exp(zi-zi.max()).sum())[1:]
        for a, b in zip(yi, p):
            if a == a: total, n = total - (np.log(max(b, 1e-7)) if a else np.log(max(1-b, 1e-7))), n+1
    return total/n


@pytest.mark.parametrize('head', ['sigmoid', 'softmax'])
def test_temperature_has_the_smallest_loss(head):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 4, (120, 2 if head == 'sigmoid' else 3))
    y = (rng.random((120, 2)) < expit(z[:, -2:]/2.5)).astype(float)
    if head == 'softmax':
        e = np.exp(z/2.5)
        k = np.array([rng.choice(3, p=q) for q in e/e.sum(1, keepdims=True)])
        y = np.stack([k == 1, k == 2], 1).astype(float)
    y[:10] = np.nan
    t = temperature_of(z, y, head)
    best = min(np.geomspace(.25, 8, 400), key=lambda v: literal_loss(z, y, head, v))
    assert t == pytest.approx(best, rel=.02)
    assert temperature_of(z[:12], y[:12], head) == 1. and temperature_of(z, np.zeros_like(y), head) == 1.
    assert .25 <= temperature_of(100*z, y, head) <= 8 and .25 <= temperature_of(z.astype(np.float32)/100, y, head) <= 8
