"""How often the 95 % intervals hold the truth: simulated studies of clustered patients, every score, several sizes. Three minutes on one core.

    python tests/benchmarks/coverage.py [--studies 1000] [--resamples 500] [--patients 60 100 200]
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_scores import coverage  # noqa: E402

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--studies', type=int, default=1000)
    a.add_argument('--resamples', type=int, default=500)
    a.add_argument('--patients', type=int, nargs='+', default=[60, 100, 200])
    a.add_argument('--seed', type=int, default=1)
    a = a.parse_args()
    got = {n: coverage(a.studies, n, a.resamples, a.seed) for n in a.patients}
    print(f"{'patients':18}" + ''.join(f'{n:>8}' for n in got))
    for k in next(iter(got.values())): print(f'{k:18}' + ''.join(f'{100*v[k]:8.1f}' for v in got.values()))
