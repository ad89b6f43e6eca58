"""What optimizers own and remember of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer

from pl_sparse.core.dtensor import full
from pl_sparse.core.gate import Gate
from pl_sparse.core.parameter import MaskedParameter, zero_pruned
from pl_sparse.core.upstream import zero_memory

__all__ = ["SCALES", "begin_anew", "clear_state", "leaves_zeros", "owned_by", "pace", "skip_step", "with_inner"]

SCALES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "step_size", "state2"))
"""What optimizers keep of the size of gradients, not of their direction: second moments and the like."""


_BY_GRADIENTS = frozenset(
    (SGD, Adam, AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, Adagrad, Adadelta)
)


def owned_by(optimizer: Optimizer, params: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """The weights that an optimizer trains."""
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return [param for param in params if id(param.weight) in weights]


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it holds and steps itself: SAM's base, the local one of ZeRO."""
    held = [optimizer]
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer):
            held += with_inner(inner)
    return held


def leaves_zeros(optimizer: Optimizer) -> bool:
    """Whether a step leaves a weight at zero whose gradient and momentum are zero: those of torch, not their heirs."""
    return type(optimizer) in _BY_GRADIENTS


def begin_anew(optimizer: Optimizer) -> None:
    """Let L-BFGS forget its directions, which are of all weights at once, pruned ones included; others stay."""
    for owner in with_inner(optimizer):
        if isinstance(owner, LBFGS):
            for memory in owner.state.values():
                memory["n_iter"] = 0


def clear_state(optimizer: Optimizer, param: MaskedParameter, scales: bool = False) -> None:
    """Zero the optimizer's memory of pruned weights, which would move them once they return.

    That is every floating-point tensor of its state that has the weight's shape, and what 8-bit optimizers keep in
    their place, but for second moments: without them a weight that returns would move by several rates at once.

    Args:
        scales: whether second moments are zeroed too.
    """
    for owner in with_inner(optimizer):
        state = owner.state.get(param.weight) or {}  # ZeRO's own has None, and its local optimizer the state
        for key, value in state.items():
            if (scales or key not in SCALES) and isinstance(value, Tensor) and value.shape == param.shape:
                zero_memory(state, key, param.mask)


def pace(gates: Sequence[Gate], params: Sequence[MaskedParameter], optimizer: Optimizer | None) -> None:
    """Let gates learn as their weights do: where they follow, at the part of their rate that the learning-rate schedule
    has in force, and from gradients that are clipped, where they clip.

    The schedule is known by what torch's schedulers leave in the parameter groups (`initial_lr`, `max_lr`); without
    them the rate is constant.

    Args:
        gates: those that learn at this step.
        params: the weights that the optimizer trains, with their gradients, which are not masked yet.
        optimizer: None: there is none to follow, and clipping looks at `params` alone.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    by_weight = {id(weight): group for group in groups for weight in group["params"]}
    for gate in gates:
        group = by_weight.get(id(gate.members[-1][0].weight), {})
        peak = group.get("max_lr", group.get("initial_lr", 0))
        gate.rate = float(group["lr"] / peak) if gate.follows and peak else 1.0
    clips = {gate.clip for gate in gates if gate.clip is not None}
    if clips:
        masked = {id(param.weight): param for param in params}
        trained = [w for group in groups for w in group["params"]] or [param.weight for param in params]
        norms = [_norm(w.grad, masked.get(id(w))).to(gates[0].value) for w in trained if w.grad is not None]
        norm = torch.stack(norms).norm() if norms else torch.zeros_like(gates[0].value.sum())
        for gate in gates:
            if gate.clip is not None:
                gate.shrink = (gate.clip / (norm + 1e-6)).clamp(max=1)


def _norm(gradient: Tensor, param: MaskedParameter | None) -> Tensor:
    """The norm of a gradient where its weight is kept."""
    gradient = full(gradient.detach())
    if type(param) is MaskedParameter:
        kept = torch.empty_like(gradient)
        zero_pruned([kept], [param], [gradient])
        gradient = kept
    elif param is not None:
        gradient = gradient * param.factor
    (norm,) = torch._foreach_norm([gradient])
    return norm


def skip_step(weights: Sequence[Tensor]) -> None:
    """Let the optimizer leave this step out: it passes over what has no gradient."""
    for weight in weights:
        weight.grad = None
