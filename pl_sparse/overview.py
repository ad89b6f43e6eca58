"""What a set of runs comes to: `pareto.csv`, `pareto.json`, `pareto.png`, `pareto.html` and a table.

It is made at the end of a multirun, and by `pl-sparse pareto DIR...` for any runs at any time.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import re
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

from pl_sparse.files import replacing, write_csv, write_json, write_text
from pl_sparse.pareto import AXES, Axis, Group, Run, best, dense, front, gather, group, hypervolume, metric, smallest

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
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C8C8C")
_MARKERS = "os^Dv"


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


def _methods(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(found.label for found in groups))


def _of(groups: Sequence[Group], label: str) -> list[Group]:
    return [found for found in groups if found.label == label]


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


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


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


def _deviation(found: Group, axis: Axis) -> float:
    """Over the seeds, 0 where they agree or there is one."""
    values = [v for v in (axis.cost(point.metrics) for point in found.points) if math.isfinite(v)]
    if len(values) < 2:
        return 0.0
    middle = sum(values) / len(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


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


# Files


def _page(found: Mapping[str, Any]) -> str:
    """The page, whole in itself: its policy lets nothing but its own script and style run, and loads nothing."""
    here = Path(__file__).parent
    style, script = ((here / f"pareto.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps(_plain(found), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"DATA": data, "STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script)}
    page = (here / "pareto.html").read_text(encoding="utf-8")
    return re.sub(r"\$(STYLE_HASH|SCRIPT_HASH|STYLE|SCRIPT|DATA)", lambda match: parts[match[1]], page)


def _plain(found: Any) -> Any:
    """Numbers that JSON lacks become null."""
    if isinstance(found, float):
        return _known(found)
    if isinstance(found, Mapping):
        return {key: _plain(value) for key, value in found.items()}
    return [_plain(value) for value in found] if isinstance(found, (list, tuple)) else found


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
