"""The logged values of each epoch, in a table that survives an interruption."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.files import write_csv

__all__ = ["BOOKKEEPING", "History"]

BOOKKEEPING = ("epoch", "step", "sparsity", "lr", "seconds")
"""The columns that the module has not logged."""


class History(Callback):
    """One row per epoch: epoch (the first is 1), step, sparsity, learning rate, seconds so far, and
    every scalar that was logged.

    Args:
        path: a CSV file, rewritten after each epoch; None keeps the rows in memory.

    Attributes:
        rows: the rows so far; a resumed run has those from before.
        started: whether training has begun.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._epochs: dict[int, dict[str, float]] = {}
        self._validated = False
        self._since = 0.0
        self._before = 0.0
        self.started = False

    @property
    def rows(self) -> list[dict[str, float]]:
        return [self._epochs[epoch] for epoch in sorted(self._epochs)]

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._epochs, self._before = {}, 0.0
        self._since = time.perf_counter()
        self.started = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before, self._since = self.seconds, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        sparsity = Sparsity.of(trainer, required=False)
        if sparsity is not None:
            row["sparsity"] = sparsity.sparsity
        if trainer.optimizers:
            row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(self.seconds, 3)
        for name, value in trainer.callback_metrics.items():
            if self._validated or not name.startswith("val"):
                row.setdefault(name, float(value))
        self._validated = False
        self._epochs[trainer.current_epoch + 1] = row
        if self.path is not None and trainer.is_global_zero:
            write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds, "first_epoch": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        later = 1 - state_dict.get("first_epoch", 0)  # 0.1.0 counted epochs from 0
        rows = [{**row, "epoch": row["epoch"] + later} for row in state_dict["rows"]]
        self._epochs = {int(row["epoch"]): row for row in rows}
        self._before = state_dict["seconds"]
