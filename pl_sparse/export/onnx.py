"""ONNX files, for ONNX Runtime and other readers."""

from __future__ import annotations

from pathlib import Path

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

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
    """

    file = "model_int8.onnx"
    dtype = "int8"
    advice = "a processor with 8-bit dot products, larger layers, or channels that are gone (structure=channel)"

    def __init__(self, tolerance: float = 0.1) -> None:
        super().__init__(tolerance)

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        return torchao_refusal() or super().refusal(net, example, structure, sparsity)
