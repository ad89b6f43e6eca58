"""What optimizers own and remember of weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.parameter import MaskedParameter

__all__ = ["clear_state", "owned_by", "skip_step"]

_SCALES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "step_size"))
"""What torch's optimizers keep of the size of gradients, not of their direction: second moments and the like."""


def owned_by(optimizer: Optimizer, params: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """The weights that an optimizer trains."""
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return [param for param in params if id(param.weight) in weights]


def clear_state(optimizer: Optimizer, param: MaskedParameter, scales: bool = False) -> None:
    """Zero the optimizer's memory of pruned weights, which would move them once they return.

    That is every floating-point tensor of its state that has the weight's shape, but for second moments: without
    them a weight that returns would move by several rates at once.

    Args:
        scales: whether second moments are zeroed too.
    """
    for name, value in optimizer.state.get(param.weight, {}).items():
        directs = scales or name not in _SCALES
        if directs and isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
            value.masked_fill_(~param.mask, 0)


def skip_step(weights: Sequence[Tensor]) -> None:
    """Let the optimizer leave this step out: it passes over what has no gradient."""
    for weight in weights:
        weight.grad = None
