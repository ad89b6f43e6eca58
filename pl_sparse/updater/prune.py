"""Keep what scores best, or above a threshold, with or without hysteresis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation, Global, Units, choose, kept
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, name_of, register
from pl_sparse.core.topk import top_k
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Row, Structure
from pl_sparse.updater.base import Update, Updater

__all__ = ["Lagrangian", "Prune", "Splice", "Threshold"]


@register
@dataclass(frozen=True)
class Prune(Updater):
    """Keep the best scores. Weights return only where masking remembers their values."""

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        choose(due.units(groups, scorer, structure), allocation, due.level, due.overrides)


@register
@dataclass(frozen=True)
class Lagrangian(Prune):
    """Learned masks at a given sparsity: a penalty whose factors are learned.

    With s the expected sparsity of the gates and t that of the schedule the loss has

        lambda1 (s - t) + lambda2 (s - t)^2

    added, on which gates descend and lambda1 and lambda2 ascend, from 0, by (s - t) and (s - t)^2 times `rate` / T once
    per optimizer step, T the steps of the schedule: a gap that stays moves lambda1 by `rate` times it, however long
    training is. s is 1 - sum of |unit| P(z > 0) / sum of |unit| for `scorer=hardconcrete`, sigmoid(S) in place of P for
    `softmovement`. Masks keep the best scores, as many as the schedule sets: the sparsity is met to the unit at each
    update, and the gates of kept units are open. The schedule is the warm-up of t.

    Sources: Xia, Zhong, Chen, Structured pruning learns compact and accurate models (CoFi), 2022, arXiv:2204.00408,
    section 3.1 (there lambdas are trained by Adam). Xia et al., Sheared LLaMA, 2023, arXiv:2310.06694, section 2.1.
    There the count in evaluation follows the expected sparsity of each layer; here it is the schedule's.

    Args:
        rate: the rate at which lambda1 and lambda2 ascend, over the whole schedule.
    """

    rate: float = 300.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate!r} must be positive")

    def refusal(self, axes: Axes) -> str | None:
        if not axes.scorer.priced:
            return (
                f"updater=lagrangian sets the price of gates, which scorer={name_of(axes.scorer)} does not learn: use "
                "scorer=hardconcrete or softmovement, or updater=prune"
            )
        return super().refusal(axes)

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        for group, override in zip(groups, due.overrides, strict=True):
            if group.gate is not None:
                group.gate.level = due.level if override is None else override
        super().update(groups, scorer, structure, allocation, due)

    def guide(self, groups: Sequence[Group], scorer: Scorer, steps: int) -> None:
        if not any(group.pruned for group in groups):
            return
        gates = [group.gate for group in groups if group.gate is not None]
        device, total = gates[0].value.device, sum(group.numel for group in groups)
        kept = torch.stack([scorer.expected(group).to(device, torch.float64) for group in groups]).sum()
        target = sum(gate.level * group.numel for gate, group in zip(gates, groups, strict=True)) / total
        gap = 1 - kept / total - target
        multipliers = gates[0].multipliers
        if multipliers is None:
            multipliers = torch.zeros(2, dtype=torch.float64, device=device)
        price = -(multipliers[0] + 2 * multipliers[1] * gap) / total
        multipliers = multipliers + self.rate / steps * torch.stack([gap, gap.square()])
        for gate in gates:
            gate.multipliers = multipliers.to(gate.value.device)
            gate.price = price.to(gate.value)


@register
@dataclass(frozen=True)
class Threshold(Updater):
    """Keep scores above a threshold: the sparsity follows from training.

    The schedule's level is not a sparsity here but the part of the threshold, and of the penalty of a learned score,
    that is in force: with `final=1` it ends at all of it. The masks are those of the scores when it ends.

    Sources: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017,
    arXiv:1712.01312 (gates above 0). Sanh, Wolf, Rush, Movement pruning, 2020, arXiv:2005.07683, section 4
    (sigmoid(S) above tau). Kusupati et al., Soft threshold weight reparameterization, 2020, arXiv:2002.03231.

    Args:
        tau: the score below which a weight is removed.
        minimum: the fraction of the units of each tensor that is kept in any case, the best of them.
        at_least: a sparsity that the last update ensures, by removing the lowest scores of all tensors; None to
            take what comes. It cannot bring weights back: a model that is sparser already stays so.
    """

    tau: float = 0.0
    minimum: float = 0.0
    at_least: float | None = None
    targets_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what in ("minimum", "at_least"):
            value = getattr(self, what)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{what}={value!r} must be in [0, 1]")

    def target(self, scheduled: float) -> float | None:
        return self.at_least

    def refusal(self, axes: Axes) -> str | None:
        if self.at_least is None and 0 < axes.schedule.final < 1:
            meets = "updater=lagrangian meets it, " if axes.scorer.priced else ""
            return (
                f"updater=threshold has the sparsity that training learns, and {axes.schedule.final:g} "
                f"would be the part of its threshold in force: {meets}updater=prune prunes to it, and sparsity=1 has "
                "the whole threshold"
            )
        return super().refusal(axes)

    def structure_refusal(self, structure: Structure) -> str | None:
        if structure.fixed is not None or isinstance(structure, Row):
            return (
                f"updater=threshold keeps what scores high, which knows nothing of the pattern of "
                f"structure={structure.label}: use updater=prune"
            )
        return None

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        units = due.units(groups, scorer, structure)
        left = 0
        for index, group in enumerate(groups):
            if group.gate is not None:
                group.gate.level = due.level
            scores = units[index]
            chosen = scores > self.tau * due.level
            least = max(math.ceil(self.minimum * scores.numel()), units.least(index, 0.0))
            if int(chosen.sum()) < least:
                chosen |= top_k(scores, least)
            units.assign(index, chosen)
            left += int(chosen.sum()) * units.weights[index]
        most = math.inf if self.at_least is None else kept(self.at_least, sum(group.numel for group in groups))
        if due.progress >= 1 and left > most:
            choose(units, Global(), float(self.at_least or 0))


@register
@dataclass(frozen=True)
class Splice(Updater):
    """Dynamic network surgery: cut low scores, splice high scores, and leave those between unchanged.

    A kept weight is cut where its score is below `low` t, a cut one spliced where it is `high` t or more. The paper
    sets t = mean + c std of |w| once, and c by hand; here t is such that the count is that of the schedule, to the
    unit. Masking must train cut weights on (`masking=ste`), or none would ever be spliced.

    Source: Guo, Yao, Chen, Dynamic network surgery for efficient DNNs, 2016, arXiv:1608.04493, equation 3.

    Args:
        low: hysteresis downwards, at most 1.
        high: hysteresis upwards, at least 1.
    """

    low: float = 0.9
    high: float = 1.1
    needs_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 <= self.high:
            raise ValueError(f"low={self.low!r}, high={self.high!r}: 0 < low <= 1 <= high")

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        alive = Units(groups, structure, scorer.score).alive
        places = {id(group): index for index, group in enumerate(groups)}

        def score(param: MaskedParameter) -> Tensor:
            return scorer.score(param) / torch.where(param.mask, self.low, self.high)

        def unit_scores(group: Group) -> Tensor | None:
            scores = scorer.unit_scores(group)
            return None if scores is None else scores / torch.where(alive(places[id(group)]), self.low, self.high)

        choose(Units(groups, structure, score, unit_scores=unit_scores), allocation, due.level, due.overrides)
