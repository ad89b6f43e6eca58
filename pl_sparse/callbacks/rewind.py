"""Lottery tickets: after each pruning, training starts again from earlier weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from pl_sparse.callbacks.clock import total_steps
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.callbacks.strategies import refuse_parts, together
from pl_sparse.core.files import replacing, write_csv, write_json
from pl_sparse.core.upstream import averaged_models, restart_average
from pl_sparse.results.judged import is_loss
from pl_sparse.schedule import Tickets

__all__ = ["Rewind", "training_length"]


class Rewind(Callback):
    """Searches for lottery tickets: train, prune, rewind, again and again.

    It needs a `Sparsity(schedule=Tickets(...))` callback before it: `Trainer(max_epochs=120,
    callbacks=[Sparsity(schedule=Tickets(final=0.9)), Rewind()])` trains 12 rounds of 10 epochs. Before each round but
    the first the trained weights make the masks sparser. Then all parameters, buffers, the optimizer and the
    learning-rate schedule are set back to the rewinding point, under the new masks. So are averaged weights
    (Lightning's `WeightAveraging`, EMA); otherwise validation would see a mix of rounds. The order of the data and all
    other random numbers are not set back: each round draws its own.

    Each round leaves `levels/level_00/`, ...: `ticket.safetensors` (the masks, and the trained sparse weights),
    `metrics.json`; `levels/rewind.safetensors` holds the weights of the rewinding point; `tickets.csv`,
    `tickets.png` have all rounds. An interrupted training resumes from its last checkpoint.

    Args:
        weights: "rewind" to those at the rewinding point (`Tickets.to`: 0 is the initialization); "keep" the trained
            ones, and their averages, and rewind the learning rate alone; "reinit" draws new ones, the control, and
            averages start from them.
        dirpath: the folder to write to; None for the trainer's `default_root_dir`.

    Sources: Frankle, Carbin, The lottery ticket hypothesis, 2018, arXiv:1803.03635. Frankle et al., Linear mode
    connectivity and the lottery ticket hypothesis, 2019, arXiv:1912.05671 (late rewinding). Renda, Frankle,
    Carbin, Comparing rewinding and fine-tuning in neural network pruning, 2020, arXiv:2003.02389 (learning-rate
    rewinding).

    Raises:
        ValueError: there is no Sparsity callback with `Tickets` before it.
    """

    def __init__(self, weights: Literal["rewind", "keep", "reinit"] = "rewind", dirpath: str | None = None) -> None:
        if weights not in ("rewind", "keep", "reinit"):
            raise ValueError(f"weights={weights!r} must be one of rewind, keep, reinit")
        self.weights = weights
        self.dirpath = dirpath
        self.rows: list[dict[str, Any]] = []
        self._saved: dict[str, Any] | None = None
        self._best: dict[str, float] = {}
        self._last: dict[str, float] = {}  # of the last epoch, for a training that was killed after it

    # The rewinding point

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        self._schedule(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pruner = Sparsity.of(trainer).pruner
        schedule = self._schedule(trainer)
        if self._saved is None and pruner.step >= round(schedule.to * schedule.length(self._total(trainer))):
            self._saved = self._snapshot(trainer, pl_module)
            if trainer.is_global_zero:
                self._save(self._folder(trainer) / "levels" / "rewind.safetensors", self._saved["module"])
        if pruner.step not in schedule.starts(self._total(trainer)):
            return
        weights, masks = self._weights(pl_module), self._masks(trainer)
        if pruner.advance():
            self._write(trainer, weights, masks)
            self._rewind(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, value in _floats(trainer.callback_metrics).items():
            if not name.startswith("val"):  # of the training before: a resumed one does not have them
                continue
            better = min if is_loss(name) else max
            self._best[name] = better(self._best.get(name, value), value)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = _floats(trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, self._weights(pl_module), self._masks(trainer))

    def _schedule(self, trainer: Trainer) -> Tickets:
        sparsity = Sparsity.of(trainer)
        schedule = sparsity.pruner.schedule
        if not isinstance(schedule, Tickets):
            raise ValueError(
                f"Rewind needs the rounds of schedule=tickets, not schedule={type(schedule).__name__.lower()}"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks.index(self) < callbacks.index(sparsity):
            raise ValueError("Rewind comes after Sparsity: Trainer(callbacks=[Sparsity(...), Rewind()])")
        return schedule

    @staticmethod
    def _total(trainer: Trainer) -> int:
        return int(total_steps(trainer))

    def _snapshot(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        return {
            "module": self._weights(module),
            "averages": [self._weights(average) for average in averaged_models(trainer)],
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        }

    @torch.no_grad()
    def _rewind(self, trainer: Trainer, module: LightningModule) -> None:
        pruner = Sparsity.of(trainer).pruner
        assert self._saved is not None
        if self.weights == "rewind":
            module.load_state_dict(self._saved["module"])
            pruner.written()
        elif self.weights == "reinit":
            with together(trainer):
                pruner.reinitialize()
        if self.weights != "keep":
            self._average_anew(trainer, module)
        for optimizer, state in zip(trainer.optimizers, self._saved["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for config, state in zip(trainer.lr_scheduler_configs, self._saved["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))

    def _average_anew(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages are what they were at the rewinding point; those of new weights start from them."""
        assert self._saved is not None
        saved = self._saved.get("averages", ())  # a checkpoint of an earlier release has none
        for i, average in enumerate(averaged_models(trainer)):
            if self.weights == "rewind" and i < len(saved):
                average.load_state_dict(saved[i])
            else:
                restart_average(average, module)
        Sparsity.of(trainer).mask_averages(trainer)

    # What is left of a round

    @staticmethod
    def _weights(module: nn.Module) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def _masks(self, trainer: Trainer) -> dict[str, Tensor]:
        return {f"mask:{param.name}": param.mask.cpu().clone() for param in Sparsity.of(trainer).pruner.params}

    def _write(self, trainer: Trainer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        total = sum(mask.numel() for mask in masks.values())
        kept = sum(int(mask.sum()) for mask in masks.values())
        row: dict[str, Any] = {"level": len(self.rows), "remaining": kept / total, "weights": kept}
        metrics = _floats(trainer.callback_metrics) or self._last
        row |= {name: value for name, value in metrics.items() if name != "sparsity"}
        row |= {f"best/{name}": value for name, value in self._best.items()}
        self._best = {}
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        folder = self._folder(trainer)
        level = folder / "levels" / f"level_{row['level']:02d}"
        self._save(level / "ticket.safetensors", {**weights, **masks})
        write_json(level / "metrics.json", row)
        write_csv(folder / "tickets.csv", self.rows)
        from pl_sparse.results.figures import plot_tickets  # matplotlib is for those who draw

        plot_tickets(self.rows, folder / "tickets.png")

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or trainer.default_root_dir)

    @staticmethod
    def _save(path: Path, tensors: dict[str, Tensor]) -> None:
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    # State

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self._saved, "rows": self.rows, "best": self._best, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["saved"]
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._best = {name: value for name, value in state_dict["best"].items() if name.startswith("val")}
        self._last = dict(state_dict["last"])


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def training_length(trainer: Trainer) -> float:
    """Optimizer steps that a learning-rate schedule is made for: those of a round, where there is `Rewind`."""
    total = total_steps(trainer)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if total != float("inf") and any(isinstance(callback, Rewind) for callback in callbacks):
        schedule = Sparsity.of(trainer).pruner.schedule
        if isinstance(schedule, Tickets):
            return round(schedule.length(int(total)))
    return total
