"""Scores from the inverse of the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import Probe
from pl_sparse.scorer.base import Scorer

__all__ = ["Fisher", "blocks", "fisher_inverse", "single_gradients"]

_MOST = 1 << 22  # numbers of all the matrices that are made at once


@register
@dataclass(frozen=True)
class Fisher(Scorer):
    """w^2 / (2 [F^-1]_qq): how much the loss grows if a weight of a trained model is removed and the others are
    updated.

    F = damping I + 1/m sum of g g^T over the m calibration batches, g the gradient of a batch, in blocks of `block`
    consecutive weights of a tensor. By Woodbury's formula its inverse needs that of an m x m matrix; pruned weights are
    left out of it. `updater=surgeon` updates the other weights. m gradients are in memory while masks are made.

    Sources: Singh, Alistarh, WoodFisher, 2020, arXiv:2004.14340, equations 5 and 9. Kurtic et al., The optimal BERT
    surgeon, 2022, arXiv:2203.07259, section 3 (blocks of 50, damping 1e-7). There a gradient is that of 1 to 16
    examples and m several hundred to a thousand; here it is that of a batch, m `calibration_batches`.

    Args:
        block: the number of weights in a block.
        damping: the number added to the diagonal of F.
    """

    block: int = 50
    damping: float = 1e-7
    calibrates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_blocks(self.block, self.damping)

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        for param, gradients in zip(params, single_gradients(params, probe), strict=True):
            parts = [fisher_inverse(g, self.damping, diagonal=True) for g in blocks(gradients, self.block, self.block)]
            diagonal = torch.cat(parts).flatten()[: param.weight.numel()].reshape(param.shape)
            param.state["calibrated"] = (param.values.double().square() / (2 * diagonal)).float()

    def score(self, param: MaskedParameter) -> Tensor:
        calibrated = param.state.get("calibrated")
        return param.values.square() if calibrated is None else calibrated


def check_blocks(block: int, damping: float) -> None:
    """Refuse blocks of F that have no inverse."""
    if block < 1:
        raise ValueError(f"block={block!r} must be 1 or more weights")
    if not damping > 0:
        raise ValueError(f"damping={damping!r} must be positive, or F has no inverse")


def single_gradients(params: Sequence[MaskedParameter], probe: Probe) -> list[Tensor]:
    """The gradients of each batch at the weights that are kept, (batches, weights) per weight."""
    each = [
        [(gradient * param.factor).flatten() for param, gradient in zip(params, gradients, strict=True)]
        for gradients in probe.single_gradients([param.weight for param in params])
    ]
    return [torch.stack(of_param) for of_param in zip(*each, strict=True)]


def blocks(rows: Tensor, size: int, width: int) -> Iterator[Tensor]:
    """Rows of a tensor's weights, (rows, weights), cut into blocks of `size` of them, (blocks, rows, size), in pieces.

    The last block is filled with zeros.

    Args:
        width: how many numbers are made of each number of the blocks.
    """
    padded = F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size)).movedim(1, 0)
    yield from padded.split(max(_MOST // (width * max(size, len(rows))), 1))


def fisher_inverse(gradients: Tensor, damping: float, diagonal: bool = False) -> Tensor:
    """(damping I + G^T G / m)^-1 for gradients G of shape (..., m, size), in float64; or its diagonal alone.

    By Woodbury's formula: (I - G^T (m damping I + G G^T)^-1 G) / damping.
    """
    g = gradients.double()
    inner = g @ g.mT
    inner.diagonal(dim1=-2, dim2=-1).add_(g.shape[-2] * damping)
    solved = torch.linalg.solve(inner, g)
    if diagonal:
        return (1 - (g * solved).sum(-2)).clamp_min(torch.finfo(torch.float64).eps) / damping
    return (torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) - g.mT @ solved) / damping
