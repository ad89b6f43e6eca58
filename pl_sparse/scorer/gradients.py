"""Scores by gradients that are gathered while the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    elementwise: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True

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
    """The moving average of |w g|, or of (w g)^2: to first order, how much the loss changes when the weight is removed.

    For one weight and one step both rank alike; averages over steps do not, nor do the means over a unit's weights. g
    is the gradient of an optimizer step: with accumulation, larger batches or more processes it is the mean of more
    examples before it is squared, which changes the score.

    Source: Molchanov et al., Importance estimation for neural network pruning, 2019, arXiv:1906.10771, equation 8,
    which squares and takes the mean over the batches between two prunings.

    Args:
        decay: the share of the past; 0 takes the last step alone.
        squared: whether squares are averaged, as in the paper, or absolute values.
    """

    decay: float = 0.9
    squared: bool = False
    observes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            change = param.values * param.grad.detach()
            average_into(param, "taylor", change.square_() if self.squared else change.abs_(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "taylor")


@register
@dataclass(frozen=True)
class Momentum(Scorer):
    """|moving average of g|: high for weights that training keeps pushing in one direction.

    Source: Dettmers, Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840, section 3.

    Args:
        decay: the share of the past.
    """

    decay: float = 0.9
    observes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            average_into(param, "momentum", param.grad.detach(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "momentum").abs()
