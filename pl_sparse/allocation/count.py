"""How many units are kept: rounding, and shares of an exact total."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from pl_sparse.allocation.units import Units

__all__ = ["apportion", "kept"]


def kept(sparsity: float, count: int) -> int:
    """How many of `count` are kept at a sparsity: the nearest whole number, halves up.

    Args:
        sparsity: the fraction that is removed, in [0, 1].
        count: the number of weights or units.

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
    _move(counts, ideal, units.weights, floors, limits, left)
    return counts


def _move(
    counts: list[int],
    ideal: Sequence[float],
    weights: Sequence[int],
    floors: Sequence[int],
    limits: Sequence[int],
    left: int,
) -> None:
    """Add the weights that are left over (or take back, where that is negative) as `apportion` says, in place.

    A unit after the other would go where most is lacking. While the largest unit fits, all do: until then what is moved
    is all that lacks more than a bound, which is found by bisection, and the order plays no part.
    """
    sign, left = (1, left) if left > 0 else (-1, -left)
    room = [
        max(limit - count if sign > 0 else count - floor, 0)
        for count, floor, limit in zip(counts, floors, limits, strict=True)
    ]

    def lack(i: int, moved: int = 0) -> float:
        return sign * (ideal[i] - (counts[i] + sign * moved))

    def moves(i: int, bound: float) -> int:
        """How many units of a tensor lack more than the bound."""
        moved = min(max(math.ceil(lack(i) - bound), 0), room[i])
        while moved < room[i] and lack(i, moved) > bound:
            moved += 1
        while moved and lack(i, moved - 1) <= bound:
            moved -= 1
        return moved

    def move(i: int, moved: int = 1) -> None:
        nonlocal left
        counts[i] += sign * moved
        room[i] -= moved
        left -= moved * weights[i]

    while fitting := [i for i, space in enumerate(room) if space and weights[i] <= left]:
        largest = max(weights[i] for i in fitting)
        top = max(map(lack, fitting))

        def moved(depth: int, top: float = top, fitting: Sequence[int] = fitting) -> int:
            return sum(moves(i, top - depth) * weights[i] for i in fitting)

        depths = range(math.ceil(top - min(lack(i, room[i]) for i in fitting)) + 2)
        bound = top - (bisect_right(depths, left - largest, key=moved) - 1)
        whole = [(i, moves(i, bound)) for i in fitting]
        single = sorted((-lack(i, m), i) for i, first in whole for m in range(first, moves(i, bound - 1)))
        for i, count in whole:
            move(i, count)
        for _, i in single:  # about one of each tensor
            if left >= largest:
                move(i)
    # Where none fits, one more is moved if that ends nearer to the total, halves up.
    nearer = [i for i, space in enumerate(room) if space and 2 * left >= weights[i] + (sign < 0)]
    if left and nearer:
        move(max(nearer, key=lambda i: (lack(i), -i)))
