"""How the seconds of a global mask grow with the weights: python docs/figures/growth.py

From docs/data/topk.json, which `python benchmarks/topk.py --json docs/data/topk.json` writes.
"""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
from themes import HERE, Theme, draw

ROWS = json.loads((HERE.parent / "data" / "topk.json").read_text())["rows"]


def picture(theme: Theme) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for way, colour in zip(dict.fromkeys(row["way"] for row in ROWS), theme.lines, strict=False):
        points = [(1e6 * row["millions"], row["seconds"]) for row in ROWS if row["way"] == way]
        axes.loglog(*zip(*points, strict=True), marker="o", color=colour)
        axes.annotate(way, points[-1], (0, 9), textcoords="offset points", ha="right", va="bottom", color=colour)
    axes.set(xlabel="weights", ylabel="seconds of the processor")
    axes.margins(y=0.18)
    axes.grid(color=theme.soft, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw("growth", picture, "seconds of the exact mask of the 10 % largest weights")
