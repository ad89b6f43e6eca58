"""The settings of a run, in its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["SavedSettings", "plain"]

_KEY = "pl_sparse_settings"


class SavedSettings(Callback):
    """Writes the settings that a run is trained with into its checkpoints.

    Args:
        settings: resolved; what is not a plain value is written as text.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = plain(settings)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = self.settings

    @staticmethod
    def of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        """The settings that a checkpoint was trained with; None where it does not say."""
        settings = checkpoint.get(_KEY)
        return settings if isinstance(settings, dict) else None


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the types that JSON has.

    >>> plain({"betas": (0.9, 0.95)})
    {'betas': [0.9, 0.95]}
    """
    values: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return values
