"""The new masks from the old ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pl_sparse.allocation import Allocation, Units, choose
from pl_sparse.masked import Group
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Structure


@dataclass(frozen=True)
class Update:
    """What is due.

    Attributes:
        level: the sparsity to reach, in [0, 1].
        overrides: for each group its own sparsity, or None.
        monotone: whether pruned weights stay pruned.
        progress: the part of training behind, in [0, 1].
    """

    level: float
    overrides: tuple[float | None, ...]
    monotone: bool
    progress: float


@dataclass(frozen=True)
class Updater(ABC):
    """The new masks from the old ones."""

    @abstractmethod
    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        """Set the masks of all groups."""


@dataclass(frozen=True)
class Prune(Updater):
    """Keep what scores best. Weights come back only where masking remembers their values."""

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        units = Units(groups, structure, scorer.score, due.monotone)
        choose(units, allocation, due.level, due.overrides)
