"""Masks under which pruned weights continue to train."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim import SGD, Optimizer

from pl_sparse.core.parameter import kept_each
from pl_sparse.core.registry import register
from pl_sparse.core.topk import top_k
from pl_sparse.masking.base import Groups, Masking, Params, latent, weights, with_gradients

__all__ = ["SRSTE", "STE", "TopKAST"]

_EFOLDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*efolds?\s*")


@register
@dataclass(frozen=True)
class STE(Masking):
    """Straight-through estimator: the model computes with mask * v, the gradient there trains all of v.

    v <- optimizer(v, dL/d(mask * v)), also where the mask is 0, so that pruned weights keep learning and can return.

    Source: Bengio, Leonard, Courville, Estimating or propagating gradients through stochastic neurons, 2013,
    arXiv:1308.3432; for masks Zhou et al., Learning N:M fine-grained structured sparse networks from scratch, 2021,
    arXiv:2102.04010, equation 5.
    """

    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        return


@register
@dataclass(frozen=True)
class SRSTE(Masking):
    """Sparse-refined straight-through estimator: STE with a decay of the pruned weights.

    v <- optimizer(v, dL/d(mask * v) + decay * (1 - mask) * v). The term enters the gradient, and so the momentum, as in
    the paper; it keeps masks from changing back and forth. With decay 0 it is STE.

    Under SGD a value that stays masked falls by exp(-n) with n = decay * sum of rates / (1 - momentum): n is 60 for the
    paper's 120 epochs of ImageNet, and 0.1 to 0.2 in a training of a few thousand steps at 2e-4, where the term has
    almost no effect. A short training needs a decay that gives n = 5 to 60: decay="8 efolds" has n = 8 over the whole
    training, evenly, by decay = n (1 - momentum) / (rate steps) with the rate of each step. Under Adam the term is
    divided by the root of the second moment like the gradient, so that n does not apply.

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch, 2021,
    arXiv:2102.04010, equation 7.

    Args:
        decay: lambda, of masked weights; or "8 efolds" for SGD.
    """

    decay: float | str = 2e-4
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.decay, str) and not _EFOLDS.fullmatch(self.decay):
            raise ValueError(f"decay={self.decay!r} is not a decay: write a number such as 2e-4, or '8 efolds'")
        if not isinstance(self.decay, str) and self.decay < 0:
            raise ValueError(f"decay={self.decay!r} must not be negative")

    def optimizer_refusal(self, optimizer: Optimizer) -> str | None:
        if isinstance(self.decay, str) and not isinstance(optimizer, SGD):
            return (
                f"decay={self.decay!r} counts e-folds of SGD, and {type(optimizer).__name__} divides the term by the "
                "gradient's size: give a number, or use SGD"
            )
        return None

    def pace(self, params: Params, optimizer: Optimizer | None, total: int) -> None:
        match = _EFOLDS.fullmatch(self.decay) if isinstance(self.decay, str) else None
        if match is None:
            return
        if optimizer is None or (reason := self.optimizer_refusal(optimizer)) is not None:
            raise ValueError(
                reason or f"decay={self.decay!r} depends on the learning rate: give before_step(..., optimizer=...)"
            )
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        for param in params:
            group = groups[id(param.weight)]
            decay = float(match[1]) * (1 - group["momentum"]) / (max(float(group["lr"]), 1e-30) * total)
            param.state["decay"] = torch.tensor(decay, dtype=param.weight.dtype, device=param.weight.device)

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        ready, gradients = with_gradients(params)
        if gradients and isinstance(self.decay, str):
            behind = torch._foreach_sub(latent(ready), weights(ready))
            torch._foreach_addcmul_(gradients, behind, [param.state["decay"].expand_as(param.data) for param in ready])
        elif gradients:  # the weight is mask * v, so that v - weight is what is behind the mask
            assert not isinstance(self.decay, str)
            torch._foreach_add_(gradients, latent(ready), alpha=self.decay)
            torch._foreach_sub_(gradients, weights(ready), alpha=self.decay)


@register
@dataclass(frozen=True)
class TopKAST(Masking):
    """Always sparse training: the model computes with a set A of weights, the gradient trains a larger set B.

    A is the mask; B adds to it the best `exploration` of all weights by |v|, per tensor. Outside of B nothing is
    trained. The penalty reg (|v_A|^2 + |v_{B without A}|^2 / density) / 2 enters the gradient, so that exploring
    weights must have large gradients to stay. B is chosen when the mask is.

    Source: Jayakumar et al., Top-KAST: Top-K always sparse training, 2020, arXiv:2106.03517, sections 2.1 to 2.3.

    Args:
        exploration: the part of all weights that B has beyond A, in [0, 1].
        reg: the weight of the penalty.
    """

    exploration: float = 0.1
    reg: float = 1e-4
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration={self.exploration!r} must be in [0, 1]")
        if self.reg < 0:
            raise ValueError(f"reg={self.reg!r} must not be negative")

    def on_change(self, params: Params) -> None:
        for param, kept in zip(params, kept_each(params), strict=True):
            magnitude = param.values.abs().masked_fill_(param.mask, float("inf"))
            trained = top_k(magnitude, min(kept + round(self.exploration * param.numel), param.numel))
            density = max(kept / param.numel, 1 / param.numel)
            param.state["trained"] = trained.to(param.weight.dtype)
            param.state["penalty"] = self.reg * torch.where(param.mask, 1.0, trained / density).to(param.weight.dtype)

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        ready, gradients = with_gradients(params)
        if gradients:
            torch._foreach_mul_(gradients, [param.state["trained"] for param in ready])
            torch._foreach_addcmul_(gradients, latent(ready), [param.state["penalty"] for param in ready])

    def store(self, params: Params) -> None:
        trained = [param.state["trained"] for param in params]
        torch._foreach_lerp_(latent(params), weights(params), trained)  # latent <- weight where it is trained
        torch._foreach_copy_(weights(params), latent(params))
