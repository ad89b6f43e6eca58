"""One update of dynamic sparse training with a constant fan-in, row by row.

Source: Lasby et al., Dynamic sparse training with structured sparsity, 2023, arXiv:2305.02299, section 3: each output
drops its smallest weights and grows as many where the gradient is largest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update(weight: Tensor, gradient: Tensor, mask: Tensor, drop: int) -> Tensor:
    """The new mask, where each row of it drops and grows `drop` weights."""
    new = torch.zeros_like(mask)
    for row in range(len(mask)):
        kept = [j for j in range(mask.shape[1]) if mask[row, j]]
        kept.sort(key=lambda j: (-abs(float(weight[row, j])), j))
        stay = kept[: len(kept) - drop]
        rest = [j for j in range(mask.shape[1]) if j not in stay]
        rest.sort(key=lambda j: (-abs(float(gradient[row, j])), j))
        new[row, stay + rest[:drop]] = True
    return new
