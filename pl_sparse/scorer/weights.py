"""Scores by the weights themselves, by nothing at all, or by what scales them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import NORMS, Probe
from pl_sparse.scorer.base import Scorer, observed

__all__ = ["Magnitude", "Random", "Slimming"]


@register
@dataclass(frozen=True)
class Magnitude(Scorer):
    """|w|.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626.
    """

    pointwise: ClassVar[bool] = True

    def score(self, param: MaskedParameter) -> Tensor:
        return param.values.abs()


@register
@dataclass(frozen=True)
class Random(Scorer):
    """A uniform random number that stays the same for a weight: the control for every method.

    The numbers depend on `seed` and the weight's name alone, so that all processes agree on them.

    Args:
        seed: the seed of the numbers.
    """

    seed: int = 0

    def score(self, param: MaskedParameter) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + crc32(param.name.encode())) % 2**63)
        return torch.rand(param.shape, generator=generator).to(param.weight.device, non_blocking=True)


@register
@dataclass(frozen=True)
class Slimming(Scorer):
    """|gamma| of the batch norm that takes a layer's output, the same for all weights of an output channel.

    A forward pass shows which norm that is. Layers without a norm after them score above all others, so that one
    threshold prunes them last; leave them out by `exclude`. The channel with the largest scale of each layer also
    scores above the others, so that no layer is removed as a whole. For `structure=channel allocation=global`, after
    training with the penalty `regularizer=slimming`.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017, arXiv:1708.06519,
    section 3, which has no such guard.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        if not any(isinstance(module, NORMS) for module in probe.model.modules()):
            raise ValueError(
                "scorer=slimming ranks channels by the batch norm after their layer, and the model has none: use a "
                "model with batch norm, or scorer=magnitude"
            )
        norms = probe.following_norms([param.module for param in params])
        shapes = [param.layout.shape_of(param.shape) for param in params]
        scales: list[Tensor | None] = []
        for param, shape in zip(params, shapes, strict=True):
            scale = getattr(norms.get(param.module), "weight", None)
            scales.append(scale.detach().abs() if scale is not None and len(scale) == shape[0] else None)
        top = 1 + max((float(scale.max()) for scale in scales if scale is not None), default=0.0)
        for param, shape, scale in zip(params, shapes, scales, strict=True):
            each = torch.full((shape[0],), 2 * top, device=param.weight.device) if scale is None else scale.clone()
            if scale is not None:
                each[each.argmax()] = 3 * top
            spread = each.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
            param.state["calibrated"] = param.layout.restore(spread, param.shape).to(param.values.dtype).clone()

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")
