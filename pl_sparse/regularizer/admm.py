"""A quadratic penalty on the distance to the nearest sparse weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.regularizer.base import members
from pl_sparse.regularizer.selecting import Selecting

__all__ = ["ADMM"]


@register
@dataclass(frozen=True, kw_only=True)
class ADMM(Selecting):
    """rho / 2 |W - Z + U|^2, Z the nearest sparse weights and U the sum of the differences W - Z.

    At its beginning Z is the projection of W, and U is zero. Every `every` optimizer steps

        Z <- projection of W + U,    U <- U + W - Z

    The projection keeps the units of largest mean square, as many as structure and allocation set. So W trains dense
    and is drawn to a sparse set of any structure; a schedule then prunes the small remainder. Z and U are one tensor S
    = W + U: Z is its kept part and U the rest.

    Source: Zhang et al., A systematic DNN weight pruning framework using alternating direction method of multipliers,
    2018, arXiv:1804.03294, equations 4 to 9. There rho is the same for all layers of a model, or a few hand-set ones.

    Args:
        strength: rho, the strength of the pull towards Z.
        sparsity: the sparsity of Z.
        structure: the structure of Z.
        allocation: how Z shares its weights among tensors. With several optimizers each shares among its own.
        every: optimizer steps between two projections.
    """

    strength: float = 1e-3
    every: int = 50
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def start(self, groups: Sequence[Group]) -> None:
        self._sums.clear()
        self._project(groups)
        for param in members(groups):
            self._sums[param.name].mul_(param.factor)  # U = 0

    def _project(self, groups: Sequence[Group]) -> None:
        """S <- W + U, and the masks of Z."""
        for param in members(groups):
            total = param.weight.detach().clone()
            if param.name in self._sums:
                total.addcmul_(self._sums[param.name], 1 - param.factor)
            self._sums[param.name] = total
        self.select(groups, lambda param: self._sums[param.name].square())

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums.update(state["sums"])

    def _distance(self, param: MaskedParameter) -> Tensor:
        """W - Z + U."""
        total = self._sums[param.name] = self._sums[param.name].to(param.weight)
        return param.weight.detach() - total * (2 * param.factor - 1)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        if step and step % self.every == 0:
            self._project(groups)
        for param in members(groups):
            if param.weight.grad is not None:
                param.weight.grad.add_(self._distance(param), alpha=self.strength)

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        if not self._sums:
            return torch.zeros(())
        squares = [self._distance(param).square().sum() for param in members(groups)]
        return self.strength / 2 * torch.stack(squares).sum()
