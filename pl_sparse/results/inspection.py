"""`pl-sparse show RUN` and `pl-sparse compare RUN RUN`: the results of one run, and how two runs differ."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, linalg

from pl_sparse.results.figures import plot_masks
from pl_sparse.results.runs import Run, flat, is_run, read, shown

__all__ = ["compare", "effective_rank", "show"]


# Reading


def _read_run(path: str) -> Run:
    """The run in a folder.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder: give the folder of a run, such as outputs/<date>/<time>")
    if not is_run(folder):
        below = [child for child in sorted(folder.iterdir()) if child.is_dir() and is_run(child)]
        hint = f"there are {len(below)} below it, such as {below[0]}" if below else "it holds no metrics.json"
        hint += "" if below else ", which a run writes when it ends"
        raise ValueError(f"{path} is not a run: {hint}")
    return read(folder)


def _metrics(run: Run) -> dict[str, Any]:
    """The metrics of the last model by dotted key; empty before there is a model."""
    return {key: value for key, value in flat(run.models[-1]) if value != {}} if run.models else {}


def _layers(run: Run) -> list[dict[str, str]]:
    """The rows of layers.csv; empty before there is a model."""
    path = run.folder / "layers.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _weights(run: Run) -> dict[str, Tensor]:
    """The weights of the prunable layers, in the model's order; empty before there is a model."""
    path = run.folder / "model.safetensors"
    if not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return {row["name"]: file.get_tensor(row["name"]) for row in _layers(run) if row["name"] in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are not zero."""
    return {name: weight != 0 for name, weight in weights.items()}


def effective_rank(weight: Tensor) -> float:
    """exp(entropy of the singular values over their sum), of a weight as a matrix (first dimension, the others).

    Source: Roy, Vetterli, The effective rank: a measure of effective dimensionality, 2007, definition 2.

    >>> from torch import diag, tensor
    >>> round(effective_rank(diag(tensor([2.0, 2.0, 2.0, 0.0]))), 4)
    3.0
    """
    values = linalg.svdvals(weight.double().flatten(1) if weight.dim() > 1 else weight.double().unsqueeze(0))
    shares = values / values.sum().clamp_min(1e-300)
    return float((-(shares * shares.clamp_min(1e-300).log()).sum()).exp()) if float(values.sum()) > 0 else 0.0


# Tables


def _text(value: Any) -> str:
    """A value for a cell.

    >>> _text(0.123456), _text(None), _text(12345), _text("a")
    ('0.1235', '', '12,345', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(shown(column), overflow="fold", justify="right" if i else "left")
    return table


# The commands


def _show(path: str, console: Console) -> None:
    """Print state, command, metrics and layers of a run, and draw its masks."""
    run = _read_run(path)
    console.print(
        f"[bold]{shown(str(run.folder))}[/]: {shown(run.state)}" + (f", {shown(run.error)}" if run.error else "")
    )
    console.print(f"  {shown(run.command)}\n", highlight=False, soft_wrap=True)
    if run.models:
        table = _table("metric", "value")
        for key, value in _metrics(run).items():
            table.add_row(shown(key), shown(_text(value)))
        console.print(table, "")
    if rows := _layers(run):
        table = _table("layer", "shape", "structure", "weights", "kept", "density", "note")
        for row in rows:
            weights, kept = int(row["weights"]), int(row["kept"])
            cells = (row["name"], row["shape"], row["structure"], f"{weights:,}", f"{kept:,}")
            style = "bold red" if kept == 0 else None
            table.add_row(*map(shown, cells), f"{float(row['density']):.2%}", shown(row["note"]), style=style)
        console.print(table, "")
    if masks := _masks(_weights(run)):
        picture = run.folder / "masks.png"
        plot_masks(masks, picture, str(run.folder.name))
        console.print(f"masks: {picture}", highlight=False, soft_wrap=True)


def _compare(first_path: str, second_path: str, console: Console) -> None:
    """Print how two runs differ: settings, metrics, density of each layer, overlap of the masks."""
    first, second = _read_run(first_path), _read_run(second_path)
    for name, run in (("first", first), ("second", second)):
        console.print(
            f"{name:<7} [bold]{shown(str(run.folder))}[/]: {shown(run.state)}", highlight=False, soft_wrap=True
        )
    settings = _setting_differences(first, second)
    if settings.row_count:
        console.print("", settings)
    else:
        console.print("\nthe settings are the same")
    metrics = _metric_differences(first, second)
    if metrics.row_count:
        console.print("", metrics)
    first_weights, second_weights = _weights(first), _weights(second)
    if first_weights and second_weights:
        _compare_masks(_masks(first_weights), _masks(second_weights), console)
        _compare_ranks(first_weights, second_weights, console)


def _setting_differences(first: Run, second: Run) -> Table:
    """The settings that differ."""
    table = _table("setting", "first", "second")
    first_settings, second_settings = ({**run.settings, "seed": run.config.get("seed")} for run in (first, second))
    for key in {**first_settings, **second_settings}:
        values = first_settings.get(key), second_settings.get(key)
        if values[0] != values[1]:
            table.add_row(shown(key), *(shown(_text(value)) for value in values))
    return table


def _metric_differences(first: Run, second: Run) -> Table:
    """All metrics, with the difference of those that differ."""
    table = _table("metric", "first", "second", "difference")
    first_metrics, second_metrics = _metrics(first), _metrics(second)
    for key in {**first_metrics, **second_metrics}:
        values: tuple[Any, Any] = first_metrics.get(key), second_metrics.get(key)
        difference = ""
        if values[0] != values[1] and all(map(_is_number, values)):
            difference = _text(float(values[1]) - float(values[0]))
        table.add_row(shown(key), *(shown(_text(value)) for value in values), difference)
    return table


def _compare_masks(first: Mapping[str, Tensor], second: Mapping[str, Tensor], console: Console) -> None:
    """Print the density of each layer, and the overlap of masks that have the same shape."""
    table = _table("layer", "density, first", "density, second", "overlap")
    both = either = 0
    for layer in {**first, **second}:
        masks = first.get(layer), second.get(layer)
        densities = ("" if mask is None else f"{float(mask.float().mean()):.2%}" for mask in masks)
        overlap = ""
        if masks[0] is not None and masks[1] is not None and masks[0].shape == masks[1].shape:
            shared, united = int((masks[0] & masks[1]).sum()), int((masks[0] | masks[1]).sum())
            both, either = both + shared, either + united
            overlap = f"{shared / max(united, 1):.2%}"
        table.add_row(shown(layer), *densities, overlap)
    console.print("", table)
    if either:
        console.print(f"overlap of the masks, kept by both of those kept by either: {both / either:.2%}")


def _compare_ranks(first: Mapping[str, Tensor], second: Mapping[str, Tensor], console: Console) -> None:
    """Print how many slices along the first dimension of each layer are all zero, and its effective rank."""
    table = _table("layer", "dead outputs, first", "dead outputs, second", "rank, first", "rank, second")
    for layer in {**first, **second}:
        both = [first.get(layer), second.get(layer)]
        dead = ["" if w is None else str(int((w.flatten(1) == 0).all(1).sum())) if w.dim() > 1 else "" for w in both]
        ranks = ["" if w is None else f"{effective_rank(w):.1f}" for w in both]
        table.add_row(shown(layer), *dead, *ranks)
    console.print("", table)


def _run_or_exit(command: Callable[..., None], *arguments: str) -> None:
    try:
        command(*arguments, Console())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show() -> None:
    """`pl-sparse show RUN`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse show", description="Show the results of a run: metrics, layers, and a picture of its masks."
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, such as outputs/<date>/<time>")
    _run_or_exit(_show, parser.parse_args().run)


def compare() -> None:
    """`pl-sparse compare RUN RUN`"""
    parser = argparse.ArgumentParser(
        prog="pl-sparse compare",
        description="Show how two runs differ: settings, metrics, density of each layer, overlap of their masks.",
    )
    parser.add_argument("first", metavar="RUN", help="the folder of a run")
    parser.add_argument("second", metavar="RUN", help="the folder of another")
    arguments = parser.parse_args()
    _run_or_exit(_compare, arguments.first, arguments.second)
