"use strict";

// The data, the state of the page, elements, and numbers as text.
// data.js, plot.js, tables.js and controls.js are one script in the page, in this order.

// The contents of pareto.json. A series is one of DATA.groups: the models that differ by the seed alone.
const DATA = JSON.parse(document.getElementById("data").textContent);
DATA.groups.forEach((series, index) => (series.index = index));

const state = {
  axis: DATA.axis, // key of the cost in the plot
  seeds: false, // whether the plot shows single seeds
  hidden: new Set(), // methods that are switched off
  filter: "", // words that a series has to contain
  sort: "sparsity", // key of the column that the table is sorted by
  descending: false,
  pinned: null, // index of a series
};

const currentAxis = () => DATA.axes.find((axis) => axis.key === state.axis);
const isShown = (series) => !state.hidden.has(series.method);
const matchesFilter = (series) => {
  const words = state.filter.toLowerCase().split(/\s+/);
  return words.every((word) => series.search.toLowerCase().includes(word));
};

// Elements. Text is only ever set as text, so no name of a run or of a setting is read as markup.

const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

function svgElement(tag, attributes, parent = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}

// Colour and marker of a method

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C8C8C"];
const MARKERS = [
  "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z", // a circle of radius 1, and others of about its area
  "M-.9-.9H.9V.9H-.9Z",
  "M0-1.25L1.15.85H-1.15Z",
  "M0-1.3L1.3 0 0 1.3-1.3 0Z",
  "M0 1.25L1.15-.85H-1.15Z",
];

function colourOf(method) {
  return COLOURS[DATA.methods.indexOf(method) % COLOURS.length];
}

function markerOf(method) {
  const index = DATA.methods.indexOf(method);
  return MARKERS[(index + Math.floor(index / COLOURS.length)) % MARKERS.length];
}

function swatch(method) {
  const svg = svgElement("svg", { viewBox: "-1.5 -1.5 3 3", class: "swatch", "aria-hidden": "true" });
  svgElement("path", { d: markerOf(method), fill: colourOf(method) }, svg);
  return svg;
}

// Numbers as text; a missing one is empty.

const isKnown = (value) => value !== null && value !== undefined;
const rounded = (value, digits) => String(+value.toPrecision(digits));
const percent = (fraction) => (100 * fraction).toFixed(2) + " %";

function withPrefix(value, unit) {
  const prefixes = ["", "k", "M", "G", "T"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < prefixes.length - 1) {
    value /= 1000;
    power++;
  }
  return rounded(value, 3) + " " + prefixes[power] + unit;
}

function withUnit(value, unit) {
  return unit === "ms" ? rounded(value, 3) + " ms" : withPrefix(value, unit);
}

function costText(axis, cost) {
  if (!isKnown(cost)) return "";
  return axis.sparsity ? percent(1 - cost) : withUnit(cost, axis.unit);
}

function accuracyText(accuracy) {
  if (!isKnown(accuracy)) return "";
  return DATA.fraction ? percent(accuracy) : rounded(accuracy, 5);
}

function spreadText(spread) {
  if (!isKnown(spread)) return "";
  return DATA.fraction ? (100 * spread).toFixed(2) : rounded(spread, 3);
}
