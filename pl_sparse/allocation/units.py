"""The pooled scores of groups."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter, where_kept
from pl_sparse.core.sharded import ShardedParameter
from pl_sparse.core.topk import SORTED, Run, count_each, run_length
from pl_sparse.structure import Structure, Unstructured, living

__all__ = ["LazyScores", "Units", "refuse_nan"]


class LazyScores(Sequence[Tensor]):
    """Tensors of scores that are computed anew at each access, so that they are never all in memory.

    Attributes:
        sizes: how many scores each tensor has, known without computing them.
        devices: where each is, likewise.
    """

    sizes: list[int]
    devices: list[torch.device]

    @abstractmethod
    def at(self, index: int) -> Tensor:
        """The scores of one tensor."""

    def runs(self, index: int, step: int = 1) -> tuple[torch.Size, Iterator[Run]] | None:
        """The shape of one tensor, and each `step`-th of its scores piece by piece; None: they are made at once."""
        return None

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        return self.at(index)


class Units(LazyScores):
    """The scores of every group's units, in the shape that the structure pools them to.

    The score of a unit that spans several weights of a group (the projections of an attention head) is the mean over
    all of its weights.

    Args:
        groups: what is pruned.
        structure: how scores are pooled.
        score: the scores of one weight, of its shape; higher = keep.
        monotone: whether what is pruned stays so: pruned units then rank below all others.
        unit_scores: the scores of a group's units where they do not come from its weights one by one, else None.
        unfed: by the name of a weight, which of its inputs nothing feeds any more; None: as the masks of the groups
            have it.
        pointwise: whether `score` makes the score of a weight of what belongs to it alone.

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
        unit_scores: Callable[[Group], Tensor | None] = lambda group: None,
        unfed: Mapping[str, Tensor] | None = None,
        pointwise: bool = False,
    ) -> None:
        self.groups = groups
        self.structure = structure
        self.score = score
        self.monotone = monotone
        self.unit_scores = unit_scores
        self.sizes = [structure.pool(torch.empty(group.shape, device="meta")).numel() for group in groups]
        self.devices = [group.members[0][0].device for group in groups]
        self.weights = [group.numel // size for group, size in zip(groups, self.sizes, strict=True)]
        self.unfed = self._unfed() if unfed is None else unfed
        self.pointwise = pointwise
        self._checked: set[int] = set()  # groups whose scores hold no NaN; scores are computed anew at each access

    def at(self, index: int) -> Tensor:
        group = self.groups[index]
        units = self._scores(group)
        if id(group) not in self._checked:
            self._check(group, units)
        if self.monotone and group.pruned:  # below all others, but finite: LAMP squares scores
            units = where_kept(units, self.alive(index))
        return units

    def _scores(self, group: Group) -> Tensor:
        """The scores of a group's units, pruned ones too."""
        units = self.unit_scores(group)
        return self._mean(group) if units is None else units

    def _check(self, group: Group, units: Tensor) -> None:
        """Refuse NaN in the scores of a group; on another device than the CPU in those of all groups at once, so that
        the host waits once."""
        due = [(group, units.sum())]  # not finite where a score is NaN
        for other, device in zip(self.groups, self.devices, strict=True):
            if (
                device.type != "cpu"
                and device == units.device
                and other is not group
                and id(other) not in self._checked
            ):
                due.append((other, self._scores(other).sum()))
        totals = torch.stack([total.float() for _, total in due]).tolist()
        for (other, _), total in zip(due, totals, strict=True):
            if not math.isfinite(total):
                refuse_nan(other.name, self._scores(other))
            self._checked.add(id(other))

    def runs(self, index: int, step: int = 1) -> tuple[torch.Size, Iterator[Run]] | None:
        group = self.groups[index]
        param, _ = group.members[0]
        alone = len(group.members) == 1 and isinstance(self.structure, Unstructured) and param.name not in self.unfed
        if not (alone and self.pointwise and param.is_flat) or self.unit_scores(group) is not None:
            return None
        if self.devices[index].type != "cpu" and param.numel <= SORTED:
            return None
        return param.shape, self.pieces(param, step)

    def pieces(self, param: MaskedParameter, step: int = 1) -> Iterator[Run]:
        """Each `step`-th score of a weight whose elements are units, piece by piece; of an empty one an empty piece."""
        run = run_length(param.mask) * step
        for start in range(0, max(param.numel, 1), run):
            some = param.among(slice(start, start + run, step))
            yield self.score(some), some.mask if self.monotone and param.pruned else None

    def _mean(self, group: Group) -> Tensor:
        """The mean over the weights of each unit: members weigh as many as they have in it."""
        if len(group.members) == 1:
            return self._pooled(*group.members[0])
        units = torch.zeros(())
        for param, layout in group.members:
            pooled = self._pooled(param, layout)
            units = units.to(pooled.device) + pooled * (layout.shape_of(param.former).numel() / group.numel)
        return units

    def _pooled(self, param: MaskedParameter, layout: Layout) -> Tensor:
        """The scores of a weight, pooled; what was removed from it scores 0, and so does what reads nothing."""
        scores = param.fill(self.score(param))  # in the shape before a removal, so that units keep their places
        unfed = self.unfed.get(param.name)
        if unfed is not None:
            seen = param.layout.view(scores)  # (out, in, *kernel)
            columns = unfed.reshape(1, -1, *(1,) * (seen.dim() - 2))
            scores = param.layout.restore(seen.masked_fill(columns, 0), scores.shape)
        return layout.pooled(scores, self.structure.pool)

    def _unfed(self) -> dict[str, Tensor]:
        """By the name of a weight, which of its inputs take in a pruned unit, (in,)."""
        inputs: dict[str, Tensor] = {}
        for index, group in enumerate(self.groups):
            if not group.consumers or not group.pruned:
                continue
            dead = ~self.alive(index).reshape(-1)  # (units,)
            for param, units in group.consumers:  # units: (in,), -1 where an input comes from elsewhere
                units = units.to(dead.device)
                gone = (units >= 0) & dead[units.clamp_min(0)]
                inputs[param.name] = inputs[param.name] | gone if param.name in inputs else gone
        return inputs

    def alive(self, index: int) -> Tensor:
        """Which units of a group have a weight left, a bool tensor of the units' shape."""
        alive: Tensor | None = None
        for param, layout in self.groups[index].members:
            mask = layout.pooled(param.fill(param.mask), self.structure.alive)
            alive = mask if alive is None else alive | mask
        assert alive is not None
        return alive

    def assign(self, index: int, chosen: Tensor) -> None:
        """Give the weights of a group, and their companions, the mask that keeps the chosen units."""
        group = self.groups[index]
        among = self.alive(index) if self.monotone and group.pruned else None
        if among is not None:  # a pattern may ask for more than is left
            chosen = chosen & among
        for param, layout in group.members:
            chosen = living(chosen, self.structure, param, layout, among)
        for param, layout in (*group.members, *group.companions):
            mask = self.structure.expand(chosen, layout.shape_of(param.former))
            param.set_mask(param.take(layout.write(param.fill(param.mask), mask)))

    @property
    def limits(self) -> list[int]:
        """How many units of each group can be kept."""
        if not self.monotone:
            return self.sizes
        pruned = [index for index, group in enumerate(self.groups) if group.pruned]
        counted = [index for index in pruned if not self._is_shared(index)]  # of the others the masks are not gathered
        left = dict(zip(counted, count_each(self.alive(index) for index in counted), strict=True))
        left |= {index: self.groups[index].members[0][0].kept for index in pruned if index not in left}
        return [left.get(index, size) for index, size in enumerate(self.sizes)]

    def _is_shared(self, index: int) -> bool:
        """Whether processes share the one weight of a group, each element of which is a unit."""
        members = self.groups[index].members
        return len(members) == 1 and isinstance(members[0][0], ShardedParameter) and self.weights[index] == 1

    def least(self, index: int, sparsity: float, at_least: int = 0) -> int:
        """How many units of a group are kept whatever they score.

        That is what the structure keeps below a sparsity of 1, what the group keeps at any, and one of each slice that
        is divided by its norm.

        Args:
            at_least: what else is kept of each group below a sparsity of 1.
        """
        size = self.sizes[index]
        kept = min(max(self.structure.least, at_least), size) if sparsity < 1 else 0
        slices = max(param.normalized_slices for param, _ in self.groups[index].members)
        return max(kept, self.groups[index].least, slices if self.weights[index] == 1 else min(slices, 1))

    def leasts(self, sparsity: float, at_least: int = 0) -> list[int]:
        """`least` of each group."""
        return [self.least(index, sparsity, at_least) for index in range(len(self))]

    def among(self, indices: Sequence[int]) -> Units:
        """The units of some of the groups."""
        groups = [self.groups[i] for i in indices]
        units = Units(groups, self.structure, self.score, self.monotone, self.unit_scores, self.unfed, self.pointwise)
        units._checked = self._checked
        return units


def refuse_nan(name: str, scores: Tensor) -> None:
    """Raise a ValueError that names the weight if a score is NaN, which no order of scores has a place for."""
    if bool(scores.isnan().any()):
        raise ValueError(
            f"the scores of {name} hold NaN: weights or gradients diverged before they were pruned. Lower the learning "
            "rate, or clip gradients"
        )
