"""One threshold over the scores of all tensors."""

from __future__ import annotations

import math
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
from pl_sparse.core.topk import above, count_each, counted, descending, living, threshold, top_k, within

__all__ = ["LAMP", "Global", "lamp"]

_EVERY = 256


@dataclass(frozen=True)
class _Ranked(Allocation):
    """One threshold over all tensors; none of them is sure to keep more than `Units.least`."""

    @abstractmethod
    def comparable(self, units: Units) -> Sequence[Tensor]:
        """Scores that compare across tensors."""

    def counts(self, units: Units, keep: int) -> list[int]:
        """How many units of each tensor are among the `keep` best, where all are of one size."""
        ranks = self.comparable(units)
        return count_each(threshold(ranks, keep).masks(ranks))

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        leasts = units.leasts(sparsity)
        if len(set(units.weights)) == 1 and not any(leasts):
            return self.counts(units, kept(sparsity, sum(units.sizes)))
        ranks = self.comparable(units)
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
    """One threshold over the scores of all tensors: tensors with lower scores become sparser.

    It can remove a whole tensor; the report shows it.
    """

    def comparable(self, units: Units) -> Sequence[Tensor]:
        return units

    def ranks(self, units: Units) -> Sequence[Tensor]:
        return units


class _Lamp(LazyScores):
    """The LAMP scores of units."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.sizes, self.devices = units.sizes, units.devices

    def at(self, index: int) -> Tensor:
        return lamp(self.units.at(index))


def lamp(scores: Tensor) -> Tensor:
    """The LAMP scores of one tensor of scores, float64: s^2 over the sum of the squares of all that are no smaller.

    Among equal scores the first counts as the larger. Units that are already pruned score 0.

    Args:
        scores: of one tensor, none negative.

    >>> lamp(torch.tensor([0.5, 1.0, 2.0, 3.0])).tolist()
    [0.017543859649122806, 0.07142857142857142, 0.3076923076923077, 1.0]
    """
    flat = scores.reshape(-1).double()
    dead = flat == torch.finfo(scores.dtype).min
    squared = _squares(flat.masked_fill(dead, 0))
    order = squared.sort(descending=True, stable=True).indices
    ranked = squared[order]
    out = torch.zeros_like(squared)
    out[order] = _shares(ranked, ranked.cumsum(0))
    return out.masked_fill_(dead, torch.finfo(torch.float64).min).reshape(scores.shape)


def _lamp_counts(units: Units, keep: int) -> list[int]:
    """How many units of each tensor are among the `keep` of the best LAMP scores; ties go to the earlier tensor.

    In a tensor LAMP scores fall as scores do. Each is sorted once, and one rank in `_EVERY` remembered: that tells
    which of its ranks the threshold may lie between, and only these are looked at again.
    """
    curves = [_Curve(_sizes(units, index)) for index in range(len(units))]
    spare = keep - sum(curve.size for curve in curves)
    if spare >= 0:  # all that is left, and of what is pruned already the first
        counts = []
        for curve, size in zip(curves, units.sizes, strict=True):
            counts.append(curve.size + min(spare, size - curve.size))
            spare -= counts[-1] - curve.size
        return counts
    if not keep:
        return [0] * len(curves)
    known = descending(torch.cat([curve.ranked.cpu() for curve in curves]))
    # p remembered scores above a bound are at most p `_EVERY` scores, and at least that less `_EVERY` for each tensor
    low = -(-keep // _EVERY) + len(curves) - 1
    upper, lower = float(known[(keep - 1) // _EVERY]), float(known[low]) if low < len(known) else float("-inf")
    spans = [curve.span(upper, lower) for curve in curves]
    between = [
        curve.scores(_sizes(units, index), *span).cpu()
        for index, (curve, span) in enumerate(zip(curves, spans, strict=True))
    ]
    sure = [start for start, _ in spans]
    cutoff = threshold(between, keep - sum(sure))
    return [count + int(torch.count_nonzero(mask)) for count, mask in zip(sure, cutoff.masks(between), strict=True)]


def _sizes(units: Units, index: int) -> Tensor:
    """The size of each score of a tensor that is not pruned already, flat."""
    sizes = living(units, index).abs_()
    if math.isnan(float(sizes.sum())):
        return units[index].reshape(-1)  # which refuses NaN by name
    return sizes


class _Curve:
    """The LAMP scores of a tensor by rank, as far as they are remembered.

    Args:
        scores: of the units that are not pruned already, flat and not negative.

    Attributes:
        size: how many there are.
        ranked: the LAMP scores of ranks 0, `_EVERY`, 2 `_EVERY`, ..., float64.
    """

    def __init__(self, scores: Tensor) -> None:
        ranked = descending(scores)
        self.size = len(ranked)
        squared = _squares(ranked)
        self._scores = ranked[::_EVERY].clone()
        some = squared[::_EVERY].clone()
        self._total = squared.cumsum_(0)[::_EVERY].clone()
        self.ranked = _shares(some, self._total)

    def span(self, upper: float, lower: float) -> tuple[int, int]:
        """The first rank and the one after the last of all that may have a LAMP score from `lower` to `upper`."""
        above, reached = int((self.ranked > upper).sum()), int((self.ranked >= lower).sum())
        return max(above - 1, 0) * _EVERY, min(reached * _EVERY, self.size)

    def scores(self, scores: Tensor, start: int, end: int) -> Tensor:
        """The LAMP scores of the ranks from `start` on and before `end`."""
        if start >= end:
            return self.ranked[:0]
        most = self._scores[start // _EVERY]
        least = self._scores[end // _EVERY] if end < self.size else 0.0
        ranked = descending(within(scores, float(least), float(most)))
        first = int(counted(above(scores, float(most))))  # equal ones may lie before `start`
        squared = _squares(ranked[start - first : end - first])
        total = torch.cat([self._total[start // _EVERY].reshape(1), squared[1:]]).cumsum(0)
        return _shares(squared, total)


def _squares(scores: Tensor) -> Tensor:
    squares = scores.to(torch.float64, copy=True).square_()
    return squares.clamp_max_(1e200)  # infinite scores have a rank among others too


def _shares(squared: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, squared / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


@register
@dataclass(frozen=True)
class LAMP(_Ranked):
    """Layer-adaptive magnitude: one threshold over s^2 / (sum of the squares of the scores of its tensor >= s).

    The best unit of each tensor scores 1, so that no tensor is emptied while other units remain. Scores must not be
    negative.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021, arXiv:2010.07611, equation 4.
    """

    def comparable(self, units: Units) -> Sequence[Tensor]:
        return _Lamp(units)

    def counts(self, units: Units, keep: int) -> list[int]:
        if any(device.type != "cpu" for device in units.devices):  # where a sort is soon done
            return super().counts(units, keep)
        return _lamp_counts(units, keep)

    def refusal(self, axes: Axes) -> str | None:
        if axes.scorer.signed:
            return (
                f"allocation=lamp squares the scores, and those of scorer={name_of(axes.scorer)} have a sign: use "
                "allocation=global or uniform"
            )
        return None
