// The plot: accuracy over a cost, and the box beside the point under the pointer.

// Units of the picture are pixels of the page, so that letters have one size on a phone and on a desk.
const HEIGHT = 470;
const LEFT = 66;
const TOP = 14;
const BOTTOM = HEIGHT - 50;
const LETTER = 7; // width of a letter of a label, about
let width = 860;
let right = width - 18;

// Scales

// Round numbers from low to high, about as many as `count`.
function ticks(low, high, count = 6) {
  const raw = (high - low) / count || 1e-3;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const values = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) {
    values.push(+value.toPrecision(12));
  }
  return values;
}

// 1, 2 and 5 times the powers of ten from low to high, given as logarithms.
function logTicks(low, high) {
  const values = [];
  for (let exponent = Math.floor(low) - 1; exponent <= Math.ceil(high); exponent++) {
    values.push(...[1, 2, 5].map((factor) => factor * 10 ** exponent));
  }
  return values.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}

// From left to right: sparsity rises, every other cost too. Costs that span a wide range have a logarithmic scale.
function costScale(axis, costs) {
  const least = Math.min(...costs);
  const most = Math.max(...costs);
  const logarithmic = least > 0 && (axis.sparsity || most / least > 8);
  const transform = logarithmic ? Math.log10 : (value) => value;
  let low = transform(least);
  let high = transform(most);
  const padding = (high - low) * 0.06 || (logarithmic ? 0.1 : Math.abs(low) * 0.1 || 0.1);
  low -= padding;
  high += padding;
  const share = (cost) => (axis.sparsity ? high - transform(cost) : transform(cost) - low) / (high - low);
  const place = (cost) => LEFT + (right - LEFT) * share(cost);
  if (!logarithmic) return { place, values: ticks(low, high) };
  let values = logTicks(low, high).filter((value) => !(axis.sparsity && value > 1));
  if (values.length < 3) values = ticks(least, most, 5).filter((value) => value > 0);
  return { place, values };
}

function accuracyScale(accuracies) {
  let low = Math.min(...accuracies);
  let high = Math.max(...accuracies);
  const padding = (high - low) * 0.06 || 0.01;
  low -= padding;
  high += padding;
  const place = (accuracy) => BOTTOM - ((BOTTOM - TOP) * (accuracy - low)) / (high - low);
  return { place, values: ticks(low, high) };
}

// Drawing

function draw() {
  const svg = byId("svg");
  const axis = currentAxis();
  svg.replaceChildren();
  width = Math.max(byId("plot").clientWidth || 860, 280);
  right = width - 18;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const drawn = DATA.groups.filter(
    (series) => isShown(series) && isKnown(series.accuracy) && isKnown(series.costs[axis.key]),
  );
  byId("note").textContent =
    (DATA.dense.length === 1 ? "Dashed: the dense model. " : "") +
    "Bars: one standard deviation over the seeds. " +
    "Lines: the models of a method that none of it beats in both respects; faint: the others." +
    (drawn.length ? "" : " No model has this cost.");
  if (!drawn.length) return;

  const points = state.seeds ? drawn.flatMap((series) => series.points) : [];
  const costs = [...drawn, ...points].map((model) => model.costs[axis.key]).filter(isKnown);
  const accuracies = [
    ...drawn.flatMap(({ accuracy, spread }) => [accuracy - (spread || 0), accuracy + (spread || 0)]),
    ...points.map((point) => point.accuracy).filter(isKnown),
    ...DATA.dense,
  ];
  const x = costScale(axis, costs);
  const y = accuracyScale(accuracies);
  const plot = { svg, axis, x: x.place, y: y.place };
  drawFrame(plot, x.values, y.values);
  for (const method of DATA.methods) drawFront(plot, drawn, method);
  for (const series of drawn) drawSeries(plot, series);
}

function drawFrame({ svg, axis, x, y }, costs, accuracies) {
  const text = (content, attributes) => {
    svgElement("text", { "text-anchor": "middle", ...attributes }, svg).textContent = content;
  };
  for (const accuracy of accuracies) {
    svgElement("line", { class: "grid", x1: LEFT, x2: right, y1: y(accuracy), y2: y(accuracy) }, svg);
    const label = DATA.fraction ? rounded(100 * accuracy, 6) + " %" : rounded(accuracy, 6);
    text(label, { x: LEFT - 8, y: y(accuracy) + 4, "text-anchor": "end" });
  }
  const labelOf = (cost) => (axis.sparsity ? rounded(100 * (1 - cost), 6) + " %" : withUnit(cost, axis.unit));
  for (const cost of costs) svgElement("line", { class: "grid", x1: x(cost), x2: x(cost), y1: TOP, y2: BOTTOM }, svg);
  let end = -Infinity; // of the label before: one that has no room is left out
  for (const cost of [...costs].sort((a, b) => x(a) - x(b))) {
    const half = (labelOf(cost).length * LETTER) / 2;
    if (x(cost) - half < end + LETTER || x(cost) + half > width) continue;
    text(labelOf(cost), { x: x(cost), y: BOTTOM + 19 });
    end = x(cost) + half;
  }
  svgElement("line", { class: "frame", x1: LEFT, x2: right, y1: BOTTOM, y2: BOTTOM }, svg);
  text(axis.label + (axis.sparsity ? "" : " (less is better)"), { x: (LEFT + right) / 2, y: HEIGHT - 10 });
  text(DATA.metric, { transform: `translate(16 ${(TOP + BOTTOM) / 2}) rotate(-90)` });
  if (DATA.dense.length === 1) {
    const [baseline] = DATA.dense;
    svgElement("line", { class: "dense", x1: LEFT, x2: right, y1: y(baseline), y2: y(baseline) }, svg);
  }
}

const frontOf = (axis, method) => DATA.fronts[axis.key][method] || [];

function drawFront({ svg, axis, x, y }, drawn, method) {
  const front = frontOf(axis, method)
    .map((index) => drawn.find((series) => series.index === index))
    .filter(Boolean);
  if (front.length < 2) return;
  const points = front.map((series) => `${x(series.costs[axis.key])},${y(series.accuracy)}`).join(" ");
  svgElement("polyline", { class: "front", stroke: colourOf(method), points }, svg);
}

function drawSeries(plot, series) {
  const { axis, x, y } = plot;
  const { accuracy, spread, method } = series;
  const cost = series.costs[axis.key];
  const costSpread = series.spreads[axis.key] || 0;
  const errorBar = (ends) => {
    const faint = matchesFilter(series) ? "" : " dim";
    svgElement("line", { class: "error" + faint, stroke: colourOf(method), ...ends }, plot.svg);
  };
  if (isKnown(spread)) errorBar({ x1: x(cost), x2: x(cost), y1: y(accuracy - spread), y2: y(accuracy + spread) });
  if (costSpread > 0 && cost - costSpread > 0) {
    errorBar({ x1: x(cost - costSpread), x2: x(cost + costSpread), y1: y(accuracy), y2: y(accuracy) });
  }
  if (state.seeds) {
    for (const point of series.points) {
      if (isKnown(point.accuracy) && isKnown(point.costs[axis.key])) {
        drawMark(plot, series, point, { size: 3.2, kind: "seed", label: `${method}, ${point.run}` });
      }
    }
  }
  const unbeaten = frontOf(axis, method).includes(series.index);
  drawMark(plot, series, null, {
    size: 6,
    kind: unbeaten ? "mean" : "mean beaten",
    label: `${method}, ${DATA.metric} ${accuracyText(accuracy)}, ${costText(axis, cost)}`,
  });
}

// The mark of a series, or of one of its points.
function drawMark({ svg, axis, x, y }, series, point, { size, kind, label }) {
  const model = point || series;
  const left = x(model.costs[axis.key]);
  const top = y(model.accuracy);
  const faint = matchesFilter(series) ? "" : " dim";
  const pinned = state.pinned === series.index ? " pinned" : "";
  const attributes = {
    class: `mark ${kind}${faint}${pinned}`,
    d: markerOf(series.method),
    fill: colourOf(series.method),
    transform: `translate(${left} ${top}) scale(${size})`,
    "vector-effect": "non-scaling-stroke",
    role: "button",
    "aria-label": label,
    "data-group": series.index,
  };
  const mark = svgElement("path", attributes, svg);
  if (!point) mark.setAttribute("tabindex", 0);
  for (const name of ["pointerenter", "focus"]) mark.addEventListener(name, () => showTip(series, point, left, top));
  for (const name of ["pointerleave", "blur"]) mark.addEventListener(name, hideTip);
  mark.addEventListener("click", () => pin(series.index));
  mark.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pin(series.index);
    }
  });
}

// The box beside a mark

// The figures of a series, or of one of its points.
function figures(series, point = null) {
  const list = element("dl");
  const add = (name, value) => {
    if (value !== "") list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
  };
  const spread = !point && isKnown(series.spread) ? ` ± ${spreadText(series.spread)}` : "";
  add(DATA.metric, accuracyText((point || series).accuracy) + spread);
  if (!point && series.points.length > 1) add("seeds", String(series.points.length));
  for (const axis of DATA.axes) add(axis.short, costText(axis, (point || series).costs[axis.key]));
  return list;
}

// Right of the mark, or left of it where there is no room. `left` and `top` are in pixels.
function showTip(series, point, left, top) {
  const tip = byId("tip");
  const { clientWidth, clientHeight } = byId("plot");
  const settings = (point || series).overrides.join(" ") || "no overrides";
  tip.replaceChildren(
    element("strong", { textContent: series.method }),
    figures(series, point),
    element("code", { textContent: settings }),
  );
  tip.hidden = false;
  const fits = left + 14 + tip.offsetWidth <= clientWidth;
  tip.style.left = `${Math.max(0, fits ? left + 14 : left - 14 - tip.offsetWidth)}px`;
  tip.style.top = `${Math.max(0, Math.min(top - 10, clientHeight - tip.offsetHeight))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}
