// What the labeler's and the reviewer's page share: anywidget takes one file, so nbs/labels/01_widget.ipynb puts this one before theirs.
// That notebook holds the kernel's side and the protocol.
// A press is applied here at once, kept in localStorage, sent, and forgotten only when the kernel has committed it.

const RESEND = 2000, ASK_AGAIN = 4000, PATIENCE = 4000, MAX_UNSAVED = 25;
const DAMAGED = "The thumbnail of this image is damaged; skip it and run preprocess again.";
const WINDOWS = ["as stored", "wide", "stretched"];
const HEX = (n) => Array.from(crypto.getRandomValues(new Uint8Array(n)), (b) => b.toString(16).padStart(2, "0")).join("");
const now = () => performance.now();

function h(tag, attrs = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) k.startsWith("on") ? e.addEventListener(k.slice(2), v) : v !== false && e.setAttribute(k, v === true ? "" : v);
  e.append(...children);
  return e;
}

// ---- what is not yet safe: one localStorage entry per event, so that two tabs never overwrite each other

class Outbox {
  constructor(prefix) {
    this.prefix = prefix;
    this.waiting = new Map();  // "client/seq" -> event
    this.kept = true;          // does this browser keep entries?
    try {
      for (const k of Object.keys(localStorage)) if (k.startsWith(prefix)) this.#read(k);
    } catch { this.kept = false; }
  }
  #read(k) {
    try {
      const e = JSON.parse(localStorage.getItem(k));
      if (e?.client && e?.seq) this.waiting.set(`${e.client}/${e.seq}`, e);
    } catch { /* not ours */ }
  }
  get size() { return this.waiting.size; }
  get events() { return [...this.waiting.values()].sort((a, b) => (a.time < b.time ? -1 : a.time > b.time ? 1 : a.seq - b.seq)); }
  has(id) { for (const e of this.waiting.values()) if (e.image_id === id) return true; return false; }
  add(e) {
    try { localStorage.setItem(`${this.prefix}${e.client}/${e.seq}`, JSON.stringify(e)); } catch { this.kept = false; }
    this.waiting.set(`${e.client}/${e.seq}`, e);
  }
  done(client, seq) {
    this.waiting.delete(`${client}/${seq}`);
    try { localStorage.removeItem(`${this.prefix}${client}/${seq}`); } catch { /* nothing was kept */ }
  }
}

// ---- decoded images around the current one: each as a bitmap of the size it is shown in, so that showing it is only copying;
// the whole thumbnail is decoded when somebody zooms or changes the window

class Ring {
  constructor(send, changed, room) { Object.assign(this, { send, changed, room, held: new Map() }); }
  get(id) { return this.held.get(id); }
  want(ids) {  // most urgent first
    const keep = new Set(ids), t = now();
    for (const [id, x] of this.held) if (!keep.has(id)) { this.#drop(x); this.held.delete(id); }
    const ask = ids.filter((id) => { const x = this.held.get(id); return !x || (!x.blob && !x.error && t - x.asked > ASK_AGAIN); });
    for (const id of ask) this.held.set(id, { asked: t });
    if (ask.length) this.send({ do: "images", ids: ask });
  }
  async arrived(m, buffer) {
    const x = this.held.get(m.id);
    if (!x || x.blob) return;
    if (m.error) { x.error = m.error; return this.changed(m.id); }
    const head = new DataView(buffer.buffer ?? buffer, buffer.byteOffset ?? 0);
    if (head.byteLength < 24 || head.getUint32(12) !== 0x49484452) { x.error = DAMAGED; return this.changed(m.id); }
    const w = head.getUint32(16), h = head.getUint32(20);
    Object.assign(x, { blob: new Blob([buffer], { type: "image/png" }), w, h, rows: m.rows || h, cols: m.cols || w });
    await this.fit(m.id);
  }
  async fit(id) {  // decode at the size it is shown in, off the main thread
    const x = this.held.get(id), [W, H] = this.room(id), s = Math.min(W / x.cols, H / x.rows);
    const resizeWidth = Math.max(1, Math.round(x.cols * s)), resizeHeight = Math.max(1, Math.round(x.rows * s));
    if (x.fitting === `${resizeWidth}x${resizeHeight}`) return;
    x.fitting = `${resizeWidth}x${resizeHeight}`;
    try {
      const fitted = await createImageBitmap(x.blob, { resizeWidth, resizeHeight, resizeQuality: "high" });
      if (this.held.get(id) !== x || x.fitting !== `${resizeWidth}x${resizeHeight}`) return fitted.close();
      x.fitted?.close();
      x.fitted = fitted;
    } catch { x.error = DAMAGED; }
    this.changed(id);
  }
  whole(id) {  // the thumbnail itself, once it is there
    const x = this.held.get(id);
    if (x.bitmap || x.decoding || !x.blob) return x.bitmap;
    x.decoding = createImageBitmap(x.blob).then((b) => {
      if (this.held.get(id) !== x) return b.close();
      x.bitmap = b;
      this.changed(id);
    }, () => { x.error = DAMAGED; this.changed(id); });
  }
  resized() { for (const [id, x] of this.held) if (x.blob) this.fit(id); }
  #drop(x) { x.fitted?.close(); x.bitmap?.close(); }
  clear() { for (const x of this.held.values()) this.#drop(x); this.held.clear(); }
}

// ---- grey levels on the page

function pixels(bitmap) {
  const c = new OffscreenCanvas(bitmap.width, bitmap.height), g = c.getContext("2d", { willReadFrequently: true });
  g.drawImage(bitmap, 0, 0);
  return [c, g, g.getImageData(0, 0, c.width, c.height)];
}

function spread(bitmap) {  // 1st and 99th percentile of what is not background
  const [, , d] = pixels(bitmap), hist = new Uint32Array(256);
  for (let i = 0; i < d.data.length; i += 4) hist[d.data[i]]++;
  let total = 0, sum = 0, low = 0, high = 255;
  for (let v = 1; v < 256; v++) total += hist[v];
  for (let v = 1; v < 256 && sum <= total * 0.01; v++) { sum += hist[v]; low = v; }
  sum = 0;
  for (let v = 255; v > low && sum <= total * 0.01; v--) { sum += hist[v]; high = v; }
  return [low, Math.max(high, low + 1)];
}

function tone(bitmap, range, inverted) {
  const [c, g, d] = pixels(bitmap), lut = new Uint8Array(256), [low, high] = range || [0, 255];
  for (let v = 0; v < 256; v++) {
    const t = Math.min(1, Math.max(0, (v - low) / (high - low))) * 255;
    lut[v] = Math.round(inverted ? 255 - t : t);
  }
  const p = d.data;
  for (let i = 0; i < p.length; i += 4) p[i] = p[i + 1] = p[i + 2] = lut[p[i]];
  g.putImageData(d, 0, 0);
  return c;
}
// ---- a page that shows images, takes keys and loses nothing
//
// A widget of its own gives: ownKeys() key -> action; own() action -> function, for what needs no permission; replies() to what it asks the
// kernel; build() the page; init(m) the kernel's answer to hello; id, the image in question; answer(action) a press; undo(); step(d);
// refill() ask for images; condition() the word for its state; words(x) and counts(). And perhaps loaded(id), room(id), overlay(id, p), tap(x, y).

class Station {
  constructor(model, el) {
    Object.assign(this, { model, el, client: `page-${HEX(8)}`, seq: 0, mine: new Map(), stack: [] });
    for (const k of ["cohort", "rater", "findings"]) this[k] = model.get(k);
    this.keys = model.get("key_map");
    this.outbox = new Outbox(`mammo_nb:${model.get("store_id")}:${encodeURIComponent(this.rater)}:`);
    this.ring = new Ring((m) => this.send(m), (id) => this.loaded(id), (id) => this.room(id));
    Object.assign(this, { window: 0, inverted: false, zoom: null, detail: null, accepted: 0, refused: 0, offset: 0, last: 0 });
    this.setup();
    this.does = { help: () => { this.help.hidden = !this.help.hidden; }, full: () => this.fullScreen(), zoom: () => this.toggleZoom(), window: () => this.nextWindow(),
                  invert: () => { this.inverted = !this.inverted; this.show(); }, ...this.own() };
    this.actions = { h: "help", "?": "help", f: "full", z: "zoom", w: "window", i: "invert", ...this.ownKeys(), ...this.keys };  // the study's own from settings.ini last
    this.hears = { image: (m, b) => this.ring.arrived(m, b), ack: (m) => this.acked(m), init: (m) => this.greet(m), lease: (m) => this.lease(m.holder),
                   pong: (m) => this.lease(m.holder), detail: (m, b) => this.gotDetail(m, b), error: (m) => this.failed(m), ...this.replies() };
    this.build();
  }
  setup() { /* fields of a widget's own */ }
  replies() { return {}; }
  room() { return [this.canvas.width, this.canvas.height]; }
  loaded(id) { if (id === this.id) this.show(); }

  action(e) {
    const by = (k) => (k && Object.hasOwn(this.actions, k) ? this.actions[k] : undefined);
    const code = /^(Digit|Numpad|Key)(\w)$/.exec(e.code || "");  // other layouts: the key's place
    return by(e.key) ?? by(e.key.toLowerCase()) ?? (e.key.length === 1 && code ? by(code[2].toLowerCase()) : undefined);
  }
  title(label) {
    if (typeof label === "string") return { skip: "Skip", undo: "Undo" }[label] || label;
    const all = this.findings.length, titles = this.findings.filter(([n]) => label.includes(n)).map(([, t]) => t);
    if (!titles.length) return all === 1 ? `No ${this.findings[0][1].toLowerCase()}` : all === 2 ? "Neither" : "None";
    return all === 2 && titles.length === 2 ? "Both" : titles.join(" + ");
  }
  kind(label) { return typeof label === "string" ? label : this.findings.map(([n]) => n).filter((n) => label.includes(n)).join("+") || "none"; }

  // ---- page

  spans(names) { this.t = Object.fromEntries(names.split(" ").map((k) => [k, h("span", { class: `mm-${k}` })])); }
  button(cls, label, key, text, a) {
    const b = h("button", { type: "button", class: cls, "aria-label": `${label} (key ${key})`, title: `${label} (${key})` }, h("kbd", {}, key), h("span", {}, text));
    b.addEventListener("click", () => { this.run(a); this.root.focus({ preventScroll: true }); });
    return b;
  }
  frame({ name, ask, here, head, tools, over, steps, labels = [], foot, help }) {  // bar above, stage, bar below
    this.canvas = h("canvas", { role: "img", "aria-label": "no image yet" });
    for (const k of ["flash", "saved"]) this.t[k].setAttribute("role", "status");
    this.t.flash.setAttribute("aria-live", "polite");
    this.errorText = h("span", {});
    this.error = h("div", { class: "mm-error", role: "alert", hidden: true }, this.errorText,
                   h("button", { type: "button", "aria-label": "Dismiss the message", onclick: () => this.complain("") }, "×"));
    this.take = h("button", { type: "button", class: "mm-take", hidden: true, onclick: () => this.hello(this.queue, true) }, here);
    this.help = h("div", { class: "mm-help", role: "dialog", "aria-label": "Keys", hidden: true }, h("h2", {}, "Keys"),
                  h("table", {}, ...help.rows.map(([k, t]) => h("tr", {}, h("td", {}, h("kbd", {}, k)), h("td", {}, t)))), h("p", {}, help.text));
    this.counters = {};
    const keyed = Object.entries(this.keys).map(([key, a]) => {
      const n = h("b", {}), b = this.button(`mm-label mm-${typeof a === "string" ? a : "class"}`, this.title(a), key, this.title(a), a);
      if (a !== "undo") { b.append(n); this.counters[this.kind(a)] = { n, b }; } else this.counters.undo = { b };
      return b;
    });
    const step = ([a, text, label]) => h("button", { type: "button", class: `mm-step mm-${a}`, "aria-label": label, onclick: () => this.run(a) }, text);
    this.stage = h("div", { class: "mm-stage" }, this.canvas, ...over, h("div", { class: "mm-idle" }, h("span", {}, ask)), this.t.flash, ...steps.map(step), this.help);
    this.banner = h("div", { class: "mm-banner", hidden: true }, this.t.why, this.take);
    this.root = h("div", { class: "mm-root", tabindex: "0", role: "application", "aria-label": `${name}, cohort ${this.cohort}, rater ${this.rater}; h for help`,
                           "data-state": "starting", "data-focus": "no" },
      h("header", {}, h("span", { class: "mm-who" }, this.cohort, " · ", h("b", {}, this.rater)), ...head, h("i", {}),
        h("div", { class: "mm-tools" }, ...tools.map(([k, a, label, text = a]) => this.button(`mm-tool mm-tool-${a}`, label, k, text, a)))),
      this.banner, this.error, this.stage,
      h("footer", {}, h("div", { class: "mm-labels" }, ...labels, ...keyed), h("div", { class: "mm-progress" }, ...foot, this.t.saved)));
    this.g = this.canvas.getContext("2d", { alpha: false });
    this.el.append(this.root);
  }
  keyRows() {  // the study's keys, for the help sheet
    return Object.entries(this.keys).map(([k, a]) => [k, a === "skip" ? "Skip: decide later, it comes back in the queue “skipped”" : a === "undo" ? "Undo, as often as you like" : this.title(a)]);
  }

  start() {
    const on = (target, type, f, opts) => { target.addEventListener(type, f, opts); this.undoers.push(() => target.removeEventListener(type, f, opts)); };
    this.undoers = [];
    on(this.root, "keydown", (e) => this.key(e));
    on(this.root, "pointerdown", (e) => { if (!e.target.closest("select")) this.root.focus({ preventScroll: true }); });
    on(this.root, "mousedown", (e) => { if (e.target.closest("button")) e.preventDefault(); });  // the keys stay with us
    on(this.root, "focusin", () => { this.root.dataset.focus = "yes"; this.ping(); });
    on(this.root, "focusout", (e) => { if (!this.root.contains(e.relatedTarget)) this.root.dataset.focus = "no"; });
    on(document, "visibilitychange", () => { if (!document.hidden) { this.ping(); this.show(); } });
    on(document, "fullscreenchange", () => this.root.classList.toggle("mm-full", document.fullscreenElement === this.root));
    this.pointers(on);
    this.onMessage = (m, buffers) => this.receive(m, buffers);
    this.model.on("msg:custom", this.onMessage);
    const watch = new ResizeObserver(() => this.resize());
    watch.observe(this.stage);
    const timer = setInterval(() => this.tick(), 500);
    this.undoers.push(() => watch.disconnect(), () => clearInterval(timer), () => this.model.off("msg:custom", this.onMessage));
    this.hello(this.model.get("queue"), true);
  }
  stop() {
    for (const f of this.undoers) f();
    this.stopped = true;
    this.channel?.port1.close();
    this.ring.clear();
    this.dropDetail();
    this.root.remove();
  }

  // ---- talking to the kernel

  send(m) {
    if (this.stopped) return;
    const lost = () => { this.offline = true; this.status(); };
    try { Promise.resolve(this.model.send({ ...m, client: this.client }, {}, [])).catch(lost); } catch { lost(); }
  }
  hello(queue, take) {
    if (!this.greeting) { this.owed = now(); this.tries = 0; }
    this.greeting = { queue, take };
    this.greeted = this.sent = now();
    this.send({ do: "hello", queue, take, events: this.outbox.events });
  }
  ping() { this.pinged = now(); this.send({ do: "ping" }); }
  tick() {
    const t = now();
    if (this.greeting && t - this.greeted > RESEND * 2 ** Math.min(this.tries, 3)) { this.tries++; this.hello(this.greeting.queue, this.greeting.take); }
    else if (this.outbox.size && t - this.sent > RESEND) this.flush();
    else if (!document.hidden && t - this.pinged > 10000) this.ping();
    if (this.queue) this.refill();
    this.status();
  }
  flush() { this.sent = now(); this.send({ do: "events", events: this.outbox.events }); }

  receive(m, buffers) {
    if (this.stopped || (m.to && m.to !== this.client)) return;
    this.heard = now();
    this.offline = false;
    this.hears[m.re]?.(m, buffers[0]);
    this.status();
  }
  failed(m) {
    if (m.about === "hello" && this.queue) this.greeting = null;  // stay with the queue we have; at the start, ask again
    this.complain(m.text);
  }
  acked(m) {
    for (const [c, s] of m.acks) this.outbox.done(c, s);
    this.root.dispatchEvent(new CustomEvent("mammo:acked", { detail: { acks: m.acks, time: now() } }));
    for (const [c, s, text] of m.refused) {
      const e = this.outbox.waiting.get(`${c}/${s}`);
      this.outbox.done(c, s);
      this.stack = this.stack.filter((x) => x.client !== c || x.seq !== s);
      if (e && e.label !== "undo") this.setMine(e.image_id, null);
      this.complain(`A label was refused: ${text}`);
    }
    for (const [id, label] of Object.entries(m.mine)) if (!this.outbox.has(id)) this.setMine(id, label);
    if (m.error) this.complain(`Not saved yet: ${m.error}`, "save");
    else if (this.errorAbout === "save") this.complain("");
    if (m.holder !== undefined) this.lease(m.holder);
    this.counts();
  }
  lease(holder) {
    if (!this.queue || holder === undefined) return;
    if (this.greeting && holder === this.client) return;  // the answer to our hello comes next, and shows everything anew
    const was = this.readonly;
    this.readonly = holder !== this.client;
    if (was !== this.readonly) { this.show(); this.counts(); }
  }
  greet(m) {
    const was = this.queue;
    this.greeting = null;
    this.queue = m.queue;
    this.mine = new Map(Object.entries(m.mine));
    this.stack = m.history.map(([client, seq, id, label, time]) => ({ client, seq, id, label, time }));
    this.offset = Date.parse(m.time) - now();
    this.last = Math.max(this.last, m.last ? Date.parse(m.last) : 0);
    this.readonly = m.holder !== this.client;
    this.complain(m.note || "");
    for (const e of this.outbox.events) this.apply(e);  // pressed while the answer was on its way
    this.init(m, was);
  }
  complain(text, about = "") {
    this.errorAbout = about;
    this.errorText.textContent = text;
    this.error.hidden = !text;
  }

  // ---- a press

  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || e.isComposing) return;
    const one = e.key.length === 1, inside = e.target !== this.root;
    if (one) e.stopPropagation();
    if (inside && (e.target.closest("select") || ((e.key === " " || e.key === "Enter") && e.target.closest("button")))) return;
    if (e.key === "Enter" && !e.shiftKey && !this.actions.Enter) { e.stopPropagation(); e.preventDefault(); return; }  // would put the cursor into a cell
    if (e.key === "Escape") {
      if (this.escape()) { e.stopPropagation(); e.preventDefault(); }
      return;
    }
    const a = this.action(e);
    if (a === undefined) return;
    e.preventDefault();
    e.stopPropagation();
    if (!e.repeat) this.run(a);
  }
  run(a) {
    if (typeof a === "string" && this.does[a]) return this.does[a]();
    if (!this.queue) return this.refuse("Not ready yet.");
    if (this.readonly) return this.refuse("Read-only: another tab is labelling.");
    if (this.outbox.size >= MAX_UNSAVED) return this.refuse(`${this.outbox.size} labels are not saved yet; waiting for the kernel.`);
    a === "undo" ? this.undo() : this.answer(a);
  }
  escape() {  // was there something to leave?
    if (!this.help.hidden) this.run("help");
    else if (this.zoom) this.setZoom(null);
    else return false;
    return true;
  }
  refuse(text) { this.root.dataset.refused = ++this.refused; this.flash(text, "refused"); }
  emit(...list) {  // the events of one press, at one time
    this.last = Math.max(Math.round(this.offset + now()), this.last + 1);
    const time = new Date(this.last).toISOString(), events = list.map((fields) => ({ client: this.client, seq: ++this.seq, time, queue: this.queue, ...fields }));
    for (const e of events) { this.outbox.add(e); this.apply(e); }
    this.root.dataset.seq = ++this.accepted;
    if (this.outbox.size === events.length) this.sent = now();
    this.send({ do: "events", events });
  }
  apply(e) {  // what an event means for this page
    if (e.queue !== this.queue) return;
    if (e.label === "undo") {
      const i = this.stack.findLastIndex((x) => x.client === e.undoes[0] && x.seq === e.undoes[1]);
      if (i >= 0) this.stack.splice(i, 1);
      this.setMine(e.image_id, this.stack.findLast((x) => x.id === e.image_id)?.label ?? null);
    } else if (!this.stack.some((x) => x.client === e.client && x.seq === e.seq)) {
      this.stack.push({ client: e.client, seq: e.seq, id: e.image_id, label: e.label, time: e.time });
      this.setMine(e.image_id, e.label);
    }
  }
  setMine(id, label) { label === null ? this.mine.delete(id) : this.mine.set(id, label); }

  // ---- the bar

  tally(labels, c0 = {}) {  // how many of each kind; written on the keys' buttons
    const c = { ...c0 };
    for (const l of labels) { const k = this.kind(l); c[k] = (c[k] || 0) + 1; }
    for (const [k, { n }] of Object.entries(this.counters)) if (n) n.textContent = c[k] || 0;
    return c;
  }
  flash(text, a) {
    this.t.flash.textContent = text;
    this.t.flash.className = `mm-flash mm-${a === "refused" ? "refused" : "said"} mm-on`;  // on and off, no animation: frames are for pictures
    this.lit?.classList.remove("mm-lit");
    this.lit = a === "refused" ? null : this.counters[this.kind(a)]?.b;
    this.lit?.classList.add("mm-lit");
    clearTimeout(this.flashed);
    this.flashed = setTimeout(() => { this.t.flash.classList.remove("mm-on"); this.lit?.classList.remove("mm-lit"); }, 1200);
  }
  status() {
    const d = this.root.dataset, n = this.outbox.size, t = now();
    const silent = (this.greeting && t - this.owed > PATIENCE) || (n && t - Math.max(this.heard || 0, this.oldest()) > PATIENCE);
    d.unsaved = n;
    d.queue = this.queue || "";
    d.pos = this.pos ?? "";
    d.image = this.id || "";
    d.state = !this.queue ? "starting" : this.readonly ? "readonly" : n >= MAX_UNSAVED ? "waiting" : this.condition();
    this.t.saved.textContent = n ? `${n} unsaved` : "all saved";
    this.t.saved.classList.toggle("mm-unsaved", n > 0);
    const kept = this.outbox.kept ? "they are kept in this browser" : "this browser keeps nothing, so do not close the page";
    let banner = "";
    if (this.readonly) banner = `Read-only: ${this.rater} is labelling in another tab.`;
    else if (silent || this.offline) banner = this.queue ? `The kernel does not answer. ${n === 1 ? "1 label is" : `${n} labels are`} not saved yet; ${kept}. If the kernel was restarted, run the cell again.`
      : "Waiting for the kernel. If it was restarted, run the cell again.";
    else if (n >= MAX_UNSAVED) banner = `${n} labels are not saved yet, so no more keys are taken until the kernel answers.`;
    else if (!this.outbox.kept && n) banner = "This browser keeps nothing: close the page only when all is saved.";
    if (this.t.why.textContent !== banner) this.t.why.textContent = banner;
    this.banner.hidden = !banner;
    this.take.hidden = !this.readonly;
  }
  oldest() { let t = this.sent || 0; for (const e of this.outbox.waiting.values()) { const at = Date.parse(e.time) - this.offset; if (at < t) t = at; } return t; }

  // ---- the picture

  resize() {
    const r = this.stage.getBoundingClientRect(), k = window.devicePixelRatio || 1, w = Math.max(1, Math.round(r.width * k)), hh = Math.max(1, Math.round(r.height * k));
    if (w === this.canvas.width && hh === this.canvas.height) return;
    this.canvas.width = w;
    this.canvas.height = hh;
    this.show();
    this.ring.resized();
  }
  geometry(x) {  // where the whole image lies on the canvas, in device pixels
    const W = this.canvas.width, H = this.canvas.height, fit = Math.min(W / x.cols, H / x.rows), s = this.zoom?.s ?? fit, w = Math.round(x.cols * s), hh = Math.round(x.rows * s);
    const place = (view, size, c) => (size <= view ? (view - size) / 2 : Math.min(0, Math.max(view - size, view / 2 - c * size)));
    const x0 = place(W, w, this.zoom?.cx ?? 0.5), y0 = place(H, hh, this.zoom?.cy ?? 0.5);
    return { s, fit, w, h: hh, x: Math.round(x0), y: Math.round(y0) };  // whole pixels: nothing is blurred by half of one
  }
  picture(x) {  // what to draw: at its size as it is, else the whole thumbnail in the grey levels asked for
    const want = `${this.window === 2}/${this.inverted}`;
    if (want === "false/false" && !this.zoom) return x.fitted;
    const whole = this.ring.whole(this.id);
    if (want === "false/false") return whole || x.fitted;
    if (!whole) return null;
    if (x.toned?.as !== want) x.toned = { as: want, bitmap: tone(x.bitmap, this.window === 2 ? (x.range ??= spread(x.bitmap)) : null, this.inverted) };
    return x.toned.bitmap;
  }
  show() {
    if (this.stopped) return;
    const g = this.g, W = this.canvas.width, H = this.canvas.height, x = this.ring.get(this.id), id = this.id;
    g.fillStyle = "#0a0a0a";
    g.fillRect(0, 0, W, H);
    const what = x?.fitted && this.picture(x);
    if (what) {
      const p = this.geometry(x), d = this.detail, asis = what.width === p.w && what.height === p.h;
      g.imageSmoothingEnabled = !asis;
      g.imageSmoothingQuality = p.w < what.width * 0.75 ? "high" : "medium";
      g.drawImage(what, p.x, p.y, p.w, p.h);
      if (d && d.id === id && d.window === this.window) {
        g.imageSmoothingEnabled = p.s < 2;
        g.drawImage(this.tonedDetail(d, x), p.x + d.x * p.w, p.y + d.y * p.h, d.w * p.w, d.h * p.h);
      }
      this.overlay(id, p);
      if (this.painted !== id) this.afterPaint(() => {
        if (this.id !== id || this.painted === id || this.stopped) return;
        this.painted = id;
        this.paintedAt = now();
        this.status();
        this.root.dispatchEvent(new CustomEvent("mammo:painted", { detail: { pos: this.pos, time: this.paintedAt } }));
      });
    } else this.painted = null;
    this.words(x);
  }
  overlay() { /* what lies over the picture */ }
  afterPaint(f) {  // once the frame with the picture has been handed over
    this.afters ??= [];
    if (!this.channel) {
      this.channel = new MessageChannel();
      this.channel.port1.onmessage = () => { for (const g of this.afters.splice(0)) g(); };
    }
    requestAnimationFrame(() => { this.afters.push(f); this.channel?.port2.postMessage(0); });
  }
  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.().catch(() => this.flash("This browser does not allow full screen here.", "refused"));
  }

  // ---- zoom: the thumbnail at once, full detector resolution when the kernel has read the file

  toggleZoom(px, py) {
    const x = this.ring.get(this.id), fit = x?.fitted && this.geometry(x).fit;
    this.setZoom(this.zoom || !fit ? null : { s: fit < 0.8 ? 1 : fit * 2.5 }, px, py);
  }
  setZoom(z, px, py) {
    const x = this.ring.get(this.id);
    if (!x?.fitted) return;
    const p = this.geometry(x), W = this.canvas.width, H = this.canvas.height, at = this.pointer || { x: W / 2, y: H / 2 };
    const cx = px ?? at.x, cy = py ?? at.y, fx = Math.min(1, Math.max(0, (cx - p.x) / p.w)), fy = Math.min(1, Math.max(0, (cy - p.y) / p.h));
    const s = z && Math.min(8, Math.max(z.s, p.fit));
    // the pixel under the pointer stays under the pointer
    this.zoom = z && s > p.fit * 1.01 ? { s, cx: fx - (cx - W / 2) / (x.cols * s), cy: fy - (cy - H / 2) / (x.rows * s) } : null;
    this.clamp(x);
    this.show();
    if (this.zoom) this.askDetail();
  }
  clamp(x) {
    if (!this.zoom) return;
    const c = (view, size, v) => { const half = view / 2 / size; return half >= 0.5 ? 0.5 : Math.min(1 - half, Math.max(half, v)); };
    this.zoom.cx = c(this.canvas.width, x.cols * this.zoom.s, this.zoom.cx);
    this.zoom.cy = c(this.canvas.height, x.rows * this.zoom.s, this.zoom.cy);
  }
  pan(dx, dy) {
    const x = this.ring.get(this.id);
    if (!this.zoom || !x?.fitted) return;
    this.zoom.cx -= dx / (x.cols * this.zoom.s);
    this.zoom.cy -= dy / (x.rows * this.zoom.s);
    this.clamp(x);
    this.show();
    this.askDetail();
  }
  zoomText(x) {
    const d = this.detail, fine = d && d.id === this.id && d.window === this.window && d.scale >= Math.min(1, this.zoom.s) * 0.99 && this.inside(d, this.visible(x));
    return `${Math.round(this.zoom.s * 100)} %` + (fine ? ", full detail" : this.noDetail ? `, thumbnail only: ${this.noDetail}` : ", reading the file …");
  }
  visible(x) {
    const p = this.geometry(x), W = this.canvas.width, H = this.canvas.height, cut = (v) => Math.min(1, Math.max(0, v));
    const a = cut(-p.x / p.w), b = cut(-p.y / p.h);
    return { x: a, y: b, w: cut((W - p.x) / p.w) - a, h: cut((H - p.y) / p.h) - b };
  }
  inside(d, v) { const e = 1e-3; return d.x <= v.x + e && d.y <= v.y + e && d.x + d.w >= v.x + v.w - e && d.y + d.h >= v.y + v.h - e; }
  askDetail() {
    clearTimeout(this.detailTimer);
    this.detailTimer = setTimeout(() => {
      const x = this.ring.get(this.id);
      if (!x?.fitted || this.stopped || (!this.zoom && this.window !== 1)) return;
      const v = this.visible(x), p = this.geometry(x), d = this.detail, scale = Math.min(1, p.s);
      if (d && d.id === this.id && d.window === this.window && d.scale >= scale * 0.99 && this.inside(d, v)) return;
      const m = this.zoom ? 0.2 : 0, x0 = Math.max(0, v.x - v.w * m), y0 = Math.max(0, v.y - v.h * m);
      this.noDetail = "";
      this.send({ do: "detail", id: this.id, n: (this.asked = (this.asked || 0) + 1), x: x0, y: y0, w: Math.min(1, v.x + v.w * (1 + m)) - x0, h: Math.min(1, v.y + v.h * (1 + m)) - y0,
                  scale, window: this.window === 1 ? "wide" : "stored", mode: this.window });
    }, 60);
  }
  async gotDetail(m, buffer) {
    if (m.id !== this.id || m.n !== this.asked) return;
    if (m.error) { this.noDetail = m.error; return this.words(this.ring.get(this.id)); }
    const bitmap = await createImageBitmap(new Blob([buffer], { type: "image/png" }));
    if (m.id !== this.id || m.n !== this.asked || this.stopped) return bitmap.close();
    this.dropDetail();
    this.detail = { id: m.id, x: m.x, y: m.y, w: m.w, h: m.h, scale: m.scale, window: m.mode, bitmap };
    this.noDetail = "";
    this.root.dataset.detail = `${m.id} ${m.window} ${bitmap.width}x${bitmap.height}`;
    this.show();
  }
  tonedDetail(d, x) {
    const want = `${this.window === 2}/${this.inverted}`;
    if (want === "false/false") return d.bitmap;
    if (d.toned?.as !== want) d.toned = { as: want, bitmap: tone(d.bitmap, this.window === 2 ? (x.range ??= spread(x.bitmap || x.fitted)) : null, this.inverted) };
    return d.toned.bitmap;
  }
  dropDetail() { this.detail?.bitmap.close(); this.detail = null; this.noDetail = ""; delete this.root.dataset.detail; }
  nextWindow() {
    this.window = (this.window + 1) % WINDOWS.length;
    this.dropDetail();
    this.show();
    if (this.window === 1 || this.zoom) this.askDetail();
  }

  // ---- mouse and touch

  tap() { /* a click that is no drag */ }
  pointers(on) {
    const at = (e) => { const r = this.canvas.getBoundingClientRect(), k = this.canvas.width / r.width; return { x: (e.clientX - r.left) * k, y: (e.clientY - r.top) * k }; };
    const live = new Map();
    let start = null, tapped = 0, spread0 = 0;
    on(this.canvas, "pointerdown", (e) => {
      if (e.button) return;
      live.set(e.pointerId, at(e));
      this.canvas.setPointerCapture?.(e.pointerId);
      start = live.size === 1 ? { ...at(e), t: now(), moved: 0, cx: e.clientX } : null;
      if (live.size === 2) { const [a, b] = live.values(); spread0 = Math.hypot(a.x - b.x, a.y - b.y) / (this.zoom?.s ?? this.geometry(this.ring.get(this.id) || { cols: 1, rows: 1 }).s); }
    });
    on(this.canvas, "pointermove", (e) => {
      const p = at(e), old = live.get(e.pointerId);
      this.pointer = p;
      if (!old) return;
      live.set(e.pointerId, p);
      if (live.size === 2) { const [a, b] = live.values(); return this.setZoom({ s: Math.hypot(a.x - b.x, a.y - b.y) / spread0 }, (a.x + b.x) / 2, (a.y + b.y) / 2); }
      if (start) start.moved += Math.abs(p.x - old.x) + Math.abs(p.y - old.y);
      this.pan(p.x - old.x, p.y - old.y);
    });
    const up = (e) => {
      const p = at(e), s = start;
      live.delete(e.pointerId);
      start = null;
      if (!s || e.type === "pointercancel") return;
      const dx = e.clientX - s.cx;
      if (e.pointerType === "touch" && !this.zoom && Math.abs(dx) > 60 && now() - s.t < 800) return this.step(dx > 0 ? -1 : 1);
      if (s.moved < 8) this.tap(p.x, p.y);
      if (s.moved < 8 && e.pointerType !== "mouse") {  // a second tap zooms there
        if (now() - tapped < 350) { this.toggleZoom(p.x, p.y); tapped = 0; } else tapped = now();
      }
    };
    on(this.canvas, "pointerup", up);
    on(this.canvas, "pointercancel", up);
    on(this.canvas, "pointerleave", () => { if (!live.size) this.pointer = null; });
    on(this.canvas, "dblclick", (e) => { const p = at(e); if (e.pointerType !== "touch") this.toggleZoom(p.x, p.y); });
    on(this.canvas, "wheel", (e) => {
      if (this.root.dataset.focus !== "yes" || e.ctrlKey) return;  // without focus the page scrolls
      e.preventDefault();
      const x = this.ring.get(this.id), p = at(e);
      if (x?.fitted) this.setZoom({ s: this.geometry(x).s * Math.exp(-e.deltaY * 0.002) }, p.x, p.y);
    }, { passive: false });
  }
}

const page = (Kind) => ({
  render({ model, el }) {
    const app = new Kind(model, el);
    app.start();
    return () => app.stop();
  },
});

