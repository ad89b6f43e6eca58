"""How important each weight is: higher = keep. What a scorer gathers over steps lives in `MaskedParameter.state`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.masked import MaskedParameter


@dataclass(frozen=True)
class Scorer(ABC):
    """The importance of weights.

    A new one overrides `score`, and `observe` if it looks at gradients over time.

    Attributes:
        needs_dense: whether it scores pruned weights by the values they had, which masking must then remember.
        observes: whether it needs gradients; without, a level due at step 0 is met before the first batch.
        signed: whether scores can be negative.
    """

    needs_dense: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    @abstractmethod
    def score(self, param: MaskedParameter) -> Tensor:
        """The scores of one weight, in its shape; higher = keep, and no NaN."""

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step; `param.grad` is the gradient at the masked weights.

        Called on every step until the last level of the schedule; by default nothing is done.
        """
        return


def _average(param: MaskedParameter, name: str, value: Tensor, decay: float) -> None:
    """Moving average of `value` in `param.state`, started at the first value."""
    average = param.state.get(name)
    if average is None:
        param.state[name] = value.clone()
    else:
        average.lerp_(value, 1 - decay)


def _observed(param: MaskedParameter, name: str) -> Tensor:
    """What was gathered under `name`; zeros for a weight that never had a gradient."""
    found = param.state.get(name)
    return torch.zeros_like(param.values) if found is None else found


def _decay(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"decay={value!r} must be in [0, 1): the share of the past in the moving average")


@dataclass(frozen=True)
class Magnitude(Scorer):
    """|w|.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626.
    """

    def score(self, param: MaskedParameter) -> Tensor:
        return param.values.abs()


@dataclass(frozen=True)
class Random(Scorer):
    """A uniform random number that stays the same for a weight: the control every method has to beat.

    The numbers depend on `seed` and the weight's name alone, so that all processes agree on them.
    """

    seed: int = 0

    def score(self, param: MaskedParameter) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + crc32(param.name.encode())) % 2**63)
        return torch.rand(param.shape, generator=generator).to(param.weight.device)


@dataclass(frozen=True)
class Gradient(Scorer):
    """The moving average of |g|, with g the gradient of the loss at the masked weights.

    Args:
        decay: the share of the past; 0 takes the last gradient alone.
    """

    decay: float = 0.9
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            _average(param, "gradient", param.grad.detach().abs(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "gradient")


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
        _decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            _average(param, "taylor", (param.values * param.grad.detach()).abs_(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "taylor")


@dataclass(frozen=True)
class Movement(Scorer):
    """S = -lr * sum over steps of g w: high for weights that move away from zero.

    g is the gradient at the masked weights, for pruned positions too (straight-through), and w the value behind the
    mask, so that a pruned weight can come back.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, equation 3.

    Args:
        lr: the learning rate of the scores, which ranks nothing by itself but scales them for thresholds.
    """

    lr: float = 1.0
    needs_dense: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r} must be positive")

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            if "movement" not in param.state:
                param.state["movement"] = torch.zeros_like(param.values)
            param.state["movement"].addcmul_(param.grad.detach(), param.values, value=-self.lr)

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "movement")
