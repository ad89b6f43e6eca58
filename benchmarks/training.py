"""The Trainer of the benchmarks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["quiet_trainer"]


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer, on the CPU unless options say otherwise, that prints, logs and writes nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(**({"accelerator": "cpu"} | dict.fromkeys(quiet, False) | options))
