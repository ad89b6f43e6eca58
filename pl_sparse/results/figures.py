"""The figures of a run: training curves, density of layers, masks, lottery tickets."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import Tensor, nn

from pl_sparse.results.judged import judged
from pl_sparse.results.style import BLUE, GREY, VERMILION, remove_frame, save
from pl_sparse.results.summary import Summary, percent

__all__ = ["plot_layers", "plot_masks", "plot_tickets", "plot_training"]


def plot_training(history: Sequence[Mapping[str, float | None]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw loss above accuracy against epochs, the sparsity as an area behind both, and write it to `path`.

    Args:
        history: rows with any of the keys epoch, sparsity, train/loss, val/loss, train/acc and val/acc, in whatever
            spelling (valid_loss); a value that is missing, None or not finite is skipped, a missing epoch is the row's
            place. Without accuracies the second panel is of another metric, and without one there is one panel.
        path: the picture; its suffix gives the format.
        title: above the figure; "" for none.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels = {"loss": _splits(history, ["loss"]), "accuracy": _splits(history, ["acc", "accuracy"])}
    if not panels["accuracy"]:
        panels["metric"] = _splits(history, [])
    panels = {label: splits for label, splits in panels.items() if splits} or {"loss": {}}
    keys = ["sparsity", *(key for splits in panels.values() for key in splits.values())]
    curves = {key: points for key in keys if (points := _points(history, key))}
    if not curves:
        raise ValueError("the training history holds no loss, accuracy or sparsity to draw")

    figure = Figure(figsize=(8, 1.0 + 2.7 * len(panels)), layout="constrained")
    handles: dict[str, Artist] = {}
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axis, (label, splits) in zip(axes, panels.items(), strict=True):
        for split, colour, style in (("train", BLUE, "-"), ("val", VERMILION, "--")):
            points = curves.get(splits.get(split, ""), [])
            if points:
                marker = "o" if len(points) <= 40 else ""
                (handles[split],) = axis.plot(
                    *zip(*points, strict=True), style, color=colour, marker=marker, markersize=3.5
                )
        axis.set_ylabel(label if label != "metric" else splits.get("val", label))
        remove_frame(axis)
        if "sparsity" in curves:
            handles["sparsity"] = _sparsity_behind(axis, curves["sparsity"])

    epochs = [epoch for points in curves.values() for epoch, _ in points]
    margin = 0.02 * (max(epochs) - min(epochs)) or 0.5
    axes[-1].set_xlim(min(epochs) - margin, max(epochs) + margin)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch")
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=3, frameon=False)
    save(figure, path, title)


def plot_tickets(rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the metric that models are judged by at each round of lottery tickets over the weights remaining.

    One line is the end of the rounds, another the best epoch of each.

    Args:
        rows: a row per round, with "remaining", a fraction, what validation logs, and the best of it under "best/".
        path: the picture; its suffix gives the format.
        title: above the figure; "" for none.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    metric = judged(dict.fromkeys(name for row in rows for name in row)) or "val/loss"
    for key, label, colour, style in (
        (metric, "end of the round", BLUE, "-"),
        (f"best/{metric}", "best of the round", VERMILION, "--"),
    ):
        points = [(row["remaining"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3.5, label=label)
            if key == metric:
                axis.axhline(points[0][1], color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("weights remaining")
    axis.set_ylabel({"val/acc": "validation accuracy", "val/loss": "validation loss"}.get(metric, metric))
    remove_frame(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    save(figure, path, title)


def plot_layers(summary: Summary, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the density of each layer as a bar, first layer on top, and write it to `path`.

    "kept / total" stands right of each bar; a line marks the density of all prunable weights.

    Args:
        summary: the summary of the model.
        path: the picture; its suffix gives the format.
        title: above the figure; "" for none.

    Raises:
        ValueError: the summary has no layers.
    """
    layers = summary.layers
    if not layers:
        raise ValueError("the summary has no layers to draw")
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(layers)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(layers))
    axis.barh(rows, [layer.density for layer in layers], height=0.7, color=BLUE)
    axis.set_yticks(rows, [_shortened(layer.name) for layer in layers], fontsize=8)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    for row, layer in enumerate(layers):
        axis.annotate(
            f"{layer.kept:,} / {layer.weights:,}",
            (1, row),
            xycoords=axis.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=VERMILION if layer.dead else "black",
        )
    total = 1.0 - summary.sparsity
    axis.axvline(total, color="black", linestyle="--", linewidth=1, label=f"all layers: {percent(total)}")
    highest = max([layer.density for layer in layers] + [total])
    axis.set_xlim(0, min(1.0, 1.1 * highest) or 1.0)
    axis.set_xlabel("density")
    axis.tick_params(axis="y", length=0)
    remove_frame(axis)
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", frameon=False)
    save(figure, path, title)


def plot_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw each mask as a picture, output by output from the top, and write them to `path`.

    A tensor (out, in, *kernel) is drawn as out rows of in x kernel columns. Where that is more than 400 rows or
    columns, a pixel is the density of a patch.

    Args:
        masks: by name, True where a weight is kept.
        path: the picture; its suffix gives the format.
        title: above the figure; "" for none.

    Raises:
        ValueError: there is no mask.
    """
    if not masks:
        raise ValueError("there is no mask to draw")
    columns = min(3, len(masks))
    rows = -(-len(masks) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.4 + 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, mask) in zip(panels, masks.items(), strict=False):
        pixels = mask.float().reshape(mask.shape[0], -1)
        size = min(pixels.shape[0], 400), min(pixels.shape[1], 400)
        drawn = nn.functional.adaptive_avg_pool2d(pixels[None, None], size)[0, 0]
        # each layer has its own scale, so that a sparse one is not blank
        axis.imshow(
            drawn.numpy(), cmap="Blues", vmin=0, vmax=float(drawn.max()) or 1, aspect="auto", interpolation="nearest"
        )
        axis.set_title(f"{_shortened(name, 30)}\n{percent(float(mask.float().mean()))} kept", fontsize=8)
        axis.set_xlabel("x".join(map(str, mask.shape)), fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in panels[len(masks) :]:
        axis.set_visible(False)
    save(figure, path, title)


def _splits(history: Sequence[Mapping[str, float | None]], kinds: Sequence[str]) -> dict[str, str]:
    """The key of a metric in training ("train") and in validation ("val").

    Args:
        kinds: words of which the metric's name has one; none for the first metric of validation that is not a loss.

    >>> _splits([{"train/loss": 1, "valid_loss": 1, "valid_f1": 1}], ["loss"])
    {'val': 'valid_loss', 'train': 'train/loss'}
    >>> _splits([{"train/loss": 1, "valid_loss": 1, "valid_f1": 1}], [])
    {'val': 'valid_f1'}
    """
    keys = [key for key in dict.fromkeys(key for row in history for key in row) if not key.endswith("_step")]
    words = {
        key: [word for word in re.split(r"[^a-z0-9]+", key.lower()) if word] for key in keys if _points(history, key)
    }
    splits: dict[str, str] = {}
    for split in ("val", "train"):
        of_split = [key for key, (first, *_) in words.items() if first.startswith(split)]
        if kinds:
            fitting = [key for key in of_split if set(kinds) & set(words[key])]
            fitting.sort(key=lambda key: key != f"{split}/{kinds[0]}")
        elif split == "val":
            fitting = [key for key in of_split if "loss" not in words[key]]
        else:
            fitting = [key for key in of_split if "val" in splits and words[key][1:] == words[splits["val"]][1:]]
        if fitting:
            splits[split] = fitting[0]
    return splits


def _points(history: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    """The pairs (epoch, value) of the rows where `key` has a finite value, by epoch."""
    points = []
    for place, row in enumerate(history):
        epoch, value = row.get("epoch"), row.get(key)
        if value is not None and math.isfinite(value):
            points.append((float(place + 1 if epoch is None else epoch), float(value)))
    return sorted(points, key=lambda point: point[0])


def _sparsity_behind(axis: Axes, points: list[tuple[float, float]]) -> Artist:
    """Fill the sparsity, 0..1, on a second axis behind `axis`, and return the area for the legend."""
    if len(points) == 1:  # a single point has no area
        (epoch, value) = points[0]
        points = [(epoch - 0.25, value), (epoch + 0.25, value)]
    epochs, values = zip(*points, strict=True)
    behind = axis.twinx()
    area = behind.fill_between(epochs, values, color=GREY, alpha=0.25, linewidth=0)
    behind.set_ylim(0, 1)
    behind.set_ylabel("sparsity", color="#595959")
    behind.tick_params(colors="#595959")
    for spine in behind.spines.values():
        spine.set_visible(False)
    behind.set_zorder(axis.get_zorder() - 1)
    axis.patch.set_visible(False)
    return area


def _shortened(name: str, length: int = 44) -> str:
    """The end of `name`, where the names of layers differ.

    >>> _shortened("encoder.layers.0.weight", 12)
    '…rs.0.weight'
    """
    return name if len(name) <= length else "…" + name[len(name) - length + 1 :]
