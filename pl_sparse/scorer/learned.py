"""Scores that are learned beside the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.core.gate import GAMMA, ZETA, Gate, open_probability, slope, stretched
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.scorer.base import Scorer, observed
from pl_sparse.structure import Structure

__all__ = ["HardConcrete", "Movement", "SoftMovement", "SoftThreshold"]


@register
@dataclass(frozen=True)
class HardConcrete(Scorer):
    """Gates that are learned under an L0 penalty: weights are z v, each unit's z a hard concrete variable in [0, 1].

    The loss is that of a batch (its mean) + penalty * sum over units |unit| P(z > 0), |unit| the weights it has, with
    `updater=threshold` alone. Any other updater decides how many units stay, and there is no penalty. The paper's
    lambda is per weight and divided by the number of training examples N, so that penalty = lambda / N: its 0.1 on
    MNIST is 0.1 / 60,000. log alpha, one per unit, is trained by

        dL/d(log alpha) = dz/d(log alpha) sum over the unit of g v + penalty |unit| P (1 - P),   P = P(z > 0)

    once per optimizer step with the gradient of the whole step, by an Adam without weight decay at a constant rate, and
    clamped to [log 1e-2, log 1e2]; under `updater=lagrangian` to [log 1e-5, log 1e2], as a gate at log 1e-2 is still
    open in 5 % of all samples. The score is the gate of evaluation before clipping, sigmoid(log alpha) (zeta - gamma) +
    gamma: a unit is off where it is 0 or less. `masking=gated` samples z in training. The sparsity follows from the
    penalty. A gate that is shut in evaluation may still open in 31 % of all samples, so that the expected L0 norm is
    larger than the count. Weight decay on v is the optimizer's; the paper weighs it by P.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    equations 10 to 15.

    Args:
        penalty: lambda / N, the price of a weight.
        lr: the learning rate of log alpha.
        keep: the initial sigmoid(log alpha) of the gates, in (0, 1); gates vary by 0.01.
        seed: the seed of these numbers.
    """

    penalty: float = 0.1 / 60_000
    lr: float = 1e-3
    keep: float = 0.5
    seed: int = 0
    needs_latent: ClassVar[bool] = True
    priced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and self.lr > 0):
            raise ValueError(f"penalty={self.penalty!r} must not be negative, lr={self.lr!r} must be positive")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep!r} must be between 0 and 1")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        for group in groups:
            gate = group.gate = Gate(group.name, group.members, structure, self.lr)
            seed = (self.seed * 0x9E3779B1 + crc32(group.name.encode())) % 2**63
            drawn = torch.randn(gate.value.shape, generator=torch.Generator().manual_seed(seed))
            gate.value.data.copy_(drawn * 0.01 + math.log(self.keep / (1 - self.keep)))

    def learn(self, group: Group) -> None:
        gate = group.gate
        if gate is None or not group.pruned:
            return
        probability = open_probability(gate.value.detach())
        price = (self.penalty * gate.level if gate.price is None else gate.price) * gate.size
        gate.step(gate.correlation() * slope(gate.value.detach(), gate.noise) + price * probability * (1 - probability))
        gate.value.data.clamp_(math.log(1e-2 if gate.price is None else 1e-5), math.log(1e2))

    def expected(self, group: Group) -> Tensor:
        assert group.gate is not None
        return open_probability(group.gate.value.detach()).sum() * group.gate.size

    def score(self, param: MaskedParameter) -> Tensor:
        """That of a gate that has learned nothing yet."""
        return torch.full_like(param.values, self.keep * (ZETA - GAMMA) + GAMMA)

    def unit_scores(self, group: Group) -> Tensor | None:
        return None if group.gate is None else stretched(group.gate.value.detach())

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """The expected share of weights that are zero in training."""
        on = sum(float(self.expected(group)) for group in groups if group.gate is not None)
        return {"expected_sparsity": 1 - on / max(sum(group.numel for group in groups), 1)}


@register
@dataclass(frozen=True)
class Movement(Scorer):
    """S, trained beside the weights by straight-through gradients: high for weights that move away from zero.

        dL/dS = sum over the unit of g w

    g is the gradient at the masked weights, for pruned ones too, and w the value behind the mask, so that a pruned
    weight can come back. S starts at 0. The published numbers were not made by equation 3 but by an AdamW without
    weight decay on S at 1e-2 with warm-up, and by gradients of scores and model that are clipped together: `rule=adam`.
    Its rate follows the learning-rate schedule of the weights. The norm that is clipped is that of the model; S would
    add little to it, because dL/dS is g times a weight. `rule=sum` is equation 3: S = -lr * sum over steps of g w.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, equation 3 and
    appendix A, and the authors' code; for blocks, whose weights share one S, Lagunas et al., Block pruning for faster
    transformers, 2021, arXiv:2109.04838. There masks are set at every step (`schedule.every=1`), and the gradients of a
    step are masked like its forward pass; here they are masked by the masks that the step sets.

    Args:
        lr: the learning rate of S. Under `rule=sum` it does not change ranks, but scales S for thresholds.
        rule: what trains S.
        clip: the norm of the model's gradients above which that of S is scaled down, for `rule=adam`; None: never. The
            model itself is clipped by `Trainer(gradient_clip_val=...)`.
    """

    lr: float = 1e-2
    rule: Literal["adam", "sum"] = "adam"
    clip: float | None = 1.0
    needs_latent: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r} must be positive")
        if self.rule not in ("adam", "sum"):
            raise ValueError(f"rule={self.rule!r} must be one of adam, sum")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip!r} must be positive, or null")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        if self.rule == "adam":
            for group in groups:
                group.gate = Gate(group.name, group.members, structure, self.lr, True, self.clip)

    def observe(self, param: MaskedParameter) -> None:
        if self.rule == "sum" and param.grad is not None:
            if "movement" not in param.state:
                param.state["movement"] = torch.zeros_like(param.values)
            param.state["movement"].addcmul_(param.grad.detach(), param.values, value=-self.lr)

    def learn(self, group: Group) -> None:
        if group.gate is not None:
            group.gate.step(group.gate.correlation())

    def score(self, param: MaskedParameter) -> Tensor:
        return observed(param, "movement")

    def unit_scores(self, group: Group) -> Tensor | None:
        return None if group.gate is None else group.gate.value.detach()


@register
@dataclass(frozen=True)
class SoftMovement(Scorer):
    """sigmoid(S), with S learned by straight-through gradients: dL/dS = sum over the unit of g w.

    g is the gradient at the masked weights and w the value behind the mask, for pruned units too. With
    `updater=threshold` the loss has penalty * mean over tensors of mean(sigmoid(S)) added, scaled like the threshold,
    which rises to its final value. S starts at 0 and is trained by an Adam without weight decay, whose rate follows the
    learning-rate schedule of the weights. With `updater=prune` there is no penalty, and it is (hard) movement pruning
    with an exact count, as `scorer=movement` is.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, section 4 and
    appendix A; for blocks, whose weights share one S, Lagunas et al., Block pruning for faster transformers, 2021,
    arXiv:2109.04838.

    Args:
        penalty: lambda, the price of sigmoid(S), for `updater=threshold`.
        lr: the learning rate of S.
    """

    penalty: float = 400.0
    lr: float = 1e-2
    needs_latent: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    priced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and self.lr > 0):
            raise ValueError(f"penalty={self.penalty!r} must not be negative, lr={self.lr!r} must be positive")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        for group in groups:
            group.gate = Gate(group.name, group.members, structure, self.lr, follows=True)
            group.gate.share = 1 / len(groups)

    def learn(self, group: Group) -> None:
        gate = group.gate
        if gate is None:
            return
        p = gate.value.detach().sigmoid()
        own = self.penalty * gate.level * gate.share / gate.value.numel()
        price = own if gate.price is None else gate.price * gate.size
        gate.step(gate.correlation() + (price if group.pruned else 0.0) * p * (1 - p))

    def expected(self, group: Group) -> Tensor:
        assert group.gate is not None
        return group.gate.value.detach().sigmoid().sum() * group.gate.size

    def score(self, param: MaskedParameter) -> Tensor:
        """That of a gate that has learned nothing yet."""
        return torch.full_like(param.values, 0.5)

    def unit_scores(self, group: Group) -> Tensor | None:
        return None if group.gate is None else group.gate.value.detach().sigmoid()


@register
@dataclass(frozen=True)
class SoftThreshold(Scorer):
    """|w| - sigmoid(s), with one learned s per tensor: a weight is pruned where it is 0 or less.

    For `masking=softthresholded`, under which weights are sign(w) relu(|w| - sigmoid(s)) and

        dL/ds = -sigmoid'(s) * sum over the kept weights of g sign(w).

    s is trained by SGD with momentum and weight decay. The decay drives the method: s starts so low that sigmoid(s) is
    0, the decay draws it towards 0, and it prunes until the gradient holds it. There is no target sparsity: the initial
    s, its decay and the length of training determine it, because s is init * (1 - lr decay)^steps until it takes
    effect, with lr / (1 - momentum) in place of lr.

    Source: Kusupati et al., Soft threshold weight reparameterization for learnable sparsity, 2020, arXiv:2002.03231,
    equations 3 to 5; numbers of its ResNet-50 at 90 %. There the rate of s follows the learning-rate schedule of the
    weights; here it is constant.

    Args:
        init: the initial s.
        lr: the learning rate of s.
        momentum: the momentum with which s is trained.
        decay: the weight decay of s.
    """

    init: float = -3200.0
    lr: float = 0.256
    momentum: float = 0.875
    decay: float = 2.2517e-5
    needs_latent: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.decay >= 0 and 0 <= self.momentum < 1):
            raise ValueError(
                f"lr={self.lr!r} must be positive, decay={self.decay!r} not negative, momentum={self.momentum!r} in "
                "[0, 1)"
            )

    def _threshold(self, param: MaskedParameter) -> Tensor:
        """s, a scalar in `param.state`."""
        if "threshold" not in param.state:
            dtype = torch.promote_types(param.weight.dtype, torch.float32)
            param.state["threshold"] = torch.tensor(self.init, dtype=dtype, device=param.weight.device)
        return param.state["threshold"]

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is None or not param.pruned:
            return
        s = self._threshold(param)
        p = s.sigmoid()
        pull = param.total((param.grad.detach() * param.data.detach().sign()).to(s.dtype))  # the sign of 0 is 0
        gradient = -p * (1 - p) * pull + self.decay * s
        velocity = param.state.setdefault("threshold_velocity", torch.zeros_like(s))
        velocity.mul_(self.momentum).add_(gradient)
        s.sub_(self.lr * velocity)

    def score(self, param: MaskedParameter) -> Tensor:
        return param.values.abs() - self._threshold(param).sigmoid().to(param.weight.dtype)

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """The mean of the thresholds sigmoid(s)."""
        thresholds = [float(self._threshold(param).sigmoid()) for group in groups for param, _ in group.members]
        return {"threshold": sum(thresholds) / max(len(thresholds), 1)}
