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

from pl_sparse.masked import MaskedParameter
from pl_sparse.scorer import Scorer

Params = Sequence[MaskedParameter]


@dataclass(frozen=True)
class Masking(ABC):
    """How a mask acts on training. All methods get weights that have been pruned before, and no others.

    Attributes:
        remembers: whether the values behind the mask are kept, in `MaskedParameter.dense`, so that weights can return.
        clears_state: whether the optimizer's state (momentum and the like) of pruned weights is set to zero.
    """

    remembers: ClassVar[bool] = False
    clears_state: ClassVar[bool] = True

    def changed(self, params: Params) -> None:
        """After the masks changed: write the sparse weights into the parameters."""
        if self.remembers:
            for param in params:
                if param.dense is None:
                    param.dense = param.weight.detach().clone()
            torch._foreach_copy_(_weights(params), _latent(params))
        torch._foreach_mul_(_weights(params), _factors(params))

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


@dataclass(frozen=True)
class Hard(Masking):
    """Pruned weights are zero and have no gradient: w <- mask * w after every step. They forget their values."""

    def shape_gradients(self, params: Params) -> None:
        _mask_gradients(params)

    def before_step(self, params: Params) -> None:
        return

    def after_step(self, params: Params) -> None:
        torch._foreach_mul_(_weights(params), _factors(params))


@dataclass(frozen=True)
class STE(Masking):
    """Straight-through estimator: the model computes with mask * v, the gradient there trains all of v.

    v <- optimizer(v, dL/d(mask * v)), also where the mask is 0, so that pruned weights keep learning and can return.

    Source: Bengio, Leonard, Courville, Estimating or propagating gradients through stochastic neurons, 2013,
    arXiv:1308.3432; for masks Zhou et al., Learning N:M fine-grained structured sparse networks from scratch, 2021,
    arXiv:2102.04010, equation 5.
    """

    remembers: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False

    def shape_gradients(self, params: Params) -> None:
        return

    def before_step(self, params: Params) -> None:
        torch._foreach_copy_(_weights(params), _latent(params))

    def after_step(self, params: Params) -> None:
        weights = _weights(params)
        torch._foreach_copy_(_latent(params), weights)
        torch._foreach_mul_(weights, _factors(params))


@dataclass(frozen=True)
class Frozen(Masking):
    """Pruned weights keep the value they had, untrained and undecayed, and return with it when the mask lets them.

    The optimizer sees mask * w and mask * gradient.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, section 3.
    """

    remembers: ClassVar[bool] = True

    def shape_gradients(self, params: Params) -> None:
        _mask_gradients(params)

    def before_step(self, params: Params) -> None:
        return

    def after_step(self, params: Params) -> None:
        weights, factors = _weights(params), _factors(params)
        torch._foreach_lerp_(_latent(params), weights, factors)  # dense <- weight where kept
        torch._foreach_mul_(weights, factors)


def auto(scorer: Scorer) -> Masking:
    """The masking a scorer needs: one that remembers the values of pruned weights where they are scored, else hard."""
    return Frozen() if scorer.needs_dense else Hard()
