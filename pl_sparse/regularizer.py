"""Penalties that drive weights to zero: their gradients, and their proximal steps.

A penalty either adds its gradient to that of the loss, or is left to a proximal step after the optimizer's: the exact
minimizer of |w - v|^2 / (2 eta) + penalty(w), which makes weights exactly zero. eta is the learning rate, and with
Adam the learning rate of each coordinate, lr / (sqrt(v_hat) + eps), as its step is one in that metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.allocation import Global, Units, choose
from pl_sparse.masked import Group, MaskedParameter
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import NM, Channel, Structure, Transposable, Unstructured


@dataclass(frozen=True, kw_only=True)
class Regularizer(ABC):
    """A penalty on some weights.

    Args:
        strength: its factor lambda, at least 0.
    """

    strength: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength={self.strength!r} must not be negative")

    def start(self, groups: Sequence[Group], model: nn.Module) -> None:
        """Before training; by default nothing is done."""
        return

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module) -> list[Group]:
        """What is penalized together; by default each weight alone."""
        return [Group(param.name, ((param, param.layout),)) for param in params]

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        """Add the (sub)gradient of the penalty to the weights' gradients; by default nothing is done."""
        return

    def shrink(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        """After the optimizer step: the proximal step; by default nothing is done."""
        return

    @abstractmethod
    def penalty(self, groups: Sequence[Group]) -> Tensor:
        """The value of the penalty, a scalar."""


def step_sizes(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Tensor | float]:
    """How far a gradient moves each weight: the learning rate, for Adam and its kin that of each coordinate."""
    by_weight = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    sizes: list[Tensor | float] = []
    for weight in weights:
        group = by_weight.get(id(weight))
        if group is None:
            sizes.append(0.0)
            continue
        state = optimizer.state.get(weight, {})
        square = state.get("exp_avg_sq")
        if square is None:
            sizes.append(float(group["lr"]))
            continue
        square = state.get("max_exp_avg_sq", square)
        correction = 1 - group["betas"][1] ** float(state["step"])
        sizes.append(float(group["lr"]) / ((square / correction).sqrt_().add_(group["eps"])))
    return sizes


@dataclass(frozen=True, kw_only=True)
class L1(Regularizer):
    """strength * sum |w|.

    Proximal: w <- sign(w) max(|w| - eta strength, 0), which makes weights exactly zero. Else by the subgradient
    sign(w), which does not.

    Sources: Tibshirani, Regression shrinkage and selection via the lasso, 1996; the proximal step: Parikh, Boyd,
    Proximal algorithms, 2014, section 6.5.2.
    """

    proximal: bool = True

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        if not self.proximal:
            for param in _params(groups):
                if param.weight.grad is not None:
                    param.weight.grad.add_(param.weight.detach().sign(), alpha=self.strength)

    def shrink(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        if self.proximal:
            weights = [param.weight for param in _params(groups)]
            for weight, eta in zip(weights, step_sizes(optimizer, weights), strict=True):
                weight.copy_(weight.sign() * (weight.abs() - eta * self.strength).clamp_min_(0))

    def penalty(self, groups: Sequence[Group]) -> Tensor:
        return self.strength * torch.stack([param.weight.abs().sum() for param in _params(groups)]).sum()


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Regularizer):
    """strength * sum over groups sqrt(size) |w_group|_2, by its proximal step: groups become zero as a whole.

    w_group <- w_group max(1 - eta strength sqrt(size) / |w_group|, 0), eta the mean step size of the group. Groups are
    the units of a structure: output channels, attention heads, blocks, kernels. The bias of a channel that is zero
    becomes zero.

    Source: Yuan, Lin, Model selection and estimation in regression with grouped variables, 2006; Wen et al., Learning
    structured sparsity in deep neural networks, 2016, arXiv:1608.03665.

    Args:
        structure: what a group is.
    """

    structure: Structure

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.structure, (NM, Transposable, Unstructured)):
            raise ValueError(
                f"structure={self.structure.label} has no groups that could be zero as a whole: use channel"
            )

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module) -> list[Group]:
        return self.structure.groups(params, model)

    def _norms(self, group: Group) -> tuple[Tensor, int]:
        """The norm of each unit of a group, and how many weights it has."""
        total, size = torch.zeros(()), 0
        for param, layout in group.members:
            mean = self.structure.pool(layout.view(param.weight.detach().square()))
            count = param.numel // mean.numel()
            total = total.to(mean.device) + mean * count
            size += count
        return total.sqrt(), size

    def shrink(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        for group in groups:
            norms, size = self._norms(group)
            etas = step_sizes(optimizer, [param.weight for param, _ in group.members])
            eta: Tensor | float = 0.0
            for (param, layout), own in zip(group.members, etas, strict=True):
                mean = self.structure.pool(layout.view(own)) if isinstance(own, Tensor) else own
                eta = eta + mean * (param.numel / group.numel)
            factor = (1 - eta * self.strength * size**0.5 / norms.clamp_min(1e-30)).clamp_min_(0)
            for param, layout in group.members:
                shape = layout.view(torch.empty(param.shape, device="meta")).shape
                param.weight.mul_(layout.restore(self.structure.expand(factor, shape), param.shape))
                bias = getattr(param.module, "bias", None)
                if isinstance(self.structure, Channel) and isinstance(bias, Tensor) and bias.shape == factor.shape:
                    bias.mul_(factor > 0)

    def penalty(self, groups: Sequence[Group]) -> Tensor:
        found = [self._norms(group) for group in groups]
        return self.strength * torch.stack([norms.sum() * size**0.5 for norms, size in found]).sum()


@dataclass(frozen=True, kw_only=True)
class Slimming(Regularizer):
    """strength * sum |gamma| over the scales of all batch norms, by its subgradient; `scorer=slimming` then prunes by
    them.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017, arXiv:1708.06519,
    equation 1.
    """

    def _scales(self, groups: Sequence[Group]) -> list[Tensor]:
        return [param.weight for param in _params(groups)]

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module) -> list[Group]:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        found = [
            MaskedParameter(f"{path}.weight", module, module.weight, torch.ones_like(module.weight, dtype=torch.bool))
            for path, module in model.named_modules()
            if isinstance(module, norms) and module.affine
        ]
        if not found:
            raise ValueError("network slimming penalizes the scales of batch norms, and the model has none")
        return super().groups(found, model)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for scale in self._scales(groups):
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=self.strength)

    def penalty(self, groups: Sequence[Group]) -> Tensor:
        return self.strength * torch.stack([scale.abs().sum() for scale in self._scales(groups)]).sum()


@dataclass(frozen=True, kw_only=True)
class GrowingL2(Regularizer):
    """lambda / 2 sum w^2 over the weights of least magnitude, with a lambda that grows: they fade out before they are
    pruned.

    lambda = min(strength * (1 + step // every), ceiling). Which weights, `sparsity` of all by one threshold, is
    decided once, at the start.

    Source: Wang et al., Neural pruning via growing regularization, 2020, arXiv:2012.09243, Algorithm 1 (GReg-1).

    Args:
        sparsity: the fraction of the weights that is penalized.
        every: optimizer steps between two raises.
        ceiling: the largest lambda.
    """

    sparsity: float
    every: int = 10
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity!r} must be in [0, 1]")
        if self.every < 1:
            raise ValueError(f"every={self.every!r} must be 1 or more optimizer steps")

    def start(self, groups: Sequence[Group], model: nn.Module) -> None:
        choose(Units(groups, Unstructured(), Magnitude().score), Global(), self.sparsity)

    def factor(self, step: int) -> float:
        """lambda at an optimizer step."""
        return min(self.strength * (1 + step // self.every), self.ceiling)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for param in _params(groups):
            if param.weight.grad is not None:
                param.weight.grad.addcmul_(param.weight.detach(), 1 - param.factor, value=self.factor(step))

    def penalty(self, groups: Sequence[Group]) -> Tensor:
        return torch.stack([(param.weight * (1 - param.factor)).square().sum() / 2 for param in _params(groups)]).sum()


def _params(groups: Sequence[Group]) -> list[MaskedParameter]:
    return [param for group in groups for param, _ in group.members]
