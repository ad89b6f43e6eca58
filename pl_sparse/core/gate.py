"""Learned numbers: one for each unit of a structure, trained beside the model by an optimizer of its own.

A gate is not a parameter of the model: its state dict, its optimizer and its weight decay do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and limits of the hard concrete distribution, as in the paper."""


class Pooling(Protocol):
    """How a tensor is pooled to units, and units are spread over a tensor: a structure."""

    def pool(self, scores: Tensor, /) -> Tensor: ...
    def expand(self, chosen: Tensor, shape: torch.Size, /) -> Tensor: ...


class Gate:
    """One learned number per unit of a group of weights, which all its members share.

    Args:
        name: of the group.
        members: the weights, each with how its units are seen in it.
        pooling: what a unit is.
        lr: the learning rate of the Adam that trains it; it has no weight decay.
        follows: whether its rate follows the learning-rate schedule of the weights.
        clip: the norm to which the model's gradients are clipped that it learns from; None: they are not.

    Attributes:
        value: of the units' shape, float32 or wider; zeros at first.
        level: how much of its penalty is on, in [0, 1]: none, but for an updater with a threshold, which lets the
            penalty ramp up with that. Under a Lagrangian the sparsity that is asked for.
        price: of one of its weights, where a Lagrangian sets it, a scalar; None: the scorer has a penalty of its own.
        multipliers: lambda1 and lambda2 of the Lagrangian, the same for all gates, else None.
        rate: the part of `lr` that is in force, as the learning-rate schedule of the weights has it.
        shrink: what clipping multiplies gradients with.
        share: the part of a mean over all gates that falls to it.
        noise: the uniform random numbers of this step, of the units' shape, where masking samples; else None.
        sample: the gates that the forward pass of this step has with them; else None.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[tuple[MaskedParameter, Layout]],
        pooling: Pooling,
        lr: float,
        follows: bool = False,
        clip: float | None = None,
    ) -> None:
        self.name = name
        self.members = members
        self.pooling = pooling
        param, layout = members[0]
        shape = pooling.pool(torch.empty(layout.shape_of(param.former), device="meta")).shape
        dtype = torch.promote_types(param.weight.dtype, torch.float32)
        self.value = nn.Parameter(torch.zeros(shape, dtype=dtype, device=param.weight.device))
        self.optimizer = torch.optim.Adam([self.value], lr)
        self.lr = lr
        self.follows = follows
        self.clip = clip
        self.rate = 1.0
        self.shrink: Tensor | float = 1.0
        self.level = 0.0
        self.price: Tensor | None = None
        self.multipliers: Tensor | None = None
        self.share = 1.0
        self.noise: Tensor | None = None
        self.sample: Tensor | None = None

    @property
    def size(self) -> int:
        """How many weights a unit has."""
        weights = sum(layout.numel_of(param.former) for param, layout in self.members)
        return weights // self.value.numel()

    def spread(self, units: Tensor, param: MaskedParameter, layout: Layout) -> Tensor:
        """A value per unit as a tensor of a member's shape and type."""
        viewed = self.pooling.expand(units, layout.shape_of(param.shape))
        return layout.write(units.new_zeros(param.shape), viewed).to(param.weight.dtype)

    def gather(self, of: Callable[[MaskedParameter], Tensor]) -> Tensor:
        """The sum of `of(param)`, in the weights' shapes, over all weights of each unit."""
        total = torch.zeros_like(self.value)
        for param, layout in self.members:
            viewed = layout.view(of(param).to(total.dtype))
            pooled = self.pooling.pool(viewed)  # means over the weights of a unit
            total += pooled * (viewed.numel() // pooled.numel())
        return total

    def correlation(self) -> Tensor:
        """dL/d(factor of a unit) = the sum over its weights of gradient times value, pruned weights included."""
        total = self.gather(
            lambda param: torch.zeros_like(param.values) if param.grad is None else param.grad.detach() * param.values
        )
        return total * self.shrink

    def step(self, gradient: Tensor) -> None:
        """One step of Adam."""
        self.value.grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.lr * self.rate
        self.optimizer.step()
        self.value.grad = None

    def to(self, device: torch.device) -> None:
        """Move it, and what its optimizer remembers."""
        if self.value.device == device:
            return
        memory = self.optimizer.state.pop(self.value, {})
        self.value = nn.Parameter(self.value.detach().to(device))
        self.optimizer.param_groups[0]["params"] = [self.value]
        self._remember(memory)
        for name in ("price", "multipliers", "noise", "sample"):
            number = getattr(self, name)
            if number is not None:
                setattr(self, name, number.to(device))

    def _remember(self, state: Mapping[str, Tensor]) -> None:
        device = self.value.device
        self.optimizer.state[self.value] = {
            key: value.clone() if key == "step" else value.to(device, copy=True) for key, value in state.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that must survive a checkpoint, by name."""
        memory = {f"optimizer.{key}": value for key, value in self.optimizer.state[self.value].items()}
        if self.multipliers is not None:
            memory["multipliers"] = self.multipliers
        return {"value": self.value.detach(), "level": torch.tensor(self.level, dtype=torch.float64), **memory}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            ValueError: it is the state of other units.
        """
        value = tensors["value"]
        if value.shape != self.value.shape:
            raise ValueError(
                f"the pruning state belongs to another structure: the gates of {self.name} have shape "
                f"{tuple(value.shape)}, here {tuple(self.value.shape)}"
            )
        self.value.data.copy_(value)
        self.level = float(tensors["level"])
        multipliers = tensors.get("multipliers")
        self.multipliers = None if multipliers is None else multipliers.to(value.device, copy=True)
        self._remember({key.removeprefix("optimizer."): t for key, t in tensors.items() if "optimizer." in key})


def stretched(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """The concrete variable stretched to (gamma, zeta), before it is clipped to [0, 1].

    With uniform noise u it is a sample, s = sigmoid((log u - log(1 - u) + log alpha) / beta); without it is the gate of
    evaluation, s = sigmoid(log alpha), both as s (zeta - gamma) + gamma.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    equations 10, 11 and 13.

    >>> [round(float(stretched(torch.tensor(x)).clamp(0, 1)), 4) for x in (-2.3979, -2.0, 0.0, 2.0)]
    [0.0, 0.043, 0.5, 0.957]
    """
    logits = log_alpha if noise is None else (noise.logit() + log_alpha) / BETA
    return logits.sigmoid() * (ZETA - GAMMA) + GAMMA


def slope(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """dz/d(log alpha) of the gate z = clip(stretched, 0, 1): zero where it is clipped."""
    value = stretched(log_alpha, noise)
    s = (value - GAMMA) / (ZETA - GAMMA)
    inner = (value >= 0) & (value <= 1)
    return inner * (ZETA - GAMMA) * s * (1 - s) / (1.0 if noise is None else BETA)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)).

    Source: Louizos et al., 2017, arXiv:1712.01312, equation 12.

    >>> [round(float(open_probability(torch.tensor(x))), 4) for x in (-4.0, -1.0, 0.0, 1.0, 4.0)]
    [0.0831, 0.6453, 0.8318, 0.9308, 0.9963]
    """
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()
