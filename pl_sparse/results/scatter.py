"""The picture of a set of runs: accuracy against a cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from pl_sparse.results.fronts import CostAxis, Series, front, methods, of_method
from pl_sparse.results.style import PALETTE, remove_frame, save

__all__ = ["plot_scatter"]

_MARKERS = "os^Dv"


def plot_scatter(
    all_series: Sequence[Series], axis: CostAxis, key: str, baselines: Sequence[float], path: Path
) -> None:
    """Draw mean and standard deviation of each series, and the front of each method as a line.

    Args:
        all_series: the series; those without the cost or the accuracy are left out.
        axis: the cost, drawn from left to right.
        key: the accuracy, drawn upwards.
        baselines: the baseline accuracies; a single one is drawn as a dashed line.
        path: the picture; its suffix gives the format.
    """
    finite = [s for s in all_series if math.isfinite(s.cost(axis)) and math.isfinite(s.accuracy(key))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for place, label in enumerate(methods(all_series)):
        if of_method(finite, label):
            _plot_method(ax, of_method(finite, label), axis, key, place)
    if len(baselines) == 1:
        label_of_line = None if "dense" in methods(all_series) else "dense"
        ax.axhline(baselines[0], color="0.5", linestyle="--", linewidth=1, label=label_of_line)
    _scale(ax, axis, [s.cost(axis) for s in finite])
    ax.set_xlabel(axis.label + (f" [{axis.unit}]" if axis.unit else ""))
    ax.set_ylabel(key)
    if key.endswith("acc"):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    remove_frame(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    save(figure, path)


def _plot_method(ax: Axes, of_label: Sequence[Series], axis: CostAxis, key: str, place: int) -> None:
    """Draw the series of the method at a place in the list of methods: its front in full colour, the others faint."""
    colour, marker = PALETTE[place % 8], _MARKERS[(place + place // 8) % 5]
    unbeaten = front(of_label, axis, key)
    beaten = [s for s in of_label if s not in unbeaten]
    for drawn, line, alpha in ((unbeaten, "-", 1.0), (beaten, "", 0.4)):
        ax.plot(
            [s.cost(axis) for s in drawn],
            [s.accuracy(key) for s in drawn],
            color=colour,
            marker=marker,
            markersize=6,
            linestyle=line,
            alpha=alpha,
            label=of_label[0].label if drawn is unbeaten else None,
        )
    ax.errorbar(
        [s.cost(axis) for s in of_label],
        [s.accuracy(key) for s in of_label],
        [spread if math.isfinite(spread := s.spread(key)) else 0.0 for s in of_label],
        [s.cost_spread(axis) for s in of_label],
        fmt="none",
        ecolor=colour,
        alpha=0.7,
        capsize=3,
    )


def _scale(ax: Axes, axis: CostAxis, costs: Sequence[float]) -> None:
    """Scale the cost logarithmically where it spans a wide range; sparsity rises from left to right, in percent."""
    if costs and min(costs) > 0 and (axis.sparsity or max(costs) > 8 * min(costs)):
        if min(costs) == max(costs):
            ax.set_xlim(costs[0] / 2, 2 * costs[0])  # one place alone sets no limits
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        if axis.sparsity:
            ax.set_xticks(sorted({round(cost, 4) for cost in costs}))
            ax.set_xticks([], minor=True)
    if axis.sparsity:
        ax.invert_xaxis()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * (1 - density):.4g} %"))
