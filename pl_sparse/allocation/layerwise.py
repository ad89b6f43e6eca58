"""A density for each tensor: the same, or by its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import apportion
from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import register

__all__ = ["ERK", "Uniform"]


@register
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every tensor."""

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        return apportion(units, [1 - sparsity] * len(groups), sparsity)


@register
@dataclass(frozen=True)
class ERK(Allocation):
    """Erdos-Renyi-kernel: the density of a tensor is in proportion to sum(shape) / prod(shape).

    Tensors whose density would exceed 1 stay dense, the worst first, and the rest is solved again.

    Source: Evci et al., Rigging the lottery, 2020, arXiv:1911.11134, section 3.1.
    """

    def densities(self, groups: Sequence[Group], sparsity: float) -> list[float]:
        """The density of each group."""
        sizes = [group.numel for group in groups]
        raw = [_erk(group) for group in groups]
        budget = (1 - sparsity) * sum(sizes)
        dense: set[int] = set()
        while True:  # what became dense took less than its share of the budget, so that something is always left
            rest = [i for i in range(len(groups)) if i not in dense]
            if budget >= sum(sizes) or not rest:  # 1 - sparsity may be 1 for a sparsity above 0
                return [1.0] * len(groups)
            left = budget - sum(sizes[i] for i in dense)
            eps = left / sum(raw[i] * sizes[i] for i in rest)
            top = max(raw[i] for i in rest)
            if eps * top <= 1:
                return [1.0 if i in dense else eps * raw[i] for i in range(len(groups))]
            dense |= {i for i in rest if raw[i] == top}

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        return apportion(units, self.densities(groups, sparsity), sparsity)


def _erk(group: Group) -> float:
    """sum(shape) / prod(shape) of a group: over its weights together."""
    shapes = [param.layout.shape_of(param.former) for param, _ in group.members]
    return sum(sum(shape) for shape in shapes) / sum(math.prod(shape) for shape in shapes)
