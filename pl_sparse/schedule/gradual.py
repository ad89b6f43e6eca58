"""Curves from one sparsity to another."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from pl_sparse.core.registry import register
from pl_sparse.schedule.base import Schedule, check_sparsity

__all__ = ["Cosine", "Cubic", "Exponential", "Linear"]


@dataclass(frozen=True, kw_only=True)
class _Gradual(Schedule):
    """A curve from `initial` to `final`.

    Args:
        initial: the sparsity at `begin`, in [0, 1].
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial, "initial")
        if self.initial > self.final:
            raise ValueError(f"initial={self.initial!r} is above final={self.final!r}")

    @abstractmethod
    def progress(self, x: float) -> float:
        """The part of the way from `initial` to `final`, 0 at x = 0 and 1 at x = 1."""

    def curve(self, x: float) -> float:
        if x >= 1:
            return self.final
        return self.initial + (self.final - self.initial) * self.progress(x)


@register
@dataclass(frozen=True, kw_only=True)
class Linear(_Gradual):
    """s(x) = initial + (final - initial) x."""

    def progress(self, x: float) -> float:
        return x


@register
@dataclass(frozen=True, kw_only=True)
class Cubic(_Gradual):
    """s(x) = final + (initial - final) (1 - x)^3: fast while weights are redundant, slow near the end.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.

    >>> [round(Cubic(final=0.9).curve(k / 10), 4) for k in (0, 1, 5, 10)]
    [0.0, 0.2439, 0.7875, 0.9]
    """

    def progress(self, x: float) -> float:
        return 1 - (1 - x) ** 3


@register
@dataclass(frozen=True, kw_only=True)
class Cosine(_Gradual):
    """s(x) = initial + (final - initial) (1 - cos(pi x)) / 2: slow at both ends."""

    def progress(self, x: float) -> float:
        return (1 - math.cos(math.pi * x)) / 2


@register
@dataclass(frozen=True, kw_only=True)
class Exponential(_Gradual):
    """The density falls by the same factor at each update: 1 - s(x) = (1 - initial) ((1 - final) / (1 - initial))^x.

    A final sparsity of 1 has no such factor and is refused.

    >>> round(Exponential(final=0.99).curve(0.5), 3)
    0.9
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final == 1:
            raise ValueError("final=1.0 leaves no density to fall towards: an exponential schedule needs final below 1")

    def progress(self, x: float) -> float:
        if self.final == self.initial:
            return x
        density = (1 - self.initial) * ((1 - self.final) / (1 - self.initial)) ** x
        return (1 - density - self.initial) / (self.final - self.initial)
