"""Masks over weights that are a function of the values that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, register
from pl_sparse.masking.base import Groups, Masking, Params, latent, mask_gradients, with_gradients
from pl_sparse.structure import NM

__all__ = ["SSTE", "Powerprop"]


@register
@dataclass(frozen=True)
class Powerprop(Masking):
    """Weights are mask * v |v|^(alpha - 1), from the first step on: small weights learn slowly and gather at zero.

        dL/dv = alpha |v|^(alpha - 1) dL/dw  where the mask is 1

    v starts at sign(w) |w|^(1 / alpha), so that the network does not change at the start. The optimizer steps v, and
    weight decay acts on v. Pruned v get no gradient and are kept behind the mask. alpha = 1 is `masking=frozen`.

    Source: Schwarz et al., Powerpropagation: a sparsity inducing weight reparameterisation, 2021, arXiv:2110.00296,
    equation 1 and section 2.

    Args:
        alpha: the power, 1 or more.
    """

    alpha: float = 2.0
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    from_start: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.alpha >= 1:
            raise ValueError(f"alpha={self.alpha!r} must be 1 or more")

    def behind(self, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs() ** (1 / self.alpha)

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        ready, gradients = with_gradients(params)
        for gradient, values in zip(gradients, latent(ready), strict=True):
            gradient.mul_(values.abs() ** (self.alpha - 1)).mul_(self.alpha)
        mask_gradients(params)

    def write(self, params: Params, groups: Groups) -> None:
        for param, values in zip(params, latent(params), strict=True):
            param.data.copy_(values * values.abs() ** (self.alpha - 1))
        super().write(params, groups)


@register
@dataclass(frozen=True)
class SSTE(Masking):
    """Continuous N:M: weights are mask * beta sign(v) relu(|v| - t), t the largest |v| of their group that is pruned.

    So 2:4 weights are a continuous function of v, whereas those of a plain mask jump. beta = <v, S> / <S, S>, S the
    thresholded v, minimizes |v - beta S|^2 of a tensor when it is first pruned, and is then constant. The gradient at
    weights trains all of v, straight through. Masks must follow v at each step (`schedule.every=1`). Tensors whose
    inputs are not divisible by m have one threshold.

    Source: Hu, Zhu, Chen, S-STE: continuous pruning function for efficient 2:4 sparse pre-training, 2024,
    arXiv:2409.09099, sections 4.1 and 4.2; its unbiased sparse gradients and FP8 are not implemented.

    Args:
        m: the size of the pattern's groups.
    """

    m: int = 4
    remembers: ClassVar[bool] = True
    trains_pruned: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    leads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.m < 2:
            raise ValueError(f"m={self.m!r} must be 2 or more")

    def refusal(self, axes: Axes) -> str | None:
        if isinstance(axes.structure, NM) and axes.structure.m != self.m:
            return (
                f"masking=sste has groups of m={self.m}, structure={axes.structure.label} others: give both the same m"
            )
        return super().refusal(axes)

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        return

    def write(self, params: Params, groups: Groups) -> None:
        for param, values in zip(params, latent(params), strict=True):
            soft = values.sign() * (values.abs() - self._thresholds(param, values)).clamp_min_(0) * param.factor
            if "beta" not in param.state:
                square = soft.square().sum()
                beta = torch.where(square > 0, (values * soft).sum() / square, 1.0)
                param.state["beta"] = beta.to(values.dtype)
            param.data.copy_(soft.mul_(param.state["beta"]))

    def _thresholds(self, param: MaskedParameter, values: Tensor) -> Tensor:
        """The largest |v| that is pruned in the group of each weight, of the weight's shape or a scalar."""
        pruned = values.abs() * ~param.mask
        viewed = param.layout.view(pruned)  # (out, in, *kernel)
        if viewed.dim() < 2 or viewed.shape[1] % self.m:
            return pruned.max()
        pattern = NM(1, self.m)
        units = pattern.pool(viewed)
        spread = pattern.expand(units.amax(-1, keepdim=True).expand_as(units), viewed.shape)
        return param.layout.restore(spread, param.shape)
