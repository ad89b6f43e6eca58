"""From a trained module to files for a target, and what they cost beside the model with all weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from pl_sparse.app.instantiate import network
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.trainer import quiet_trainer
from pl_sparse.core.files import write_csv, write_json
from pl_sparse.export.format import Executable, Export, forwarding
from pl_sparse.export.hardware import Hardware
from pl_sparse.export.measure import Comparison, compare, cost_table, device_name, plot_costs, stored_bytes, verdict
from pl_sparse.quantize import Int8, Quantization, post_training
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.saved import save_shrunk
from pl_sparse.surgery.shrink import shrink

__all__ = [
    "RANGES",
    "UnmetError",
    "deploy",
    "filled",
    "integers_in_ranges",
    "merged",
    "metrics_with",
    "training_inputs",
]

RANGES = "ranges.safetensors"
"""The file of a run that has the ranges of its activations."""
_BATCHES = (1, 32)
_CALIBRATION = 8
"""Training batches that post-training quantization looks at."""


class UnmetError(RuntimeError):
    """What was asked for and is not there, though the run is: formats that could not be written, a missed target.

    Args:
        failed: what was asked for (`export=onnx`), and the reason.
        folder: the run's.
    """

    def __init__(self, failed: Mapping[str, str], folder: Path) -> None:
        lines = [f"{asked}: {reason}" for asked, reason in failed.items()]
        super().__init__("\n".join([*lines, f"what else the run made is in {folder}"]))


@dataclass(frozen=True)
class _Networks:
    """A trained network in the forms that formats and measurements take.

    Attributes:
        sparse: with its zeros.
        baseline: the same with values for zeros, in the size that it had before training.
        smaller: without masked channels and heads; `sparse` itself where there are none, or no format wants it.
        integers: with the integers that it was trained for.
        inputs: of some training batches.
        example: samples for the largest batch.
    """

    sparse: nn.Module
    baseline: nn.Module
    smaller: nn.Module
    integers: nn.Module | None
    inputs: list[Tensor]
    example: Tensor

    def of(self, format: Export) -> nn.Module:
        """The network that a format writes."""
        net = self.smaller if format.whole else self.sparse
        if format.dtype != "int8":
            return net
        return self.integers if self.integers is not None else post_training(net, self.inputs)


def deploy(
    module: LightningModule,
    data: LightningDataModule | None,
    formats: Mapping[str, Export],
    folder: Path,
    hardware: Hardware,
    integers: nn.Module | None = None,
    removed: RemovalPlan | None = None,
    measure: bool = False,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Write a trained module in each format, and measure what was written beside the dense model.

    Formats that hold their graph are given the network without the channels and heads that are all zero, which is
    written to `folder`/shrunk too, as `load_shrunk` reads it.

    Args:
        module: in floating point.
        data: where inputs come from; None if the module brings its own.
        formats: by name.
        folder: the run's.
        hardware: what the files are for.
        integers: the module's network with integers, if it was trained for them.
        removed: what left the network while it was trained.
        measure: latency, memory and accuracy, too.
        seconds: of measuring, for each format and batch size.

    Returns:
        What enters metrics.json: of the first format `size_bytes.exported`, and with `measure` `latency_ms` and
        `latency_dense_ms` (medians at batch 1) and the metrics of the test set, with the suffix "_exported". Where
        formats failed, `exports_failed` has the reason of each: it costs that format alone.
    """
    module.cpu().eval()
    results: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    verdicts: dict[str, str] = {}
    failed: dict[str, str] = {}
    try:
        networks = _networks(module, data, formats, folder, hardware, integers, removed)
    except Exception as error:
        failed = dict.fromkeys(formats, _line(error))
    for name, format in formats.items():
        if name in failed:
            continue
        try:
            path = _write(name, format, networks, folder, hardware)
            reason = format.unmeasurable() if measure else None
            compared = []
            if measure and reason is None:
                compared = _compare(name, format, networks, module, data, path, seconds)
        except Exception as error:
            failed[name] = _line(error)
            continue
        results.setdefault("size_bytes.exported", format.size(path))
        if reason is not None:
            verdicts[name] = f"{name}: not measured: {reason}"
        if not compared:
            continue
        comparisons += compared
        verdicts[name] = verdict(compared, device_name("float16" in format.runtime), format.advice)
        format.conclude(path, verdicts[name])
        single = compared[0]  # batch 1
        results.setdefault("latency_ms", single.exported.median_ms)
        results.setdefault("latency_dense_ms", single.dense.median_ms)
        for key, value in single.metrics.items():
            results.setdefault(key, value)
    if comparisons:
        device = device_name(any("float16" in format.runtime for format in formats.values()))
        _write_costs(comparisons, verdicts, device, folder)
    for line in () if comparisons else verdicts.values():
        Console().print(line, highlight=False, soft_wrap=True)
    for name, reason in failed.items():
        Console().print(f"export={name} failed: {reason}", style="bold red", highlight=False, soft_wrap=True)
    return {**results, "exports_failed": failed} if failed else results


def _line(error: Exception) -> str:
    """An error in a line; one that nobody foresaw with its kind."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if isinstance(error, (ValueError, ImportError)) and line else f"{type(error).__name__}: {line}"


def _networks(
    module: LightningModule,
    data: LightningDataModule | None,
    formats: Mapping[str, Export],
    folder: Path,
    hardware: Hardware,
    integers: nn.Module | None,
    removed: RemovalPlan | None,
) -> _Networks:
    inputs = list(training_inputs(module, data, _CALIBRATION))
    example = _samples(inputs, max(_BATCHES))
    sparse = copy.deepcopy(network(module)).eval()
    sparse.requires_grad_(False)
    baseline = filled(sparse, removed)
    smaller = sparse
    if any(format.whole for format in formats.values()):
        smaller = _without_masked(sparse, example, folder, hardware.multiple)
    ranges = folder / RANGES
    if smaller is not sparse and integers is not None and ranges.is_file():
        integers = integers_in_ranges(Int8(), smaller, example, ranges)
    return _Networks(sparse, baseline, smaller, integers, inputs, example)


def training_inputs(module: LightningModule, data: LightningDataModule | None, count: int) -> Iterable[Tensor]:
    """Inputs of the first training batches.

    Args:
        module: brings its own loader, if there is no data.
        data: where the batches come from.
        count: how many batches.

    Raises:
        ConfigError: a batch does not begin with a tensor.
    """
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    source: Any = (data or module).train_dataloader()
    for batch in islice(iter(source), count):
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            raise ConfigError(
                f"export takes models with one input tensor, and a training batch is a {type(batch).__name__} that "
                "does not begin with a tensor"
            )
        yield x.cpu()


def _samples(batches: Sequence[Tensor], count: int) -> Tensor:
    """So many samples, again from the first where there are fewer."""
    x = torch.cat(list(batches))
    return x.repeat(-(-count // len(x)), *(1,) * (x.dim() - 1))[:count].contiguous()


@torch.no_grad()
def filled(net: nn.Module, removed: RemovalPlan | None = None) -> nn.Module:
    """A dense model of the size that a network once had: small random values where it has zeros.

    Args:
        net: it stays as it is.
        removed: what left it while it was trained.
    """
    net = copy.deepcopy(net)
    if removed is not None:
        removed.undo(net)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer[buffer == 0] = 1
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        zeros = weight == 0
        if weight.dim() > 1 and bool(zeros.any()):
            noise = torch.randn(weight.shape, generator=generator).to(weight) * max(float(weight.abs().mean()), 1e-3)
            weight.copy_(torch.where(zeros, noise, weight))
    return net


def _without_masked(net: nn.Module, example: Tensor, folder: Path, multiple: int) -> nn.Module:
    """The network without its masked channels and heads, saved to `folder`/shrunk; itself where there are none."""
    console = Console()
    if not any(bool((weight.flatten(1) == 0).all(1).any()) for weight in net.parameters() if weight.dim() > 1):
        return net
    smaller = copy.deepcopy(net)
    try:
        removal = shrink(smaller, example[:2], multiple=multiple)
    except Exception as error:
        console.print(f"masked channels stay in the files: {_line(error)}", highlight=False, soft_wrap=True)
        return net
    for layer, reason in removal.left.items():
        console.print(f"{layer} has masked channels that stay: {reason}", highlight=False, soft_wrap=True)
    if not removal.plan:
        return net
    save_shrunk(smaller, removal.plan, folder / "shrunk")
    console.print(
        f"shrunk: {folder / 'shrunk'}, {removal.before:,} -> {removal.after:,} parameters",
        highlight=False,
        soft_wrap=True,
    )
    return smaller


def integers_in_ranges(quantization: Quantization, net: nn.Module, example: Tensor, ranges: Path) -> nn.Module:
    """The network with integers, in ranges that were learned.

    Args:
        quantization: the type of integers.
        net: in floating point; it stays so.
        example: inputs that it is traced with.
        ranges: the file of the ranges.
    """
    quantization.prepare(net, example)
    try:
        quantization.load_state_dict(load_file(ranges))
        return quantization.convert()
    finally:
        quantization.release()


def _write(name: str, format: Export, networks: _Networks, folder: Path, hardware: Hardware) -> Path:
    """Write the file of a format, and print its size."""
    console = Console()
    net, path = networks.of(format), folder / format.file
    with torch.no_grad():
        notes = format.write(net, networks.example, path)
    size = format.size(path)
    ratio = stored_bytes(networks.baseline) / size
    than = f"{ratio:.1f}x smaller than dense" if ratio >= 1.05 else "no smaller than dense"
    console.print(f"{name}: {path}, {size / 1e3:,.1f} kB ({than})", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"  {note}", highlight=False, soft_wrap=True)
    if hardware.budget_kb is not None and size > 1000 * hardware.budget_kb:
        console.print(f"  LARGER than hardware.budget_kb={hardware.budget_kb:g}", style="bold red")
    return path


def _compare(
    name: str,
    format: Export,
    networks: _Networks,
    module: LightningModule,
    data: LightningDataModule | None,
    path: Path,
    seconds: float,
) -> list[Comparison]:
    """The dense model beside the one in the file, a comparison per batch size."""
    with tempfile.TemporaryDirectory() as temporary:

        def make_dense() -> Executable:
            return format.dense(copy.deepcopy(networks.baseline), networks.example, Path(temporary))

        def make_exported() -> Executable:
            return format.open(path, networks.sparse)

        metrics = {f"{key}_exported": value for key, value in metrics_with(make_exported(), module, data).items()}
        sizes = {"dense": stored_bytes(networks.baseline), "exported": format.size(path)}
        makers = {"dense": make_dense, "exported": make_exported}
        return compare(name, format.runtime, makers, networks.example, _BATCHES, sizes, metrics, seconds)


def metrics_with(run: Executable, module: LightningModule, data: LightningDataModule | None) -> dict[str, float]:
    """The metrics of the module's own `test_step`, with another model in the place of its network.

    Args:
        run: that model, from inputs to outputs.
        module: whose test it is.
        data: where the test set comes from; None if the module brings its own.

    Returns:
        the metrics by name; none if the module has no test, or its `test_step` does not call its network.
    """
    if type(module).test_step is LightningModule.test_step:
        return {}
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return run(x)

    trainer = quiet_trainer(accelerator="cpu")
    with forwarding(network(module), counted):
        results = trainer.test(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in results[0].items()} if calls else {}


def _write_costs(comparisons: list[Comparison], verdicts: Mapping[str, str], device: str, folder: Path) -> None:
    """Write and print what was measured: bench.json, bench.csv, bench.png."""
    rows = [comparison.row() for comparison in comparisons]
    costs = {"device": device, "threads": torch.get_num_threads(), "verdicts": verdicts, "rows": rows}
    write_json(folder / "bench.json", costs)
    write_csv(folder / "bench.csv", rows)
    plot_costs(comparisons, folder / "bench.png", device)
    console = Console()
    console.print()
    console.print(cost_table(comparisons, device))
    for line in verdicts.values():
        console.print(line, highlight=False, soft_wrap=True)


def merged(metrics: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run with those of its export; "size_bytes.exported" goes into `size_bytes`."""
    together = {**metrics, **costs}
    if "exports_failed" not in costs:
        together.pop("exports_failed", None)  # of an earlier attempt
    if "size_bytes.exported" in together:
        size = together.pop("size_bytes.exported")
        together["size_bytes"] = {**together.get("size_bytes", {}), "exported": size}
    return together
