"""Masks that scale what they keep, by what a scorer learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.core.gate import Gate, stretched
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.masking.base import Masking, Params, _latent, _weights
from pl_sparse.scorer import HardConcrete, Scorer, SoftThreshold

__all__ = ["Gated", "Shrunk"]


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
