"""What a sparse model looks like: a table, rows for a CSV file and two figures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from pl_sparse.files import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pl_sparse.cost import Macs
    from pl_sparse.pruner import Pruner

__all__ = [
    "LayerRow",
    "Summary",
    "dead_layers",
    "layer_rows",
    "plot_layers",
    "plot_masks",
    "plot_training",
    "summarize",
    "summary_table",
]

# Okabe and Ito's palette: told apart with any colour vision.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
_DPI = 150


@dataclass(frozen=True)
class LayerRow:
    """One prunable weight.

    Attributes:
        name: parameter name.
        shape: the weight's shape.
        structure: what is removed as one, for example "unstructured" or "2:4".
        weights: number of elements.
        kept: number of elements the mask keeps.
        macs_dense: multiply-accumulates a sample with all elements.
        macs_sparse: the same with the kept elements.
        note: anything worth telling, for example why it stays dense.
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    weights: int
    kept: int
    macs_dense: float = 0.0
    macs_sparse: float = 0.0
    note: str = ""

    @property
    def density(self) -> float:
        """Kept share, 0..1; 1 for an empty weight."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def sparsity(self) -> float:
        """Removed share, 0..1."""
        return 1.0 - self.density


@dataclass(frozen=True)
class Summary:
    """A sparse model.

    Attributes:
        layers: the prunable weights, in model order.
        requested: the sparsity asked for, 0..1, over the prunable weights; None where it comes out of training.
        params_total: number of all parameters, prunable or not.
        params_nonzero: how many of them are not zero.
        macs_dense: multiply-accumulates a sample with all weights (0: not counted).
        macs_sparse: the same with the kept weights.
        bytes_dense: size of the stored model, dense.
        bytes_compressed: the same, compressed.
    """

    layers: tuple[LayerRow, ...]
    requested: float | None
    params_total: int
    params_nonzero: int
    macs_dense: float = 0.0
    macs_sparse: float = 0.0
    bytes_dense: int | None = None
    bytes_compressed: int | None = None

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """Number of prunable weights kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Removed share of the prunable weights, 0..1."""
        return 1.0 - self.kept / self.weights if self.weights else 0.0

    @property
    def sparsity_model(self) -> float:
        """Zero share of all parameters, 0..1."""
        return 1.0 - self.params_nonzero / self.params_total if self.params_total else 0.0


def summarize(pruner: Pruner, model: nn.Module, counted: Macs | None = None, prefix: str = "") -> Summary:
    """The summary of a model that `pruner` is attached to.

    The compressed size is that of one bit for each prunable weight, the kept values, and everything else as it is.

    Args:
        counted: its MACs, if they are known.
        prefix: cut from the names of layers.
    """
    rows = []
    owns = {param.name: own for group, own in pruner.targets for param, _ in group.members}
    params = {name.replace("_orig_mod.", ""): weight for name, weight in model.named_parameters()}
    masked = {param.name: param for param in pruner.params}
    tensors = [*params.values(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    compressed = size
    nonzero = 0
    for name, weight in params.items():
        nonzero += int(torch.count_nonzero(weight))
        dense, sparse = counted.layers.get(name, (0.0, 0.0)) if counted is not None else (0.0, 0.0)
        if name in masked:
            kept = masked[name].kept
            note = "" if owns[name] is None else f"own sparsity {owns[name]:g}"
            structure = pruner.structure.label
            compressed -= (weight.numel() - kept) * weight.element_size() - -(-weight.numel() // 8)
        elif name in pruner.dense:
            kept, note, structure = weight.numel(), f"dense: {pruner.dense[name]}", "dense"
        else:
            continue
        rows.append(
            LayerRow(
                name.removeprefix(prefix), tuple(weight.shape), structure, weight.numel(), kept, dense, sparse, note
            )
        )
    return Summary(
        layers=tuple(rows),
        requested=pruner.target,
        params_total=sum(weight.numel() for weight in params.values()),
        params_nonzero=nonzero,
        macs_dense=counted.dense if counted is not None else 0.0,
        macs_sparse=counted.sparse if counted is not None else 0.0,
        bytes_dense=size,
        bytes_compressed=compressed,
    )


def dead_layers(summary: Summary) -> list[str]:
    """Names of the layers that keep nothing, in model order."""
    return [layer.name for layer in summary.layers if _dead(layer)]


def layer_rows(summary: Summary) -> list[dict[str, object]]:
    """One flat row a layer, in model order, for a CSV file; shapes read "300x64"."""
    return [
        {
            "name": layer.name,
            "shape": _shape(layer),
            "structure": layer.structure,
            "weights": layer.weights,
            "kept": layer.kept,
            "density": layer.density,
            "sparsity": layer.sparsity,
            "macs_dense": layer.macs_dense,
            "macs_sparse": layer.macs_sparse,
            "note": layer.note,
        }
        for layer in summary.layers
    ]


def summary_table(summary: Summary) -> Table:
    """A row a layer, dead ones red, with the totals below; readable from 80 columns on."""
    noted = any(layer.note for layer in summary.layers)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        min_width=60,
        show_footer=True,
        caption=_totals(summary),
        caption_justify="left",
        caption_style="",
    )
    table.add_column("layer", "total", overflow="fold", min_width=16)
    table.add_column("shape", no_wrap=True)
    table.add_column("structure", no_wrap=True)
    table.add_column("weights", f"{summary.weights:,}", justify="right", no_wrap=True)
    table.add_column("kept", f"{summary.kept:,}", justify="right", no_wrap=True)
    table.add_column("density", _percent(1.0 - summary.sparsity), justify="right", no_wrap=True)
    if noted:
        table.add_column("note", overflow="fold", min_width=7)
    for layer in summary.layers:
        cells = [
            escape(layer.name),
            _shape(layer),
            escape(layer.structure),
            f"{layer.weights:,}",
            f"{layer.kept:,}",
            _percent(layer.density),
        ]
        table.add_row(*cells, *([escape(layer.note)] if noted else []), style="bold red" if _dead(layer) else None)
    return table


def plot_training(history: Sequence[Mapping[str, float | None]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw loss above accuracy over the epochs, the sparsity as an area behind both, and write it to `path`.

    Args:
        history: rows with any of the keys epoch, sparsity, train/loss, val/loss, train/acc and val/acc; a value
            that is missing, None or not finite is skipped, a missing epoch is the row's place. Without accuracies
            there is one panel.
        path: the picture; its suffix gives the format.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    keys = ("sparsity", "train/loss", "val/loss", "train/acc", "val/acc")
    series = {key: points for key in keys if (points := _points(history, key))}
    if not series:
        raise ValueError("the training history holds no loss, accuracy or sparsity to draw")
    names = {"loss": "loss", "acc": "accuracy"}
    panels = [kind for kind in names if f"train/{kind}" in series or f"val/{kind}" in series] or ["loss"]

    figure = Figure(figsize=(8, 1.0 + 2.7 * len(panels)), layout="constrained")
    handles: dict[str, Artist] = {}
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axis, kind in zip(axes, panels, strict=True):
        for split, colour, style in (("train", _BLUE, "-"), ("val", _VERMILION, "--")):
            points = series.get(f"{split}/{kind}", [])
            if points:
                epochs, values = zip(*points, strict=True)
                mark = "o" if len(points) <= 40 else ""
                (handles[split],) = axis.plot(epochs, values, style, color=colour, marker=mark, markersize=3.5)
        axis.set_ylabel(names[kind])
        _plain(axis)
        if "sparsity" in series:
            handles["sparsity"] = _sparsity_behind(axis, series["sparsity"])

    drawn = [epoch for points in series.values() for epoch, _ in points]
    margin = 0.02 * (max(drawn) - min(drawn)) or 0.5
    axes[-1].set_xlim(min(drawn) - margin, max(drawn) + margin)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch")
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=3, frameon=False)
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    _save(figure, path)


def plot_tickets(rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the validation accuracy (else loss) of each round over the remaining weights, the last and the best of a
    round.

    Args:
        rows: with "remaining", a fraction, and any of val/acc, best/val/acc, val/loss, best/val/loss.
        path: the picture; its suffix gives the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    kind = "acc" if any("val/acc" in row for row in rows) else "loss"
    for key, label, colour, style in (
        (f"val/{kind}", "end of the round", _BLUE, "-"),
        (f"best/val/{kind}", "best of the round", _VERMILION, "--"),
    ):
        points = [(row["remaining"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3.5, label=label)
            if key.startswith("val"):
                axis.axhline(points[0][1], color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("weights remaining")
    axis.set_ylabel("validation accuracy" if kind == "acc" else "validation loss")
    _plain(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    _save(figure, path)


def plot_layers(summary: Summary, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the density of each layer as a bar, first layer on top, and write it to `path`.

    "kept / total" stands right of each bar; a line marks the density of all prunable weights.

    Raises:
        ValueError: the summary has no layers.
    """
    from matplotlib.figure import Figure

    layers = summary.layers
    if not layers:
        raise ValueError("the summary has no layers to draw")
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(layers)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(layers))
    axis.barh(rows, [layer.density for layer in layers], height=0.7, color=_BLUE)
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
            color=_VERMILION if _dead(layer) else "black",
        )
    total = 1.0 - summary.sparsity
    axis.axvline(total, color="black", linestyle="--", linewidth=1, label=f"all layers: {_percent(total)}")
    highest = max([layer.density for layer in layers] + [total])
    axis.set_xlim(0, min(1.0, 1.1 * highest) or 1.0)
    axis.set_xlabel("density")
    axis.tick_params(axis="y", length=0)
    _plain(axis)
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", frameon=False)
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    _save(figure, path)


def plot_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw each mask as a picture, output by output from the top, and write them to `path`.

    A tensor (out, in, *kernel) is drawn as out rows of in x kernel columns. Where that is more than about 400 either
    way, a pixel is the density of a patch of it.

    Raises:
        ValueError: there is no mask.
    """
    from matplotlib.figure import Figure

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
        # one scale a layer, so that a sparse one is not a black square
        axis.imshow(
            drawn.numpy(), cmap="Blues", vmin=0, vmax=float(drawn.max()) or 1, aspect="auto", interpolation="nearest"
        )
        axis.set_title(f"{_shortened(name, 30)}\n{_percent(float(mask.float().mean()))} kept", fontsize=8)
        axis.set_xlabel("x".join(map(str, mask.shape)), fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in panels[len(masks) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    _save(figure, path)


def _dead(layer: LayerRow) -> bool:
    return layer.kept == 0 and layer.weights > 0


def _shape(layer: LayerRow) -> str:
    return "x".join(map(str, layer.shape))


def _percent(share: float) -> str:
    """
    >>> _percent(0.1), _percent(0.9996)
    ('10.00%', '99.96%')
    """
    return f"{100 * share:.2f}%"


def _scaled(amount: float, unit: str = "", base: float = 1000.0) -> str:
    """`amount` with a prefix.

    >>> _scaled(1_234_567), _scaled(2048, "B", 1024), _scaled(12)
    ('1.23 M', '2.00 KiB', '12')
    """
    prefix = ""
    for larger in "kMGTP":
        if amount < base:
            break
        amount, prefix = amount / base, larger
    if base == 1024 and prefix:
        prefix = prefix.upper() + "i"
    number = f"{amount:.2f}" if prefix else f"{amount:.0f}"
    return f"{number} {prefix}{unit}".rstrip()


def _totals(summary: Summary) -> str:
    """The lines below the table."""
    requested = "learned" if summary.requested is None else f"requested {_percent(summary.requested)}"
    lines = [
        f"sparsity: {requested}, actual {_percent(summary.sparsity)}",
        f"all parameters: {_percent(summary.sparsity_model)} zero "
        f"({summary.params_nonzero:,} of {summary.params_total:,} left)",
    ]
    if summary.macs_dense:
        share = _percent(summary.macs_sparse / summary.macs_dense)
        lines.append(f"MACs a sample: {_scaled(summary.macs_dense)} -> {_scaled(summary.macs_sparse)} ({share})")
    if summary.bytes_dense and summary.bytes_compressed is not None:
        share = _percent(summary.bytes_compressed / summary.bytes_dense)
        sizes = [_scaled(size, "B", 1024) for size in (summary.bytes_dense, summary.bytes_compressed)]
        lines.append(f"size: {sizes[0]} -> {sizes[1]} ({share})")
    if dead := dead_layers(summary):
        lines.append(f"[bold red]dead layers: {len(dead)}[/]")
    return "\n".join(lines)


def _points(history: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows where `key` has a finite value, by epoch."""
    points = []
    for place, row in enumerate(history):
        epoch, value = row.get("epoch"), row.get(key)
        if value is not None and math.isfinite(value):
            points.append((float(place if epoch is None else epoch), float(value)))
    return sorted(points, key=lambda point: point[0])


def _sparsity_behind(axis: Axes, points: list[tuple[float, float]]) -> Artist:
    """Fill the sparsity, 0..1, on a second axis behind `axis`; returns the area for a legend."""
    if len(points) == 1:  # a single point has no area
        (epoch, value) = points[0]
        points = [(epoch - 0.25, value), (epoch + 0.25, value)]
    epochs, values = zip(*points, strict=True)
    behind = axis.twinx()
    area = behind.fill_between(epochs, values, color=_GREY, alpha=0.25, linewidth=0)
    behind.set_ylim(0, 1)
    behind.set_ylabel("sparsity", color="#595959")
    behind.tick_params(colors="#595959")
    for spine in behind.spines.values():
        spine.set_visible(False)
    behind.set_zorder(axis.get_zorder() - 1)
    axis.patch.set_visible(False)
    return area


def _plain(axis: Axes) -> None:
    """No frame above and at the right, a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#D9D9D9", linewidth=0.6)
    axis.set_axisbelow(True)


def _shortened(name: str, length: int = 44) -> str:
    """The end of `name`, which tells layers apart.

    >>> _shortened("encoder.layers.0.weight", 12)
    '…rs.0.weight'
    """
    return name if len(name) <= length else "…" + name[len(name) - length + 1 :]


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
