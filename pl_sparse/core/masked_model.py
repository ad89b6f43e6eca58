"""The weights of a model that are pruned, with their masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.cut import Cut
from pl_sparse.core.group import Group
from pl_sparse.core.optimizers import owned_by
from pl_sparse.core.parameter import MaskedParameter

__all__ = ["MaskedModel"]


class MaskedModel:
    """Weights that are bound to masks: how many there are, who trains them, what was taken out of them.

    Attributes:
        params: the weights.
        companions: what is masked along with them without being counted: biases and norms of coupled channels.
        groups: what is pruned together.
        cuts: what was taken out of parameters and buffers, by name.
        skipped: why a weight that was asked for is not pruned, by name.
    """

    def __init__(self) -> None:
        self.params: list[MaskedParameter] = []
        self.companions: list[MaskedParameter] = []
        self.groups: list[Group] = []
        self.cuts: dict[str, Cut] = {}
        self.skipped: dict[str, str] = {}
        # What each optimizer owned when it was asked last, by its identity, with the lists that it was asked of.
        self._owned: dict[int, tuple[Optimizer, list[tuple[list[Tensor], int]], list[MaskedParameter]]] = {}

    def bind(self, groups: list[Group], skipped: dict[str, str]) -> None:
        """Take up the weights of these groups."""
        self.groups, self.skipped, self._owned = groups, skipped, {}
        self.params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
        self.companions = list(dict.fromkeys(param for group in groups for param, _ in group.companions))

    @property
    def attached(self) -> bool:
        """Whether the weights of a model are bound."""
        return bool(self.params)

    @property
    def masked(self) -> list[MaskedParameter]:
        """All that has a mask: the weights, and their companions."""
        return [*self.params, *self.companions]

    @property
    def kept(self) -> int:
        """How many weights the masks keep."""
        return sum(param.kept for param in self.params)

    @property
    def numel(self) -> int:
        """How many weights can be pruned."""
        return sum(param.numel for param in self.params)

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that the masks remove."""
        return 1 - self.kept / self.numel if self.params else 0.0

    def weights_of(self, optimizer: Optimizer | None) -> list[MaskedParameter]:
        """The prunable weights that an optimizer trains by now; None: all of them.

        It is asked at each step, and looked up again where parameter groups came, grew or were replaced.
        """
        if optimizer is None:
            return self.params
        groups = optimizer.param_groups
        cached = self._owned.get(id(optimizer))
        if (
            cached is not None
            and cached[0] is optimizer
            and len(cached[1]) == len(groups)
            and all(
                weights is group["params"] and size == len(weights)
                for (weights, size), group in zip(cached[1], groups, strict=True)
            )
        ):
            return cached[2]
        lists = [(group["params"], len(group["params"])) for group in groups]
        owned = owned_by(optimizer, self.params)
        self._owned[id(optimizer)] = optimizer, lists, owned
        return owned

    def companions_of(self, optimizer: Optimizer | None) -> list[MaskedParameter]:
        """The companions that an optimizer trains; None: all of them."""
        return self.companions if optimizer is None or not self.companions else owned_by(optimizer, self.companions)

    @torch.no_grad()
    def remove(self, cuts: Mapping[str, Cut]) -> None:
        """Take the same out of masks, and of all that goes with them, as was taken out of the weights by name."""
        for param in self.masked:
            if param.name in cuts:
                param.shrink(cuts[param.name])
        self.cuts = {**self.cuts, **{n: self.cuts[n].then(cut) if n in self.cuts else cut for n, cut in cuts.items()}}

    @torch.no_grad()
    def unshrink(self) -> None:
        """Take every removal back, for weights that have their former shape again."""
        for param in self.masked:
            param.unshrink()
        self.cuts = {}
