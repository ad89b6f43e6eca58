"""Prune, and update the other weights to compensate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation
from pl_sparse.core.group import Group
from pl_sparse.core.registry import register
from pl_sparse.scorer import Scorer
from pl_sparse.scorer.second_order import blocks, check_blocks, fisher_inverse, single_gradients
from pl_sparse.structure import Structure
from pl_sparse.updater.base import Update
from pl_sparse.updater.prune import Prune

__all__ = ["Surgeon"]


@register
@dataclass(frozen=True)
class Surgeon(Prune):
    """Keep the best scores, and update them by the optimal brain surgeon's step for all weights that are removed at
    once.

        w <- w - F^-1[:, Q] (F^-1[Q, Q])^-1 w[Q]

    within each block of weights, Q what is newly pruned in it and F the empirical Fisher matrix of the calibration
    batches (`scorer=fisher`), before the masks change. Any scorer and structure work; each block ignores weights that
    are pruned in other blocks. Masking must be hard.

    Source: Kurtic et al., The optimal BERT surgeon, 2022, arXiv:2203.07259, equation 5; WoodFisher (Singh, Alistarh,
    2020, arXiv:2004.14340) adds up the updates of single weights.

    Args:
        block: the number of weights in a block.
        damping: the number added to the diagonal of F.
    """

    block: int = 50
    damping: float = 1e-7
    needs_zeros: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    writes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_blocks(self.block, self.damping)

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        assert due.probe is not None
        params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
        gradients = single_gradients(params, due.probe)
        before = [param.mask.clone() for param in params]
        super().update(groups, scorer, structure, allocation, due)
        for param, of_param, kept in zip(params, gradients, before, strict=True):
            gone = (kept & ~param.mask).flatten()
            if not bool(gone.any()):
                continue
            values = torch.stack([param.weight.detach().flatten().double(), gone.double()])
            pieces = zip(blocks(of_param, self.block, self.block), blocks(values, self.block, self.block), strict=True)
            moved = torch.cat([self._moved(g, value[:, 0], value[:, 1]) for g, value in pieces])
            param.weight.copy_(moved.flatten()[: gone.numel()].reshape(param.shape) * param.mask)

    def _moved(self, gradients: Tensor, weights: Tensor, gone: Tensor) -> Tensor:
        """The weights of blocks, (blocks, size), once those where `gone` is 1 are removed."""
        inverse = fisher_inverse(gradients, self.damping)  # (blocks, size, size)
        among = inverse * gone.unsqueeze(-1) * gone.unsqueeze(-2) + torch.diag_embed(1 - gone)
        price = torch.linalg.solve(among, (gone * weights).unsqueeze(-1))
        return weights - (inverse @ (gone.unsqueeze(-1) * price)).squeeze(-1)
