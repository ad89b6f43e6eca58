"""The weights of a model that are pruned, with their masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.cut import Cut
from pl_sparse.core.group import Group
from pl_sparse.core.optimizers import owned_by
from pl_sparse.core.parameter import MaskedParameter, kept_each
from pl_sparse.core.places import Places
from pl_sparse.core.sharded import ShardedParameter
from pl_sparse.core.targets import Choice

__all__ = ["MaskedModel"]


class MaskedModel:
    """Weights that are bound to masks: how many there are, who trains them, what was taken out of them.

    Attributes:
        params: the weights.
        companions: what is masked along with them without being counted: biases and norms of coupled channels.
        groups: what is pruned together.
        cuts: what was taken out of parameters and buffers, by name.
        misfits: why a weight that was asked for is not pruned by the structure, by name.
        choice: what targets chose, and left out.
        shared: whether processes share a weight, of which each holds a part.
    """

    def __init__(self) -> None:
        self.params: list[MaskedParameter] = []
        self.companions: list[MaskedParameter] = []
        self.groups: list[Group] = []
        self.cuts: dict[str, Cut] = {}
        self.misfits: dict[str, str] = {}
        self.choice = Choice()
        self.shared = False
        self._places: Places | None = None  # of the model, as it was looked at last
        # What each optimizer owned when it was asked last, by its identity, with the lists that it was asked of.
        self._owned: dict[int, tuple[Optimizer, list[tuple[list[Tensor], int]], list[MaskedParameter]]] = {}

    def bind(self, groups: list[Group], misfits: dict[str, str], choice: Choice | None = None) -> None:
        """Take up the weights of these groups."""
        self.groups, self.misfits, self._owned = groups, misfits, {}
        self.choice = Choice() if choice is None else choice
        self.params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
        self.companions = list(dict.fromkeys(param for group in groups for param, _ in group.companions))
        self.shared = any(isinstance(param, ShardedParameter) for param in self.params)

    @property
    def attached(self) -> bool:
        """Whether the weights of a model are bound."""
        return bool(self.params)

    @property
    def moved(self) -> bool:
        """Whether the model has replaced, added or removed parameters or submodules since it was looked at last."""
        return self.attached and self._places is not None and not self._places.hold

    @property
    def skipped(self) -> dict[str, str]:
        """Why a weight that no pattern excludes is not pruned, by name: frozen ones, look-up tables, misfits."""
        return {**self.choice.left_out, **self.misfits}

    @property
    def dense(self) -> dict[str, str]:
        """`skipped`, by the name of an earlier release."""
        return self.skipped

    @property
    def coverage(self) -> float:
        """The pruned weights over the weights there are: all parameters with two or more dimensions but look-up tables
        and the like, frozen and excluded ones included."""
        total = sum(self.choice.sizes.values())
        pruned = sum(self.choice.sizes.get(param.name, 0) for param in self.params)
        return pruned / total if total else 1.0

    @property
    def uncovered(self) -> dict[str, str]:
        """The part of `skipped` that `coverage` is reduced by."""
        return {name: reason for name, reason in self.skipped.items() if name in self.choice.sizes}

    @property
    def masked(self) -> list[MaskedParameter]:
        """All that has a mask: the weights, and their companions."""
        return [*self.params, *self.companions]

    def refuse_unfollowed(self) -> bool:
        """Refuse to speak of a model that lost weights, or parts of them, while their masks stayed as they were.

        Returns:
            `moved`.

        Raises:
            RuntimeError: a weight and its mask have different shapes, or a pruned weight is gone.
        """
        for param in () if self.shared else self.masked:
            if param.mask.shape != param.weight.shape:
                raise RuntimeError(
                    f"{param.name} has shape {tuple(param.weight.shape)} and its mask {tuple(param.mask.shape)}: the "
                    "model was shrunk, and the pruner was not. Call pruner.shrink(result.plan.tensors) after "
                    "result = shrink(model, ...)"
                )
        return self.moved

    @property
    def kept(self) -> int:
        """How many weights the masks keep."""
        self.refuse_unfollowed()
        return sum(kept_each(self.params))

    @property
    def numel(self) -> int:
        """How many weights can be pruned."""
        self.refuse_unfollowed()
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
        if cached is not None and cached[0] is optimizer and len(cached[1]) == len(groups):
            for (weights, size), group in zip(cached[1], groups, strict=True):
                if weights is not group["params"] or size != len(weights):
                    break
            else:
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
