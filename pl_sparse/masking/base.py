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

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.scorer import Scorer

__all__ = ["Masking", "Params"]

Params = Sequence[MaskedParameter]


@dataclass(frozen=True)
class Masking(ABC):
    """How a mask acts on training. All methods get weights that have been pruned before, and no others.

    Attributes:
        remembers: whether the values behind the mask are kept, in `MaskedParameter.dense`, so that weights can return.
        trains_pruned: whether the values behind the mask are trained.
        clears_state: whether the optimizer's state (momentum and the like) of pruned weights is set to zero.
        transforms: whether kept weights too differ from the values behind them.
        samples: whether the model computes with a sample in training, drawn by `before_forward`.
        rests_on: the scorer it needs, if it needs one.
    """

    remembers: ClassVar[bool] = False
    trains_pruned: ClassVar[bool] = False
    clears_state: ClassVar[bool] = True
    transforms: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    rests_on: ClassVar[type[Scorer] | None] = None

    def changed(self, params: Params) -> None:
        """After the masks changed: write the sparse weights into the parameters."""
        if self.remembers:
            for param in params:
                if param.dense is None:
                    param.dense = param.weight.detach().clone()
            torch._foreach_copy_(_weights(params), _latent(params))
        torch._foreach_mul_(_weights(params), _factors(params))
        self.on_change(params)

    def on_change(self, params: Params) -> None:
        """After the masks changed and the sparse weights are written; by default nothing is done."""
        return

    def before_forward(self, params: Params, step: int) -> None:
        """Before the forward pass of training, where it `samples`: write the sample of this step into the parameters.

        It may be called again within a step (accumulation), and then writes the same sample.
        """
        return

    def after_forward(self, params: Params) -> None:
        """Where it `samples`: write the sparse weights into the parameters again."""
        return

    @abstractmethod
    def shape_gradients(self, params: Params) -> None:
        """Before the optimizer step, and before gradients are clipped: change the gradients."""

    @abstractmethod
    def before_step(self, params: Params) -> None:
        """Before the optimizer step, after `shape_gradients`: put latent values into the parameters."""

    @abstractmethod
    def after_step(self, params: Params) -> None:
        """After the optimizer step: store latent values, write the sparse weights into the parameters."""


def _weights(params: Params) -> list[Tensor]:
    return [param.weight for param in params]


def _factors(params: Params) -> list[Tensor]:
    return [param.factor for param in params]


def _latent(params: Params) -> list[Tensor]:
    return [param.dense for param in params if param.dense is not None]


def _mask_gradients(params: Params) -> None:
    gradients = [(param.weight.grad, param.factor) for param in params if param.weight.grad is not None]
    if gradients:
        torch._foreach_mul_([grad for grad, _ in gradients], [factor for _, factor in gradients])
