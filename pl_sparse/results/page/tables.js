// The tables, and the card with the command and the files of the series that is pinned.

// The pinned series

function pin(index) {
  state.pinned = state.pinned === index ? null : index;
  byId("pin").replaceChildren(...(state.pinned === null ? [pinHint()] : pinCard(DATA.groups[index])));
  draw();
  fillModels();
}

function pinHint() {
  return element("p", { className: "note", textContent: "Choose a point or a row to see its command and its files." });
}

function pinCard(series) {
  const close = element("button", { type: "button", textContent: "✕", ariaLabel: "close" });
  close.addEventListener("click", () => pin(series.index));
  const title = element("h2", {}, swatch(series.method), series.method);
  return [element("div", { className: "bar" }, title, close), figures(series), ...series.points.flatMap(pinnedPoint)];
}

function pinnedPoint(point) {
  const copy = element("button", { type: "button", textContent: "copy" });
  const copied = () => {
    copy.textContent = "copied";
  };
  const refused = () => {}; // the command can still be selected by hand
  copy.addEventListener("click", () => navigator.clipboard?.writeText(point.command).then(copied, refused));
  const links = point.files.map(([name, href]) => element("li", {}, element("a", { href, textContent: name })));
  return [
    element("div", { className: "bar" }, element("strong", { textContent: point.run }), copy),
    element("pre", {}, element("code", { textContent: point.command })),
    element("ul", {}, ...links),
  ];
}

// The table of models

// A column: `value` is what it is sorted by, `show` the text of a cell where that is not the value itself.
const COLUMNS = [
  { key: "method", label: "method", text: true, value: (series) => series.method },
  ...DATA.axes.map((axis) => ({
    key: axis.key,
    label: axis.short,
    value: ({ costs }) => (axis.sparsity && isKnown(costs[axis.key]) ? 1 - costs[axis.key] : costs[axis.key]),
    show: ({ costs }) => costText(axis, costs[axis.key]),
  })),
  {
    key: "accuracy",
    label: DATA.metric,
    value: (series) => series.accuracy,
    show: (series) => accuracyText(series.accuracy),
  },
  { key: "spread", label: "±", value: (series) => series.spread, show: (series) => spreadText(series.spread) },
  { key: "seeds", label: "seeds", value: (series) => series.points.length },
  { key: "overrides", label: "settings", text: true, wrap: true, value: (series) => series.differ.join(" ") },
];

function fillModels() {
  const head = byId("table").tHead;
  const focused = document.activeElement?.dataset?.sort;
  head.replaceChildren(element("tr", {}, ...COLUMNS.map(headCell)));
  if (focused) head.querySelector(`[data-sort="${focused}"]`)?.focus();
  const rows = DATA.groups.filter((series) => isShown(series) && matchesFilter(series)).sort(compare);
  byId("table").tBodies[0].replaceChildren(...rows.map(modelRow));
  byId("count").textContent = `${rows.length} of ${DATA.groups.length}`;
}

function headCell(column) {
  const button = element("button", { type: "button", textContent: column.label });
  button.dataset.sort = column.key;
  button.addEventListener("click", () => {
    state.descending = state.sort === column.key && !state.descending;
    state.sort = column.key;
    fillModels();
  });
  const cell = element("th", { className: column.text ? "text" : "", scope: "col" }, button);
  if (column.key === state.sort) cell.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
  return cell;
}

// The order of two series in the column that the table is sorted by.
function compare(first, second) {
  const column = COLUMNS.find(({ key }) => key === state.sort);
  const a = column.value(first);
  const b = column.value(second);
  if (!isKnown(a) || !isKnown(b)) return isKnown(b) - isKnown(a); // missing values come last in both directions
  const order = column.text ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  return (state.descending ? -order : order) || first.index - second.index;
}

function modelRow(series) {
  const cells = COLUMNS.map((column) => {
    const value = column.value(series);
    const text = column.show ? column.show(series) : String(value);
    const cell = element("td", { className: cellClass(column) });
    if (column.key === "method") cell.append(swatch(series.method));
    cell.append(column.wrap ? element("code", { textContent: text }) : text);
    return cell;
  });
  const row = element("tr", { className: state.pinned === series.index ? "pinned" : "" }, ...cells);
  row.addEventListener("click", () => pin(series.index));
  return row;
}

const cellClass = (column) => (column.text ? "text" : "") + (column.wrap ? " wrap" : "");

// Tables of text

function fillTable(table, columns, rows) {
  const headCells = columns.map((column) =>
    element("th", { className: column.text ? "text" : "", textContent: column.label, scope: "col" }),
  );
  table.tHead.replaceChildren(element("tr", {}, ...headCells));
  const bodyRows = rows.map((row) => {
    const cells = row.map((text, i) => element("td", { className: cellClass(columns[i]), textContent: text }));
    return element("tr", {}, ...cells);
  });
  table.tBodies[0].replaceChildren(...bodyRows);
}

function fillSummary() {
  const table = element("table", {}, element("thead"), element("tbody"));
  const columns = DATA.summary.columns.map((label, i) => ({ label, text: i === 0 }));
  fillTable(table, columns, DATA.summary.rows);
  byId("summary").replaceChildren(
    element("h2", { textContent: "Methods" }),
    element("div", { className: "scroll" }, table),
    element("p", { className: "note", textContent: DATA.summary.note }),
  );
}

// Runs without a result
function fillOthers() {
  if (!DATA.others.length) return;
  byId("others").hidden = false;
  const columns = ["run", "state", "progress", "error", "command"].map((label) => ({
    label,
    text: true,
    wrap: label === "error" || label === "command",
  }));
  const rows = DATA.others.map((run) => columns.map(({ label }) => run[label]));
  fillTable(byId("others").querySelector("table"), columns, rows);
}
