"""How long a training is, in optimizer steps."""

from __future__ import annotations

from lightning.pytorch import Trainer

__all__ = ["current_step", "steps_per_epoch", "total_steps"]


def total_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole training; infinity where its length is not known."""
    return trainer.estimated_stepping_batches


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of an epoch, once training has started; None where a loader's length is not known."""
    batches = trainer.num_training_batches
    if batches == float("inf"):
        return None
    return max(-(-int(batches) // max(trainer.accumulate_grad_batches, 1)), 1)  # an incomplete last one counts


def current_step(trainer: Trainer) -> int:
    """Optimizer steps taken so far, those of several optimizers at once counted as one."""
    return trainer.global_step // max(len(trainer.optimizers), 1)
