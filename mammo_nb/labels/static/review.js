// The reviewer's page side, after shared.js; nbs/labels/03_review.ipynb holds the kernel's.
// A study at a time, its images in hanging order, what the model says of each, and what you say.

// A grey map as a tint: cool parts stay clear, warm ones take on colour and keep their brightness, so that a clip in the middle is still white; a line around them.

async function glow(buffer) {
  const bitmap = await createImageBitmap(new Blob([buffer], { type: "image/png" })), [tint, g, d] = pixels(bitmap), w = tint.width, p = d.data;
  const line = new OffscreenCanvas(w, tint.height), gl = line.getContext("2d"), dl = gl.createImageData(w, tint.height), v = Uint8Array.from({ length: w * tint.height }, (_, i) => p[4 * i]);
  const warm = [[255, 214, 60], [255, 140, 40], [235, 45, 45]], mix = (t, k) => { const i = t < 0.5 ? 0 : 1, f = 2 * t - i; return warm[i][k] * (1 - f) + warm[i + 1][k] * f; };
  for (let i = 0; i < v.length; i++) {
    const t = Math.max(0, v[i] / 255 - 0.4) / 0.6, x = i % w;
    for (let k = 0; k < 3; k++) p[4 * i + k] = mix(t, k);
    p[4 * i + 3] = 255 * 0.7 * Math.sqrt(t);
    const edge = v[i] >= 102 && ((x && v[i - 1] < 102) || (x < w - 1 && v[i + 1] < 102) || v[i - w] < 102 || v[i + w] < 102);
    if (edge) dl.data.set([...warm[0], 255], 4 * i);
  }
  g.putImageData(d, 0, 0);
  gl.putImageData(dl, 0, 0);
  bitmap.close();
  return { tint, line };
}

function lay(g, { tint, line }, x, y, w, h) {
  g.imageSmoothingEnabled = true;
  for (const [how, much, what] of [["multiply", 1, tint], ["lighter", 0.25, tint], ["source-over", 0.8, line]]) {
    Object.assign(g, { globalCompositeOperation: how, globalAlpha: much });
    g.drawImage(what, x, y, w, h);
  }
  Object.assign(g, { globalCompositeOperation: "source-over", globalAlpha: 1 });
}

class Reviewer extends Station {
  setup() { Object.assign(this, { studies: [], images: {}, theirs: {}, where: new Map(), pos: 0, at: 0, large: false, hot: false, heats: new Map(), seen: new Set(), tiles: [] }); }
  ownKeys() {
    return { a: "agree", c: "heat", x: "finding", e: "export", n: "next", p: "previous", " ": "next", Enter: "enlarge", ArrowLeft: "left", ArrowRight: "right", ArrowUp: "previous", ArrowDown: "next" };
  }
  own() {
    const one = (f) => () => (this.large ? f() : this.flash("Enlarge an image first (Enter).", "refused"));
    return { heat: () => this.toggleHeat(), finding: () => this.nextFinding(), export: () => this.send({ do: "export" }), next: () => this.turn(1), previous: () => this.turn(-1),
             left: () => this.step(-1), right: () => this.step(1), enlarge: () => this.enlarge(!this.large), window: one(() => this.nextWindow()), invert: one(() => { this.inverted = !this.inverted; this.show(); }) };
  }
  replies() { return { heat: (m, b) => this.gotHeat(m, b), exported: (m) => { this.root.dataset.exported = m.rows; this.flash(m.text, "said"); } }; }

  build() {
    this.spans("place reason held more heat view note flash why big saved total todo");
    this.grid = h("div", { class: "mm-tiles" });
    const agree = this.button("mm-label mm-agree", "Agree with the model on this study", "a", "Agree", "agree");
    this.frame({
      name: "Reviewer", ask: "click to review", here: "Review here instead", head: [this.t.place, this.t.reason, this.t.more, this.t.held, this.t.heat],
      tools: [["c", "heat", "Show what made the model say so"], ["x", "finding", "The next finding's heat"], ["Enter", "enlarge", "Enlarge the image"], ["e", "export", "Write reviewed.csv", "csv"],
              ["f", "full", "Full screen", "full screen"], ["h", "help", "Help"]],
      over: [this.grid, this.t.view, this.t.note, this.t.big], labels: [agree],
      steps: [["previous", "‹", "Previous study (up arrow)"], ["next", "›", "Next study (down arrow)"]],
      foot: [this.t.total, this.t.todo],
      help: { rows: [["a", "Agree: what is ticked below each image becomes its label; images you have labelled keep yours"], ...this.keyRows().map(([k, t]) => [k, this.keys[k] === "skip" ? "Skip the study: decide later" : this.keys[k] === "undo" ? "Undo the last press, as often as you like" : `${t}: the image in the frame`]),
                     ["← →", "Choose an image (or click it)"], ["↑ ↓, p n", "Previous, next study"], ["c, x", "Glow where the model looked; of the next finding"], ["Enter, z", "Enlarge the image; then z or wheel for full detail, w window, i invert"],
                     ["e", "Write the list as reviewed.csv"], ["f, h ?", "Full screen, this help"]],
              text: "Answers are labels: the next training round learns from them. Those of hold-out patients are kept but decide nothing, because you saw what the model says." },
    });
    this.counters.agree = { b: agree };
  }

  // ---- where we are

  get study() { return this.studies[this.pos]; }
  get id() { return this.study?.ids[this.at]; }
  get done() { return this.pos >= this.studies.length; }
  get finding() { return this.chosen ?? this.study?.finding ?? this.findings[0][0]; }
  isOpen(k) { return this.studies[k].ids.some((id) => !this.mine.has(id)); }
  flagged(id) { return this.images[id].says.length > 0; }
  left(id) { const l = this.mine.get(id); return l === undefined || l === "skip"; }  // still to be answered
  next(from) {  // the next study with something to answer, from there on, else from the start
    const n = this.studies.length;
    for (let k = 1; k <= n; k++) { const i = (from + k) % n; if (this.isOpen(i)) return i; }
    return n;
  }
  init(m) {
    const here = this.id;
    Object.assign(this, { studies: m.studies, images: m.images, theirs: m.theirs, explains: m.explains });
    this.where = new Map(m.studies.flatMap((s, k) => s.ids.map((id, i) => [id, [k, i]])));
    const [k, i] = this.where.get(here) || [];
    k !== undefined && this.isOpen(k) ? this.go(k, i) : this.go(this.next(-1));
  }
  go(pos, at) {
    this.pos = Math.max(0, Math.min(pos, this.studies.length));
    const s = this.study, first = (f) => s.ids.findIndex(f);
    if (at === undefined && s) { for (const f of [(id) => this.left(id) && this.flagged(id), (id) => this.left(id), (id) => this.flagged(id)]) { at = first(f); if (at >= 0) break; } }
    Object.assign(this, { at: Math.max(0, at ?? 0), large: false, zoom: null, painted: null, chosen: null, seen: new Set(), shownAt: null });
    this.dropDetail();
    this.#captions();
    this.show();
    this.refill();
    this.counts();
    this.askHeat();
    this.ring.resized();
  }
  turn(d) {
    const to = this.pos + d;
    if (to < 0 || to > this.studies.length) return this.flash(d < 0 ? "This is the first study." : "This is the end of the list.", "refused");
    this.go(to);
  }
  step(d) {
    const n = this.study?.ids.length || 0, to = this.at + d;
    if (to < 0 || to >= n) return this.flash(d < 0 ? "This is the first image; ↑ is the previous study." : "This is the last image; ↓ is the next study.", "refused");
    this.choose(to);
  }
  choose(at) {
    Object.assign(this, { at, zoom: null, painted: null });
    this.dropDetail();
    if (this.large) this.ring.resized();
    this.show();
    if (this.large && this.window === 1) this.askDetail();
  }
  refill() {
    const want = [], add = (k) => want.push(...(this.studies[k]?.ids || []));
    for (const k of new Set([this.pos, this.next(this.pos), this.pos + 1, this.pos - 1])) add(k);
    this.ring.want(want);
    if (this.hot) this.askHeat();
  }
  condition() {
    if (this.done) return "done";
    if (this.large) return this.ring.get(this.id)?.error ? "broken" : this.painted === this.id ? "ready" : "loading";
    return this.study.ids.every((id) => this.seen.has(id) || this.ring.get(id)?.error) ? "ready" : "loading";
  }

  // ---- a press

  event(id, label) { return { image_id: id, label, ms: this.shownAt ? Math.round(now() - this.shownAt) : null, saw_model: true }; }
  answer(a) {
    if (this.done) return this.refuse("The list is finished.");
    if (a === "agree") return this.agree();
    if (a === "skip") return this.skip();
    if (!this.seen.has(this.id)) return this.refuse(this.ring.get(this.id)?.error ? "This image cannot be shown." : "The image is not on the screen yet.");
    this.emit(this.event(this.id, a));
    this.flash([this.images[this.id].view, this.title(a)].filter(Boolean).join(": "), a);
    this.goOn();
  }
  goOn() {  // to the next image of this study without an answer, else to the next study with one
    const ids = this.study.ids, n = ids.length;
    for (let k = 1; k < n; k++) if (!this.mine.has(ids[(this.at + k) % n])) { this.counts(); return this.choose((this.at + k) % n); }
    this.go(this.next(this.pos));
  }
  agree() {
    const open = this.study.ids.filter((id) => this.left(id)), there = open.filter((id) => this.seen.has(id)), broken = open.filter((id) => !this.seen.has(id));
    if (!open.length) return this.refuse("Every image of this study has your label; correct one, or go on with ↓.");
    if (broken.some((id) => !this.ring.get(id)?.error)) return this.refuse("Not all images are on the screen yet.");
    if (!there.length) return this.refuse("None of these images can be shown; skip the study.");
    this.emit(...there.map((id) => this.event(id, this.images[id].says)), ...broken.filter((id) => !this.mine.has(id)).map((id) => this.event(id, "skip")));
    this.flash(`Agreed on ${there.length === 1 ? "1 image" : `${there.length} images`}` + (broken.length ? `; ${broken.length} cannot be shown` : ""), "agree");
    this.go(this.next(this.pos));
  }
  skip() {
    const open = this.study.ids.filter((id) => !this.mine.has(id));
    if (open.length) this.emit(...open.map((id) => this.event(id, "skip")));
    this.flash("Skipped", "skip");
    const to = this.next(this.pos);
    this.go(open.length || to < this.studies.length ? to : this.pos + 1);
  }
  undo() {  // all that the last press did
    const last = this.stack.at(-1);
    if (!last) return this.refuse("Nothing left to undo in this list.");
    const all = this.stack.filter((e) => e.client === last.client && e.time === last.time);
    this.emit(...all.map((e) => ({ image_id: e.id, label: "undo", ms: null, undoes: [e.client, e.seq], saw_model: true })));
    this.flash(all.length > 1 ? `Undone: ${all.length} images` : `Undone: ${this.title(last.label)}`, "undo");
    this.go(...this.where.get(all[0].id));
  }

  // ---- the picture

  layout(k) {  // as many columns as show most, pairs kept together; device pixels
    const ids = this.studies[k].ids, n = ids.length, r = window.devicePixelRatio || 1, gap = 8 * r, words = (this.findings.length * 18 + 30) * r;
    const size = (id) => { const x = this.ring.get(id), i = this.images[id]; return x?.rows ? [x.cols, x.rows] : i.rows ? [i.cols, i.rows] : [4, 5]; };
    let best = null;
    for (let cols = 1; cols <= n; cols++) {
      if (n > 2 && cols > 1 && cols < n && cols % 2) continue;
      const rows = Math.ceil(n / cols), w = Math.max(16, (this.canvas.width - gap * (cols + 1)) / cols), hh = Math.max(16, (this.canvas.height - gap * (rows + 1)) / rows - words);
      const area = ids.reduce((sum, id) => { const [c, q] = size(id), s = Math.min(w / c, hh / q); return sum + c * q * s * s; }, 0);
      if (!best || area > best.area * 1.001) best = { cols, w, h: hh, area };
    }
    return ids.map((id, i) => {
      const [c, q] = size(id), s = Math.min(best.w / c, best.h / q), w = Math.round(c * s), hh = Math.round(q * s), side = this.images[id].view[0];
      const x0 = gap + (i % best.cols) * (best.w + gap), y0 = gap + Math.floor(i / best.cols) * (best.h + words + gap);
      const x = x0 + (side === "R" ? best.w - w : side === "L" ? 0 : (best.w - w) / 2);  // chest walls face each other
      return { id, x: Math.round(x), y: Math.round(y0 + (best.h - hh) / 2), w, h: hh, cell: { x: x0, y: y0, w: best.w, h: best.h } };
    });
  }
  room(id) {
    if (this.large && id === this.id) return [this.canvas.width, this.canvas.height];
    const [k, i] = this.where.get(id), { cell } = this.layout(k)[i];
    return [cell.w, cell.h];
  }
  loaded(id) { if (this.where.get(id)?.[0] === this.pos) this.show(); }
  show() {
    if (this.stopped) return;
    if (this.large) return super.show();
    const g = this.g, r = window.devicePixelRatio || 1, fresh = [];
    g.fillStyle = "#0a0a0a";
    g.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.rects = this.done ? [] : this.layout(this.pos);
    for (const p of this.rects) {
      const x = this.ring.get(p.id);
      if (x?.fitted) {
        g.imageSmoothingEnabled = x.fitted.width !== p.w || x.fitted.height !== p.h;
        g.drawImage(x.fitted, p.x, p.y, p.w, p.h);
        this.overlay(p.id, p);
        if (!this.seen.has(p.id)) fresh.push(p.id);
      }
      if (p.id === this.id) { g.strokeStyle = "#e0a83b"; g.lineWidth = 2 * r; g.strokeRect(p.x - r, p.y - r, p.w + 2 * r, p.h + 2 * r); }
    }
    const pos = this.pos;
    if (fresh.length) this.afterPaint(() => {
      if (this.pos !== pos || this.stopped) return;
      for (const id of fresh) this.seen.add(id);
      this.shownAt ??= now();
      this.status();
    });
    this.words();
  }
  overlay(id, p) {
    const heat = this.hot && this.heats.get(`${id} ${this.finding}`);
    if (heat?.tint) lay(this.g, heat, p.x, p.y, p.w, p.h);
  }
  enlarge(on, at = this.at) {
    if (this.done) return;
    Object.assign(this, { large: on, zoom: null });
    this.choose(at);
    this.ring.resized();
    this.counts();
  }
  tileAt(x, y) { return this.rects.findIndex((p) => x >= p.x && y >= p.y && x < p.x + p.w && y < p.y + p.h); }
  tap(x, y) { const k = this.large ? -1 : this.tileAt(x, y); if (k >= 0) this.choose(k); }
  toggleZoom(px, py) {
    if (this.large) return super.toggleZoom(px, py);
    const k = px === undefined ? this.at : this.tileAt(px, py);
    if (k >= 0) this.enlarge(true, k);
  }
  setZoom(...args) { if (this.large) super.setZoom(...args); }
  escape() {
    if (super.escape()) return true;
    if (!this.large) return false;
    this.enlarge(false);
    return true;
  }

  // ---- in words

  #captions() {
    this.tiles = (this.study?.ids || []).map((id) => {
      const i = this.images[id], chip = h("span", { class: "mm-chip" }), state = h("span", { class: "mm-state" });
      const says = this.findings.map(([name, title], k) => {
        const p = i.probs[k], yes = i.says.includes(name);
        return h("div", { class: yes ? "mm-yes" : "" }, h("span", {}, title), h("meter", { min: 0, max: 1, value: p ?? 0, "aria-label": title }), h("b", {}, p === null ? "–" : p.toFixed(2)), h("i", { "aria-label": yes ? "yes" : "no" }, yes ? "✓" : ""));
      });
      const box = h("div", { class: "mm-caption" }, h("div", { class: "mm-line" }, h("b", {}, i.view || "?"), chip), ...says);
      this.grid.append(box, state);
      return { id, box, chip, state };
    });
    this.grid.replaceChildren(...this.tiles.flatMap((t) => [t.box, t.state]));
  }
  words(x) {
    const r = window.devicePixelRatio || 1, s = this.study, n = this.studies.length, px = (v) => `${v / r}px`, title = (name) => this.findings.find(([f]) => f === name)?.[1] || name;
    this.grid.hidden = this.large || this.done;
    this.tiles.forEach((t, k) => {
      const p = this.rects?.[k], mine = this.mine.get(t.id), theirs = this.theirs[t.id], error = this.ring.get(t.id)?.error;
      t.chip.textContent = mine === "skip" ? "skipped" : mine !== undefined ? this.title(mine) : theirs !== undefined ? `label: ${this.title(theirs)}` : "";
      t.chip.classList.toggle("mm-mine", mine !== undefined && mine !== "skip");
      t.box.classList.toggle("mm-chosen", k === this.at);
      const heat = this.hot && this.heats.get(`${t.id} ${this.finding}`);
      t.state.textContent = error || (!this.seen.has(t.id) && !this.ring.get(t.id)?.fitted ? "Loading …" : this.hot && heat?.reason ? heat.reason : this.hot && !heat?.tint && this.explains ? "asking the model …" : "");
      if (!p) return;
      t.box.dataset.picture = [p.x, p.y, p.w, p.h].join(" ");
      const w = Math.min(p.cell.w, Math.max(p.w, 190 * r)), x0 = Math.min(Math.max(p.x + (p.w - w) / 2, p.cell.x), p.cell.x + p.cell.w - w);
      Object.assign(t.box.style, { left: px(x0), width: px(w), top: px(p.y + p.h + 4 * r) });
      Object.assign(t.state.style, { left: px(p.x), width: px(p.w), top: px(p.y + p.h / 2) });
    });
    const i = this.images[this.id], mine = this.mine.get(this.id);
    this.t.place.textContent = this.queue ? `${Math.min(this.pos + 1, n)} / ${n}` : "";
    this.t.reason.textContent = s ? s.why : "";
    this.t.reason.className = `mm-reason mm-${s?.kind || ""}`;
    this.t.more.textContent = s && s.of > s.ids.length ? `${s.ids.length} of ${s.of} images, the most suspicious` : "";
    this.t.held.textContent = s?.held ? "hold-out patient: your answer is kept but changes no score, since you saw the model's" : "";
    this.t.heat.textContent = this.hot && s ? title(this.finding) : "";
    this.t.view.textContent = this.large ? [i?.view, mine === undefined ? "" : mine === "skip" ? "skipped" : this.title(mine)].filter(Boolean).join(" · ") : "";
    this.t.note.textContent = this.large && x?.fitted ? [this.window === 1 && this.detail?.window !== 1 ? (this.noDetail || "wide window: reading the file …") : WINDOWS[this.window], this.inverted ? "inverted" : "",
      this.zoom ? this.zoomText(x) : "", ...this.findings.map(([, t], k) => `${t} ${i.probs[k]?.toFixed(2) ?? "–"}`)].filter(Boolean).join(" · ") : "";
    this.t.big.textContent = !this.queue ? "Starting …" : !n ? "Nothing to review: no study is flagged or borderline." : this.done ? (this.next(-1) < n ? "End of the list" : `All ${n} studies are done.`) + " e writes reviewed.csv."
      : this.large ? x?.error || (x?.fitted ? "" : "Loading …") : "";
    this.canvas.setAttribute("aria-label", this.done ? "no study" : [`study ${this.pos + 1} of ${n}`, s?.why, i?.view && `in the frame: ${i.view}`, mine === undefined ? "not labelled" : mine === "skip" ? "skipped" : `labelled ${this.title(mine)}`].filter(Boolean).join(", "));
    Object.assign(this.root.dataset, { at: this.at, large: this.large ? "yes" : "no", heat: this.hot && s && s.ids.every((id) => this.heats.get(`${id} ${this.finding}`)?.tint) ? this.finding : "" });
    this.status();
  }
  counts() {
    this.tally([...this.mine].filter(([id]) => this.where.has(id)).map(([, l]) => l));
    const n = this.studies.length, open = this.studies.filter((_, k) => this.isOpen(k)).length;
    this.t.total.textContent = `${n - open} of ${n} studies done`;
    this.t.todo.textContent = `${open} to go`;
    this.words(this.ring.get(this.id));
  }

  // ---- where the model looked

  toggleHeat() {
    if (!this.explains) return this.flash("This model cannot say where it looked.", "refused");
    this.hot = !this.hot;
    this.askHeat();
    this.show();
  }
  nextFinding() {
    if (!this.hot) return this.toggleHeat();
    const names = this.findings.map(([f]) => f);
    this.chosen = names[(names.indexOf(this.finding) + 1) % names.length];
    this.askHeat();
    this.show();
  }
  askHeat() {
    if (!this.hot || !this.study) return;
    const t = now(), f = this.finding, need = this.study.ids.filter((id) => { const x = this.heats.get(`${id} ${f}`); return !x || (!x.tint && !x.reason && t - x.asked > ASK_AGAIN); });
    if (!need.length) return;
    if (this.heats.size > 200) for (const k of this.heats.keys()) if (!this.study.ids.includes(k.split(" ")[0])) this.heats.delete(k);
    for (const id of need) this.heats.set(`${id} ${f}`, { asked: t });
    this.send({ do: "heat", ids: need, finding: f });
  }
  async gotHeat(m, buffer) {
    const x = m.reason ? { reason: m.reason } : await glow(buffer);
    if (this.stopped) return;
    this.heats.set(`${m.id} ${m.finding}`, x);
    if (this.where.get(m.id)?.[0] === this.pos) this.show();
  }
}

export default page(Reviewer);
