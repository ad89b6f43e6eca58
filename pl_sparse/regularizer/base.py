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
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axis
from pl_sparse.network.probe import Probe
from pl_sparse.structure import Structure

__all__ = ["Regularizer", "step_sizes"]


@dataclass(frozen=True, kw_only=True)
class Regularizer(Axis, ABC):
    """A penalty on some weights.

    Args:
        strength: its factor lambda, at least 0.

    Attributes:
        needs_example: whether it needs a call of the model.
    """

    axis: ClassVar[str] = "regularizer"
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

    def prox(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        """After the optimizer step: the proximal step; by default nothing is done."""
        return

    @abstractmethod
    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        """The value of the penalty, a scalar, `step` optimizer steps after its beginning."""


def step_sizes(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Tensor | float]:
    """How far a gradient moves each weight: the learning rate; for Adam and similar optimizers that of each coordinate.

    With v the moving average of g^2: lr / (sqrt(v / (1 - beta2^t)) + eps) for Adam, AdamW, NAdam (with amsgrad the
    largest v so far), lr / (sqrt(v) + eps) for RMSprop. For all other optimizers it is lr; 0 for a weight that did not
    step.

    Args:
        optimizer: the one that has stepped.
        weights: some of its parameters.

    Returns:
        For each weight a number, or a tensor of its shape.
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


def members(groups: Sequence[Group]) -> list[MaskedParameter]:
    return [param for group in groups for param, _ in group.members]


def penalized_groups(
    structure: Structure, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None
) -> list[Group]:
    """The groups of a structure, if it divides all the weights."""
    for param in params:
        reason = structure.unfit(param)
        if reason is not None:
            raise ValueError(
                f"{param.name} cannot be penalized by structure={structure.label}: {reason}. Leave it out by "
                f"exclude=[{param.name!r}]"
            )
    return [group for group in structure.groups(params, model, example) if group.reason is None]
