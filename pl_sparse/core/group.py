"""Weights whose units are pruned together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter

__all__ = ["Group", "size_of"]


@dataclass(frozen=True, eq=False)
class Group:
    """Weights whose units are pruned together: one weight, or e.g. all the projections of an attention layer.

    Attributes:
        name: what it is called in messages.
        members: the weights, each with how its units are seen in it.
        followers: what goes with the units without being scored or counted: biases, the scales and shifts of norms.
        feeds: the weights that take the units' outputs; column j of one takes that of unit `units[j]` (-1: of none
            here). What a pruned unit fed has no say in scores.
        reason: why none of the units can be pruned, or None.
    """

    name: str
    members: tuple[tuple[MaskedParameter, Layout], ...]
    followers: tuple[tuple[MaskedParameter, Layout], ...] = ()
    feeds: tuple[tuple[MaskedParameter, Tensor], ...] = ()
    reason: str | None = None

    @property
    def numel(self) -> int:
        return sum(size_of(param, layout).numel() for param, layout in self.members)

    @property
    def shape(self) -> torch.Size:
        """The shape of the first member as (out, in, *kernel)."""
        return size_of(*self.members[0])


def size_of(param: MaskedParameter, layout: Layout) -> torch.Size:
    """The (former) shape of a weight as a layout sees it."""
    return layout.view(torch.empty(param.former, device="meta")).shape
