"""How long layers take in a runtime at each width.

A layer's latency is measured at a few numbers of inputs and outputs and interpolated between them. The numbers are kept
in a file under a fingerprint of machine, runtime, threads and versions, so that they are measured once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.agreement import agreed
from pl_sparse.core.files import write_json
from pl_sparse.network.layers import CONVS, TRANSPOSED, is_depthwise
from pl_sparse.network.runtimes import Runtime

__all__ = ["LatencyTable", "Layer", "fingerprint", "sized"]

_ALIGNED = 4  # channels: what is not a multiple of them ONNX Runtime does not compute by blocks
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


def fingerprint(runtime: Runtime) -> dict[str, str | int]:
    """What a measured latency depends on: processor, threads, runtime, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **runtime.fingerprint(),
        "version": 3,
    }


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer with the widths that pruning leaves it.

    With n[g] units kept in group g it has outs[1] + sum of outs[0][g] n[g] outputs, and inputs likewise.

    Attributes:
        name: of its weight.
        module: the layer as it was when the network was looked at, without values: what a removal makes of the
            model's own changes nothing here.
        positions: how often each weight is used for one sample.
        shape: of its input, one batch.
        outs: outputs for each unit, by group, and those that stay.
        ins: the same for inputs.
    """

    name: str
    module: Any
    positions: float
    shape: tuple[int, ...]
    outs: tuple[Mapping[int, int], int]
    ins: tuple[Mapping[int, int], int]

    @property
    def depthwise(self) -> bool:
        """Whether each of its inputs has outputs of its own."""
        return is_depthwise(self.module)

    def widths(self, kept: Sequence[Any]) -> tuple[Any, Any]:
        """Inputs and outputs with these units kept; numbers or differentiable scalars."""
        outputs = self.outs[1] + sum(count * kept[g] for g, count in self.outs[0].items())
        inputs = self.ins[1] + sum(count * kept[g] for g, count in self.ins[0].items())
        return (outputs if self.depthwise else inputs), outputs

    @property
    def key(self) -> str:
        """What its latency depends on besides its width."""
        module = self.module
        parts: list[object] = [type(module).__name__, *self.shape[:1], *self.shape[2:]]
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            grouped = "depthwise" if self.depthwise else module.groups
            parts += [module.kernel_size, module.stride, module.padding, module.dilation, grouped]
            parts += [module.output_padding] if isinstance(module, TRANSPOSED) else []
        elif len(self.shape) > 2:
            parts = [type(module).__name__, *self.shape[:-1]]
        return " ".join(map(str, parts))


@dataclass
class LatencyTable:
    """Milliseconds of layers by width, measured when first asked for.

    A layer is measured with the norm and the activation that go with it, in graphs with one and with three of it,
    whose difference leaves out what a call costs (not in torch, where a layer is a call), at an eighth, a quarter, a
    half, three quarters and all of its inputs and outputs. Between these it is interpolated linearly, which smooths
    the steps that latencies have, after the measurements are made monotone (the larger of a width and all smaller
    ones), so that noise never says that more channels are faster. ONNX Runtime computes a convolution by blocks of
    channels: there widths are rounded up to blocks, and inputs that are no multiple of four are measured
    for themselves.

    Args:
        path: a JSON file to keep measurements in; None for one in the user's cache directory.
        repeats: how often a layer is timed at each width; the median counts.
        runtime: what the layers run in: "torch", "onnxruntime" or "openvino".
        device: the device of torch; None for the CPU.

    Raises:
        ValueError: the runtime is not installed, or not known.
    """

    path: str | os.PathLike[str] | None = None
    repeats: int = 15
    runtime: str | None = None
    device: str | None = None
    _rows: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _loaded: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._runs = Runtime(self.runtime or "torch", self.device or "cpu")

    @property
    def file(self) -> Path:
        """Where the measurements are kept."""
        if self.path is not None:
            return Path(self.path)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(json.dumps(fingerprint(self._runs), sort_keys=True).encode()).hexdigest()[:16]
        return cache / "pl_sparse" / f"latency-{digest}.json"

    def measure(self, layers: Sequence[Layer]) -> None:
        """Measure the layers that were not measured yet, and keep that."""
        self._rows = agreed(lambda: self._measure_new(layers))
        self._loaded = True

    def _measure_new(self, layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
        """All measurements, with those of layers that were not measured yet."""
        self._load()
        new = [layer for layer in layers if self._name(layer) not in self._rows]
        for layer in new:
            if self._name(layer) not in self._rows:
                self._rows[self._name(layer)] = self._measured(layer)
        if new:
            self._write()
        return self._rows

    def _write(self) -> None:
        write_json(self.file, {"fingerprint": fingerprint(self._runs), "layers": self._rows})

    def kept(self, key: str, make: Callable[[Runtime, int], Sequence[float] | None]) -> Sequence[float] | None:
        """Other milliseconds that are kept beside those of layers.

        Args:
            key: what they are those of.
            make: measures them in a runtime, each so often, if they were not; what is None is not kept.
        """

        def found() -> dict[str, Any]:
            self._load()
            if key not in self._rows and (times := make(self._runs, self.repeats)) is not None:
                self._rows[key] = {"ms": list(times)}
                self._write()
            return self._rows

        self._rows = agreed(found)
        return self._rows.get(key, {}).get("ms")

    def predict(self, layer: Layer, inputs: Any, outputs: Any) -> Any:
        """Milliseconds of a layer at a width.

        Args:
            layer: measured first, if it was not.
            inputs: how many, a number or a scalar tensor.
            outputs: likewise.

        Returns:
            A number, or a scalar tensor that is differentiable by the widths.
        """
        if self._name(layer) not in self._rows:
            self.measure([layer])
        row = self._rows[self._name(layer)]
        times = row["ms"]
        if row.get("blocks"):  # a convolution by blocks of channels; numbers that are learned lie between them
            if not isinstance(inputs, Tensor) and inputs >= row["blocks"] and inputs % _ALIGNED:
                times = row["unfit"]
            else:
                inputs = inputs if inputs < row["blocks"] else _whole(inputs, row["blocks"], row["ins"])
                outputs = _whole(outputs, row["blocks"], row["outs"])
        if layer.depthwise:
            return _between(row["outs"], [line[0] for line in times], outputs)
        return _between(row["outs"], [_between(row["ins"], line, inputs) for line in times], outputs)

    def _name(self, layer: Layer) -> str:
        """What the layer is called in the file."""
        return f"{layer.key} {tuple(layer.module.weight.shape[:2])}"

    def _load(self) -> None:
        """Read the file once, if there is one of this machine."""
        if self._loaded or not self.file.is_file():
            return
        state = json.loads(self.file.read_text(encoding="utf-8"))
        if state.get("fingerprint") == fingerprint(self._runs):
            self._rows = {**state["layers"], **self._rows}
        self._loaded = True

    def _measured(self, layer: Layer) -> dict[str, Any]:
        """The widths that a layer was measured at, and "ms", the medians as rows of outputs, (outs, ins)."""
        module = layer.module
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        if layer.depthwise:
            groups = module.out_channels // module.in_channels
        full_out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        full_in = module.in_features if isinstance(module, nn.Linear) else module.in_channels

        blocks = self._runs.blocks if isinstance(module, nn.Conv2d) and groups == 1 else 0

        def grid(full: int) -> list[int]:
            if blocks:
                return sorted({min(blocks * -(-max(round(full * f), 1) // blocks), full) for f in _FRACTIONS})
            return sorted({max(round(full * f / groups), 1) * groups for f in _FRACTIONS})

        outs = grid(full_out)
        ins = [0] if layer.depthwise else grid(full_in)
        if blocks and full_in >= blocks:
            ins = [blocks // 2, *ins]  # fewer than a block are read as they come
        row = {"ins": ins, "outs": outs, "blocks": blocks, "ms": self._times(layer, ins, outs, groups)}
        if blocks:
            near = [i + (1 if i == blocks else -1) if i >= blocks else i for i in ins]
            row["unfit"] = self._times(layer, near, outs, groups)
        return row

    def _times(self, layer: Layer, ins: Sequence[int], outs: Sequence[int], groups: int) -> list[list[float]]:
        """Milliseconds at each pair of widths, (outs, ins), none less than at a smaller one."""
        opened, copies = self._runs.opened, self._runs.copies
        with torch.inference_mode():
            pairs = [_variant(layer, i or o // groups, o) for o in outs for i in ins]
            runs = [opened(*pair, times) for pair in pairs for times in copies]
            medians = iter(self._runs.timed(runs, self.repeats))
        ms = [[_alone(copies, [next(medians) for _ in copies]) for _ in ins] for _ in outs]
        for i in range(len(outs)):
            for j in range(len(ins)):
                ms[i][j] = max(ms[i][j], ms[i - 1][j] if i else 0.0, ms[i][j - 1] if j else 0.0)
        return ms


def _variant(layer: Layer, inputs: int, outputs: int) -> tuple[nn.Sequential, Tensor]:
    """The layer at a width, with an activation (and a norm if its bias is left to one), and an input."""
    module = layer.module
    shape = list(layer.shape)
    shape[-1 if isinstance(module, nn.Linear) else 1] = inputs
    one = sized(module, inputs, outputs)
    norm: list[nn.Module] = [nn.BatchNorm2d(outputs)] if module.bias is None and isinstance(one, nn.Conv2d) else []
    return nn.Sequential(one, *norm, nn.ReLU(inplace=True)).eval(), torch.randn(shape)


def sized(module: Any, inputs: int, outputs: int, device: str | None = None) -> nn.Module:
    """A layer of the same kind with other widths."""
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return nn.Linear(inputs, outputs, bias, device=device)
    # a subclass may take other arguments
    kind: Any = next(kind for kind in (*CONVS, *TRANSPOSED) if isinstance(module, kind))
    groups = inputs if is_depthwise(module) else module.groups
    options = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    if isinstance(module, TRANSPOSED):
        options["output_padding"] = module.output_padding
    conv: nn.Module = kind(inputs, outputs, groups=groups, bias=bias, device=device, **options)
    return conv


def _whole(width: Any, blocks: int, grid: Sequence[int]) -> Any:
    """The width that blocks make of it; one that is learned stays."""
    if isinstance(width, Tensor):
        return width
    return min(blocks * -(-width // blocks), grid[-1])


def _alone(copies: Sequence[int], times: Sequence[float]) -> float:
    """What one layer takes of the times of graphs with so many of it; of a single graph all."""
    if len(copies) == 1:
        return times[0]
    return max(times[-1] - times[0], 0.0) / (copies[-1] - copies[0])


def _between(grid: Sequence[int], values: Sequence[Any], x: Any) -> Any:
    """Linear interpolation at x of values at the points of a grid, and beyond its ends the lines of the last pieces.

    Args:
        grid: ascending points; one alone stands for a constant.
        values: one per point, numbers or tensors.
        x: a number or a scalar tensor.
    """
    if len(grid) == 1:
        return values[0]
    number = float(x.detach()) if isinstance(x, Tensor) else float(x)
    i = next((i for i in range(1, len(grid) - 1) if number < grid[i]), len(grid) - 1)
    low, high = grid[i - 1], grid[i]
    return values[i - 1] + (values[i] - values[i - 1]) * ((x - low) / (high - low))
