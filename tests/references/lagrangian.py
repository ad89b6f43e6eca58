"""Hard concrete gates under a Lagrangian, by autograd on the loss itself.

Source: Xia, Zhong, Chen, 2022, arXiv:2204.00408, section 3.1: loss + lambda1 (s - t) + lambda2 (s - t)^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def constraint(alphas: list[Tensor], sizes: list[int], lambdas: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """The terms that are added, and s - t; `sizes` are the weights per unit."""
    kept = torch.zeros((), dtype=torch.float64)
    total = 0
    for alpha, size in zip(alphas, sizes, strict=True):
        for gate in alpha.flatten():
            kept = kept + size / (1 + torch.exp(-(gate - 2 / 3 * math.log(0.1 / 1.1))))
            total += size
    gap = 1 - kept / total - target
    return lambdas[0] * gap + lambdas[1] * gap**2, gap
