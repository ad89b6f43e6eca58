"""What is pruned together: single weights, N:M groups, blocks, kernels, channels, attention heads.

A structure sees a tensor of scores as (out, in, *kernel), pools it to one score per unit, and turns chosen units back
into a mask. The score of a unit is the mean over its weights, so that units of different size can be compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Layout, Unoriented
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.parametrized import WHOLE
from pl_sparse.core.registry import Axis
from pl_sparse.core.topk import top_k

__all__ = ["Structure"]


@dataclass(frozen=True)
class Structure(Axis, ABC):
    """What is pruned together."""

    axis: ClassVar[str] = "structure"

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """The score of each unit; `scores` is (out, in, *kernel)."""

    def alive(self, mask: Tensor) -> Tensor:
        """Which units have a weight left in a mask of shape (out, in, *kernel), a bool tensor of the units' shape."""
        return self.pool(mask.float()) > 0

    def select(self, units: Tensor, keep: int) -> Tensor:
        """The bool mask of the `keep` best units, of the units' shape; ties to the lower index."""
        return top_k(units, keep)

    def exchange(self, chosen: Tensor, wanted: Tensor) -> Tensor:
        """As many units as are chosen, those that are wanted most; both of the units' shape."""
        return self.select(wanted, int(chosen.sum()))

    @abstractmethod
    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        """The mask of shape (out, in, *kernel) that keeps the chosen units; it may be a broadcast view."""

    def unfit(self, param: MaskedParameter) -> str | None:
        """Why a weight cannot be pruned so, or None."""
        if self.oriented and isinstance(param.layout, Unoriented):
            return (
                "which of its dimensions are outputs is not known: declare it by "
                f"layouts={{{param.name!r}: 'out_in'}} or 'in_out' (out_in_kernel and in_out_kernel for convolutions)"
            )
        if not self.spares(param) and (reason := divided([(param, param.layout)])) is not None:
            return reason
        return self.misfit(param.layout.shape_of(param.shape))

    def spares(self, param: MaskedParameter) -> bool:
        """Whether each slice along a normalized weight's `norm_dim` can keep a weight, whatever is pruned."""
        return False

    @property
    def oriented(self) -> bool:
        """Whether it tells the outputs of a weight from its inputs."""
        return True

    # The hooks below have a meaning for some structures only.

    def adapt(self, model: nn.Module) -> None:
        """Let a model that pruned weights were loaded into compute with them as the model did that was trained.

        Where zeros alone do not say it, hooks do. `groups` adds them to the model that it finds units of.
        """

    @property
    def adapts(self) -> bool:
        """Whether a model of the class computes something else with the pruned weights until `adapt` was called."""
        return type(self).adapt is not Structure.adapt

    def misfit(self, shape: torch.Size) -> str | None:
        """Why a tensor of shape (out, in, *kernel) cannot be pruned so, or None."""
        return None

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        """The weights whose units are chosen together; each alone unless the structure couples them.

        Args:
            example: inputs that the model can be called with, where `needs_example`; or None.
        """
        return [Group(param.name, ((param, param.layout),)) for param in params]

    def bind(
        self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None, misfit: str = "error"
    ) -> tuple[list[Group], dict[str, str]]:
        """The groups that can be pruned so, and by name why a weight is skipped.

        Args:
            params: the weights that are asked for.
            example: inputs that the model can be called with, where `needs_example`.
            misfit: "error", or "dense" to skip weights whose shape does not fit.

        Raises:
            ValueError: a weight does not fit, or none can be pruned.
        """
        skipped: dict[str, str] = {}
        for param in params:
            reason = self.unfit(param)
            if reason is not None:
                skipped[param.name] = reason
        fitting = [param for param in params if param.name not in skipped]
        if skipped and (misfit == "error" or not fitting):
            name, reason = next(iter(skipped.items()))
            shape = next(param.shape for param in params if param.name == name)
            more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
            raise ValueError(
                f"{name} of shape {'x'.join(map(str, shape))} cannot be pruned by structure={self.label}: "
                f"{reason}{more}. Leave such weights dense by misfit='dense', or this one by exclude=[{name!r}]"
            )
        groups = self.groups(fitting, model, example)
        for group in groups:
            if group.reason is not None:
                skipped |= dict.fromkeys((param.name for param, _ in group.members), group.reason)
        groups = [group for group in groups if group.reason is None]
        if not groups:
            raise ValueError("nothing to prune: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
        # of a layer that several groups share, one may be open and another not
        pruned = {param.name for group in groups for param, _ in group.members}
        skipped = dict.fromkeys((p.name for p in params), f"structure={self.label} has no unit in it") | skipped
        return groups, {name: reason for name, reason in skipped.items() if name not in pruned}

    @property
    def needs_whole(self) -> str | None:
        return "couples layers, which it calls the model for" if self.needs_example else None

    @property
    def needs_example(self) -> bool:
        """Whether `groups` calls the model, to find units that go through several layers."""
        return False

    @property
    def sees_example(self) -> bool:
        """Whether `groups` calls the model where it can be."""
        return self.needs_example

    @property
    def joins(self) -> bool:
        """Whether parameters that are not counted (biases, norms, rows of a router) are masked with the units of
        several layers."""
        return self.needs_example

    @property
    def fixed(self) -> float | None:
        """The sparsity that the pattern itself prescribes (N:M), or None."""
        return None

    @property
    def least(self) -> int:
        """How many units of each tensor are kept regardless of scores while the sparsity is below 1.

        Where whole outputs go, one: nothing passes through a layer without any.
        """
        return int(self.removes_outputs)

    @property
    def removes_outputs(self) -> bool:
        """Whether it removes whole outputs of a layer, which a classifier cannot spare."""
        return False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return type(self).__name__.lower()


def divided(members: Sequence[tuple[MaskedParameter, Layout]]) -> str | None:
    """Why weights do not stand that whole parts of them are pruned, or None: each part is divided by its norm."""
    if all(param.norm_dim in (None, WHOLE) for param, _ in members):
        return None
    return "it is divided by the norms of its parts, and 0 / 0 is not a number where all of a part is pruned"


def exchanged_within(chosen: Tensor, wanted: Tensor) -> Tensor:
    """As many as are chosen along the last dimension, those that are wanted most."""
    order = wanted.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) < chosen.sum(-1, keepdim=True)
