// The controls, and the first drawing of everything.

byId("lead").textContent = DATA.lead;

byId("axis").append(
  ...DATA.axes.map(({ key, label }) =>
    element("option", { value: key, textContent: label, selected: key === state.axis }),
  ),
);
byId("axis").addEventListener("change", (event) => {
  state.axis = event.target.value;
  draw();
});

byId("seeds").addEventListener("change", (event) => {
  state.seeds = event.target.checked;
  draw();
});

byId("filter").addEventListener("input", (event) => {
  state.filter = event.target.value.trim();
  draw();
  fillModels();
});

function legendButton(method) {
  const button = element("button", { type: "button", ariaPressed: "true" }, swatch(method), method);
  button.addEventListener("click", () => {
    if (!state.hidden.delete(method)) state.hidden.add(method);
    button.ariaPressed = String(!state.hidden.has(method));
    draw();
    fillModels();
  });
  return button;
}
byId("legend").append(...DATA.methods.map(legendButton));

byId("theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  const theme = dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  dataset.theme = theme === "dark" ? "light" : "dark";
});

window.addEventListener("resize", draw);

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.pinned !== null) pin(state.pinned);
});

fillSummary();
fillOthers();
pin(null);
