"""How many units each tensor keeps, and the one place where the axes meet: pool -> allocation -> select -> expand.

The rounding rule, everywhere: of N weights at sparsity s the masks keep floor((1 - s) N + 1/2) weights, or the nearest
number that whole units allow. Uniform and ERK share that total among the tensors by largest remainder, so that it is
met to the unit, and leave every tensor at least one unit while s < 1. Ties go to the unit that comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import kept
from pl_sparse.allocation.units import Units
from pl_sparse.core.topk import threshold

__all__ = ["choose"]


def choose(units: Units, allocation: Allocation, level: float, overrides: Sequence[float | None] | None = None) -> None:
    """Give every weight the mask that keeps the best units at the sparsity `level`.

    Args:
        units: the scores.
        allocation: how many units each tensor keeps; an n:m pattern prescribes that itself.
        level: the sparsity of all groups without an override, in [0, 1].
        overrides: for each group its own sparsity, or None.

    Raises:
        ValueError: a score is NaN, which a diverged model has.
    """
    levels = list(overrides) if overrides is not None else [None] * len(units)
    free = [i for i, override in enumerate(levels) if override is None]  # these share the level
    shared = units.among(free) if len(free) < len(units) else units
    counts = {i: units.least(i, s, kept(s, units.sizes[i])) for i, s in enumerate(levels) if s is not None}
    if free and units.structure.fixed is not None:
        counts |= {i: kept(level, units.sizes[i]) for i in free}
    elif free:
        ranks = allocation.ranks(shared)
        if ranks is not None and len(set(shared.weights)) == 1 and not units.structure.least:
            # Units of one size: one threshold over all of them is the rule, and no counts are needed.
            cutoff = threshold(ranks, kept(level, sum(shared.sizes)))
            for i, chosen in zip(free, cutoff.masks(ranks), strict=True):
                units.assign(i, chosen)
        else:
            counts |= dict(zip(free, allocation.keep(shared.groups, shared, level), strict=True))
    for i, count in sorted(counts.items()):
        units.assign(i, units.structure.select(units[i], count))
