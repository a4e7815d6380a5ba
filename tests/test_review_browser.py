"""The reviewer in a real JupyterLab and a real Chromium. Which pictures are on the screen, and in which order, is read from the page's own pixels."""
import json
import os
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from labeler_page import ROOT, Page, browser, common, events, image_id, lab, labeler_cell, missing, server  # noqa: F401
from review_page import review_cell, review_cohort
from mammo_nb.core.settings import load_settings
from mammo_nb.labels.store import LabelStore

if missing() and os.environ.get('CI'): pytest.fail(f'CI is set, but {missing()}', pytrace=False)
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or 'runs')

# numbers of the pictures in the tiles from left to right, and how the tiles lie
READ_TILES = '''(root) => [...root.querySelectorAll(".mm-caption")].map((t) => {
  const [x0, y0, w, h] = t.dataset.picture.split(" ").map(Number), g = root.querySelector("canvas").getContext("2d"), bit = [], side = w/8;
  for (let k = 0; k < 16; k++) {
    const v = g.getImageData(Math.round(x0 + w/4 + (k%4 + .5)*side), Math.round(y0 + h/2 + (Math.floor(k/4) - 1.5)*side), 1, 1).data[0];
    bit.push(v > 60 && v < 200 ? NaN : v > 128 ? 1 : 0);
  }
  let n = 0;
  for (let k = 0; k < 12; k++) n |= bit[k] << k;
  return { n: bit.some(Number.isNaN) ? null : n, x: x0, y: y0, w, h, text: t.textContent, view: t.querySelector(".mm-line b").textContent, chip: t.querySelector(".mm-chip").textContent,
           chosen: t.classList.contains("mm-chosen") };
})'''


class Review(Page):
    def tiles(self): return self.root.evaluate(READ_TILES)
    def shown(self): return [t['n'] for t in self.tiles()]
    def chosen(self): return next(t['n'] for t in self.tiles() if t['chosen'])
    def words(self, name): return self.root.locator(f'.mm-{name}').inner_text()
    def wait(self, js): self.page.wait_for_function('() => { const root = [...document.querySelectorAll(".mm-root")].at(-1); return ' + js + '; }', timeout=30000); return self
    def press(self, keys):
        "Each key once everything is on the screen"
        for k in keys: self.state('ready', 'done').page.keyboard.press(k)
        return self
    def at(self, x, y, tile=0):
        "Colour at a place of a picture, in fractions of it"
        t = self.tiles()[tile]
        return self.root.evaluate('(root, [x, y]) => [...root.querySelector("canvas").getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3)',
                                  [round(t['x'] + x*t['w']), round(t['y'] + y*t['h'])])


@pytest.fixture
def start(lab):
    "`start(name, cohort)`: a notebook with the reviewer, focused"
    def go(name, cohort, *more, context=None, **kw):
        lab.server.notebook(name, review_cell(cohort, **kw), *more)
        p = Review((context or lab.common).new_page()).open(lab.server.url(name)).run(0).state('ready', 'done', 'readonly')
        p.root.focus()
        assert p.data('focus') == 'yes'
        return p
    return go


def store(c): return LabelStore(c/'labels.sqlite', load_settings(ROOT/'settings.ini'))


def test_agree_correct_undo_and_the_store_holds_what_was_pressed(lab, start):
    c = review_cohort(lab.folder/'demo_a')
    p = start('review', c, 'x = 1', context=lab.context(viewport=dict(width=1700, height=640)))   # wide: pictures are narrower than their places
    before = p.source()
    assert p.words('place') == '1 / 4' and p.words('reason') == 'flagged: Biopsy tool 0.97, Magnification view 0.60' and 'hold-out' in p.words('held')
    tiles = p.tiles()
    assert [t['n'] for t in tiles] == [17, 16, 19, 18] and [t['view'] for t in tiles] == ['R-CC', 'L-CC', 'R-MLO', 'L-MLO']   # files lie L R L R
    assert all(abs(t['w']/t['h'] - 256/320) < .01 for t in tiles) and len({t['y'] for t in tiles}) == 1
    assert tiles[1]['x'] - tiles[0]['x'] - tiles[0]['w'] < 12 and tiles[3]['x'] - tiles[2]['x'] - tiles[2]['w'] < 12   # chest walls side by side
    assert tiles[2]['x'] - tiles[1]['x'] - tiles[1]['w'] > 60
    assert p.chosen() == 17
    p.press('s').press('a')                             # the hold-out study skipped, agreed on the next
    assert p.state('ready').words('place') == '3 / 4' and p.shown() == [5, 4, 7, 6] and p.chosen() == 6
    p.press('3')                                        # the flagged image shows nothing; the next without an answer comes into the frame
    assert p.chosen() == 5 and [t['chip'] for t in p.tiles()] == ['', '', '', 'Neither']
    p.press(['ArrowRight', '1', 'a'])                   # the left CC shows a clip; the rest is as the model says
    assert p.state('ready').words('place') == '4 / 4' and 'borderline: Biopsy tool 0.47, threshold 0.50' == p.words('reason')
    p.press('uu')                                       # the agree, then the 1
    assert p.state('ready').words('place') == '3 / 4' and [t['chip'] for t in p.tiles()] == ['', '', '', 'Neither'] and p.chosen() == 4
    p.press('4a').press('a').state('done').saved()
    assert 'All 4 studies are done' in p.words('big')
    skips, first = [('skip', n) for n in (17, 16, 19, 18)], [(('biopsy',), 1), ((), 0), ((), 3), ((), 2)]
    assert events(c) == [*skips, *first, ((), 6), (('biopsy',), 4), ((), 5), ((), 7), ('undo', 5), ('undo', 7), ('undo', 4), (('biopsy', 'mag'), 4), ((), 5), ((), 7),
                         ((), 9), ((), 8), ((), 11), ((), 10)]
    with store(c) as s:
        assert s._one('SELECT count(*), sum(saw_model), count(DISTINCT queue), min(queue) FROM events') == (22, 22, 1, 'review')
        assert s.labels().filter(image_id=image_id(4)).select('has_biopsy_tool', 'has_mag_view').row(0) == (1, 1) and s.labels().height == 12
    # keys are ours with focus, and the list is written
    for k in ['b', 'd', 'd', 'y', 'm', 'Enter', 'h', 'h', 'Escape']: p.page.keyboard.press(k)
    p.page.keyboard.press('e')
    p.wait('root.dataset.exported === "4"')
    assert p.source() == before and p.page.evaluate('() => window.jupyterapp.shell.currentWidget.content.activeCellIndex') == 0 and p.data('focus') == 'yes'
    df = pl.read_csv(c/'reviewed.csv')
    assert df['outcome'].to_list() == ['skipped', 'agreed', 'corrected', 'agreed'] and df['reviewed_biopsy'].to_list() == [None, 1, 1, 0]
    # agreeing again on what has answers is refused; a correction on looking back is not
    p.press(['ArrowUp', 'a'])
    assert p.data('refused') == '1' and 'has your label' in p.words('flash')
    p.press(['ArrowUp', '2']).saved()
    assert events(c)[-1] == (('mag',), 6)               # the first image that the model flagged is in the frame


def test_heat_and_enlarging(lab, start):
    c = review_cohort(lab.folder/'demo_a')
    p = start('heat', c).press('s')
    plain = p.at(.25, .15), p.at(.9, .95)
    assert plain[0][0] == plain[0][2]
    p.press('c').wait('root.dataset.heat === "biopsy"')
    assert p.words('heat') == 'Biopsy tool'
    hot = p.at(.25, .15)
    assert hot[0] > hot[2] + 60 and max(abs(a - b) for a, b in zip(p.at(.9, .95), plain[1])) < 3
    p.page.keyboard.press('x')                          # another finding, of which this model cannot say it
    p.wait('[...root.querySelectorAll(".mm-state")].every((e) => e.textContent.includes("cannot say"))')
    assert p.at(.25, .15) == plain[0]
    p.page.keyboard.press('x')
    p.wait('root.dataset.heat === "biopsy"')
    assert p.at(.25, .15) == hot
    p.page.keyboard.press('c')
    p.wait('root.dataset.heat === ""')
    assert p.at(.25, .15) == plain[0]
    p.page.keyboard.press('Enter')
    p.state('ready').wait('root.dataset.large === "yes"')
    assert Page.shown(p) == 1 and p.words('view') == 'R-CC'   # the whole stage is one picture
    p.press(['ArrowRight'])
    assert p.state('ready').data('at') == '1' and Page.shown(p) == 0
    p.page.keyboard.press('z')
    p.wait('/[0-9]+ %/.test(root.querySelector(".mm-note").textContent)')
    p.page.keyboard.press('Escape')
    p.page.keyboard.press('Escape')
    p.wait('root.dataset.large === "no"').state('ready')
    t = p.tiles()[3]
    k = p.page.evaluate('() => window.devicePixelRatio')
    box = p.root.locator('canvas').bounding_box()
    p.page.mouse.click(box['x'] + (t['x'] + t['w']/2)/k, box['y'] + (t['y'] + t['h']/2)/k)
    assert p.chosen() == 2
    p.press('2').saved()
    assert events(c)[-1] == (('mag',), 2)


def test_reload_resumes_and_the_saved_notebook_holds_nothing(lab, start):
    c = review_cohort(lab.folder/'demo_a', dicom=True, thumbnails=False)   # only inferred: pictures come from the files
    assert not (c/'labels.sqlite').exists()
    p = start('resume', c, cam=None).press('sa').press('1')
    p.page.keyboard.press('c')
    assert 'cannot say' in p.words('flash')
    p.saved().save()
    place, done = p.words('place'), events(c)
    p.page.reload()
    p.wait_kernel()
    p.state('ready').root.focus()
    assert p.words('place') == place == '3 / 4' and p.words('total') == '2 of 4 studies done' and [t['chip'] for t in p.tiles()].count('Biopsy tool') == 1
    p.press('u').press('u').saved()
    assert p.state('ready').words('place') == '2 / 4' and [t['chip'] for t in p.tiles()] == ['']*4
    assert events(c)[:len(done)] == done and [e[0] for e in events(c)[len(done):]] == ['undo']*5
    p.save()
    text = lab.server.path('resume').read_text()
    nb = json.loads(text)
    ours = [m for m in nb['metadata']['widgets']['application/vnd.jupyter.widget-state+json']['state'].values() if 'Reviewer' in m['state'].get('_anywidget_id', '')]
    assert len(ours) == 1 and ours[0]['state']['rater'] == 'anna' and 'buffers' not in ours[0]
    for secret in (image_id(0), image_id(17), 'Doe', '4711', '1.2.840', '1.2.826', 'patient-', '.dcm', 'iVBOR'): assert secret not in json.dumps(nb['metadata']), secret


def test_one_writer_per_rater_across_labeler_and_reviewer(lab, start):
    c = review_cohort(lab.folder/'demo_a')
    p = start('mine', c).press('s').saved()
    lab.server.notebook('other', labeler_cell(c))
    q = Page(lab.common.new_page()).open(lab.server.url('other')).run(0).state('ready')
    p.page.bring_to_front()
    p.root.focus()
    p.state('readonly').page.keyboard.press('a')
    assert p.data('refused') == '1' and 'another tab' in p.words('banner')
    q.page.close()
    p.root.evaluate('''(root) => {
      window.mmStates = [];
      new MutationObserver(() => window.mmStates.at(-1) !== root.dataset.state && window.mmStates.push(root.dataset.state)).observe(root, { attributeFilter: ["data-state"] });
    }''')
    p.root.get_by_role('button', name='Review here instead').click()
    p.wait('document.activeElement === root')  # the button goes away, and the keys must not go to JupyterLab
    p.press('a').saved()
    assert [s for s in p.page.evaluate('window.mmStates') if s != 'readonly'][:2] == ['loading', 'ready']  # a key is taken from when all is shown anew, not before
    assert len(events(c)) == 8


def test_screenshot(lab, start):
    "The picture in the README; MAMMO_SCREENSHOT says where to put it"
    from PIL import Image
    from mammo_nb.dicom.phantom import phantom_image
    def phantom(n, rows, cols):
        px, _ = phantom_image(view=['CC', 'CC', 'MLO', 'MLO'][n % 4], laterality='LR'[n % 2], size=(rows, cols), tool='clip' if n == 1 else None, magnification=n == 6, seed=n + 3)
        return (px >> 4).astype(np.uint8)
    c = review_cohort(lab.folder/'demo_b', rows=900, cols=720, image=phantom)
    p = start('shot', c, context=lab.context(viewport=dict(width=1280, height=860)))
    if os.environ.get('MAMMO_THEME') == 'dark': p.page.evaluate('() => window.jupyterapp.commands.execute("apputils:change-theme", { theme: "JupyterLab Dark" })')
    p.page.evaluate('() => window.jupyterapp.commands.execute("application:toggle-left-area")')
    p.press('s')
    p.page.keyboard.press('ArrowRight')
    p.press('3').press('c').wait('root.dataset.heat === "biopsy"').wait('!document.querySelector(".mm-on")')
    shot = Path(os.environ.get('MAMMO_SCREENSHOT') or lab.folder/'review.png')
    if os.environ.get('MAMMO_WHOLE'): p.page.screenshot(path=shot)
    else: p.root.screenshot(path=shot)
    Image.open(shot).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(shot, optimize=True)
    assert shot.stat().st_size < 200_000
    img = cv2.imread(str(shot), cv2.IMREAD_GRAYSCALE)
    assert img.std() > 20 and (img < 30).mean() > .3    # pictures on a dark stage
