"""Settings that would do nothing: keys that nothing reads, and values with which nothing is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.nodes import strings
from pl_sparse.core.registry import near_misses, suggestion
from pl_sparse.results.direction import direction

__all__ = ["idle", "misdirected", "references", "unread"]


def unread(cfg: DictConfig, known: Collection[str]) -> str | None:
    """What to say of a key at the top that neither the application nor an interpolation reads; None if there is none.

    Args:
        cfg: not resolved.
        known: the keys and groups that the application reads.
    """
    new = [str(key) for key in cfg if key not in known]
    if not new:
        return None
    read = set(references(cfg))
    if HydraConfig.initialized():
        read |= set(references(HydraConfig.get()))
    for key in new:
        if key not in read:
            close = near_misses(key, known)
            hint = suggestion(key, close) if close else f"An interpolation would, such as model.width=${{{key}}}."
            return f"{key} is not a setting: nothing reads it. {hint}"
    return None


def references(cfg: Any) -> Iterator[str]:
    """The keys at the top that interpolations read.

    >>> sorted(references(OmegaConf.create({"a": "${b}", "c": {"d": "${e.f}/${oc.env:HOME}"}, "b": 1})))
    ['b', 'e']
    """
    for text in strings(OmegaConf.to_container(cfg, resolve=False)):
        yield from re.findall(r"\$\{\s*(\w+)(?=[.\[}\s])(?!\.?\w*:)", text)


def idle(values: Mapping[str, Any]) -> str | None:
    """What to say of values with which nothing would be trained, or nothing be done; None if there are none.

    Args:
        values: the settings, resolved and of the right types.
    """
    trainer = values.get("trainer") or {}
    for key in ("_target_", "max_epochs", "max_steps"):
        if key not in trainer:
            return f"trainer.{key} is left out, and a run reads it: give trainer=default, or trainer.{key}=..."
    for key, instead in _MADE.items():
        if key in trainer:
            return f"nothing reads trainer.{key}: {instead}"
    for key, value in (*values.items(), *((f"trainer.{key}", value) for key, value in trainer.items())):
        if key in _RANGES and isinstance(value, (int, float)) and not isinstance(value, bool):
            holds, wanted = _RANGES[key]
            if math.isnan(value) or not holds(value):
                return f"{key}={value} {wanted}"
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs == -1 and steps == -1 and not trainer.get("max_time"):
        return "trainer.max_epochs=-1 has no end: give trainer.max_steps=... or trainer.max_time=..."
    batches = trainer.get("limit_train_batches")
    if isinstance(batches, float) and batches > 1:
        return (
            f"trainer.limit_train_batches={batches} is a fraction: it must be in (0, 1], or a whole number of batches"
        )
    objective = str(values.get("objective"))
    if objective.startswith("val") and trainer.get("limit_val_batches") == 0 and values.get("callbacks"):
        return (
            f"trainer.limit_val_batches=0 leaves no {objective}, which picks the best epoch: give objective=train/..."
        )
    if isinstance(epochs, int) and 0 < epochs < (trainer.get("check_val_every_n_epoch") or 1):
        every = trainer["check_val_every_n_epoch"]
        return f"trainer.check_val_every_n_epoch={every} is beyond trainer.max_epochs={epochs}: nothing is validated"
    rate = (values.get("optimizer") or {}).get("lr")
    if isinstance(rate, (int, float)) and not 0 < rate < math.inf:
        return f"optimizer.lr={rate} must be above 0: nothing is trained otherwise"
    if values.get("export_measure") and not values.get("export"):
        return "export_measure=true measures what is exported, and nothing is: give export=[onnx] or another format"
    return None


def misdirected(objective: str, mode: str | None) -> str | None:
    """What to say of a metric that would be optimized the wrong way, or in no known way; None if all is well."""
    follows = direction(objective)
    if mode is None and follows is None:
        return f"objective={objective}: is more of it better, or less? Give mode=max or mode=min"
    if mode is not None and follows is not None and mode != follows:
        better = "less" if follows == "min" else "more"
        return f"objective={objective} with mode={mode} picks the worst epoch: {better} of it is better, mode={follows}"
    return None


def _least(bound: float) -> Any:
    return lambda value: value >= bound


_MADE = {
    "callbacks": "give callbacks.NAME._target_=package.Callback",
    "logger": "give logger=csv, or logger.NAME._target_=package.Logger",
    "enable_checkpointing": "callbacks=none writes no checkpoints",
    "default_root_dir": "give output_dir=...",
}
"""Arguments of the Trainer that the application gives, and what is set in their place."""
_TRAINS = "trains nothing"
_RANGES: dict[str, tuple[Any, str]] = {
    "seed": (lambda value: 0 <= value < 2**32, "must be in [0, 4294967295]"),
    "threads": (_least(1), "must be 1 or more; null shares the cores"),
    "calibration_batches": (_least(1), "must be 1 or more"),
    "sparsity": (lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    "label_smoothing": (lambda value: 0 <= value < 1, "must be in [0, 1)"),
    "trainer.max_epochs": (lambda value: value == -1 or value >= 1, f"{_TRAINS}: it must be 1 or more"),
    "trainer.max_steps": (lambda value: value == -1 or value >= 1, f"{_TRAINS}: it must be 1 or more; -1 is no limit"),
    "trainer.limit_train_batches": (lambda value: value > 0, f"{_TRAINS}: it must be above 0"),
    "trainer.accumulate_grad_batches": (_least(1), "must be 1 or more batches per optimizer step"),
    "trainer.gradient_clip_val": (_least(0), "must be 0 or more; null does not clip"),
    "trainer.check_val_every_n_epoch": (_least(1), "must be 1 or more"),
    "trainer.val_check_interval": (lambda value: value > 0, "must be above 0"),
    "trainer.log_every_n_steps": (_least(0), "must be 0 or more"),
}
