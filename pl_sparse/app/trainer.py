"""Lightning's Trainer as a configuration asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as Bar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.instantiate import each
from pl_sparse.app.settings import ConfigError
from pl_sparse.callbacks.run.atomic_checkpoints import AtomicCheckpoints
from pl_sparse.callbacks.run.mask_log import Track
from pl_sparse.callbacks.run.progress import ProgressBar, ProgressLines
from pl_sparse.callbacks.strategies import refuse_strategy
from pl_sparse.core.upstream import of_kind
from pl_sparse.integrations.servers import obstacle

__all__ = ["make_trainer", "quiet_trainer"]

_FEW = 4
"""So many processes are started on fewer cores, too: to try how a training is spread."""


def make_trainer(cfg: DictConfig, callbacks: Sequence[Callback], own: bool = False) -> Trainer:
    """The trainer with its loggers and the callbacks of the configuration.

    Without a progress bar a line is printed per epoch. On a CPU training is deterministic. Checkpoints
    are written whole or not at all, unless a plugin has a way of its own.

    Args:
        cfg: with `trainer`, `callbacks`, `logger` and `output_dir`.
        callbacks: those of the run, which come first.
        own: whether the module is the user's: one batch is validated before training, which shows its metrics.

    Raises:
        ConfigError: the trainer refuses its arguments, its strategy is refused, or a logger cannot reach its server.
    """
    node = cfg.trainer.copy()
    if node.get("deterministic") is None:
        node.deterministic = node.get("accelerator") == "cpu" or (
            node.get("accelerator") == "auto" and not torch.accelerator.is_available()
        )
    if node.get("num_sanity_val_steps") is None:
        node.num_sanity_val_steps = int(own)
    if node.get("enable_progress_bar") is None:
        node.enable_progress_bar = sys.stderr.isatty()
    _refuse_more_processes_than_cores(node)
    configured = list(each(cfg, "callbacks", Callback).values())
    lines: list[Callback] = [] if node.enable_progress_bar else [ProgressLines()]
    if node.enable_progress_bar and not any(isinstance(callback, Bar) for callback in configured):
        lines = [ProgressBar(cfg.objective)]
    loggers = _loggers(cfg)
    all_callbacks = [*callbacks, *lines, *configured, *([Track()] if loggers else [])]
    plugins = {} if node.get("plugins") else {"plugins": [AtomicCheckpoints()]}
    try:
        trainer: Trainer = instantiate(
            node,
            **plugins,
            callbacks=all_callbacks,
            logger=loggers or False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in all_callbacks),
            default_root_dir=cfg.output_dir,
            _convert_="object",
        )
    except Exception as error:
        raise ConfigError(f"trainer: {error.__cause__ or error}") from error
    try:
        refuse_strategy(trainer)
    except ValueError as error:
        raise ConfigError(f"trainer.strategy: {error}") from error
    if of_kind(trainer.strategy, ModelParallelStrategy):
        raise ConfigError(
            "trainer.strategy: ModelParallelStrategy leaves a part of the model in each process, and a run's folder "
            "has whole ones: use the Sparsity callback in a script of your own (docs/clusters.md), or strategy=ddp"
        )
    return trainer


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer of one process that prints, logs and writes nothing.

    Args:
        options: others of the Trainer, or other values of these.
    """
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(**{"devices": 1, **dict.fromkeys(quiet, False), **options})


def _refuse_more_processes_than_cores(node: DictConfig) -> None:
    """A process of a training on a CPU keeps a core busy, and has a model of its own in memory."""
    on_cpu = node.get("accelerator") == "cpu" or not torch.accelerator.is_available()
    devices, cores = node.get("devices"), os.cpu_count() or 1
    processes = int(devices) if isinstance(devices, int) or str(devices).isdecimal() else 1
    if on_cpu and processes > max(cores, _FEW):
        raise ConfigError(
            f"trainer.devices={devices} starts {processes} processes, and this machine has {cores} cores: "
            f"use trainer.devices={cores} or fewer"
        )


def _loggers(cfg: DictConfig) -> list[Any]:
    """All loggers, each with the settings logged: one that cannot reach its server fails here, before training."""
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    for name, node in (cfg.get("logger") or {}).items():
        if node is not None and (reason := obstacle(node)) is not None:
            raise ConfigError(f"logger.{name}: {reason}")
    loggers = list(each(cfg, "logger", Logger).values())
    for logger in loggers:
        try:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        except Exception as error:
            hint = ". Without an account: logger.wandb.mode=offline" if "wandb" in type(error).__module__ else ""
            raise ConfigError(f"logger: {str(error).rstrip('.')}{hint}") from error
    return loggers
