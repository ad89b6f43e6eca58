"""The overview of a set of runs: `pareto.csv`, `pareto.json`, `pareto.png`, `pareto.html` and a table.

It is made at the end of a multirun, and by `pl-sparse pareto DIR...` for any runs at any time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pl_sparse.core.files import write_csv, write_json, write_text
from pl_sparse.results.fronts import AXES, CostAxis, merge_seeds, metric
from pl_sparse.results.page import render
from pl_sparse.results.runs import gather, shown
from pl_sparse.results.scatter import plot_scatter
from pl_sparse.results.tables import Criteria, baseline_accuracies, csv_rows, json_contents

__all__ = ["main", "overview"]


def overview(
    folders: Sequence[str | os.PathLike[str]],
    out: Path,
    axis: CostAxis = AXES["sparsity"],
    *,
    key: str | None = None,
    drop: float = 0.01,
    baseline: float | None = None,
    kb: float | None = None,
    ms: float | None = None,
    others: bool = False,
) -> dict[str, Any]:
    """Gather the runs below some folders, write their overview, and print it.

    Args:
        folders: runs, or folders of runs.
        out: the folder that the files are written into.
        axis: the cost of the picture and of the hypervolume.
        key: the metric; None for the accuracy that most runs have.
        drop: how much accuracy the smallest model may lose.
        baseline: the baseline accuracy; None for that of the dense runs among them.
        kb: adds the most accurate model of at most so many kB (1000 bytes): exported where all were, else compressed.
        ms: adds the most accurate model of at most so many milliseconds per sample.
        others: list the runs without an end, in place of counting them.

    Returns:
        what is in pareto.json.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run has a result yet.
    """
    runs = gather(folders)
    all_series = merge_seeds(runs)
    key = key or metric(all_series)
    if not any(math.isfinite(series.accuracy(key)) for series in all_series):
        present = {
            name
            for series in all_series
            for name, value in series.points[0].metrics.items()
            if "/" in name and value is not None
        }
        raise ValueError(
            f"none of the {len(runs)} runs below {', '.join(map(str, folders))} has {key} yet"
            + (f": they have {', '.join(sorted(present))}" if present else "")
        )
    criteria = Criteria(axis, key, drop, baseline, kb, ms)
    contents = json_contents(runs, all_series, criteria, out)
    write_csv(out / "pareto.csv", csv_rows(all_series, key))
    write_json(out / "pareto.json", contents)
    plot_scatter(all_series, axis, key, baseline_accuracies(all_series, criteria), out / "pareto.png")
    write_text(out / "pareto.html", render(contents))
    _print(contents, out, others)
    return contents


def _print(contents: Mapping[str, Any], out: Path, others: bool) -> None:
    """Print the table of methods, the runs that are not finished, and the names of the files."""
    console = Console()
    summary = contents["summary"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), title="", caption=shown(summary["note"]))
    table.caption_justify = "left"
    for i, column in enumerate(summary["columns"]):
        table.add_column(column, overflow="fold", justify="right" if i in (1, 2) else "left")
    for row in summary["rows"]:
        table.add_row(*map(shown, row), style="bold" if row[0] == "all" else None)
    console.print(table)
    if contents["others"] and not others:
        states = Counter(run["state"] for run in contents["others"])
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        console.print(f"{counts}: --unfinished lists them", highlight=False, soft_wrap=True)
    if contents["others"] and others:
        columns = ("run", "state", "progress", "error")
        table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
        for column in table.columns:
            column.overflow = "fold"
        for run in contents["others"]:
            table.add_row(*(shown(run[key]) for key in columns), style="red" if run["state"] == "failed" else None)
        console.print(table)
    console.print(f"\n{contents['lead']}; written to {out}:", highlight=False, soft_wrap=True)
    for name, text in (
        ("pareto.html", "to look at, in a browser"),
        ("pareto.png", "the picture"),
        ("pareto.csv", "one row per model"),
        ("pareto.json", "all of it"),
    ):
        console.print(f"  {name:<12} {text}", highlight=False)


# The command


def main() -> None:
    """`pl-sparse pareto DIR...`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse pareto",
        description="Compare runs: fronts of accuracy and cost, hypervolume, the best under a constraint. Works while "
        "a sweep runs and after an interruption: runs with a result are compared, the others counted.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="runs, or folders of runs")
    parser.add_argument("--axis", choices=AXES, default="sparsity", help="what accuracy is compared with (%(default)s)")
    parser.add_argument("--metric", help="what is compared (test/acc, else val/acc); higher is better")
    parser.add_argument("--drop", type=float, default=0.01, help="loss that the smallest model may have (%(default)s)")
    parser.add_argument(
        "--dense", type=float, metavar="ACC", help="the dense accuracy, where no dense run is among them"
    )
    parser.add_argument(
        "--kb", type=float, metavar="N", help="name the most accurate model of at most N kB (1000 bytes)"
    )
    parser.add_argument("--ms", type=float, metavar="N", help="name the most accurate model of at most N ms per sample")
    parser.add_argument(
        "--unfinished", action="store_true", help="list unfinished runs: running, failed or interrupted"
    )
    parser.add_argument("--out", type=Path, help="where to write (the first DIR)")
    arguments = parser.parse_args()
    try:
        overview(
            arguments.folders,
            arguments.out or Path(arguments.folders[0]),
            AXES[arguments.axis],
            key=arguments.metric,
            drop=arguments.drop,
            baseline=arguments.dense,
            kb=arguments.kb,
            ms=arguments.ms,
            others=arguments.unfinished,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
