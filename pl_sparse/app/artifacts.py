"""What a run leaves behind: its weights, figures, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pl_sparse.app.parts import network
from pl_sparse.callbacks import History, Quantize, Shrink, Sparsity
from pl_sparse.core.files import replacing, write_csv, write_text
from pl_sparse.pruner import Pruner
from pl_sparse.quantize import integers
from pl_sparse.results.figures import plot_layers, plot_training
from pl_sparse.results.summary import Summary, layer_rows, summary_table
from pl_sparse.surgery.saved import save_plan

__all__ = ["figures", "first", "integers_of", "one", "tell", "write"]

T = TypeVar("T")


def one(own: list[Any], kind: type[T]) -> T:
    """The callback of a class that a run always has."""
    return next(callback for callback in own if isinstance(callback, kind))


def first(own: list[Any], kind: type[T]) -> T | None:
    """The callback of a class; None where a run has none."""
    return next((callback for callback in own if isinstance(callback, kind)), None)


def integers_of(
    quantize: Quantize, module: LightningModule, pruner: Pruner, folder: Path
) -> tuple[nn.Module, dict[str, float]]:
    """The network with integers, and the fraction of zeros among them; the module is in floating point again."""
    quantization, net = quantize.quantization, network(module)
    ranges = quantization.state_dict()
    if ranges:
        with replacing(folder / "ranges.safetensors") as temporary:
            save_file(ranges, temporary)
    module.cpu()
    converted = quantization.convert()
    quantization.release()
    found = integers(converted, net)
    with torch.no_grad():  # where a weight of the plain class can have the rounded values, it has them
        for name, weight in converted.named_parameters():
            if hasattr(weight, "dequantize") and hasattr(weight, "qdata"):
                net.get_parameter(name).copy_(weight.dequantize())
    names = {id(weight): name for name, weight in net.named_parameters()}
    pruned = [names[id(param.weight)] for param in pruner.params if id(param.weight) in names]
    kept = [found[name] for name in pruned if name in found]
    left = [name for name in pruned if name not in found]
    if left:
        rank_zero_warn(f"{', '.join(left)} stay in floating point: quantization={quantization.dtype} does not fit them")
    count = sum(value.numel() for value in kept)
    if not count:
        return converted, {}
    return converted, {"sparsity_quantized": 1 - sum(int(torch.count_nonzero(value)) for value in kept) / count}


def figures(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    cut: str,
    own: list[Any],
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """Save the weights that the module has to `folder`/model.safetensors, and count them there."""
    weights = folder / "model.safetensors"
    tensors = {
        name.replace("_orig_mod.", "").removeprefix(cut): tensor.detach().cpu().contiguous()
        for name, tensor in module.state_dict().items()
    }
    shared: dict[int, str] = {}
    for name in list(tensors):  # safetensors refuses tensors that share memory
        if shared.setdefault(tensors[name].data_ptr(), name) != name:
            tensors[name] = tensors[name].clone()
    with replacing(weights) as temporary:
        save_file(tensors, temporary)
    if (shrink := first(own, Shrink)) is not None:
        save_plan(shrink.plan.below(cut), module, folder)

    history, sparsity = one(own, History), one(own, Sparsity)
    pruner = sparsity.pruner
    summary = sparsity.summarize(module, cut)
    prunable = [param.name.removeprefix(cut) for param in pruner.params]
    nonzero, count = _nonzeros(weights, prunable), pruner.numel
    # inputs that left the model because nothing feeds them any more were not pruned
    unread = pruner.kept - sum(int(torch.count_nonzero(param.mask)) for param in pruner.params)
    return {
        "method": cfg.method or type(pruner.scorer).__name__.lower(),
        "scorer": type(pruner.scorer).__name__.lower(),
        "schedule": type(pruner.schedule).__name__.lower(),
        "structure": pruner.structure.label,
        "allocation": type(pruner.allocation).__name__.lower(),
        "masking": type(pruner.masking).__name__.lower(),
        "seed": cfg.seed,
        "sparsity_requested": pruner.target if pruner.at_target else pruner.level,
        "sparsity": 1 - (nonzero + unread) / count,
        "sparsity_model": summary.sparsity_model,
        "at_target": pruner.at_target,
        **pruner.scorer.facts(pruner.groups),
        "params_total": summary.params_total,
        "params_left": summary.params_left,
        "params_prunable": count,
        "params_nonzero": summary.params_nonzero,
        "macs_dense": summary.macs_dense,
        "macs_sparse": summary.macs_sparse,
        **{name: float(value) for name, value in scores.items()},
        "size_bytes": {"dense": summary.bytes_dense, "compressed": summary.bytes_compressed},
        "train_seconds": round(history.seconds, 3),
        "epochs": len(history.rows),
        "steps": trainer.global_step,
        "epoch_best": None,
        "device": str(trainer.strategy.root_device),
    }


def write(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    cut: str,
    own: list[Any],
    best: int | None,
    tested: Mapping[str, float],
) -> tuple[dict[str, Any], Summary]:
    """Write what a run leaves behind but its metrics, which are returned with the summary of its layers.

    Args:
        best: the epoch that the weights are of; None for the last.
        tested: metrics of the test set.
    """
    sparsity = one(own, Sparsity)
    rows = one(own, History).rows
    at_best = next((row for row in rows if best is not None and int(row["epoch"]) == best), rows[-1] if rows else {})
    scores = {name: value for name, value in at_best.items() if name.startswith(("val", "train"))}
    metrics = figures(cfg, folder, trainer, module, cut, own, {**scores, **tested})
    metrics |= {"sparsity_requested": sparsity.pruner.target, "epoch_best": best}
    summary = sparsity.summarize(module, cut)
    title = f"{metrics['method']}, {metrics['structure']}, sparsity {metrics['sparsity']:.4f}"
    write_csv(folder / "layers.csv", layer_rows(summary))
    if rows:
        plot_training(rows, folder / "training.png", title)
    plot_layers(summary, folder / "layers.png", title)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    return metrics, summary


def _nonzeros(path: Path, names: list[str]) -> int:
    """The weights of some tensors that are not zero, counted in the saved file."""
    with safe_open(path, framework="pt") as file:
        return sum(int(torch.count_nonzero(file.get_tensor(name))) for name in names)


_WRITTEN = {
    "metrics.json": "the figures of the run",
    "front.json": "the figures of each level",
    "training.png": "loss, accuracy and sparsity over the epochs",
    "layers.png": "density of each layer",
    "history.csv": "a row an epoch",
    "layers.csv": "a row a layer",
    "model.safetensors": "the sparse weights",
    "shrunk.json": "what was removed from the model, for export.load_shrunk",
    "tickets.png": "accuracy of each round over the remaining weights",
    "tickets.csv": "a row a round",
    "levels": "mask and weights of each round",
    "ranges.safetensors": "ranges of the activations",
    "bench.png": "dense and exported side by side",
    "checkpoints": "best at the target sparsity, and last",
}


def tell(folder: Path, summary: Summary, metrics: Mapping[str, Any], levels: list[dict[str, Any]]) -> None:
    """Print layers, levels and scores, and what is where."""
    console = Console()
    console.print()
    console.print(summary_table(summary))
    if levels:
        names = [
            name for name in ("sparsity", "val/acc", "test/acc", "macs_sparse", "params_nonzero") if name in levels[0]
        ]
        table = Table(*names, title="the front, each level at the end of its training")
        for row in levels:
            table.add_row(*(f"{row[name]:.4f}" if row[name] <= 1 else f"{row[name]:,.0f}" for name in names))
        console.print(table)
    scores = [(name, metrics[name]) for name in ("val/acc", "test/acc", "test/loss") if name in metrics]
    line = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    epoch = metrics["epoch_best"]
    which = f"best at the target: epoch {epoch + 1}" if epoch is not None else "last epoch"
    console.print(f"{line} ({which} of {metrics['epochs']}, {metrics['train_seconds']:.1f} s of training)".lstrip())
    console.print(f"\nwritten to {folder}:", highlight=False, soft_wrap=True)
    for name, what in _WRITTEN.items():
        if (folder / name).exists():
            console.print(f"  {name:<18} {what}", highlight=False)
