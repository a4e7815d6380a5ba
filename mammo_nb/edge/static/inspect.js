// The page of edge/00_inspect's Viewer: keys go to the kernel, pictures come back as buffers, so nothing of them stays in a saved notebook.
function render({ model, el }) {
  const root = document.createElement("div"), img = document.createElement("img"), side = document.createElement("div");
  root.tabIndex = 0;
  root.setAttribute("role", "application");
  root.setAttribute("aria-label", "File viewer; arrow keys: next and previous file");
  Object.assign(root.style, { display: "flex", gap: "1em", padding: "8px", background: "#111", color: "#ddd", minHeight: "320px", outline: "none", font: "13px sans-serif" });
  Object.assign(img.style, { maxHeight: "70vh", maxWidth: "65%", objectFit: "contain" });
  root.append(img, side);
  el.append(root);
  let at = 0, kind = "out", url = null, asked = 0;
  // one question at a time; one that got no answer in five seconds (a kernel that was restarted) no longer holds up the next
  const ask = (msg) => { if (Date.now() - asked > 5000) { asked = Date.now(); model.send({ do: "go", at, kind, ...msg }); } };
  const line = (text, style) => { const p = document.createElement("div"); p.textContent = text; Object.assign(p.style, style || {}); side.append(p); };
  const shown = { out: "as it goes out", source: "as it came", tissue: "tissue" };
  const got = (m, buffers) => {
    if (m.do !== "show") return;
    asked = 0;
    at = m.at; kind = m.kind;
    if (url) URL.revokeObjectURL(url);
    url = buffers && buffers.length ? URL.createObjectURL(new Blob([buffers[0]], { type: "image/png" })) : null;
    if (url) img.src = url; else img.removeAttribute("src");
    img.alt = `file ${at + 1}`;
    side.replaceChildren();
    line(`${at + 1} of ${model.get("count")} · ${shown[kind]}`, { color: "#fff", fontWeight: "bold" });
    line(m.title);
    for (const f of m.facts) line(f);
    if (m.problem) line(m.problem, { color: "#ff8a70", marginTop: "6px" });
    line("← → files · b before · t tissue · f next problem", { color: "#888", marginTop: "12px" });
    root.dataset.at = at; root.dataset.kind = kind;
  };
  const keys = { ArrowRight: () => ask({ at: at + 1 }), n: () => ask({ at: at + 1 }), ArrowLeft: () => ask({ at: Math.max(0, at - 1) }), p: () => ask({ at: Math.max(0, at - 1) }),
    b: () => ask({ kind: kind === "source" ? "out" : "source" }), t: () => ask({ kind: kind === "tissue" ? "out" : "tissue" }), f: () => ask({ do: "problem" }) };
  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key.length === 1) e.stopPropagation();
    if (keys[e.key]) { e.preventDefault(); e.stopPropagation(); keys[e.key](); }
  });
  root.addEventListener("pointerdown", () => root.focus());
  root.addEventListener("focus", () => { root.style.boxShadow = "0 0 0 2px #4477aa"; });
  root.addEventListener("blur", () => { root.style.boxShadow = "none"; });
  model.on("msg:custom", got);
  ask({});
  return () => { model.off("msg:custom", got); if (url) URL.revokeObjectURL(url); };
}
export default { render };
