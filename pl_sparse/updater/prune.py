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
from pl_sparse.core.registry import register
from pl_sparse.core.topk import top_k
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Row, Structure
from pl_sparse.updater.base import Update, Updater

__all__ = ["Prune", "Splice", "Threshold"]


@register
@dataclass(frozen=True)
class Prune(Updater):
    """Keep what scores best. Weights come back only where masking remembers their values."""

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        choose(due.units(groups, scorer, structure), allocation, due.level, due.overrides)


@register
@dataclass(frozen=True)
class Threshold(Updater):
    """Keep what scores above a threshold: how much that is comes out of training.

    The schedule's level is no sparsity here but the part of the threshold, and of the penalty of a learned score,
    that is in force: with `final=1` it ends at all of it. The masks are those of the scores when it ends.

    Sources: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017,
    arXiv:1712.01312 (gates above 0). Sanh, Wolf, Rush, Movement pruning, 2020, arXiv:2005.07683, section 4
    (sigmoid(S) above tau). Kusupati et al., Soft threshold weight reparameterization, 2020, arXiv:2002.03231.

    Args:
        tau: the threshold.
        minimum: the fraction of the units of each tensor that is kept in any case, the best of them.
        at_least: a sparsity that the last update makes sure of, by removing the lowest scores of all tensors; None to
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
    """Dynamic network surgery: cut what scores low, splice what scores high, and leave alone what is between.

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
