"""Accuracy against measured time, dense beside ours: python docs/figures/payoff.py

From docs/data/payoff.json, whose figures are those of the commands in it. The PNG is the README's.
"""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
from themes import HERE, THEMES, Theme, draw

DATA = json.loads((HERE.parent / "data" / "payoff.json").read_text())


def picture(theme: Theme) -> plt.Figure:
    points = DATA["points"]
    figure, axes = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
    dense = points[0]
    for index, point in enumerate(points):
        if index:
            axes.annotate(
                "", (point["ms"], point["accuracy"]), (dense["ms"], dense["accuracy"]),
                arrowprops={"arrowstyle": "->", "color": theme.soft, "shrinkA": 9, "shrinkB": 9},
            )  # fmt: skip
        axes.scatter(point["ms"], point["accuracy"], s=90, color=theme.lines[0] if index else theme.soft, zorder=3)
        times = f"{point['speedup']:.1f}x faster, " if index else ""
        above = index == 1  # the two of ours are side by side
        axes.annotate(
            f"{point['name']}\n{times}{point['kB']:,.0f} kB", (point["ms"], point["accuracy"]),
            (0, 12 if above else -12), textcoords="offset points", ha="center", va="bottom" if above else "top",
        )  # fmt: skip
    axes.set(xlabel=f"ms per picture, {DATA['runtime']}: left is faster", ylabel=f"accuracy, {DATA['data']}")
    axes.set_title(DATA["title"], loc="left", size=12)
    middle = sum(point["accuracy"] for point in points) / len(points)
    axes.set(ylim=(middle - 0.05, middle + 0.03), xlim=(0, 1.25 * dense["ms"]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color=theme.soft, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw("payoff", picture, DATA["title"])
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 11}):
        picture(THEMES[0]).savefig(HERE / "payoff.png", dpi=200, metadata={"Software": None})
