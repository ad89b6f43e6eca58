"""What a run leaves behind: its weights, figures, tables and pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pl_sparse.app.instantiate import network
from pl_sparse.app.parts import Parts
from pl_sparse.callbacks import Quantize
from pl_sparse.callbacks.calibration import example_of
from pl_sparse.core.files import replacing, write_csv, write_text
from pl_sparse.core.ledger import Ledger
from pl_sparse.core.optional import nice_to_have
from pl_sparse.core.upstream import plain_name
from pl_sparse.quantize import integers
from pl_sparse.results.figures import plot_layers, plot_training
from pl_sparse.results.summary import Summary, layer_rows, summary_table
from pl_sparse.structure import Vocabulary
from pl_sparse.surgery.saved import save_plan, save_shrunk
from pl_sparse.surgery.vocabulary import shrink_vocabulary

__all__ = [
    "figures",
    "in_its_place",
    "integer_network",
    "print_report",
    "save_vocabulary",
    "save_weights",
    "write_reports",
]


def integer_network(quantize: Quantize, parts: Parts) -> tuple[nn.Module, dict[str, float]]:
    """Convert the network to integers, and leave the module in floating point; ranges go to ranges.safetensors.

    Returns:
        what is deployed of the module, with integers, and "sparsity_quantized", the fraction of zeros among them; no
        fraction where no pruned weight has integers.
    """
    quantization, net = quantize.quantization, quantize.net(parts.module)
    ranges = quantization.state_dict()
    if ranges:
        with replacing(parts.folder / "ranges.safetensors") as temporary:
            save_file(ranges, temporary)
    parts.module.cpu()
    converted = quantization.convert()
    quantization.release()
    by_name = integers(converted, net)
    with torch.no_grad():  # where a weight of the plain class can have the rounded values, it has them
        for name, weight in converted.named_parameters():
            if hasattr(weight, "dequantize") and hasattr(weight, "qdata"):
                net.get_parameter(name).copy_(weight.dequantize())
    names = {id(weight): name for name, weight in net.named_parameters()}
    pruned = [names[id(param.weight)] for param in parts.sparsity.pruner.params if id(param.weight) in names]
    missing = [name for name in pruned if name not in by_name]
    if missing:
        rank_zero_warn(
            f"{', '.join(missing)} stay in floating point: quantization={quantization.dtype} does not fit them"
        )
    values = [by_name[name] for name in pruned if name in by_name]
    count = sum(value.numel() for value in values)
    converted = in_its_place(network(parts.module), net, converted)
    if not count:
        return converted, {}
    nonzero = sum(int(torch.count_nonzero(value)) for value in values)
    return converted, {"sparsity_quantized": 1 - nonzero / count}


def in_its_place(deployed: nn.Module, net: nn.Module, converted: nn.Module) -> nn.Module:
    """What is deployed of a module, in a copy that has the converted network in the place of the trained one."""
    path = next((path for path, part in deployed.named_modules() if part is net), "")
    if not path:
        return converted
    twin = copy.deepcopy(deployed)
    twin.set_submodule(path, converted)
    return twin


def save_weights(parts: Parts, folder: Path) -> None:
    """Save the weights that the module has to model.safetensors, and what was removed from it to shrunk.json."""
    tensors = {
        plain_name(name).removeprefix(parts.prefix): tensor.detach().cpu().contiguous()
        for name, tensor in parts.module.state_dict().items()
    }
    first_names: dict[int, str] = {}
    for name in list(tensors):  # safetensors refuses tensors that share memory
        if first_names.setdefault(tensors[name].data_ptr(), name) != name:
            tensors[name] = tensors[name].clone()
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    if parts.shrink is not None:
        save_plan(parts.shrink.plan.below(parts.prefix), parts.module, folder)


def save_vocabulary(parts: Parts, trainer: Trainer) -> None:
    """Save the network without the rows of masked tokens to shrunk/, and their new numbers to shrunk/vocabulary.json.

    The network that was trained keeps its rows, as the data has the numbers of before. Nothing is saved where no row is
    masked, or where the network is another one without them, which a warning says.
    """
    pruner = parts.sparsity.pruner
    if not isinstance(pruner.structure, Vocabulary) or all(bool(param.mask.all()) for param in pruner.params):
        return
    masks = {param.name.removeprefix(parts.prefix): param.mask for param in pruner.params}
    smaller = copy.deepcopy(network(parts.module))
    try:
        plan, tokens = shrink_vocabulary(smaller, example_of(trainer, parts.module), masks)
    except ValueError as error:
        rank_zero_warn(f"the masked rows of the vocabulary stay: {error}")
        return
    save_shrunk(smaller, plan, parts.folder / "shrunk")
    tokens.save(parts.folder / "shrunk")


def figures(
    cfg: DictConfig, parts: Parts, trainer: Trainer, folder: Path, summary: Summary, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics of the model whose weights were saved to a folder, in which non-zero weights are counted.

    Args:
        folder: with model.safetensors.
        summary: of the module.
        scores: metrics of training, validation and test, by name.
    """
    pruner = parts.sparsity.pruner
    prunable = [param.name.removeprefix(parts.prefix) for param in pruner.params]
    nonzero, count = _nonzeros(folder / "model.safetensors", prunable), pruner.numel
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
        "coverage": summary.coverage,
        "at_target": pruner.at_target,
        **pruner.facts,
        "params_total": summary.params_total,
        "params_left": summary.params_left,
        "params_prunable": count,
        "params_nonzero": summary.params_nonzero,
        "macs_dense": summary.macs_dense,
        "macs_sparse": summary.macs_sparse,
        **{name: float(value) for name, value in scores.items()},
        "size_bytes": {"dense": summary.bytes_dense, "compressed": summary.bytes_compressed},
        "train_seconds": round(parts.history.seconds, 3),
        "epochs": len(parts.history.rows),
        "steps": trainer.global_step,
        "epoch_best": None,
        "device": str(trainer.strategy.root_device),
    }


def write_reports(
    cfg: DictConfig, parts: Parts, trainer: Trainer, best_epoch: int | None, scores: Mapping[str, float]
) -> tuple[dict[str, Any], Summary]:
    """Write what a run leaves behind but its metrics: weights, tables, pictures and config.yaml.

    Args:
        best_epoch: the epoch that the weights are of; None for the last.
        scores: metrics of the test set.

    Returns:
        the metrics, and the summary of the layers.
    """
    folder, rows = parts.folder, parts.history.rows
    best = [row for row in rows if best_epoch is not None and int(row["epoch"]) == best_epoch]
    row = (best or rows[-1:] or [{}])[0]
    logged = {name: value for name, value in row.items() if name.startswith(("val", "train")) or name == cfg.objective}
    save_weights(parts, folder)
    summary = parts.sparsity.summarize(parts.module, parts.prefix)
    metrics = figures(cfg, parts, trainer, folder, summary, {**logged, **scores})
    metrics |= {"sparsity_requested": parts.sparsity.pruner.target, "epoch_best": best_epoch}
    title = f"{metrics['method']}, {metrics['structure']}, sparsity {metrics['sparsity']:.4f}"
    with nice_to_have("layers.csv"):
        write_csv(folder / "layers.csv", layer_rows(summary))
    if rows:
        with nice_to_have("training.png"):
            plot_training(rows, folder / "training.png", title)
    with nice_to_have("layers.png"):
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
    "training.png": "loss, accuracy and sparsity of each epoch",
    "layers.png": "density of each layer",
    "history.csv": "one row per epoch",
    "layers.csv": "one row per layer",
    "model.safetensors": "the sparse weights",
    "shrunk.json": "what was removed from the model, for export.load_shrunk",
    "shrunk": "the smaller network, for export.load_shrunk",
    "tickets.png": "accuracy of each round against the remaining weights",
    "tickets.csv": "one row per round",
    "levels": "mask and weights of each round",
    "ranges.safetensors": "ranges of the activations",
    "bench.png": "dense and exported side by side",
    "checkpoints": "best at the target sparsity, and last",
}


def print_report(
    folder: Path, summary: Summary, metrics: Mapping[str, Any], levels: list[dict[str, Any]], ledger: Ledger
) -> None:
    """Print layers, levels and scores, and what is where.

    Args:
        folder: the run's.
        summary: of its layers.
        metrics: those of metrics.json.
        levels: rows of front.json; empty without a front.
        ledger: which files the run wrote; others are not listed.
    """
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
    usual = [name for name in ("val/acc", "test/acc", "test/loss") if name in metrics]
    logged = [name for name in metrics if name.startswith(("val", "test"))]
    scores = [(name, metrics[name]) for name in usual or logged]
    line = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    epoch = metrics["epoch_best"]
    source = f"best at the target: epoch {epoch}" if epoch is not None else "last epoch"
    console.print(f"{line} ({source} of {metrics['epochs']}, {metrics['train_seconds']:.1f} s of training)".lstrip())
    console.print(f"\nwritten to {folder}:", highlight=False, soft_wrap=True, markup=False)
    for name, content in _WRITTEN.items():
        if ledger.has(name):
            console.print(f"  {name:<18} {content}", highlight=False)
