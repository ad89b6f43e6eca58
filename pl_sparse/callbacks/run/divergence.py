"""A training whose weights are not numbers any more ends before they reach a checkpoint."""

from __future__ import annotations

from collections.abc import Collection

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

__all__ = ["DivergedError", "Divergence", "not_finite"]


class DivergedError(RuntimeError):
    """Weights are infinite or NaN."""


class Divergence(Callback):
    """Looks at the weights once an epoch, before checkpoints are written, and ends a training that has diverged.

    Weights that were infinite before training, or are not trained, are left out.

    Raises:
        DivergedError: a weight is infinite or NaN.
    """

    def __init__(self) -> None:
        self._before: frozenset[str] = frozenset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = frozenset(not_finite(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = not_finite(pl_module, self._before)
        if names:
            raise DivergedError(diverged(names, trainer.current_epoch))


def diverged(names: Collection[str], epoch: int) -> str:
    """The sentence that says where."""
    first, more = next(iter(names)), len(names) - 1
    return f"training diverged in epoch {epoch + 1}: {first} holds NaN or infinity" + (f", {more} more" * (more > 0))


@torch.no_grad()
def not_finite(module: nn.Module, ignored: Collection[str] = ()) -> list[str]:
    """The names of trained parameters that hold NaN or infinity, by one transfer from the device."""
    named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad and weight.numel()]
    named = [(name, weight) for name, weight in named if name not in ignored]
    if not named:
        return []
    device = named[0][1].device
    finite = torch.stack([weight.isfinite().all().to(device, non_blocking=True) for _, weight in named]).tolist()
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]
