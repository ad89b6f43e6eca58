"""Single weights: anywhere in a tensor, or equally many in each of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.core.topk import top_k
from pl_sparse.structure.base import Structure, exchanged_within

__all__ = ["Row", "Unstructured"]


@register
@dataclass(frozen=True)
class Unstructured(Structure):
    """Each weight is a unit."""

    @property
    def oriented(self) -> bool:
        return False

    def spares(self, param: MaskedParameter) -> bool:
        return True

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def alive(self, mask: Tensor) -> Tensor:
        return mask

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen


@register
@dataclass(frozen=True)
class Row(Structure):
    """Single weights, equally many in each output of a tensor (its rows).

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    section 3, which compares weights per output.

    >>> Row().select(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), keep=2).tolist()
    [[True, False], [True, False]]
    """

    def spares(self, param: MaskedParameter) -> bool:
        return param.norm_dim == param.layout.output_dim

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def alive(self, mask: Tensor) -> Tensor:
        return mask

    def select(self, units: Tensor, keep: int) -> Tensor:
        rows = units.flatten(1)
        each, more = divmod(keep, len(rows))
        if each == rows.shape[1]:
            return torch.ones_like(units, dtype=torch.bool)
        bound = _ranked(rows, each)  # (out,), the best score of each row that is one too many
        lucky = top_k(bound, more)  # one more where that one is best
        chosen = rows > bound.unsqueeze(1)
        missing = each + lucky.long() - chosen.sum(1, dtype=torch.int32)
        # the first of those that equal the bound; on a GPU it costs more to ask which rows are short than to do all
        short = missing.nonzero().squeeze(1) if rows.device.type == "cpu" else slice(None)
        equal = rows[short] == bound[short].unsqueeze(1)
        chosen[short] |= equal & (equal.cumsum(1, dtype=torch.int32) <= missing[short].unsqueeze(1))
        return chosen.reshape(units.shape)

    def exchange(self, chosen: Tensor, wanted: Tensor) -> Tensor:
        counts = chosen.flatten(1).sum(1)
        if int(counts.max() - counts.min()) <= 1:
            return super().exchange(chosen, wanted)
        return exchanged_within(chosen.flatten(1), wanted.flatten(1)).reshape(chosen.shape)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen


def _ranked(rows: Tensor, rank: int) -> Tensor:
    """The score of each row that `rank` others come before."""
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):  # NumPy is five times as fast
        place = rows.shape[1] - 1 - rank
        return torch.from_numpy(np.partition(rows.detach().numpy(), place, axis=1)[:, place].copy())
    return rows.kthvalue(rows.shape[1] - rank, dim=1).values
