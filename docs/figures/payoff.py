"""Accuracy against measured time, dense beside ours: python docs/figures/payoff.py

From docs/data/payoff.json, whose figures are those of the commands in it.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from pl_sparse.results.style import BLUE, GREY, remove_frame, save

DOCS = Path(__file__).resolve().parent.parent


def picture(data: dict) -> Figure:
    points = data["points"]
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    dense = points[0]
    for point in points[1:]:
        axis.annotate(
            "", (point["ms"], point["accuracy"]), (dense["ms"], dense["accuracy"]),
            arrowprops={"arrowstyle": "->", "color": "#BFBFBF", "shrinkA": 9, "shrinkB": 9},
        )  # fmt: skip
    for index, point in enumerate(points):
        axis.scatter(point["ms"], point["accuracy"], s=90, color=BLUE if index else GREY, zorder=3)
        times = f"{dense['ms'] / point['ms']:.1f}x faster, " if index else ""
        label = f"{point['name']}\n{times}{point['kB']:,.0f} kB"
        above = index == 1  # the two of ours are side by side
        axis.annotate(
            label, (point["ms"], point["accuracy"]), (0, 12 if above else -12), textcoords="offset points",
            ha="center", va="bottom" if above else "top",
        )  # fmt: skip
    axis.set_xlabel(f"ms per picture, {data['runtime']}: left is faster")
    axis.set_ylabel(f"accuracy, {data['data']}")
    middle = sum(point["accuracy"] for point in points) / len(points)
    axis.set_ylim(middle - 0.05, middle + 0.03)
    axis.set_xlim(0, 1.25 * dense["ms"])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    remove_frame(axis)
    return figure


def main() -> None:
    data = json.loads((DOCS / "data" / "payoff.json").read_text())
    save(picture(data), DOCS / "figures" / "payoff.svg", data["title"])
    save(picture(data), DOCS / "figures" / "payoff.png", data["title"])


if __name__ == "__main__":
    main()
