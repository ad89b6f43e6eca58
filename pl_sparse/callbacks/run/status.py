"""The progress of a run, in a small file that others may read during training."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pl_sparse.callbacks.clock import total_steps
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.files import write_json
from pl_sparse.core.ledger import Ledger

__all__ = ["Status", "read_status"]


def read_status(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a run's status.json says; None where there is none that can be read.

    Args:
        folder: the run's.
    """
    try:
        status: Any = json.loads((Path(folder) / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) and isinstance(status.get("state"), str) else None


class Status(Callback):
    """Writes `folder`/status.json: state (running, finished, interrupted, failed), error, step, total, sparsity,
    accuracy (the last value of `objective`), started and updated (seconds since 1970), steps_trained and steps_shared,
    process, and with a ledger the files that the run wrote and found.

    Used as a context around the whole run, it records its end, too: "finished", "interrupted" by the user or a signal,
    or "failed" with the exception. A process that was killed leaves "running" behind. If the file cannot be written,
    training continues.

    Args:
        folder: the run's.
        objective: the metric that stands for accuracy.
        config: a hash of the run's settings, kept in the file.

    Attributes:
        shared: optimizer steps that were taken over from a prefix trained by another run.
        ledger: what the run writes; None where nobody keeps it.
    """

    def __init__(self, folder: str | os.PathLike[str], objective: str = "val/acc", config: str | None = None) -> None:
        self.folder = Path(folder)
        self.objective = objective
        self.ledger: Ledger | None = None
        self.values: dict[str, Any] = {
            "state": "running", "error": None, "step": 0, "total": 0, "sparsity": 0.0, "accuracy": None,
            "started": 0.0, "updated": 0.0, "steps_trained": 0, "steps_shared": 0, "config": config,
            "process": os.getpid(),
        }  # fmt: skip
        self._before = 0  # steps trained before an interruption
        self._start = 0  # the step at which this process began

    def __enter__(self) -> Status:
        earlier = read_status(self.folder)
        if earlier is not None and earlier.get("config") == self.values["config"]:  # an interrupted run goes on
            kept = ("step", "total", "sparsity", "accuracy", "steps_trained", "steps_shared")
            self.values |= {key: earlier[key] for key in kept if key in earlier}
            self._before = self.values["steps_trained"]
        self.values["started"] = time.time()
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.values["state"] = "finished"
        else:
            self.values["state"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.values["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        self._write()

    def share(self, steps: int) -> None:
        """The run goes on from a prefix of so many optimizer steps, which it did not train."""
        self.values["steps_shared"] = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self.values["from"] = trainer.global_step
        total = total_steps(trainer)
        self.values["total"] = int(total) if total != float("inf") else 0
        self._look(trainer, now=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.objective)
        if value is not None:
            self.values["accuracy"] = float(value)
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, now=True)

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.values["accuracy"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values["accuracy"] = state_dict["accuracy"]

    def _look(self, trainer: Trainer, now: bool = False) -> None:
        if not now and time.time() - self.values["updated"] < 1:
            return
        self.values["step"] = trainer.global_step
        self.values["steps_trained"] = self._before + trainer.global_step - self._start
        sparsity = Sparsity.of(trainer, required=False)
        if sparsity is not None:
            self.values["sparsity"] = sparsity.sparsity
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        self.values["updated"] = time.time()
        if self.ledger is not None:
            self.values["files"] = sorted(self.ledger.written)
            self.values["found"] = sorted(self.ledger.found)
        with suppress(OSError):  # a full disk ends training where a checkpoint does not fit
            write_json(self.folder / "status.json", self.values)
