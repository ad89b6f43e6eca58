"""Masks that scale what they keep, by what a scorer learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.core.gate import Gate, stretched
from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.masking.base import Groups, Masking, Params, latent, weights, with_gradients
from pl_sparse.scorer import HardConcrete, Scorer, SoftThreshold

__all__ = ["Gated", "SoftThresholded"]


_AJAR = 1e-2
"""The least gate in evaluation of a unit that is kept under a Lagrangian, so that as many are open as are kept."""


@register
@dataclass(frozen=True)
class Gated(Masking):
    """Weights are z v, z a hard concrete gate for each unit: a sample in training, deterministic everywhere else.

    The gradient of v is z times that of the weight; pruned v are trained too. Each optimizer step has one sample, the
    same for all examples, all micro-batches of an accumulation and all processes, as its random numbers depend on
    `seed`, the step and the weight's name alone. Once the schedule is over the gates are fixed and no longer sampled.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    equations 10 to 13. There evaluation uses parameters averaged over time; here `callbacks=ema` averages them.

    Args:
        seed: the seed of the samples.
    """

    seed: int = 0
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    rests_on: ClassVar[type[Scorer] | None] = HardConcrete

    def changed(self, params: Params, groups: Groups) -> None:
        self._end_sample(params, groups)
        super().changed(params, groups)

    def before_forward(self, params: Params, groups: Groups, step: int) -> None:
        for gate in {id(gate): gate for _, gate, _ in _gated(params, groups)}.values():
            mixed = (self.seed * 0x9E3779B1 + crc32(gate.name.encode()) * 0x85EBCA6B + step * 0xC2B2AE35) % 2**63
            generator = torch.Generator(gate.value.device).manual_seed(mixed)
            uniform = torch.rand(gate.value.shape, generator=generator, device=gate.value.device)
            gate.noise = (uniform * (1 - 2e-6) + 1e-6).to(gate.value.dtype)
            gate.sample = stretched(gate.value.detach(), gate.noise).clamp_(0, 1)
        self.write(params, groups)

    def after_forward(self, params: Params, groups: Groups) -> None:
        self._end_sample(params, groups)
        self.write(params, groups)

    @staticmethod
    def _end_sample(params: Params, groups: Groups) -> None:
        for _, gate, _ in _gated(params, groups):
            gate.noise = gate.sample = None

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        ready, gradients = with_gradients(params)
        if gradients:
            torch._foreach_mul_(gradients, self._gates(ready, groups))

    def after_step(self, params: Params, groups: Groups) -> None:
        self.store(params)
        self.after_forward(params, groups)

    def write(self, params: Params, groups: Groups) -> None:
        torch._foreach_copy_(weights(params), latent(params))
        torch._foreach_mul_(weights(params), self._gates(params, groups))

    def _gates(self, params: Params, groups: Groups) -> list[Tensor]:
        """z for each weight, in its shape; where it is not a sample, masked."""
        gates = {}
        for param, gate, layout in _gated(params, groups):
            if gate.sample is None:
                z = stretched(gate.value.detach()).clamp_(0.0 if gate.multipliers is None else _AJAR, 1)
                gates[id(param)] = param.part(gate.spread(z, param, layout)) * param.factor
            else:
                gates[id(param)] = param.part(gate.spread(gate.sample, param, layout))
        return [gates[id(param)] for param in params]


def _gated(params: Params, groups: Groups) -> Iterator[tuple[MaskedParameter, Gate, Layout]]:
    """Each of the weights with the gate of its group, and how the gate's units are seen in it."""
    wanted = {id(param) for param in params}
    for group in groups:
        for param, layout in group.members:
            if id(param) in wanted:
                assert group.gate is not None
                yield param, group.gate, layout


@register
@dataclass(frozen=True)
class SoftThresholded(Masking):
    """Weights are mask * sign(v) relu(|v| - sigmoid(s)), s the learned threshold of the tensor.

    Gradients reach v where the weight is not zero; the optimizer's momentum and weight decay act everywhere, as they do
    where the reparameterization is part of the model.

    Source: Kusupati et al., Soft threshold weight reparameterization for learnable sparsity, 2020, arXiv:2002.03231,
    equation 3.
    """

    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    rests_on: ClassVar[type[Scorer] | None] = SoftThreshold

    def write(self, params: Params, groups: Groups) -> None:
        for param, values in zip(params, latent(params), strict=True):
            threshold = param.state["threshold"].sigmoid().to(values.dtype)
            param.data.copy_(values.sign() * (values.abs() - threshold).clamp_min_(0) * param.factor)

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        for param in params:
            if param.grad is not None:
                param.grad.mul_(param.data.detach() != 0)
