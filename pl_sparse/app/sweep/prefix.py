"""Which start a run has in common with others, by its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pl_sparse.app.sweep.identity import code, data, digest, settings
from pl_sparse.callbacks import Sparsity
from pl_sparse.callbacks.run.prefix import Prefix
from pl_sparse.schedule import Schedule, Tickets

__all__ = ["shared_prefix"]

_LATER = (
    "sparsity", "levels", "schedule", "scorer", "structure", "allocation", "updater", "masking", "method",
    "overrides", "misfit", "last", "ablation", "calibration_batches", "front", "test", "objective",
    "objectives", "mode", "shrink_every",
)  # fmt: skip
"""Settings that act once pruning has begun, as long as nothing is scored before."""


def shared_prefix(cfg: DictConfig, sparsity: Sparsity, epochs: int | None) -> Prefix | None:
    """The stages that a training shares with others.

    A dense start is shared by all runs that differ only in what acts from `schedule.begin` on. The rounds of lottery
    tickets are shared by all that prune as much in each of them. Stages end with an epoch: where pruning begins in the
    middle of one, those before it are shared.

    Stages are kept in `prefix_cache`; "auto" is the folder `prefixes` of the sweep, and nothing for a single run.

    Args:
        cfg: the run's settings.
        sparsity: its callback, attached if it can be before training.
        epochs: what the run trains.

    Returns:
        the callback that takes stages over or keeps them; None where the run shares none.
    """
    cache = _cache(cfg)
    pruner = sparsity.pruner
    if cache is None or not pruner.attached or not epochs or cfg.trainer.max_steps not in (-1, None):
        return None
    if cfg.get("target"):
        return None  # its warm-up is not part of the schedule, and what follows it is decided as it goes
    plain = settings(cfg)
    learned = pruner.masking.samples or not pruner.updater.targets_sparsity
    observed = pruner.scorer.observes or learned or pruner.updater.observes
    early = {key: value for key, value in plain.items() if key not in _LATER}
    axes = {key: plain[key] for key in _LATER if key not in ("sparsity", "levels", "schedule", "front", "test")}
    schedule: dict[str, Any] = dict(plain["schedule"])
    rounds = _rounds(pruner.schedule, epochs)
    counted = isinstance(pruner.schedule, Tickets) and pruner.schedule.epochs is not None
    if counted and not cfg.get("quantization"):  # which begins at a fraction of all epochs
        early["trainer"] = {**early["trainer"], "max_epochs": None}  # follows from the number of rounds
    common = [early, axes if observed else None, plain["front"], code(plain), data(plain["data"])]
    kind = {key: value for key, value in schedule.items() if key not in ("final", "sparsities")}
    stages: dict[int, str] = {}
    pruned = set()
    for end, reached in rounds:
        if reached and (pruner.targets.overrides or pruner.structure.fixed is not None):
            break  # these scale with the final sparsity, from the first pruning on
        if end >= 1:
            stages[end] = digest([common, end, [axes, kind, reached] if reached else None])
        if reached or observed:
            pruned.add(end)
    return Prefix(cache, stages, frozenset(pruned), cfg.output_dir) if stages else None


def _cache(cfg: DictConfig) -> Path | None:
    if cfg.prefix_cache != "auto":
        return None if cfg.prefix_cache == "off" else Path(cfg.prefix_cache)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir) / "prefixes"
    return None


def _rounds(schedule: Schedule, epochs: int) -> list[tuple[int, tuple[float, ...]]]:
    """The ends of the stages, in epochs, and the sparsities that were reached before."""
    if isinstance(schedule, Tickets):
        if schedule.length(epochs) != int(schedule.length(epochs)):
            return []
        starts = [*schedule.starts(epochs), epochs]
        exact = schedule.length(epochs) * (1 - schedule.to)
        return [(end, schedule.rounds[:k]) for k, end in enumerate(starts)] if exact == int(exact) else []
    begin = schedule.begin
    if isinstance(begin, str):
        count, _, unit = begin.strip().partition(" ")
        return [(int(float(count)), ())] if unit.startswith("epoch") else []
    return [(int(begin * epochs + 1e-9), ())] if begin <= 1 and schedule.final > 0 else []
