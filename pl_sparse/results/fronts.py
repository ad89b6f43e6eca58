"""Accuracy against the costs of a model: series of runs, their fronts, hypervolume, the best under a constraint.

A run is a folder that training has left. A point is one model of a run. Points that differ by the seed alone are one
series, and series are compared by their means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pl_sparse.results.runs import CHOICES, Run, beside, key_of

__all__ = [
    "AXES",
    "CostAxis",
    "Point",
    "Series",
    "baselines",
    "best",
    "finite_or_none",
    "front",
    "hypervolume",
    "merge_seeds",
    "methods",
    "metric",
    "of_method",
    "pareto",
    "smallest",
]

# Settings that no label shows, but those beside: the seed, the sparsity, which is an axis of its own, and loggers.
_UNLABELLED = ("seed", "sparsity", "schedule.final", "front", "logger")


# Costs


@dataclass(frozen=True)
class CostAxis:
    """One cost of a model; lower is better.

    Attributes:
        key: its name.
        label: its name in a picture.
        path: the keys that lead to its value in the metrics.
        dense_path: the keys that lead to the value of the dense model, which is 1 on the scale of the hypervolume.
        unit: "" for a fraction.
        sparsity: whether the metrics hold 1 - cost.
    """

    key: str
    label: str
    path: tuple[str, ...]
    dense_path: tuple[str, ...] = ()
    unit: str = ""
    sparsity: bool = False

    def cost(self, metrics: Mapping[str, Any]) -> float:
        """The cost; NaN where the metrics lack it."""
        value = _lookup(metrics, self.path)
        return 1 - value if self.sparsity else value

    def share(self, metrics: Mapping[str, Any]) -> float:
        """The cost as a fraction of the dense model's; NaN where the metrics lack either."""
        dense = _lookup(metrics, self.dense_path) if self.dense_path else 1.0
        return self.cost(metrics) / dense if dense else math.nan


AXES = {
    axis.key: axis
    for axis in (
        CostAxis("sparsity", "sparsity of the prunable weights", ("sparsity",), sparsity=True),
        CostAxis("size", "size, compressed", ("size_bytes", "compressed"), ("size_bytes", "dense"), "B"),
        CostAxis("macs", "multiply-accumulates per sample", ("macs_sparse",), ("macs_dense",), "MAC"),
        CostAxis("latency", "latency, one sample", ("latency_ms",), ("latency_dense_ms",), "ms"),
        CostAxis("exported", "size of the exported file", ("size_bytes", "exported"), ("size_bytes", "dense"), "B"),
    )
}
"""The costs of a model by key. The cost of a sparsity is the density, 1 - sparsity."""


def _lookup(metrics: Mapping[str, Any], path: Sequence[str]) -> float:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it: None for NaN and infinities."""
    return value if math.isfinite(value) else None


# Series


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        run: the run that it belongs to.
        metrics: its metrics.
    """

    run: Run
    metrics: Mapping[str, Any]

    def value(self, key: str) -> float:
        """A metric; NaN where it is missing."""
        return _lookup(self.metrics, (key,))


@dataclass(frozen=True)
class Series:
    """Points that differ by the seed alone.

    Attributes:
        label: what sets its method apart from the others, e.g. "movement 2:4".
        points: one per seed.
    """

    label: str
    points: tuple[Point, ...]

    def accuracy(self, key: str) -> float:
        """The mean of a metric over the seeds."""
        return _mean(point.value(key) for point in self.points)

    def spread(self, key: str) -> float:
        """The sample standard deviation of a metric over the seeds; NaN for a single seed."""
        values = [value for point in self.points if math.isfinite(value := point.value(key))]
        return stdev(values) if len(values) > 1 else math.nan

    def cost(self, axis: CostAxis) -> float:
        """The mean of a cost over the seeds."""
        return _mean(axis.cost(point.metrics) for point in self.points)

    def cost_spread(self, axis: CostAxis) -> float:
        """The sample standard deviation of a cost over the seeds; 0 for a single seed."""
        costs = [cost for point in self.points if math.isfinite(cost := axis.cost(point.metrics))]
        return stdev(costs) if len(costs) > 1 else 0.0

    def share(self, axis: CostAxis) -> float:
        """The mean over the seeds of a cost as a fraction of the dense model's."""
        return _mean(axis.share(point.metrics) for point in self.points)

    @property
    def task(self) -> str:
        """Data and model. Accuracies are compared within a task."""
        settings = self.points[0].run.decisive
        return repr(sorted((key, value) for key, value in settings.items() if key.startswith(("data.", "model."))))


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return mean(finite) if finite else math.nan


def merge_seeds(runs: Sequence[Run]) -> list[Series]:
    """The models of some runs, merged where they differ by the seed alone, and in what decides nothing of a training.

    Args:
        runs: the runs, each with any number of models.

    Returns:
        the series, in the order of their first run, labelled by the settings that vary among the runs.
    """
    points = [Point(run, metrics) for run in runs for metrics in run.models]
    labels = _labels(points)
    members: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for point in points:
        level = round(point.value("sparsity"), 3) if len(point.run.models) > 1 else None
        if point.run.config:
            settings = repr(sorted(point.run.decisive.items()))
        else:  # the metrics have to do
            settings = repr([point.metrics.get(key) for key in (*CHOICES, "sparsity_requested")])
        members[labels[id(point)], settings, level].append(point)
    return [Series(key[0], tuple(seeds)) for key, seeds in members.items()]


def _labels(points: Sequence[Point]) -> dict[int, str]:
    """The label of each point by its id: the fewest settings that distinguish the methods.

    A setting is part of the labels if its values split points that all settings before it left together.
    """
    keys = dict.fromkeys(key_of(o) for point in points for o in point.run.overrides)
    parts: dict[int, tuple[str, ...]] = {id(point): () for point in points}
    for key in (*CHOICES, *(key for key in keys if key not in (*_UNLABELLED, *CHOICES) and not beside(key))):
        values = {
            id(point): str((point.metrics.get(key) if key in CHOICES else point.run.setting(key)) or "")
            for point in points
        }
        if len({(parts[i], values[i]) for i in parts}) > len(set(parts.values())):
            for i, value in values.items():
                # a number or a flag says nothing without its key
                with_key = key not in CHOICES and value and _needs_key(value)
                parts[i] = (*parts[i], f"{key}={value}" if with_key else value)
    return {
        id(point): " ".join(filter(None, parts[id(point)])) or str(point.metrics.get("method") or "model")
        for point in points
    }


def _needs_key(value: str) -> bool:
    return value.lower() in ("true", "false", "null", "none") or value[0] in "0123456789.-[{'\""


def methods(all_series: Sequence[Series]) -> list[str]:
    """The labels, each once."""
    return list(dict.fromkeys(series.label for series in all_series))


def of_method(all_series: Sequence[Series], label: str) -> list[Series]:
    """The series with a label."""
    return [series for series in all_series if series.label == label]


def metric(all_series: Sequence[Series]) -> str:
    """The accuracy that most of the models have: of the test data before that of the validation data.

    Where no model has one, the metric of test or validation that most have and that is not a loss.
    """
    points = [point for series in all_series for point in series.points]
    logged = dict.fromkeys(key for point in points for key in point.metrics if key.startswith(("test", "val")))
    for keys in (("test/acc", "val/acc"), tuple(key for key in logged if "loss" not in key)):
        counts = {key: sum(math.isfinite(point.value(key)) for point in points) for key in keys}
        if any(counts.values()):
            return max(counts, key=lambda key: counts[key])
    return "test/acc"


# Comparing


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The points (cost, value) that no other point beats.

    One beats another that costs at least as much and is worth at most as much, and is not its equal. Of equal points
    all are kept; those that are not finite are left out.

    Args:
        costs: the cost of each point; lower is better.
        values: the value of each point; higher is better.

    Returns:
        the places of these points, by rising cost.

    >>> pareto([3, 1, 2, 2], [0.9, 0.5, 0.4, 0.9])
    [1, 3]
    """
    finite = [i for i in range(len(costs)) if math.isfinite(costs[i]) and math.isfinite(values[i])]
    unbeaten: list[int] = []
    for i in sorted(finite, key=lambda i: (costs[i], -values[i])):
        highest = values[unbeaten[-1]] if unbeaten else -math.inf
        if values[i] > highest or (unbeaten and values[i] == highest and costs[i] == costs[unbeaten[-1]]):
            unbeaten.append(i)
    return unbeaten


def hypervolume(costs: Sequence[float], values: Sequence[float], reference: tuple[float, float] = (1.0, 0.0)) -> float:
    """The area between a front and a reference point that is worse than all of it: larger is better.

    Points that are worse than the reference in either respect add nothing. With costs as fractions of the dense model's
    and accuracies, the reference (1, 0) is a model as costly as the dense one that is always wrong, and the area is at
    most 1.

    Source: Zitzler, Thiele, Multiobjective evolutionary algorithms, 1999, section III ("size of the space covered").

    Args:
        costs: the cost of each point; lower is better.
        values: the value of each point; higher is better.
        reference: the cost and the value of the reference point.

    >>> round(hypervolume([0.1, 0.5], [0.8, 0.9]), 3)
    0.77
    """
    area, height = 0.0, reference[1]
    for i in pareto(costs, values):
        if costs[i] < reference[0] and values[i] > height:
            area += (reference[0] - costs[i]) * (values[i] - height)
            height = values[i]
    return area


def front(all_series: Sequence[Series], axis: CostAxis, key: str) -> list[Series]:
    """The series that no other beats.

    Args:
        all_series: the series to compare.
        axis: their cost.
        key: the metric that is their value.

    Returns:
        the front, by rising cost.
    """
    costs, values = ([s.cost(axis) for s in all_series], [s.accuracy(key) for s in all_series])
    return [all_series[i] for i in pareto(costs, values)]


def baselines(all_series: Sequence[Series], key: str) -> dict[str, float]:
    """The baseline accuracy of each task: the best at sparsity 0. Tasks without such a model are left out."""
    accuracies: dict[str, float] = {}
    for series in all_series:
        accuracy = series.accuracy(key)
        if series.cost(AXES["sparsity"]) == 1 and math.isfinite(accuracy):
            accuracies[series.task] = max(accuracy, accuracies.get(series.task, -math.inf))
    return accuracies


def smallest(
    all_series: Sequence[Series], axis: CostAxis, key: str, baseline: float | Mapping[str, float], drop: float = 0.01
) -> Series | None:
    """The cheapest series whose accuracy is at most `drop` below the baseline.

    Args:
        all_series: the series to choose from.
        axis: the cost that is to be low.
        key: the metric that is compared with the baseline.
        baseline: the baseline accuracy, or that of each task, as `baselines` returns them.
        drop: the loss of accuracy that is allowed.

    Returns:
        of equally cheap series the most accurate one; None if there is none, or no baseline to compare with.
    """

    def required(series: Series) -> float:
        accuracy = baseline.get(series.task, math.nan) if isinstance(baseline, Mapping) else baseline
        return accuracy - drop - 1e-12  # a drop of exactly `drop` is allowed, whatever the rounding

    near = [s for s in all_series if math.isfinite(s.cost(axis)) and s.accuracy(key) >= required(s)]
    return min(near, key=lambda s: (s.cost(axis), -s.accuracy(key)), default=None)


def best(all_series: Sequence[Series], axis: CostAxis, key: str, at_most: float) -> Series | None:
    """The most accurate series below a limit of a cost.

    Args:
        all_series: the series to choose from.
        axis: the cost that is limited.
        key: the metric that is to be high.
        at_most: the limit, in the unit of the metrics.

    Returns:
        of equally accurate series the cheapest one; None if there is none.
    """
    within = [s for s in all_series if s.cost(axis) <= at_most and math.isfinite(s.accuracy(key))]
    return max(within, key=lambda s: (s.accuracy(key), -s.cost(axis)), default=None)
