"""Penalties on the weights that pruning to a sparsity would remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pl_sparse.allocation import Allocation, Global, Units, choose
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.regularizer.base import Regularizer, penalized_groups
from pl_sparse.structure import Structure, Unstructured

__all__ = ["Selecting"]


@dataclass(frozen=True, kw_only=True)
class Selecting(Regularizer):
    """A penalty that distinguishes weights to keep from others by masks of its own.

    Args:
        sparsity: the fraction of the others.
        structure: the structure of these masks.
        allocation: how what is kept is shared among tensors. With several optimizers each shares among its own.
        every: optimizer steps between two changes of the penalty.
    """

    sparsity: float
    structure: Structure = field(default_factory=Unstructured)
    allocation: Allocation = field(default_factory=Global)
    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity!r} must be in [0, 1]")
        if self.every < 1:
            raise ValueError(f"every={self.every!r} must be 1 or more optimizer steps")

    @property
    def removes_outputs(self) -> bool:
        return self.structure.removes_outputs

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        return penalized_groups(self.structure, params, model, example)

    def select(self, groups: Sequence[Group], score: Callable[[MaskedParameter], Tensor]) -> None:
        """Set the masks that keep what scores best."""
        level = self.sparsity if self.structure.fixed is None else self.structure.fixed
        choose(Units(groups, self.structure, score), self.allocation, level)
