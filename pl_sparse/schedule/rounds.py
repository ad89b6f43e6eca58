"""Sparsities that are reached at once, or in rounds and phases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pl_sparse.core.registry import register
from pl_sparse.schedule.base import Schedule, check_sparsity, rising
from pl_sparse.schedule.time import Time, parse

__all__ = ["Constant", "Cyclic", "Iterative", "OneShot", "RateRounds", "Staircase"]


@register
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The final sparsity from `begin` on; masks are made anew at each `every` until `end`.

    >>> Constant(final=0.9, begin=0, end=1.0, every=50).levels(50, 100)
    (0.9,)
    """

    end: Time = 1.0

    @property
    def one_level(self) -> bool:
        return True

    def curve(self, x: float) -> float:
        return self.final

    @property
    def fractional(self) -> bool:
        # It may go on until training ends, whenever that is.
        value, unit = parse(self.begin, "begin")
        until_the_end = parse(self.end, "end") == (1.0, "fraction")
        spread = not isinstance(self.every, str) and self.every < 1
        return super().fractional if spread or not until_the_end else unit == "fraction" and value > 0

    def reached(self, step: int, total: int) -> bool:
        return step > self.span(total)[0]


@register
@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """The final sparsity at once, at `begin`; in `rounds` rounds with densities (1 - final) ** (k / rounds).

    With begin=1.0 the trained model is pruned, after its last step.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    arXiv:2006.05467, Algorithm 1 (the exponential rounds).

    Args:
        rounds: how many times masks are made, one after another, at the same step.

    >>> [round(1 - level, 3) for level in OneShot(final=0.9, rounds=5).levels(0, 100)]
    [0.631, 0.398, 0.251, 0.158, 0.1]
    """

    one_shot: ClassVar[bool] = True
    end: Time = 1.0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r} must be 1 or more")

    @property
    def one_level(self) -> bool:
        return self.rounds == 1

    @property
    def fractional(self) -> bool:
        value, unit = parse(self.begin, "begin")
        return unit == "fraction" and value > 0  # `end` has no meaning

    def span(self, total: int) -> tuple[int, int]:
        begin = self._at(self.begin, "begin", total)
        if begin > total:
            raise ValueError(f"begin={self.begin!r} is step {begin}, but training has only {total} optimizer steps")
        return begin, begin

    def curve(self, x: float) -> float:
        return self.final

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        if step != self.span(total)[0]:
            return ()
        density = 1 - self.final
        rounds = (1 - density ** (k / self.rounds) for k in range(1, self.rounds))
        return (*rounds, self.final)


@dataclass(frozen=True, kw_only=True)
class RateRounds(Schedule):
    """Rounds that each remove the same part of what remains.

    Args:
        rate: that part, between 0 and 1.
    """

    rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(
                f"rate={self.rate!r} must be between 0 and 1: the part of the remaining weights that each round removes"
            )
        if self.final == 1:
            raise ValueError("final=1.0 is never reached by removing a part of what remains: choose final below 1")

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsity after each round k, min(final, 1 - (1 - rate)^k): as few as reach `final`."""
        if self.final == 0:
            return (0.0,)
        count = math.ceil(round(math.log(1 - self.final) / math.log(1 - self.rate), 9))
        # rounded, so that the third of four rounds is the last of three, to the bit
        return (*(round(1 - (1 - self.rate) ** k, 12) for k in range(1, count)), self.final)

    def share(self, override: float, level: float) -> float:
        """As many rounds, each removing a fixed part of what remains, so that `override` comes with the last one."""
        if override >= 1 or level in (0, self.final):
            return min(level, override) if level == 0 else override
        return 1 - (1 - level) ** (math.log(1 - override) / math.log(1 - self.final))


@register
@dataclass(frozen=True, kw_only=True)
class Iterative(RateRounds):
    """Rounds that each remove the fraction `rate` of what remains, spread evenly from `begin` to `end`.

    After round k the sparsity is min(final, 1 - (1 - rate)^k); the number of rounds is the least that reaches `final`.
    `every` has no meaning here.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626.

    >>> [round(level, 3) for level in Iterative(final=0.5, rate=0.2).rounds]
    [0.2, 0.36, 0.488, 0.5]
    """

    begin: Time = 0.1

    def curve(self, x: float) -> float:
        rounds = self.rounds
        return rounds[min(int(x * (len(rounds) - 1) + 1e-9), len(rounds) - 1)] if len(rounds) > 1 else self.final

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        begin, end = self.span(total)
        rounds = self.rounds
        gaps = max(len(rounds) - 1, 1)
        due = [round(begin + (end - begin) * k / gaps) for k in range(len(rounds))]
        if len(rounds) == 1:
            due = [end]
        return tuple(level for level, at in zip(rounds, due, strict=True) if at == step)


@register
@dataclass(frozen=True, kw_only=True)
class Staircase(Schedule):
    """Rests on each sparsity for an equal share of the time from `begin` to `end`, and on the last one until training
    ends.

    Before each rise, and at the end, the model has been trained at its sparsity, so that one training gives a whole
    front (`callbacks.Front`). `every` has no meaning here.

    Args:
        sparsities: where it rests, rising to `final`; None for `final` alone.

    >>> schedule = Staircase(final=0.9, sparsities=(0.5, 0.8, 0.9), begin=0.25)
    >>> [(step, *schedule.levels(step, 100)) for step in range(100) if schedule.levels(step, 100)]
    [(25, 0.5), (50, 0.8), (75, 0.9)]
    """

    sparsities: tuple[float, ...] | None = None
    end: Time = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsities is not None:
            rising(self.sparsities, self.final)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsities, one after the other."""
        return (self.final,) if self.sparsities is None else tuple(self.sparsities)

    def starts(self, total: int) -> list[int]:
        """The step at which each sparsity is set."""
        begin, end = self._at(self.begin, "begin", total), self._at(self.end, "end", total)
        return [round(begin + (end - begin) * k / len(self.rounds)) for k in range(len(self.rounds))]

    def span(self, total: int) -> tuple[int, int]:
        super().span(total)  # refuses times that do not fit
        starts = self.starts(total)
        if len({*starts, total}) <= len(starts):
            raise ValueError(
                f"{len(starts)} sparsities need a step each between begin={self.begin!r} and end={self.end!r}"
            )
        return starts[0], starts[-1]

    def curve(self, x: float) -> float:
        rounds = self.rounds
        return rounds[min(int(x * (len(rounds) - 1) + 1e-9), len(rounds) - 1)]

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        starts = self.starts(total)
        return (self.rounds[starts.index(step)],) if step in starts else ()


@register
@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    """Sparse and dense phases in turn: `final` at `begin`, `low` half a cycle later, and so on; `final` from `end` on.

    `every` has no meaning here.

    Args:
        cycles: the number of dense phases between `begin` and `end`.
        low: the sparsity of the dense phases.

    Source: Peste et al., AC/DC: Alternating compressed/decompressed training, 2021, arXiv:2106.12379, Algorithm 1.

    >>> schedule = Cyclic(final=0.9, begin=0.0, end=0.8, cycles=2)
    >>> [schedule.levels(step, 100) for step in (0, 20, 40, 60, 80)]
    [(0.9,), (0.0,), (0.9,), (0.0,), (0.9,)]
    """

    falls: ClassVar[bool] = True
    begin: Time = 0.1
    cycles: int = 3
    low: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.low, "low")
        if self.cycles < 1:
            raise ValueError(f"cycles={self.cycles!r} must be 1 or more")
        if self.low > self.final:
            raise ValueError(f"low={self.low!r} is above final={self.final!r}")

    def curve(self, x: float) -> float:
        return self.final if x >= 1 or int(x * 2 * self.cycles) % 2 == 0 else self.low

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        begin, end = self.span(total)
        count = 2 * self.cycles
        phases = [round(begin + (end - begin) * k / count) for k in range(count + 1)]
        if step not in phases:
            return ()
        last = max(k for k, at in enumerate(phases) if at == step)
        return (self.final if last % 2 == 0 else self.low,)
