"The viewer of edge/00_inspect in a real browser: the page's own file, with the kernel's answers from this process."
import base64

import cv2
import numpy as np
import pytest
from labeler_page import ARGS, CHROMIUM, missing

import dicom_files as df
from mammo_nb.edge.inspect import Viewer

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or 'runs')

PAGE = '''async (source) => {
  const heard = [], model = { get: (k) => window.count, on: (_, f) => heard.push(f), off: () => {},
    send: (msg) => window.asked(msg).then((r) => r && heard.forEach((f) => f(r[0], r[1].map((b) => Uint8Array.from(atob(b), (c) => c.charCodeAt(0)))))) };
  const module = await import("data:text/javascript;base64," + source);
  module.default.render({ model, el: document.body });
}'''


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    from playwright.sync_api import sync_playwright
    d, items = tmp_path_factory.mktemp('files'), []
    for k in range(3):
        (d/f'{k}.dcm').write_bytes(df.make(df.tissue(60, 40 + 4*k), df.LOSSLESS[0], bits=12))
        items.append(dict(path=str(d/f'{k}.dcm'), source=str(d/'0.dcm'), title=f'<b>image {k}</b>', facts=['passed: read'], problem='was put aside' if k == 2 else ''))
    viewer, silent = Viewer(items), []
    def asked(msg):
        if silent: return None
        got = []
        viewer.send = lambda said, png: got.append((said, [base64.b64encode(b).decode() for b in png]))
        viewer._asked(None, msg, [])
        return got[0]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page()
        page.silent, page.errors = silent, []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        page.expose_function('asked', asked)
        page.evaluate('window.count = 3')
        page.evaluate(PAGE, base64.b64encode(Viewer._esm.encode()).decode())
        page.wait_for_selector('[data-at="0"][data-kind="out"]')
        page.locator('[role=application]').focus()
        yield page
        browser.close()


def press(page, key, at, kind='out'):
    page.keyboard.press(key)
    page.wait_for_selector(f'[data-at="{at}"][data-kind="{kind}"]', timeout=5000)


def test_keys_turn_the_pages_and_the_picture_is_the_files(page):
    for key, at in (('ArrowRight', 1), ('n', 2), ('ArrowLeft', 1), ('p', 0)):
        press(page, key, at)
        page.wait_for_function(f'document.querySelector("img").naturalWidth === {40 + 4*at}')
    press(page, 'f', 2)
    assert 'was put aside' in page.inner_text('body') and '3 of 3' in page.inner_text('body')
    press(page, 'b', 2, 'source')
    page.wait_for_function('document.querySelector("img").naturalWidth === 40')
    press(page, 't', 2, 'tissue')
    press(page, 't', 2)
    press(page, 'ArrowLeft', 1)
    press(page, 'ArrowLeft', 0)
    assert not page.errors


def test_what_files_say_is_text_and_no_markup(page):
    assert '<b>image' in page.inner_text('body') and not page.locator('b').count()


def test_a_lost_answer_does_not_hold_up_the_viewer(page):
    page.evaluate('window.real = Date.now')
    page.silent.append(1)
    page.keyboard.press('ArrowRight')
    page.silent.clear()
    page.evaluate('Date.now = () => window.real.call(Date) + 6000')
    press(page, 'ArrowRight', 1)
    page.evaluate('Date.now = window.real')


def test_a_picture_of_it(page, tmp_path):
    page.locator('[role=application]').screenshot(path=tmp_path/'viewer.png')
    img = cv2.imread(str(tmp_path/'viewer.png'))
    assert img.std() > 10 and np.unique(img).size > 50
