"""The summary of a sparse model: what is left of each layer, as a table and as rows for a CSV file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from pl_sparse.core.dtensor import is_sharded, local, total
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.upstream import plain_name
from pl_sparse.network.macs import Macs
from pl_sparse.pruner import Pruner

__all__ = ["LayerRow", "Summary", "dead_layers", "layer_rows", "percent", "summarize", "summary_table"]


@dataclass(frozen=True)
class LayerRow:
    """One prunable weight.

    Attributes:
        name: parameter name.
        shape: the weight's shape.
        structure: what is pruned together, for example "unstructured" or "2:4".
        weights: number of elements.
        kept: number of elements the mask keeps.
        macs_dense: multiply-accumulates per sample with all elements.
        macs_sparse: multiply-accumulates per sample with the kept elements.
        note: a remark, for example why the weight is not pruned.
        misfit: whether the weight stays dense because the structure does not fit it.
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    weights: int
    kept: int
    macs_dense: float = 0.0
    macs_sparse: float = 0.0
    note: str = ""
    misfit: bool = False

    @property
    def density(self) -> float:
        """Kept share, 0..1; 1 for an empty weight."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def sparsity(self) -> float:
        """Removed share, 0..1."""
        return 1.0 - self.density

    @property
    def dead(self) -> bool:
        """Whether nothing of it is kept."""
        return self.kept == 0 and self.weights > 0


@dataclass(frozen=True)
class Summary:
    """A sparse model.

    Attributes:
        layers: the prunable weights, in model order.
        requested: the sparsity asked for, 0..1, over the prunable weights; None where it comes out of training.
        params_total: number of all parameters, prunable or not.
        params_nonzero: how many of them are not zero.
        macs_dense: multiply-accumulates per sample with all weights (0: not counted).
        macs_sparse: multiply-accumulates per sample with the kept weights.
        bytes_dense: size of the stored model, dense.
        bytes_compressed: size of the stored model, compressed.
        params_left: number of parameters after channels were removed (0: not counted).
        coverage: prunable weights over all weights there are, frozen and excluded ones too, 0..1; None: not counted.
        left_out: names of the weights that coverage lacks and no pattern excludes.
    """

    layers: tuple[LayerRow, ...]
    requested: float | None
    params_total: int
    params_nonzero: int
    macs_dense: float = 0.0
    macs_sparse: float = 0.0
    bytes_dense: int | None = None
    bytes_compressed: int | None = None
    params_left: int = 0
    coverage: float | None = None
    left_out: tuple[str, ...] = ()

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
        """Removed share of the weights that the structure prunes, 0..1, as `Pruner.sparsity` has it."""
        fitting = [layer for layer in self.layers if not layer.misfit]
        weights = sum(layer.weights for layer in fitting)
        return 1.0 - sum(layer.kept for layer in fitting) / weights if weights else 0.0

    @property
    def sparsity_model(self) -> float:
        """Zero share of all parameters, 0..1."""
        return 1.0 - self.params_nonzero / self.params_total if self.params_total else 0.0


def summarize(pruner: Pruner, model: nn.Module, counted: Macs | None = None, prefix: str = "") -> Summary:
    """The summary of a model that `pruner` is attached to, or of a copy of it.

    Where a copy has other values than zero under the masks, these weights count as kept.

    The compressed size is that of one bit for each prunable weight, the kept values, and everything else as it is.

    Args:
        pruner: the pruner.
        model: the model, with its channels removed or not.
        counted: its MACs, if they are counted.
        prefix: cut from the names of layers.

    Raises:
        RuntimeError: the model was shrunk, and the pruner was not.
    """
    pruner.refuse_unfollowed()
    rows = []
    overrides = {param.name: override for group, override in pruner.group_overrides for param, _ in group.members}
    params = {plain_name(name): weight for name, weight in model.named_parameters()}
    masked = {param.name: param for param in pruner.params}
    tensors = {**params, **dict(model.named_buffers())}
    compressed = sum(tensor.numel() * tensor.element_size() for tensor in (*params.values(), *model.buffers()))
    former = {name: math.prod(cut.shape) for name, cut in pruner.cuts.items()}  # elements before channels were removed
    size = compressed + sum(
        (count - tensors[name].numel()) * tensors[name].element_size() for name, count in former.items()
    )
    nonzero = 0
    for name, weight in params.items():
        nonzero += _nonzero(weight)
        dense, sparse = counted.layers.get(name, (0.0, 0.0)) if counted is not None else (0.0, 0.0)
        if name in masked:
            extra = _unmasked(weight, masked[name])
            kept = masked[name].kept + extra
            note = "" if overrides[name] is None else f"own sparsity {overrides[name]:g}"
            note = f"{extra} pruned weights are not zero" if extra else note
            structure = pruner.structure.label
            stored = kept if masked[name].cut is None else int(torch.count_nonzero(masked[name].mask)) + extra
            # pruned values are not stored, and each element has a bit
            compressed -= (weight.numel() - stored) * weight.element_size() - -(-weight.numel() // 8)
        elif name in pruner.misfits:
            kept, note, structure = weight.numel(), f"dense: {pruner.misfits[name]}", "dense"
        else:
            continue
        rows.append(
            LayerRow(
                name=name.removeprefix(prefix),
                shape=tuple(weight.shape),
                structure=structure,
                weights=former.get(name, weight.numel()),
                kept=kept,
                macs_dense=dense,
                macs_sparse=sparse,
                note=note,
                misfit=name not in masked,
            )
        )
    return Summary(
        layers=tuple(rows),
        requested=pruner.target,
        params_total=sum(former.get(name, weight.numel()) for name, weight in params.items()),
        params_left=sum(weight.numel() for weight in params.values()),
        params_nonzero=nonzero,
        macs_dense=counted.dense if counted is not None else 0.0,
        macs_sparse=counted.sparse if counted is not None else 0.0,
        bytes_dense=size,
        bytes_compressed=compressed,
        coverage=pruner.coverage,
        left_out=tuple(name.removeprefix(prefix) for name in pruner.uncovered),
    )


def _nonzero(weight: nn.Parameter) -> int:
    """How many elements are not zero: all, where a sparse layout or the tensor of another library cannot tell."""
    if weight.layout is not torch.strided:
        return weight.numel()
    try:
        nonzero = local(weight) != 0  # torch counts no float8, and compares it
        return int(total(nonzero, weight) if is_sharded(weight) else torch.count_nonzero(nonzero))
    except NotImplementedError:
        return weight.numel()


def _unmasked(weight: nn.Parameter, param: MaskedParameter) -> int:
    """How many weights of a model are not zero where the masks are: of another model, or of values before a mask."""
    if weight is param.weight or not param.pruned or is_sharded(weight) or weight.shape != param.mask.shape:
        return 0
    return int(torch.count_nonzero(weight.detach().bool() & ~param.mask.to(weight.device)))


def dead_layers(summary: Summary) -> list[str]:
    """Names of the layers that keep nothing, in model order."""
    return [layer.name for layer in summary.layers if layer.dead]


def layer_rows(summary: Summary) -> list[dict[str, object]]:
    """A flat row per layer, in model order, for a CSV file; shapes read "300x64"."""
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
    """A table with a row per layer, dead ones red, and the totals below; readable from 80 columns on."""
    with_notes = any(layer.note for layer in summary.layers)
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
    table.add_column(
        "density", percent(summary.kept / summary.weights if summary.weights else 1.0), justify="right", no_wrap=True
    )
    if with_notes:
        table.add_column("note", overflow="fold", min_width=7)
    for layer in summary.layers:
        cells = [
            escape(layer.name),
            _shape(layer),
            escape(layer.structure),
            f"{layer.weights:,}",
            f"{layer.kept:,}",
            percent(layer.density),
        ]
        table.add_row(*cells, *([escape(layer.note)] if with_notes else []), style="bold red" if layer.dead else None)
    return table


def _shape(layer: LayerRow) -> str:
    return "x".join(map(str, layer.shape))


def percent(share: float) -> str:
    """A share as text.

    >>> percent(0.1), percent(0.9996)
    ('10.00%', '99.96%')
    """
    return f"{100 * share:.2f}%"


def _scaled(amount: float, unit: str = "", base: float = 1000.0) -> str:
    """An amount with the prefix of its unit.

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
    requested = "learned" if summary.requested is None else f"requested {percent(summary.requested)}"
    dense = ""
    if any(layer.misfit for layer in summary.layers):
        dense = f" of the weights that fit, {percent(1.0 - summary.kept / summary.weights)} of all in the table"
    lines = [
        f"sparsity: {requested}, actual {percent(summary.sparsity)}{dense}",
        f"all parameters: {percent(summary.sparsity_model)} zero "
        f"({summary.params_nonzero:,} of {summary.params_total:,} left)",
    ]
    if summary.coverage is not None:
        names = ", ".join(summary.left_out[:3]) + (", ..." if len(summary.left_out) > 3 else "")
        lines.append(
            escape(f"coverage: {percent(summary.coverage)} of the weights" + (f", without {names}" * bool(names)))
        )
    if summary.macs_dense:
        share = percent(summary.macs_sparse / summary.macs_dense)
        lines.append(f"MACs per sample: {_scaled(summary.macs_dense)} -> {_scaled(summary.macs_sparse)} ({share})")
    if summary.bytes_dense and summary.bytes_compressed is not None:
        share = percent(summary.bytes_compressed / summary.bytes_dense)
        sizes = [_scaled(size, "B", 1024) for size in (summary.bytes_dense, summary.bytes_compressed)]
        lines.append(f"size: {sizes[0]} -> {sizes[1]} ({share})")
    if dead := dead_layers(summary):
        lines.append(f"[bold red]dead layers: {len(dead)}[/]")
    return "\n".join(lines)
