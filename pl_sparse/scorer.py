"""How important each weight is: higher = keep. What a scorer gathers over steps lives in `MaskedParameter.state`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from pl_sparse.gate import GAMMA, ZETA, Gate, open_probability, slope, stretched
from pl_sparse.masked import Group, MaskedParameter
from pl_sparse.probe import NORMS, Probe
from pl_sparse.structure import Structure


@dataclass(frozen=True)
class Scorer(ABC):
    """The importance of weights.

    A new one overrides `score`, `observe` if it looks at gradients over time, `calibrate` if it looks at the whole
    model at once, and `start` if it learns a number for each unit.

    Attributes:
        needs_dense: whether it scores pruned weights by the values they had, which masking must then remember.
        observes: whether it needs gradients; without, a level due at step 0 is met before the first batch.
        signed: whether scores can be negative.
        calibrates: whether it scores by `calibrate`, before each round of pruning.
    """

    needs_dense: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        """Once the weights are known: make a `Gate` for each group, if it learns; by default nothing is done."""
        return

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """What there is to tell about what it learned, by name, for logs and metrics; by default nothing."""
        return {}

    @abstractmethod
    def score(self, param: MaskedParameter) -> Tensor:
        """The scores of one weight, in its shape; higher = keep, and no NaN."""

    def observe(self, param: MaskedParameter) -> None:
        """Look at one weight before an optimizer step; `param.grad` is the gradient at the masked weights.

        Called on every step until the last level of the schedule; by default nothing is done.
        """
        return

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        """Look at the whole model with its present masks, before each round of pruning; by default nothing is done.

        It puts scores into `param.state["calibrated"]`, which is dropped once the masks are set.
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
        _decay(self.decay)

    def observe(self, param: MaskedParameter) -> None:
        if param.grad is not None:
            _average(param, "momentum", param.grad.detach(), self.decay)

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "momentum").abs()


@dataclass(frozen=True)
class SNIP(Scorer):
    """|g w|, the connection sensitivity: |dL/dc| of c = 1 in c w, on calibration batches.

    Gradients of several batches are added up before the absolute value is taken. In rounds (`schedule.rounds`) it is
    iterative SNIP; where masking remembers pruned values, and so lets them return between rounds, FORCE.

    Source: Lee, Ajanthan, Torr, SNIP: single-shot network pruning based on connection sensitivity, 2018,
    arXiv:1810.02340, equation 6. There biases are scored and pruned too; here they are neither. De Jorge et al.,
    Progressive skeletonization: trimming more fat from a network at initialization, 2020, arXiv:2006.09081, for rounds.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        for param, grad in zip(params, probe.gradients([param.weight for param in params]), strict=True):
            param.state["calibrated"] = (grad * param.values).abs_()

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "calibrated")


@dataclass(frozen=True)
class GraSP(Scorer):
    """w (H g): high for weights whose removal would take most from the norm of the gradient.

    The first-order change of |g|^2 when w is removed is -2 w (H g): the paper removes where -w (H g) is largest, which
    is to keep where w (H g) is. Logits are divided by `temperature`, at the output of the model's last layer.

    Source: Wang, Zhang, Grosse, Picking winning tickets before training by preserving gradient flow, 2020,
    arXiv:2002.07376, equation 8 and Algorithm 1.

    Args:
        temperature: of the logits.
    """

    temperature: float = 200.0
    calibrates: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be positive")

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        products = probe.hessian_gradients([param.weight for param in params], self.temperature)
        for param, product in zip(params, products, strict=True):
            param.state["calibrated"] = param.values * product

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "calibrated")


@dataclass(frozen=True)
class SynFlow(Scorer):
    """|w dR/dw| with R = 1^T prod |W| 1, the synaptic flow: it needs no data, and conserves its sum over layers.

    R is the sum of the outputs for an input of ones with |w| for each w, computed in float64 and without biases. The
    method is its rounds: `OneShot(rounds=100)`. Activations that are not homogeneous (GELU, softmax) and layer norms
    bend R.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    arXiv:2006.05467, equation 2 and Algorithm 1.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        for param, flow in zip(params, probe.synaptic_flow([param.name for param in params]), strict=True):
            param.state["calibrated"] = flow * param.weight.detach().abs()

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "calibrated")


@dataclass(frozen=True)
class Slimming(Scorer):
    """|gamma| of the batch norm that takes a layer's output, the same for all weights of an output channel.

    Which norm that is, is seen in a forward pass. Layers that no norm follows score above all others, so that one
    threshold leaves them alone as long as it can: leave them out by `exclude`. So does the channel with the largest
    scale of each layer, which keeps layers from being removed whole. For `structure=channel allocation=global`, after
    training with the penalty `regularizer=slimming`.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, 2017, arXiv:1708.06519,
    section 3. There is no such guard.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        if not any(isinstance(module, NORMS) for module in probe.model.modules()):
            raise ValueError(
                "scorer=slimming ranks channels by the batch norm after their layer, and the model has none: use a "
                "model with batch norm, or scorer=magnitude"
            )
        norms = probe.following_norms([param.module for param in params])
        shapes = [param.layout.view(torch.empty(param.shape, device="meta")).shape for param in params]
        scales: list[Tensor | None] = []
        for param, shape in zip(params, shapes, strict=True):
            scale = getattr(norms.get(param.module), "weight", None)
            scales.append(scale.detach().abs() if scale is not None and len(scale) == shape[0] else None)
        top = 1 + max((float(scale.max()) for scale in scales if scale is not None), default=0.0)
        for param, shape, scale in zip(params, shapes, scales, strict=True):
            each = torch.full((shape[0],), 2 * top, device=param.weight.device) if scale is None else scale.clone()
            if scale is not None:
                each[each.argmax()] = 3 * top
            spread = each.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
            param.state["calibrated"] = param.layout.restore(spread, param.shape).to(param.values.dtype).clone()

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "calibrated")


@dataclass(frozen=True)
class Wanda(Scorer):
    """|w_ij| |x_j|_2, with x_j the j-th input of the layer over all calibration samples and positions.

    For `structure=row`, which compares weights within each output, and `allocation=uniform`, on a trained model. A
    convolution's inputs are unfolded, so that j counts (in, *kernel). Weights whose inputs are not seen (see
    `Probe.activations`) score |w|.

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, arXiv:2306.11695,
    equation 1. There a transformer block sees the outputs of the blocks before it as they are once pruned; here all
    layers see those of the model as it is.
    """

    calibrates: ClassVar[bool] = True

    def calibrate(self, params: Sequence[MaskedParameter], probe: Probe) -> None:
        squares: dict[str, Tensor] = {}

        def see(param: MaskedParameter, x: Tensor) -> None:
            more = x.square().sum(1)
            squares[param.name] = squares[param.name] + more if param.name in squares else more

        probe.activations(params, see)
        for param in params:
            score = param.layout.view(param.values.abs())
            if param.name in squares:
                norms = probe.reduced([squares[param.name]])[0].sqrt()
                score = score * norms.repeat_interleave(len(score) // len(norms), 0).to(score.dtype)
            param.state["calibrated"] = param.layout.restore(score, param.shape).clone()

    def score(self, param: MaskedParameter) -> Tensor:
        return _observed(param, "calibrated")


@dataclass(frozen=True)
class Ticket(Scorer):
    """1 for what a mask on disk keeps, 0 for what it removes: to train with a mask that was found before.

    With `ablation` it is the control of a lottery ticket: the same mask shuffled, or on other weights.

    Args:
        path: a file of masks, `ticket.safetensors` of a `Rewind` callback.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no mask for a weight, or one of another shape.
    """

    path: str

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"scorer=ticket: there is no file {self.path}")

    def score(self, param: MaskedParameter) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            names = list(file.keys())
            if f"mask:{param.name}" not in names:
                raise ValueError(f"{self.path} has no mask of {param.name}; it is of another model")
            mask: Tensor = file.get_tensor(f"mask:{param.name}")
        if mask.shape != param.shape:
            raise ValueError(
                f"{self.path}: the mask of {param.name} has shape {tuple(mask.shape)}, the weight {tuple(param.shape)}"
            )
        return mask.to(param.weight.device).float()


@dataclass(frozen=True)
class HardConcrete(Scorer):
    """Gates that are learned under an L0 penalty: weights are z v, each unit's z a hard concrete variable in [0, 1].

    The loss is that of a batch (its mean) + penalty * sum over units |unit| P(z > 0), |unit| the weights it has. The
    paper's lambda is per weight and divided by the number of training examples N, so that penalty = lambda / N: its
    0.1 on MNIST is 0.1 / 60,000. log alpha, one a unit, is trained by

        dL/d(log alpha) = dz/d(log alpha) sum over the unit of g v + penalty |unit| P (1 - P),   P = P(z > 0)

    once an optimizer step with the gradient of the whole step, by an Adam without weight decay, and clamped to
    [log 1e-2, log 1e2]. The score is the gate of evaluation before clipping, sigmoid(log alpha) (zeta - gamma) + gamma:
    a unit is off where it is 0 or less. `masking=gated` samples z in training. The sparsity comes out of the penalty:
    a gate that is shut in evaluation may still open in 31 % of all samples, so that the expected L0 norm is larger than
    the count. Weight decay on v is the optimizer's; the paper weighs it by P.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    equations 10 to 15.

    Args:
        penalty: lambda / N, the price of a weight.
        lr: the learning rate of log alpha.
        keep: the gates' sigmoid(log alpha) at first, in (0, 1); they vary by 0.01.
        seed: of that.
    """

    penalty: float = 0.1 / 60_000
    lr: float = 1e-3
    keep: float = 0.5
    seed: int = 0
    needs_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and self.lr > 0):
            raise ValueError(f"penalty={self.penalty!r} must not be negative, lr={self.lr!r} must be positive")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep!r} must be between 0 and 1")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        for group in groups:
            gate = Gate(group, structure, self.lr)
            seed = (self.seed * 0x9E3779B1 + crc32(group.name.encode())) % 2**63
            drawn = torch.randn(gate.value.shape, generator=torch.Generator().manual_seed(seed))
            gate.value.data.copy_(drawn * 0.01 + math.log(self.keep / (1 - self.keep)))

    def observe(self, param: MaskedParameter) -> None:
        gate = param.gate
        if gate is None or not param.pruned or not gate.last(param):
            return
        probability = open_probability(gate.value.detach())
        price = self.penalty * gate.level * gate.size
        gate.step(gate.correlation() * slope(gate.value.detach(), gate.noise) + price * probability * (1 - probability))
        gate.value.data.clamp_(math.log(1e-2), math.log(1e2))

    def score(self, param: MaskedParameter) -> Tensor:
        if param.gate is None:
            return torch.full_like(param.values, self.keep * (ZETA - GAMMA) + GAMMA)
        return param.gate.spread(stretched(param.gate.value.detach()), param)

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """The expected share of weights that are zero in training."""
        gates = [gate for group in groups if (gate := group.members[0][0].gate) is not None]
        on = sum(float(open_probability(gate.value.detach()).sum()) * gate.size for gate in gates)
        return {"expected_sparsity": 1 - on / max(sum(group.numel for group in groups), 1)}


@dataclass(frozen=True)
class SoftMovement(Scorer):
    """sigmoid(S), with S learned by straight-through gradients: dL/dS = sum over the unit of g w.

    g is the gradient at the masked weights and w the value behind the mask, for pruned units too. The loss has
    penalty * mean over tensors of mean(sigmoid(S)) added, as much of it as the threshold of `updater=threshold` has
    of its own final value. S starts at 0 and is trained by an Adam without weight decay. With `updater=prune` it is
    (hard) movement pruning by an adaptive optimizer, with an exact count.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, section 4 and
    appendix A; for blocks, whose weights share one S, Lagunas et al., Block pruning for faster transformers, 2021,
    arXiv:2109.04838.

    Args:
        penalty: lambda, the price of sigmoid(S).
        lr: the learning rate of S.
    """

    penalty: float = 400.0
    lr: float = 1e-2
    needs_dense: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and self.lr > 0):
            raise ValueError(f"penalty={self.penalty!r} must not be negative, lr={self.lr!r} must be positive")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        for group in groups:
            Gate(group, structure, self.lr).share = 1 / len(groups)

    def observe(self, param: MaskedParameter) -> None:
        gate = param.gate
        if gate is None or not gate.last(param):
            return
        p = gate.value.detach().sigmoid()
        price = self.penalty * gate.level * gate.share / gate.value.numel() if param.pruned else 0.0
        gate.step(gate.correlation() + price * p * (1 - p))

    def score(self, param: MaskedParameter) -> Tensor:
        if param.gate is None:
            return torch.full_like(param.values, 0.5)
        return param.gate.spread(param.gate.value.detach().sigmoid(), param)


@dataclass(frozen=True)
class SoftThreshold(Scorer):
    """|w| - sigmoid(s), with s learned, one a tensor: a weight is off where it is 0 or less.

    For `masking=shrunk`, under which weights are sign(w) relu(|w| - sigmoid(s)) and

        dL/ds = -sigmoid'(s) * sum over the kept weights of g sign(w).

    s is trained by SGD with momentum and weight decay. The decay is the method: s starts so far down that sigmoid(s)
    is 0, is drawn up to 0, and prunes until the gradient holds it. There is no target: s at first and its decay set
    how sparse the model becomes, and so does the length of training, for s goes as init * (1 - lr decay)^steps until
    it is felt, with lr / (1 - momentum) in the place of lr.

    Source: Kusupati et al., Soft threshold weight reparameterization for learnable sparsity, 2020, arXiv:2002.03231,
    equations 3 to 5; numbers of its ResNet-50 at 90 %. There s follows the learning rate schedule of the weights, here
    its learning rate is constant.

    Args:
        init: s at first.
        lr: the learning rate of s.
        momentum: of s.
        decay: the weight decay of s.
    """

    init: float = -3200.0
    lr: float = 0.256
    momentum: float = 0.875
    decay: float = 2.2517e-5
    needs_dense: ClassVar[bool] = True
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
        pull = (param.grad.detach() * param.weight.detach().sign()).to(s.dtype).sum()  # the sign of 0 is 0
        gradient = -p * (1 - p) * pull + self.decay * s
        velocity = param.state.setdefault("threshold_velocity", torch.zeros_like(s))
        velocity.mul_(self.momentum).add_(gradient)
        s.sub_(self.lr * velocity)

    def score(self, param: MaskedParameter) -> Tensor:
        return param.values.abs() - self._threshold(param).sigmoid().to(param.weight.dtype)

    def facts(self, groups: Sequence[Group]) -> dict[str, float]:
        """The mean of the thresholds sigmoid(s)."""
        found = [float(self._threshold(param).sigmoid()) for group in groups for param, _ in group.members]
        return {"threshold": sum(found) / max(len(found), 1)}
