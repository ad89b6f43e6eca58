"""How many units each tensor keeps, and the one place where the axes meet: pool -> allocation -> select -> expand.

The rounding rule, everywhere: of N weights at sparsity s the masks keep floor((1 - s) N + 1/2) weights, or the nearest
number that whole units allow. Uniform and ERK share that total among the tensors by largest remainder, so that it is
met to the unit, and leave every tensor at least one unit while s < 1. Ties go to the unit that comes first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from pl_sparse.masked import Group, Layout, MaskedParameter, size_of
from pl_sparse.structure import Structure
from pl_sparse.topk import threshold, top_k


def kept(sparsity: float, count: int) -> int:
    """How many of `count` are kept at a sparsity: the nearest whole number, halves up.

    >>> kept(0.9, 1000), kept(0.5, 5), kept(1.0, 7)
    (100, 3, 0)
    """
    return math.floor((1 - sparsity) * count + 0.5 + 1e-6)


class Units(Sequence[Tensor]):
    """The pooled scores of every group, computed anew at each access so that they are never all in memory.

    The score of a unit that spans several weights of a group (the projections of an attention head) is the mean
    over all of its weights.

    Args:
        groups: what is pruned.
        structure: how scores are pooled.
        score: the scores of one weight, of its shape; higher = keep.
        monotone: whether what is pruned stays so: pruned units then rank below all others.

    Attributes:
        sizes: units in each group.
        weights: weights in a unit of each group.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        structure: Structure,
        score: Callable[[MaskedParameter], Tensor],
        monotone: bool = False,
        unfed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.structure = structure
        self.score = score
        self.monotone = monotone
        self.sizes = [structure.pool(torch.empty(group.shape, device="meta")).numel() for group in groups]
        self.weights = [group.numel // size for group, size in zip(groups, self.sizes, strict=True)]
        self.unfed = self._unfed() if unfed is None else unfed

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group = self.groups[index]
        if len(group.members) == 1:
            units = self._pooled(*group.members[0])
        else:
            units = torch.zeros(())
            for param, layout in group.members:
                pooled = self._pooled(param, layout)
                units = units.to(pooled.device) + pooled * (size_of(param, layout).numel() / group.numel)
        if self.monotone and any(param.pruned for param, _ in group.members):
            units = torch.where(self.alive(index), units, torch.finfo(units.dtype).min)
        return units

    def _pooled(self, param: MaskedParameter, layout: Layout) -> Tensor:
        scores = param.fill(self.score(param))
        unfed = self.unfed.get(param.name)
        if unfed is not None:
            seen = param.layout.view(scores)
            scores = param.layout.restore(seen.masked_fill(_columns(unfed, seen), 0), scores.shape)
        return self.structure.pool(layout.view(scores))

    def _unfed(self) -> dict[str, Tensor]:
        """By the name of a weight, which of its inputs nothing feeds any more."""
        found: dict[str, Tensor] = {}
        for index, group in enumerate(self.groups):
            if not group.feeds or not any(param.pruned for param, _ in group.members):
                continue
            dead = ~self.alive(index).reshape(-1)
            for param, units in group.feeds:
                units = units.to(dead.device)
                gone = (units >= 0) & dead[units.clamp_min(0)]
                found[param.name] = found[param.name] | gone if param.name in found else gone
        return found

    def alive(self, index: int) -> Tensor:
        """Which units of a group have a weight left, a bool tensor of the units' shape."""
        alive: Tensor | None = None
        for param, layout in self.groups[index].members:
            mask = layout.view(param.fill(param.mask))
            if self.weights[index] > 1:
                mask = self.structure.pool(mask.to(param.weight.dtype)) > 0
            else:
                mask = self.structure.pool(mask)
            alive = mask if alive is None else alive | mask
        assert alive is not None
        return alive

    def assign(self, index: int, chosen: Tensor) -> None:
        """Give the weights of a group, and what follows them, the mask that keeps the chosen units."""
        group = self.groups[index]
        for param, layout in (*group.members, *group.followers):
            mask = self.structure.expand(chosen, size_of(param, layout))
            param.set_mask(param.take(layout.write(param.fill(param.mask), mask)))

    @property
    def limits(self) -> list[int]:
        """How many units of each group can be kept."""
        if not self.monotone:
            return self.sizes
        return [
            int(self.alive(index).sum()) if any(param.pruned for param, _ in group.members) else size
            for index, (group, size) in enumerate(zip(self.groups, self.sizes, strict=True))
        ]

    def among(self, indices: Sequence[int]) -> Units:
        """The units of some of the groups."""
        return Units([self.groups[i] for i in indices], self.structure, self.score, self.monotone, self.unfed)


def _columns(unfed: Tensor, weight: Tensor) -> Tensor:
    """A bool over inputs as one that broadcasts over (out, in, *kernel)."""
    return unfed.reshape(1, -1, *(1,) * (weight.dim() - 2))


def apportion(units: Units, densities: Sequence[float], sparsity: float) -> list[int]:
    """Whole units for each tensor, as near its density as the exact total allows (largest remainder).

    Every tensor keeps at least one unit while `sparsity` < 1, and no more than `units.limits`.
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
    while True:  # each pass moves one unit, first where the count is furthest from its share
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


@dataclass(frozen=True)
class Allocation(ABC):
    """How the kept units are shared among the tensors."""

    @abstractmethod
    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        """How many units each group keeps, so that the fraction `sparsity` of all their weights is removed."""

    def ranks(self, units: Units) -> Sequence[Tensor] | None:
        """Scores that compare across tensors, where one threshold over all of them is the whole rule; else None."""
        return None

    def start(self, groups: Sequence[Group], model: nn.Module, example: Any) -> None:
        """Look at the model before training; by default nothing is done.

        Args:
            example: inputs that it can be called with, where the structure needs them, else None.
        """
        return


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every tensor."""

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        return apportion(units, [1 - sparsity] * len(groups), sparsity)


@dataclass(frozen=True)
class _Ranked(Allocation):
    """One threshold over all tensors; none of them is sure to keep more than `structure.least`."""

    @abstractmethod
    def ranks(self, units: Units) -> Sequence[Tensor]:
        """Scores that compare across tensors."""

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        ranks = self.ranks(units)
        least = units.structure.least if sparsity < 1 else 0
        scores = [_raised(ranks[i].reshape(-1), least) for i in range(len(groups))]
        device = scores[0].device
        owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(units.sizes)).to(device)
        order = torch.cat([score.to(device) for score in scores]).sort(descending=True, stable=True).indices
        owner = owner[order]
        taken = torch.tensor(units.weights, device=device)[owner].cumsum(0)
        target = kept(sparsity, int(taken[-1]))
        count = int(torch.searchsorted(taken, target, right=True))
        before = int(taken[count - 1]) if count else 0
        if count < len(taken) and int(taken[count]) - target <= target - before and before < target:
            count += 1
        counts: list[int] = torch.bincount(owner[:count], minlength=len(groups)).tolist()
        return [max(count, min(least, limit)) for count, limit in zip(counts, units.limits, strict=True)]


def _raised(scores: Tensor, count: int) -> Tensor:
    """The scores with the best `count` of them above all others anywhere."""
    return scores.masked_fill(top_k(scores, count), torch.finfo(scores.dtype).max) if count else scores


@dataclass(frozen=True)
class Global(_Ranked):
    """One threshold over the scores of all tensors: those of little importance give most.

    It can remove a tensor whole, which the report says.
    """

    def ranks(self, units: Units) -> Sequence[Tensor]:
        return units


class _Lamp(Sequence[Tensor]):
    """The LAMP scores of units, computed anew at each access."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.sizes = units.sizes

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        units = self.units[index]
        return lamp(units)


def lamp(scores: Tensor) -> Tensor:
    """The LAMP scores of one tensor of scores, float64: s^2 over the sum of the squares of all that are no smaller.

    Among equal scores the first counts as the larger. Units that are already pruned score 0.

    >>> lamp(torch.tensor([0.5, 1.0, 2.0, 3.0])).tolist()
    [0.017543859649122806, 0.07142857142857142, 0.3076923076923077, 1.0]
    """
    flat = scores.reshape(-1).double()
    dead = flat == torch.finfo(scores.dtype).min
    squared = flat.masked_fill(dead, 0).square()
    order = squared.sort(descending=True, stable=True).indices
    ranked = squared[order]
    total = ranked.cumsum(0)
    out = torch.zeros_like(squared)
    out[order] = torch.where(total > 0, ranked / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return out.masked_fill_(dead, torch.finfo(torch.float64).min).reshape(scores.shape)


@dataclass(frozen=True)
class LAMP(_Ranked):
    """Layer-adaptive magnitude: one threshold over s^2 / (sum of the squares of the scores of its tensor >= s).

    The best unit of each tensor scores 1, so that none dies while anything is left to remove elsewhere. Scores must
    not be negative.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021, arXiv:2010.07611, equation 4.
    """

    def ranks(self, units: Units) -> Sequence[Tensor]:
        return _Lamp(units)


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
        if sparsity <= 0:
            return [1.0] * len(groups)
        dense: set[int] = set()
        while True:  # what became dense took less than its share of the budget, so that something is always left
            rest = [i for i in range(len(groups)) if i not in dense]
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
    shapes = [param.layout.view(torch.empty(param.former, device="meta")).shape for param, _ in group.members]
    return sum(sum(shape) for shape in shapes) / sum(math.prod(shape) for shape in shapes)


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
    own = list(overrides) if overrides is not None else [None] * len(units)
    free = [i for i, sparsity in enumerate(own) if sparsity is None]
    shared = units.among(free) if len(free) < len(units) else units
    counts = {i: kept(sparsity, units.sizes[i]) for i, sparsity in enumerate(own) if sparsity is not None}
    if free and units.structure.fixed is not None:
        counts |= {i: kept(level, units.sizes[i]) for i in free}
    elif free:
        ranks = allocation.ranks(shared)
        try:
            if ranks is not None and len(set(shared.weights)) == 1 and not units.structure.least:
                found = threshold(ranks, kept(level, sum(shared.sizes)))
                for i, chosen in zip(free, found.masks(ranks), strict=True):
                    units.assign(i, chosen)
            else:
                counts |= dict(zip(free, allocation.keep(shared.groups, shared, level), strict=True))
        except ValueError as error:
            raise _named(units, error) from None
    for i, count in sorted(counts.items()):
        try:
            units.assign(i, units.structure.select(units[i], count))
        except ValueError as error:
            raise _named(units, error) from None


def _named(units: Units, error: ValueError) -> ValueError:
    """The error with the name of the weight whose scores are NaN."""
    if "NaN" not in str(error):
        return error
    bad = [group.name for i, group in enumerate(units.groups) if bool(units[i].isnan().any())]
    return ValueError(
        f"the scores of {', '.join(bad[:5])} hold NaN: weights or gradients diverged before they were pruned. "
        "Lower the learning rate, or clip gradients"
    )
