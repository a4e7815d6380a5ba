"Comparing: DeLong against its definition, differences against simulation, subgroups that say when they are small."
from time import perf_counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from scipy.stats import norm

from mammo_nb.core.settings import MammoError
from mammo_nb.metrics.compare import bootstrap_difference, compare_models, delong, plot_subgroups, subgroup_table, subgroups
from mammo_nb.metrics.scores import bootstrap_ci, weighted_scores


def literal_delong(y, p1, p2):
    "DeLong, DeLong & Clarke-Pearson (1988), equations 4 to 8, over all pairs"
    psi = lambda x, z: 1. if x > z else .5 if x == z else 0.
    pos, neg = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    m, n = len(pos), len(neg)
    v10 = [[sum(psi(p[i], p[j]) for j in neg)/n for i in pos] for p in (p1, p2)]
    v01 = [[sum(psi(p[i], p[j]) for i in pos)/m for j in neg] for p in (p1, p2)]
    auc = [sum(v)/m for v in v10]
    s10 = [[sum((v10[r][i]-auc[r])*(v10[s][i]-auc[s]) for i in range(m))/(m-1) for s in (0, 1)] for r in (0, 1)]
    s01 = [[sum((v01[r][j]-auc[r])*(v01[s][j]-auc[s]) for j in range(n))/(n-1) for s in (0, 1)] for r in (0, 1)]
    c = [[s10[r][s]/m + s01[r][s]/n for s in (0, 1)] for r in (0, 1)]
    return auc, max(c[0][0]+c[1][1]-2*c[0][1], 0)**.5, c[0][0]**.5


@given(st.integers(0, 100_000), st.integers(2, 25), st.integers(2, 25), st.sampled_from([1, 16]))
@hyp(max_examples=80, deadline=None)
def test_delong_equals_its_definition(seed, m, n, digits):
    "to 1e-9 on random inputs, with and without ties"
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.r_[np.ones(m), np.zeros(n)])
    p1 = (y + rng.normal(size=m+n)).round(digits)
    p2 = (p1 + rng.normal(size=m+n)).round(digits)
    d, one = delong(y, p1, p2), delong(y, p1)
    auc, se, se1 = literal_delong(y, p1, p2)
    z = norm.ppf(.975)
    assert abs(d['auc']-auc[0]) < 1e-9 and abs(d['auc2']-auc[1]) < 1e-9 and abs(d['difference']-(auc[1]-auc[0])) < 1e-9
    assert abs(d['se']-se) < 1e-9 and abs(one['se']-se1) < 1e-9 and one['auc'] == d['auc']
    assert abs(d['low']-(auc[1]-auc[0]-z*se)) < 1e-9 and abs(d['high']-(auc[1]-auc[0]+z*se)) < 1e-9
    if se > 1e-6: assert abs(d['p'] - 2*norm.sf(abs(auc[1]-auc[0])/se)) < 1e-9
    alone = delong(y, p1, p2, patient=rng.permutation(m+n))
    assert abs(alone['se']-se) < 1e-9, 'a patient per row is independence'


def literal_obuchowski(y, p1, p2, who):
    "Obuchowski (1997), equations for clustered ROC areas, by loops; the standard error of the difference"
    psi = lambda x, z: 1. if x > z else .5 if x == z else 0.
    pos, neg = [i for i in range(len(y)) if y[i] == 1], [i for i in range(len(y)) if y[i] == 0]
    m, n, k = len(pos), len(neg), sorted(set(who))
    c = []
    for p in (p1, p2):
        x = {i: sum(psi(p[i], p[j]) for j in neg)/n for i in pos}
        z = {j: sum(psi(p[i], p[j]) for i in pos)/m for j in neg}
        a = sum(x.values())/m
        c.append([(sum(x[i]-a for i in pos if who[i] == g), sum(z[j]-a for j in neg if who[j] == g)) for g in k])
    i10, i01, i = len({who[v] for v in pos}), len({who[v] for v in neg}), len(k)
    def cov(r, s):
        s10 = i10/((i10-1)*m)*sum(a[0]*b[0] for a, b in zip(c[r], c[s]))
        s01 = i01/((i01-1)*n)*sum(a[1]*b[1] for a, b in zip(c[r], c[s]))
        s11 = [i/(i-1)*sum(a[u]*b[1-u] for a, b in zip(c[r], c[s])) for u in (0, 1)]
        return s10/m + s01/n + sum(s11)/(m*n)
    return max(cov(0, 0)+cov(1, 1)-2*cov(0, 1), 0)**.5


@given(st.integers(0, 100_000), st.integers(4, 12))
@hyp(max_examples=40, deadline=None)
def test_clustered_delong_equals_obuchowski(seed, patients):
    rng = np.random.default_rng(seed)
    who = np.r_[0, 1, 2, 3, rng.integers(0, patients, 30)]
    y = np.r_[0, 1, 0, 1, rng.integers(0, 2, 30)]
    p1 = (y + rng.normal(size=34)).round(1)
    p2 = p1 + rng.normal(size=34)
    assert abs(delong(y, p1, p2, who)['se'] - literal_obuchowski(y, p1, p2, who)) < 1e-9


def pairs(rng, patients=60, gain=0., per=4):
    "two models on clustered images; `gain`: how much better the second one is"
    who = np.repeat(np.arange(patients), per)
    y = ((rng.random(patients) < .4)[who] & (rng.random(len(who)) < .7)).astype(float)
    hard = rng.normal(size=patients)[who] + .5*rng.normal(size=len(who))
    e = lambda: .7*rng.normal(size=patients)[who] + .4*rng.normal(size=len(who))
    return who, y, 1.5*y + hard + e(), (1.5+gain)*y + hard + e()


def test_clustered_delong_keeps_its_level_and_the_plain_one_does_not():
    "two equally good models: 5 % false alarms over 600 studies by patient; many more when images pass for independent"
    rng, wrong = np.random.default_rng(0), dict(plain=0, patient=0)
    for _ in range(600):
        who, y, a, b = pairs(rng)
        wrong['plain'] += delong(y, a, b)['p'] < .05
        wrong['patient'] += delong(y, a, b, who)['p'] < .05
    assert .03 <= wrong['patient']/600 <= .075 and wrong['plain']/600 > .12, wrong


def test_four_copies_of_a_patient_are_one():
    who, y, a, b = pairs(np.random.default_rng(1), 80, per=1)
    four = [np.tile(v, 4) for v in (y, a, b)]
    assert delong(*four, np.tile(who, 4))['se'] == pytest.approx(delong(y, a, b)['se'], rel=.03)
    assert delong(*four)['se'] == pytest.approx(delong(y, a, b)['se']/2, rel=.03)


@pytest.mark.parametrize('y', [[], [0, 0], [1, 1], [np.nan, 1], [0, 1]])
def test_delong_without_enough_of_a_class_is_nan(y):
    p = np.linspace(.1, .9, len(y))
    d = delong(y, p, 1-p)
    assert np.isnan(d['p']) and np.isnan(d['se']) and set(d) == {'auc', 'auc2', 'difference', 'low', 'high', 'se', 'p'}
    assert set(delong(y, p)) == {'auc', 'low', 'high', 'se', 'p'}


def test_delong_is_fast():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 100_000)
    t = perf_counter()
    delong(y, y+rng.normal(size=100_000), y+rng.normal(size=100_000), np.arange(100_000)//4)
    assert perf_counter()-t < 5


def test_bootstrap_difference_is_paired():
    who, y, a, b = pairs(np.random.default_rng(2), 100, .6)
    d = pl.DataFrame(dict(patient_id=who, y=y, a=a, b=b))
    fn = lambda c: lambda e, w: weighted_scores(e['y'], e[c], 1., w)
    diff, one, two = bootstrap_difference(fn('a'), fn('b'), d, n=600), bootstrap_ci(fn('a'), d, n=600), bootstrap_ci(fn('b'), d, n=600)
    for k in ('sensitivity', 'specificity', 'roc_auc', 'brier'):
        v, lo, hi = diff[k]
        assert v == pytest.approx(two[k][0]-one[k][0]) and lo <= v <= hi
    v, lo, hi = diff['roc_auc']
    wide = np.hypot(one['roc_auc'][2]-one['roc_auc'][1], two['roc_auc'][2]-two['roc_auc'][1])
    assert hi-lo < .85*wide, 'what both models share cancels'
    ref = delong(y, a, b, who)
    assert hi-lo == pytest.approx(ref['high']-ref['low'], rel=.2)


def frame(patients=60, seed=0):
    who, y, a, b = pairs(np.random.default_rng(seed), patients, 1.)
    sig = lambda v: 1/(1+np.exp(1-v))
    views = ['L-CC', 'L-MLO', 'R-CC', 'R-MLO']*patients
    d = pl.DataFrame(dict(image_id=np.arange(len(who)), patient_id=who, study_id=who, laterality=[v[0] for v in views], view=views,
                          site=np.where(who < patients-4, 'big', 'tiny'), split='hold_out', has_x=y, prob_x=sig(a)))
    return d, d.select('image_id', prob_x=sig(b))


def test_two_models_side_by_side():
    d, new = frame(100)
    for level in ('image', 'breast', 'study'):
        t = compare_models(d, new.sample(fraction=1., shuffle=True, seed=0), ['x'], ['has_x'], [.5], level=level, n=300)
        auc = t.filter(pl.col('score') == 'roc_auc')
        assert auc['verdict'][0] == 'better' and auc['delong_p'][0] < .05
        assert (t['low'] <= t['difference']).all() and (t['difference'] <= t['high']).all() and np.allclose(t['second']-t['first'], t['difference'])
    back = compare_models(d, d.select('image_id', prob_x=1-pl.col('prob_x')), ['x'], ['has_x'], [.5], level='image', n=300)
    verdict = dict(zip(back['score'], back['verdict']))
    assert verdict['roc_auc'] == 'worse' == verdict['brier'], 'a higher Brier score is worse'
    same = compare_models(d, d, ['x'], ['has_x'], [.5], n=50)
    assert set(same['verdict']) == {'no difference shown'} and (same['high'] == 0).all()
    with pytest.raises(MammoError, match='share no labelled image'):
        compare_models(d, new.with_columns(pl.col('image_id')+10_000), ['x'], ['has_x'], [.5])
    with pytest.raises(MammoError, match='level'): compare_models(d, new, ['x'], ['has_x'], [.5], level='pixel')


def test_too_few_patients_are_not_compared():
    d, new = frame(6)
    t = compare_models(d, new, ['x'], ['has_x'], [.5], n=50)
    assert 'better' not in set(t['verdict']) and 'too few patients to say' in set(t['verdict'])


def test_chosen_labels_are_marked():
    d, new = frame(30)
    t = compare_models(d.with_columns(split=pl.lit('train')), new, ['x'], ['has_x'], [.5], n=20)
    assert set(t['labels']) == {'actively chosen*'}
    g = subgroups(d.with_columns(split=pl.lit('train')), 'site', ['x'], ['has_x'], [.5], n=20)
    assert all('*' in v for v in subgroup_table(g)['specificity'])
    assert not any('*' in v for v in subgroup_table(subgroups(d, 'site', ['x'], ['has_x'], [.5], n=20))['specificity'])


def test_subgroups():
    d, _ = frame(100)
    d = d.with_columns(maker=pl.when(pl.col('patient_id') < 50).then(pl.lit('A')))
    g = subgroups(d, ['site', 'maker', 'view'], ['x'], ['has_x'], [.5], n=100)
    assert g.group_by('by').agg(pl.col('n').sum())['n'].to_list() == [400]*3 and set(g.filter(pl.col('by') == 'maker')['group']) == {'A', 'unknown'}
    tiny = g.filter(pl.col('group') == 'tiny').row(0, named=True)
    assert tiny['patients'] == 4 and tiny['remark'].startswith('small') and g.filter(pl.col('group') == 'big')['remark'][0] == ''
    s = tiny['sensitivity']
    assert s['value'] is None or s['high']-s['low'] > .6
    one = bootstrap_ci(lambda e, w: weighted_scores(e['has_x'], e['prob_x'], .5, w), d.filter(pl.col('site') == 'big'), n=100)
    assert g.filter(pl.col('group') == 'big')['roc_auc'][0]['value'] == pytest.approx(one['roc_auc'][0], abs=1e-6)
    assert subgroups(d, 'site', ['x'], ['has_x'], [.5], level='study', n=50)['n'].sum() == 100
    assert subgroup_table(g).height == g.height and len(plot_subgroups(g)._repr_png_()) < 150_000
    nothing = subgroups(d.with_columns(has_x=pl.lit(None, pl.Float64)), 'site', ['x'], ['has_x'], [.5], n=20)
    assert nothing['roc_auc'][0]['value'] is None
    plot_subgroups(nothing)._repr_png_()
    with pytest.raises(MammoError, match='within a study'): subgroups(d, 'view', ['x'], ['has_x'], [.5], level='study')
    with pytest.raises(MammoError, match='No column planet'): subgroups(d, 'planet', ['x'], ['has_x'], [.5])
