"""Graphs of models, by torch.export."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["traceable", "traced"]


def traceable(net: nn.Module, example: Tensor, largest: int | None = None) -> str | None:
    """Why torch.export cannot trace the model with batches of these sizes, and what helps; None if it can.

    Args:
        net: the model.
        example: inputs of some samples.
        largest: as in `traced`.
    """
    try:
        traced(net, example, largest)
    except Exception as error:
        return str(error)
    return None


def traced(net: nn.Module, example: Tensor, largest: int | None = None) -> torch.export.ExportedProgram:
    """The graph of the model.

    Args:
        net: the model.
        example: inputs of some samples.
        largest: the batches that it takes have 1 to so many samples; 1: a graph of single samples; None: any size.

    Raises:
        ValueError: it cannot be traced so.
    """
    sizes: Any
    if largest == 1:
        example, sizes = example[:1], None
    else:
        if len(example) < 2:  # a batch of one is traced as a constant
            example = torch.cat([example, example])
        dimension: Any = torch.export.Dim.DYNAMIC
        sizes = ({0: torch.export.Dim("batch", min=1, max=largest) if largest else dimension},)
        first = next(iter(inspect.signature(net.forward).parameters.values()), None)
        if first is not None and first.kind is first.VAR_POSITIONAL:
            sizes = (sizes,)
    try:
        return torch.export.export(net, (example,), dynamic_shapes=sizes, strict=False)
    except Exception as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "static" in line), lines[0])
        batches = (
            "single samples" if largest == 1 else f"batches of {'any size' if largest is None else f'1 to {largest}'}"
        )
        raise ValueError(
            f"torch.export cannot trace {type(net).__name__} for {batches} ({reason}). What usually helps: "
            "x.shape[0] in place of len(x) or int(...), and no branch that depends on values"
        ) from error
