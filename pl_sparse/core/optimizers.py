"""What optimizers own and remember of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.upstream import zero_memory

__all__ = ["clear_state", "owned_by", "skip_step", "with_inner"]


def owned_by(optimizer: Optimizer, params: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """The weights that an optimizer trains."""
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return [param for param in params if id(param.weight) in weights]


def with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, and those that it holds and steps itself: SAM's base, the local one of ZeRO."""
    yield optimizer
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer):
            yield from with_inner(inner)


def clear_state(optimizer: Optimizer, param: MaskedParameter) -> None:
    """Zero the optimizer's memory of pruned weights, which would move them once they return.

    That is every floating-point tensor of its state that has the weight's shape (momentum, second moments), and what
    8-bit optimizers keep in their place. L-BFGS, whose directions are of all weights at once, begins anew.
    """
    for owner in with_inner(optimizer):
        if isinstance(owner, LBFGS):
            for memory in owner.state.values():
                memory["n_iter"] = 0
        state = owner.state.get(param.weight) or {}  # ZeRO's own has None, and its local optimizer the state
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                zero_memory(state, key, param.mask)


def skip_step(weights: Sequence[Tensor]) -> None:
    """Let the optimizer leave this step out: it passes over what has no gradient."""
    for weight in weights:
        weight.grad = None
