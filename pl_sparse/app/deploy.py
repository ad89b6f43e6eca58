"""From a trained module to files for a target, and what they cost: `pl-sparse export RUN`, `pl-sparse bench RUN`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from pl_sparse.app.parts import built, load_run, network
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.core.files import write_csv, write_json
from pl_sparse.core.registry import suggestion
from pl_sparse.export.format import Executable, Export, forwarding
from pl_sparse.export.hardware import Hardware
from pl_sparse.export.measure import Comparison, compare, cost_table, device_name, plot_costs, verdict
from pl_sparse.quantize import Int8, Quantization, post_training
from pl_sparse.structure import Structure
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.saved import save_shrunk
from pl_sparse.surgery.shrink import shrink

__all__ = ["bench", "deploy", "export", "exports", "merged", "refuse", "tested"]

_BATCHES = (1, 32)
_RANGES = "ranges.safetensors"
_CALIBRATION = 8
"""Training batches that post-training quantization looks at."""


# Before training


def exports(cfg: DictConfig) -> dict[str, Export]:
    """The formats of a configuration, by name."""
    nodes: Any = cfg.get("export") or {}
    return {str(name): built(nodes, name) for name, node in nodes.items() if node is not None}


def refuse(
    formats: Mapping[str, Export],
    hardware: Hardware,
    module: LightningModule,
    data: LightningDataModule | None,
    structure: Structure,
    sparsity: float,
) -> None:
    """Find out what cannot be exported before the time for training is spent.

    Raises:
        ConfigError: a format cannot represent this model.
    """
    shape = getattr(data, "shape", None)
    example = module.example_input_array if shape is None else torch.zeros(2, *shape)
    for name, format in formats.items():
        reason = format.refusal(network(module), example if isinstance(example, Tensor) else None, structure, sparsity)
        if reason is not None:
            raise ConfigError(f"export={name}: {reason}")


# After training


def deploy(
    module: LightningModule,
    data: LightningDataModule | None,
    formats: Mapping[str, Export],
    folder: Path,
    hardware: Hardware,
    converted: nn.Module | None = None,
    removed: RemovalPlan | None = None,
    measure: bool = False,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Write a trained module in each format, and measure what was written beside the dense model.

    Formats that hold their graph are given the network without the channels and heads that are all zero, which is
    written to `folder`/shrunk too, as `load_shrunk` reads it.

    Args:
        module: in floating point.
        converted: its network with integers, if it was trained for them.
        removed: what left the network while it was trained.
        measure: latency, memory and accuracy, too.
        seconds: of measuring, for each format and batch size.

    Returns:
        What enters metrics.json: of the first format `size_bytes.exported`, and with `measure` `latency_ms` and
        `latency_dense_ms` (medians at batch 1) and the metrics of the test set, with the suffix "_exported".
    """
    console = Console()
    module.cpu().eval()
    inputs = list(_inputs(module, data, _CALIBRATION))
    example = _samples(inputs, max(_BATCHES))
    sparse = copy.deepcopy(network(module)).eval()
    sparse.requires_grad_(False)
    dense = _filled(sparse, removed)
    smaller = _shrunk(sparse, example, folder, hardware.multiple) if any(f.whole for f in formats.values()) else sparse
    ranges = folder / _RANGES
    if smaller is not sparse and converted is not None and ranges.is_file():
        converted = _integers(Int8(), smaller, example, ranges)
    found: dict[str, Any] = {}
    rows: list[Comparison] = []
    verdicts: dict[str, str] = {}
    for name, format in formats.items():
        net = smaller if format.whole else sparse
        if format.dtype == "int8":
            net = converted if converted is not None else post_training(net, inputs)
        path = folder / format.file
        try:
            with torch.no_grad():
                notes = format.write(net, example, path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"export={name}: {error}") from error
        size = path.stat().st_size
        ratio = _bytes(dense) / size
        console.print(
            f"{name}: {path}, {size / 1e3:,.1f} kB ({ratio:.1f}x smaller than dense)", highlight=False, soft_wrap=True
        )
        for note in notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True)
        if hardware.budget_kb is not None and size > 1000 * hardware.budget_kb:
            console.print(f"  LARGER than hardware.budget_kb={hardware.budget_kb:g}", style="bold red")
        found.setdefault("size_bytes.exported", size)
        if measure:
            compared = _measured(name, format, module, data, sparse, dense, example, path, seconds)
            rows += compared
            verdicts[name] = verdict(compared, device_name("float16" in format.runtime), format.advice)
            single = compared[0]
            found.setdefault("latency_ms", single.exported.median_ms)
            found.setdefault("latency_dense_ms", single.dense.median_ms)
            for key, value in single.metrics.items():
                found.setdefault(key, value)
    if measure:
        device = device_name(any("float16" in format.runtime for format in formats.values()))
        flat = [row.row() for row in rows]
        write_json(
            folder / "bench.json",
            {"device": device, "threads": torch.get_num_threads(), "verdicts": verdicts, "rows": flat},
        )
        write_csv(folder / "bench.csv", flat)
        plot_costs(rows, folder / "bench.png", device)
        console.print()
        console.print(cost_table(rows, device))
        for line in verdicts.values():
            console.print(line, highlight=False, soft_wrap=True)
    return found


def _shrunk(net: nn.Module, example: Tensor, folder: Path, multiple: int) -> nn.Module:
    """The network without its masked channels and heads, saved to `folder`/shrunk; itself where there are none."""
    console = Console()
    if not any(bool((weight.flatten(1) == 0).all(1).any()) for weight in net.parameters() if weight.dim() > 1):
        return net
    copied = copy.deepcopy(net)
    try:
        found = shrink(copied, example[:2], multiple=multiple)
    except (ImportError, ValueError) as error:
        console.print(f"masked channels stay in the files: {error}", highlight=False, soft_wrap=True)
        return net
    for layer, reason in found.left.items():
        console.print(f"{layer} has masked channels that stay: {reason}", highlight=False, soft_wrap=True)
    if not found.plan:
        return net
    save_shrunk(copied, found.plan, folder / "shrunk")
    console.print(
        f"shrunk: {folder / 'shrunk'}, {found.before:,} -> {found.after:,} parameters", highlight=False, soft_wrap=True
    )
    return copied


def _integers(quantization: Quantization, net: nn.Module, example: Tensor, ranges: Path) -> nn.Module:
    """The network with integers, in ranges that were learned."""
    quantization.prepare(net, example)
    try:
        quantization.load_state_dict(load_file(ranges))
        return quantization.convert()
    finally:
        quantization.release()


def _measured(
    name: str,
    format: Export,
    module: LightningModule,
    data: LightningDataModule | None,
    sparse: nn.Module,
    dense: nn.Module,
    example: Tensor,
    path: Path,
    seconds: float,
) -> list[Comparison]:
    """The dense model beside the one in the file."""
    with tempfile.TemporaryDirectory() as temporary:

        def make_dense() -> Executable:
            return format.dense(copy.deepcopy(dense), example, Path(temporary))

        def make() -> Executable:
            return format.open(path, sparse)

        score = {f"{key}_exported": value for key, value in tested(module, data, make()).items()}
        size = {"dense": _bytes(dense), "exported": path.stat().st_size}
        both = {"dense": make_dense, "exported": make}
        return compare(name, format.runtime, both, example, _BATCHES, size, score, seconds)


def tested(module: LightningModule, data: LightningDataModule | None, run: Executable) -> dict[str, float]:
    """The metrics of the module's own `test_step`, with `run` in the place of its network.

    Nothing, if the module has no test, or its `test_step` does not call its network.
    """
    if type(module).test_step is LightningModule.test_step:
        return {}
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return run(x)

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with forwarding(network(module), counted):
        found = trainer.test(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in found[0].items()} if calls else {}


def _inputs(module: LightningModule, data: LightningDataModule | None, count: int) -> Iterable[Tensor]:
    """Inputs of the first training batches."""
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    source: Any = (data or module).train_dataloader()
    for batch in islice(iter(source), count):
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            raise ConfigError(
                f"export takes models of one tensor, and a training batch here is a {type(batch).__name__} that "
                "does not begin with one"
            )
        yield x.cpu()


def _samples(batches: Sequence[Tensor], count: int) -> Tensor:
    """So many samples, again from the first where there are fewer."""
    x = torch.cat(list(batches))
    return x.repeat(-(-count // len(x)), *(1,) * (x.dim() - 1))[:count].contiguous()


@torch.no_grad()
def _filled(net: nn.Module, removed: RemovalPlan | None = None) -> nn.Module:
    """A dense model of the size that it once had: small random values where there are zeros."""
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


def _bytes(net: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


# The commands


def export(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse export RUN --to onnx csr`: write the model of a finished run in other formats."""
    _command("export", arguments)


def bench(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse bench RUN`: measure the model of a finished run, dense and exported side by side."""
    _command("bench", arguments)


def _command(name: str, arguments: Sequence[str] | None) -> None:
    known = sorted(path.stem for path in (CONF / "export").glob("*.yaml"))
    measuring = name == "bench"
    parser = argparse.ArgumentParser(
        prog=f"pl-sparse {name}",
        description=(bench if measuring else export).__doc__,
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run (its output_dir)")
    parser.add_argument(
        "--to",
        nargs="+",
        metavar="FORMAT",
        help=f"{', '.join(known)}; if none is given, those of the run, else of its hardware",
    )
    parser.add_argument("--threads", type=int, help="of torch and ONNX Runtime")
    if measuring:
        parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, a format and batch size (2)")
    options = parser.parse_args(arguments)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise ConfigError(f"--threads {options.threads} must be 1 or more")
            torch.set_num_threads(options.threads)
        for wanted in options.to or ():
            if wanted not in known:
                raise ConfigError(f"--to {wanted}: there is no such format. {suggestion(wanted, known)}")
        _again(options.run, options.to, measuring, options.seconds if measuring else 0.0)
    except (ConfigError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _again(folder: Path, names: Sequence[str] | None, measure: bool, seconds: float) -> None:
    """Export a finished run, and bring its metrics.json up to date."""
    module, data, cfg = load_run(folder)
    hardware: Hardware = built(cfg, "hardware")
    structure: Structure = built(cfg, "structure")
    metrics = json.loads((folder / "metrics.json").read_text())
    if names is None:
        names = [str(name) for name in cfg.get("export") or ()] or list(hardware.exports)
    nodes: Any = OmegaConf.merge(
        *(OmegaConf.load(CONF / "export" / f"{name}.yaml") for name in names), cfg.get("export") or {}
    )
    formats = {name: built(nodes, name) for name in names}
    refuse(formats, hardware, module, data, structure, metrics["sparsity"])
    integers = any(format.dtype == "int8" for format in formats.values())
    converted = _converted(folder, cfg, module, data) if integers else None
    plan = folder / "shrunk.json"
    removed = RemovalPlan.from_state_dict(json.loads(plan.read_text())) if plan.is_file() else None
    found = deploy(module, data, formats, folder, hardware, converted, removed, measure, seconds)
    write_json(folder / "metrics.json", merged(metrics, found))


def _converted(
    folder: Path, cfg: DictConfig, module: LightningModule, data: LightningDataModule | None
) -> nn.Module | None:
    """The network of a run with the 8-bit integers that it was trained for; None if it was not."""
    if not (folder / _RANGES).is_file():
        return None
    example = next(iter(_inputs(module, data, 1)))
    return _integers(built(cfg, "quantization").quantization, network(module), example, folder / _RANGES)


def merged(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run with those of its export; "size_bytes.exported" goes into `size_bytes`."""
    together = {**metrics, **found}
    if "size_bytes.exported" in together:
        size = together.pop("size_bytes.exported")
        together["size_bytes"] = {**together.get("size_bytes", {}), "exported": size}
    return together
