"""What an optimizer remembers of parameters that become smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.core.cut import Cut
from pl_sparse.surgery.plan import RemovalPlan

__all__ = ["shrink_optimizers"]


def shrink_optimizers(optimizers: Sequence[Optimizer], model: nn.Module, plan: RemovalPlan) -> Callable[[], None]:
    """Check that the optimizers' state can follow a plan.

    Tensors of a state are cut along the dimensions in which they have the parameter's size: momentum and the like
    (the parameter's shape), row and column factors (size 1 in one dimension). Counters are left alone.

    Args:
        optimizers: those that train the model.
        model: before the plan is applied.
        plan: what is taken out.

    Returns:
        What cuts the state, to be called after the plan is applied.

    Raises:
        ValueError: a state has a tensor of another shape; nothing has changed.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cuts: list[tuple[dict[str, Any], str, Cut]] = []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            cut = plan.tensors.get(names.get(id(parameter), ""))
            if cut is None:
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.numel() <= 1:
                    continue
                fits = value.dim() == len(cut.shape) and all(
                    a in (1, b) for a, b in zip(value.shape, cut.shape, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for "
                        f"{names[id(parameter)]} of shape {cut.shape}: how to shrink it is not known"
                    )
                cuts.append((state, key, cut))

    @torch.no_grad()
    def cut_all() -> None:
        for state, key, cut in cuts:
            state[key] = cut.take(state[key])
        left = {id(parameter) for parameter in model.parameters()}
        gone = names.keys() - left  # of modules that are gone
        for optimizer in optimizers if gone else ():
            for group in optimizer.param_groups:
                for parameter in [each for each in group["params"] if id(each) in gone]:
                    optimizer.state.pop(parameter, None)
                group["params"] = [each for each in group["params"] if id(each) not in gone]

    return cut_all
