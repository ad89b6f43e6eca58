"""Sanity checks of masks.

Source: Frankle et al., Pruning neural networks at initialization: why are we missing the mark?, 2021, arXiv:2009.08576.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from pl_sparse.allocation import Units
from pl_sparse.core.agreement import agreed
from pl_sparse.core.group import Group
from pl_sparse.structure import Structure

__all__ = ["ABLATIONS", "shuffle"]

ABLATIONS = ("shuffle", "reinit", "invert")


def shuffle(groups: Sequence[Group], structure: Structure) -> None:
    """Permute each mask within its tensor, whole units (of N:M, whole groups), as torch's seed of rank 0 has it."""
    units = Units(groups, structure, lambda param: param.mask.float())
    for index in range(len(units)):
        if structure.fixed is None:
            alive = units.alive(index)
            drawn = agreed(partial(torch.rand, alive.shape)).to(alive.device)
            units.assign(index, structure.select(drawn, int(alive.sum())))
        else:
            rows = units[index].bool().flatten(0, -2)  # (groups, m)
            order = agreed(partial(torch.randperm, len(rows))).to(rows.device)
            units.assign(index, rows[order].reshape(units[index].shape))
