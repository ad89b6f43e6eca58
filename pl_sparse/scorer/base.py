"""How important each weight is: higher = keep. A scorer keeps what it gathers over steps in `MaskedParameter.state`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, Axis, name_of
from pl_sparse.network.probe import Probe
from pl_sparse.structure import Structure

__all__ = ["Scorer"]


@dataclass(frozen=True)
class Scorer(Axis, ABC):
    """The importance of weights.

    A new one overrides `score`, `observe` if it looks at gradients over time, `calibrate` if it looks at the whole
    model at once, and `start` if it learns a number for each unit.

    Attributes:
        needs_latent: whether it scores pruned weights by the values they had, which masking must then remember.
        observes: whether it needs gradients. If it does not, a level due at step 0 is met before the first batch.
        signed: whether scores can be negative.
        calibrates: whether it scores by `calibrate`, before each round of pruning.
        pointwise: whether the score of a weight is made of what belongs to it alone, its value or what was gathered for
            it, so that some weights of a tensor can be scored without the others.
        priced: whether the units of its gates are open with a probability, on which there is a price.
    """

    axis: ClassVar[str] = "scorer"
    renamed: ClassVar[Mapping[str, str]] = {"needs_dense": "needs_latent"}
    needs_latent: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False
    priced: ClassVar[bool] = False

    def expected(self, group: Group) -> Tensor:
        """The expected number of a group's weights that are kept, a scalar, where it is `priced`."""
        raise NotImplementedError

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        """Once the weights are known: make a `Gate` for each group, if it learns; by default nothing is done."""
        return

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Figures of what it learned, by name, for logs and metrics; by default none."""
        return {}

    def refusal(self, axes: Axes) -> str | None:
        if self.needs_latent and not axes.masking.remembers:
            return (
                f"scorer={name_of(self)} scores pruned weights by the values they had, which "
                f"masking={name_of(axes.masking)} forgets: use masking=frozen, ste or auto"
            )
        return None

    @property
    def needs_whole(self) -> str | None:
        if self.calibrates and not self.sees_inputs:
            return "looks at the whole model at once"
        return None if type(self).observe is Scorer.observe else super().needs_whole

    @abstractmethod
    def score(self, param: MaskedParameter) -> Tensor:
        """The scores of one weight, in its shape; higher = keep, and no NaN."""

    def unit_scores(self, group: Group) -> Tensor | None:
        """The scores of a group's units, where they are learned for the units themselves (`group.gate`).

        None, as by default: the score of a unit is the mean of `score` over its weights.
        """
        return None

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step; `param.grad` is the gradient at the masked weights.

        Called on every step until the last level of the schedule; by default nothing is done.
        """
        return

    def learn(self, group: Group) -> None:
        """Update the `Gate` of a group from one optimizer step, after `observe` has seen the group's weights.

        By default nothing is done.
        """
        return

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        """Look at the whole model with its present masks, before each round of pruning; by default nothing is done.

        It puts scores into `param.state["calibrated"]`, which is dropped once the masks are set.
        """
        return


def average_into(param: MaskedParameter, name: str, value: Tensor, decay: float) -> None:
    """Moving average of `value` in `param.state`, started at the first value."""
    average = param.state.get(name)
    if average is None:
        param.state[name] = value.clone()
    else:
        average.lerp_(value, 1 - decay)


def observed(param: MaskedParameter, name: str) -> Tensor:
    """What was gathered under `name`; zeros for a weight that never had a gradient."""
    gathered = param.state.get(name)
    return torch.zeros_like(param.values) if gathered is None else gathered


def check_decay(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"decay={value!r} must be in [0, 1): the share of the past in the moving average")
