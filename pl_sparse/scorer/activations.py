"""Scores by the inputs of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import Probe
from pl_sparse.scorer.base import Scorer, observed

__all__ = ["Wanda"]


@register
@dataclass(frozen=True)
class Wanda(Scorer):
    """|w_ij| |x_j|_2, with x_j the j-th input of the layer over all calibration samples and positions.

    For `structure=row`, which compares weights within each output, and `allocation=uniform`, on a trained model. A
    convolution's inputs are unfolded, so that j counts (in, *kernel). Weights whose inputs are not seen (see
    `Probe.activations`) score |w|.

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    equation 1. There a transformer block sees the outputs of the blocks before it as they are once pruned; here all
    layers see those of the model as it is.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        sums = probe.sums(params, lambda x: x.square().sum(1), lambda size: size)
        for param, squares in zip(params, sums, strict=True):
            score = param.layout.view(param.values.abs())
            if squares is not None:
                norms = squares.sqrt()
                score = score * norms.repeat_interleave(len(score) // len(norms), 0).to(score.dtype)
            param.state["calibrated"] = param.layout.restore(score, param.shape).clone()

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")
