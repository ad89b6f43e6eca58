"""The new masks from the old ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pl_sparse.allocation import Allocation, Units
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, Axis, name_of
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
        gradients: whether gradients are finite; a gradient scaler finds some that are not, and leaves their step out.
    """

    level: float
    overrides: tuple[float | None, ...]
    monotone: bool
    progress: float
    number: int = 0
    invert: bool = False
    probe: Probe | None = None
    gradients: bool = True

    def units(self, groups: Sequence[Group], scorer: Scorer, structure: Structure) -> Units:
        """The scores of the groups' units."""
        if not self.invert:
            return Units(groups, structure, scorer.score, self.monotone, scorer.unit_scores, pointwise=scorer.pointwise)

        def negated(group: Group) -> Tensor | None:
            scores = scorer.unit_scores(group)
            return None if scores is None else -scores

        return Units(
            groups, structure, lambda param: -scorer.score(param), self.monotone, negated, pointwise=scorer.pointwise
        )


@dataclass(frozen=True)
class Updater(Axis, ABC):
    """The new masks from the old ones.

    Attributes:
        needs_zeros: whether it needs masking that forgets pruned weights.
        needs_training: whether it needs masking that continues to train pruned weights.
        fixed_count: whether the number of kept weights never changes, so that a schedule other than a constant one
            makes no sense.
        grows: whether weights return without any optimizer state, second moments included.
        targets_sparsity: whether the schedule's level is a sparsity that it meets.
        calibrates: whether it looks at the whole model through `Update.probe`.
        writes_weights: whether it gives the weights that are left other values.
    """

    axis: ClassVar[str] = "updater"
    needs_zeros: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    fixed_count: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    targets_sparsity: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False
    writes_weights: ClassVar[bool] = False

    def target(self, scheduled: float) -> float | None:
        """The final sparsity that it aims at, given the schedule's; None where it follows from training."""
        return scheduled

    @property
    def replaces_step(self) -> bool:
        """Whether an update takes the place of the optimizer step that it falls on."""
        return False

    def refusal(self, axes: Axes) -> str | None:
        me, masking, schedule = name_of(self), name_of(axes.masking), name_of(axes.schedule)
        if axes.targets.overrides and not self.targets_sparsity:
            return f"overrides are sparsities, which updater={me} does not aim at"
        if self.needs_zeros and axes.masking.remembers:
            return (
                f"updater={me} works on sparse weights alone, but masking={masking} keeps what was behind the mask: "
                "use masking=hard or auto"
            )
        if self.needs_training and not axes.masking.trains_pruned:
            return (
                f"updater={me} brings back pruned weights that have grown, but masking={masking} does not train them: "
                "use masking=ste or auto"
            )
        if self.fixed_count and axes.schedule.final and not axes.schedule.one_level:
            return f"updater={me} keeps the number of weights, which schedule={schedule} changes: use schedule=constant"
        return self.structure_refusal(axes.structure)

    @property
    def observes(self) -> bool:
        """Whether it gathers gradients over time, so that what it does depends on training before the first masks."""
        return False

    def structure_refusal(self, structure: Structure) -> str | None:
        """Why it cannot work with a structure, or None."""
        return None

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step, as `Scorer.observe` does; by default nothing is done."""
        return

    @property
    def needs_whole(self) -> str | None:
        if self.calibrates and not self.sees_inputs:
            return "looks at the whole model at once"
        return None if type(self).observe is Updater.observe else super().needs_whole

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Figures of what it did, by name, for logs and metrics; by default none."""
        return {}

    def guide(self, groups: Sequence[Group], scorer: Scorer, steps: int) -> None:
        """Once an optimizer step, before the scorer learns: set the price of its gates; by default nothing is done.

        Args:
            steps: optimizer steps between the first and the last level of the schedule, 1 at least.
        """
        return

    @abstractmethod
    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        """Set the masks of all groups."""
