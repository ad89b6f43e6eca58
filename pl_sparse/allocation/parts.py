"""Masks of weights that processes share, chosen without gathering them: histograms of scores travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pl_sparse.allocation.units import LazyScores, Units
from pl_sparse.core.dtensor import is_counted_here, is_held_by_all, part_of
from pl_sparse.core.layouts import Plain
from pl_sparse.core.sharded import ShardedParameter
from pl_sparse.core.topk import Run, Threshold, threshold
from pl_sparse.structure import Unstructured

__all__ = ["Parts"]


class Parts(LazyScores):
    """What this process holds of scores that processes share, where each weight is a unit.

    All processes count their scores into the same histograms, which are summed (`topk.threshold`): some 70 kB per
    threshold, whatever the number of weights. All of them find the same threshold, and each masks its own part. Among
    scores that are equal the first ones of the whole tensors are kept, as one process would keep them.

    Args:
        units: those of weights that `of` accepts.

    Attributes:
        names: of the weights.
        sizes: how many scores of each tensor this process counts: of copies one process counts all, the others none.
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self._params = [group.members[0][0] for group in units.groups]
        self._here = [param.here() if isinstance(param, ShardedParameter) else param for param in self._params]
        self._counts = [is_counted_here(param.weight) for param in self._params]
        self._counting = True
        self.names = [param.name for param in self._params]
        self.devices = units.devices

    @classmethod
    def of(cls, units: Units, indices: Sequence[int]) -> Parts | None:
        """The parts of some groups' units; None where no process shares them, or scores are made of more than single
        weights."""
        groups = [units.groups[index] for index in indices]
        params = [param for group in groups for param, _ in group.members]
        if not any(isinstance(param, ShardedParameter) for param in params):
            return None
        single = type(units.structure) is Unstructured and units.pointwise and len(params) == len(groups)
        if not single or any(group.companions or units.unit_scores(group) is not None for group in groups):
            return None
        fit = all(
            param.cut is None
            and param.norm_dim is None
            and isinstance(param.layout, Plain)
            and (is_held_by_all(param.weight) if isinstance(param, ShardedParameter) else param.is_flat)
            for param in params
        )
        return cls(units.among(indices)) if fit else None

    @property
    def sizes(self) -> list[int]:  # type: ignore[override]
        return [here.mask.numel() if counts else 0 for here, counts in zip(self._here, self._counts, strict=True)]

    def at(self, index: int) -> Tensor:
        here = self._here[index]
        return self._units.score(here.among(slice(0, None if self._counts[index] or not self._counting else 0)))

    def runs(self, index: int, step: int = 1) -> tuple[torch.Size, Iterator[Run]]:
        here = self._here[index]
        seen = self._counts[index] or not self._counting
        return here.shape, self._units.pieces(here, step) if seen else iter(())

    def keep(self, count: int) -> None:
        """Give the weights the masks that keep the best scores of all. All processes call it.

        Args:
            count: how many.

        Raises:
            ValueError: a score is NaN, in any process.
        """
        cut = threshold(self, count, _summed)
        self._counting = False
        for param, here, mask in zip(self._params, self._here, self._masks(cut), strict=True):
            chosen = mask & here.mask if self._units.monotone and param.pruned else mask
            param.set_part(chosen) if isinstance(param, ShardedParameter) else param.set_mask(chosen)

    def _masks(self, cut: Threshold) -> Iterator[Tensor]:
        above, reaching = Threshold(cut.value, 0, 1), Threshold(cut.value, 1, 1)
        if cut.ties == cut.equal:
            yield from reaching.masks(self)
            return
        tied = [
            torch.count_nonzero(reach ^ strict) * counts
            for strict, reach, counts in zip(above.masks(self), reaching.masks(self), self._counts, strict=True)
        ]
        left = cut.ties
        totals: list[int] = _summed(torch.stack([number.to(tied[0].device) for number in tied])).tolist()
        for index, (strict, reach) in enumerate(zip(above.masks(self), reaching.masks(self), strict=True)):
            if 0 < left < totals[index]:
                yield strict | self._first(index, reach ^ strict, left)
            else:
                yield reach if left else strict
            left -= min(left, totals[index])

    def _first(self, index: int, tied: Tensor, count: int) -> Tensor:
        """Those of the tied scores of a tensor that are its first `count`, in the order of the whole tensor."""
        param = self._params[index]
        places = torch.arange(param.numel, device=tied.device).view(param.shape)
        places = part_of(places, param.weight)
        low, high = 0, param.numel - 1  # the place of the last of them
        while low < high:
            middle = (low + high) // 2
            before = torch.count_nonzero(tied & (places <= middle)) * self._counts[index]
            low, high = (low, middle) if int(_summed(before)) >= count else (middle + 1, high)
        return tied & (places <= low)


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    from torch.distributed import all_reduce

    all_reduce(tensor)
    return tensor
