"""One threshold over the scores of all tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import kept
from pl_sparse.allocation.units import LazyScores, Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import Axes, name_of, register
from pl_sparse.core.topk import top_k

__all__ = ["LAMP", "Global", "lamp"]


@dataclass(frozen=True)
class _Ranked(Allocation):
    """One threshold over all tensors; none of them is sure to keep more than `Units.least`."""

    @abstractmethod
    def ranks(self, units: Units) -> Sequence[Tensor]:
        """Scores that compare across tensors."""

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        ranks = self.ranks(units)
        leasts = units.leasts(sparsity)
        scores = [_raised(ranks[i].reshape(-1), leasts[i]) for i in range(len(groups))]
        device = scores[0].device
        owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(units.sizes)).to(device)  # (units,)
        order = torch.cat([score.to(device) for score in scores]).sort(descending=True, stable=True).indices
        owner = owner[order]  # the group of each unit, the best unit first
        taken = torch.tensor(units.weights, device=device)[owner].cumsum(0)  # weights kept with so many units
        target = kept(sparsity, int(taken[-1]))
        # Units differ in size: the last one is taken if that comes nearer to the target than leaving it.
        count = int(torch.searchsorted(taken, target, right=True))
        before = int(taken[count - 1]) if count else 0
        if count < len(taken) and int(taken[count]) - target <= target - before and before < target:
            count += 1
        counts: list[int] = torch.bincount(owner[:count], minlength=len(groups)).tolist()
        return [max(count, min(least, limit)) for count, least, limit in zip(counts, leasts, units.limits, strict=True)]


def _raised(scores: Tensor, count: int) -> Tensor:
    """The scores with the best `count` of them above all others anywhere."""
    return scores.masked_fill(top_k(scores, count), torch.finfo(scores.dtype).max) if count else scores


@register
@dataclass(frozen=True)
class Global(_Ranked):
    """One threshold over the scores of all tensors: those of little importance give most.

    It can remove a tensor whole, which the report says.
    """

    def ranks(self, units: Units) -> Sequence[Tensor]:
        return units


class _Lamp(LazyScores):
    """The LAMP scores of units."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.sizes = units.sizes

    def at(self, index: int) -> Tensor:
        return lamp(self.units.at(index))


def lamp(scores: Tensor) -> Tensor:
    """The LAMP scores of one tensor of scores, float64: s^2 over the sum of the squares of all that are no smaller.

    Among equal scores the first counts as the larger. Units that are already pruned score 0.

    >>> lamp(torch.tensor([0.5, 1.0, 2.0, 3.0])).tolist()
    [0.017543859649122806, 0.07142857142857142, 0.3076923076923077, 1.0]
    """
    flat = scores.reshape(-1).double()
    dead = flat == torch.finfo(scores.dtype).min
    squared = flat.masked_fill(dead, 0).square().clamp_max(1e200)  # infinite scores have a rank among others too
    order = squared.sort(descending=True, stable=True).indices
    ranked = squared[order]
    total = ranked.cumsum(0)
    out = torch.zeros_like(squared)
    out[order] = torch.where(total > 0, ranked / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return out.masked_fill_(dead, torch.finfo(torch.float64).min).reshape(scores.shape)


@register
@dataclass(frozen=True)
class LAMP(_Ranked):
    """Layer-adaptive magnitude: one threshold over s^2 / (sum of the squares of the scores of its tensor >= s).

    The best unit of each tensor scores 1, so that none dies while anything is left to remove elsewhere. Scores must
    not be negative.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021, arXiv:2010.07611, equation 4.
    """

    def ranks(self, units: Units) -> Sequence[Tensor]:
        return _Lamp(units)

    def refusal(self, axes: Axes) -> str | None:
        if axes.scorer.signed:
            return (
                f"allocation=lamp squares the scores, and those of scorer={name_of(axes.scorer)} have a sign: use "
                "allocation=global or uniform"
            )
        return None
