"""Levels that something else decides on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pl_sparse.core.registry import register
from pl_sparse.schedule.base import Schedule
from pl_sparse.schedule.time import Time

__all__ = ["Decisions", "Paced"]


@dataclass(eq=False)
class Decisions:
    """The decisions made during training: the level due at each step, and whether the last one is reached.

    Args:
        levels: the sparsity by the optimizer step at which it is due.
        done: whether the last level is reached.
    """

    levels: dict[int, float] = field(default_factory=dict)
    done: bool = False


@register
@dataclass(frozen=True, kw_only=True)
class Paced(Schedule):
    """Levels that are decided during training (by `AccuracyBudget`); until then, `final` at `end`.

    `every` has no meaning here.

    Args:
        decisions: the levels decided so far; None: nothing decides.

    >>> Paced(final=0.9, decisions=Decisions({40: 0.2})).levels(40, 100)
    (0.2,)
    """

    falls: ClassVar[bool] = True
    decisions: Decisions | None = None
    end: Time = 1.0

    def curve(self, x: float) -> float:
        return self.final

    def levels(self, step: int, total: int) -> tuple[float, ...]:
        if self.decisions is None:
            return (self.final,) if step == self.span(total)[1] else ()
        return (self.decisions.levels[step],) if step in self.decisions.levels else ()

    def reached(self, step: int, total: int) -> bool:
        return super().reached(step, total) if self.decisions is None else self.decisions.done
