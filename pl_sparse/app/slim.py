"""A trained network made so many times faster: channels pruned in a fine-tuning that imitates the network itself."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from torch import Tensor, nn

from pl_sparse.allocation import Budget
from pl_sparse.app.deploy import deploy, training_inputs
from pl_sparse.app.instantiate import network, refuse_other_outputs
from pl_sparse.app.sensitivity import is_validated, metric_of, sensitivity, validated, validator
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.trainer import quiet_trainer
from pl_sparse.callbacks import CostTarget, Distill, History, Sparsity
from pl_sparse.callbacks.calibration import refuse_without_forward
from pl_sparse.callbacks.run.progress import ProgressLines
from pl_sparse.core.files import write_json
from pl_sparse.export import ONNX, ONNXInt8
from pl_sparse.export.card import Card, typed
from pl_sparse.export.format import Export
from pl_sparse.export.hardware import Hardware
from pl_sparse.export.measure import device_name, one_thread, stored_bytes
from pl_sparse.network.macs import counted
from pl_sparse.results.direction import direction, lost
from pl_sparse.results.style import BLUE, GREY, remove_frame, save
from pl_sparse.schedule import Cubic
from pl_sparse.structure import Channel
from pl_sparse.surgery.shrink import shrink
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.lr import CosineLR

__all__ = ["Slimmed", "slim"]

_LEVELS = (0.5,)
"""The sparsities at which layers are pruned alone."""
_BATCHES = 8
"""Batches of validation that they are judged by."""
_SECONDS = 1.0
"""Of measuring a file, for each batch size."""


@dataclass(frozen=True)
class Slimmed:
    """A network before and after.

    Attributes:
        metric: the name of the metric of validation that it is judged by.
        before, after: metric, parameters, MACs of a sample, bytes of weights and buffers.
        exports: by format "ms" and "dense_ms" (medians: batch 1, one thread, ONNX Runtime), "speedup" and "bytes".
        lost: what the metric lost; below 0 it gained.
        speedup: of the ONNX file.
        misses: what was asked for and is not so, a line each.
        folder: of all files.
    """

    metric: str
    before: dict[str, float]
    after: dict[str, float]
    exports: dict[str, dict[str, float]]
    lost: float
    speedup: float
    misses: list[str]
    folder: Path


def slim(
    model: nn.Module,
    data: LightningDataModule | None = None,
    speedup: float = 2.0,
    *,
    drop: float | None = None,
    int8: bool = False,
    epochs: int = 10,
    lr: float = 1e-3,
    folder: str | os.PathLike[str] = "slim",
    sensitive: bool = True,
    student: str | None = None,
    through_norms: bool = False,
) -> tuple[nn.Module, Slimmed]:
    """A smaller and faster copy of a trained network.

    Coupled channels of a copy are pruned in the first half of a fine-tuning, in which it imitates the original network,
    until it is `speedup` times faster in ONNX Runtime (`CostTarget`). The best epoch after that is kept. Its channels
    are removed, and the network is exported and measured.

    Args:
        model: a trained network, which does not change. A LightningModule brings its loss and its optimizer; any other
            network returns logits and is trained as a classifier.
        data: training and validation batches; None if the module has its own.
        speedup: how many times faster: batch 1, one thread.
        drop: the largest loss of the validation metric; None: no limit. It is compared at the end and does not stop
            training.
        int8: export with 8-bit integers as well, quantized after training.
        epochs: of fine-tuning.
        lr: the first learning rate of AdamW, for a classifier.
        folder: the folder for slim.json, slim.png, README.md, sensitivity.csv and .png, shrunk/, model.onnx, bench.*.
        sensitive: whether each layer is first pruned alone; layers that lose more then keep more of their channels.
        student: the submodule of a LightningModule whose outputs are logits (or have them as `.logits`), "" for the
            module itself; it imitates the original. None: no imitation.
        through_norms: whether channels that a LayerNorm or RMSNorm reads are pruned too, such as the width of a
            transformer (`structure.Channel`).

    Returns:
        the smaller network in evaluation mode, and its measurements.

    Raises:
        ConfigError: before training, if the network cannot be slimmed, with the reason.
    """
    folder = Path(folder)
    if epochs < 2:
        raise ConfigError(f"epochs={epochs} must be 2 or more: one to prune in, one to recover")
    if drop is not None and drop < 0:
        raise ConfigError(f"drop={drop:g} must not be negative: it is the allowed loss of the metric")
    if (folder / "slim.json").exists():
        raise ConfigError(f"{folder} already holds a slimmed network: give another folder (--to FOLDER)")
    try:
        target = CostTarget(speedup=speedup)
        if isinstance(model, LightningModule):
            refuse_without_forward(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    module = _module(model, data, lr)
    imitating = _imitating(module, student)
    formats: dict[str, Export] = {"onnx": ONNX(), **({"onnx_int8": ONNXInt8()} if int8 else {})}
    example = next(iter(training_inputs(module, data, 1)))[:2]
    for name, format in formats.items():
        if (
            reason := format.refusal(network(module), example, Sparsity(sparsity=0.0).pruner.structure, 0.0)
        ) is not None:
            raise ConfigError(f"export={name}: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    logged = validated(validator(), module, data)
    metric = metric_of(logged)
    before = {metric: logged[metric], **_size(network(module), example)}
    if sensitive:
        sensitivity(module, data, Channel(), _LEVELS, _BATCHES, metric, folder)
    budget = Budget(final=0.9, macs=inf, sensitivity=str(folder / "sensitivity.csv") if sensitive else None)
    structure = Channel(coupled=True, through_norms=through_norms)
    _fine_tune(module, data, target, structure, budget, metric, epochs, folder, imitating)
    after = {metric: validated(validator(), module, data)[metric]}
    costs = _exported(module, data, formats, folder)
    smaller = copy.deepcopy(network(module)).cpu().eval()
    plan = shrink(smaller, example).plan
    after |= _size(smaller, example)
    loss = lost(metric, before[metric], after[metric])
    reached = costs["onnx"]["speedup"]
    misses = []
    if reached < speedup:
        misses.append(f"{reached:.2f}x faster, and {speedup:g}x was asked for: ask for more than you need")
    if drop is not None and loss > drop:
        misses.append(
            f"{metric} lost {loss:.4f}, more than drop={drop:g}: train for more epochs, or ask for a smaller speedup"
        )
    result = Slimmed(metric, before, after, costs, loss, reached, misses, folder)
    write_json(
        folder / "slim.json", {**asdict(result), "folder": str(folder), "asked": speedup, "device": device_name()}
    )
    _plot(result, folder / "slim.png")
    _card(result).write(smaller, plan, folder)
    return smaller, result


# Before


def _module(model: nn.Module, data: LightningDataModule | None, lr: float) -> LightningModule:
    """A copy of what is given, that can be trained."""
    if isinstance(model, Classifier):
        model = model.net
    if isinstance(model, LightningModule):
        module = copy.deepcopy(model)
    else:
        classes: int | None = getattr(data, "classes", None)
        if data is None or classes is None:
            raise ConfigError(
                f"{type(model).__name__} is not a LightningModule, and is trained as a classifier, whose data has "
                "`classes`: give such data, or a LightningModule with training_step and validation_step"
            )
        if not 0 < lr < float("inf"):
            raise ConfigError(f"lr={lr:g} must be above 0: nothing is trained otherwise")
        optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.01)
        classifier = Classifier(copy.deepcopy(model), classes, optimizer, CosineLR(warmup=0.05))
        refuse_other_outputs(classifier, data, type(model).__name__)
        module = classifier
    for parameter in module.parameters():  # a network for inference is often frozen
        parameter.requires_grad_(parameter.is_floating_point())
    if not is_validated(module, data):
        raise ConfigError(
            f"{type(module).__name__} has no validation_step, or there are no validation data to judge by"
        )
    return module.train()


def _imitating(module: LightningModule, student: str | None) -> list[Callback]:
    """What lets a module imitate the network that it is now."""
    if isinstance(module, Classifier):
        if student not in (None, "net"):
            raise ConfigError(f"student={student!r}: a classifier imitates its outputs; leave it out")
        student = "net"
    if student is None:
        return []
    try:
        teacher = module.get_submodule(student)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise ConfigError(f"student={student!r} is not part of {type(module).__name__}: give one of {names}") from error
    teacher = copy.deepcopy(teacher)
    return [Distill(teacher, student=student)]


def _size(net: nn.Module, example: Tensor) -> dict[str, float]:
    """Parameters, MACs of a sample, bytes."""
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "macs": counted(net, example.to(next(net.parameters()).device), len(example)).dense,
        "bytes": stored_bytes(net),
    }


# Training and after


def _fine_tune(
    module: LightningModule,
    data: LightningDataModule | None,
    target: CostTarget,
    structure: Channel,
    budget: Budget,
    metric: str,
    epochs: int,
    folder: Path,
    imitating: list[Callback],
) -> None:
    """Prune the channels of a module while it imitates what it was; it ends with the weights of the best epoch."""
    best = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="best", monitor=metric, mode=direction(metric) or "max",
        save_on_train_epoch_end=True, enable_version_counter=False,
    )  # fmt: skip
    callbacks = [
        Sparsity(schedule=Cubic(final=0.9, end=0.5), structure=structure, allocation=budget, report=False),
        *imitating,
        History(folder / "history.csv"),
        target,
        ProgressLines(),
        best,
    ]
    trainer = quiet_trainer(
        max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks, default_root_dir=folder,
        num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except ValueError as error:
        if trainer.global_step:
            raise
        raise ConfigError(str(error)) from error
    if Path(best.best_model_path).is_file():
        module.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])


def _exported(
    module: LightningModule, data: LightningDataModule | None, formats: dict[str, Export], folder: Path
) -> dict[str, dict[str, float]]:
    """What each file costs beside the dense network, on one thread; the smaller network is in `folder`/shrunk."""
    hardware = Hardware(name="cpu", exports=list(formats))
    with one_thread():
        costs = deploy(module, data, formats, folder, hardware, measure=True, seconds=_SECONDS)
    if "exports_failed" in costs:
        name, reason = next(iter(costs["exports_failed"].items()))
        raise RuntimeError(f"export={name}: {reason}")
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return {
        row["format"]: {
            "ms": row["exported/median_ms"],
            "dense_ms": row["dense/median_ms"],
            "speedup": row["faster"],
            "bytes": row["exported/bytes"],
            **{key: value for key, value in row.items() if key.endswith("_exported")},
        }
        for row in rows
        if row["batch"] == 1
    }


def _card(result: Slimmed) -> Card:
    """The page of the folder."""
    latency = result.exports["onnx"]
    names = (name for name in result.before if name != "parameters")
    figures = {name: (result.before[name], result.after[name]) for name in names}
    device = device_name().partition(",")[0]
    verdict = [
        f"{cost['speedup']:.2f}x faster than the dense network as `{name}`: batch 1, one thread, ONNX ({device})."
        for name, cost in result.exports.items()
    ]
    return Card(
        load=f'from pl_sparse.export import load_shrunk\n\nload_shrunk(model, "{result.folder.name}/shrunk")',
        command=typed(),
        figures={**figures, "ms": (latency["dense_ms"], latency["ms"])},
        verdict=[*verdict, *result.misses],
    )


def _plot(result: Slimmed, path: Path) -> None:
    """Bars of what is left of each figure, before and after."""
    latency = result.exports["onnx"]
    pairs = [(name, result.before[name], result.after[name]) for name in result.before]
    pairs.append(("ms", latency["dense_ms"], latency["ms"]))
    figure = Figure(figsize=(2.2 * len(pairs), 3), layout="constrained")
    for axis, (name, before, after) in zip(figure.subplots(1, len(pairs)), pairs, strict=True):
        bars = axis.bar(["before", "after"], [before, after], color=[GREY, BLUE])
        axis.bar_label(bars, [f"{value:,.4g}" for value in (before, after)], fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.margins(y=0.15)
        remove_frame(axis)
    save(figure, path, f"{result.speedup:.2f}x faster: batch 1, one thread, ONNX Runtime")
