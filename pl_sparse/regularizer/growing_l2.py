"""A growing decay of the weights that are to be pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.registry import register
from pl_sparse.regularizer.base import members
from pl_sparse.regularizer.selecting import Selecting
from pl_sparse.scorer import Magnitude

__all__ = ["GrowingL2"]


@register
@dataclass(frozen=True, kw_only=True)
class GrowingL2(Selecting):
    """lambda / 2 sum w^2 over the weights of least magnitude, with a lambda that grows: they fade out before they are
    pruned.

    lambda = min(strength * (1 + step // every), ceiling), with `step` counted from where the penalty begins. The
    weights are chosen once, at that point: those that magnitude pruning with this structure and allocation would
    remove.

    Source: Wang et al., Neural pruning via growing regularization, 2020, arXiv:2012.09243, Algorithm 1 (GReg-1), which
    begins with a trained model, takes the same fraction of every layer, holds lambda at its ceiling until the weights
    have settled, and prunes then. Here the penalty grows from its beginning to its end (`until`), and the schedule
    decides when weights are pruned.

    Args:
        sparsity: the fraction of the weights that is penalized.
        structure: what is penalized together.
        allocation: how the weights that are not penalized are shared among tensors.
        every: optimizer steps between two raises.
        ceiling: the largest lambda.
    """

    strength: float = 1e-3
    every: int = 10
    ceiling: float = 1.0

    def start(self, groups: Sequence[Group]) -> None:
        self.select(groups, Magnitude().score)

    def factor(self, step: int) -> float:
        """lambda at an optimizer step.

        >>> [GrowingL2(strength=0.1, sparsity=0.5, every=2, ceiling=0.25).factor(step) for step in range(5)]
        [0.1, 0.1, 0.2, 0.2, 0.25]
        """
        return min(self.strength * (1 + step // self.every), self.ceiling)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for param in members(groups):
            if param.weight.grad is not None:
                param.weight.grad.addcmul_(param.weight.detach(), 1 - param.factor, value=self.factor(step))

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        squares = [(param.weight * (1 - param.factor)).square().sum() for param in members(groups)]
        return self.factor(step) / 2 * torch.stack(squares).sum()
