"""The alternating direction method of multipliers with Z and U as tensors of their own.

Source: Zhang et al., 2018, arXiv:1804.03294, equations 4 to 9.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projection(tensors: list[Tensor], keep: int) -> list[Tensor]:
    """The nearest tensors that have `keep` weights together."""
    flat = sorted(((-abs(float(v)), i, j) for i, t in enumerate(tensors) for j, v in enumerate(t.flatten())))
    new = [torch.zeros_like(t).flatten() for t in tensors]
    for _, i, j in flat[:keep]:
        new[i][j] = tensors[i].flatten()[j]
    return [n.reshape(t.shape) for n, t in zip(new, tensors, strict=True)]


class Naive:
    """Z and U of some weights, and the gradient of rho / 2 |W - Z + U|^2."""

    def __init__(self, weights: list[Tensor], keep: int) -> None:
        self.keep = keep
        self.z = projection(weights, keep)
        self.u = [torch.zeros_like(w) for w in weights]

    def update(self, weights: list[Tensor]) -> None:
        self.z = projection([w + u for w, u in zip(weights, self.u, strict=True)], self.keep)
        self.u = [u + w - z for u, w, z in zip(self.u, weights, self.z, strict=True)]

    def gradients(self, weights: list[Tensor], rho: float) -> list[Tensor]:
        leaves = [w.clone().requires_grad_() for w in weights]
        terms = [(w - z + u).square().sum() for w, z, u in zip(leaves, self.z, self.u, strict=True)]
        return list(torch.autograd.grad(rho / 2 * torch.stack(terms).sum(), leaves))
