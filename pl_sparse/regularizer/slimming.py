"""The scales of batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import NORMS
from pl_sparse.regularizer.base import Regularizer, members

__all__ = ["Slimming"]


@register
@dataclass(frozen=True, kw_only=True)
class Slimming(Regularizer):
    """strength * sum |gamma| over the scales of all batch norms, by its subgradient; `scorer=slimming` then prunes by
    them.

    The subgradient makes no scale exactly zero; pruning then makes the channel's weights zero. The norm of a pruned
    channel still emits the constant (0 - mean) gamma / std + beta, which stays in the model until the channel is
    removed.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017, arXiv:1708.06519,
    equation 1.

    Raises:
        ValueError: the model has no batch norm.
    """

    strength: float = 1e-4

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        scales = [
            MaskedParameter(f"{path}.weight", module, module.weight, torch.ones_like(module.weight, dtype=torch.bool))
            for path, module in model.named_modules()
            if isinstance(module, NORMS) and module.affine
        ]
        if not scales:
            raise ValueError(
                "network slimming penalizes the scales of batch norms, and the model has none: use a model with batch "
                "norm, or regularizer=group_lasso"
            )
        return super().groups(scales, model)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for param in members(groups):
            if param.weight.grad is not None:
                param.weight.grad.add_(param.weight.detach().sign(), alpha=self.strength)

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * torch.stack([param.weight.abs().sum() for param in members(groups)]).sum()
