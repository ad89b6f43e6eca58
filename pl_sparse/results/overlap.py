"""`pl-sparse overlap RUN [RUN]`: how masks changed over a training, and how alike those of two trainings were."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pl_sparse.core.files import write_csv
from pl_sparse.results.runs import shown
from pl_sparse.results.style import PALETTE, remove_frame, save

__all__ = ["main", "overlaps", "read_masks"]

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Masks:
    """The masks at a step, as their bits.

    Attributes:
        step: of the optimizer.
        bits: eight weights to a byte, by the weight's name.
        shapes: of the masks.
    """

    step: int
    bits: Mapping[str, Bits]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def kept(self) -> dict[str, int]:
        """How many weights of each layer are kept."""
        return {name: _ones(bits) for name, bits in self.bits.items()}


def main() -> None:
    """`pl-sparse overlap RUN [RUN]`: overlap.csv and overlap.png in the folder of the first run."""
    parser = argparse.ArgumentParser(
        prog="pl-sparse overlap",
        description="Show how masks changed over a training with callbacks=masks: the overlap |A and B| / |A or B| "
        "(Jaccard) of the kept weights with those of the first, the previous and the last update, and with those of "
        "another run at the same step. Writes overlap.csv and overlap.png into the folder of the first.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("other", metavar="RUN", type=Path, nargs="?", help="the folder of another")
    options = parser.parse_args()
    try:
        rows = overlaps(options.run, options.other)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_csv(options.run / "overlap.csv", rows)
    whole = [row for row in rows if row["layer"] == "all"]
    _plot(whole, options.run / "overlap.png")
    columns = [name for name in whole[0] if name != "layer"]
    table = Table(*columns, title="overlap of the kept weights")
    for row in whole:
        values = [row[name] for name in columns[1:]]
        table.add_row(f"{row['step']:,}", *("" if value is None else f"{value:.2%}" for value in values))
    console = Console()
    console.print(table)
    names = list(dict.fromkeys(row["layer"] for row in rows))[1:]
    console.print(f"{len(names)} weights, {len(whole)} steps", highlight=False)
    print(f"written: {shown(str(options.run / 'overlap.csv'))}, overlap.png")


def read_masks(run: Path) -> dict[int, Path]:
    """The files of the masks of a run by their step, in order.

    Raises:
        ValueError: the run kept none.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder: give the folder of a run, such as outputs/<date>/<time>")
    found = {}
    for path in sorted((run / "masks").glob("step_*.safetensors")):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    if not found:
        raise ValueError(f"{run} has no masks of its updates: train it with callbacks=masks")
    return found


def overlaps(run: Path, other: Path | None = None) -> list[dict[str, Any]]:
    """The overlap |A and B| / |A or B| of the masks of a run with themselves at other times.

    Args:
        run: the folder of a run with masks/.
        other: that of another run of the same network; at each step its masks are the last up to there.

    Returns:
        a row for each step and layer, that of all layers ("all") first: step, layer, density, first, previous, last,
        and with another run `other`, None before its first update, and `chance`, which is the overlap that random
        masks of these densities would have.

    Raises:
        ValueError: a run kept no masks, a file is damaged, or the masks are of different shapes.
    """
    paths = read_masks(run)
    others = {} if other is None else read_masks(other)
    first, last = (_read(paths[step], step) for step in (min(paths), max(paths)))
    previous, beside = first, None
    rows = []
    for step, path in paths.items():
        now = _read(path, step)
        at = max((s for s in others if s <= step), default=None)
        if at is not None and (beside is None or beside.step != at):
            beside = _read(others[at], at)
        compared = {"first": first, "previous": previous, "last": last} | ({} if beside is None else {"other": beside})
        shared = {key: _shared(now, then) for key, then in compared.items()}
        for layer in ("all", *now.bits):
            names = list(now.bits) if layer == "all" else [layer]
            size = sum(prod(now.shapes[name]) for name in names)
            row: dict[str, Any] = {"step": step, "layer": layer, "density": sum(now.kept[n] for n in names) / size}
            row |= {key: _ratio(counts, names) for key, counts in shared.items()}
            if other is not None:
                row["other"] = row.get("other")  # None before the other's first update
                row["chance"] = None if beside is None else _chance(now, beside, names)
            rows.append(row)
        previous = now
    return rows


def _read(path: Path, step: int) -> Masks:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = json.loads((file.metadata() or {})["shapes"])
            masks = Masks(
                step,
                {name: file.get_tensor(name) for name in shapes},
                {k: tuple(map(int, v)) for k, v in shapes.items()},
            )
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, bits in masks.bits.items():
        if bits.dtype != np.uint8 or bits.shape != (-(-prod(masks.shapes[name]) // 8),):
            raise ValueError(f"{path} is damaged: {name} does not have the bits of {masks.shapes[name]}")
    if not masks.bits:
        raise ValueError(f"{path} is damaged: it has no masks")
    return masks


def _shared(one: Masks, two: Masks) -> dict[str, tuple[int, int]]:
    """|A and B| and |A or B| of each layer."""
    counts = {}
    for name, bits in one.bits.items():
        if one.shapes[name] != two.shapes.get(name):
            raise ValueError(
                f"the masks belong to different networks: {name} is {one.shapes[name]} at step {one.step}, "
                f"{two.shapes.get(name, 'not there')} at step {two.step} of the other"
            )
        counts[name] = _ones(bits & two.bits[name]), _ones(bits | two.bits[name])
    return counts


def _ratio(counts: Mapping[str, tuple[int, int]], names: list[str]) -> float:
    """The overlap in some layers together."""
    return sum(counts[name][0] for name in names) / max(sum(counts[name][1] for name in names), 1)


def _ones(bits: Bits) -> int:
    return int(np.unpackbits(bits).sum())


def _chance(one: Masks, two: Masks, names: list[str]) -> float:
    """The overlap of random masks with as many kept weights in each layer.

    |A and B| is then |A| |B| / n on average in a layer of n weights.
    """
    counts = [(one.kept[name], two.kept[name], prod(one.shapes[name])) for name in names]
    both = sum(a * b / n for a, b, n in counts)
    return both / max(sum(a + b for a, b, _ in counts) - both, 1)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(("first", "previous", "last", "other", "chance")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            style = ":" if name == "chance" else "-"
            axis.plot(*zip(*points, strict=True), style, color=PALETTE[i], marker="o", markersize=3, label=name)
    axis.set(xlabel="optimizer step", ylabel="overlap with the masks", ylim=(0, 1.03))
    remove_frame(axis)
    axis.legend(frameon=False)
    save(figure, path)
