"""How long a training is, in optimizer steps, and how much of it is behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer

from pl_sparse.callbacks.steps import StepHooks
from pl_sparse.core.upstream import place_in_training
from pl_sparse.schedule import OneShot, Schedule, Time
from pl_sparse.schedule.clock import Clock

__all__ = ["Timetable", "current_step", "estimates", "progress", "steps_per_epoch", "total_steps"]

_FAR = 2**60  # a number of steps that is not known yet
_FAR_EPOCH = 2**40


def total_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole training; infinity where its length is not known."""
    steps = trainer.estimated_stepping_batches
    return float("inf") if steps < 0 else steps  # -1 for a loader without a length


def estimates(trainer: Trainer, schedule: Schedule) -> tuple[float, int]:
    """Optimizer steps of the whole training and of an epoch, for a schedule that follows the trainer's progress.

    What only shows as training goes on is far away: epochs of a loader without a length, a training that ends by time.
    """
    total, per_epoch = total_steps(trainer), steps_per_epoch(trainer)
    if total == float("inf") and schedule.movable and _seconds(trainer) is not None:
        total = _FAR
    if per_epoch is None and schedule.in_epochs:
        total = max(total, _FAR)
    return total, _FAR_EPOCH if per_epoch is None else per_epoch


def _epochs(trainer: Trainer, ended: bool) -> float | None:
    epochs, batches, last = place_in_training(trainer)
    if ended:
        return epochs
    if last:
        return epochs + 1
    length = trainer.num_training_batches
    return None if length == float("inf") else epochs + min(batches / length, 1.0)


def progress(trainer: Trainer, ended: bool = False) -> tuple[float | None, float | None]:
    """What is behind of a training at the end of a batch.

    Args:
        ended: whether an epoch has just ended.

    Returns:
        The part of training, by the nearest of its ends: epochs, steps, time. It is 1 or more at the end, and None
        where no end is known. And epochs, with the part of the one that is going on; None where its length is not
        known.
    """
    parts = []
    epochs = _epochs(trainer, ended)
    if epochs is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        parts.append(epochs / trainer.max_epochs)
    if trainer.max_steps > 0:
        parts.append(trainer.global_step / trainer.max_steps)
    if (seconds := _seconds(trainer)) is not None:
        parts.append(seconds)
    return max(parts, default=None), epochs


def _seconds(trainer: Trainer) -> float | None:
    """The part of the time for training that is over; None where there is no limit."""
    parts = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None:
            elapsed = callback.time_elapsed()
            parts.append(elapsed / max(elapsed + remaining, 1e-9))
    if not parts:
        return None
    part = max(parts)
    return float(trainer.strategy.broadcast(part)) if trainer.world_size > 1 else part


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of an epoch, once training has started; None where a loader's length is not known."""
    batches = trainer.num_training_batches
    if batches == float("inf"):
        return None
    return max(-(-int(batches) // max(trainer.accumulate_grad_batches, 1)), 1)  # an incomplete last one counts


def current_step(trainer: Trainer) -> int:
    """Optimizer steps taken so far, those of several optimizers at once counted as one."""
    return trainer.global_step // max(len(trainer.optimizers), 1)


class Timetable:
    """Times of a callback in a training, as optimizer steps that follow the trainer's progress as a schedule's do.

    It counts the steps that happened; of several optimizers those of the first that steps in a batch.

    Args:
        what: what the times are of, for messages.
        times: by name.

    Attributes:
        step: optimizer steps taken.

    Raises:
        ValueError: a time is none.
    """

    def __init__(self, what: str, **times: Time) -> None:
        self._what = what
        self._times = times
        self._clocks = {name: Clock(self._schedule(name)) for name in times}
        self.step = 0
        self._keeper: Optimizer | None = None  # the first that steps in a batch
        self._hooks: StepHooks | None = None
        self._restored: Mapping[str, Any] | None = None

    def _schedule(self, name: str) -> Schedule:
        try:
            return OneShot(final=0.0, begin=self._times[name])
        except ValueError as error:
            raise self._named(name, error) from None

    def _named(self, name: str, error: ValueError) -> ValueError:
        return ValueError(f"{self._what}: {error}".replace("begin=", f"{name}="))

    def start(self, trainer: Trainer) -> None:
        """Fit the times to a training that starts or goes on.

        Raises:
            ValueError: one is beyond training, or a fraction of a length that is not known.
        """
        self.step = current_step(trainer)
        for name, time in self._times.items():
            schedule = self._clocks[name].schedule
            total, per_epoch = estimates(trainer, schedule)
            if total == float("inf") and schedule.fractional and time != 1:
                raise ValueError(
                    f"{self._what}: {name}={time!r} is a fraction of training, whose length is not known: set "
                    "max_epochs or max_steps, or give the time in steps or epochs"
                )
            clock = self._clocks[name] = Clock(schedule)
            try:
                clock.fit(_FAR if total == float("inf") else total, per_epoch)
            except ValueError as error:
                raise self._named(name, error) from None
        self._take_up()
        self._hooks = StepHooks(after=self._stepped)
        self._hooks.follow(trainer, *trainer.optimizers)
        self._keeper = None

    def _take_up(self) -> None:
        """Go on from a state that was loaded."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self.step = restored["step"]
        for name, moved in restored["estimates"].items():
            if moved is not None and name in self._clocks:
                self._clocks[name].restore(moved)

    def batch_starts(self, trainer: Trainer) -> None:
        """Call at the start of each batch."""
        self._keeper = None
        if self._hooks is not None:
            self._hooks.follow(trainer, *trainer.optimizers)

    def batch_ended(self, trainer: Trainer) -> None:
        """Call at the end of each batch: times follow what is behind of training."""
        behind = progress(trainer)
        for clock in self._clocks.values():
            clock.follow(self.step, *behind)

    def _stepped(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._keeper is None:
            self._keeper = optimizer
        self.step += optimizer is self._keeper

    def at(self, name: str) -> int:
        """The step of a time, as it is estimated by now."""
        return self._clocks[name].span[0]

    def passed(self, name: str) -> bool:
        """Whether a time has come."""
        return self.step >= self.at(name)

    def release(self) -> None:
        """Leave the optimizers as they were."""
        if self._hooks is not None:
            self._hooks.release()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)
        return {"step": self.step, "estimates": {name: clock.estimates() for name, clock in self._clocks.items()}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up a state; None: of a release that kept none."""
        self._restored = state
        if self._hooks is not None:  # a tuner within training takes its own steps back
            self._take_up()
