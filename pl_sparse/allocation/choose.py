"""How many units each tensor keeps, and the one place where the axes meet: pool -> allocation -> select -> expand.

The rounding rule, everywhere: of N weights at sparsity s the masks keep floor((1 - s) N + 1/2) weights, or the nearest
number that whole units allow. Uniform and ERK share that total among the tensors by largest remainder, so that it is
met to the unit, and leave every tensor at least one unit while s < 1. Ties go to the unit that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import kept
from pl_sparse.allocation.parts import Parts
from pl_sparse.allocation.units import Units
from pl_sparse.core.topk import threshold
from pl_sparse.structure import Structure

__all__ = ["choose", "refuse_unreachable"]


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
    counts = {i: max(units.least(i, s), kept(s, units.sizes[i])) for i, s in enumerate(levels) if s is not None}
    if free and units.structure.fixed is not None:
        counts |= {i: kept(level, units.sizes[i]) for i in free}
    elif free:
        ranks = allocation.ranks(shared)
        free_choice = type(units.structure).select is Structure.select  # no pattern within a tensor, such as rows
        if ranks is not None and free_choice and len(set(shared.weights)) == 1 and not any(shared.leasts(level)):
            # Units of one size: one threshold over all of them is the rule, and no counts are needed.
            keep = kept(level, sum(shared.sizes))
            if ranks is shared and (parts := Parts.of(units, free)) is not None:
                parts.keep(keep)
            else:
                for i, chosen in zip(free, threshold(ranks, keep).masks(ranks), strict=True):
                    units.assign(i, chosen)
        else:
            counts |= dict(zip(free, allocation.keep(shared.groups, shared, level), strict=True))
    for i, count in sorted(counts.items()):
        if (parts := Parts.of(units, [i])) is not None:
            parts.keep(count)
        elif units.runs(i) is None:
            units.assign(i, units.structure.select(units[i], count))
        else:
            alone = units.among([i])
            units.assign(i, next(threshold(alone, count).masks(alone)))


def refuse_unreachable(units: Units, level: float, overrides: Sequence[float | None]) -> None:
    """Raise a ValueError if weights must keep more than a sparsity leaves: by their pattern, or as norms divide them.

    Args:
        units: of all groups; their scores are not looked at.
        level: the final sparsity of all groups without an override.
        overrides: for each group its own final sparsity, or None.
    """
    if (fixed := units.structure.fixed) is not None:
        for group, override in zip(units.groups, overrides, strict=True):
            if override is not None and override > fixed + 1e-9:
                raise ValueError(
                    f"overrides: a sparsity of {override:g} for {group.name} is above {fixed:g}, which "
                    f"structure={units.structure.label} has for all weights"
                )
        return
    sizes = [size * weight for size, weight in zip(units.sizes, units.weights, strict=True)]
    leasts = [least * weight for least, weight in zip(units.leasts(1.0), units.weights, strict=True)]
    free = [i for i, override in enumerate(overrides) if override is None]
    shares = [(free, level), *(([i], s) for i, s in enumerate(overrides) if s is not None)]
    for indices, sparsity in shares:
        least, size = sum(leasts[i] for i in indices), sum(sizes[i] for i in indices)
        if (left := kept(sparsity, size)) < least:
            names = ", ".join(units.groups[i].name for i in indices if leasts[i])
            reason = (
                "there is no network with fewer (a router chooses so many experts of each layer)"
                if any(units.groups[i].least for i in indices)
                else "each of their parts is divided by its norm, and 0 / 0 is not a number"
            )
            raise ValueError(
                f"a sparsity of {sparsity:g} keeps {left} of {size} weights, but {names} must keep {least}: {reason}. "
                "Ask for a sparsity of "
                f"{math.floor((1 - least / size) * 1e4) / 1e4:g} or less, or exclude them"
            )
