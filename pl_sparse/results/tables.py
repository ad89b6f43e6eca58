"""The contents of pareto.csv and pareto.json: a row per series, and everything that the page shows."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pl_sparse.results.fronts import (
    AXES,
    CostAxis,
    Series,
    baselines,
    best,
    finite_or_none,
    front,
    hypervolume,
    methods,
    of_method,
    smallest,
)
from pl_sparse.results.runs import Run

__all__ = ["Criteria", "baseline_accuracies", "csv_rows", "json_contents"]

_FILES = {
    "metrics.json": "metrics",
    "training.png": "curves",
    "layers.png": "layers",
    "masks.png": "masks",
    "tickets.png": "tickets",
    "history.csv": "history",
    "layers.csv": "layers, table",
    "config.yaml": "settings",
    "model.safetensors": "weights",
    "model.onnx": "ONNX",
}
_SHORT = {"sparsity": "sparsity", "size": "size", "macs": "MACs", "latency": "latency", "exported": "exported"}
_STATES = ("finished", "running", "failed", "interrupted", "unfinished")


@dataclass(frozen=True)
class Criteria:
    """What models are compared by.

    Attributes:
        axis: the cost of the picture and of the hypervolume.
        key: the metric that is the accuracy.
        drop: how much accuracy the smallest model may lose.
        baseline: the baseline accuracy; None for that of the dense runs among them.
        kb: the size limit of the most accurate model in kB (1000 bytes); None for no limit.
        ms: its latency limit in milliseconds per sample; None for no limit.
    """

    axis: CostAxis
    key: str
    drop: float = 0.01
    baseline: float | None = None
    kb: float | None = None
    ms: float | None = None


def baseline_accuracies(all_series: Sequence[Series], criteria: Criteria) -> list[float]:
    """The baseline accuracies: the one that is set, else one per task that has a dense run."""
    if criteria.baseline is not None:
        return [criteria.baseline]
    return list(baselines(all_series, criteria.key).values())


def csv_rows(all_series: Sequence[Series], key: str) -> list[dict[str, object]]:
    """The rows of pareto.csv.

    Args:
        all_series: the series, a row per series.
        key: the metric that is the accuracy.
    """
    axes = _axes(all_series)
    on_front = {
        axis.key: {
            id(series) for label in methods(all_series) for series in front(of_method(all_series, label), axis, key)
        }
        for axis in axes
    }
    return [
        {
            "method": series.label,
            **{
                axis.key + (f"_{axis.unit}" if axis.unit in ("B", "ms") else ""): finite_or_none(
                    1 - series.cost(axis) if axis.sparsity else series.cost(axis)
                )
                for axis in axes
            },
            key: finite_or_none(series.accuracy(key)),
            "spread": finite_or_none(series.spread(key)),
            "seeds": len(series.points),
            "on_front": " ".join(axis.key for axis in axes if id(series) in on_front[axis.key]),
            "runs": " ".join(str(point.run.folder) for point in series.points),
        }
        for series in all_series
    ]


def json_contents(runs: Sequence[Run], all_series: Sequence[Series], criteria: Criteria, out: Path) -> dict[str, Any]:
    """The contents of pareto.json, which are the data of the page too.

    Args:
        runs: all runs, those without a result too.
        all_series: the series of their models.
        criteria: what they are compared by.
        out: the folder of the files; paths are relative to it.
    """
    axes = _axes(all_series)
    key = criteria.key
    places = {id(series): place for place, series in enumerate(all_series)}
    common = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    counts = {state: sum(run.state == state for run in runs) for state in _STATES}
    return {
        "lead": ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        + f"; {time.strftime('%Y-%m-%d %H:%M')}",
        "metric": key,
        "fraction": key.endswith("acc"),
        "axis": criteria.axis.key if criteria.axis in axes else axes[0].key,
        "axes": [
            {"key": a.key, "label": a.label, "short": _SHORT[a.key], "unit": a.unit, "sparsity": a.sparsity}
            for a in axes
        ],
        "methods": methods(all_series),
        "dense": baseline_accuracies(all_series, criteria),
        "groups": [_series_contents(series, axes, key, out, common) for series in all_series],
        "fronts": {
            axis.key: {
                label: [places[id(series)] for series in front(of_method(all_series, label), axis, key)]
                for label in methods(all_series)
            }
            for axis in axes
        },
        "summary": _summary(all_series, criteria),
        "others": [
            {
                "run": _relative(run.folder, out),
                "state": run.state,
                "progress": _progress(run.status),
                "error": run.error or "",
                "command": run.command if run.overrides else "",
            }
            for run in runs
            if run.state != "finished"
        ],
    }


def _axes(all_series: Sequence[Series]) -> list[CostAxis]:
    """The costs that any model has."""
    return [axis for axis in AXES.values() if any(math.isfinite(series.cost(axis)) for series in all_series)]


def _series_contents(series: Series, axes: Sequence[CostAxis], key: str, out: Path, common: set[str]) -> dict[str, Any]:
    """A series for pareto.json. `common` are the overrides that all runs share."""
    points = [
        {
            "run": _relative(point.run.folder, out),
            "seed": point.metrics.get("seed"),
            "accuracy": finite_or_none(point.value(key)),
            "costs": {axis.key: finite_or_none(axis.cost(point.metrics)) for axis in axes},
            "overrides": point.run.overrides,
            "command": point.run.command,
            "files": [
                (text, quote(_relative(point.run.folder / name, out)))
                for name, text in _FILES.items()
                if (point.run.folder / name).exists()
            ],
        }
        for point in series.points
    ]
    overrides = [o for o in series.points[0].run.overrides if o.partition("=")[0] != "seed"]
    return {
        "method": series.label,
        "accuracy": finite_or_none(series.accuracy(key)),
        "spread": finite_or_none(series.spread(key)),
        "costs": {axis.key: finite_or_none(series.cost(axis)) for axis in axes},
        "spreads": {axis.key: series.cost_spread(axis) for axis in axes},
        "overrides": overrides,
        "differ": [o for o in overrides if o not in common],
        "search": " ".join([series.label, *overrides, *(f"{p['run']} seed={p['seed']}" for p in points)]),
        "points": points,
    }


def _progress(status: Mapping[str, Any]) -> str:
    if not status.get("total"):
        return ""
    text = f"step {status.get('step', 0)} of {status['total']}"
    age = time.time() - status["updated"] if isinstance(status.get("updated"), (int, float)) else 0.0
    return text + (f", {age / 60:.0f} min ago" if age > 120 else "")


def _relative(path: Path, out: Path) -> str:
    """A path from the page's folder, with slashes."""
    try:
        return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


# The table of methods


def _summary(all_series: Sequence[Series], criteria: Criteria) -> dict[str, Any]:
    """A row per method, and one for all: hypervolume, and the best under each constraint."""
    axis, key, drop = criteria.axis, criteria.key, criteria.drop
    size = _size_axis(all_series)
    smallest_by = size or AXES["sparsity"]
    reference: float | Mapping[str, float] = baselines(all_series, key)
    if criteria.baseline is not None:
        reference = criteria.baseline
    has_baseline = criteria.baseline is not None or bool(reference)
    limits = [
        (limited, limit, unit, factor)
        for limited, limit, unit, factor in (
            (size or AXES["size"], criteria.kb, "kB", 1000),
            (AXES["latency"], criteria.ms, "ms", 1),
        )
        if limit is not None
    ]
    columns = ["method", f"hypervolume ({_SHORT[axis.key]})", "on the front"]
    if has_baseline:
        loss = f"{100 * drop:g} point{'s' * (drop != 0.01)}" if key.endswith("acc") else f"{drop:g}"
        columns.append(f"smallest within {loss} of dense")
    columns += [f"best up to {limit:g} {unit}" for _, limit, unit, _ in limits]
    rows = []
    labels = methods(all_series)
    for label in labels + ["all"] * (len(labels) > 1):
        compared = all_series if label == "all" else of_method(all_series, label)
        shares = [series.share(axis) for series in compared]
        area = hypervolume(shares, [series.accuracy(key) for series in compared])
        row = [label, f"{area:.4f}" if any(map(math.isfinite, shares)) else "", str(len(front(compared, axis, key)))]
        if has_baseline:
            row.append(_cell(smallest(compared, smallest_by, key, reference, drop), smallest_by, key))
        for limited, limit, _, factor in limits:
            row.append(_cell(best(compared, limited, key, limit * factor), limited, key))
        rows.append(row)
    note = (
        f"Hypervolume: the area between a method's front and the reference point at {key} 0 and the dense model's "
        f"{_SHORT[axis.key] if not axis.sparsity else 'density, 1'}, which is 1 on its scale; more is better. "
    )
    if has_baseline:
        accuracies = ", ".join(f"{accuracy:.4f}" for accuracy in baseline_accuracies(all_series, criteria))
        note += f"Dense: {accuracies}. Smallest by {_SHORT[smallest_by.key]}."
    else:
        note += "No dense run among them: add one (method=dense or sparsity=0), or give --dense."
    return {"columns": columns, "rows": rows, "note": note}


def _size_axis(all_series: Sequence[Series]) -> CostAxis | None:
    """The size of the exported file where all models have one, else the compressed size, else None."""
    for axis in (AXES["exported"], AXES["size"]):
        if all(math.isfinite(series.cost(axis)) for series in all_series):
            return axis
    return None


def _cell(series: Series | None, axis: CostAxis, key: str) -> str:
    """Cost, sparsity and accuracy of a series."""
    if series is None:
        return "none"
    cost = series.cost(axis)
    text = {"": f"{cost:.2%} kept", "ms": f"{cost:.3g} ms"}.get(axis.unit) or f"{cost / 1000:.1f} kB"
    return f"{text}, sparsity {1 - series.cost(AXES['sparsity']):.4g}, {series.accuracy(key):.4f}"
