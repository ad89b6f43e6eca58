"""Latent values in the place of weights, for as long as an optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pl_sparse.core.parameter import MaskedParameter, in_pieces, numbers, zero_pruned

__all__ = ["conceal", "expose", "store_kept"]


def expose(params: Sequence[MaskedParameter], in_place: bool) -> None:
    """Put the latent values into the weights, for an optimizer that steps them.

    Args:
        params: the weights.
        in_place: whether weights may have the memory of the latent values until `conceal`: those that are plain
            parameters do, and nothing is copied.
    """
    copied = []
    for param in params:
        weight, latent = param.weight, param.latent
        if latent is None:
            continue
        plain = in_place and type(param) is MaskedParameter and type(weight) is nn.Parameter
        if not plain or not _alike(weight, latent):
            copied.append(param)
        elif param.aside is None:
            param.aside, weight.data = weight.data, latent
    if copied:
        torch._foreach_copy_([param.data for param in copied], [p.latent for p in copied if p.latent is not None])


def conceal(params: Sequence[MaskedParameter]) -> None:
    """The reverse: latent values are what is in the weights.

    Weights that had the memory of the latent values hold what they held before; in the others nothing changes.
    """
    copied = []
    for param in params:
        if param.latent is None:
            continue
        if param.aside is None:
            copied.append(param)
            continue
        if param.weight.data_ptr() != param.latent.data_ptr():  # the optimizer has given it other memory
            param.latent.copy_(param.weight)
        param.weight.data, param.aside = param.aside, None
    if copied:
        torch._foreach_copy_([p.latent for p in copied if p.latent is not None], [param.data for param in copied])


def _alike(weight: torch.Tensor, latent: torch.Tensor) -> bool:
    return (
        type(latent) is torch.Tensor
        and latent.dtype == weight.dtype
        and latent.device == weight.device
        and latent.stride() == weight.stride()
        and latent.shape == weight.shape
    )


def store_kept(params: Sequence[MaskedParameter]) -> None:
    """Set weights to zero where they are pruned, and latent values to the weights where they are not.

    In large weights by integers, as `zero_pruned`: l <- (1 - mask) l + mask w is exact, and needs no mask of floats.
    """
    small = []
    for param in params:
        weight, latent = param.data, param.latent
        if latent is None or not in_pieces(weight, param) or not _alike(weight, latent):
            small.append(param)
            continue
        for behind, number, kept in zip(*numbers(param.mask, latent, weight), strict=True):
            kept = kept.to(number.dtype)
            number.mul_(kept)
            behind.mul_(kept.bitwise_xor_(1)).add_(number)
    if small:
        weights = [param.data for param in small]
        zero_pruned(weights, small)  # first, so that nothing but numbers is stored
        torch._foreach_lerp_(
            [p.latent for p in small if p.latent is not None], weights, [param.factor for param in small]
        )
