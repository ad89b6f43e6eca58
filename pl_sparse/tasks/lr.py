"""Learning-rate schedules with warm-up: a factor on the optimizer's learning rate at each optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ConstantLR", "CosineLR", "LRSchedule", "LinearLR", "RewindingLR", "StepLR"]


@dataclass(frozen=True, kw_only=True)
class LRSchedule(ABC):
    """The factor on the learning rate.

    Args:
        warmup: the part of training, in [0, 1), in which the factor rises linearly to its curve.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r} must be a fraction of training in [0, 1)")

    def factor(self, step: int, total: int) -> float:
        """The factor at `step` of `total` optimizer steps.

        >>> [round(CosineLR(warmup=0.2).factor(step, 10), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        first = round(self.warmup * total)
        if step < first:
            return (step + 1) / first
        return self.curve(min((step - first) / max(total - first, 1), 1.0))

    @abstractmethod
    def curve(self, x: float) -> float:
        """The factor at x, the part behind of the way from the end of the warm-up to the end of training, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ConstantLR(LRSchedule):
    """The optimizer's own learning rate."""

    def curve(self, x: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class CosineLR(LRSchedule):
    """Half a cosine from 1 to `final`.

    Source: Loshchilov and Hutter, SGDR, 2016, arXiv:1608.03983, equation 5.

    Args:
        final: the factor at the end of training.
    """

    final: float = 0.0

    def curve(self, x: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * x)) / 2


@dataclass(frozen=True, kw_only=True)
class LinearLR(LRSchedule):
    """A line from 1 to `final`.

    Args:
        final: the factor at the end of training.
    """

    final: float = 0.0

    def curve(self, x: float) -> float:
        return 1 + (self.final - 1) * x


@dataclass(frozen=True, kw_only=True)
class RewindingLR(LRSchedule):
    """A line from 1 to `final`, repeated `cycles` times.

    Source: Kurtic, Alistarh, GMP*: well-tuned gradual magnitude pruning can outperform most BERT-pruning methods, 2022,
    arXiv:2210.06384.

    Args:
        cycles: the number of lines.
        final: the factor at the end of each line.

    >>> [round(RewindingLR(cycles=2, final=0.0).curve(x), 3) for x in (0, 0.25, 0.5, 0.75, 1)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    cycles: int = 10
    final: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1:
            raise ValueError(f"cycles={self.cycles!r} must be 1 or more")

    def curve(self, x: float) -> float:
        return 1 + (self.final - 1) * (x * self.cycles % 1 if x < 1 else 1.0)


@dataclass(frozen=True, kw_only=True)
class StepLR(LRSchedule):
    """A factor `gamma` at each of `milestones`, fractions of what follows the warm-up.

    Args:
        milestones: fractions of the time after the warm-up, in [0, 1].
        gamma: the factor on the learning rate at each milestone.
    """

    milestones: Sequence[float] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma!r} must be above 0: nothing is trained otherwise")
        if any(not 0 <= milestone <= 1 for milestone in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be fractions of training in [0, 1]")

    def curve(self, x: float) -> float:
        return self.gamma ** sum(x >= milestone for milestone in self.milestones)
