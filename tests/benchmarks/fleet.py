"""The fleet's charts on simulated fleets: how often a drifting scanner is found, how often chance raises an alarm, and what simpler ways would have done.

    python tests/benchmarks/fleet.py --table           makes mammo_nb/edge/static/cusum.csv (some minutes)
    python tests/benchmarks/fleet.py --save            1,000 fleets of each kind, to nbs/data/edge/fleet.json
    python tests/benchmarks/fleet.py --possible --save what charts of studies could find at all (a minute), to the same file
"""
import argparse
import json
from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import ndtri
from scipy.stats import norm

from mammo_nb.edge import fleet

ROOT = Path(__file__).resolve().parents[2]
BASELINES = 30, 50, 75, 100, 150, 200, 300, 500
CHANCES = .1, .05, .02, .01, .005, .002, .001, .0005, .0002, .0001, .00005, .00002, .00001
SCANNERS, FEATURES = 10, tuple(fleet.FEATURES)


def make_table(charts=1_000_000, seed=7):
    "Heights by baseline and chance, a line each"
    lines = [f'# CUSUM heights by simulation: {charts:,} charts per baseline, {4*charts:,} periods of {fleet.PERIOD} scans that could raise a first alarm; seed {seed}',
             'baseline,chance,height']
    for n in BASELINES:
        peaks = fleet.simulated_peaks(n, charts, seed=seed + n)
        grid = np.r_[np.arange(3, 20, .1), np.arange(20, 90, .5)]
        chance = np.array([fleet.chance_of(peaks, h) for h in grid])
        some = chance > 3/(4*charts)
        x, y = np.maximum.accumulate(np.log(chance[some])[::-1]), grid[some][::-1]
        lines += [f'{n},{c:.5f},{np.interp(np.log(c), x, y):.3f}' for c in CHANCES]
        print(lines[-6], flush=True)
    (ROOT/'mammo_nb'/'edge'/'static'/fleet.HEIGHTS).write_text('\n'.join(lines) + '\n')


# --- fleets

def scores(rng, n, kind, study):
    "[n, features], mean 0 and SD 1, as pictures of one scanner vary"
    p = len(FEATURES)
    if kind == 'studies':   # four views of a woman resemble each other
        return np.sqrt(.4)*rng.normal(size=(n, p))[study] + np.sqrt(.6)*rng.normal(size=(n, p))
    if kind == 'together':   # features that go together: three causes behind all of them
        load = rng.normal(size=(3, p))
        load *= .7/np.linalg.norm(load, axis=0)
        return rng.normal(size=(n, 3)) @ load + np.sqrt(1 - .49)*rng.normal(size=(n, p))
    x = rng.normal(size=(n, p))
    if kind == 'skewed':   # a third lognormal, a third heavy-tailed, a third in few steps
        x[:, ::3] = (np.exp(.8*x[:, ::3]) - np.exp(.32))/np.sqrt((np.exp(.64) - 1)*np.exp(.64))
        t = rng.standard_t(4, size=x[:, 1::3].shape)/np.sqrt(2)
        x[:, 1::3], x[:, 2::3] = t, np.round(x[:, 2::3])/np.sqrt(1 + 1/12)
    return x


def made_fleet(seed, kind='plain', baseline=200, watched=50, shift=None, size=1.):
    "A fleet whose scanners legitimately differ, and what was shifted in it after the baseline: (table, scanner, feature)"
    rng, n, rows = np.random.default_rng(seed), baseline + watched, []
    bad, what = int(rng.integers(SCANNERS)), int(rng.integers(len(FEATURES)))
    for k in range(SCANNERS):
        study = np.arange(n)//4 if kind == 'studies' else np.arange(n)
        x = scores(rng, n, kind, study)
        if size and shift is not None and k == bad: x[baseline + shift:, what] += size*rng.choice([-1, 1])
        x = x*np.exp(.3*rng.normal(size=len(FEATURES))) + 3*rng.normal(size=len(FEATURES))
        rows.append(pl.DataFrame(dict(scanner=np.full(n, f's{k}'), study_id=[f'{k}-{s}' for s in study])).hstack(pl.from_numpy(x, list(FEATURES))))
    return pl.concat(rows), f's{bad}', FEATURES[what]


def rate(k, n): return dict(share=round(k/n, 4), of=n, low=round(max(0, k/n - 1.96*np.sqrt(max(k/n*(1 - k/n), .25/n)/n)), 4), high=round(min(1, k/n + 1.96*np.sqrt(max(k/n*(1 - k/n), .25/n)/n)), 4))


def found(fleets, kind='plain', baseline=200, size=1., first=0, silent=0, within=50):
    "Fleets with a shift: found within so many scans at the right scanner and feature; named first; scans until noticed; alarms elsewhere"
    hit = named = wrong = 0
    after = []
    for i in range(fleets):
        df, s, f = made_fleet(first + i, kind, baseline, silent + within, silent, size)
        a = fleet.watch(df, baseline).alarms
        right = a.filter(scanner=s, feature=f).filter(pl.col('alarm_at') >= baseline + silent)
        hit += len(right) > 0
        named += len(a) > 0 and a['scanner'][0] == s and a['feature'][0] == f
        wrong += len(a) > len(a.filter(scanner=s))
        if len(right): after.append(right['alarm_at'][0] - baseline - silent + 1)
    return dict(found=rate(hit, fleets), named_first=rate(named, fleets), alarms_at_other_scanners=rate(wrong, fleets), median_scans=float(np.median(after)) if after else None)


def silent_fleets(fleets, kind='plain', baseline=200, periods=1, first=10**6):
    "Fleets without a shift that raise their first alarm in each period of fifty scans"
    counts, left = np.zeros(periods, int), np.zeros(periods, int)
    for i in range(fleets):
        a = fleet.watch(made_fleet(first + i, kind, baseline, 50*periods)[0], baseline).alarms
        at = (int(a['alarm_at'].min()) - baseline)//50 if len(a) else periods
        left[:at + 1] += 1
        if len(a): counts[at] += 1
    return [rate(int(c), int(n)) for c, n in zip(counts, left)]


# --- what is possible in studies of four that resemble each other

def study_charts(n, rng, shift=0., alike=.4, per=4, baseline=200, watched=104):
    "Highest points of single charts as `watch` makes them, alikeness known: in the first twelve studies and in the next"
    def values(k): return (np.sqrt(alike)*rng.standard_normal((n, k//per, 1)) + np.sqrt(1 - alike)*rng.standard_normal((n, k//per, per))).reshape(n, k)
    b, x, own = np.sort(values(baseline), 1), values(watched) + shift, np.arange(n)[:, None]*100.
    rank = np.searchsorted((b + own).ravel(), (x + own).ravel()).reshape(x.shape) - np.arange(n)[:, None]*baseline
    up, down = fleet.cusum(ndtri((rank + .5)/(baseline + 1)).reshape(n, watched//per, per).mean(2), per/(1 + (per - 1)*alike))
    both = np.maximum(up, down)
    return both[:, :12].max(1), both[:, 12:24].max(1), up[:, :12].max(1)


def possible(seed=5, alike=.4, charts=200_000, baseline=200, asked=.05):
    """Twelve studies (48 scans) after a shift of one SD: the best test there is, which is told when the shift began and looks once, at the end, at the mean of all scans
    (most powerful by Neyman and Pearson, so no chart of whatever kind finds more); and single charts by their height"""
    each, total, rng = 1 + 3*alike, SCANNERS*len(FEATURES), np.random.default_rng(seed)
    z = norm.isf((1 - (1 - asked)**(1/total))/2)
    best = lambda n, of: round(float(norm.sf(z - 1/np.sqrt(of/n + of/baseline))), 3)
    silent = [study_charts(5000, rng, alike=alike) for _ in range(charts//5000)]
    first, later = (np.concatenate([s[k] for s in silent]) for k in (0, 1))
    hit = np.concatenate([study_charts(5000, rng, 1., alike)[2] for _ in range(4)])
    fleets = lambda p: round(float(1 - (1 - p)**total), 4)
    now = fleet.height(baseline/each, total, asked, each)
    table = [dict(height=round(float(h), 1), found=round(float((hit >= h).mean()), 3), false_alarms_first=fleets((first >= h).mean()), false_alarms_later=fleets(((later >= h) & (first < h)).mean()/(first < h).mean()))
             for h in (now, *np.arange(9, 14, .5))]
    return dict(scans=48, worth=round(48/each, 1), best_test=best(48, each), best_test_of_independent_scans=best(48, 1), charts=charts, now=table[0], by_height=table[1:])


# --- simpler ways, on the last fifty scans of each scanner

def robust_z(df):
    "largest |z| of scanner means over scanners, and whose it is"
    m = df.group_by('scanner', maintain_order=True).agg(pl.col(FEATURES).mean())
    x = m.select(FEATURES).to_numpy()
    z = np.abs(x - np.median(x, 0))/(1.4826*np.median(np.abs(x - np.median(x, 0)), 0))
    i, j = np.unravel_index(z.argmax(), z.shape)
    return float(z[i, j]), m['scanner'][int(i)]


def kmeans(df, k=4):
    "largest chi-square of a scanner's share of the clusters, and whose it is"
    from sklearn.cluster import KMeans
    x = df.select(FEATURES).to_numpy()
    g = KMeans(k, n_init=2, random_state=0).fit_predict((x - x.mean(0))/x.std(0))
    names = df['scanner'].unique(maintain_order=True).to_list()
    n = np.array([np.bincount(g[(df['scanner'] == s).to_numpy()], minlength=k) for s in names])
    e = n.sum(0)/len(names)
    c = ((n - e)**2/e).sum(1)
    return float(c.max()), names[int(c.argmax())]


def simpler(fleets, way, limit=None, alike=True):
    "Found and false alarms of a way that knows no baseline; scanners alike, since it would find their differences"
    def last(seed, shift):
        rng, df = np.random.default_rng(seed), []
        bad, what = int(rng.integers(SCANNERS)), FEATURES[int(rng.integers(len(FEATURES)))]
        x = rng.normal(size=(SCANNERS*50, len(FEATURES)))
        df = pl.from_numpy(x, list(FEATURES)).with_columns(scanner=pl.Series(np.repeat([f's{k}' for k in range(SCANNERS)], 50)))
        return df.with_columns(pl.col(what) + shift*(pl.col('scanner') == f's{bad}')), f's{bad}'
    null = np.array([way(last(10**6 + i, 0)[0])[0] for i in range(fleets)])
    limit = limit or float(np.quantile(null, .95))
    hits = sum((v := way(df))[0] > limit and v[1] == s for df, s in (last(i, 1.) for i in range(fleets)))
    return dict(found=rate(hits, fleets), false_alarms=rate(int((null > limit).sum()), fleets))


def campaign(fleets, quick=False):
    out = dict(scanners=SCANNERS, features=len(FEATURES), charts=SCANNERS*len(FEATURES), baseline=200, period=50, false_alarms_asked=.05)
    kinds = ('plain', 'skewed', 'together', 'studies')
    out['found'] = {k: found(fleets, k) for k in kinds}
    out['false_alarms'] = {k: silent_fleets(fleets, k)[0] for k in kinds}
    if quick: return out
    out['found_after_200_silent_scans'] = found(fleets, silent=200)
    out['false_alarms_by_period'] = silent_fleets(fleets, periods=5, first=2*10**6)
    out['found_in_studies_within'] = {str(n): found(fleets, 'studies', within=n) for n in (100, 150, 200)}
    out['found_by_size'] = {str(s): found(fleets, size=s) for s in (.5, .75, 1.5, 2.)}
    out['found_by_baseline'] = {str(n): found(fleets, baseline=n) for n in (50, 100, 400)}
    out['false_alarms_by_baseline'] = {str(n): silent_fleets(fleets, baseline=n)[0] for n in (50, 100, 400)}
    out['simpler'] = dict(robust_z_over_scanners=simpler(fleets, robust_z, 3.5), robust_z_over_scanners_at_5_percent=simpler(fleets, robust_z), k_means_at_5_percent=simpler(min(fleets, 300), kmeans))
    return out


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--table', action='store_true')
    a.add_argument('--save', action='store_true')
    a.add_argument('--fleets', type=int, default=1000)
    a.add_argument('--quick', action='store_true')
    a.add_argument('--possible', action='store_true')
    a = a.parse_args()
    if a.table: make_table()
    else:
        path = ROOT/'nbs'/'data'/'edge'/'fleet.json'
        known = json.loads(path.read_text()) if path.exists() else {}
        out = known | dict(possible_in_studies=possible()) if a.possible else {k: v for k, v in known.items() if k == 'possible_in_studies'} | campaign(a.fleets, a.quick)
        print(json.dumps(out['possible_in_studies'] if a.possible else out, indent=1))
        if a.save:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(out, indent=1) + '\n')
