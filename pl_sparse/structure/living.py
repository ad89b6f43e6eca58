"""Units that keep each part of a normalized weight alive."""

from __future__ import annotations

import torch
from torch import Tensor

from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.parametrized import WHOLE
from pl_sparse.structure.base import Structure

__all__ = ["living"]


@torch.no_grad()
def living(
    chosen: Tensor, structure: Structure, param: MaskedParameter, layout: Layout, among: Tensor | None = None
) -> Tensor:
    """As many units, of which each slice that is divided by its norm has one that is not zero: its largest.

    What a slice gets, the structure takes from the smallest units that are not the last of their slice. Where that
    cannot be, the units stay as they were chosen.

    Args:
        chosen: bool, of the units' shape.
        structure: whose units they are.
        param: the weight. Slices run along its `norm_dim`; units of several weights are those of a single slice.
        layout: how the units are seen in it.
        among: the units that may be kept; None: all.
    """
    if param.norm_dim is None:
        return chosen
    count = param.normalized_slices
    values = param.fill(param.values).abs()
    values = values if values.element_size() > 2 else values.float()
    sizes = structure.pool(layout.view(values)).flatten()  # (units,)
    at = torch.arange(count, dtype=sizes.dtype, device=sizes.device)
    at = at if param.norm_dim == WHOLE else at.reshape(-1, *(1,) * (len(param.former) - param.norm_dim - 1))
    slices = structure.pool(layout.view(at.expand(param.former))).flatten().long()  # (units,), the slice of each

    def largest(of: Tensor) -> Tensor:
        return of.new_full((count,), -1).scatter_reduce(0, slices, of, "amax")

    kept = chosen.flatten()
    held, there = largest(torch.where(kept, sizes, -1)), largest(sizes if among is None else sizes * among.flatten())
    dead = (held <= 0) & ((there > 0) | (held < 0))
    if not bool(dead.any()):
        return chosen
    best = torch.where(dead, there, held)
    able = torch.where(dead[slices], True if among is None else among.flatten(), kept) & (sizes == best[slices])
    index = torch.arange(len(sizes), device=sizes.device)
    first = torch.full((count,), len(sizes), device=sizes.device).scatter_reduce(
        0, slices, torch.where(able, index, len(sizes)), "amin"
    )
    wanted = torch.where(kept, sizes / sizes.max().clamp_min(torch.finfo(sizes.dtype).tiny), -1)
    wanted[first[first < len(sizes)]] = 1e3  # more than the others of a pattern together
    moved = structure.exchange(chosen, wanted.reshape(chosen.shape))
    moved = moved if among is None else moved & among
    return moved if int(moved.sum()) == int(kept.sum()) else chosen
