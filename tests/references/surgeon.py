"""The optimal brain surgeon with the empirical Fisher matrix, by whole matrices.

Source: Kurtic et al., 2022, arXiv:2203.07259, equations 3 to 5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(gradients: Tensor, damping: float) -> Tensor:
    """The inverse of damping I + mean of g g^T, gradients (m, weights), by adding one gradient after the other."""
    out = torch.eye(gradients.shape[1], dtype=torch.float64) / damping
    for g in gradients.double():
        product = out @ g
        out = out - torch.outer(product, product) / (len(gradients) + g @ product)
    return out


def removed(weights: Tensor, fisher_inverse: Tensor, gone: list[int]) -> Tensor:
    """The weights that minimize the quadratic loss about `weights`, those in `gone` being zero."""
    part = fisher_inverse[gone][:, gone]
    new = weights - fisher_inverse[:, gone] @ torch.linalg.inv(part) @ weights[gone]
    new[gone] = 0
    return new
