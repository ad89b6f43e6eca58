"""ONNX files, for ONNX Runtime and other readers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Traced, compared, require
from pl_sparse.network.graph import in_onnx
from pl_sparse.network.runtimes import onnx_session
from pl_sparse.quantize.base import torchao_refusal
from pl_sparse.structure import Structure

__all__ = ["ONNX", "ONNXInt8", "open_onnx", "save_onnx"]


def save_onnx(net: nn.Module, example: Tensor, path: Path) -> None:
    """Write a model to an ONNX file that takes batches of any size; its input is called "input", its output "output".

    Args:
        net: the model in eval mode.
        example: inputs of some samples.
        path: the file; what was there is replaced.

    Raises:
        ValueError: torch.export cannot trace the model.
        ImportError: onnx or onnxscript is missing.
    """
    require("onnx", "export", "onnx", "onnxscript")
    onnx = in_onnx(net, example)
    with replacing(path) as temporary:
        onnx.save(temporary)


def open_onnx(path: Path, threads: int | None = None) -> Executable:
    """An ONNX file in ONNX Runtime, on the CPU (`network.runtimes.onnx_session`).

    Args:
        path: the file.
        threads: as many as torch uses, if None.

    Raises:
        ImportError: onnxruntime is missing.
    """
    try:
        session = onnx_session(str(path), threads)
    except ImportError as error:
        raise ImportError("ONNX files run in onnxruntime: pip install 'pl_sparse[export]'") from error
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: x.detach().cpu().numpy()})[0]))

    return run


@cache
def saturates() -> bool:
    """Whether ONNX Runtime computes products of uint8 with int8 wrongly on this processor.

    x86 processors without VNNI add two products in 16 bits there, and cut off what is larger. Products of uint8 with
    uint8 are right on each.
    """
    from onnx import TensorProto, helper, numpy_helper

    largest = numpy_helper.from_array(np.full((64, 16), 127, dtype=np.int8), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "largest",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])],
        [largest],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (product,) = onnx_session(model.SerializeToString(), 1).run(None, {"a": np.full((1, 64), 255, dtype=np.uint8)})
    return bool((product != 64 * 255 * 127).any())


def with_unsigned_weights(path: Path) -> None:
    """Store the 8-bit matrices of an ONNX file as uint8 with a zero point of 128, in place of int8 with one of 0.

    The numbers that they stand for are the same: w = scale (u - 128), so a weight of zero is 128.

    Args:
        path: the file; it is replaced.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    added: dict[str, Any] = {}

    def shifted(name: str, like: tuple[int, ...] = ()) -> str:
        """The name of a tensor that is larger by 128; without a name, of one that is 128 throughout."""
        values = numpy_helper.to_array(stored[name]).astype(np.int16) if name else np.zeros(like, np.int16)
        other = f"{name}_unsigned" if name else f"zero_point_{'x'.join(map(str, like)) or 'one'}_unsigned"
        added[other] = numpy_helper.from_array((values + 128).astype(np.uint8), other)
        return other

    for node in model.graph.node:
        weight = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != onnx.TensorProto.INT8 or len(weight.dims) < 2:
            continue
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero and zero not in stored:
            continue
        scale = tuple(stored[node.input[1]].dims) if node.input[1] in stored else ()
        node.input[:] = [shifted(node.input[0]), node.input[1], shifted(zero, scale)]
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    left = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*left, *added.values()])
    with replacing(path) as temporary:
        onnx.save(model, temporary)


class ONNX(Traced):
    """The model in ONNX, checked in ONNX Runtime against torch.

    ONNX Runtime multiplies zeros like other numbers; removed channels and heads make the model faster.

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
    """

    file = "model.onnx"
    runtime = "ONNX Runtime"
    extra = "export"
    packages = "onnx", "onnxscript", "onnxruntime"
    advice = (
        "channels that are gone (structure=channel, structure=head), or sparse kernels (export=csr): ONNX Runtime "
        "multiplies zeros like other numbers"
    )

    def __init__(self, tolerance: float = 1e-4) -> None:
        self.tolerance = tolerance

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        save_onnx(net, example, path)
        return [compared(open_onnx(path), net, example, self.tolerance, f"{path} in ONNX Runtime")]

    def open(self, path: Path, net: nn.Module) -> Executable:
        return open_onnx(path)

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Executable:
        save_onnx(net, example, folder / "dense.onnx")
        return open_onnx(folder / "dense.onnx")


class ONNXInt8(ONNX):
    """The model with 8-bit weights and activations in ONNX (QuantizeLinear and DequantizeLinear around each layer).

    With `quantization=int8` it is the model that was trained with integers; otherwise it is quantized after training,
    on training batches. Two runtimes sometimes round differently, hence the wider tolerance; the accuracy is reported
    beside it.

    Weights are int8, or uint8 with a zero point of 128, which stand for the same numbers. ONNX Runtime computes int8
    wrongly on x86 processors without VNNI, and uint8 rightly on all, more slowly where VNNI is. `weights="auto"` is
    what is right on the processor that writes the file.

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
        weights: int8, uint8 or auto.
    """

    file = "model_int8.onnx"
    dtype = "int8"
    advice = "a processor with 8-bit dot products, larger layers, or channels that are gone (structure=channel)"

    def __init__(self, tolerance: float = 0.1, weights: str = "auto") -> None:
        super().__init__(tolerance)
        if weights not in ("auto", "int8", "uint8"):
            raise ValueError(f"weights={weights!r} is unknown: give int8, uint8 or auto")
        self.weights = weights

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        return torchao_refusal() or super().refusal(net, example, structure, sparsity)

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        save_onnx(net, example, path)
        unsigned = self.weights == "uint8" or (self.weights == "auto" and saturates())
        if unsigned:
            with_unsigned_weights(path)
        note = compared(open_onnx(path), net, example, self.tolerance, f"{path} in ONNX Runtime")
        right = "uint8, which is right on each processor"
        needs = "int8: x86 processors without VNNI need weights=uint8"
        return [note, f"weights are {right if unsigned else needs}"]
