"""How long a training is, in optimizer steps, and how much of it is behind."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from pl_sparse.core.upstream import place_in_training
from pl_sparse.schedule import Schedule

__all__ = ["current_step", "epochs_behind", "estimates", "progress", "steps_per_epoch", "total_steps"]

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


def epochs_behind(trainer: Trainer, ended: bool = False) -> float | None:
    """Epochs that are behind at the end of a batch, with the part of the one that is going on; None where its length is
    not known.

    Args:
        ended: whether an epoch has just ended.
    """
    epochs, batches, last = place_in_training(trainer)
    if ended:
        return epochs
    if last:
        return epochs + 1
    length = trainer.num_training_batches
    return None if length == float("inf") else epochs + min(batches / length, 1.0)


def progress(trainer: Trainer, ended: bool = False) -> float | None:
    """The part of training that is behind at the end of a batch, by the nearest of its ends: epochs, steps, time.

    Args:
        ended: whether an epoch has just ended.

    Returns:
        1 or more at the end; None where no end is known.
    """
    parts = []
    epochs = epochs_behind(trainer, ended)
    if epochs is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        parts.append(epochs / trainer.max_epochs)
    if trainer.max_steps > 0:
        parts.append(trainer.global_step / trainer.max_steps)
    if (seconds := _seconds(trainer)) is not None:
        parts.append(seconds)
    return max(parts, default=None)


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
