"""Weights that are functions of trained values, value by value.

Sources: Schwarz et al., 2021, arXiv:2110.00296 (Powerpropagation). Hu, Zhu, Chen, 2024, arXiv:2409.09099 (S-STE).
"""

from __future__ import annotations

import torch
from torch import Tensor


def power(values: Tensor, alpha: float) -> Tensor:
    """sign(v) |v|^alpha, differentiable."""
    return values.sign() * values.abs() ** alpha


def soft(values: Tensor, n: int, m: int) -> Tensor:
    """A matrix whose groups of m along a row keep n, less the largest of the rest."""
    out = torch.zeros_like(values)
    for i in range(values.shape[0]):
        for start in range(0, values.shape[1], m):
            order = sorted(range(start, start + m), key=lambda j: (-abs(float(values[i, j])), j))
            threshold = abs(float(values[i, order[n]]))
            for j in order[:n]:
                v = float(values[i, j])
                out[i, j] = (1 if v > 0 else -1) * (abs(v) - threshold)
    return out


def scale(values: Tensor, thresholded: Tensor) -> float:
    """The factor of the thresholded values that comes nearest to the values, by a search."""
    best = min((k / 1000 for k in range(5000)), key=lambda b: float((values - b * thresholded).square().sum()))
    return best
