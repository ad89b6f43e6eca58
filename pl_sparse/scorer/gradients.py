"""Scores by gradients that are gathered while the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.scorer.base import Scorer, average_into, check_decay, observed

__all__ = ["Gradient", "Momentum", "Taylor"]


@register
@dataclass(frozen=True)
class Gradient(Scorer):
    """The moving average of |g|, with g the gradient of the loss at the masked weights.

    Args:
        decay: the share of the past; 0 takes the last gradient alone.
    """

    decay: float = 0.9
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            average_into(param, "gradient", param.grad.detach().abs(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "gradient")


@register
@dataclass(frozen=True)
class Taylor(Scorer):
    """The moving average of |w g|: to first order, how much the loss changes when the weight is removed.

    Source: Molchanov et al., Importance estimation for neural network pruning, 2019, arXiv:1906.10771, equation 8
    (there squared, which ranks alike).

    Args:
        decay: the share of the past; 0 takes the last step alone.
    """

    decay: float = 0.9
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            average_into(param, "taylor", (param.values * param.grad.detach()).abs_(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "taylor")


@register
@dataclass(frozen=True)
class Momentum(Scorer):
    """|moving average of g|: of the weights that training keeps pushing the same way.

    Source: Dettmers, Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840, section 3.

    Args:
        decay: the share of the past.
    """

    decay: float = 0.9
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            average_into(param, "momentum", param.grad.detach(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "momentum").abs()
