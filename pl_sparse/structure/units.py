"""Units that are modules, or rows of all that belongs to one: removed whole, with all of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.structure.base import Structure

__all__ = ["RowUnits", "Whole", "beside"]


@dataclass(frozen=True)
class RowUnits(Structure):
    """A structure whose units are the rows of (units, ...): the score of one is the mean over it."""

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1)

    def alive(self, mask: Tensor) -> Tensor:
        return mask.flatten(1).amax(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)


@dataclass(frozen=True)
class Whole(RowUnits):
    """A structure whose layouts see each weight as (units, ...), all of which goes with the unit."""

    @property
    def oriented(self) -> bool:
        return False  # it takes what it recognises alone

    def spares(self, param: MaskedParameter) -> bool:
        return True

    @property
    def needs_whole(self) -> str | None:
        return "changes what modules compute where their weights are masked, which needs these weights whole"

    @property
    def joins(self) -> bool:
        return True


def beside(name: str, module: nn.Module, parameter: nn.Parameter) -> MaskedParameter:
    """What goes along with units without being counted."""
    return MaskedParameter(name, module, parameter, torch.ones_like(parameter, dtype=torch.bool, requires_grad=False))
