import argparse


def arguments(doc, **numbers):
    "A campaign's command line: numbers by name, `patients=24` or `text=(2000, 'texts burnt in')`, a seed, and whether to keep what comes out"
    p = argparse.ArgumentParser(description=doc)
    for name, default in numbers.items():
        n, say = default if isinstance(default, tuple) else (default, None)
        p.add_argument(f'--{name}', type=int, default=n, help=say)
    p.add_argument('--seed', type=int, default=1)
    p.add_argument('--save', action='store_true', help='below nbs/data')
    return p.parse_args()
