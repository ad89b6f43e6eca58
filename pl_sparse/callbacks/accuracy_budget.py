"""As sparse as validation allows."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pl_sparse.callbacks.clock import Timetable
from pl_sparse.callbacks.monitored import require, require_of_sanity_check
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.callbacks.strategies import refuse_parts
from pl_sparse.core.upstream import validation_has_run
from pl_sparse.results.judged import judged
from pl_sparse.schedule import Decisions, Paced, Time

__all__ = ["AccuracyBudget"]


class AccuracyBudget(Callback):
    """Raises the sparsity while a validation metric stays within a budget; ends with the sparsest model within it.

    It needs a `Sparsity(schedule=Paced(final=0.99))` callback before it. After a dense warm-up each level removes the
    fraction `rate` of the weights that are left, s' = 1 - (1 - s)(1 - rate), and is trained until an epoch's metric
    holds: m >= reference - drop (mode "max"). A level that does not hold within `patience` epochs is undone, with
    weights, masks and optimizer, and the next level removes half as much. The schedule's `final` is the highest level
    tried. A resumed training ends like an uninterrupted one.

    Args:
        drop: what the metric may lose, in its own unit.
        metric: a metric that is logged at each validation; None: an accuracy, else a metric that is not a loss (a loss
            if mode is "min").
        mode: "max" if more is better, else "min".
        reference: the metric of the dense model; None for the best of the warm-up.
        warmup: how long the model is first trained dense.
        patience: the number of epochs within which a level must hold.
        rate: the part of the remaining weights that the next level removes.
        least: training ends when the rate is below this.

    Attributes:
        epoch: the epoch of the model that it ends with.

    Raises:
        ValueError: there is no Sparsity callback before it, its schedule or structure leave nothing to decide, or the
            metric is not logged.
    """

    def __init__(
        self,
        drop: float = 0.01,
        metric: str | None = None,
        mode: Literal["max", "min"] = "max",
        reference: float | None = None,
        warmup: Time = 0.2,
        patience: int = 3,
        rate: float = 0.5,
        least: float = 0.02,
    ) -> None:
        if drop < 0:
            raise ValueError(f"drop={drop!r} must not be negative: it is the allowed loss of the metric")
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} is neither 'max' nor 'min'")
        if patience < 1:
            raise ValueError(f"patience={patience!r} must be 1 or more epochs")
        if not 0 < least <= rate < 1:
            raise ValueError(f"least={least!r} and rate={rate!r} must be 0 < least <= rate < 1")
        self.drop = drop
        self.metric = metric
        self.mode = mode
        self.reference = reference
        self.warmup = warmup
        self.patience = patience
        self.rate = rate
        self.least = least
        self.epoch: int | None = None
        self._plan = Decisions()
        self._baseline: float | None = None  # the reference, once the warm-up is over
        self._rate = rate
        self._tried = 0  # epochs at this level
        self._level = 0.0  # the one that is tried
        self._held: dict[str, Any] | None = None  # the sparsest model within the budget, to go back to
        self._best = float("-inf")  # its metric, more is better
        self._times = Timetable("accuracy budget", warmup=warmup)

    # Before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        pruner = Sparsity.of(trainer).pruner
        schedule = pruner.schedule
        if not isinstance(schedule, Paced):
            raise ValueError(
                f"an accuracy budget sets the levels, and schedule={type(schedule).__name__.lower()} sets them "
                "itself: use schedule=paced"
            )
        if pruner.structure.fixed is not None:
            raise ValueError(
                f"structure={pruner.structure.label} prescribes a sparsity of {pruner.structure.fixed:g}, so that an "
                "accuracy budget has nothing to decide: use structure=unstructured, channel, block4x4 or another"
            )
        pruner.schedule = Paced(final=schedule.final, decisions=self._plan)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._times.start(trainer)
        if self._plan.done:  # resumed from the end, which may have come before the last epoch
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._times.batch_starts(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times.batch_ended(trainer)

    # Decisions

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validation_has_run(trainer):
            return
        metric = self._judged(trainer)
        sign = 1 if self.mode == "max" else -1
        value = sign * float(trainer.strategy.broadcast(float(trainer.callback_metrics[metric])))  # that of rank 0
        self._tried += 1
        if self._baseline is None:
            if self._held is None or value > self._best:
                self._hold(trainer, pl_module, value)
            if self._times.passed("warmup"):
                self._baseline = sign * self._best if self.reference is None else self.reference
                self._try(trainer)
        elif value >= sign * self._baseline - self.drop:
            self._hold(trainer, pl_module, value)
            self._try(trainer)
        elif self._tried >= self.patience:
            self._restore(trainer, pl_module)
            self._rate /= 2
            self._try(trainer)
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if trainer.should_stop or last:  # before checkpoints are written
            self._finish(trainer, pl_module)

    def _judged(self, trainer: Trainer) -> str:
        """The name of the metric, which must be logged by now."""
        if self.metric is None:
            self.metric = judged(trainer.callback_metrics, self.mode)
            rank_zero_info(f"the accuracy budget compares {self.metric}")
        require(self.metric or "val/acc", trainer.callback_metrics, "AccuracyBudget")
        assert self.metric is not None
        return self.metric

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.metric is not None:
            require_of_sanity_check(self.metric, trainer, type(self).__name__)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._judged(trainer)  # said at the first validation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)  # where something else ended the training
        self._times.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._times.release()

    def _try(self, trainer: Trainer) -> None:
        """Prune further at the next step, if there is further."""
        pruner = Sparsity.of(trainer).pruner
        assert self._held is not None
        level: float = self._held["pruner"]["level"]
        if self._rate < self.least or level >= pruner.schedule.final:
            trainer.should_stop = True
            return
        self._tried = 0
        self._level = min(1 - (1 - level) * (1 - self._rate), pruner.schedule.final)
        self._plan.levels[pruner.step] = self._level

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if self._plan.done or self._held is None:
            return
        self._restore(trainer, module)
        self._plan.done = True
        if self._held["pruner"]["level"] == 0:
            rank_zero_warn(
                f"no sparse model was within drop={self.drop:g} of {self.metric} {self._baseline}: the model is dense. "
                "Train longer, allow a larger drop, or begin with a smaller rate"
            )

    # The model that holds

    def _hold(self, trainer: Trainer, module: LightningModule, value: float) -> None:
        self._best, self.epoch = value, trainer.current_epoch
        self._held = {
            "module": {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()},
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "pruner": copy.deepcopy(Sparsity.of(trainer).pruner.state_dict()),
        }

    @torch.no_grad()
    def _restore(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._held is not None
        module.load_state_dict(self._held["module"])
        for optimizer, state in zip(trainer.optimizers, self._held["optimizers"], strict=True):
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(copy.deepcopy(state))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # time goes on
        sparsity = Sparsity.of(trainer)
        pruner = sparsity.pruner
        now = pruner.state_dict()
        clock = {"step": now["step"], "updated": now["updated"], "num_updates": now["num_updates"] + 1}
        pruner.load_state_dict({**copy.deepcopy(self._held["pruner"]), **clock})
        sparsity.look(trainer)
        self._level = self._held["pruner"]["level"]

    # State

    def state_dict(self) -> dict[str, Any]:
        return {
            "levels": self._plan.levels,
            "done": self._plan.done,
            "dense": self._baseline,
            "rate": self._rate,
            "tried": self._tried,
            "level": self._level,
            "best": self._best,
            "metric": self.metric,
            "epoch": self.epoch,
            "held": self._held,
            "times": self._times.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._plan.levels.update(state_dict["levels"])
        self._plan.done = state_dict["done"]
        self._baseline, self._rate = state_dict["dense"], state_dict["rate"]
        self._tried, self._level = state_dict["tried"], state_dict["level"]
        self._best, self.epoch, self._held = state_dict["best"], state_dict["epoch"], state_dict["held"]
        self.metric = self.metric or state_dict.get("metric")
        self._times.load_state_dict(state_dict.get("times"))
