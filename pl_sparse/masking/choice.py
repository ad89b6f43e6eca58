"""The masking that a scorer and an updater need."""

from __future__ import annotations

from typing import Protocol

from pl_sparse.masking.base import Masking
from pl_sparse.masking.hard import Frozen, Hard
from pl_sparse.masking.learned import Gated, SoftThresholded
from pl_sparse.masking.straight_through import STE
from pl_sparse.scorer import Scorer

__all__ = ["auto"]


class _Updater(Protocol):
    @property
    def needs_training(self) -> bool: ...


def auto(scorer: Scorer, updater: _Updater) -> Masking:
    """The masking that scorer and updater need: hard, if pruned weights need neither be trained nor remembered.

    Args:
        scorer: the scorer of the run.
        updater: the updater of the run.
    """
    for masking in (Gated, SoftThresholded):
        if masking.rests_on is not None and isinstance(scorer, masking.rests_on):
            return masking()
    if updater.needs_training:
        return STE()
    return Frozen() if scorer.needs_latent else Hard()
