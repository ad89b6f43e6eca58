"""The new masks from the old ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pl_sparse.allocation import Allocation, Units
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.network.probe import Probe
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure

__all__ = ["Update", "Updater"]


@dataclass(frozen=True)
class Update:
    """What is due.

    Attributes:
        level: the sparsity to reach, in [0, 1].
        overrides: for each group its own sparsity, or None.
        monotone: whether pruned weights stay pruned.
        progress: the part of the schedule behind, in [0, 1].
        number: how many updates there were before this one.
        invert: keep what scores worst, a sanity check of a scorer.
        probe: the whole model on calibration batches, for updaters that set `calibrates`.
    """

    level: float
    overrides: tuple[float | None, ...]
    monotone: bool
    progress: float
    number: int = 0
    invert: bool = False
    probe: Probe | None = None

    def units(self, groups: Sequence[Group], scorer: Scorer, structure: Structure) -> Units:
        """The scores of the groups' units."""
        score = (lambda param: -scorer.score(param)) if self.invert else scorer.score
        return Units(groups, structure, score, self.monotone)


@dataclass(frozen=True)
class Updater(ABC):
    """The new masks from the old ones.

    Attributes:
        needs_zeros: whether it rests on masking that forgets pruned weights.
        needs_training: whether it rests on masking that trains pruned weights on.
        fixed_count: whether the number of kept weights never changes, so that a schedule other than a constant one
            makes no sense.
        targets_sparsity: whether the schedule's level is a sparsity that it meets.
        calibrates: whether it looks at the whole model through `Update.probe`.
    """

    needs_zeros: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    fixed_count: ClassVar[bool] = False
    targets_sparsity: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False

    def target(self, scheduled: float) -> float | None:
        """The final sparsity it is asked for, given the schedule's; None where it comes out of training."""
        return scheduled

    @property
    def replaces_step(self) -> bool:
        """Whether an update takes the place of the optimizer step that it falls on."""
        return False

    def refusal(self, structure: Structure) -> str | None:
        """Why it cannot work with a structure, or None."""
        return None

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step, as `Scorer.observe` does; by default nothing is done."""
        return

    @abstractmethod
    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        """Set the masks of all groups."""
