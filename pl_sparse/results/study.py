"""A comparison of methods over seeds: means with confidence intervals, and which differences are noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pl_sparse.core.files import write_csv, write_json
from pl_sparse.results.direction import direction
from pl_sparse.results.fronts import Series, finite_or_none, merge_seeds, metric
from pl_sparse.results.runs import gather, shown

__all__ = ["Difference", "compare", "holm", "report", "t_quantile", "two_sided"]


def two_sided(t: float, degrees: int) -> float:
    """P(|T| > t) of Student's distribution, by its integral.

    >>> [round(two_sided(t, n), 4) for t, n in ((4.3027, 2), (2.2281, 10), (0.0, 3))]
    [0.05, 0.05, 1.0]
    """
    if math.isinf(t):
        return 0.0
    n = degrees
    # with t = sqrt(n) tan(a) the density is proportional to cos(a)^(n - 1)
    scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)
    end, parts = math.atan(abs(t) / math.sqrt(n)), 2000
    width = end / parts
    inner = sum((4 if i % 2 else 2) * math.cos(i * width) ** (n - 1) for i in range(1, parts))
    area = width / 3 * (1 + inner + math.cos(end) ** (n - 1))  # Simpson's rule
    return min(max(1 - 2 * scale * area, 0.0), 1.0)


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """What |T| exceeds with a probability of 1 - confidence.

    >>> [round(t_quantile(n), 3) for n in (1, 2, 4, 30)]
    [12.706, 4.303, 2.776, 2.042]
    """
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > 1 - confidence else (low, middle)
    return (low + high) / 2


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several tests corrected for their number.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(values) - rank) * values[i], 1.0))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True)
class Difference:
    """The difference of two methods at a sparsity.

    Attributes:
        level: the sparsity.
        first, second: the methods.
        mean: of first - second over the seeds that both have.
        interval: half the width of its confidence interval of 95 %; NaN for fewer than two seeds.
        p: of a paired t-test, corrected by Holm's procedure for the number of pairs at the sparsity; NaN likewise.
        seeds: how many both have.
    """

    level: float | None
    first: str
    second: str
    mean: float
    interval: float
    p: float
    seeds: int

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if self.seeds < 2:
            return "one seed allows no comparison"
        return "noise" if not self.p < 0.05 else f"{self.first if self.mean > 0 else self.second} is larger"


def _paired(first: Series, second: Series, key: str) -> list[float]:
    """The differences of two series, seed by seed."""
    by_seed = [
        {point.metrics.get("seed"): value for point in series.points if math.isfinite(value := point.value(key))}
        for series in (first, second)
    ]
    return [value - by_seed[1][seed] for seed, value in by_seed[0].items() if seed in by_seed[1]]


def _half_width(values: Sequence[float]) -> float:
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compare(level: float | None, series: Sequence[Series], key: str) -> list[Difference]:
    """The difference of each pair of methods at a sparsity.

    Args:
        series: one per method.
        key: the metric.
    """
    found = []
    for first, second in combinations(series, 2):
        values = _paired(first, second, key)
        mean, p = fmean(values) if values else math.nan, math.nan
        if len(values) > 1:
            error = stdev(values) / math.sqrt(len(values))
            p = two_sided(abs(mean) / error, len(values) - 1) if error else float(mean == 0)
        found.append((first.label, second.label, mean, _half_width(values), p, len(values)))
    tested = [i for i, row in enumerate(found) if not math.isnan(row[4])]
    corrected = dict(zip(tested, holm([found[i][4] for i in tested]), strict=True))
    return [
        Difference(level, first, second, mean, half, corrected.get(i, math.nan), seeds)
        for i, (first, second, mean, half, _, seeds) in enumerate(found)
    ]


def report(folder: Path, console: Console, key: str | None = None) -> None:
    """Compare the methods of the runs in or below a folder: print it, and write study.csv and study.json there.

    Args:
        key: the metric; None for the accuracy that most runs have.

    Raises:
        ValueError: no run has a result.
    """
    every = merge_seeds(gather([folder]))
    key = key or metric(every)
    every = [series for series in every if math.isfinite(series.accuracy(key))]
    if not every:
        raise ValueError(f"no run below {folder} has {key} yet")
    levels: dict[float | None, list[Series]] = defaultdict(list)
    for series in every:
        asked = series.points[0].metrics.get("sparsity_requested")
        levels[None if asked is None else round(float(asked), 4)].append(series)
    rows, table = [], _table("sparsity", "method", "seeds", key, "95 % interval", "optimizer steps")
    pairs = _table("sparsity", "methods", "difference", "95 % interval", "p", "verdict")
    differences: list[Difference] = []
    for level in sorted(levels, key=lambda level: math.inf if level is None else level):
        ranked = sorted(levels[level], key=lambda s: s.accuracy(key), reverse=direction(key) != "min")
        for series in ranked:
            values = [value for point in series.points if math.isfinite(value := point.value(key))]
            steps = sorted({int(v) for point in series.points if math.isfinite(v := point.value("steps"))})
            half = _half_width(values)
            row = {"sparsity": level, "method": series.label, "seeds": len(values), "mean": fmean(values)}
            rows.append(row | {"interval": finite_or_none(half), "steps": " ".join(map(str, steps))})
            cells = (_level(level), shown(series.label), str(len(values)), f"{fmean(values):.4f}", _half(half))
            table.add_row(*cells, f"{', '.join(f'{s:,}' for s in steps)}")
        differences += compare(level, ranked, key)
    for d in differences:
        names = shown(f"{d.first} - {d.second}")
        p = "" if math.isnan(d.p) else f"{d.p:.3f}"
        pairs.add_row(_level(d.level), names, f"{d.mean:+.4f}", _half(d.interval), p, shown(d.verdict))
    console.print(table, "", pairs)
    budgets = {str(row["steps"]) for row in rows}
    if len(budgets) > 1:
        console.print(
            f"\nthe budgets differ: {', '.join(sorted(budgets))} optimizer steps. A method that trains longer has an "
            "advantage that is not its own"
        )
    write_csv(folder / "study.csv", rows)
    contents: dict[str, Any] = {
        "metric": key,
        "methods": rows,
        "differences": [
            {
                **{name: getattr(d, name) for name in ("level", "first", "second", "seeds", "verdict")},
                **{name: finite_or_none(getattr(d, name)) for name in ("mean", "interval", "p")},
            }
            for d in differences
        ],
    }
    write_json(folder / "study.json", contents)
    console.print(f"\nwritten: {folder / 'study.csv'}, study.json", highlight=False, soft_wrap=True)


def _level(level: float | None) -> str:
    return "learned" if level is None else f"{level:.4g}"


def _half(value: float) -> str:
    return "" if math.isnan(value) else f"± {value:.4f}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(shown(column), overflow="fold", justify="left" if i < 2 else "right")
    return table
