"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C8C8C"];
const SHAPES = [ // a circle of radius 1 and others of about its area
  "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.25L1.15.85H-1.15Z", "M0-1.3L1.3 0 0 1.3-1.3 0Z", "M0 1.25L1.15-.85H-1.15Z",
];
const look = method => { const i = D.methods.indexOf(method); return { colour: COLOURS[i % COLOURS.length], shape: SHAPES[(i + Math.floor(i / COLOURS.length)) % SHAPES.length] }; };
const state = { axis: D.axis, hidden: new Set(), text: "", sort: "sparsity", down: false, pinned: null, seeds: false };
const axisOf = key => D.axes.find(a => a.key === key);

// Text is only ever set as text, so no name of a run or of a setting is read as markup.
const made = (tag, properties = {}, ...children) => { const e = document.createElement(tag); Object.assign(e, properties); e.append(...children); return e; };
const drawn = (tag, attributes = {}, parent = null) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (parent) parent.append(e);
  return e;
};
const swatch = method => { const s = drawn("svg", { viewBox: "-1.5 -1.5 3 3", class: "swatch", "aria-hidden": "true" }); drawn("path", { d: look(method).shape, fill: look(method).colour }, s); return s; };

const known = v => v !== null && v !== undefined;
const digits = (v, n) => String(+v.toPrecision(n));
const scaled = (v, unit) => { const p = ["", "k", "M", "G", "T"]; let i = 0; while (Math.abs(v) >= 1000 && i < 4) { v /= 1000; i++; } return digits(v, 3) + " " + p[i] + unit; };
const percent = v => (100 * v).toFixed(2) + " %";
const cost = (axis, v) => !known(v) ? "" : axis.sparsity ? percent(1 - v) : axis.unit === "ms" ? digits(v, 3) + " ms" : scaled(v, axis.unit);
const accuracy = g => !known(g.accuracy) ? "" : D.fraction ? percent(g.accuracy) : digits(g.accuracy, 5);
const spread = g => !known(g.spread) ? "" : "± " + (D.fraction ? (100 * g.spread).toFixed(2) : digits(g.spread, 3));

const shown = g => !state.hidden.has(g.method);
const matches = g => !state.text || state.text.toLowerCase().split(/\s+/).every(word => g.search.toLowerCase().includes(word));

// The plot

const W = 860, H = 470, L = 66, R = 18, T = 14, B = 50;
function ticks(low, high, count = 6) {
  const raw = (high - low) / count || 1e-3, base = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(m => m * base).find(s => s >= raw);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(+v.toPrecision(12));
  return out;
}
function scaleX(axis, values) {
  let low = Math.min(...values), high = Math.max(...values);
  const log = low > 0 && (axis.sparsity || high / low > 8);
  const f = log ? Math.log10 : v => v;
  let a = f(low), b = f(high);
  const pad = (b - a) * 0.06 || (log ? 0.1 : Math.abs(a) * 0.1 || 0.1);
  a -= pad; b += pad;
  const place = v => L + (W - L - R) * (axis.sparsity ? (b - f(v)) / (b - a) : (f(v) - a) / (b - a));
  let at;
  if (!log) at = ticks(a, b);
  else {
    at = [];
    for (let e = Math.floor(a) - 1; e <= Math.ceil(b); e++) for (const m of [1, 2, 5]) { const v = m * 10 ** e; if (f(v) >= a && f(v) <= b && !(axis.sparsity && v > 1)) at.push(v); }
    if (at.length < 3) at = ticks(low, high, 5).filter(v => v > 0);
  }
  return { place, at };
}
function draw() {
  const svg = $("svg"), axis = axisOf(state.axis);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const groups = D.groups.map((g, i) => ({ ...g, i })).filter(g => shown(g) && known(g.accuracy) && known(g.costs[axis.key]));
  $("note").textContent = (D.dense.length === 1 ? "Dashed: the dense model. " : "") + "Bars: one standard deviation over the seeds. Lines: the models of a method that none of it beats in both respects; faint: the others." + (groups.length ? "" : " No model has this cost.");
  if (!groups.length) return;
  const bounds = groups.flatMap(g => [g.accuracy - (g.spread || 0), g.accuracy + (g.spread || 0), ...(state.seeds ? g.points.map(p => p.accuracy).filter(known) : [])]).concat(D.dense);
  let low = Math.min(...bounds), high = Math.max(...bounds);
  const pad = (high - low) * 0.06 || 0.01; low -= pad; high += pad;
  const y = v => H - B - (H - T - B) * (v - low) / (high - low);
  const { place: x, at } = scaleX(axis, groups.flatMap(g => [g.costs[axis.key], ...(state.seeds ? g.points.map(p => p.costs[axis.key]).filter(known) : [])]));
  for (const v of ticks(low, high)) {
    drawn("line", { class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v) }, svg);
    drawn("text", { x: L - 8, y: y(v) + 4, "text-anchor": "end" }, svg).textContent = D.fraction ? digits(100 * v, 6) + " %" : digits(v, 6);
  }
  for (const v of at) {
    drawn("line", { class: "grid", x1: x(v), x2: x(v), y1: T, y2: H - B }, svg);
    drawn("text", { x: x(v), y: H - B + 19, "text-anchor": "middle" }, svg).textContent = axis.sparsity ? digits(100 * (1 - v), 6) + " %" : axis.unit === "ms" ? digits(v, 3) + " ms" : scaled(v, axis.unit);
  }
  drawn("line", { class: "frame", x1: L, x2: W - R, y1: H - B, y2: H - B }, svg);
  drawn("text", { x: (L + W - R) / 2, y: H - 10, "text-anchor": "middle" }, svg).textContent = axis.label + (axis.sparsity ? "" : " (less is better)");
  drawn("text", { transform: `translate(16 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg).textContent = D.metric;
  if (D.dense.length === 1) drawn("line", { class: "dense", x1: L, x2: W - R, y1: y(D.dense[0]), y2: y(D.dense[0]) }, svg);
  for (const method of D.methods) {
    const line = (D.fronts[axis.key][method] || []).map(i => groups.find(g => g.i === i)).filter(Boolean);
    if (line.length > 1) drawn("polyline", { class: "front", stroke: look(method).colour, points: line.map(g => `${x(g.costs[axis.key])},${y(g.accuracy)}`).join(" ") }, svg);
  }
  const mark = (g, cx, cy, size, cls, text, point) => {
    const e = drawn("path", { class: cls + (matches(g) ? "" : " dim") + (state.pinned === g.i ? " pinned" : ""), d: look(g.method).shape, fill: look(g.method).colour,
      transform: `translate(${cx} ${cy}) scale(${size})`, "vector-effect": "non-scaling-stroke", role: "button", "aria-label": text, "data-group": g.i }, svg);
    if (!point) e.setAttribute("tabindex", 0);
    e.addEventListener("pointerenter", () => tip(g, cx, cy, point));
    e.addEventListener("focus", () => tip(g, cx, cy, point));
    for (const gone of ["pointerleave", "blur"]) e.addEventListener(gone, () => { $("tip").hidden = true; });
    e.addEventListener("click", () => pin(g.i));
    e.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(g.i); } });
  };
  for (const g of groups) {
    const cx = x(g.costs[axis.key]), on = (D.fronts[axis.key][g.method] || []).includes(g.i), colour = look(g.method).colour, dim = matches(g) ? "" : " dim";
    if (known(g.spread)) drawn("line", { class: "error" + dim, stroke: colour, x1: cx, x2: cx, y1: y(g.accuracy - g.spread), y2: y(g.accuracy + g.spread) }, svg);
    const [less, more] = [g.costs[axis.key] - (g.spreads[axis.key] || 0), g.costs[axis.key] + (g.spreads[axis.key] || 0)];
    if (more > less && less > 0) drawn("line", { class: "error" + dim, stroke: colour, x1: x(less), x2: x(more), y1: y(g.accuracy), y2: y(g.accuracy) }, svg);
    if (state.seeds) for (const p of g.points) if (known(p.accuracy) && known(p.costs[axis.key])) mark(g, x(p.costs[axis.key]), y(p.accuracy), 3.2, "mark seed", `${g.method}, ${p.run}`, p);
    mark(g, cx, y(g.accuracy), 6, "mark mean" + (on ? "" : " beaten"), `${g.method}, ${D.metric} ${accuracy(g)}, ${cost(axis, g.costs[axis.key])}`, null);
  }
}
function facts(g, point) {
  const list = made("dl"), row = (name, value) => { if (value !== "") list.append(made("dt", { textContent: name }), made("dd", { textContent: value })); };
  row(D.metric, point ? accuracy(point) : `${accuracy(g)} ${spread(g)}`.trim());
  if (!point && g.points.length > 1) row("seeds", String(g.points.length));
  for (const a of D.axes) row(a.short, cost(a, point ? point.costs[a.key] : g.costs[a.key]));
  return list;
}
function tip(g, cx, cy, point) {
  const box = $("tip"), wide = $("plot").clientWidth, ratio = wide / W;
  const overrides = point ? point.overrides : g.overrides;
  box.replaceChildren(made("strong", { textContent: g.method }), facts(g, point), made("code", { textContent: overrides.join(" ") || "no overrides" }));
  box.hidden = false;
  const left = cx * ratio + 14;
  box.style.left = `${Math.max(0, left + box.offsetWidth > wide ? cx * ratio - 14 - box.offsetWidth : left)}px`;
  box.style.top = `${Math.max(0, Math.min(cy * ratio - 10, $("plot").clientHeight - box.offsetHeight))}px`;
}

// What is pinned

function pin(i) {
  state.pinned = state.pinned === i ? null : i;
  const box = $("pin");
  box.replaceChildren();
  if (state.pinned === null) box.append(made("p", { className: "note", textContent: "Choose a point or a row to see its command and its files." }));
  else {
    const g = D.groups[i], close = made("button", { type: "button", textContent: "✕", ariaLabel: "close" });
    close.addEventListener("click", () => pin(i));
    box.append(made("div", { className: "bar" }, made("h2", {}, swatch(g.method), g.method), close), facts(g, null));
    for (const p of g.points) {
      const copy = made("button", { type: "button", textContent: "copy" });
      copy.addEventListener("click", () => navigator.clipboard?.writeText(p.command).then(() => { copy.textContent = "copied"; }, () => { }));
      box.append(made("div", { className: "bar" }, made("strong", { textContent: p.run }), copy), made("pre", {}, made("code", { textContent: p.command })));
      box.append(made("ul", {}, ...p.files.map(([name, href]) => made("li", {}, made("a", { href, textContent: name })))));
    }
  }
  draw(); fill();
}

// Tables

const COLUMNS = [
  { key: "method", label: "method", text: true, value: g => g.method },
  ...D.axes.map(a => ({ key: a.key, label: a.short, value: g => known(g.costs[a.key]) ? (a.sparsity ? 1 - g.costs[a.key] : g.costs[a.key]) : null, show: g => cost(a, g.costs[a.key]) })),
  { key: "accuracy", label: D.metric, value: g => g.accuracy, show: accuracy },
  { key: "spread", label: "±", value: g => g.spread, show: g => spread(g).slice(2) },
  { key: "seeds", label: "seeds", value: g => g.points.length },
  { key: "overrides", label: "settings", text: true, value: g => g.differ.join(" "), wrap: true },
];
function fill() {
  const head = $("table").tHead, body = $("table").tBodies[0], column = COLUMNS.find(c => c.key === state.sort);
  const focused = document.activeElement?.dataset?.sort;
  head.replaceChildren(made("tr", {}, ...COLUMNS.map(c => {
    const b = made("button", { type: "button", textContent: c.label });
    b.dataset.sort = c.key;
    b.addEventListener("click", () => { state.down = state.sort === c.key ? !state.down : false; state.sort = c.key; fill(); });
    const th = made("th", { className: c.text ? "text" : "", scope: "col" }, b);
    if (c.key === state.sort) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    return th;
  })));
  if (focused) head.querySelector(`[data-sort="${focused}"]`)?.focus();
  const rows = D.groups.map((g, i) => ({ g, i })).filter(({ g }) => shown(g) && matches(g));
  rows.sort((p, q) => {
    const a = column.value(p.g), b = column.value(q.g);
    if (!known(a) || !known(b)) return known(b) - known(a); // what is not known comes last, whichever the direction
    const order = column.text ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
    return (state.down ? -order : order) || p.i - q.i;
  });
  body.replaceChildren(...rows.map(({ g, i }) => {
    const tr = made("tr", { className: state.pinned === i ? "pinned" : "" }, ...COLUMNS.map((c, k) => {
      const td = made("td", { className: (c.text ? "text" : "") + (c.wrap ? " wrap" : "") });
      const value = c.value(g), text = c.show ? c.show(g) : known(value) ? String(value) : "";
      if (k === 0) td.append(swatch(g.method));
      td.append(c.wrap ? made("code", { textContent: text }) : text);
      return td;
    }));
    tr.addEventListener("click", () => pin(i));
    return tr;
  }));
  $("count").textContent = `${rows.length} of ${D.groups.length}`;
}
function plain(table, columns, rows) {
  table.tHead.replaceChildren(made("tr", {}, ...columns.map(([name, text]) => made("th", { className: text ? "text" : "", textContent: name, scope: "col" }))));
  table.tBodies[0].replaceChildren(...rows.map(row => made("tr", {}, ...row.map((cell, k) => made("td", { className: (columns[k][1] ? "text" : "") + (columns[k][2] ? " wrap" : ""), textContent: cell })))));
}
function summary() {
  const table = made("table", {}, made("thead"), made("tbody"));
  plain(table, D.summary.columns.map((name, i) => [name, i === 0]), D.summary.rows);
  $("summary").replaceChildren(made("h2", { textContent: "Methods" }), made("div", { className: "scroll" }, table), made("p", { className: "note", textContent: D.summary.note }));
}

// Controls

$("lead").textContent = D.lead;
$("axis").append(...D.axes.map(a => made("option", { value: a.key, textContent: a.label, selected: a.key === state.axis })));
$("axis").addEventListener("change", event => { state.axis = event.target.value; draw(); });
$("seeds").addEventListener("change", event => { state.seeds = event.target.checked; draw(); });
$("filter").addEventListener("input", event => { state.text = event.target.value.trim(); draw(); fill(); });
$("legend").append(...D.methods.map(method => {
  const b = made("button", { type: "button", ariaPressed: "true" }, swatch(method), method);
  b.addEventListener("click", () => { state.hidden.has(method) ? state.hidden.delete(method) : state.hidden.add(method); b.ariaPressed = String(!state.hidden.has(method)); draw(); fill(); });
  return b;
}));
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && state.pinned !== null) pin(state.pinned); });
if (D.others.length) {
  $("others").hidden = false;
  plain($("others").querySelector("table"), [["run", true], ["state", true], ["progress", true], ["error", true, true], ["command", true, true]], D.others.map(o => [o.run, o.state, o.progress, o.error, o.command]));
}
summary();
pin(null);
