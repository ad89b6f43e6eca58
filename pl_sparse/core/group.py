"""Weights whose units are pruned together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.core.gate import Gate
from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter

__all__ = ["Group"]


@dataclass(eq=False)
class Group:
    """Weights whose units are pruned together: one weight, or e.g. all the projections of an attention layer.

    Attributes:
        name: what it is called in messages.
        members: the weights, each with how its units are seen in it.
        companions: what goes with the units without being scored or counted: biases, the scales and shifts of norms.
        consumers: the weights that take the units' outputs; column j of one takes that of unit `units[j]` (-1: of none
            here). What takes in a pruned unit has no say in scores.
        reason: why none of the units can be pruned, or None.
        gate: what is learned of the units, or None.
        least: how many units are kept at any sparsity, as there is no network with fewer.
    """

    name: str
    members: tuple[tuple[MaskedParameter, Layout], ...]
    companions: tuple[tuple[MaskedParameter, Layout], ...] = ()
    consumers: tuple[tuple[MaskedParameter, Tensor], ...] = ()
    reason: str | None = None
    gate: Gate | None = None
    least: int = 0

    @property
    def numel(self) -> int:
        """How many weights the units have together, before any of them was removed from the model."""
        return sum(layout.numel_of(param.former) for param, layout in self.members)

    @property
    def shape(self) -> torch.Size:
        """The shape of the first member as its layout sees it, before anything was removed from it."""
        param, layout = self.members[0]
        return layout.shape_of(param.former)

    @property
    def pruned(self) -> bool:
        """Whether a mask of its members was ever set."""
        return any(param.pruned for param, _ in self.members)
