"""A whole curve from one training: the model at each level of sparsity, once it has had its training there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_sparse.callbacks.sparsity import Sparsity

__all__ = ["Front"]


class Front(Callback):
    """Saves `levels/level_00/level.ckpt`, `level_01`, ... below `folder`: the state of the training just before each
    step at which the schedule makes the masks sparser, and at its end. So a level is saved after all its steps, not
    when it is first reached. The schedule must stay on its levels: Staircase, Iterative, Tickets. If there are steps
    before the first pruning, level 0 is dense.

    It comes before `Sparsity` and `Rewind`, which change the weights as a batch begins.

    Args:
        folder: the folder of `levels`.

    Attributes:
        paths: the checkpoints so far.
        count: their number.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.count = 0
        self._step = 0

    @property
    def paths(self) -> list[Path]:
        return [self._path(level) for level in range(self.count)]

    def _path(self, level: int) -> Path:
        return self.folder / "levels" / f"level_{level:02d}" / "level.ckpt"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pruner = Sparsity.of(trainer).pruner
        if pruner.due and pruner.step > self._step:
            self._save(trainer, pruner.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, Sparsity.of(trainer).pruner.step)

    def _save(self, trainer: Trainer, step: int) -> None:
        self._step = step
        self.count += 1
        trainer.save_checkpoint(self._path(self.count - 1))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self._step = state_dict["count"], state_dict["step"]
