"""A density for each tensor: the same, by its shape, or by its outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import apportion
from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import Axes, name_of, register

__all__ = ["ERK", "OWL", "Uniform"]


@register
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every tensor: each has the density 1 - sparsity."""

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        return apportion(units, [1 - sparsity] * len(groups), sparsity)


@register
@dataclass(frozen=True)
class ERK(Allocation):
    """Erdos-Renyi-kernel: the density of a tensor is in proportion to sum(shape) / prod(shape).

    Tensors whose density would exceed 1 stay dense: first the one with the largest, then the others are solved again,
    and so on.

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


@register
@dataclass(frozen=True)
class OWL(Allocation):
    """Outlier-weighed: tensors with more scores far above their mean keep more.

    D is the share of a tensor's scores that are larger than `outlier` times their mean, and its density

        1 - sparsity + 2 spread (D' - mean of D' over all weights),   D' = (D - min D) / (max D - min D)

    so that densities lie within 2 `spread` of each other; they are clipped to [0, 1]. For scores of weights and inputs
    (`scorer=wanda`), which must not be negative.

    Source: Yin et al., Outlier weighed layerwise sparsity (OWL), 2023, arXiv:2310.05175, section 3. There all tensors
    of a transformer block share a density; here each has its own.

    Args:
        outlier: how many times the mean an outlier is.
        spread: half the difference of the largest and the smallest density.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not (self.outlier > 0 and 0 <= self.spread <= 0.5):
            raise ValueError(f"outlier={self.outlier!r} must be positive, spread={self.spread!r} in [0, 0.5]")

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        shares = []
        for index in range(len(groups)):
            scores = units[index]
            scores = scores.masked_fill(scores == torch.finfo(scores.dtype).min, 0).double()  # pruned before
            shares.append(float((scores > self.outlier * scores.mean()).double().mean()))
        low, high = min(shares), max(shares)
        relative = [(share - low) / (high - low) if high > low else 0.0 for share in shares]
        sizes = [group.numel for group in groups]
        mean = sum(r * size for r, size in zip(relative, sizes, strict=True)) / sum(sizes)
        densities = [min(max(1 - sparsity + 2 * self.spread * (r - mean), 0.0), 1.0) for r in relative]
        return apportion(units, densities, sparsity)

    def refusal(self, axes: Axes) -> str | None:
        if axes.scorer.signed:
            return (
                f"allocation=owl compares scores with their mean, and those of scorer={name_of(axes.scorer)} have a "
                "sign: use scorer=wanda or magnitude, or allocation=uniform"
            )
        return None


def _erk(group: Group) -> float:
    """sum(shape) / prod(shape) of a group: over its weights together."""
    shapes = [param.layout.shape_of(param.former) for param, _ in group.members]
    return sum(sum(shape) for shape in shapes) / sum(math.prod(shape) for shape in shapes)
