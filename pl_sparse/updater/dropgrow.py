"""Dynamic sparse training: drop and grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation, Units, choose
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter, where_kept
from pl_sparse.core.registry import register
from pl_sparse.scorer import Momentum, Random, Scorer
from pl_sparse.structure import Structure
from pl_sparse.updater.base import Update, Updater

__all__ = ["DropGrow", "GraNet"]


@register
@dataclass(frozen=True)
class DropGrow(Updater):
    """Dynamic sparse training: in each tensor drop what scores lowest, and grow as many where nothing is.

    The first masks are random, as dense as the allocation says. Each update then drops floor(f n) of the n kept units
    of a tensor and grows as many of those not kept, the ones just dropped among them. Grown weights start at zero,
    with the optimizer's memory of them at zero; what is dropped and grown at once keeps both. f decays from `fraction`
    over the schedule. With `structure=row` both go by rows, so that each output keeps as many inputs as before: the
    constant fan-in of SRigL, whose removal of whole neurons is not here. f over the schedule:

        cosine: f = fraction / 2 (1 + cos(pi x)),   linear: f = fraction (1 - x),   constant: f = fraction

    Sources: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science, 2018, arXiv:1707.04780 (SET: random growth). Evci et al., Rigging the lottery: making all
    tickets winners, 2020, arXiv:1911.11134, Algorithm 1 (RigL: growth by the gradient; an update replaces the step).
    Dettmers, Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840, Algorithm 1 (sparse momentum: growth
    by momentum, `redistribute`). Lasby et al., Dynamic sparse training with structured sparsity, 2023,
    arXiv:2305.02299 (SRigL: constant fan-in).

    Args:
        fraction: of the kept units that the first update drops, in [0, 1].
        decay: how the fraction falls.
        grow: what is grown: the largest gradients or momenta, or any.
        skip_step: whether the optimizer leaves out the step of an update, as in RigL.
        redistribute: whether what is dropped anywhere is grown in proportion to the mean momentum of a tensor's kept
            weights, instead of where it was dropped.
        momentum: the decay of the moving average, for `grow=momentum`.
        seed: of the random masks.
    """

    fraction: float = 0.3
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    grow: Literal["gradient", "random", "momentum"] = "gradient"
    skip_step: bool = True
    redistribute: bool = False
    momentum: float = 0.9
    seed: int = 0
    needs_zeros: ClassVar[bool] = True
    fixed_count: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction!r} must be in [0, 1]")
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"decay={self.decay!r} is none of cosine, linear, constant")
        if self.grow not in ("gradient", "random", "momentum"):
            raise ValueError(f"grow={self.grow!r} is none of gradient, random, momentum")
        if self.redistribute and self.grow != "momentum":
            raise ValueError(f"redistribute=true goes by momentum: it needs grow=momentum, not {self.grow}")

    @property
    def observes(self) -> bool:
        return self.grow == "momentum"

    @property
    def replaces_step(self) -> bool:
        return self.skip_step

    def structure_refusal(self, structure: Structure) -> str | None:
        if structure.fixed is not None:
            return (
                "updater=dropgrow moves weights freely within a tensor, which the pattern of "
                f"structure={structure.label} does not allow: use updater=prune with masking=srste, whose pruned "
                "weights can return"
            )
        return None

    def observe(self, param: MaskedParameter) -> None:
        if self.grow == "momentum":
            Momentum(self.momentum).observe(param)

    def rate(self, progress: float) -> float:
        """The fraction that is dropped at a part of the schedule.

        >>> [round(DropGrow().rate(x), 6) for x in (0, 0.25, 0.5, 0.75, 1)]
        [0.3, 0.256066, 0.15, 0.043934, 0.0]
        """
        if self.decay == "constant":
            return self.fraction
        return self.fraction * ((1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress)

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        unmasked = [i for i, group in enumerate(groups) if not all(param.pruned for param, _ in group.members)]
        if unmasked:  # all of them at first, later those that were frozen before
            units = Units([groups[i] for i in unmasked], structure, Random(self.seed).score, due.monotone)
            choose(units, allocation, due.level, [due.overrides[i] for i in unmasked])
            return
        units = Units(groups, structure, scorer.score, unit_scores=scorer.unit_scores)
        alive = [units.alive(index) for index in range(len(units))]
        counts = [int(torch.count_nonzero(mask)) for mask in alive]
        leasts = units.leasts(due.level)
        rate = self.rate(due.progress)
        dropped = [min(int(rate * n), max(n - least, 0)) for n, least in zip(counts, leasts, strict=True)]
        grown = self._shares(groups, units, counts, dropped) if self.redistribute else dropped
        growth = Units(groups, structure, lambda param: self._growth(param, due))
        for index in range(len(units)):
            left = counts[index] - dropped[index]
            stay = structure.select(where_kept(units[index].float(), alive[index]), left) & alive[index]
            wanted = growth[index].float().masked_fill(stay, torch.finfo(torch.float32).max)
            units.assign(index, structure.select(wanted, left + grown[index]))

    def _growth(self, param: MaskedParameter, due: Update) -> Tensor:
        """How much each weight wants to grow; indifferent where nothing is known."""
        if self.grow == "momentum":
            return Momentum(self.momentum).score(param)
        if self.grow == "gradient" and due.gradients and param.grad is not None:
            return param.grad.detach().abs()
        mixed = (self.seed * 0x9E3779B1 + crc32(param.name.encode()) * 0x85EBCA6B + due.number * 0xC2B2AE35) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(param.shape, generator=generator).to(param.weight.device)

    def _shares(self, groups: Sequence[Group], units: Units, counts: list[int], dropped: list[int]) -> list[int]:
        """How many units each group grows: all the dropped weights, by the mean momentum of kept weights."""
        means = []
        for group in groups:
            total = sum(float((Momentum().score(p) * p.factor).sum()) for p, _ in group.members)
            means.append(total / max(sum(p.kept for p, _ in group.members), 1))
        space = [size - count + drop for size, count, drop in zip(units.sizes, counts, dropped, strict=True)]
        left = sum(drop * weight for drop, weight in zip(dropped, units.weights, strict=True))
        shares = [0] * len(groups)
        open_ = [i for i in range(len(groups)) if space[i]]
        while left and open_:  # what does not fit into a tensor goes to the others
            scale = sum(means[i] for i in open_)
            wanted = {i: left * (means[i] / scale if scale else 1 / len(open_)) / units.weights[i] for i in open_}
            more = {i: min(int(wanted[i]), space[i] - shares[i]) for i in open_}
            if not any(more.values()):
                able = [i for i in open_ if units.weights[i] <= left]
                if not able:
                    break
                more = {max(able, key=lambda i: (wanted[i], -i)): 1}
            for i, count in more.items():
                shares[i] += count
                left -= count * units.weights[i]
            open_ = [i for i in open_ if shares[i] < space[i]]
        return shares


@register
@dataclass(frozen=True)
class GraNet(DropGrow):
    """Gradual pruning with regrowth: each update keeps what scores best at the schedule's level, then drops and grows.

    The second half is an update of `DropGrow`, so that the count is the schedule's. A weight that is pruned and grown
    at once keeps its value.

    Source: Liu et al., Sparse training via boosting pruning plasticity with neuroregeneration, 2021, arXiv:2106.10404,
    Algorithm 1.
    """

    fraction: float = 0.5
    skip_step: bool = False
    fixed_count: ClassVar[bool] = False

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        choose(due.units(groups, scorer, structure), allocation, due.level, due.overrides)
        super().update(groups, scorer, structure, allocation, due)
