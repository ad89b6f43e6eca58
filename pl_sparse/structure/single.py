"""Single weights: anywhere in a tensor, or as many in each of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.core.topk import top_k
from pl_sparse.structure.base import Structure

__all__ = ["Row", "Unstructured"]


@register
@dataclass(frozen=True)
class Unstructured(Structure):
    """Every weight is a unit of its own."""

    @property
    def oriented(self) -> bool:
        return False

    def spares(self, param: MaskedParameter) -> bool:
        return True

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen


@register
@dataclass(frozen=True)
class Row(Structure):
    """Single weights, as many in each output of a tensor (its rows).

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    section 3, which compares weights per output.

    >>> Row().select(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), keep=2).tolist()
    [[True, False], [True, False]]
    """

    def spares(self, param: MaskedParameter) -> bool:
        return param.norm_dim == param.layout.output_dim

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def select(self, units: Tensor, keep: int) -> Tensor:
        rows = units.flatten(1)
        each, more = divmod(keep, len(rows))
        order = rows.sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :each], True)
        if more:  # one more where that one is best
            rest = rows.gather(1, order[:, each : each + 1]).squeeze(1)
            lucky = top_k(rest, more)
            chosen[lucky, order[lucky, each]] = True
        return chosen.reshape(units.shape)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen
