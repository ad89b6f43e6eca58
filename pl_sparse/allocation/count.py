"""How many units are kept: rounding, and shares of an exact total."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pl_sparse.allocation.units import Units

__all__ = ["apportion", "kept"]


def kept(sparsity: float, count: int) -> int:
    """How many of `count` are kept at a sparsity: the nearest whole number, halves up.

    >>> kept(0.9, 1000), kept(0.5, 5), kept(1.0, 7)
    (100, 3, 0)
    """
    return math.floor((1 - sparsity) * count + 0.5 + 1e-6)


def apportion(units: Units, densities: Sequence[float], sparsity: float) -> list[int]:
    """Whole units for each tensor, as near its density as the exact total allows (largest remainder).

    Counts start at the rounded-down shares. The weights that are left over then go, a unit at a time, to the tensor
    whose count is furthest below its share; where the guaranteed units are too many already, they are taken back the
    same way. Units differ in size: none is moved that is larger than what is left over, but for a last one that brings
    the total nearer to the target. No tensor ends below its rounded-down share.

    Every tensor keeps at least one unit while `sparsity` < 1, what `units.least` says, and no more than `units.limits`.

    Args:
        units: whose units are shared out; their scores are not looked at.
        densities: of each tensor, in [0, 1].
        sparsity: of all of them together.
    """
    floors = units.leasts(sparsity, at_least=1)
    limits = units.limits
    ideal = [density * size for density, size in zip(densities, units.sizes, strict=True)]
    counts = [
        min(max(math.floor(share + 1e-6), floor), limit)
        for share, floor, limit in zip(ideal, floors, limits, strict=True)
    ]
    total = sum(size * weight for size, weight in zip(units.sizes, units.weights, strict=True))
    left = kept(sparsity, total) - sum(count * weight for count, weight in zip(counts, units.weights, strict=True))
    while left:  # each pass moves one unit
        sign = 1 if left > 0 else -1
        movable = [i for i in range(len(counts)) if floors[i] <= counts[i] + sign <= limits[i]]
        fitting = [i for i in movable if units.weights[i] <= abs(left)]
        # Where none fits, one more is moved if that ends nearer to the total, halves up.
        nearer = [i for i in movable if 2 * abs(left) >= units.weights[i] + (sign < 0)]
        if not (fitting or nearer):
            break
        i = max(fitting or nearer, key=lambda i: (sign * (ideal[i] - counts[i]), -i))
        counts[i] += sign
        left -= sign * units.weights[i]
        if not fitting:
            break
    return counts
