"""Does it stay linear? Folders of headers of 1,000 to 100,000 images (12.5 to a study) through scan, second scan, restart, predictions and studies; and a million
predictions to studies, in time and memory.

    python tests/benchmarks/scale.py [--repeat 3] [--small] [--most 100000] [--save nbs/data/scale.json] [--plot scale.png]

A line's exponent is the slope of log time over log size from 10,000 images on (below, constants rule): 1 is linear, less is a constant that still counts, more would
be a bill that comes due with a large archive. No pixel is decoded here: that part is linear by nature."""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import polars as pl
from headers import STUDY, templates, tree
from mammo_nb.core.settings import load_settings

SIZES, SLOPE = (1_000, 3_000, 10_000, 30_000, 100_000), 1.15


def settings(): return (s := load_settings()).model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=2))))


def timed(fn, repeat, before=lambda: None):
    times = []
    for _ in range(repeat):
        before()
        t = time.perf_counter()
        out = fn()
        times.append(time.perf_counter() - t)
    return statistics.median(times), out


def fill(store, manifest, s):
    "Every image its thumbnail (of 8 x 8 pixels), as a finished preprocess leaves them"
    from mammo_nb.cohort.thumbs import Thumbnails, make_thumbnails
    make_thumbnails(manifest.clear(), '.', store, s)
    t, ids, px = Thumbnails(store), manifest['image_id'].to_list(), np.arange(64, dtype=np.uint8).reshape(8, 8)
    for a in range(0, len(ids), 64): t._write((i, px) for i in ids[a:a + 64])


def answers_of(manifest, s):
    "Made-up probabilities, as `predict` returns them"
    rng, n = np.random.default_rng(0), len(manifest)
    return pl.DataFrame(dict(image_id=manifest['image_id'], failed=pl.Series([None]*n, dtype=pl.String)) | {f'prob_{k}': rng.random(n, np.float32) for k in s.names})


def steps(root, folder, s, client, repeat):
    "Seconds of every step, for the files in `root`"
    from mammo_nb.cohort.files import list_files
    from mammo_nb.cohort.manifest import read_manifest, scan
    from mammo_nb.cohort.thumbs import make_thumbnails
    from mammo_nb.core.engine import read_table, write_parquet
    from mammo_nb.infer import aggregate, with_status, write_csv
    t, fresh = {}, lambda: shutil.rmtree(folder, ignore_errors=True)
    t['listing'], _ = timed(lambda: list_files(root), repeat)
    t['scan'], m = timed(lambda: scan(root, folder, s, client, seed=1), repeat, fresh)
    t['second scan'], again = timed(lambda: scan(root, folder, s, client), repeat)
    assert again.equals(m) and read_manifest(folder).equals(m)
    fill(folder/'thumbnails', m, s)
    def restart():
        df = scan(root, folder, s, client)
        assert not len(make_thumbnails(df, root, folder/'thumbnails', s, client))
    t['preprocess restart'], _ = timed(restart, repeat)
    p, probs = folder/'predictions', answers_of(m, s)
    def predictions():
        out = with_status(m, probs)
        studies = aggregate(out, s)
        write_parquet(out, p/'predictions.parquet', s)
        write_parquet(studies, p/'studies.parquet', s)
        write_csv(studies, p/'studies.csv', s)
    t['predictions, written'], _ = timed(predictions, repeat)
    t['predictions, read'], got = timed(lambda: read_table(p/'predictions.parquet'), repeat)
    t['studies from images'], studies = timed(lambda: aggregate(got, s), repeat)
    assert len(got) == len(m) and studies['image_count'].sum() == len(m)
    fresh()
    return t


def measure(sizes=SIZES, repeat=3, patients=8):
    "`{step: [seconds per size]}`; larger folders hold the smaller ones, behind links"
    from mammo_nb.core.engine import engine
    s, out = settings(), {}
    with tempfile.TemporaryDirectory() as d, engine(s) as client:
        d, made, done = Path(d), templates(True, patients), 0
        for n in sizes:
            tree(d/f'part{n}', n - done, first=done, made=made)
            done = n
            (d/f'{n}').mkdir()
            for k in sizes[:sizes.index(n) + 1]: (d/f'{n}'/f'{k}').symlink_to(d/f'part{k}')
            if n == sizes[0]: steps(d/f'{n}', d/'warm', s, client, 1)
            for k, v in steps(d/f'{n}', d/'cohort', s, client, repeat).items(): out.setdefault(k, []).append(round(v, 4))
    return out


def slope(sizes, seconds, least=10_000):
    "Exponent of the last part of a line"
    use = [i for i, n in enumerate(sizes) if n >= least] if sum(n >= least for n in sizes) > 1 else range(len(sizes))
    return float(np.polyfit(np.log([sizes[i] for i in use]), np.log([seconds[i] for i in use]), 1)[0])


# ------------------------------------------------------------------ a million

_peak = '''
def peak():  # MB; ru_maxrss would count the parent's
    with open('/proc/self/status') as f: return next(int(line.split()[1])/1024 for line in f if line.startswith('VmHWM'))
'''
_million = '''
import sys
import numpy as np, polars as pl
n, folder = int(sys.argv[1]), sys.argv[2]
from mammo_nb.core.settings import load_settings
from mammo_nb.infer import aggregate
s, rng = load_settings(), np.random.default_rng(0)
study = pl.Series(rng.integers(0, int(n/12.5), n)).cast(pl.String)
df = pl.DataFrame(dict(study_id='1.2.840.113.' + study, status=['ok']*n) | {f'prob_{k}': rng.random(n, np.float32) for k in s.names})
df.write_parquet(folder + '/p.parquet')
del study, df
'''
_aggregated = '''
import sys, time
import polars as pl
from mammo_nb.core.settings import load_settings
from mammo_nb.infer import aggregate
s, p = load_settings(), sys.argv[2] + '/p.parquet'
aggregate(pl.scan_parquet(p).head(1000), s)
t = time.perf_counter()
out = aggregate(pl.scan_parquet(p), s)
print(time.perf_counter() - t, peak(), len(out))
'''
_table = '''
import sys, time
import polars as pl
from mammo_nb.core.engine import read_meta, read_table, write_parquet
from mammo_nb.core.settings import load_settings
n, p, step = int(sys.argv[1]), sys.argv[2] + '/m.parquet', sys.argv[3]
t, m0 = time.perf_counter(), peak()
if step == 'write':
    i = pl.int_range(n, eager=True).cast(pl.String)
    uid = lambda k: f'1.2.840.113619.2.{k}.20200131101500.' + i
    df = pl.DataFrame(dict(image_id=i.str.zfill(16), path='site1/p000123/' + i + '.dcm', sop_uid=uid(1), series_uid=uid(2), study_id=uid(3), patient_id=i.str.zfill(16), status=['ok']*n, rows=[3328]*n))
    t, m0 = time.perf_counter(), peak()
    write_parquet(df, p)
elif step == 'read': assert len(read_table(p)) == n
else: assert pl.scan_parquet(p).filter(pl.col('status') == 'ok').select(pl.col('rows').sum(), pl.len()).collect(engine='streaming')['len'][0] == n
print(time.perf_counter() - t, peak(), peak() - m0)
'''


def child(code, *args):
    "Figures that a process of its own prints"
    out = subprocess.run([sys.executable, '-c', _peak + code, *map(str, args)], capture_output=True, text=True, check=True).stdout
    return [float(x) for x in out.split()]


def million(repeat=3, n=1_000_000):
    "Seconds and MB (peak of the whole process) of a million rows"
    with tempfile.TemporaryDirectory() as d:
        child(_million, n, d)
        runs = [child(_aggregated, n, d) for _ in range(repeat)]
        out = dict(rows=n, studies=int(runs[0][2]), aggregate_s=statistics.median(r[0] for r in runs), aggregate_mb=max(r[1] for r in runs))
        for step in ('write', 'read', 'lazy'):
            seconds, peak, more = child(_table, n, d, step)
            out |= {f'{step}_s': seconds, f'{step}_mb': peak, f'{step}_more_mb': more}
    return {k: round(v, 3) for k, v in out.items()}


# ------------------------------------------------------------------ the record

def record(sizes=SIZES, repeat=3, n=1_000_000, patients=8):
    t = measure(sizes, repeat, patients)
    return dict(sizes=list(sizes), images_per_study=STUDY, processes=2, seconds=t, exponents={k: round(slope(sizes, v), 3) for k, v in t.items()}, million=million(repeat, n))


def plot(figures):
    "Time against size, both logarithmic; grey: what linear looks like"
    from mammo_nb.cohort.thumbs import Sheet
    fig = Sheet(figsize=(7.6, 3.8), layout='constrained')
    fig.coloured = True
    ax, sizes = fig.subplots(), np.array(figures['sizes'])
    for at in 10.**np.arange(-8, 1): ax.plot(sizes, sizes*at, color='.9', lw=.7, zorder=0)
    for (k, v), colour in zip(figures['seconds'].items(), ('#777777', '#4477aa', '#66ccee', '#228833', '#ccbb44', '#ee6677', '#aa3377')):
        ax.plot(sizes, v, 'o-', ms=3, lw=1.3, color=colour, label=f"{k} ({figures['exponents'][k]:.2f})")
    low, high = (f(x for v in figures['seconds'].values() for x in v) for f in (min, max))
    ax.set(xscale='log', yscale='log', xlabel='images', ylabel='seconds', ylim=(low/2, high*2))
    ax.set_xticks(sizes, [f'{n:,}' for n in sizes])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter('{x:g}')
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(loc='outside right upper', frameon=False, fontsize=8, title='step (exponent)', title_fontsize=8)
    return fig


def rows(repeat=5, small=False):
    sizes, n = ((100, 300), 20_000) if small else (SIZES, 1_000_000)
    f = record(sizes, 1 if small else min(repeat, 3), n, 2 if small else 8)
    row = lambda work, reference, limit, ours, unit: dict(work=work, reference=reference, reference_value=limit, ours_value=ours, unit=unit, ratio=round(limit/ours, 2), bar=1., ok=ours <= limit)
    out = [row(f'{k}, {sizes[0]:,} to {sizes[-1]:,} images', 'linear (1.0) and a bit', SLOPE, v, 'exponent') for k, v in f['exponents'].items()]
    m = f['million']
    out.append(row(f'second scan of {sizes[-1]:,} unchanged files', 'limit', 10., f['seconds']['second scan'][-1], 's'))
    out.append(row(f"{m['rows']:,} predictions to {m['studies']:,} studies", 'limit', 2., m['aggregate_s'], 's'))
    out.append(row(f"{m['rows']:,} predictions to {m['studies']:,} studies, peak memory of the process", 'limit', 1024., m['aggregate_mb'], 'MB'))
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeat', type=int, default=3)
    a.add_argument('--small', action='store_true')
    a.add_argument('--most', type=int, default=SIZES[-1])
    a.add_argument('--save')
    a.add_argument('--plot')
    a = a.parse_args()
    sizes = (100, 300, 1000) if a.small else tuple(n for n in SIZES if n <= a.most)
    f = record(sizes, a.repeat, 20_000 if a.small else 1_000_000, 2 if a.small else 8)
    pl.Config.set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True).set_tbl_rows(40).set_tbl_width_chars(160).set_fmt_str_lengths(60)
    print(pl.DataFrame([dict(step=k) | {f'{n:,}': x for n, x in zip(sizes, v)} | dict(exponent=f['exponents'][k]) for k, v in f['seconds'].items()]))
    print(f['million'])
    if a.save: Path(a.save).write_text(json.dumps(f, indent=1) + '\n')
    if a.plot: Path(a.plot).write_bytes(plot(f)._repr_png_())


if __name__ == '__main__': main()
