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
from pl_sparse.core.registry import name_of, register
from pl_sparse.core.topk import count_each, top_k
from pl_sparse.scorer import Momentum, Random, Scorer
from pl_sparse.structure import Row, Structure
from pl_sparse.updater.base import Update, Updater

__all__ = ["ITOP", "DropGrow", "GraNet", "SRigL"]


@register
@dataclass(frozen=True)
class DropGrow(Updater):
    """Dynamic sparse training: in each tensor drop the units that score lowest and grow as many others.

    The first masks are random, as dense as the allocation says. Each update then drops floor(f n) of the n kept units
    of a tensor and grows as many of those not kept, the ones just dropped among them. Grown weights start at zero, and
    so does their optimizer state; a weight that is dropped and grown in one update keeps both. f decays from `fraction`
    over the schedule. With `structure=row` both go by rows, so that each output keeps as many inputs as before: the
    constant fan-in of SRigL; `updater=srigl` removes whole neurons too. f over the schedule:

        cosine: f = fraction / 2 (1 + cos(pi x)),   linear: f = fraction (1 - x),   constant: f = fraction

    Sources: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science, 2018, arXiv:1707.04780 (SET: random growth). Evci et al., Rigging the lottery: making all
    tickets winners, 2020, arXiv:1911.11134, Algorithm 1 (RigL: growth by the gradient; an update replaces the step).
    Dettmers, Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840, Algorithm 1 (sparse momentum: growth
    by momentum, `redistribute`). Lasby et al., Dynamic sparse training with structured sparsity, 2023,
    arXiv:2305.02299 (SRigL: constant fan-in).

    Args:
        fraction: the part of the kept units that the first update drops, in [0, 1].
        decay: how the fraction falls.
        grow: what is grown: the largest gradients or momenta, or any.
        skip_step: whether the optimizer leaves out the step of an update, as in RigL.
        redistribute: whether what is dropped anywhere is grown in proportion to the mean momentum of a tensor's kept
            weights, instead of where it was dropped.
        momentum: the decay of the moving average, for `grow=momentum`.
        seed: the seed of the random masks.
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
            raise ValueError(f"decay={self.decay!r} must be one of cosine, linear, constant")
        if self.grow not in ("gradient", "random", "momentum"):
            raise ValueError(f"grow={self.grow!r} must be one of gradient, random, momentum")
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
                f"updater={name_of(self)} moves weights freely within a tensor, which the pattern of "
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
        there = count_each(alive)
        leasts = units.leasts(due.level)
        rate = self.rate(due.progress)
        dropped = [min(int(rate * n), max(n - least, 0)) for n, least in zip(there, leasts, strict=True)]
        grown = self._shares(groups, units, there, dropped) if self.redistribute else dropped
        growth = Units(groups, structure, lambda param: self._growth(param, due))
        for index in range(len(units)):
            left = there[index] - dropped[index]
            last = index == len(units) - 1
            scores, wanted = units[index].float(), growth[index].float()
            units.assign(index, self._moved(scores, wanted, alive[index], left, grown[index], structure, last))

    def _moved(
        self, scores: Tensor, wanted: Tensor, alive: Tensor, left: int, grown: int, structure: Structure, last: bool
    ) -> Tensor:
        """The units of a tensor that are kept: `left` of the living by their scores, `grown` of the others.

        Args:
            wanted: how much each unit wants to grow.
            last: whether it is the last tensor.
        """
        stay = structure.select(where_kept(scores, alive), left) & alive
        return structure.select(wanted.masked_fill(stay, torch.finfo(torch.float32).max), left + grown)

    def _growth(self, param: MaskedParameter, due: Update) -> Tensor:
        """How much each weight wants to grow; indifferent where nothing is known."""
        if self.grow == "momentum":
            return Momentum(self.momentum).score(param)
        if self.grow == "gradient" and due.gradients and param.grad is not None:
            return param.grad.detach().abs()
        mixed = (self.seed * 0x9E3779B1 + crc32(param.name.encode()) * 0x85EBCA6B + due.number * 0xC2B2AE35) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(param.shape, generator=generator).to(param.weight.device, non_blocking=True)

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
    """Gradual pruning with regrowth: each update keeps the best scores at the schedule's level, then drops and grows.

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


@register
@dataclass(frozen=True)
class SRigL(DropGrow):
    """RigL with a constant fan-in that removes neurons: outputs with few salient weights lose all of them.

    Of a tensor with n kept weights and d to drop, the n - d largest weights and the d largest gradients are salient. An
    output with fewer than max(1, floor(`salient` k)) salient weights is removed, k the weights of each output there is,
    and the others share all n: each keeps those of its weights that are among the n - d largest, and grows by the
    gradient up to its share. An output returns once enough of its weights are salient. The last tensor loses none, and
    each keeps as many outputs as its weights need. Biases of removed outputs stay.

    Source: Lasby et al., Dynamic sparse training with structured sparsity, 2023, arXiv:2305.02299, section 3.2, and the
    authors' code.

    Args:
        salient: the part of its weights that must be salient for an output to stay; 0: all stay.
    """

    salient: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.salient <= 1:
            raise ValueError(f"salient={self.salient!r} must be in [0, 1]")

    def structure_refusal(self, structure: Structure) -> str | None:
        if not isinstance(structure, Row):
            return (
                f"updater=srigl keeps as many weights in each output, which structure={structure.label} does not: use "
                "structure=row, or updater=dropgrow"
            )
        return None

    def _moved(
        self, scores: Tensor, wanted: Tensor, alive: Tensor, left: int, grown: int, structure: Structure, last: bool
    ) -> Tensor:
        stay = top_k(where_kept(scores, alive), left) & alive
        rows = alive.flatten(1)  # (out, weights of an output)
        fan_in = (left + grown) / rows.any(1).sum().clamp_min(1)
        counts = (stay | top_k(wanted, grown)).flatten(1).sum(1)
        open_ = top_k(counts.float(), -(-(left + grown) // rows.shape[1]))
        open_ |= counts >= (self.salient * fan_in).floor().clamp_min(1)
        if last or not self.salient:
            open_ = torch.ones_like(open_)
        lifted = 2 + scores / scores.max().clamp_min(torch.finfo(torch.float32).tiny)
        ranks = torch.where(stay, lifted, wanted / wanted.max().clamp_min(torch.finfo(torch.float32).tiny))
        chosen = torch.zeros_like(alive)
        places = open_.nonzero().squeeze(1)
        chosen[places] = structure.select(ranks[places], left + grown)
        return chosen


@register
@dataclass(frozen=True)
class ITOP(DropGrow):
    """In-time over-parameterization: dropping and growing that tries as many weights as possible and counts them.

    It needs enough time between updates for new weights to grow before they are judged, and a large fraction of them
    per update. R, the share of all weights that were kept at any time, is logged as "explored".

    Source: Liu et al., Do we actually need dense over-parameterization? In-time over-parameterization in sparse
    training, 2021, arXiv:2102.02887, section 3.
    """

    fraction: float = 0.5
    skip_step: bool = False

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        super().update(groups, scorer, structure, allocation, due)
        for group in groups:
            for param, _ in group.members:
                explored = param.state.get("explored")
                param.state["explored"] = param.mask.clone() if explored is None else explored | param.mask

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """The share of weights that were ever kept."""
        params = [param for group in groups for param, _ in group.members if "explored" in param.state]
        explored = sum(int(param.total(param.state["explored"])) for param in params)
        return {"explored": explored / sum(param.numel for param in params)} if params else {}
