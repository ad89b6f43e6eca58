"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from pl_sparse.core.files import replacing

__all__ = ["AtomicCheckpoints"]


class AtomicCheckpoints(CheckpointIO):
    """Saves a checkpoint beside its destination and puts it there in one step, so that a process killed at any moment
    leaves the old file or the new one: `Trainer(plugins=[AtomicCheckpoints()])`.

    Lightning's own way goes through the system's folder for temporary files; from another file system that is a copy,
    which can end half way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=weights_only)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
