"""`pl-sparse show RUN` and `pl-sparse compare RUN RUN`: what one run left, and how two differ."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pl_sparse.results.figures import plot_masks
from pl_sparse.results.runs import Run, is_run, read

__all__ = ["compare", "show"]


def _run(path: str) -> Run:
    """The run in a folder.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder: give the folder of a run, such as outputs/<date>/<time>")
    if not is_run(folder):
        below = [found for found in sorted(folder.iterdir()) if found.is_dir() and is_run(found)]
        hint = f"there are {len(below)} below it, such as {below[0]}" if below else "it holds no metrics.json"
        raise ValueError(f"{path} is no run: {hint}")
    return read(folder)


def _masks(run: Run) -> dict[str, Tensor]:
    """The non-zero weights of the prunable layers, in the model's order; empty before there is a model."""
    path = run.folder / "model.safetensors"
    if not path.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        return {row["name"]: file.get_tensor(row["name"]) != 0 for row in _layers(run) if row["name"] in names}


def _layers(run: Run) -> list[dict[str, str]]:
    path = run.folder / "layers.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _text(value: Any) -> str:
    """
    >>> _text(0.123456), _text(None), _text(12345), _text("a")
    ('0.1235', '', '12,345', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _table(*columns: str, numbers: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(escape(column), overflow="fold", justify="right" if i and numbers else "left")
    return table


def _show(path: str, console: Console) -> None:
    run = _run(path)
    console.print(f"[bold]{escape(str(run.folder))}[/]: {run.state}" + (f", {escape(run.error)}" if run.error else ""))
    console.print(f"  {escape(run.command)}\n", highlight=False, soft_wrap=True)
    if run.models:
        table = _table("metric", "value")
        for key, value in _flat(run.models[-1]).items():
            table.add_row(escape(key), escape(_text(value)))
        console.print(table, "")
    if rows := _layers(run):
        table = _table("layer", "shape", "structure", "weights", "kept", "density", "note")
        for row in rows:
            dead = int(row["kept"]) == 0
            cells = (row["name"], row["shape"], row["structure"], f"{int(row['weights']):,}", f"{int(row['kept']):,}")
            style = "bold red" if dead else None
            table.add_row(*map(escape, cells), f"{float(row['density']):.2%}", escape(row["note"]), style=style)
        console.print(table, "")
    if masks := _masks(run):
        picture = run.folder / "masks.png"
        plot_masks(masks, picture, str(run.folder.name))
        console.print(f"masks: {picture}", highlight=False, soft_wrap=True)


def _compare(first: str, second: str, console: Console) -> None:
    runs = _run(first), _run(second)
    names = ["first", "second"]
    for name, run in zip(names, runs, strict=True):
        console.print(f"{name:<7} [bold]{escape(str(run.folder))}[/]: {run.state}", highlight=False, soft_wrap=True)
    settings = [{**run.settings, "seed": run.config.get("seed")} for run in runs]
    _differences("setting", names, settings, console, "the settings are the same")
    _differences("metric", names, [_flat(run.models[-1]) if run.models else {} for run in runs], console, "")
    masks = [_masks(run) for run in runs]
    if not all(masks):
        return
    table = _table("layer", *(f"density, {name}" for name in names), "overlap")
    both = either = 0
    for layer in dict.fromkeys([*masks[0], *masks[1]]):
        pair = [found.get(layer) for found in masks]
        cells = ["" if mask is None else f"{float(mask.float().mean()):.2%}" for mask in pair]
        one, other = pair
        overlap = ""
        if one is not None and other is not None and one.shape == other.shape:
            shared, united = int((one & other).sum()), int((one | other).sum())
            both, either = both + shared, either + united
            overlap = f"{shared / max(united, 1):.2%}"
        table.add_row(escape(layer), *cells, overlap)
    console.print("", table)
    if either:
        console.print(f"overlap of the masks, kept by both of those kept by either: {both / either:.2%}")


def _differences(kind: str, names: list[str], values: list[dict[str, Any]], console: Console, otherwise: str) -> None:
    table = _table(kind, *names, *(["difference"] if kind == "metric" else []))
    for key in dict.fromkeys([*values[0], *values[1]]):
        one: Any = values[0].get(key)
        other: Any = values[1].get(key)
        if kind == "setting" and one == other:
            continue
        cells = [escape(_text(one)), escape(_text(other))]
        if kind == "metric":
            numbers = one != other and _number(one) and _number(other)
            cells.append(_text(float(other) - float(one)) if numbers else "")
        table.add_row(escape(key), *cells)
    if table.row_count:
        console.print("", table)
    elif otherwise:
        console.print(f"\n{otherwise}")


def _called(action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments, Console())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show() -> None:
    """`pl-sparse show RUN`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse show", description="Tell what a run left: metrics, layers, and a picture of its masks."
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, such as outputs/<date>/<time>")
    _called(_show, parser.parse_args().run)


def compare() -> None:
    """`pl-sparse compare RUN RUN`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse compare",
        description="Tell how two runs differ: settings, metrics, density of each layer, overlap of their masks.",
    )
    parser.add_argument("first", metavar="RUN", help="the folder of a run")
    parser.add_argument("second", metavar="RUN", help="the folder of another")
    given = parser.parse_args()
    _called(_compare, given.first, given.second)
