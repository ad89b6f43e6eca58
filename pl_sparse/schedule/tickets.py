"""The rounds of lottery tickets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pl_sparse.core.registry import register
from pl_sparse.schedule.base import rising
from pl_sparse.schedule.rounds import RateRounds
from pl_sparse.schedule.time import Time

__all__ = ["Tickets"]


@register
@dataclass(frozen=True, kw_only=True)
class Tickets(RateRounds):
    """Rounds of equal length: dense first, then one for each sparsity, which is reached before its round begins.

    With a `Rewind` callback this is the search for lottery tickets. `begin`, `end` and `every` have no meaning here.

    Args:
        rate: the part of the remaining weights that each round removes, until `final`.
        sparsities: instead of `rate`: the sparsity of each round, rising to `final`.
        to: the point that weights are rewound to, as a fraction of the first round; 0 is the initialization. Each later
            round starts there, and is shorter by that fraction.
        epochs: the length of a round, counted from the initialization; None divides the training equally among the
            rounds. If it is given, the length of training is `Trainer(max_epochs=schedule.training_epochs)`.

    Sources: Frankle, Carbin, The lottery ticket hypothesis, 2018, arXiv:1803.03635, section 1 (iterative pruning).
    Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, 2019, arXiv:1912.05671, Algorithm 2
    (`to`).

    >>> schedule = Tickets(final=0.5, rate=0.2)
    >>> [round(level, 3) for level in schedule.rounds], schedule.starts(1000)
    ([0.2, 0.36, 0.488, 0.5], [200, 400, 600, 800])
    """

    movable: ClassVar[bool] = False
    sparsities: tuple[float, ...] | None = None
    to: float = 0.0
    epochs: int | None = None
    end: Time = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.to < 1:
            raise ValueError(f"to={self.to!r} must be in [0, 1): the part of a round that is not trained again")
        if self.epochs is not None and (self.epochs < 1 or not (self.epochs * self.to).is_integer()):
            raise ValueError(f"epochs={self.epochs!r} must be 1 or more, and to={self.to!r} of them a whole number")
        if self.sparsities is not None:
            rising(self.sparsities, self.final)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsity of each round after the dense one."""
        if self.sparsities is not None:
            return tuple(self.sparsities)
        return super().rounds

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
                f"{len(starts) + 1} rounds do not fit into {total} optimizer steps: train longer, or remove more per "
                "round"
            )
        return starts[0], starts[-1]

    def curve(self, x: float) -> float:
        return self.rounds[min(int(x * len(self.rounds)), len(self.rounds) - 1)]

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        starts = self.starts(total)
        return (self.rounds[starts.index(step)],) if step in starts else ()
