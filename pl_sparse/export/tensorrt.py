"""TensorRT: ONNX files whose weights are 2:4 along the axis that its sparse tactics need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pl_sparse.export.format import require
from pl_sparse.export.onnx import ONNX
from pl_sparse.structure import Structure

__all__ = ["TensorRT", "two_four"]

_Array = np.ndarray[Any, Any]
_PASSING = {"Identity", "Cast", "DequantizeLinear", "QuantizeLinear"}
"""Operations that keep zeros, and places, of their first input."""


def two_four(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """Which layers of an ONNX file have 2:4 weights along their inputs, as TensorRT's sparse tactics need them.

    In a convolution's weight (out, in, *kernel), at most two of four neighbouring inputs at a kernel position are
    nonzero; in a matrix (inputs, outputs), at most two of four neighbouring inputs of an output. Integers are compared
    with 0, which is the zero of symmetric quantization.

    Args:
        path: the file, in floating point or with 8-bit weights (QuantizeLinear and DequantizeLinear).

    Returns:
        The names of the weights that are 2:4, and the reason for each other weight.

    Raises:
        ImportError: onnx is missing.
    """
    require("tensorrt", "export", "onnx")
    fit, unfit = [], {}
    for name, rows in _matrices(path):
        reason = _unfit(rows)
        if reason is None:
            fit.append(name)
        else:
            unfit[name] = reason
    return fit, unfit


def _unfit(weight: _Array) -> str | None:
    """Why a weight (..., inputs) is not 2:4; None if it is."""
    inputs = weight.shape[-1]
    if inputs % 4:
        return f"its {inputs} inputs are not multiples of 4"
    groups = (weight.reshape(*weight.shape[:-1], -1, 4) != 0).sum(-1)  # (..., inputs / 4)
    wrong = int((groups > 2).sum())
    return f"{wrong} of {groups.size} groups of 4 inputs have more than 2 weights" if wrong else None


def _matrices(path: str | os.PathLike[str]) -> Iterator[tuple[str, _Array]]:
    """The weights of convolutions and products, by name, with their inputs last."""
    import onnx

    graph = onnx.load(os.fspath(path)).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def constant(name: str) -> tuple[str, _Array] | None:
        """A value that does not depend on the input, and the name of the tensor that it is made of."""
        if name in arrays:
            return name, onnx.numpy_helper.to_array(arrays[name])
        node = makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return name, onnx.numpy_helper.to_array(node.attribute[0].t)
        source = constant(node.input[0]) if node.op_type in {*_PASSING, "Transpose"} else None
        if source is None or node.op_type != "Transpose":
            return source
        order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
        return source[0], source[1].transpose(order)

    for node in graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"}:
            continue
        found = constant(node.input[1])
        if found is None or found[1].ndim < 2:
            continue
        name, weight = found
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        yield name, np.moveaxis(weight, 1 if node.op_type == "Conv" or transposed else -2, -1)


class TensorRT(ONNX):
    """The model in ONNX with 2:4 weights, checked to be so along the right axis; TensorRT builds an engine of it.

    TensorRT is not needed for this; it builds the engine on the machine with the GPU: `trtexec
    --onnx=model_tensorrt.onnx --fp16 --sparsity=enable`.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378.

    Args:
        tolerance: the largest difference of outputs in ONNX Runtime, as a part of their largest absolute value.
    """

    file = "model_tensorrt.onnx"
    runtime = "TensorRT"

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        if not structure.label.startswith("2:4"):
            return f"TensorRT's sparse tactics know 2:4 alone, not structure={structure.label}: use structure=nm24"
        return super().refusal(net, example, structure, sparsity)

    def unmeasurable(self) -> str | None:
        return f"trtexec --onnx={self.file} --fp16 --sparsity=enable, and --sparsity=disable beside it, on the GPU"

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        notes = super().write(net, example, path)
        fit, unfit = two_four(path)
        reasons = [f"{name} stays dense: {reason}" for name, reason in unfit.items()]
        if not fit:
            raise ValueError("no weight is 2:4 along its inputs: " + ("; ".join(reasons[:5]) or "there is no matrix"))
        return [*notes, f"{len(fit)} of {len(fit) + len(unfit)} weights are 2:4 along their inputs", *reasons]
