"""Penalties that drive weights to zero: their gradients, and their proximal steps.

A penalty either adds its gradient to that of the loss, or is left to a proximal step after the optimizer's: the exact
minimizer of |w - v|^2 / (2 eta) + penalty(w), which makes weights exactly zero. eta is the learning rate, and with
Adam the learning rate of each coordinate, lr / (sqrt(v_hat) + eps), as its step is one in that metric. Weight decay has
been applied by then. Momentum is that of the loss alone.

A proximal step acts on the values that the optimizer wrote: on the latent ones where masking trains those (ste, srste,
topkast), else on the sparse weights. A gradient is added at the sparse weights, so that pruned ones get none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.allocation import Allocation, Global, Units, choose
from pl_sparse.latency import LatencyTable, Network
from pl_sparse.masked import Group, MaskedParameter, size_of
from pl_sparse.probe import NORMS, Probe
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import NM, Channel, Row, Structure, Transposable, Unstructured


@dataclass(frozen=True, kw_only=True)
class Regularizer(ABC):
    """A penalty on some weights.

    Args:
        strength: its factor lambda, at least 0.

    Attributes:
        needs_example: whether it is made from a call of the model.
    """

    strength: float
    needs_example: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength={self.strength!r} must not be negative")

    @property
    def removes_outputs(self) -> bool:
        """Whether whole outputs of a layer become zero, which the last layer cannot spare."""
        return False

    def prepare(self, groups: Sequence[Group], model: nn.Module, probe: Probe | None) -> None:
        """Before training, also before one that is resumed; by default nothing is done.

        Args:
            probe: a forward pass of the model; None where its `training_step` cannot be called for that.
        """
        return

    def start(self, groups: Sequence[Group]) -> None:
        """When the penalty begins: what is decided once; by default nothing is."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What was decided then, beside masks, in plain types; by default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that up again, after `groups`; by default nothing is done."""
        return

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        """What is penalized together; by default each weight alone.

        Args:
            example: inputs that the model can be called with, where `needs_example`.
        """
        return [Group(param.name, ((param, param.layout),)) for param in params]

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        """Add the (sub)gradient of the penalty to the weights' gradients; by default nothing is done."""
        return

    def shrink(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        """After the optimizer step: the proximal step; by default nothing is done."""
        return

    @abstractmethod
    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        """The value of the penalty, a scalar, `step` optimizer steps after its beginning."""


def step_sizes(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Tensor | float]:
    """How far a gradient moves each weight: the learning rate, for Adam and its kin that of each coordinate.

    With v the moving average of g^2: lr / (sqrt(v / (1 - beta2^t)) + eps) for Adam, AdamW, NAdam (with amsgrad the
    largest v so far), lr / (sqrt(v) + eps) for RMSprop. For all other optimizers it is lr; 0 for a weight that did not
    step.
    """
    by_weight = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    sizes: list[Tensor | float] = []
    for weight in weights:
        group = by_weight.get(id(weight))
        if group is None or weight.grad is None:
            sizes.append(0.0)
            continue
        lr, state = float(group["lr"]), optimizer.state.get(weight, {})
        if "exp_avg_sq" in state:
            square = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        elif "square_avg" in state and "alpha" in group:
            square = state["square_avg"].clone()
            if "grad_avg" in state:  # centered
                square.addcmul_(state["grad_avg"], state["grad_avg"], value=-1).clamp_min_(0)
        else:
            sizes.append(lr)
            continue
        sizes.append(lr / square.sqrt_().add_(group["eps"]))
    return sizes


@dataclass(frozen=True, kw_only=True)
class L1(Regularizer):
    """strength * sum |w|.

    Proximal: w <- sign(w) max(|w| - eta strength, 0), which makes weights exactly zero. Else by the subgradient
    sign(w), which does not. With Adam, weights that never had a gradient have a huge eta, and go first.

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

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * torch.stack([param.weight.abs().sum() for param in _params(groups)]).sum()


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Regularizer):
    """strength * sum over groups sqrt(size) |w_group|_2, by its proximal step: groups become zero as a whole.

    With c = strength sqrt(size) and one step size eta for the group, w <- w max(1 - eta c / |w|, 0). With a step size
    eta_i for each weight (Adam), w is 0 if sum (w_i / (eta_i c))^2 <= 1, else w_i <- w_i t / (t + eta_i c), where t,
    the norm of the result, solves sum (w_i / (t + eta_i c))^2 = 1.

    Groups are the units of a structure: output channels, attention heads, blocks, kernels. Of an output channel that
    is zero the bias becomes zero, and so do scale and shift of the batch norm that takes the layer's output (as seen in
    a forward pass), or it would still emit a constant. Once the penalty has ended, bias and shift are trained again.

    Sources: Yuan, Lin, Model selection and estimation in regression with grouped variables, 2006; Wen et al., Learning
    structured sparsity in deep neural networks, 2016, arXiv:1608.03665; for a step size of each weight Deleu, Bengio,
    Structured sparsity inducing adaptive optimizers for deep learning, 2021, arXiv:2102.03869, section 4.

    Args:
        structure: what a group is.

    Raises:
        ValueError: the structure has no groups, or does not divide a weight.
    """

    structure: Structure

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.structure, (NM, Row, Transposable, Unstructured)):
            raise ValueError(
                f"structure={self.structure.label} has no groups that could be zero as a whole: use channel, head, "
                "kernel or block4x4"
            )

    @property
    def removes_outputs(self) -> bool:
        return self.structure.removes_outputs

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        return _groups(self.structure, params, model, example)

    def prepare(self, groups: Sequence[Group], model: nn.Module, probe: Probe | None) -> None:
        if not self.structure.removes_outputs:
            return
        following: dict[nn.Module, nn.Module] = {}
        if any(isinstance(module, NORMS) for module in model.modules()):
            if probe is None:
                raise ValueError(
                    "group lasso on channels looks for the batch norm after each layer by calling training_step, which "
                    "with manual optimization would train the module: use structure=kernel or block4x4"
                )
            following = probe.following_norms([param.module for param in _params(groups)])
        for param in _params(groups):
            norm = following.get(param.module)
            found = [getattr(param.module, "bias", None), getattr(norm, "weight", None), getattr(norm, "bias", None)]
            outputs = param.layout.view(torch.empty(param.shape, device="meta")).shape[0]
            param.state = {
                str(i): each for i, each in enumerate(found) if isinstance(each, Tensor) and len(each) == outputs
            }

    def _sum(self, group: Group, values: Sequence[Tensor]) -> Tensor:
        """The sum over each unit of tensors that have the shapes of the group's weights."""
        total = torch.zeros(())
        for (param, layout), value in zip(group.members, values, strict=True):
            mean = self.structure.pool(layout.view(value))
            total = total.to(mean.device) + mean * (size_of(param, layout).numel() / mean.numel())
        return total

    def _spread(self, group: Group, units: Tensor) -> list[Tensor]:
        """For each weight of the group a tensor of its shape with the values of its units."""
        return [
            layout.write(units.new_zeros(param.shape), self.structure.expand(units, size_of(param, layout)))
            for param, layout in group.members
        ]

    def _norms(self, group: Group) -> tuple[Tensor, float]:
        """The norm of each unit of a group, and the root of its size."""
        norms = self._sum(group, [param.weight.detach().square() for param, _ in group.members]).sqrt()
        return norms, (group.numel / norms.numel()) ** 0.5

    def shrink(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        for group in groups:
            weights = [param.weight for param, _ in group.members]
            etas = step_sizes(optimizer, weights)
            norms, root = self._norms(group)
            c = self.strength * root
            if c == 0 or not any(isinstance(eta, Tensor) or eta for eta in etas):
                continue
            if all(eta == etas[0] for eta in etas if not isinstance(eta, Tensor)) and not isinstance(etas[0], Tensor):
                norm = (norms - float(etas[0]) * c).clamp_min_(0)
            else:
                norm = self._solve(group, weights, etas, c)
            for weight, eta, each in zip(weights, etas, self._spread(group, norm), strict=True):
                weight.mul_(torch.where(each > 0, each / (each + eta * c), 0))
            for param, _ in group.members:
                for companion in param.state.values():
                    companion.mul_(norm > 0)

    def _solve(self, group: Group, weights: Sequence[Tensor], etas: Sequence[Tensor | float], c: float) -> Tensor:
        """The norm of each unit after the step: the root t of sum (w_i / (t + eta_i c))^2 = 1, or 0.

        Newton's method on 1 / sqrt(sum), which is nearly linear in t and concave, so that it comes from below.
        """
        t = torch.zeros(())
        for _ in range(12):
            at = self._spread(group, t) if t.dim() else [t] * len(weights)
            below = [a + eta * c for a, eta in zip(at, etas, strict=True)]
            ratios = [(w / b.clamp_min(1e-30)).square() for w, b in zip(weights, below, strict=True)]
            total = self._sum(group, ratios)
            slope = self._sum(group, [r / b.clamp_min(1e-30) for r, b in zip(ratios, below, strict=True)])
            t = torch.where(total > 1, t + (total.sqrt() - 1) * total / slope.clamp_min(1e-30), t)
        return t

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        found = [self._norms(group) for group in groups]
        return self.strength * torch.stack([norms.sum() * root for norms, root in found]).sum()


@dataclass(frozen=True, kw_only=True)
class Slimming(Regularizer):
    """strength * sum |gamma| over the scales of all batch norms, by its subgradient; `scorer=slimming` then prunes by
    them.

    The subgradient makes no scale exactly zero: pruning does, of the weights. What the norm of a removed channel still
    emits, (0 - mean) gamma / std + beta, is a constant: it stays in the model until the channel is cut out.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017, arXiv:1708.06519,
    equation 1.

    Raises:
        ValueError: the model has no batch norm.
    """

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        found = [
            MaskedParameter(f"{path}.weight", module, module.weight, torch.ones_like(module.weight, dtype=torch.bool))
            for path, module in model.named_modules()
            if isinstance(module, NORMS) and module.affine
        ]
        if not found:
            raise ValueError(
                "network slimming penalizes the scales of batch norms, and the model has none: use a model with batch "
                "norm, or regularizer=group_lasso"
            )
        return super().groups(found, model)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for param in _params(groups):
            if param.weight.grad is not None:
                param.weight.grad.add_(param.weight.detach().sign(), alpha=self.strength)

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * torch.stack([param.weight.abs().sum() for param in _params(groups)]).sum()


@dataclass(frozen=True, kw_only=True)
class GrowingL2(Regularizer):
    """lambda / 2 sum w^2 over the weights of least magnitude, with a lambda that grows: they fade out before they are
    pruned.

    lambda = min(strength * (1 + step // every), ceiling), with `step` counted from where the penalty begins. Which
    weights is decided once, there: those that magnitude pruning with this structure and allocation would remove.

    Source: Wang et al., Neural pruning via growing regularization, 2020, arXiv:2012.09243, Algorithm 1 (GReg-1), which
    begins with a trained model and takes the same fraction of every layer.

    Args:
        sparsity: the fraction of the weights that is penalized.
        structure: what is penalized together.
        allocation: how the weights that are not penalized are shared among tensors.
        every: optimizer steps between two raises.
        ceiling: the largest lambda.
    """

    sparsity: float
    structure: Structure = field(default_factory=Unstructured)
    allocation: Allocation = field(default_factory=Global)
    every: int = 10
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity!r} must be in [0, 1]")
        if self.every < 1:
            raise ValueError(f"every={self.every!r} must be 1 or more optimizer steps")

    @property
    def removes_outputs(self) -> bool:
        return self.structure.removes_outputs

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        return _groups(self.structure, params, model, example)

    def start(self, groups: Sequence[Group]) -> None:
        level = self.sparsity if self.structure.fixed is None else self.structure.fixed
        choose(Units(groups, self.structure, Magnitude().score), self.allocation, level)

    def factor(self, step: int) -> float:
        """lambda at an optimizer step.

        >>> [GrowingL2(strength=0.1, sparsity=0.5, every=2, ceiling=0.25).factor(step) for step in range(5)]
        [0.1, 0.1, 0.2, 0.2, 0.25]
        """
        return min(self.strength * (1 + step // self.every), self.ceiling)

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        for param in _params(groups):
            if param.weight.grad is not None:
                param.weight.grad.addcmul_(param.weight.detach(), 1 - param.factor, value=self.factor(step))

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        squares = [(param.weight * (1 - param.factor)).square().sum() for param in _params(groups)]
        return self.factor(step) / 2 * torch.stack(squares).sum()


def _params(groups: Sequence[Group]) -> list[MaskedParameter]:
    return [param for group in groups for param, _ in group.members]


@dataclass(frozen=True, kw_only=True)
class Latency(Regularizer):
    """strength * E[latency] / latency of the dense network, for coupled channels.

    A channel counts as present to the degree q = |w|^2 / (|w|^2 + softness * m), |w|^2 the mean square of its weights
    and m that of its group when the penalty begins. The expected width of a group is the sum of its q, and the latency
    of a layer that of its expected width, by a table that was measured on this machine and is interpolated
    (`latency.LatencyTable`). Channels of layers that save most fade first; `structure=coupled` then prunes them.

    Source: Cai, Zhu, Han, ProxylessNAS: direct neural architecture search on target task and hardware, 2018,
    arXiv:1812.00332, section 3.3, for the expected latency as a loss; there the degrees are learned probabilities.

    Args:
        softness: how large a channel is, against the mean, that counts as half present.
        table: where latencies are kept; None for the user's cache.
    """

    softness: float = 0.1
    table: str | None = None
    needs_example: ClassVar[bool] = True
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softness > 0:
            raise ValueError(f"softness={self.softness!r} must be above 0")

    @property
    def removes_outputs(self) -> bool:
        return True

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        if example is None:
            example = getattr(model, "example_input_array", None)
        structure = Channel(coupled=True)
        groups = [group for group in structure.groups(params, model, example) if group.reason is None]
        groups = [group for group in groups if group.feeds]
        if not groups:
            raise ValueError("the latency penalty found no channel that could be removed")
        network, table = Network(groups, model, example), LatencyTable(self.table)
        table.measure(network.layers)
        dense = float(network.cost(network.units, "ms", table))
        self._known.update(network=network, table=table, dense=dense)
        self.start(groups)
        return groups

    def start(self, groups: Sequence[Group]) -> None:
        self._known["means"] = [float(self._squares(group).detach().mean()) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._known["means"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._known["means"] = state["means"]

    def _squares(self, group: Group) -> Tensor:
        """The mean square of the weights of each unit, differentiable."""
        pool = Channel().pool
        parts = [
            pool(layout.view(param.weight.square())) * (size_of(param, layout).numel() / group.numel)
            for param, layout in group.members
        ]
        return torch.stack(parts).sum(0)

    def expected(self, groups: Sequence[Group]) -> Tensor:
        """The expected latency in milliseconds, differentiable."""
        widths: list[Any] = list(self._known["network"].units)
        index = {id(group): i for i, group in enumerate(self._known["network"].groups)}
        for group in groups:
            squares, i = self._squares(group), index[id(group)]
            widths[i] = (squares / (squares + self.softness * self._known["means"][i] + 1e-30)).sum()
        return torch.as_tensor(self._known["network"].cost(widths, "ms", self._known["table"]))

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * self.expected(groups) / self._known["dense"]

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        ready = [group for group in groups if all(param.weight.grad is not None for param, _ in group.members)]
        if not ready:
            return
        weights = list(dict.fromkeys(param.weight for param in _params(ready)))
        with torch.enable_grad():
            found = torch.autograd.grad(self.penalty(ready, step), weights)
        for weight, gradient in zip(weights, found, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient)


def _groups(
    structure: Structure, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None
) -> list[Group]:
    """The groups of a structure, if it divides all the weights."""
    for param in params:
        reason = structure.misfit(param.layout.view(torch.empty(param.shape, device="meta")).shape)
        if reason is not None:
            raise ValueError(
                f"{param.name} cannot be penalized by structure={structure.label}: {reason}. Leave it out by "
                f"exclude=[{param.name!r}]"
            )
    return [group for group in structure.groups(params, model, example) if group.reason is None]
