"""What optimizers own and remember of weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from pl_sparse.core.parameter import MaskedParameter

__all__ = ["clear_state", "owned_by", "skip_step"]


def owned_by(optimizer: Optimizer, params: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """The weights that an optimizer trains."""
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return [param for param in params if id(param.weight) in weights]


def clear_state(optimizer: Optimizer, param: MaskedParameter) -> None:
    """Zero the optimizer's memory of pruned weights, which would move them once they return.

    That is every floating-point tensor of its state that has the weight's shape: momentum, second moments.
    """
    for value in optimizer.state.get(param.weight, {}).values():
        if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
            value.masked_fill_(~param.mask, 0)


def skip_step(weights: Sequence[Tensor]) -> None:
    """Let the optimizer leave this step out: it passes over what has no gradient."""
    for weight in weights:
        weight.grad = None
