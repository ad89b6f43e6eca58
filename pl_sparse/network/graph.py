"""Graphs of models, by torch.export, and in ONNX."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["in_onnx", "quiet", "traceable", "traced"]


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
        with warnings.catch_warnings():  # a recurrent layer gathers its weights in a list
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
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


def in_onnx(net: nn.Module, example: Tensor) -> Any:
    """A model in ONNX (a `torch.onnx.ONNXProgram`), for batches of any size; its input is called "input", its output
    "output".

    Args:
        net: the model in eval mode.
        example: inputs of some samples.

    Raises:
        ValueError: torch.export cannot trace the model.
    """
    program = traced(net, example)
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        onnx = torch.onnx.export(program, dynamo=True, input_names=["input"], output_names=["output"], verbose=False)
    assert onnx is not None
    for node in onnx.model.graph:  # where each node came from: a third of a small file
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return onnx


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within the block nothing is printed or warned of, and these loggers say errors alone."""
    logged = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in logged]
    for logger in logged:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(logged, levels, strict=True):
            logger.setLevel(level)
