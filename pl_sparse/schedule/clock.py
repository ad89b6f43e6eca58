"""A schedule in a training: its times as optimizer steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pl_sparse.schedule.base import Schedule

__all__ = ["Clock"]


@dataclass
class Clock:
    """The levels of a schedule in a training whose length is known.

    Args:
        schedule: as it was given.

    Attributes:
        total: optimizer steps of the whole training, as they are estimated by now; None until `fit`.
        per_epoch: optimizer steps of an epoch, as they are estimated by now.
        span: the steps of the first and the last level.

    >>> from pl_sparse.schedule import Linear
    >>> clock = Clock(Linear(final=0.8, begin=0.0, end=0.5, every=1))
    >>> clock.fit(8)
    >>> [clock.levels(step) for step in (0, 2, 4, 6)]
    [(0.0,), (0.4,), (0.8,), ()]
    """

    schedule: Schedule
    total: int | None = None
    per_epoch: int | None = None
    span: tuple[int, int] = (0, 0)
    _planned: tuple[int, int | None] | None = None  # the estimates before training
    _timed: Schedule = field(init=False)  # with epochs turned into steps
    _moves: bool = field(init=False)  # whether a time depends on the length of training or of an epoch
    _interval: int = field(init=False, default=1)  # steps from one level to the next, where they are that regular

    def __post_init__(self) -> None:
        self._timed = self.schedule
        # asked for at each step
        self._moves = self.schedule.movable and (self.schedule.fractional or self.schedule.in_epochs)

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
                    "length is not known: set max_epochs or max_steps (for a loader without a length, max_steps), or "
                    "give the times in steps or epochs"
                )
            total = sys.maxsize
        self._set(int(total), steps_per_epoch)
        self._planned = int(total), steps_per_epoch

    def _set(self, total: int, per_epoch: int | None) -> None:
        timed = self.schedule.resolved(per_epoch)
        span = timed.span(total)
        self._timed, self.total, self.per_epoch, self.span = timed, total, per_epoch, span
        regular = type(timed).levels is Schedule.levels
        self._interval = timed.interval(*span) if regular else 1

    def follow(self, step: int, progress: float | None, epochs: float | None) -> bool:
        """Estimate the length of training and of an epoch anew, where the steps taken are not those that were expected.

        A difference below two steps, or one in a hundred, is none: accumulation is uneven at the end of an epoch.

        Args:
            step: optimizer steps taken.
            progress: the part of training that is behind, in [0, 1]; None: not known.
            epochs: how many epochs are behind, with the part of the one that is going on; None: not known.

        Returns:
            Whether the times of the schedule have moved.
        """
        if self.total is None or step == 0 or step > self.span[1] or not self._moves:
            return False
        total, per_epoch = self.total, self.per_epoch
        tolerance = max(2.0, step / 100)
        if progress and abs(total * progress - step) >= tolerance:
            total = max(round(step / progress), step + (progress < 1))
        if epochs and per_epoch is not None and abs(per_epoch * epochs - step) >= tolerance:
            per_epoch = max(round(step / epochs), 1)
        if (total, per_epoch) == (self.total, self.per_epoch):
            return False
        return self._moved(total, per_epoch)

    def _moved(self, total: int, per_epoch: int | None) -> bool:
        try:
            self._set(total, per_epoch)
        except ValueError:  # too short for this schedule: the earlier times stay, and the end makes up for them
            return False
        return True

    def estimates(self) -> dict[str, list[int | None]] | None:
        """What `restore` takes; None where nothing had to be estimated anew."""
        if self.total is None or self._planned is None or (self.total, self.per_epoch) == self._planned:
            return None
        return {"planned": list(self._planned), "now": [self.total, self.per_epoch]}

    def restore(self, estimates: Mapping[str, Any]) -> bool:
        """Take up the estimates of an interrupted training, if it was planned as this one; whether they move times."""
        if self._planned is None or list(self._planned) != list(estimates["planned"]):
            return False
        return self._moved(*estimates["now"])

    def missed(self, since: int, step: int, level: float) -> tuple[float, ...]:
        """The last levels that were due before a step, by the newest estimates; () where they are met.

        Args:
            since: the step of the last update.
            level: the one that is met.
        """
        begin, end = self.span
        for at in range(min(end, step - 1), begin - 1, -1):
            if levels := self.levels(at):
                met = levels[-1] == level if self.schedule.falls else levels[-1] <= level
                return () if met and at <= since else levels
        return ()

    @property
    def last(self) -> tuple[float, ...]:
        """The levels at the end of the schedule."""
        return self.levels(self.span[1])

    def levels(self, step: int) -> tuple[float, ...]:
        """The sparsities due at a step, one after the other; () when none is."""
        begin, end = self.span
        if self.total is None or not begin <= step <= end or (step != end and (step - begin) % self._interval):
            return ()
        return self._timed.levels(step, self.total)

    def progress(self, step: int) -> float:
        """The part of the schedule that is behind at a step, in [0, 1]."""
        begin, end = self.span
        return min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)

    def reached(self, step: int) -> bool:
        """Whether the sparsity is the final one at a step and later."""
        return self.total is not None and self._timed.reached(step, self.total)
