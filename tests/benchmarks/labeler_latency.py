"""How fast the labeler feels: key to painted picture over 300 keys at 10 per second, 1024-pixel images, with the ring of decoded
pictures and, for comparison, with every picture fetched through the kernel; and key to acknowledged label.

    python tests/benchmarks/labeler_latency.py [--keys 300] [--rate 10]
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from labeler_page import ARGS, CHROMIUM, Page, Server, labeler_cell, make_cohort, marked_image, missing  # noqa: E402

MEASURE = '''() => {
  const root = [...document.querySelectorAll(".mm-root")].at(-1), m = window.mmTimes = { painted: [], acked: [] }, down = new Map();
  let last = null;
  root.addEventListener("keydown", (e) => { last = e.timeStamp; down.set(+root.dataset.seq, e.timeStamp); });
  root.addEventListener("mammo:painted", (e) => { if (last !== null) m.painted.push(e.detail.time - last); last = null; });
  root.addEventListener("mammo:acked", (e) => { for (const [, seq] of e.detail.acks) if (down.has(seq)) m.acked.push(e.detail.time - down.get(seq)); });
}'''


def picture(n, rows, cols, noise={}):
    "As hard to compress as a mammogram: a breast's outline over sensor noise; 16 different ones, numbered"
    if n % 16 not in noise:
        rng = np.random.default_rng(n % 16)
        y, x = np.mgrid[:rows, :cols]
        breast = (x / cols) ** 2 + ((y - rows/2) / (rows*.45)) ** 2 < .8
        noise[n % 16] = np.where(breast, np.clip(120 + rng.normal(0, 6, (rows, cols)), 0, 255), 0).astype(np.uint8)
    return marked_image(n, rows, cols, noise[n % 16])


def run(server, browser, folder, name, keys, rate, **ring):
    "Milliseconds (painted, acked) of `keys` presses"
    cohort = make_cohort(folder/name, n=keys + 40, rows=1024, cols=820, image=picture)
    server.notebook(name, labeler_cell(cohort, **ring))
    p = Page(browser.new_page(viewport=dict(width=1280, height=900))).open(server.url(name)).run(0).state('ready').focus()
    p.page.evaluate(MEASURE)
    p.page.wait_for_timeout(1000)
    due = time.monotonic()
    for k in range(keys):
        time.sleep(max(0, due - time.monotonic()))
        if ring.get('ahead') == 0: p.state('ready')   # a round trip may take longer than the beat
        p.page.keyboard.press('1234'[k % 4])
        due = max(due + 1/rate, time.monotonic() - 1/rate)
    p.state('ready').saved()
    times, refused = p.page.evaluate('() => window.mmTimes'), int(p.data('refused') or 0)
    p.page.evaluate('() => window.jupyterapp.serviceManager.sessions.shutdownAll()')
    p.page.close()
    return times['painted'], times['acked'], refused


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--keys', type=int, default=300)
    a.add_argument('--rate', type=float, default=10)
    a = a.parse_args()
    if missing(): sys.exit(f'cannot run: {missing()}')
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as d, sync_playwright() as p:
        server = Server(Path(d)/'server')
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            got = {n: run(server, browser, Path(d), n, a.keys, a.rate, **r) for n, r in (('ring', {}), ('roundtrip', dict(ahead=0, behind=0)))}
        finally:
            browser.close()
            server.stop()
    show = lambda ms: f'median {np.median(ms):6.1f} ms   p95 {np.percentile(ms, 95):6.1f} ms   ({len(ms)} keys)'
    for n, text in (('ring', 'key to painted, ring of decoded pictures '), ('roundtrip', 'key to painted, round trip per picture   ')):
        print(text, show(got[n][0]), f'{got[n][2]} refused')
    print('key to acknowledged label                ', show(got['ring'][1]))
    ring, trip = (np.percentile(got[n][0], 95) for n in ('ring', 'roundtrip'))
    print(f'ring p95 {"is" if ring <= 25 else "is NOT"} at most 25 ms and {"at most" if ring <= trip/2 else "NOT at most"} half of the round trip ({ring/trip:.2f})')


if __name__ == '__main__': main()
