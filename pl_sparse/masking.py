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
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.gate import Gate, stretched
from pl_sparse.masked import MaskedParameter
from pl_sparse.scorer import HardConcrete, Scorer, SoftThreshold
from pl_sparse.topk import top_k

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
    trains_pruned: ClassVar[bool] = True
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


@dataclass(frozen=True)
class SRSTE(Masking):
    """Sparse-refined straight-through estimator: STE with a decay of the pruned weights.

    v <- optimizer(v, dL/d(mask * v) + decay * (1 - mask) * v). The term enters the gradient, and so the momentum, as in
    the paper; it keeps masks from changing back and forth. With decay 0 it is STE.

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch, 2021,
    arXiv:2102.04010, equation 7.
    """

    decay: float = 2e-4
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise ValueError(f"decay={self.decay!r} must not be negative")

    def shape_gradients(self, params: Params) -> None:
        ready = [param for param in params if param.weight.grad is not None]
        gradients = [param.weight.grad for param in ready if param.weight.grad is not None]
        if gradients:  # the weight is mask * v, so that v - weight is what is behind the mask
            torch._foreach_add_(gradients, _latent(ready), alpha=self.decay)
            torch._foreach_sub_(gradients, _weights(ready), alpha=self.decay)

    def before_step(self, params: Params) -> None:
        torch._foreach_copy_(_weights(params), _latent(params))

    def after_step(self, params: Params) -> None:
        weights = _weights(params)
        torch._foreach_copy_(_latent(params), weights)
        torch._foreach_mul_(weights, _factors(params))


@dataclass(frozen=True)
class TopKAST(Masking):
    """Always sparse training: the model computes with a set A of weights, the gradient trains a larger set B.

    A is the mask; B adds to it the best `exploration` of all weights by |v|, per tensor. Outside of B nothing is
    trained. The penalty reg (|v_A|^2 + |v_{B without A}|^2 / density) / 2 enters the gradient, so that what explores
    has to earn its place. B is chosen when the mask is.

    Source: Jayakumar et al., Top-KAST: Top-K always sparse training, 2020, arXiv:2106.03517, sections 2.1 to 2.3.

    Args:
        exploration: the part of all weights that B has beyond A, in [0, 1].
        reg: the weight of the penalty.
    """

    exploration: float = 0.1
    reg: float = 1e-4
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration={self.exploration!r} must be in [0, 1]")
        if self.reg < 0:
            raise ValueError(f"reg={self.reg!r} must not be negative")

    def on_change(self, params: Params) -> None:
        for param in params:
            magnitude = param.values.abs().masked_fill_(param.mask, float("inf"))
            count = min(param.kept + round(self.exploration * param.numel), param.numel)
            trained = top_k(magnitude, count)
            density = max(param.kept / param.numel, 1 / param.numel)
            param.state["trained"] = trained.to(param.weight.dtype)
            param.state["penalty"] = self.reg * torch.where(param.mask, 1.0, trained / density).to(param.weight.dtype)

    def shape_gradients(self, params: Params) -> None:
        ready = [param for param in params if param.weight.grad is not None]
        gradients = [param.weight.grad for param in ready if param.weight.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, [param.state["trained"] for param in ready])
            torch._foreach_addcmul_(gradients, _latent(ready), [param.state["penalty"] for param in ready])

    def before_step(self, params: Params) -> None:
        torch._foreach_copy_(_weights(params), _latent(params))

    def after_step(self, params: Params) -> None:
        weights = _weights(params)
        torch._foreach_lerp_(_latent(params), weights, [param.state["trained"] for param in params])
        torch._foreach_copy_(weights, _latent(params))
        torch._foreach_mul_(weights, _factors(params))


@dataclass(frozen=True)
class Gated(Masking):
    """Weights are z v, z a hard concrete gate for each unit: a sample in training, deterministic everywhere else.

    The gradient of v is z times that of the weight; pruned v are trained too. Each optimizer step has one sample, the
    same for all examples, all micro-batches of an accumulation and all processes, as its random numbers depend on
    `seed`, the step and the weight's name alone. Once the schedule is over the gates are fixed and no longer sampled.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    equations 10 to 13. There evaluation averages the parameters over time, for which there is `callbacks=ema`.

    Args:
        seed: of the samples.
    """

    seed: int = 0
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False
    transforms: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    rests_on: ClassVar[type[Scorer] | None] = HardConcrete

    def on_change(self, params: Params) -> None:
        self.after_forward(params)

    def before_forward(self, params: Params, step: int) -> None:
        for gate in {id(gate): gate for gate in map(_gate, params)}.values():
            mixed = (self.seed * 0x9E3779B1 + crc32(gate.group.name.encode()) * 0x85EBCA6B + step * 0xC2B2AE35) % 2**63
            generator = torch.Generator(gate.value.device).manual_seed(mixed)
            uniform = torch.rand(gate.value.shape, generator=generator, device=gate.value.device)
            gate.noise = (uniform * (1 - 2e-6) + 1e-6).to(gate.value.dtype)
            gate.sample = stretched(gate.value.detach(), gate.noise).clamp_(0, 1)
        torch._foreach_copy_(_weights(params), _latent(params))
        torch._foreach_mul_(_weights(params), self._factors(params))

    def after_forward(self, params: Params) -> None:
        for param in params:
            _gate(param).noise = _gate(param).sample = None
        torch._foreach_copy_(_weights(params), _latent(params))
        torch._foreach_mul_(_weights(params), self._factors(params))

    def shape_gradients(self, params: Params) -> None:
        ready = [param for param in params if param.weight.grad is not None]
        gradients = [param.weight.grad for param in ready if param.weight.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._factors(ready))

    def before_step(self, params: Params) -> None:
        torch._foreach_copy_(_weights(params), _latent(params))

    def after_step(self, params: Params) -> None:
        torch._foreach_copy_(_latent(params), _weights(params))
        self.after_forward(params)

    def _factors(self, params: Params) -> list[Tensor]:
        """z for each weight; where it is no sample, masked."""
        factors = []
        for param in params:
            gate = _gate(param)
            if gate.sample is None:
                z = stretched(gate.value.detach()).clamp_(0, 1)
                factors.append(gate.spread(z, param) * param.factor)
            else:
                factors.append(gate.spread(gate.sample, param))
        return factors


def _gate(param: MaskedParameter) -> Gate:
    assert param.gate is not None
    return param.gate


@dataclass(frozen=True)
class Shrunk(Masking):
    """Weights are mask * sign(v) relu(|v| - sigmoid(s)), s the learned threshold of the tensor.

    Gradients reach v where the weight is not zero; the optimizer's momentum and weight decay go on everywhere, as
    they do where the reparameterization is part of the model.

    Source: Kusupati et al., Soft threshold weight reparameterization for learnable sparsity, 2020, arXiv:2002.03231,
    equation 3.
    """

    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    clears_state: ClassVar[bool] = False
    transforms: ClassVar[bool] = True
    rests_on: ClassVar[type[Scorer] | None] = SoftThreshold

    def on_change(self, params: Params) -> None:
        for param, latent in zip(params, _latent(params), strict=True):
            threshold = param.state["threshold"].sigmoid().to(latent.dtype)
            param.weight.copy_(latent.sign() * (latent.abs() - threshold).clamp_min_(0) * param.factor)

    def shape_gradients(self, params: Params) -> None:
        for param in params:
            if param.weight.grad is not None:
                param.weight.grad.mul_(param.weight.detach() != 0)

    def before_step(self, params: Params) -> None:
        torch._foreach_copy_(_weights(params), _latent(params))

    def after_step(self, params: Params) -> None:
        torch._foreach_copy_(_latent(params), _weights(params))
        self.on_change(params)
