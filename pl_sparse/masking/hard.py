"""Masks under which pruned weights rest: forgotten, or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pl_sparse.masking.base import Masking, Params, _factors, _latent, _mask_gradients, _weights

__all__ = ["Frozen", "Hard"]


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
