"""The picture of a set of runs: accuracy against what a model costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pl_sparse.core.files import replacing
from pl_sparse.results.fronts import Axis, Group, _deviation, _methods, front

__all__ = []

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C8C8C")
_MARKERS = "os^Dv"


def _plot(groups: Sequence[Group], axis: Axis, key: str, lines: Sequence[float], path: Path) -> None:
    """Mean and standard deviation of each group, the front of each method as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    shown = [g for g in groups if math.isfinite(g.cost(axis)) and math.isfinite(g.accuracy(key))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for i, label in enumerate(_methods(groups)):
        own = [g for g in shown if g.label == label]
        if not own:
            continue
        style: dict[str, Any] = {"color": _COLOURS[i % 8], "marker": _MARKERS[(i + i // 8) % 5], "markersize": 6}
        edge = front(own, axis, key)
        ax.plot([g.cost(axis) for g in edge], [g.accuracy(key) for g in edge], label=label, **style)
        beaten = [g for g in own if g not in edge]
        ax.plot([g.cost(axis) for g in beaten], [g.accuracy(key) for g in beaten], linestyle="", alpha=0.4, **style)
        spreads = [g.spread(key) if math.isfinite(g.spread(key)) else 0.0 for g in own]
        ax.errorbar(
            [g.cost(axis) for g in own],
            [g.accuracy(key) for g in own],
            spreads,
            [_deviation(g, axis) for g in own],
            fmt="none",
            ecolor=style["color"],
            alpha=0.7,
            capsize=3,
        )
    if len(lines) == 1:
        ax.axhline(
            lines[0], color="0.5", linestyle="--", linewidth=1, label=None if "dense" in _methods(groups) else "dense"
        )
    costs = [g.cost(axis) for g in shown]
    if costs and min(costs) > 0 and (axis.sparsity or max(costs) > 8 * min(costs)):
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        if axis.sparsity:
            ax.set_xticks(sorted({round(cost, 4) for cost in costs}))
            ax.set_xticks([], minor=True)
    if axis.sparsity:
        ax.invert_xaxis()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * (1 - x):.4g} %"))
    ax.set_xlabel(axis.label + (f" [{axis.unit}]" if axis.unit else ""))
    ax.set_ylabel(key)
    if key.endswith("acc"):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#D9D9D9", linewidth=0.6)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
