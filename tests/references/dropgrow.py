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


def srigl(weight: Tensor, gradient: Tensor, mask: Tensor, drop: int, salient: float, last: bool) -> Tensor:
    """The new mask of a matrix whose outputs share its weights evenly, and lose all of them where few matter.

    Source: Lasby et al., 2023, arXiv:2305.02299, section 3.2.
    """
    places = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1])]
    kept = sorted((p for p in places if mask[p]), key=lambda p: (-abs(float(weight[p])), p))
    strong, count = kept[: len(kept) - drop], len(kept)
    steep = sorted(places, key=lambda p: (-abs(float(gradient[p])), p))[:drop]
    marks = [len({p for p in strong + steep if p[0] == i}) for i in range(len(mask))]
    living = sum(bool(row.any()) for row in mask)
    least = max(1, int(salient * count / living))
    needed = -(-count // mask.shape[1])
    best = sorted(range(len(mask)), key=lambda i: (-marks[i], i))[:needed]
    rows = [i for i in range(len(mask)) if last or not salient or marks[i] >= least or i in best]
    orders = {}  # of each output: its strong weights, then by the gradient
    for i in rows:
        mine = [(0, -abs(float(weight[r, j])), j) for r, j in strong if r == i]
        rest = [j for j in range(mask.shape[1]) if j not in {j for _, _, j in mine}]
        orders[i] = mine + sorted((1, -abs(float(gradient[i, j])), j) for j in rest)
    each, more = divmod(count, len(rows))
    lucky = sorted(rows, key=lambda i: orders[i][each] if each < mask.shape[1] else (2, 0.0, 0))[:more]
    new = torch.zeros_like(mask)
    for i in rows:
        new[i, [j for _, _, j in orders[i][: each + (i in lucky)]]] = True
    return new
