"""Scores by the inputs of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import Probe
from pl_sparse.scorer.base import Scorer, observed

__all__ = ["RIA", "Wanda"]


@register
@dataclass(frozen=True)
class Wanda(Scorer):
    """|w_ij| |x_j|_2, with x_j the j-th input of the layer over all calibration samples and positions.

    For `structure=row`, which compares weights within each output, and `allocation=uniform`, on a trained model. A
    convolution's inputs are unfolded, so that j counts (in, *kernel). Weights whose inputs are not seen (see
    `Probe.activations`) score |w|.

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    equation 1. There a transformer block sees the outputs of the pruned blocks before it; here all layers see the
    outputs of the unpruned model.
    """

    calibrates: ClassVar[bool] = True
    sees_inputs: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        norms = _input_norms(params, probe)
        for param in params:
            score = self.importance(param.layout.view(param.values.abs()), norms.get(param.name))
            param.state["calibrated"] = param.layout.restore(score, param.shape).clone()

    def importance(self, magnitude: Tensor, norms: Tensor | None) -> Tensor:
        """The scores of a weight.

        Args:
            magnitude: |w|, (out, in / groups, *kernel).
            norms: |x_j| of each group of the layer, (groups, in / groups, *kernel); None: not seen.
        """
        return magnitude if norms is None else magnitude * _spread(norms, magnitude)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")


@register
@dataclass(frozen=True)
class RIA(Wanda):
    """(|w_ij| / sum_k |w_ik| + |w_ij| / sum_k |w_kj|) |x_j|_2^power: the shares of a weight in its output's and its
    input's weights.

    In a convolution with groups the weights of an input are those of its group. Wanda can remove whole channels of
    small weights; this score keeps a part of them. All else is as in Wanda.

    Source: Zhang et al., Plug-and-play: an efficient post-training pruning method for large language models, ICLR 2024,
    equations 3 and 4. The permutation of channels for n:m patterns is not implemented.

    Args:
        power: the exponent of the inputs' norms.
    """

    power: float = 0.5

    def importance(self, magnitude: Tensor, norms: Tensor | None) -> Tensor:
        groups = 1 if norms is None else len(norms)
        weights = magnitude.unflatten(0, (groups, -1)).flatten(2)  # (groups, out / groups, columns)
        tiny = torch.finfo(weights.dtype).tiny
        score = weights / weights.sum(2, keepdim=True).clamp_min(tiny)
        score = (score + weights / weights.sum(1, keepdim=True).clamp_min(tiny)).reshape(magnitude.shape)
        return score if norms is None else score * _spread(norms.pow(self.power), magnitude)


def _input_norms(params: Sequence[MaskedParameter], probe: Probe) -> dict[str, Tensor]:
    """|x_j| over all samples and positions, by the name of the weight that it is multiplied with."""
    sums = probe.sums(params, lambda x: x.square().sum(1), lambda size: size)
    return {p.name: squares.sqrt() for p, squares in zip(params, sums, strict=True) if squares is not None}


def _spread(norms: Tensor, weights: Tensor) -> Tensor:
    """The norms of the inputs of each output."""
    return norms.repeat_interleave(len(weights) // len(norms), 0).to(weights.dtype)
