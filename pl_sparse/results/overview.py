"""What a set of runs comes to: `pareto.csv`, `pareto.json`, `pareto.png`, `pareto.html` and a table.

It is made at the end of a multirun, and by `pl-sparse pareto DIR...` for any runs at any time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pl_sparse.core.files import write_csv, write_json, write_text
from pl_sparse.results.fronts import (
    AXES,
    Axis,
    Group,
    _deviation,
    _methods,
    _of,
    best,
    dense,
    front,
    group,
    hypervolume,
    metric,
    smallest,
)
from pl_sparse.results.page import _known, _page
from pl_sparse.results.runs import Run, gather
from pl_sparse.results.scatter import _plot

__all__ = ["main", "overview"]

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


def overview(
    folders: Sequence[str | os.PathLike[str]],
    out: Path,
    axis: Axis = AXES["sparsity"],
    *,
    key: str | None = None,
    drop: float = 0.01,
    baseline: float | None = None,
    kb: float | None = None,
    ms: float | None = None,
) -> dict[str, Any]:
    """Gather the runs below some folders, write what they come to into `out`, and print it.

    Args:
        axis: of the picture and the hypervolume.
        key: the metric; None for the accuracy that most runs have.
        drop: how much accuracy the smallest model may lose.
        baseline: the dense accuracy; None for that of the dense runs among them.
        kb: tell the most accurate model of at most so many kB (1000 bytes): exported where all were, else compressed.
        ms: tell the most accurate model of at most so many milliseconds a sample.

    Returns:
        what is in pareto.json.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run has a result yet.
    """
    runs = gather(folders)
    groups = group(runs)
    key = key or metric(groups)
    if not any(math.isfinite(found.accuracy(key)) for found in groups):
        had = sorted(
            {
                name
                for found in groups
                for name, value in found.points[0].metrics.items()
                if "/" in name and value is not None
            }
        )
        raise ValueError(
            f"none of the {len(runs)} runs below {', '.join(map(str, folders))} has {key} yet"
            + (f": they have {', '.join(had)}" if had else "")
        )
    found = _found(runs, groups, out, axis, key, drop, baseline, kb, ms)
    write_csv(out / "pareto.csv", _rows(groups, key))
    write_json(out / "pareto.json", found)
    _plot(groups, axis, key, _lines(groups, key, baseline), out / "pareto.png")
    write_text(out / "pareto.html", _page(found))
    _tell(found, out)
    return found


def _lines(groups: Sequence[Group], key: str, baseline: float | None) -> list[float]:
    """The dense accuracies, one a task."""
    return [baseline] if baseline is not None else list(dense(groups, key).values())


def _axes(groups: Sequence[Group]) -> list[Axis]:
    """Those that any model has."""
    return [axis for axis in AXES.values() if any(math.isfinite(found.cost(axis)) for found in groups)]


def _rows(groups: Sequence[Group], key: str) -> list[dict[str, object]]:
    """A row a group for the CSV file."""
    axes = _axes(groups)
    fronts = {
        axis.key: {id(g) for label in _methods(groups) for g in front(_of(groups, label), axis, key)} for axis in axes
    }
    return [
        {
            "method": found.label,
            **{
                axis.key + (f"_{axis.unit}" if axis.unit in ("B", "ms") else ""): _known(
                    1 - found.cost(axis) if axis.sparsity else found.cost(axis)
                )
                for axis in axes
            },
            key: _known(found.accuracy(key)),
            "spread": _known(found.spread(key)),
            "seeds": len(found.points),
            "on_front": " ".join(axis.key for axis in axes if id(found) in fronts[axis.key]),
            "runs": " ".join(str(point.run.folder) for point in found.points),
        }
        for found in groups
    ]


def _found(
    runs: Sequence[Run],
    groups: Sequence[Group],
    out: Path,
    axis: Axis,
    key: str,
    drop: float,
    baseline: float | None,
    kb: float | None,
    ms: float | None,
) -> dict[str, Any]:
    """All that is known, for the JSON file and the page."""
    axes = _axes(groups)
    place = {id(found): i for i, found in enumerate(groups)}
    others = [run for run in runs if run.state != "finished"]
    common = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    counts = {
        state: sum(run.state == state for run in runs) for state in ("finished", "running", "failed", "unfinished")
    }
    return {
        "lead": ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        + f"; {time.strftime('%Y-%m-%d %H:%M')}",
        "metric": key,
        "fraction": key.endswith("acc"),
        "axis": axis.key if axis in axes else axes[0].key,
        "axes": [
            {"key": a.key, "label": a.label, "short": _SHORT[a.key], "unit": a.unit, "sparsity": a.sparsity}
            for a in axes
        ],
        "methods": _methods(groups),
        "dense": _lines(groups, key, baseline),
        "groups": [_group(found, axes, key, out, common) for found in groups],
        "fronts": {
            a.key: {label: [place[id(g)] for g in front(_of(groups, label), a, key)] for label in _methods(groups)}
            for a in axes
        },
        "summary": _summary(groups, axis, key, drop, baseline, kb, ms),
        "others": [
            {
                "run": _relative(run.folder, out),
                "state": run.state,
                "progress": _progress(run.status),
                "error": run.error or "",
                "command": run.command if run.overrides else "",
            }
            for run in others
        ],
    }


def _group(found: Group, axes: Sequence[Axis], key: str, out: Path, common: set[str]) -> dict[str, Any]:
    points = [
        {
            "run": _relative(point.run.folder, out),
            "seed": point.metrics.get("seed"),
            "accuracy": _known(point.value(key)),
            "costs": {a.key: _known(a.cost(point.metrics)) for a in axes},
            "overrides": point.run.overrides,
            "command": point.run.command,
            "files": [
                (what, quote(_relative(point.run.folder / name, out)))
                for name, what in _FILES.items()
                if (point.run.folder / name).exists()
            ],
        }
        for point in found.points
    ]
    overrides = [o for o in found.points[0].run.overrides if o.partition("=")[0] != "seed"]
    return {
        "method": found.label,
        "accuracy": _known(found.accuracy(key)),
        "spread": _known(found.spread(key)),
        "costs": {a.key: _known(found.cost(a)) for a in axes},
        "spreads": {a.key: _deviation(found, a) for a in axes},
        "overrides": overrides,
        "differ": [o for o in overrides if o not in common],
        "search": " ".join([found.label, *overrides, *(f"{p['run']} seed={p['seed']}" for p in points)]),
        "points": points,
    }


def _summary(
    groups: Sequence[Group],
    axis: Axis,
    key: str,
    drop: float,
    baseline: float | None,
    kb: float | None,
    ms: float | None,
) -> dict[str, Any]:
    """A row a method, and one for all: hypervolume, and the best under each constraint."""
    stores = [a for a in (AXES["exported"], AXES["size"]) if all(math.isfinite(g.cost(a)) for g in groups)]
    store = stores[0] if stores else AXES["size"]
    cheap = store if stores else AXES["sparsity"]
    known = dense(groups, key)
    reference: float | Mapping[str, float] = known if baseline is None else baseline
    compared = baseline is not None or bool(known)
    columns = ["method", f"hypervolume ({_SHORT[axis.key]})", "on the front"]
    if compared:
        points = f"{100 * drop:g} point{'s' * (drop != 0.01)} of" if key.endswith("acc") else f"{drop:g} of"
        columns.append(f"smallest within {points} dense")
    limits = [
        (a, value, unit) for a, value, unit in ((store, kb, "kB"), (AXES["latency"], ms, "ms")) if value is not None
    ]
    columns += [f"best up to {value:g} {unit}" for _, value, unit in limits]
    rows = []
    methods = _methods(groups)
    for label in methods + ["all"] * (len(methods) > 1):
        own = groups if label == "all" else _of(groups, label)
        shares = [g.share(axis) for g in own]
        area = hypervolume(shares, [g.accuracy(key) for g in own])
        row = [label, f"{area:.4f}" if any(map(math.isfinite, shares)) else "", str(len(front(own, axis, key)))]
        if compared:
            row.append(_told(smallest(own, cheap, key, reference, drop), cheap, key))
        row += [_told(best(own, a, key, value * (1000 if unit == "kB" else 1)), a, key) for a, value, unit in limits]
        rows.append(row)
    note = (
        f"Hypervolume: the area between a method's front and the reference point at {key} 0 and the dense model's "
        f"{_SHORT[axis.key] if not axis.sparsity else 'density, 1'}, which is 1 on its scale; more is better. "
        + (
            "Dense: "
            + ", ".join(f"{value:.4f}" for value in _lines(groups, key, baseline))
            + f". Smallest by {_SHORT[cheap.key]}."
            if compared
            else "No dense run among them: add one (method=dense or sparsity=0), or give --dense."
        )
    )
    return {"columns": columns, "rows": rows, "note": note}


def _told(found: Group | None, axis: Axis, key: str) -> str:
    if found is None:
        return "none"
    cost = found.cost(axis)
    text = {"": f"{cost:.2%} kept", "ms": f"{cost:.3g} ms"}.get(axis.unit) or f"{cost / 1000:.1f} kB"
    return f"{text}, sparsity {1 - found.cost(AXES['sparsity']):.4g}, {found.accuracy(key):.4f}"


def _progress(status: Mapping[str, Any]) -> str:
    if not status.get("total"):
        return ""
    text = f"step {status.get('step', 0)} of {status['total']}"
    age = time.time() - status["updated"] if isinstance(status.get("updated"), (int, float)) else 0.0
    return text + (f", {age / 60:.0f} min ago" if age > 120 else "")


def _relative(path: Path, out: Path) -> str:
    """From the page's folder, with slashes."""
    try:
        return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


def _tell(found: Mapping[str, Any], out: Path) -> None:
    console = Console()
    summary = found["summary"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), title="", caption=escape(summary["note"]))
    table.caption_justify = "left"
    for i, column in enumerate(summary["columns"]):
        table.add_column(column, overflow="fold", justify="right" if i in (1, 2) else "left")
    for row in summary["rows"]:
        table.add_row(*map(escape, row), style="bold" if row[0] == "all" else None)
    console.print(table)
    if found["others"]:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
        for column in ("run", "state", "progress", "error"):
            table.add_column(column, overflow="fold")
        for other in found["others"]:
            cells = [escape(other[key]) for key in ("run", "state", "progress", "error")]
            table.add_row(*cells, style="red" if other["state"] == "failed" else None)
        console.print(table)
    console.print(f"\n{found['lead']}; written to {out}:", highlight=False, soft_wrap=True)
    for name, what in (
        ("pareto.html", "to look at, in a browser"),
        ("pareto.png", "the picture"),
        ("pareto.csv", "a row a model"),
        ("pareto.json", "all of it"),
    ):
        console.print(f"  {name:<12} {what}", highlight=False)


# The command


def main() -> None:
    """`pl-sparse pareto DIR...`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse pareto",
        description="Compare runs: fronts of accuracy and cost, hypervolume, the best under a constraint. Works while "
        "a sweep runs and after one was interrupted: what has a result counts, the rest is listed.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="runs, or folders of runs")
    parser.add_argument("--axis", choices=AXES, default="sparsity", help="what accuracy is compared with (%(default)s)")
    parser.add_argument("--metric", help="what is compared (test/acc, else val/acc); higher is better")
    parser.add_argument("--drop", type=float, default=0.01, help="loss that the smallest model may have (%(default)s)")
    parser.add_argument(
        "--dense", type=float, metavar="ACC", help="the dense accuracy, where no dense run is among them"
    )
    parser.add_argument(
        "--kb", type=float, metavar="N", help="tell the most accurate model of at most N kB (1000 bytes)"
    )
    parser.add_argument("--ms", type=float, metavar="N", help="tell the most accurate model of at most N ms a sample")
    parser.add_argument("--out", type=Path, help="where to write (the first DIR)")
    given = parser.parse_args()
    out = given.out or Path(given.folders[0])
    try:
        overview(
            given.folders,
            out,
            AXES[given.axis],
            key=given.metric,
            drop=given.drop,
            baseline=given.dense,
            kb=given.kb,
            ms=given.ms,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
