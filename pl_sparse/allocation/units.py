"""The pooled scores of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from pl_sparse.core.group import Group, size_of
from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.structure import Structure

__all__ = ["Units"]


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
