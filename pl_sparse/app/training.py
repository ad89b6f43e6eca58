"""The application: a configuration in, a trained sparse model and its reports out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.aliases import current_targets
from pl_sparse.app.artifacts import (
    figures,
    integer_network,
    print_report,
    save_vocabulary,
    save_weights,
    write_reports,
)
from pl_sparse.app.deploy import deploy, merged
from pl_sparse.app.earlier import loads_plain
from pl_sparse.app.ends import Reminder, explained
from pl_sparse.app.folder import Keep, RunFolder, take
from pl_sparse.app.instantiate import implements
from pl_sparse.app.parts import Parts, assemble
from pl_sparse.app.settings import ConfigError, check
from pl_sparse.app.sweep.identity import run_fingerprint, settings
from pl_sparse.app.sweep.prefix import shared_prefix
from pl_sparse.app.trainer import make_trainer
from pl_sparse.callbacks import Shrink
from pl_sparse.callbacks.monitored import MissingMetricError
from pl_sparse.callbacks.run.divergence import Divergence
from pl_sparse.callbacks.run.prefix import Prefix
from pl_sparse.callbacks.run.publish import closing, publish
from pl_sparse.callbacks.run.saved_settings import SavedSettings
from pl_sparse.core.compact import expand_weights
from pl_sparse.core.files import write_json

__all__ = ["train"]


@closing()
def train(cfg: DictConfig) -> dict[str, Any]:
    """Train one model as configured, test it, and write its reports to `cfg.output_dir`.

    Args:
        cfg: composed from train.yaml; it does not change.

    Returns:
        the metrics, as they are in metrics.json.

    Raises:
        ConfigError: the configuration cannot be run, or its folder holds another run; raised before training.
        EndedError: the disk is full, or weights are infinite or NaN.
        Interrupted: a signal ended the run.
    """
    cfg = current_targets(cfg)
    OmegaConf.set_struct(cfg, False)
    if cfg.get("output_dir") is None:
        cfg.output_dir = datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    check(cfg)
    with take(cfg) as folder:
        return _train(cfg, folder)


def _train(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """Train one model in the folder that was taken for it."""
    identity = run_fingerprint(cfg, cfg.output_dir)
    saved = SavedSettings(settings(cfg))
    if cfg.levels:
        cfg.sparsity = cfg.levels[-1]
    seed_everything(cfg.seed, workers=True, verbose=False)

    parts = assemble(cfg, identity)
    parts.status.ledger = folder.ledger
    shared = shared_prefix(cfg, parts.sparsity, cfg.trainer.max_epochs)
    beside = [Divergence(), saved, Keep(folder), Reminder()]
    with folder.noting_new():
        trainer = make_trainer(cfg, [*parts.callbacks, *([shared] if shared else []), *beside], own=_own(parts.module))
    with parts.status, explained(parts.folder, parts.module):
        try:
            _fit(cfg, parts, trainer, shared)
            return _finish(cfg, parts, trainer, folder)
        finally:
            if shared:
                shared.release()


def _own(module: LightningModule) -> bool:
    """Whether the metrics of a module are not those of this package."""
    return type(module).__module__.partition(".")[0] != "pl_sparse"


def _fit(cfg: DictConfig, parts: Parts, trainer: Trainer, shared: Prefix | None) -> None:
    """Train, from the run's own checkpoint, from the start it shares with others, or from the beginning."""
    checkpoint: str | None = cfg.ckpt_path
    if shared and trainer.world_size == 1:
        checkpoint, steps = shared.fork(parts.sparsity, checkpoint, cfg.trainer.max_epochs)
        if steps:
            parts.status.share(steps)
    try:
        plain = checkpoint is None or loads_plain(checkpoint, parts.folder, parts.trust)
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=plain)
    except MissingMetricError as error:
        named = f"objective={cfg.objective}: {error}\n  objective=NAME chooses another metric"
        raise ConfigError(named if cfg.objective in str(error) else str(error)) from error
    except (ValueError, MisconfigurationException, RuntimeError) as error:
        other_model = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
        if parts.history.started or (isinstance(error, RuntimeError) and not other_model):
            raise
        raise ConfigError(_other_model(cfg.ckpt_path, error) if other_model else str(error)) from error
    if not parts.history.started and trainer.global_step:
        # the checkpoint was of the end of training, and Lightning left out what comes then
        for callback in parts.callbacks:
            callback.on_train_start(trainer, parts.module)
        for callback in parts.callbacks:
            callback.on_train_end(trainer, parts.module)


def _other_model(path: str, error: Exception) -> str:
    """Two lines for a checkpoint whose weights do not fit."""
    reasons = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [str(error)]
    return (
        f"ckpt_path={path} belongs to another model: {reasons[0][:160]}\n  leave model=... out to take that of the run"
    )


def _finish(cfg: DictConfig, parts: Parts, trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """Test, and write what a run leaves behind, its metrics last: a run that has them is done."""
    paths = [] if parts.front is None else parts.front.paths
    levels = [{**_level(cfg, parts, trainer, path), "level": level} for level, path in enumerate(paths)]
    best_epoch = _load_best(parts, trainer) if parts.budget is None else _from_one(parts.budget.epoch)
    _remove_masked(parts, trainer)
    scores: Mapping[str, float] = {}
    if _has_test(cfg, parts):
        scores = trainer.test(parts.module, datamodule=parts.data, verbose=False)[0]
    if not trainer.is_global_zero:
        return {}
    if levels:
        write_json(parts.folder / "front.json", levels)
    integers = None
    if parts.quantize is not None:
        integers, zeros = integer_network(parts.quantize, parts)
        scores = {**scores, **zeros}
    metrics, summary = write_reports(cfg, parts, trainer, best_epoch, scores)
    save_vocabulary(parts, trainer)
    if parts.formats:
        removed = None if parts.shrink is None else parts.shrink.plan.below(parts.prefix)
        costs = deploy(
            parts.module, parts.data, parts.formats, parts.folder, parts.hardware, integers, removed, cfg.export_measure
        )
        metrics = merged(metrics, costs)
    if parts.cost is not None:
        goal = parts.cost
        metrics["target"] = {goal.what: goal.asked, "achieved": goal.achieved, "met": goal.met}
    write_json(parts.folder / "metrics.json", metrics)
    print_report(parts.folder, summary, metrics, levels, folder.ledger)
    publish(trainer.loggers, parts.folder, metrics, trainer.global_step)
    return metrics


def _level(cfg: DictConfig, parts: Parts, trainer: Trainer, path: Path) -> dict[str, Any]:
    """Test the model of a level's checkpoint, and save its weights beside it; what is its row of front.json."""
    checkpoint = _load(path, parts, trainer)
    _remove_masked(parts, trainer)
    scores: dict[str, float] = {}
    loggers, trainer.loggers = trainer.loggers, []  # curves are of the training alone
    if implements(parts.module, "validation_step"):
        scores |= trainer.validate(parts.module, datamodule=parts.data, verbose=False)[0]
    if _has_test(cfg, parts):
        scores |= trainer.test(parts.module, datamodule=parts.data, verbose=False)[0]
    trainer.loggers = loggers
    if not trainer.is_global_zero:
        return {}
    save_weights(parts, path.parent)
    summary = parts.sparsity.summarize(parts.module, parts.prefix)
    row = figures(cfg, parts, trainer, path.parent, summary, scores)
    return {**row, "epochs": checkpoint["epoch"], "steps": checkpoint["global_step"]}


def _from_one(epoch: int | None) -> int | None:
    """An epoch of the Trainer, which counts from 0, as reports count."""
    return None if epoch is None else epoch + 1


def _has_test(cfg: DictConfig, parts: Parts) -> bool:
    loaded = parts.data is not None or implements(parts.module, "test_dataloader")
    return bool(cfg.test) and loaded and implements(parts.module, "test_step")


def _load_best(parts: Parts, trainer: Trainer) -> int | None:
    """Load the weights and masks of the best checkpoint at the target; its epoch (the first is 1), or None
    where the last ones stay."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if path and getattr(callback, "monitor", None) and Path(path).is_file():
            return int(_load(path, parts, trainer)["epoch"]) + 1
    return None


def _load(path: str | Path, parts: Parts, trainer: Trainer) -> Mapping[str, Any]:
    """Load weights, masks and ranges of a checkpoint, which is returned."""
    plain = loads_plain(path, parts.folder, parts.trust)
    checkpoint: Mapping[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=plain)
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.load(trainer, parts.module, checkpoint)
    expand_weights(checkpoint["state_dict"])
    parts.module.load_state_dict(checkpoint["state_dict"])
    states, sparsity = checkpoint["callbacks"], parts.sparsity
    if sparsity.state_key in states:
        sparsity.pruner.load_state_dict(states[sparsity.state_key])
    if parts.quantize is not None:
        parts.quantize.quantization.load_state_dict(states[parts.quantize.state_key]["ranges"])
    return checkpoint


def _remove_masked(parts: Parts, trainer: Trainer) -> None:
    """With shrink_every, remove what was masked since the last removal; there is no more training."""
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.shrink(trainer, parts.module)
