"""The masks of a model that is sparse already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.structure import Structure

__all__ = ["mask_zeros"]


@torch.no_grad()
def mask_zeros(groups: Sequence[Group], structure: Structure, least: float = 0.05) -> bool:
    """Mask the units that are zero, if at least a part `least` of all weights is.

    Tensors of nothing but zeros do not count and are left alone: they are initialised so, to be trained.

    Returns:
        Whether any mask was set.
    """
    params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
    counts = torch.stack([torch.count_nonzero(param.data).cpu() for param in params]).tolist()
    started = {param for param, count in zip(params, counts, strict=True) if count}
    zeros = sum(p.numel - count for p, count in zip(params, counts, strict=True) if count)
    if zeros < least * sum(param.numel for param in params):
        return False
    units = Units(groups, structure, lambda param: (param.data != 0).to(param.weight.dtype))
    changed = False
    for index, group in enumerate(groups):
        if all(param in started for param, _ in group.members):
            alive = _nonzero(units, index)
            if not bool(alive.all()):
                units.assign(index, alive)
                changed = True
    return changed


def _nonzero(units: Units, index: int) -> Tensor:
    """Which units of a group have a weight, or a companion, that is not zero."""
    alive = units[index] > 0
    for companion, layout in units.groups[index].companions:
        seen = layout.view(companion.data != 0)
        alive = alive | seen.reshape(alive.numel(), -1).any(1).reshape(alive.shape)
    return alive
