"""N:M patterns along the inputs, and along inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.structure.base import Structure, exchanged_within

__all__ = ["NM", "Transposable"]

_GROUPS = 1 << 14  # that are ranked at once, within the cache


@register
@dataclass(frozen=True)
class NM(Structure):
    """At most `n` non-zeros in every group of `m` neighbours along the input dimension.

    A convolution is seen with its channels last, so that a group lies in the input channels at one kernel position, as
    sparse tensor cores want it. The pattern prescribes the final sparsity 1 - n / m, whatever the schedule's final one;
    on the way there a level s keeps max(n, ceil((1 - s) m)) of each group, so that with a gradual schedule the pattern
    tightens from dense over (m - 1):m to n:m: gradual N:M is `structure=nm24 schedule=cubic`.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3.

    Args:
        n: how many weights of a group are kept.
        m: how many weights a group has.

    Raises:
        ValueError: not 0 < n <= m.

    >>> NM(2, 4).select(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), keep=2).tolist()
    [[True, False, True, False]]
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"n={self.n}, m={self.m}: an n:m pattern keeps n of every m weights, so 0 < n <= m")

    @property
    def fixed(self) -> float | None:
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m}"

    def spares(self, param: MaskedParameter) -> bool:
        return param.norm_dim == param.layout.output_dim

    def misfit(self, shape: torch.Size) -> str | None:
        if shape[1] % self.m:
            return f"its input dimension {shape[1]} is not divisible by m={self.m}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        return scores.movedim(1, -1).unflatten(-1, (-1, self.m))

    def alive(self, mask: Tensor) -> Tensor:
        return self.pool(mask)

    def select(self, units: Tensor, keep: int) -> Tensor:
        groups = units.numel() // self.m
        n = min(self.m, max(self.n, -(-keep // groups)))
        if self.m > 8:
            order = units.sort(dim=-1, descending=True, stable=True).indices
            return torch.zeros_like(units, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        if units.device.type == "cpu" and units.dtype in (torch.float32, torch.float64):
            return torch.from_numpy(_best(units.detach().numpy(), n))
        # The rank of a weight is how many of its group beat it; an equal one beats it if it comes first.
        lanes = units.unbind(-1)
        ranks = []
        for i, mine in enumerate(lanes):
            beaten = [(other >= mine) if j < i else (other > mine) for j, other in enumerate(lanes) if j != i]
            ranks.append(sum(b.to(torch.int8) for b in beaten) if beaten else torch.zeros_like(mine, dtype=torch.int8))
        return torch.stack([torch.as_tensor(rank) < n for rank in ranks], dim=-1)

    def exchange(self, chosen: Tensor, wanted: Tensor) -> Tensor:
        return exchanged_within(chosen, wanted)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.flatten(-2).movedim(-1, 1)


@register
@dataclass(frozen=True)
class Transposable(Structure):
    """N:M along the inputs and along the outputs, so that the weight and its transpose both have the pattern.

    Sparse tensor cores then speed up the backward pass too. In each m x m block every row and every column keeps n
    weights: the mask is the one with the largest sum of scores among all such masks, so that m is at most 4.

    Source: Hubara et al., Accelerated sparse neural training: a provable and efficient method to find N:M transposable
    masks, 2021, arXiv:2102.08124, section 3.

    Args:
        n: how many weights each row and each column of a block keeps.
        m: the rows and columns of a block, at most 4.

    >>> Transposable(1, 2).select(torch.tensor([[4.0, 3.0, 2.0, 2.0]]), keep=2).tolist()
    [[True, False, False, True]]
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m <= 4:
            raise ValueError(f"n={self.n}, m={self.m}: a transposable pattern needs 0 < n <= m <= 4")

    @property
    def fixed(self) -> float | None:
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m} transposable"

    def spares(self, param: MaskedParameter) -> bool:
        return param.norm_dim in (0, 1)

    def misfit(self, shape: torch.Size) -> str | None:
        for what, size in (("input", shape[1]), ("output", shape[0])):
            if size % self.m:
                return f"its {what} dimension {size} is not divisible by m={self.m}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        last = scores.flatten(2).movedim(2, 0) if scores.dim() > 2 else scores.unsqueeze(0)
        return last.unflatten(2, (-1, self.m)).unflatten(1, (-1, self.m)).transpose(2, 3).flatten(3)

    def alive(self, mask: Tensor) -> Tensor:
        return self.pool(mask)

    def select(self, units: Tensor, keep: int) -> Tensor:
        n = min(self.m, max(self.n, -(-keep * self.m // units.numel())))
        patterns = _permutation_sums(n, self.m, units.device)
        best = units.double().clamp(-1e150, 1e150) @ patterns.double().t()
        return patterns[best.argmax(-1)]

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        blocks = chosen.unflatten(-1, (self.m, self.m)).transpose(2, 3)
        return blocks.flatten(3).flatten(1, 2).movedim(0, 2).reshape(shape)


@cache
def _permutation_sums(n: int, m: int, device: torch.device) -> Tensor:
    """All m x m masks with n kept in every row and column, flat, (masks, m * m)."""
    rows = [list(row) for row in combinations(range(m), n)]
    masks = [
        [[j in row for j in range(m)] for row in chosen]
        for chosen in product(rows, repeat=m)
        if all(sum(j in row for row in chosen) == n for j in range(m))
    ]
    return torch.tensor(masks, device=device).flatten(1)


def _best(scores: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    """Where the n best of each group are, (..., m); equal ones rank by their place. In pieces that the cache holds."""
    groups = scores.reshape(-1, scores.shape[-1])
    chosen = np.empty(groups.shape, bool)
    for start in range(0, len(groups), _GROUPS):
        lanes = np.ascontiguousarray(groups[start : start + _GROUPS].T)  # (m, groups)
        beaten = np.empty(lanes.shape, np.int8)  # by how many of its group
        beaten[:] = np.arange(len(lanes), dtype=np.int8)[:, None]
        for i, mine in enumerate(lanes):
            for j in range(i + 1, len(lanes)):
                better = (lanes[j] > mine).view(np.int8)
                beaten[i] += better
                beaten[j] -= better
        chosen[start : start + _GROUPS] = (beaten < n).T
    return chosen.reshape(scores.shape)
