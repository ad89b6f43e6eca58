"""What one run consists of, built from its configuration and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from pl_sparse.allocation import Allocation, Budget
from pl_sparse.app.formats import make_formats, refuse
from pl_sparse.app.instantiate import built, make_module, optional, refuse_other_outputs
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.tree import print_tree
from pl_sparse.callbacks import (
    AccuracyBudget,
    CostTarget,
    Front,
    History,
    Quantize,
    RandomState,
    Shrink,
    Sparsity,
    Status,
)
from pl_sparse.core.targets import Targets
from pl_sparse.export.format import Export
from pl_sparse.export.hardware import Hardware
from pl_sparse.masking import Masking
from pl_sparse.results.direction import is_accuracy
from pl_sparse.schedule import Iterative, Schedule, Staircase, Tickets
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.updater import Updater

__all__ = ["Parts", "assemble"]

_AXES = {
    "scorer": Scorer, "schedule": Schedule, "structure": Structure, "allocation": Allocation, "updater": Updater,
    "masking": Masking,
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The parts of one run.

    Attributes:
        folder: where the run's files go.
        hardware: what the model is for.
        module: what is trained.
        prefix: of the names of the module's weights; files and reports leave it out.
        data: None if the module brings its own.
        formats: what the model is exported to, by name.
        sparsity: the callback that prunes.
        history: the table of the epochs.
        status: the run's status.json.
        random_state: keeps the random generators in checkpoints.
        front: saves the model of each level.
        regularize: adds a penalty.
        rewind: puts weights back to earlier ones.
        distill: the teacher.
        shrink: takes masked channels out of the model.
        quantize: trains for integers.
        budget: finds the sparsity that costs little accuracy.
        cost: finds the channels that a speed-up, a size or a number of MACs allows.
        trust: whether checkpoints of the folder may hold pickled objects; None where the run has not been gone on with.
    """

    folder: Path
    hardware: Hardware
    module: LightningModule
    prefix: str
    data: LightningDataModule | None
    formats: Mapping[str, Export]
    sparsity: Sparsity
    history: History
    status: Status
    random_state: RandomState
    front: Front | None = None
    regularize: Callback | None = None
    rewind: Callback | None = None
    distill: Callback | None = None
    shrink: Shrink | None = None
    quantize: Quantize | None = None
    budget: AccuracyBudget | None = None
    cost: CostTarget | None = None
    trust: bool | None = None

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks in the order that the Trainer needs.

        A level is saved before anything changes the weights. A penalty acts on what the optimizer wrote, before masks
        do. Rewinding, removal and the budget need the masks of the same step.
        """
        callbacks = (
            self.front,
            self.regularize,
            self.sparsity,
            self.rewind,
            self.distill,
            self.shrink,
            self.quantize,
            self.history,
            self.budget,
            self.cost,
            self.status,
            self.random_state,
        )
        return [callback for callback in callbacks if callback is not None]


def assemble(cfg: DictConfig, identity: str) -> Parts:
    """Build the parts of a run, and check them against each other.

    Random numbers are drawn here, by the weights of the module above all: the seed is set before.

    Args:
        cfg: checked; where the number of rounds gives the number of epochs, `trainer.max_epochs` becomes that.
        identity: the hash of the run's settings, for its status.json.

    Raises:
        ConfigError: parts cannot be built, or do not fit together.
    """
    if cfg.get("print_config"):
        print_tree(cfg)
    folder = Path(cfg.output_dir)
    hardware: Hardware = built(cfg, "hardware", Hardware)
    sparsity = _sparsity(cfg, hardware)
    pruner = sparsity.pruner
    if isinstance(pruner.schedule, Tickets) and pruner.schedule.epochs is not None:
        cfg.trainer.max_epochs = pruner.schedule.training_epochs
    data: LightningDataModule | None = optional(cfg, "data", LightningDataModule)
    module, prefix = make_module(cfg, data)
    if isinstance(module, Classifier) and data is not None and not cfg.model._target_.startswith("pl_sparse."):
        refuse_other_outputs(module, data, cfg.model._target_)
    goal = optional(cfg, "target", Callback)
    budget = goal if isinstance(goal, AccuracyBudget) else None
    if isinstance(module, Classifier) and budget is not None and is_accuracy(cfg.objective) and budget.drop >= 1:
        raise ConfigError(
            f"target.drop={cfg.target.drop} allows the loss of all of {cfg.objective}: it is a fraction, 0.01 is one "
            f"point"
        )
    quantize: Quantize | None = optional(cfg, "quantization", Quantize)
    cost = _cost(goal, hardware, quantize)
    formats = make_formats(cfg)
    _check_types(hardware, quantize, {format.dtype for format in formats.values()})
    refuse(formats, module, data, pruner.structure, pruner.target or 0.0)
    parts = Parts(
        folder=folder,
        hardware=hardware,
        module=module,
        prefix=prefix,
        data=data,
        formats=formats,
        sparsity=sparsity,
        history=History(folder / "history.csv"),
        front=_front(cfg, folder, pruner.schedule),
        status=Status(folder, cfg.objective, identity),
        regularize=optional(cfg, "regularizer", Callback),
        rewind=optional(cfg, "rewind", Callback),
        distill=optional(cfg, "distill", Callback),
        shrink=_shrink(cfg.shrink_every, quantize, goal),
        quantize=quantize,
        budget=budget,
        cost=cost,
        random_state=RandomState(),
        trust=cfg.get("trust"),
    )
    _attach(sparsity, module)
    return parts


def _sparsity(cfg: DictConfig, hardware: Hardware) -> Sparsity:
    """The callback, its axes checked against each other and the hardware."""
    missing = [axis for axis in _AXES if not cfg.get(axis)]
    if missing:
        raise ConfigError(f"{missing[0]} is left out, and a run needs one: give {missing[0]}=... or method=dense")
    axes = {axis: built(cfg, axis, kind) for axis, kind in _AXES.items()}
    objection = hardware.objection(axes["structure"], axes["schedule"].final)
    if objection is not None and axes["schedule"].final > 0:
        if hardware.strict:
            raise ConfigError(objection)
        rank_zero_warn(objection)
    for key in ("budget_ms", "macs"):
        if getattr(hardware, key) is not None and not isinstance(axes["allocation"], Budget):
            raise ConfigError(f"hardware.{key} needs allocation=budget structure=coupled")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {field.name: plain[field.name] for field in fields(Targets)}
    options |= {key: plain[key] for key in ("ablation", "calibration_batches")}
    try:
        return Sparsity(**axes, **options, report=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _check_types(hardware: Hardware, quantize: Quantize | None, exported: set[str]) -> None:
    """The type of the weights is one that the hardware computes with, and that the exports can have."""
    trained = "float32" if quantize is None else quantize.quantization.dtype
    if "int8" in exported and trained == "int4":
        raise ConfigError("an export in int8 has 8-bit weights, and quantization=int4_weight trains 4-bit ones")
    refusal = hardware.refusal("int8" if "int8" in exported else trained)
    if refusal is not None:
        raise ConfigError(refusal + (", or an export in int8, such as onnx_int8" if "int8" in hardware.dtypes else ""))


def _front(cfg: DictConfig, folder: Path, schedule: Schedule) -> Front | None:
    if cfg.levels and not isinstance(schedule, Staircase):
        raise ConfigError("levels=... needs schedule=staircase (schedule=tickets has schedule.sparsities=...)")
    if not cfg.front:
        return None
    for key, reason in (
        ("quantization", "the models before it begins would have other weights than integers"),
        ("target", "the budget decides on the levels, and keeps one model"),
    ):
        if cfg.get(key):
            raise ConfigError(f"front=true needs {key}=none: {reason}")
    if not isinstance(schedule, (Staircase, Iterative, Tickets)):
        raise ConfigError(
            f"front=true needs a schedule that stays at each of its levels, so that models are trained at their "
            f"sparsity, and {type(schedule).__name__.lower()} does not: use schedule=staircase levels=[0.5,0.8,0.9], "
            "schedule=iterative or schedule=tickets"
        )
    return Front(folder)


def _cost(goal: Callback | None, hardware: Hardware, quantize: Quantize | None) -> CostTarget | None:
    """The target of cost, where it goes with the rest."""
    if not isinstance(goal, CostTarget):
        return None
    asked = f"target.{goal.what}={goal.asked:g}"
    if quantize is not None:
        raise ConfigError(
            f"{asked} is measured on the network in floating point, and quantization trains it for integers: leave "
            "quantization out; export=[onnx_int8] quantizes after training"
        )
    for key in ("budget_ms", "macs"):
        if (value := getattr(hardware, key)) is not None:
            raise ConfigError(f"{asked} and hardware.{key}={value:g} are two budgets: give one")
    return goal


def _shrink(every: int | None, quantize: Quantize | None, goal: Callback | None) -> Shrink | None:
    if every is None:
        return None
    if quantize is not None or goal is not None:
        raise ConfigError("shrink_every works with neither quantization nor target: shrink the trained model instead")
    try:
        return Shrink(every)
    except ValueError as error:
        raise ConfigError(f"shrink_{error}") from error


def _attach(sparsity: Sparsity, module: LightningModule) -> None:
    """Attach the pruner before training, so that what it refuses is refused at once."""
    if sparsity.pruner.structure.needs_example:
        return  # that is a batch, which training has first
    try:
        sparsity.pruner.attach(module)
    except ValueError as error:
        if "nothing to prune" not in str(error):  # a module may build its layers later
            raise ConfigError(str(error)) from error
