"""The L1 norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.group import Group
from pl_sparse.core.registry import register
from pl_sparse.regularizer.base import Regularizer, members, step_sizes

__all__ = ["L1"]


@register
@dataclass(frozen=True, kw_only=True)
class L1(Regularizer):
    """strength * sum |w|.

    Proximal: w <- sign(w) max(|w| - eta strength, 0), which makes weights exactly zero. Else by the subgradient
    sign(w), which does not. With Adam, weights that never had a gradient have a huge eta and become zero first.

    Sources: Tibshirani, Regression shrinkage and selection via the lasso, 1996; the proximal step: Parikh, Boyd,
    Proximal algorithms, 2014, section 6.5.2.

    Args:
        strength: the factor of the penalty.
        proximal: whether weights are shrunk by the proximal step; by the subgradient otherwise.
    """

    strength: float = 1e-4
    proximal: bool = True

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        if not self.proximal:
            for param in members(groups):
                if param.weight.grad is not None:
                    param.weight.grad.add_(param.weight.detach().sign(), alpha=self.strength)

    def prox(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        if self.proximal:
            weights = [param.weight for param in members(groups)]
            for weight, eta in zip(weights, step_sizes(optimizer, weights), strict=True):
                weight.copy_(weight.sign() * (weight.abs() - eta * self.strength).clamp_min_(0))

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * torch.stack([param.weight.abs().sum() for param in members(groups)]).sum()
