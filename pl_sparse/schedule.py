"""When to prune, and how sparse: a curve from dense to the final sparsity, read at optimizer steps.

Times (`begin`, `end`) are fractions of training (a number from 0 to 1), optimizer steps (a whole number above 1, or
"500 steps") or epochs ("2 epochs"). `every` is a count of optimizer steps, or "1 epoch". The step a schedule is asked
about is the number of optimizer steps already taken; the last one of a training of `total` steps is `total - 1`.
A level due at `end` always happens, also where `end` is no multiple of `every`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias, TypeVar

S = TypeVar("S", bound="Schedule")

Time: TypeAlias = "float | int | str"
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)\s*")


def _parse(time: Time, what: str) -> tuple[float, str]:
    """A time as (number, unit); the units are "fraction", "steps" and "epochs"."""
    if isinstance(time, str):
        match = _TIME.fullmatch(time)
        if not match:
            raise ValueError(f"{what}={time!r} is no time: write a fraction such as 0.1, '500 steps' or '2 epochs'")
        return float(match[1]), "epochs" if match[2].startswith("epoch") else "steps"
    if isinstance(time, bool) or not math.isfinite(time) or time < 0:
        raise ValueError(f"{what}={time!r} must not be negative: a fraction of training in [0, 1] or optimizer steps")
    if time <= 1:
        return float(time), "fraction"
    if time != int(time):
        raise ValueError(f"{what}={time!r}: a fraction of training is at most 1, and optimizer steps are whole")
    return float(time), "steps"


def step_of(time: Time, what: str, total: float, steps_per_epoch: int | None) -> int:
    """The optimizer step of a time in a training of `total` steps (infinity: not known).

    Raises:
        ValueError: it is no time, or a part of a length that is not known; `what` is its name in the message.
    """
    value, unit = _parse(time, what)
    if unit == "steps" or value == 0:
        return int(value)
    length = steps_per_epoch if unit == "epochs" else total
    if length is None or length == float("inf"):
        raise ValueError(
            f"{what}={time!r} is a part of training or of an epoch, whose length is not known: give it in steps, or "
            "set max_epochs or max_steps"
        )
    return round(value * length)


def _sparsity(value: float, what: str) -> None:
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(
            f"{what}={value!r} must be a fraction of the weights removed, in [0, 1] (0.9 keeps one in ten)"
        )


def _rising(sparsities: tuple[float, ...], final: float) -> None:
    if any(a >= b for a, b in pairwise([0.0, *sparsities])) or not sparsities or sparsities[-1] != final:
        raise ValueError(f"sparsities={list(sparsities)} must rise from above 0 to final={final}")


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The sparsity to reach at each optimizer step.

    Args:
        final: the sparsity at `end`, in [0, 1].
        begin: when pruning starts; dense before (warm-up).
        end: when `final` is reached.
        every: optimizer steps between two updates of the masks.
    """

    final: float
    begin: Time = 0.0
    end: Time = 0.75
    every: int | str = 100

    def __post_init__(self) -> None:
        _sparsity(self.final, "final")
        begin, begin_unit = _parse(self.begin, "begin")
        end, end_unit = _parse(self.end, "end")
        if begin_unit == end_unit and end < begin:
            raise ValueError(f"the schedule ends before it begins: begin={self.begin!r}, end={self.end!r}")
        if isinstance(self.every, str):
            _parse(self.every, "every")
        elif self.every < 1 or self.every != int(self.every):
            raise ValueError(f"every={self.every!r} must be a whole number of optimizer steps, 1 or more")

    def resolved(self: S, steps_per_epoch: int | None) -> S:
        """The same schedule with epochs turned into steps.

        Raises:
            ValueError: a time is in epochs and `steps_per_epoch` is not known.
        """
        changes: dict[str, int | str] = {}
        for what in ("begin", "end", "every"):
            value, unit = _parse(getattr(self, what), what)
            if unit == "epochs":
                if steps_per_epoch is None:
                    raise ValueError(
                        f"{what}={getattr(self, what)!r} is in epochs, but their length is not known: give steps"
                    )
                changes[what] = _steps(round(value * steps_per_epoch), what)
            elif what == "every" and unit == "steps":
                changes[what] = int(value)
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    @property
    def fractional(self) -> bool:
        """Whether a time other than 0 is a fraction of training, whose length must then be known."""
        times = (_parse(self.begin, "begin"), _parse(self.end, "end"))
        return any(unit == "fraction" and value > 0 for value, unit in times)

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

    def share(self, own: float, level: float) -> float:
        """The sparsity of a tensor whose own final one is `own`, when the others are at `level`: in proportion."""
        return min(own * level / self.final, 1.0) if self.final else own

    @staticmethod
    def _at(time: Time, what: str, total: int) -> int:
        value, unit = _parse(time, what)
        if unit == "epochs":
            raise ValueError(f"{what}={time!r} is in epochs: call resolved(steps_per_epoch) first")
        return round(value * total) if unit == "fraction" else int(value)

    @abstractmethod
    def curve(self, x: float) -> float:
        """The sparsity at x, the part of the way from `begin` to `end`, in [0, 1]."""

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        """The sparsities due at this step, () when none is; several are reached one after the other (rounds)."""
        begin, end = self.span(total)
        if step != end and (step < begin or step > end or (step - begin) % int(self.every)):
            return ()
        return (self.curve((step - begin) / (end - begin) if end > begin else 1.0),)

    def reached(self, step: int, total: int) -> bool:
        """Whether the last level is behind: at `step` and later the sparsity is the final one."""
        return step > self.span(total)[1]


def _steps(value: int, what: str) -> int | str:
    return max(value, 1) if what == "every" else f"{value} steps"


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The final sparsity from `begin` on, the masks made anew every `every` steps until `end`.

    >>> Constant(final=0.9, begin=0, end=1.0, every=50).levels(50, 100)
    (0.9,)
    """

    end: Time = 1.0

    def curve(self, x: float) -> float:
        return self.final

    def reached(self, step: int, total: int) -> bool:
        return step > self.span(total)[0]


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """The final sparsity at once, at `begin`; in `rounds` rounds with densities (1 - final) ** (k / rounds).

    With begin=1.0 the trained model is pruned, after its last step.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    arXiv:2006.05467, Algorithm 1 (the exponential rounds).

    >>> [round(1 - level, 3) for level in OneShot(final=0.9, rounds=5).levels(0, 100)]
    [0.631, 0.398, 0.251, 0.158, 0.1]
    """

    end: Time = 1.0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r} must be 1 or more")

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
class _Gradual(Schedule):
    """A curve from `initial` to `final`.

    Args:
        initial: the sparsity at `begin`, in [0, 1].
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _sparsity(self.initial, "initial")
        if self.initial > self.final:
            raise ValueError(f"initial={self.initial!r} is above final={self.final!r}")

    @abstractmethod
    def progress(self, x: float) -> float:
        """The part of the way from `initial` to `final`, 0 at x = 0 and 1 at x = 1."""

    def curve(self, x: float) -> float:
        if x >= 1:
            return self.final
        return self.initial + (self.final - self.initial) * self.progress(x)


@dataclass(frozen=True, kw_only=True)
class Linear(_Gradual):
    """s(x) = initial + (final - initial) x."""

    def progress(self, x: float) -> float:
        return x


@dataclass(frozen=True, kw_only=True)
class Cubic(_Gradual):
    """s(x) = final + (initial - final) (1 - x)^3: fast while weights are redundant, slow near the end.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.

    >>> [round(Cubic(final=0.9).curve(k / 10), 4) for k in (0, 1, 5, 10)]
    [0.0, 0.2439, 0.7875, 0.9]
    """

    def progress(self, x: float) -> float:
        return 1 - (1 - x) ** 3


@dataclass(frozen=True, kw_only=True)
class Cosine(_Gradual):
    """s(x) = initial + (final - initial) (1 - cos(pi x)) / 2: slow at both ends."""

    def progress(self, x: float) -> float:
        return (1 - math.cos(math.pi * x)) / 2


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


@dataclass(frozen=True, kw_only=True)
class Iterative(Schedule):
    """Rounds that each remove the fraction `rate` of what remains, spread evenly from `begin` to `end`.

    After round k the sparsity is min(final, 1 - (1 - rate)^k); the number of rounds is the least that reaches `final`.
    `every` has no meaning here.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626.

    >>> [round(level, 3) for level in Iterative(final=0.5, rate=0.2).rounds]
    [0.2, 0.36, 0.488, 0.5]
    """

    rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(
                f"rate={self.rate!r} must be between 0 and 1: the part of the remaining weights removed a round"
            )
        if self.final == 1:
            raise ValueError("final=1.0 is never reached by removing a part of what remains: choose final below 1")

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsity after each round."""
        if self.final == 0:
            return (0.0,)
        count = math.ceil(round(math.log(1 - self.final) / math.log(1 - self.rate), 9))
        # rounded, so that the third of four rounds is the last of three, to the bit
        return (*(round(1 - (1 - self.rate) ** k, 12) for k in range(1, count)), self.final)

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

    def share(self, own: float, level: float) -> float:
        """As many rounds, each removing a fixed part of what remains, so that `own` comes with the last one."""
        if own >= 1 or level in (0, self.final):
            return min(level, own) if level == 0 else own
        return 1 - (1 - level) ** (math.log(1 - own) / math.log(1 - self.final))


@dataclass(frozen=True, kw_only=True)
class Tickets(Schedule):
    """Rounds of equal length: dense first, then one for each sparsity, which is reached before its round begins.

    With a `Rewind` callback this is the search for lottery tickets. `begin`, `end` and `every` have no meaning here.

    Args:
        rate: the part of the remaining weights that each round removes, until `final`.
        sparsities: instead of `rate`: the sparsity of each round, rising to `final`.
        to: where in its round training starts again, as a fraction of the round: rewinding to a later point than the
            initialization makes all rounds but the first so much shorter.
        epochs: how long a round is, counted from the initialization; None shares the training among the rounds. With
            it training has `training_epochs`: Trainer(max_epochs=schedule.training_epochs).

    Sources: Frankle, Carbin, The lottery ticket hypothesis, 2018, arXiv:1803.03635, section 1 (iterative pruning).
    Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, 2019, arXiv:1912.05671, Algorithm 2
    (`to`).

    >>> schedule = Tickets(final=0.5, rate=0.2)
    >>> [round(level, 3) for level in schedule.rounds], schedule.starts(1000)
    ([0.2, 0.36, 0.488, 0.5], [200, 400, 600, 800])
    """

    rate: float = 0.2
    sparsities: tuple[float, ...] | None = None
    to: float = 0.0
    epochs: int | None = None
    end: Time = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(
                f"rate={self.rate!r} must be between 0 and 1: the part of the remaining weights removed a round"
            )
        if self.final == 1:
            raise ValueError("final=1.0 is never reached by removing a part of what remains: choose final below 1")
        if not 0 <= self.to < 1:
            raise ValueError(f"to={self.to!r} must be in [0, 1): the part of a round that is not trained again")
        if self.epochs is not None and (self.epochs < 1 or not (self.epochs * self.to).is_integer()):
            raise ValueError(f"epochs={self.epochs!r} must be 1 or more, and to={self.to!r} of them a whole number")
        if self.sparsities is not None:
            _rising(self.sparsities, self.final)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsity of each round after the dense one."""
        if self.sparsities is not None:
            return tuple(self.sparsities)
        return Iterative(final=self.final, rate=self.rate).rounds

    @property
    def training_epochs(self) -> int | None:
        """Epochs of all rounds together, where `epochs` is given."""
        if self.epochs is None:
            return None
        return self.epochs + len(self.rounds) * (self.epochs - round(self.epochs * self.to))

    def length(self, total: int) -> float:
        """Optimizer steps of a round, counted from the initialization."""
        return total / (1 + len(self.rounds) * (1 - self.to))

    def starts(self, total: int) -> list[int]:
        """The step at which each round after the dense one begins."""
        length = self.length(total)
        return [round(length * (1 + k * (1 - self.to))) for k in range(len(self.rounds))]

    def span(self, total: int) -> tuple[int, int]:
        starts = self.starts(total)
        if len({0, *starts}) <= len(starts):
            raise ValueError(
                f"{len(starts) + 1} rounds do not fit into {total} optimizer steps: train longer, or remove more a "
                "round"
            )
        return starts[0], starts[-1]

    def curve(self, x: float) -> float:
        return self.rounds[min(int(x * len(self.rounds)), len(self.rounds) - 1)]

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        starts = self.starts(total)
        return (self.rounds[starts.index(step)],) if step in starts else ()

    def share(self, own: float, level: float) -> float:
        """As many rounds, each removing a fixed part of what remains, so that `own` comes with the last one."""
        if own >= 1 or level in (0, self.final):
            return min(level, own) if level == 0 else own
        return 1 - (1 - level) ** (math.log(1 - own) / math.log(1 - self.final))


@dataclass(frozen=True, kw_only=True)
class Staircase(Schedule):
    """Rests on each sparsity for an equal share of the time from `begin` to `end`, and on the last one until training
    ends.

    Before each step of the stairs, and at the end, the model has been trained at its sparsity, so that one training
    gives a whole front (`callbacks.Front`). `every` has no meaning here.

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
            _rising(self.sparsities, self.final)

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
                f"{len(starts)} sparsities have no step each between begin={self.begin!r} and {self.end!r}"
            )
        return starts[0], starts[-1]

    def curve(self, x: float) -> float:
        rounds = self.rounds
        return rounds[min(int(x * (len(rounds) - 1) + 1e-9), len(rounds) - 1)]

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        starts = self.starts(total)
        return (self.rounds[starts.index(step)],) if step in starts else ()


@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    """Sparse and dense phases in turn: `final` at `begin`, `low` half a cycle later, ..., `final` for good at `end`.

    `every` has no meaning here.

    Args:
        cycles: how many times the model is opened again between `begin` and `end`.
        low: the sparsity of the dense phases.

    Source: Peste et al., AC/DC: Alternating compressed/decompressed training, 2021, arXiv:2106.12379, Algorithm 1.

    >>> schedule = Cyclic(final=0.9, begin=0.0, end=0.8, cycles=2)
    >>> [schedule.levels(step, 100) for step in (0, 20, 40, 60, 80)]
    [(0.9,), (0.0,), (0.9,), (0.0,), (0.9,)]
    """

    cycles: int = 3
    low: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _sparsity(self.low, "low")
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


@dataclass(eq=False)
class Plan:
    """What is decided while training: the level due at each step, and whether the last one is reached."""

    levels: dict[int, float] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True, kw_only=True)
class Paced(Schedule):
    """Levels that something else decides on while training goes on (`AccuracyBudget`); until it does, `final` at `end`.

    `every` has no meaning here.

    Args:
        plan: where the decisions are; None: nothing decides.

    >>> Paced(final=0.9, plan=Plan({40: 0.2})).levels(40, 100)
    (0.2,)
    """

    plan: Plan | None = None
    end: Time = 1.0

    def curve(self, x: float) -> float:
        return self.final

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        if self.plan is None:
            return (self.final,) if step == self.span(total)[1] else ()
        return (self.plan.levels[step],) if step in self.plan.levels else ()

    def reached(self, step: int, total: int) -> bool:
        return super().reached(step, total) if self.plan is None else self.plan.done
