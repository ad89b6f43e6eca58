"""Blocks of a matrix, kernels of a convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.core.registry import register
from pl_sparse.structure.base import Structure

__all__ = ["Block", "Kernel"]


@register
@dataclass(frozen=True)
class Block(Structure):
    """Blocks of `h` outputs by `w` inputs; a convolution has such blocks at each kernel position.

    Source: Gray, Radford, Kingma, GPU kernels for block-sparse weights, 2017.

    Args:
        h: the outputs of a block.
        w: the inputs of a block.
    """

    h: int = 4
    w: int = 4

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"h={self.h}, w={self.w}: a block has at least one row and one column")

    @property
    def label(self) -> str:
        return f"block {self.h}x{self.w}"

    def misfit(self, shape: torch.Size) -> str | None:
        if shape[0] % self.h:
            return f"its output dimension {shape[0]} is not divisible by h={self.h}"
        if shape[1] % self.w:
            return f"its input dimension {shape[1]} is not divisible by w={self.w}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        # One dimension after the other: first whole rows, so that little is left for the short runs of a row.
        return scores.unflatten(0, (-1, self.h)).mean(1).unflatten(1, (-1, self.w)).mean(2)

    def alive(self, mask: Tensor) -> Tensor:
        return mask.unflatten(0, (-1, self.h)).amax(1).unflatten(1, (-1, self.w)).amax(2)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        tiles = chosen.unsqueeze(1).unsqueeze(3)  # (out / h, 1, in / w, 1, *kernel)
        return tiles.expand(-1, self.h, -1, self.w, *chosen.shape[2:]).reshape(shape)


@register
@dataclass(frozen=True)
class Kernel(Structure):
    """Single kernels of a convolution: the weights from one input to one output channel. A linear layer's are 1 x 1."""

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(2).mean(2) if scores.dim() > 2 else scores

    def alive(self, mask: Tensor) -> Tensor:
        return mask.flatten(2).amax(2) if mask.dim() > 2 else mask

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(*chosen.shape, *(1,) * (len(shape) - 2)).expand(shape)
