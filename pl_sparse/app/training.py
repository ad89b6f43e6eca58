"""The application: a configuration in, a trained sparse model and its reports out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from pl_sparse.allocation import Budget
from pl_sparse.app.artifacts import figures, first, integers_of, one, tell, write
from pl_sparse.app.deploy import deploy, exports, merged, refuse
from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.parts import built, make_module
from pl_sparse.app.settings import ConfigError, check
from pl_sparse.app.sweep.identity import fingerprint
from pl_sparse.app.sweep.prefix import prefix
from pl_sparse.callbacks import AccuracyBudget, Front, History, Quantize, RandomState, Shrink, Sparsity, Status
from pl_sparse.callbacks.run.atomic_checkpoints import WholeCheckpoints
from pl_sparse.callbacks.run.mask_log import Track
from pl_sparse.callbacks.run.prefix import Prefix
from pl_sparse.callbacks.run.progress import Lines
from pl_sparse.callbacks.run.publish import closing, publish
from pl_sparse.core.files import write_json
from pl_sparse.export.format import Export
from pl_sparse.export.hardware import Hardware
from pl_sparse.schedule import Iterative, Staircase, Tickets

__all__ = ["train"]
log = logging.getLogger(__name__)
_AXES = ("scorer", "schedule", "structure", "allocation", "updater", "masking")


@closing()
def train(cfg: DictConfig) -> dict[str, Any]:
    """Train one model as configured, test it, and write its reports to `cfg.output_dir`.

    Returns:
        the metrics, as they are in metrics.json.

    Raises:
        ConfigError: the configuration cannot be run; raised before training.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if cfg.get("output_dir") is None:
        cfg.output_dir = datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    check(cfg)
    identity = fingerprint(cfg)
    if cfg.levels:
        cfg.sparsity = cfg.levels[-1]
    folder = Path(cfg.output_dir)
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path} is no file: checkpoints are in <run>/checkpoints/last.ckpt")
    seed_everything(cfg.seed, workers=True, verbose=False)

    hardware: Hardware = built(cfg, "hardware")
    sparsity = _sparsity(cfg, hardware)
    schedule = sparsity.pruner.schedule
    if isinstance(schedule, Tickets) and schedule.epochs is not None:
        cfg.trainer.max_epochs = schedule.training_epochs
    data: LightningDataModule | None = built(cfg, "data") if cfg.get("data") else None
    module, cut = make_module(cfg, data)
    quantize: list[Quantize] = [built(cfg, "quantization")] if cfg.get("quantization") else []
    budget: list[AccuracyBudget] = [built(cfg, "target")] if cfg.get("target") else []
    formats = exports(cfg)
    _check_types(hardware, quantize, {format.dtype for format in formats.values()})
    refuse(formats, hardware, module, data, sparsity.pruner.structure, sparsity.pruner.target or 0.0)
    history = History(folder / "history.csv")
    front = _front(cfg, folder, sparsity)
    status = Status(folder, cfg.objective, identity)
    before = [built(cfg, "regularizer")] if cfg.get("regularizer") else []
    after = [built(cfg, key) for key in ("rewind", "distill") if cfg.get(key)]
    if cfg.shrink_every is not None:
        if quantize or budget:
            raise ConfigError(
                "shrink_every goes with neither quantization nor target: shrink the trained model instead"
            )
        after.append(_shrink(cfg.shrink_every))
    own = [*front, *before, sparsity, *after, *quantize, history, *budget, status, RandomState()]
    try:
        if not sparsity.pruner.structure.needs_example:  # else a batch is needed
            sparsity.pruner.attach(module)
    except ValueError as error:
        if "nothing to prune" not in str(error):  # a module may build its layers later
            raise ConfigError(str(error)) from error
    shared = prefix(cfg, sparsity, cfg.trainer.max_epochs)
    trainer = _trainer(cfg, [*own, *([shared] if shared else [])])
    with status:
        try:
            _fit(cfg, trainer, module, data, own, shared)
            metrics = _finish(cfg, folder, trainer, module, data, cut, own, hardware, formats)
        finally:
            if shared:
                shared.release()
    return metrics


def _fit(
    cfg: DictConfig,
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    own: list[Any],
    shared: Prefix | None,
) -> None:
    """Train, from the run's own checkpoint, from the start it shares with others, or from the beginning."""
    history = one(own, History)
    start: str | None = cfg.ckpt_path
    if shared and trainer.world_size == 1:
        start, steps = shared.fork(one(own, Sparsity), start, cfg.trainer.max_epochs)
        if steps:
            one(own, Status).share(steps)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except (ValueError, MisconfigurationException, RuntimeError) as error:
        foreign = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
        if history.started or (isinstance(error, RuntimeError) and not foreign):
            raise
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path} is of another model: {error}" if foreign else str(error)
        ) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not history.started and trainer.global_step:
        # the checkpoint was of the end of training, and Lightning left out what comes then
        for callback in own:
            callback.on_train_start(trainer, module)
        for callback in own:
            callback.on_train_end(trainer, module)


def _finish(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    cut: str,
    own: list[Any],
    hardware: Hardware,
    formats: Mapping[str, Export],
) -> dict[str, Any]:
    """Test, and write what a run leaves behind, its metrics last: a run that has them is done."""
    tests = cfg.test and (data is not None or _has(module, "test_dataloader")) and _has(module, "test_step")
    rows: list[dict[str, Any]] = []
    for path in [path for callback in own if isinstance(callback, Front) for path in callback.paths]:
        saved = _load(path, trainer, module, own)
        _remove(trainer, module)
        scores: dict[str, float] = {}
        loggers, trainer.loggers = trainer.loggers, []
        if _has(module, "validation_step"):
            scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
        if tests:
            scores |= trainer.test(module, datamodule=data, verbose=False)[0]
        trainer.loggers = loggers
        if trainer.is_global_zero:
            row = figures(cfg, path.parent, trainer, module, cut, own, scores)
            rows.append({**row, "epochs": saved["epoch"], "steps": saved["global_step"], "level": len(rows)})
    budget, quantize = first(own, AccuracyBudget), first(own, Quantize)
    best = _load_best(trainer, module, own) if budget is None else budget.epoch
    _remove(trainer, module)
    tested: Mapping[str, float] = {}
    if tests:
        tested = trainer.test(module, datamodule=data, verbose=False)[0]
    if not trainer.is_global_zero:
        return {}
    if rows:
        write_json(folder / "front.json", rows)
    converted = None
    if quantize is not None:
        converted, zeros = integers_of(quantize, module, one(own, Sparsity).pruner, folder)
        tested = {**tested, **zeros}
    metrics, summary = write(cfg, folder, trainer, module, cut, own, best, tested)
    if formats:
        shrink = first(own, Shrink)
        removed = shrink.plan.below(cut) if shrink is not None else None
        found = deploy(module, data, formats, folder, hardware, converted, removed, cfg.export_measure)
        metrics = merged(metrics, found)
    write_json(folder / "metrics.json", metrics)
    tell(folder, summary, metrics, rows)
    publish(trainer.loggers, folder, metrics, trainer.global_step)
    return metrics


def _front(cfg: DictConfig, folder: Path, sparsity: Sparsity) -> list[Front]:
    schedule = sparsity.pruner.schedule
    if cfg.levels and not isinstance(schedule, Staircase):
        raise ConfigError("levels=... are those of schedule=staircase (of schedule=tickets: schedule.sparsities=...)")
    if not cfg.front:
        return []
    for key, why in (
        ("quantization", "the models before it begins would have other weights than integers"),
        ("target", "the budget decides on the levels, and keeps one model"),
    ):
        if cfg.get(key):
            raise ConfigError(f"front=true goes with {key}=none alone: {why}")
    if not isinstance(schedule, (Staircase, Iterative, Tickets)):
        raise ConfigError(
            f"front=true needs a schedule that rests on its levels, or the models there would not have been trained at "
            f"their sparsity, and {type(schedule).__name__.lower()} does not: use schedule=staircase "
            "levels=[0.5,0.8,0.9], schedule=iterative or schedule=tickets"
        )
    return [Front(folder)]


def _sparsity(cfg: DictConfig, hardware: Hardware) -> Sparsity:
    """The callback, its axes checked against each other and the hardware."""
    for what in ("sparsity", "label_smoothing"):
        if cfg[what] is not None and not 0 <= cfg[what] <= 1:
            raise ConfigError(f"{what}={cfg[what]} must be in [0, 1]")
    axes = {axis: built(cfg, axis) for axis in _AXES}
    objection = hardware.objection(axes["structure"], axes["schedule"].final)
    if objection is not None and axes["schedule"].final > 0:
        if hardware.strict:
            raise ConfigError(objection)
        rank_zero_warn(objection)
    for key in ("budget_ms", "macs"):
        if getattr(hardware, key) is not None and not isinstance(axes["allocation"], Budget):
            raise ConfigError(f"hardware.{key} is met by allocation=budget structure=coupled")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {key: plain[key] for key in ("include", "exclude", "first", "last", "overrides", "misfit")}
    options |= {key: plain[key] for key in ("ablation", "calibration_batches")}
    try:
        return Sparsity(**axes, **options, report=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _shrink(every: int) -> Shrink:
    try:
        return Shrink(every)
    except ValueError as error:
        raise ConfigError(f"shrink_{error}") from error


def _check_types(hardware: Hardware, quantize: list[Quantize], written: set[str]) -> None:
    """The type of the weights is one that the hardware computes with, and that the exports can have."""
    trained = quantize[0].quantization.dtype if quantize else "float32"
    if "int8" in written and trained == "int4":
        raise ConfigError("export=onnx_int8 has 8-bit weights, and quantization=int4_weight trains 4-bit ones")
    refusal = hardware.refusal("int8" if "int8" in written else trained)
    if refusal is not None:
        raise ConfigError(refusal + (", or export=onnx_int8" if "int8" in hardware.dtypes else ""))


def _trainer(cfg: DictConfig, callbacks: list[Any]) -> Trainer:
    node = cfg.trainer.copy()
    if node.get("deterministic") is None:
        node.deterministic = node.get("accelerator") == "cpu" or (
            node.get("accelerator") == "auto" and not torch.accelerator.is_available()
        )
    if node.get("enable_progress_bar") is None:
        node.enable_progress_bar = sys.stderr.isatty()
    if not node.enable_progress_bar:
        callbacks.append(Lines())
    callbacks += [built for built in _each(cfg, "callbacks") if built is not None]
    sharded = str(node.get("strategy")).startswith(("fsdp", "deepspeed", "model_"))  # these write their own way
    whole = {} if sharded or node.get("plugins") else {"plugins": [WholeCheckpoints()]}
    loggers = _loggers(cfg)
    callbacks += [Track()] * bool(loggers)
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    try:
        trainer: Trainer = instantiate(
            node,
            **whole,
            callbacks=callbacks,
            logger=loggers or False,
            enable_checkpointing=checkpoints,
            default_root_dir=cfg.output_dir,
            _convert_="object",
        )
    except Exception as error:
        raise ConfigError(f"trainer: {error.__cause__ or error}") from error
    return trainer


def _loggers(cfg: DictConfig) -> list[Any]:
    """All loggers, each told the settings: one that cannot reach its server says so now."""
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    loggers = _each(cfg, "logger")
    for logger in loggers:
        try:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        except Exception as error:
            hint = ". Without an account: logger.wandb.mode=offline" if "wandb" in type(error).__module__ else ""
            raise ConfigError(f"logger: {str(error).rstrip('.')}{hint}") from error
    return loggers


def _each(cfg: DictConfig, group: str) -> list[Any]:
    nodes: Any = cfg.get(group) or {}
    return [built(nodes, name) for name, node in nodes.items() if node is not None]


def _has(module: LightningModule, hook: str) -> bool:
    return getattr(type(module), hook) is not getattr(LightningModule, hook)


def _load_best(trainer: Trainer, module: LightningModule, own: list[Any]) -> int | None:
    """Take up the weights and masks of the best checkpoint at the target; the epoch it is of, or None for the last."""
    for checkpoint in trainer.checkpoint_callbacks:
        path = getattr(checkpoint, "best_model_path", "")
        if path and getattr(checkpoint, "monitor", None) and Path(path).is_file():
            return int(_load(path, trainer, module, own)["epoch"])
    return None


def _load(path: str | Path, trainer: Trainer, module: LightningModule, own: list[Any]) -> Mapping[str, Any]:
    saved: Mapping[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.load(trainer, module, saved)
    module.load_state_dict(saved["state_dict"])
    sparsity, quantize = one(own, Sparsity), first(own, Quantize)
    if sparsity.state_key in saved["callbacks"]:
        sparsity.pruner.load_state_dict(saved["callbacks"][sparsity.state_key])
    if quantize is not None:
        quantize.quantization.load_state_dict(saved["callbacks"][quantize.state_key]["ranges"])
    return saved


def _remove(trainer: Trainer, module: LightningModule) -> None:
    """With shrink_every, take out what was masked since the last removal; there is no more training."""
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.shrink(trainer, module)
