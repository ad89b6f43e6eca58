"""Graphs of models, by torch.export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["traceable", "traced"]


def traceable(net: nn.Module, example: Tensor) -> str | None:
    """Why torch.export cannot trace the model with batches of any size, and what helps; None if it can."""
    try:
        traced(net, example)
    except Exception as error:
        return str(error)
    return None


def traced(net: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of the model, for batches of any size.

    Raises:
        ValueError: it cannot be traced so.
    """
    if len(example) < 2:  # a batch of one is traced as a constant
        example = torch.cat([example, example])
    try:
        return torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    except Exception as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "static" in line), lines[0])
        raise ValueError(
            f"torch.export cannot trace {type(net).__name__} for batches of any size ({reason}). What usually helps: "
            "x.shape[0] in place of len(x) or int(...), and no branch that depends on values"
        ) from error
