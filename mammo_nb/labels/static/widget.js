// The labeler's page side, after shared.js.

const PAUSE = 60000;

class Labeler extends Station {
  setup() {
    Object.assign(this, { ids: [], at: new Map(), pos: 0, peeked: new Set(), paces: [], ahead: this.model.get("ahead"), behind: this.model.get("behind") });
  }
  ownKeys() { return { m: "model", ArrowLeft: "back", ArrowRight: "forward", ArrowUp: "back", ArrowDown: "forward" }; }
  own() { return { model: () => this.askModel(), back: () => this.step(-1), forward: () => this.step(1) }; }
  replies() { return { model: (m) => this.opinion(m) }; }

  build() {
    this.spans("view study place chip model note flash why big saved total todo rate");
    this.select = h("select", { "aria-label": "Queue", onchange: () => { this.open(this.select.value); this.root.focus({ preventScroll: true }); } });
    this.frame({
      name: "Labeler", ask: "click to label", here: "Label here instead", head: [this.select, this.t.place, this.t.study],
      tools: [["z", "zoom", "Zoom to full detail"], ["w", "window", "Next window"], ["i", "invert", "Invert"], ["m", "model", "Show what the model thinks"],
              ["f", "full", "Full screen", "full screen"], ["h", "help", "Help"]],
      over: [this.t.view, this.t.chip, this.t.note, this.t.model, this.t.big],
      steps: [["back", "‹", "Look back (left arrow)"], ["forward", "›", "Look forward (right arrow)"]],
      foot: [this.t.total, this.t.todo, this.t.rate],
      help: { rows: [...this.keyRows(), ["← →", "Look back and forward without labelling"], ["z, wheel", "Zoom to full detail under the pointer; drag to move"],
                     ["w", "Next window: as stored, wide, stretched"], ["i", "Invert"], ["m", "What the model thinks of this image (noted in the record)"], ["f", "Full screen"], ["h ?", "This help"]],
              text: "One press labels and moves on. A press counts once the image is on the screen; it is kept in this browser until it is saved." },
    });
  }

  // ---- where we are

  init(m, was) {
    const same = was === m.queue, here = this.id;
    Object.assign(this, { ids: m.ids, views: m.views, studies: m.studies, blind: m.blind, outside: m.outside });
    this.at = new Map(m.ids.map((id, i) => [id, i]));
    this.select.replaceChildren(...m.queues.map(([name, text]) => h("option", { value: name, selected: name === m.queue }, text)));
    this.select.value = m.queue;
    this.go(same && here && this.at.has(here) && !this.mine.has(here) ? this.at.get(here) : this.next(-1));
  }
  open(queue) { this.hello(queue, false); }
  condition() { return this.done ? "done" : this.ring.get(this.id)?.error ? "broken" : this.painted === this.id ? "ready" : "loading"; }

  get id() { return this.ids[this.pos]; }
  get done() { return this.pos >= this.ids.length; }
  next(from) {  // the next image without an answer, from there on, else from the start
    const n = this.ids.length;
    for (let k = 1; k <= n; k++) { const i = (from + k) % n; if (!this.mine.has(this.ids[i])) return i; }
    return n;
  }
  go(pos) {
    this.pos = Math.max(0, Math.min(pos, this.ids.length));
    Object.assign(this, { zoom: null, painted: null, refreshed: false });
    this.dropDetail();
    this.t.model.textContent = "";
    this.showing = false;
    this.show();
    this.refill();
    this.counts();
    if (this.window === 1) this.askDetail();
  }
  refill() {
    const want = [], add = (i) => { const id = this.ids[i]; if (id !== undefined && !want.includes(id)) want.push(id); };
    add(this.pos);
    for (let k = 0, i = this.pos; k < this.ahead; k++) { i = this.next(i); if (i >= this.ids.length || i === this.pos) break; add(i); }
    if (this.ahead) add(this.pos + 1);
    for (let k = 1; k <= this.behind; k++) { add(this.pos - k); const e = this.stack.at(-k); if (e) add(this.at.get(e.id)); }
    this.ring.want(want);
    if (this.inverted || this.window === 2) for (const id of want.slice(0, 3)) if (this.ring.get(id)?.blob) this.ring.whole(id);
  }

  // ---- a press

  answer(a) {
    if (this.done) return this.refuse("This queue is finished.");
    if (this.painted !== this.id && !(a === "skip" && this.ring.get(this.id)?.error)) return this.refuse("The image is not on the screen yet.");
    this.emit({ image_id: this.id, label: a, ms: this.paintedAt ? Math.round(now() - this.paintedAt) : null, saw_model: this.peeked.has(this.id) });
    this.flash(this.title(a), a);
    this.pace();
    this.go(this.next(this.pos));
  }
  undo() {
    const e = this.stack.at(-1);
    if (!e) return this.refuse("Nothing left to undo in this queue.");
    this.emit({ image_id: e.id, label: "undo", ms: null, undoes: [e.client, e.seq], saw_model: false });
    this.flash(`Undone: ${this.title(e.label)}`, "undo");
    this.paces.pop();
    if (!this.at.has(e.id)) { this.ids.splice(this.pos, 0, e.id); this.views.splice(this.pos, 0, ""); this.studies.splice(this.pos, 0, null); this.at = new Map(this.ids.map((id, i) => [id, i])); }
    this.go(this.at.get(e.id));
  }
  step(d) {
    const to = this.pos + d;
    if (to < 0 || to > this.ids.length) return this.flash(d < 0 ? "This is the first image." : "This is the end of the queue.", "refused");
    this.go(to);
  }
  pace() {
    const t = now();
    if (this.pressed) this.paces.push(Math.min(t - this.pressed, PAUSE));
    if (this.paces.length > 100) this.paces.shift();
    this.pressed = t;
  }

  counts() {
    const c = this.tally(this.mine.values(), this.outside);
    const labelled = Object.entries(c).reduce((s, [k, v]) => s + (k === "skip" ? 0 : v), 0), todo = this.ids.filter((id) => !this.mine.has(id)).length;
    this.t.total.textContent = `${labelled} labelled`;
    this.t.todo.textContent = `${todo} to go`;
    const spent = this.paces.reduce((s, x) => s + x, 0);
    this.t.rate.textContent = this.paces.length > 4 ? `${Math.round((this.paces.length * 3600000) / spent)} / hour` : "– / hour";
    this.status();
  }

  words(x) {
    const view = this.views?.[this.pos] || "", st = this.studies?.[this.pos], mine = this.mine.get(this.id), n = this.ids.length;
    this.t.view.textContent = this.done ? "" : view;
    this.t.study.textContent = this.done || !st ? "" : `study ${st[0]} · image ${st[1]} of ${st[2]}`;
    this.t.place.textContent = this.queue ? `${Math.min(this.pos + 1, n)} / ${n}` : "";
    this.t.chip.textContent = mine === undefined ? "" : mine === "skip" ? "skipped" : this.title(mine);
    this.t.note.textContent = this.done || !x?.fitted ? "" : [this.window === 1 && this.detail?.window !== 1 ? (this.noDetail || "wide window: reading the file …") : WINDOWS[this.window],
      this.inverted ? "inverted" : "", this.zoom ? this.zoomText(x) : ""].filter(Boolean).join(" · ");
    const left = this.ids.filter((id) => this.mine.get(id) === "skip").length;
    this.t.big.textContent = !this.queue ? "Starting …" : !n ? "This queue is empty." : this.done ? (this.next(-1) < n ? "End of the queue" : `Queue finished: all ${n} images are done` + (left ? `, ${left} of them skipped.` : ".") + " Choose another queue above.")
      : x?.error || (x?.fitted ? "" : "Loading …");
    this.canvas.setAttribute("aria-label", this.done ? "no image" : [view, `image ${this.pos + 1} of ${n}`, mine === undefined ? "not labelled" : `labelled ${this.title(mine)}`].filter(Boolean).join(", "));
    this.status();
  }

  // ---- what the model thinks: asked for image by image, and noted in the event

  askModel() {
    if (this.showing) { this.showing = false; this.t.model.textContent = ""; return; }
    if (this.blind) return this.flash("This queue never shows predictions.", "refused");
    if (this.done || !this.id) return;
    this.send({ do: "model", id: this.id });
  }
  opinion(m) {
    if (m.id !== this.id) return;
    if (m.reason) return this.flash(m.reason, "refused");
    this.showing = true;
    this.peeked.add(m.id);
    this.t.model.replaceChildren(h("em", {}, "model"), ...m.probs.map(([title, p]) => h("span", {}, `${title} `, h("b", {}, p.toFixed(2)), h("meter", { min: 0, max: 1, value: p, "aria-label": title }))));
  }
}

export default page(Labeler);
