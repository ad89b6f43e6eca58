"""A schedule in a training: its times as optimizer steps."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from pl_sparse.schedule.base import Schedule

__all__ = ["Clock"]


@dataclass
class Clock:
    """The levels of a schedule in a training whose length is known.

    Args:
        schedule: as it was given.

    Attributes:
        total: optimizer steps of the whole training; None until `fit`.
        span: the steps of the first and the last level.

    >>> from pl_sparse.schedule import Linear
    >>> clock = Clock(Linear(final=0.8, begin=0.0, end=0.5, every=1))
    >>> clock.fit(8)
    >>> [clock.levels(step) for step in (0, 2, 4, 6)]
    [(0.0,), (0.4,), (0.8,), ()]
    """

    schedule: Schedule
    total: int | None = None
    span: tuple[int, int] = (0, 0)
    _timed: Schedule = field(init=False)  # with epochs turned into steps

    def __post_init__(self) -> None:
        self._timed = self.schedule

    def fit(self, total: float, steps_per_epoch: int | None = None) -> None:
        """Fit the schedule to a training of `total` optimizer steps (infinity: not known).

        Args:
            steps_per_epoch: optimizer steps of an epoch, for times in epochs.

        Raises:
            ValueError: the schedule does not fit, or has fractions of a length that is not known.
        """
        if total == float("inf"):
            if self.schedule.fractional:
                raise ValueError(
                    f"begin={self.schedule.begin!r} and end={self.schedule.end!r} are fractions of training, whose "
                    "length is not known: set max_epochs or max_steps, or give the times in steps or epochs"
                )
            total = sys.maxsize
        self._timed = self.schedule.resolved(steps_per_epoch)
        self.total = int(total)
        self.span = self._timed.span(self.total)

    def levels(self, step: int) -> tuple[float, ...]:
        """The sparsities due at a step, one after the other; () when none is."""
        if self.total is None or not self.span[0] <= step <= self.span[1]:
            return ()
        return self._timed.levels(step, self.total)

    def progress(self, step: int) -> float:
        """The part of the schedule that is behind at a step, in [0, 1]."""
        begin, end = self.span
        return (step - begin) / max(end - begin, 1)

    def reached(self, step: int) -> bool:
        """Whether the sparsity is the final one at a step and later."""
        return self.total is not None and self._timed.reached(step, self.total)
