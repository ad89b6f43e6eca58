"""OpenVINO: graphs for Intel's processors, whose plugin packs zeros of 8-bit matrices."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Traced, compared, require
from pl_sparse.export.onnx import save_onnx
from pl_sparse.network.runtimes import openvino_request
from pl_sparse.quantize.base import torchao_refusal
from pl_sparse.structure import Structure

__all__ = ["OpenVINO", "OpenVINOInt8", "open_openvino", "save_openvino"]

_RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
_CPUINFO = Path("/proc/cpuinfo")


def save_openvino(net: nn.Module, example: Tensor, path: Path) -> None:
    """Write a model to OpenVINO's two files, a graph (.xml) and weights (.bin); it takes batches of any size.

    Args:
        net: the model in eval mode.
        example: inputs of some samples.
        path: the graph; the weights stand beside it under the same stem. What was there is replaced.

    Raises:
        ValueError: torch.export cannot trace the model.
        ImportError: openvino, onnx or onnxscript is missing.
    """
    require("openvino", OpenVINO.extra, *OpenVINO.packages)
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        save_onnx(net, example, Path(folder) / "model.onnx")
        model = openvino.Core().read_model(str(Path(folder) / "model.onnx"))
        openvino.save_model(model, str(Path(folder) / path.name), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # the graph last: without it there is no model
            with replacing(path.with_suffix(suffix)) as temporary:
                shutil.copyfile((Path(folder) / path.name).with_suffix(suffix), temporary)


def open_openvino(path: Path, decompression: float | None = None, threads: int | None = None) -> Executable:
    """An OpenVINO model on the CPU, computing in float32 where it is not quantized.

    Args:
        path: the graph.
        decompression: matrices with at least this fraction of zeros are packed, where the processor can; None: none.
        threads: None: as many as torch uses.

    Raises:
        ImportError: openvino is missing.
    """
    properties = {} if decompression is None else {_RATE: decompression}
    try:
        request = openvino_request(str(path), threads, **properties)
    except ImportError as error:
        raise ImportError("OpenVINO's files run in openvino: pip install 'pl_sparse[openvino]'") from error

    def run(x: Tensor) -> Tensor:
        outputs = request.infer({0: x.detach().cpu().contiguous().numpy()}, share_inputs=True)
        return torch.from_numpy(np.array(outputs[0]))

    return run


def _unpackable() -> str | None:
    """Why this processor multiplies zeros like other numbers in OpenVINO; None if it need not, or nothing is known."""
    if _CPUINFO.is_file() and "amx_int8" not in _CPUINFO.read_text():
        return "this processor has no AMX, without which OpenVINO packs no zeros: they are multiplied here"
    return None


class OpenVINO(Traced):
    """The model for OpenVINO, checked there against torch.

    Its kernels multiply zeros like other numbers, except as described at `OpenVINOInt8`; removed channels and heads
    make the model faster.

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
        decompression: OpenVINO's CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE: 8-bit matrices with at least this fraction of
            zeros are packed, and unpacked as they are used; 1: none.

    Raises:
        ValueError: `decompression` is not a fraction.
    """

    file = "model_openvino.xml"
    runtime = "OpenVINO"
    extra = "openvino"
    packages = "openvino", "onnx", "onnxscript"
    advice = "channels that are gone (structure=channel, structure=head), or export=openvino_int8"

    def __init__(self, tolerance: float = 1e-4, decompression: float = 0.6) -> None:
        if not 0 < decompression <= 1:
            raise ValueError(f"decompression={decompression!r} must be above 0 and at most 1: a fraction of zeros")
        self.tolerance = tolerance
        self.decompression = decompression

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        save_openvino(net, example, path)
        return [compared(self.open(path, net), net, example, self.tolerance, f"{path} in OpenVINO")]

    def size(self, path: Path) -> int:
        return path.stat().st_size + path.with_suffix(".bin").stat().st_size

    def open(self, path: Path, net: nn.Module) -> Executable:
        return open_openvino(path, self.decompression)

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Executable:
        save_openvino(net, example, folder / "dense.xml")
        return open_openvino(folder / "dense.xml")


class OpenVINOInt8(OpenVINO):
    """The model with 8-bit weights and activations for OpenVINO, as `ONNXInt8` quantizes it.

    Its matrices of which `decompression` is zero are packed where the processor has AMX and both sizes of the matrix
    are multiples of 64. They are read packed from memory and multiplied dense.

    Source: OpenVINO's documentation of ov::intel_cpu::sparse_weights_decompression_rate, and its CPU plugin.

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
        decompression: as in `OpenVINO`.
    """

    file = "model_openvino_int8.xml"
    dtype = "int8"
    advice = (
        "a processor with AMX and linear layers of multiples of 64 that memory slows down, larger layers, or channels "
        "that are gone (structure=channel)"
    )

    def __init__(self, tolerance: float = 0.1, decompression: float = 0.6) -> None:
        super().__init__(tolerance, decompression)

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        return torchao_refusal() or super().refusal(net, example, structure, sparsity)

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        notes = super().write(net, example, path)
        reason = _unpackable()
        return notes if reason is None else [*notes, reason]
