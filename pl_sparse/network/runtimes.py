"""Networks and single layers in the runtime that a network is for: torch, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.optional import missing
from pl_sparse.core.registry import suggestion
from pl_sparse.network.graph import in_onnx
from pl_sparse.network.hooks import called
from pl_sparse.network.layers import TRANSPOSED

__all__ = ["ELSEWHERE", "RUNTIMES", "SLOWER", "Runtime", "onnx_session", "openvino_request"]

RUNTIMES: dict[str, tuple[str, ...]] = {
    "torch": (),
    "onnxruntime": ("export", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript", "openvino"),
}
"""Runtimes, each with the extra of pl_sparse that brings it and the packages that it needs."""
ELSEWHERE = "elsewhere"
"""The runtime of a device that is not this machine."""
SLOWER = ("SkipLayerNormFusion",)
"""Optimizers of ONNX Runtime that make networks slower on a CPU: a sum and its LayerNorm in one take about four times
as long as one after the other (48 tokens of 384 channels, ONNX Runtime 1.32)."""


@dataclass(frozen=True)
class Runtime:
    """What runs layers, on what.

    Args:
        name: one of `RUNTIMES`.
        device: of torch; the others compute on the CPU.

    Raises:
        ValueError: there is no such runtime or device here, or a package is missing.
    """

    name: str = "torch"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.name == ELSEWHERE:
            raise ValueError(
                "runtime=elsewhere: milliseconds of that device cannot be measured on this machine. Give a budget in "
                f"macs or kb, or name a runtime that is here: {', '.join(RUNTIMES)}"
            )
        if self.name not in RUNTIMES:
            known = [*RUNTIMES, ELSEWHERE]
            raise ValueError(f"runtime={self.name!r} is unknown. {suggestion(self.name, known)}")
        if RUNTIMES[self.name] and (advice := missing(*RUNTIMES[self.name])) is not None:
            raise ValueError(f"latency is measured in {self.name}: {advice}")
        kind = self.device.partition(":")[0]
        if self.name != "torch" and kind != "cpu":
            raise ValueError(f"runtime={self.name} is measured on the CPU, and device={self.device} is another one")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device}: this machine has no such device to measure milliseconds on")

    def fingerprint(self) -> dict[str, str]:
        """What a latency depends on, of the runtime."""
        kind = self.device.partition(":")[0]
        device = torch.cuda.get_device_name(self.device) if kind == "cuda" else kind
        library = torch.__version__ if self.name == "torch" else version(self.name)
        return {"runtime": f"{self.name} {library}", "device": device}

    @property
    def clock(self) -> Callable[[], float]:
        """In seconds: of the processor where one thread computes, which sees nothing of what else the machine does."""
        alone = torch.get_num_threads() == 1 and self.device == "cpu"
        return time.process_time if alone else time.perf_counter

    @property
    def copies(self) -> tuple[int, ...]:
        """How often a layer is in the graphs that it is timed by.

        A call of a graph costs something of its own, and so does bringing inputs and outputs into the layout in which
        layers pass them on to one another. The difference of two graphs has the layer alone. In torch a layer costs in
        a network what it costs alone.
        """
        return (1,) if self.name == "torch" else (1, 3)

    @property
    def blocks(self) -> int:
        """The channels of a block in which convolutions are computed, where a part of one costs as much as all; or 0.

        ONNX Runtime has blocks of as many channels as fit into a register of the processor.
        """
        if self.name != "onnxruntime" or platform.machine() not in ("x86_64", "AMD64"):
            return 0
        cpuinfo = Path("/proc/cpuinfo")
        return 16 if cpuinfo.is_file() and " avx512f " in cpuinfo.read_text() else 8

    def opened(self, layers: nn.Sequential, x: Tensor, copies: int = 1) -> Callable[[], Any]:
        """A call that computes the outputs of a layer, and returns when they are there.

        Args:
            layers: a linear layer or a convolution, perhaps a BatchNorm, and a ReLU, in evaluation mode.
            x: the inputs.
            copies: how many layers of this kind, with other weights, compute on the inputs, and are added.
        """
        if self.name == "torch":
            one, inputs = layers.to(self.device), x.to(self.device)
            return self._in_torch(lambda: one(inputs))
        return self._of_graph(_graph(layers, x, copies), x)

    def network(self, net: nn.Module, example: Any) -> Callable[[], Any]:
        """A call that computes the outputs of a network, and returns when they are there.

        Args:
            net: in evaluation mode; it may be moved to the device.
            example: inputs of a batch: a tensor, or for torch what else the network is called with, on the device.

        Raises:
            ValueError: for another runtime than torch, it takes more than one tensor, or torch.export cannot trace it.
        """
        inputs = example[0] if isinstance(example, (tuple, list)) and len(example) == 1 else example
        if self.name == "torch":
            moved = inputs.to(self.device) if isinstance(inputs, Tensor) else inputs
            there = net.to(self.device)
            return self._in_torch(lambda: called(there, moved))
        if not isinstance(inputs, Tensor):
            raise ValueError(f"runtime={self.name} takes networks with one input tensor, not a {type(inputs).__name__}")
        return self._of_graph(in_onnx(net.cpu(), inputs.cpu()).model_proto.SerializeToString(), inputs.cpu())

    def _in_torch(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A call that waits for the device."""
        if self.device.partition(":")[0] == "cpu":
            return run
        backend: Any = torch.get_device_module(self.device)

        def waits() -> None:
            run()
            backend.synchronize()

        return waits

    def _of_graph(self, graph: bytes, x: Tensor) -> Callable[[], Any]:
        """A call of an ONNX model."""
        array = x.numpy()
        if self.name == "onnxruntime":
            session = onnx_session(graph)
            inputs = {session.get_inputs()[0].name: array}
            return lambda: session.run(None, inputs)
        request = openvino_request(graph)
        return lambda: request.infer({0: array}, share_inputs=True)

    def timed(self, runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
        """The median milliseconds of each call, in turns, so that a disturbance hits all alike.

        Args:
            runs: what is called.
            repeats: how often, after two calls that do not count.
        """
        clock = self.clock
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(repeats + 2):
            for run, took in zip(runs, times, strict=True):
                start = clock()
                run()
                if turn >= 2:
                    took.append(1e3 * (clock() - start))
        return [statistics.median(took) for took in times]


def onnx_session(model: str | bytes, threads: int | None = None) -> Any:
    """An ONNX model in ONNX Runtime, on the CPU, without the optimizers that are `SLOWER`.

    Args:
        model: a file, or what it holds.
        threads: as many as torch uses, if None. Idle ones do not spin, which would slow down what else is measured.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOWER)
    )


def openvino_request(model: str | bytes, threads: int | None = None, **properties: Any) -> Any:
    """An OpenVINO or ONNX model in OpenVINO, on the CPU, computing in float32 where it is not quantized.

    Args:
        model: a file, or what an ONNX file holds.
        threads: as many as torch uses, if None.
        properties: others of the plugin.
    """
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        **properties,
    }
    core = openvino.Core()
    read = core.read_model(model, b"") if isinstance(model, bytes) else core.read_model(model)
    return core.compile_model(read, "CPU", options).create_infer_request()


def _graph(layers: nn.Sequential, x: Tensor, copies: int = 1) -> bytes:
    """A layer and its ReLU in ONNX, written without tracing: a table has hundreds of them.

    A norm is a bias of the convolution, which is what runtimes make of it. Copies have weights of their own, as
    runtimes compute once what is the same.
    """
    from onnx import TensorProto, helper, numpy_helper

    module: Any = layers[0]
    bias = module.bias if module.bias is not None or len(layers) == 2 else torch.zeros(module.out_channels)
    weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
    nodes, total = [], ""
    values: dict[str, Tensor] = {}
    for copy in range(copies):
        own = {f"weight{copy}": weight * (1 + copy), **({} if bias is None else {f"bias{copy}": bias + copy})}
        names, out = list(own), f"out{copy}"
        values |= own
        if isinstance(module, nn.Linear):
            nodes.append(helper.make_node("MatMul", ["x", names[0]], [out if bias is None else f"product{copy}"]))
            if bias is not None:
                nodes.append(helper.make_node("Add", [f"product{copy}", names[1]], [out]))
        else:
            kind = "ConvTranspose" if isinstance(module, TRANSPOSED) else "Conv"
            nodes.append(helper.make_node(kind, ["x", *names], [out], **_attributes(module)))
        if total:
            nodes.append(helper.make_node("Add", [total, out], [f"sum{copy}"]))
        total = f"sum{copy}" if total else out
    nodes.append(helper.make_node("Relu", [total], ["y"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.detach().float().contiguous().numpy(), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def _attributes(conv: Any) -> dict[str, Any]:
    """What ONNX's Conv or ConvTranspose is given of a convolution."""
    if isinstance(conv.padding, str):
        size = zip(conv.dilation, conv.kernel_size, strict=True)
        reach = [0 if conv.padding == "valid" else d * (k - 1) for d, k in size]
        pads = [*(total // 2 for total in reach), *(-(-total // 2) for total in reach)]
    else:
        pads = [*conv.padding, *conv.padding]
    transposed = {"output_padding": list(conv.output_padding)} if isinstance(conv, TRANSPOSED) else {}
    return {
        **transposed,
        "kernel_shape": list(conv.kernel_size),
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "pads": pads,
        "group": conv.groups,
    }
