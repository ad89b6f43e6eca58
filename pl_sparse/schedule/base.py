"""When to prune, and how sparse: a curve from dense to the final sparsity, read at optimizer steps.

Times (`begin`, `end`) are fractions of training (a number from 0 to 1), optimizer steps (a whole number above 1, or
"500 steps") or epochs ("2 epochs"). `every` is a fraction of the time from `begin` to `end` (a number below 1), a count
of optimizer steps (1 or more), or "1 epoch". The argument `step` is the number of optimizer steps already taken; in a
training of `total` steps the last one is `total - 1`. The level due at `end` is always set, even if `end` is not a
multiple of `every`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import ClassVar, TypeVar

from pl_sparse.core.registry import Axes, Axis
from pl_sparse.schedule.time import Time, parse

__all__ = ["Schedule"]

S = TypeVar("S", bound="Schedule")


def check_sparsity(value: float, what: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(
            f"{what}={value!r} must be a fraction of the weights removed, in [0, 1] (0.9 keeps one in ten)"
        )


def rising(sparsities: tuple[float, ...], final: float) -> None:
    if any(a >= b for a, b in pairwise([0.0, *sparsities])) or not sparsities or sparsities[-1] != final:
        raise ValueError(f"sparsities={list(sparsities)} must rise from above 0 to final={final}")


@dataclass(frozen=True, kw_only=True)
class Schedule(Axis, ABC):
    """The sparsity to reach at each optimizer step.

    Args:
        final: the sparsity at `end`, in [0, 1].
        begin: when pruning starts; dense before (warm-up).
        end: when `final` is reached.
        every: the interval between two updates of the masks: a fraction of the time from `begin` to `end` (a number
            below 1), optimizer steps (1 or more), or "1 epoch".

    Attributes:
        one_shot: whether masks are made once.
        falls: whether a level may be below an earlier one.
        movable: whether its times move where training turns out longer or shorter than estimated.
    """

    axis: ClassVar[str] = "schedule"
    one_shot: ClassVar[bool] = False
    falls: ClassVar[bool] = False
    movable: ClassVar[bool] = True
    final: float
    begin: Time = 0.0
    end: Time = 0.75
    every: float | str = 0.05

    def __post_init__(self) -> None:
        check_sparsity(self.final, "final")
        begin, begin_unit = parse(self.begin, "begin")
        end, end_unit = parse(self.end, "end")
        if begin_unit == end_unit and end < begin:
            raise ValueError(f"the schedule ends before it begins: begin={self.begin!r}, end={self.end!r}")
        if isinstance(self.every, str):
            parse(self.every, "every")
        elif not (0 < self.every < 1 or (self.every >= 1 and self.every == int(self.every))):
            raise ValueError(
                f"every={self.every!r} must be a fraction of the schedule's time above 0, or a whole number of "
                "optimizer steps, 1 or more"
            )

    def resolved(self: S, steps_per_epoch: int | None) -> S:
        """The same schedule with epochs turned into steps.

        Raises:
            ValueError: a time is in epochs and `steps_per_epoch` is not known.
        """
        changes: dict[str, float | str] = {}
        for what in ("begin", "end", "every"):
            value, unit = parse(getattr(self, what), what)
            if unit == "epochs":
                if steps_per_epoch is None:
                    raise ValueError(
                        f"{what}={getattr(self, what)!r} is in epochs, but their length is not known: give steps"
                    )
                changes[what] = _steps(round(value * steps_per_epoch), what)
            elif what == "every" and unit == "steps":
                changes[what] = int(value)  # "500 steps"
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    @property
    def one_level(self) -> bool:
        """Whether it has one sparsity that never changes, however often masks are made."""
        return False

    @property
    def fractional(self) -> bool:
        """Whether a time other than 0 is a fraction of training, whose length must then be known."""
        times = (parse(self.begin, "begin"), parse(self.end, "end"))
        return any(unit == "fraction" and value > 0 for value, unit in times)

    @property
    def in_epochs(self) -> bool:
        """Whether a time is in epochs, whose length must then be known."""
        times = (("begin", self.begin), ("end", self.end), ("every", self.every))
        return any(isinstance(time, str) and parse(time, what)[1] == "epochs" for what, time in times)

    def span(self, total: int) -> tuple[int, int]:
        """The steps of the first and the last level in a training of `total` optimizer steps.

        Raises:
            ValueError: the schedule does not fit into the training.
        """
        begin, end = self._at(self.begin, "begin", total), self._at(self.end, "end", total)
        if begin > total - 1:
            raise ValueError(f"begin={self.begin!r} is step {begin}, but training has only {total} optimizer steps")
        if end > total:
            raise ValueError(
                f"end={self.end!r} is step {end}, but training has only {total} optimizer steps: the final sparsity "
                f"{self.final} would never be reached"
            )
        end = min(end, total - 1)
        if end < begin:
            raise ValueError(
                f"the schedule ends before it begins: begin={self.begin!r} is step {begin}, "
                f"end={self.end!r} is step {end}"
            )
        return begin, end

    def share(self, override: float, level: float) -> float:
        """The sparsity of a tensor whose final sparsity is `override`, when the others are at `level`: in
        proportion."""
        return min(override * level / self.final, 1.0) if self.final else override

    @staticmethod
    def _at(time: Time, what: str, total: int) -> int:
        value, unit = parse(time, what)
        if unit == "epochs":
            raise ValueError(f"{what}={time!r} is in epochs: call resolved(steps_per_epoch) first")
        return round(value * total) if unit == "fraction" else int(value)

    def interval(self, begin: int, end: int) -> int:
        """Optimizer steps between two updates, for a schedule from step `begin` to step `end`."""
        every = float(self.every)  # epochs are steps by now
        return max(round(every * (end - begin)), 1) if every < 1 else int(every)

    def refusal(self, axes: Axes) -> str | None:
        if axes.ablation in ("shuffle", "reinit") and not self.one_shot:
            return f"ablation={axes.ablation} is done once, when the masks are made: use schedule=oneshot"
        return None

    @abstractmethod
    def curve(self, x: float) -> float:
        """The sparsity at x, the part of the way from `begin` to `end`, in [0, 1]."""

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        """The sparsities due at this step, () when none is; several are reached one after the other (rounds)."""
        begin, end = self.span(total)
        if step != end and (step < begin or step > end or (step - begin) % self.interval(begin, end)):
            return ()
        return (self.curve((step - begin) / (end - begin) if end > begin else 1.0),)

    def reached(self, step: int, total: int) -> bool:
        """Whether the last level is passed: at `step` and later the sparsity is the final one."""
        return step > self.span(total)[1]


def _steps(value: int, what: str) -> float | str:
    return max(value, 1) if what == "every" else f"{value} steps"
