"""How a mask acts on training, around the optimizer step.

Between two optimizer steps the parameters are the sparse weights and their gradients the dense gradients. Around a step
a masking may put other values into the parameters (latent ones) and shape the gradients. It handles many weights at
once, so that a step costs a few kernels, not a few for each weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.exposed import conceal, expose
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter, zero_pruned
from pl_sparse.core.registry import Axes, Axis, name_of
from pl_sparse.core.sharded import whole
from pl_sparse.scorer import Scorer

__all__ = ["Groups", "Masking", "Params", "latent", "mask_gradients", "weights"]

Params = Sequence[MaskedParameter]
"""Weights that have been pruned before."""

Groups = Sequence[Group]
"""All groups of the pruner, for maskings that apply what is learned of a group's units."""


@dataclass(frozen=True)
class Masking(Axis, ABC):
    """How a mask acts on training. All methods get weights that have been pruned before, and no others.

    A step of the optimizer is `shape_gradients`, `before_step`, the optimizer's own, `after_step`.

    Attributes:
        remembers: whether the values behind the mask are kept, in `MaskedParameter.latent`, so that weights can return;
            their optimizer state is then kept, too.
        trains_pruned: whether the values behind the mask are trained.
        transforms: whether kept weights also differ from the values behind them.
        from_start: whether it acts from the first step on, before anything is pruned.
        leads: whether masks that are due are set before the forward pass, so that they are those of the values there.
        samples: whether the model computes with a sample in training, drawn by `before_forward`.
        rests: whether pruned weights, their gradients and their momentum are zero, so that a step which uses only these
            leaves them at zero and `after_step` has nothing to do.
        rests_on: the scorer it needs, if it needs one.
    """

    axis: ClassVar[str] = "masking"
    remembers: ClassVar[bool] = False
    trains_pruned: ClassVar[bool] = False
    transforms: ClassVar[bool] = False
    from_start: ClassVar[bool] = False
    leads: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    rests: ClassVar[bool] = False
    rests_on: ClassVar[type[Scorer] | None] = None

    def changed(self, params: Params, groups: Groups) -> None:
        """After the masks changed: write the sparse weights into the parameters."""
        if not params:
            return
        if self.remembers:
            for param in params:
                if param.latent is None:
                    param.latent = self.behind(param.data.detach()).clone()
            torch._foreach_copy_(weights(params), latent(params))
        self.write(params, groups)
        with whole(params):
            self.on_change(params)

    def behind(self, weight: Tensor) -> Tensor:
        """The latent values of weights that are not masked; by default they themselves."""
        return weight

    def on_change(self, params: Params) -> None:
        """After the masks changed and the sparse weights are written; by default nothing is done."""
        return

    def before_forward(self, params: Params, groups: Groups, step: int) -> None:
        """Before the forward pass of training, where it `samples`: write the sample of this step into the parameters.

        It may be called again within a step (accumulation), and then writes the same sample.
        """
        return

    def after_forward(self, params: Params, groups: Groups) -> None:
        """Where it `samples`: write the sparse weights into the parameters again."""
        return

    def optimizer_refusal(self, optimizer: Optimizer) -> str | None:
        """Why it cannot act on weights that an optimizer trains, or None."""
        return None

    def pace(self, params: Params, optimizer: Optimizer | None, total: int) -> None:
        """Before `shape_gradients`: look at the rates of a training of `total` steps; by default nothing is done."""
        return

    @abstractmethod
    def shape_gradients(self, params: Params, groups: Groups) -> None:
        """Before the optimizer step, and before gradients are clipped: change the gradients."""

    def before_step(self, params: Params) -> None:
        """After `shape_gradients`: put latent values into the parameters, where pruned weights are trained."""
        if self.trains_pruned:
            expose(params, self._in_place)

    def after_step(self, params: Params, groups: Groups) -> None:
        """After the optimizer step: store latent values, write the sparse weights into the parameters."""
        if self.remembers:
            self.store(params)
        self.write(params, groups)

    def store(self, params: Params) -> None:
        """Keep the values that the optimizer wrote as the latent ones."""
        conceal(params)

    def write(self, params: Params, groups: Groups) -> None:
        """Turn parameters that hold latent values, or what the optimizer wrote, into the sparse weights."""
        zero_pruned(weights(params), params, latent(params) if self._in_place else None)

    @property
    def _in_place(self) -> bool:
        """Whether an optimizer may step the latent values themselves: nothing of one's own follows the step."""
        own = (getattr(type(self), name) is not getattr(Masking, name) for name in ("after_step", "store", "write"))
        return self.trains_pruned and not any(own)

    def refusal(self, axes: Axes) -> str | None:
        if self.rests_on is not None and not isinstance(axes.scorer, self.rests_on):
            return (
                f"masking={name_of(self)} applies what scorer={self.rests_on.__name__.lower()} learns, not "
                f"scorer={name_of(axes.scorer)}: use masking=auto"
            )
        if self.transforms and axes.structure.joins:
            return (
                f"masking={name_of(self)} learns for each layer on its own what it keeps, so that what is joined "
                "through several cannot be pruned together: use structure=channel with coupled=false"
            )
        return None


def weights(params: Params) -> list[Tensor]:
    """The parameters."""
    return [param.data for param in params]


def latent(params: Params) -> list[Tensor]:
    """The latent values."""
    return [param.latent for param in params if param.latent is not None]


def with_gradients(params: Params) -> tuple[list[MaskedParameter], list[Tensor]]:
    """The weights that took part in the loss, and their gradients."""
    ready, gradients = [], []
    for param in params:
        if (gradient := param.grad) is not None:
            ready.append(param)
            gradients.append(gradient)
    return ready, gradients


def mask_gradients(params: Params) -> None:
    """Set the gradients of pruned weights to zero, infinite and NaN ones too."""
    ready, gradients = with_gradients(params)
    if gradients:
        zero_pruned(gradients, ready)
