"""Scores by the whole model on calibration batches, usually at initialization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import Probe
from pl_sparse.scorer.base import Scorer, observed

__all__ = ["SNIP", "GraSP", "SynFlow"]


@register
@dataclass(frozen=True)
class SNIP(Scorer):
    """|g w|, the connection sensitivity: |dL/dc| of c = 1 in c w, on calibration batches.

    Gradients of several batches are added up before the absolute value is taken. In rounds (`schedule.rounds`) it is
    iterative SNIP; where masking remembers pruned values, and so lets them return between rounds, FORCE. Each round
    looks at other batches, as in the authors' code.

    Source: Lee, Ajanthan, Torr, SNIP: single-shot network pruning based on connection sensitivity, 2018,
    arXiv:1810.02340, equation 6. There biases are scored and pruned too; here they are neither. De Jorge et al.,
    Progressive skeletonization: trimming more fat from a network at initialization, 2020, arXiv:2006.09081, for rounds.

    Args:
        fresh: whether each round has batches of its own; False: all rounds look at the same.
    """

    fresh: bool = True
    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        for param, grad in zip(params, probe.gradients([param.weight for param in params]), strict=True):
            param.state["calibrated"] = (grad * param.values).abs_()
        if self.fresh:
            probe.renew()

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")


@register
@dataclass(frozen=True)
class GraSP(Scorer):
    """w (H g), H the Hessian: high for weights whose removal would reduce the norm of the gradient most.

    The first-order change of |g|^2 when w is removed is -2 w (H g): the paper removes the weights of largest -w (H g),
    so the weights of largest w (H g) are kept. Logits are divided by `temperature`.

    Source: Wang, Zhang, Grosse, Picking winning tickets before training by preserving gradient flow, 2020,
    arXiv:2002.07376, equation 8 and Algorithm 1. The authors' code takes as many examples of each class (10 on
    CIFAR-10) and draws the last layers anew for scoring; here batches are those of training, and scores are of the
    model's own weights.

    Args:
        temperature: what the logits are divided by.
        logits: the name of the module whose outputs are the logits, or a pattern for several heads; None: the layer
            that the model registers last, which may be an auxiliary head.
    """

    temperature: float = 200.0
    logits: str | None = None
    calibrates: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be positive")

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        products = probe.hessian_gradients([param.weight for param in params], self.temperature, self.logits)
        for param, product in zip(params, products, strict=True):
            param.state["calibrated"] = param.values * product

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")


@register
@dataclass(frozen=True)
class SynFlow(Scorer):
    """|w dR/dw| with R = 1^T prod |W| 1, the synaptic flow: it needs no data, and conserves its sum over layers.

    R is the sum of the outputs for an input of ones with |w| for each w, computed in float64 and without biases. The
    method is its rounds: `OneShot(rounds=100)`. Activations that are not homogeneous (GELU, softmax) and layer norms
    distort R.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    arXiv:2006.05467, equation 2 and Algorithm 1.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        for param, flow in zip(params, probe.synaptic_flow([param.name for param in params]), strict=True):
            param.state["calibrated"] = flow * param.data.detach().abs()

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "calibrated")
