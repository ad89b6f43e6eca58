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
    same way. Units differ in size: one is moved only while that brings the total nearer to the target.

    Every tensor keeps at least one unit while `sparsity` < 1, and no more than `units.limits`.

    Args:
        units: whose units are shared out; their scores are not looked at.
        densities: of each tensor, in [0, 1].
        sparsity: of all of them together.
    """
    floor = 1 if sparsity < 1 else 0
    limits = units.limits
    ideal = [density * size for density, size in zip(densities, units.sizes, strict=True)]
    counts = [
        min(max(math.floor(share + 1e-6), min(floor, size)), limit)
        for share, size, limit in zip(ideal, units.sizes, limits, strict=True)
    ]
    total = sum(size * weight for size, weight in zip(units.sizes, units.weights, strict=True))
    left = kept(sparsity, total) - sum(count * weight for count, weight in zip(counts, units.weights, strict=True))
    while True:  # each pass moves one unit
        sign = 1 if left > 0 else -1
        able = [
            i
            for i, weight in enumerate(units.weights)
            if 2 * abs(left) >= weight + (sign < 0) and floor <= counts[i] + sign <= limits[i]
        ]
        if not left or not able:
            return counts
        i = max(able, key=lambda i: (sign * (ideal[i] - counts[i]), -i))
        counts[i] += sign
        left -= sign * units.weights[i]
