"""What an allocation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import Axis

__all__ = ["Allocation"]


@dataclass(frozen=True)
class Allocation(Axis, ABC):
    """How the kept units are shared among the tensors."""

    axis: ClassVar[str] = "allocation"

    @abstractmethod
    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        """How many units each group keeps, so that the fraction `sparsity` of all their weights is removed."""

    def ranks(self, units: Units) -> Sequence[Tensor] | None:
        """Scores that compare across tensors, where one threshold over all of them is the whole rule; else None."""
        return None

    def start(self, groups: Sequence[Group], model: nn.Module, example: Any) -> None:
        """Look at the model before training; by default nothing is done.

        Args:
            example: inputs that it can be called with, where the structure needs them, else None.
        """
        return
