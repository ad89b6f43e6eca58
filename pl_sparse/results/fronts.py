"""Runs as points: accuracy against what a model costs, which of them no other beats, and the best under a constraint.

A run is a folder that training has left; a point is a model of it. Points that differ by nothing but the seed are one
group, and groups are compared by their means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pl_sparse.results.runs import _NAMES, Run

__all__ = [
    "AXES",
    "Axis",
    "Group",
    "Point",
    "best",
    "dense",
    "front",
    "group",
    "hypervolume",
    "metric",
    "pareto",
    "smallest",
]

_DIALS = ("seed", "sparsity", "output_dir", "ckpt_path")


@dataclass(frozen=True)
class Axis:
    """What a model costs: less is better.

    Attributes:
        key: its name.
        label: what a picture says.
        value: where the metrics have it, the keys on the way down.
        whole: where they have that of the dense model, which is 1 on the scale of the hypervolume.
        unit: "" for a fraction.
        sparsity: whether the metrics have 1 - cost.
    """

    key: str
    label: str
    value: tuple[str, ...]
    whole: tuple[str, ...] = ()
    unit: str = ""
    sparsity: bool = False

    def cost(self, metrics: Mapping[str, Any]) -> float:
        """The cost, NaN where the metrics lack it."""
        found = _number(metrics, self.value)
        return 1 - found if self.sparsity else found

    def share(self, metrics: Mapping[str, Any]) -> float:
        """The cost as a fraction of the dense model's, NaN where one of them is lacking."""
        whole = _number(metrics, self.whole) if self.whole else 1.0
        return self.cost(metrics) / whole if whole else math.nan


AXES = {
    axis.key: axis
    for axis in (
        Axis("sparsity", "sparsity of the prunable weights", ("sparsity",), sparsity=True),
        Axis("size", "size, compressed", ("size_bytes", "compressed"), ("size_bytes", "dense"), "B"),
        Axis("macs", "multiply-accumulates a sample", ("macs_sparse",), ("macs_dense",), "MAC"),
        Axis("latency", "latency, one sample", ("latency_ms",), ("latency_dense_ms",), "ms"),
        Axis("exported", "size of the exported file", ("size_bytes", "exported"), ("size_bytes", "dense"), "B"),
    )
}
"""What a model may cost. Sparsity costs as density, 1 - sparsity."""


def _number(metrics: Mapping[str, Any], path: Sequence[str]) -> float:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


# Groups


@dataclass(frozen=True)
class Point:
    """One model: its run, its metrics."""

    run: Run
    metrics: Mapping[str, Any]

    def value(self, key: str) -> float:
        """A metric, NaN where it is lacking."""
        return _number(self.metrics, (key,))


@dataclass(frozen=True)
class Group:
    """Points that differ by the seed alone.

    Attributes:
        label: what sets its method apart from the others, e.g. "movement 2:4".
        points: the seeds.
    """

    label: str
    points: tuple[Point, ...]

    def accuracy(self, key: str) -> float:
        """The mean over the seeds."""
        return _mean(point.value(key) for point in self.points)

    def spread(self, key: str) -> float:
        """The sample standard deviation over the seeds; NaN for a single one."""
        values = [point.value(key) for point in self.points if math.isfinite(point.value(key))]
        return stdev(values) if len(values) > 1 else math.nan

    def cost(self, axis: Axis) -> float:
        """The mean over the seeds."""
        return _mean(axis.cost(point.metrics) for point in self.points)

    def share(self, axis: Axis) -> float:
        """The mean over the seeds of the cost as a fraction of the dense one."""
        return _mean(axis.share(point.metrics) for point in self.points)

    @property
    def task(self) -> str:
        """Data and model: what may be compared."""
        settings = self.points[0].run.settings
        return repr(sorted((key, value) for key, value in settings.items() if key.startswith(("data.", "model."))))


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return mean(finite) if finite else math.nan


def group(runs: Sequence[Run]) -> list[Group]:
    """The models of runs, those together that differ by the seed alone, labelled by what varies among them."""
    points = [Point(run, metrics) for run in runs for metrics in run.models]
    labels = _labels(points)
    members: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for point in points:
        level = round(point.value("sparsity"), 3) if len(point.run.models) > 1 else None
        settings = repr(sorted(point.run.settings.items())) or point.run.folder
        if not point.run.config:  # nothing is known of it: what it says of itself has to do
            settings = repr([point.metrics.get(key) for key in (*_NAMES, "sparsity_requested")])
        members[labels[id(point)], settings, level].append(point)
    return [Group(key[0], tuple(found)) for key, found in members.items()]


def _labels(points: Sequence[Point]) -> dict[int, str]:
    """The fewest settings that tell methods apart: those whose values split what the ones before left together."""
    keys = list(dict.fromkeys(o.partition("=")[0].lstrip("+~") for p in points for o in p.run.overrides))
    keys = [key for key in keys if key not in (*_DIALS, *_NAMES, "schedule.final", "front", "resume", "logger")]
    parts: dict[int, tuple[str, ...]] = {id(point): () for point in points}
    for key in (*_NAMES, *keys):
        values = {
            id(point): str(point.metrics.get(key) or "") if key in _NAMES else str(point.run.setting(key) or "")
            for point in points
        }
        if len({(parts[i], values[i]) for i in parts}) > len(set(parts.values())):
            shown = {
                i: value if key in _NAMES or not value or not _numeric(value) else f"{key}={value}"
                for i, value in values.items()
            }
            parts = {i: (*parts[i], shown[i]) for i in parts}
    names = {id(point): str(point.metrics.get("method") or "model") for point in points}
    return {i: " ".join(part for part in found if part) or names[i] for i, found in parts.items()}


def _numeric(value: str) -> bool:
    return value.lower() in ("true", "false", "null", "none") or value[0] in "0123456789.-[{'\""


def metric(groups: Sequence[Group]) -> str:
    """The accuracy that most of the models have: of the test data before that of the validation data."""
    counts = {
        key: sum(math.isfinite(point.value(key)) for found in groups for point in found.points)
        for key in ("test/acc", "val/acc")
    }
    return max(counts, key=lambda key: counts[key])


# Comparing


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Which of the points (cost, value) no other beats, by rising cost.

    One beats another that costs at least as much and is worth at most as much, and is not its equal. Of equal points
    all are kept; those that are not finite are left out.

    >>> pareto([3, 1, 2, 2], [0.9, 0.5, 0.4, 0.9])
    [1, 3]
    """
    known = [i for i in range(len(costs)) if math.isfinite(costs[i]) and math.isfinite(values[i])]
    kept: list[int] = []
    for i in sorted(known, key=lambda i: (costs[i], -values[i])):
        highest = values[kept[-1]] if kept else -math.inf
        if values[i] > highest or (kept and values[i] == highest and costs[i] == costs[kept[-1]]):
            kept.append(i)
    return kept


def hypervolume(costs: Sequence[float], values: Sequence[float], reference: tuple[float, float] = (1.0, 0.0)) -> float:
    """The area between a front and a reference point (cost, value) that is worse than all of it: larger is better.

    Points that are worse than the reference in either respect add nothing. With costs as fractions of the dense model's
    and accuracies, the reference (1, 0) is a model as costly as the dense one that is always wrong, and the area is at
    most 1.

    Source: Zitzler, Thiele, Multiobjective evolutionary algorithms, 1999, section III ("size of the space covered").

    >>> round(hypervolume([0.1, 0.5], [0.8, 0.9]), 3)
    0.77
    """
    area, height = 0.0, reference[1]
    for i in pareto(costs, values):
        if costs[i] < reference[0] and values[i] > height:
            area += (reference[0] - costs[i]) * (values[i] - height)
            height = values[i]
    return area


def front(groups: Sequence[Group], axis: Axis, key: str) -> list[Group]:
    """The groups that no other beats, by rising cost."""
    return [groups[i] for i in pareto([g.cost(axis) for g in groups], [g.accuracy(key) for g in groups])]


def dense(groups: Sequence[Group], key: str) -> dict[str, float]:
    """The best accuracy at sparsity 0 of each task that has one."""
    found: dict[str, float] = {}
    for candidate in groups:
        accuracy = candidate.accuracy(key)
        if candidate.cost(AXES["sparsity"]) == 1 and math.isfinite(accuracy):
            found[candidate.task] = max(accuracy, found.get(candidate.task, -math.inf))
    return found


def smallest(
    groups: Sequence[Group], axis: Axis, key: str, baseline: float | Mapping[str, float], drop: float = 0.01
) -> Group | None:
    """The cheapest whose accuracy is at most `drop` below the dense model's; of equally cheap ones the most accurate.

    Args:
        baseline: the dense accuracy, or that of each task, as `dense` finds it.

    Returns:
        None if there is none, or nothing to compare with.
    """

    def least(candidate: Group) -> float:
        return (baseline.get(candidate.task, math.nan) if isinstance(baseline, Mapping) else baseline) - drop - 1e-12

    near = [g for g in groups if math.isfinite(g.cost(axis)) and g.accuracy(key) >= least(g)]
    return min(near, key=lambda g: (g.cost(axis), -g.accuracy(key)), default=None)


def best(groups: Sequence[Group], axis: Axis, key: str, at_most: float) -> Group | None:
    """The most accurate that costs at most so much; of equally accurate ones the cheapest. None if there is none."""
    within = [g for g in groups if g.cost(axis) <= at_most and math.isfinite(g.accuracy(key))]
    return max(within, key=lambda g: (g.accuracy(key), -g.cost(axis)), default=None)


def _methods(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(found.label for found in groups))


def _of(groups: Sequence[Group], label: str) -> list[Group]:
    return [found for found in groups if found.label == label]


def _deviation(found: Group, axis: Axis) -> float:
    """Over the seeds, 0 where they agree or there is one."""
    values = [v for v in (axis.cost(point.metrics) for point in found.points) if math.isfinite(v)]
    if len(values) < 2:
        return 0.0
    middle = sum(values) / len(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))
