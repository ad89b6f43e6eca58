"""The cost of running a model: latency, throughput, memory; two models side by side, and a verdict.

Times are taken in rounds. In each round every model runs once, and the models take turns in running first, so that
other work of the machine affects all of them equally.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.network.runtimes import Runtime

__all__ = [
    "Comparison",
    "Cost",
    "compare",
    "cost_table",
    "device_name",
    "latencies",
    "one_thread",
    "peak_memory",
    "percentile",
    "plot_costs",
    "ratio",
    "stored_bytes",
    "verdict",
]

_LEAST = 1.05
"""Below this ratio no difference is claimed."""


@torch.no_grad()
def latencies(
    runs: Mapping[str, Callable[[Tensor], Any]],
    batch: Tensor,
    seconds: float = 2.0,
    most: int = 500,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of single calls on `batch`, by name; the i-th of each are of the same round.

    Args:
        runs: models that can be called, by name.
        batch: inputs, (samples, *shape).
        seconds: how long to continue after each has run 10 times.
        most: rounds at most.
        clock: in seconds. `time.process_time` excludes other work of the machine; it suits models that run on one
            thread.
    """
    names = list(runs)
    for _ in range(3):
        for run in runs.values():
            run(batch)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(most):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = clock()
            runs[name](batch)
            taken[name].append(1e3 * (clock() - begin))
        if number >= 9 and time.perf_counter() > end:
            break
    return taken


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the fraction q of them does not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.0
    """
    return sorted(values)[max(-int(-q * len(values) // 1) - 1, 0)]


@torch.no_grad()
def peak_memory(make: Callable[[], Callable[[Tensor], Any]], batch: Tensor) -> int | None:
    """Bytes that loading a model and running it once on `batch` add to what the process holds, at their peak.

    On a GPU what torch allocates there counts.

    Args:
        make: loads the model.
        batch: inputs, (samples, *shape).

    Returns:
        None where the system does not say (other than Linux).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make()(batch)
        if torch.cuda.max_memory_allocated() > before:
            return torch.cuda.max_memory_allocated() - before
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed must not serve again
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        make()(batch)
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        return None


def _resident(field: str) -> int:
    """Bytes that the system notes of this process under a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def device_name(gpu: bool = False) -> str:
    """What the times were taken on, with the number of threads."""
    if gpu:
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()}"


def stored_bytes(net: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


@dataclass(frozen=True)
class Cost:
    """What one model costs at one batch size.

    Attributes:
        median_ms: the median of the times of a call.
        p95_ms: 19 of 20 calls took no longer.
        throughput: samples per second, by the median.
        bytes: size of the file.
        memory: bytes that loading and running it adds, at their peak; None if not known.
    """

    median_ms: float
    p95_ms: float
    throughput: float
    bytes: int
    memory: int | None


@dataclass(frozen=True)
class Comparison:
    """A dense model and an exported one, in the same runtime, at one batch size.

    Attributes:
        name: the format of the exported one.
        runtime: what ran both.
        batch: samples per call.
        dense: the cost of the dense model.
        exported: that of the exported one.
        faster: how many times faster the exported one is, and whether that is to be claimed (`ratio`).
        metrics: of the test set, after the export.
    """

    name: str
    runtime: str
    batch: int
    dense: Cost
    exported: Cost
    faster: tuple[float, bool]
    metrics: Mapping[str, float]

    def row(self) -> dict[str, object]:
        """All of it, flat."""
        costs = {f"{what}/{k}": v for what in ("dense", "exported") for k, v in vars(getattr(self, what)).items()}
        head = {"format": self.name, "runtime": self.runtime, "batch": self.batch, "faster": self.faster[0]}
        return {**head, "claimed": self.faster[1], **costs, **self.metrics}


def compare(
    name: str,
    runtime: str,
    make: Mapping[str, Callable[[], Callable[[Tensor], Any]]],
    example: Tensor,
    batches: Sequence[int],
    bytes: Mapping[str, int],
    metrics: Mapping[str, float],
    seconds: float = 2.0,
) -> list[Comparison]:
    """Measure a dense model and an exported one side by side, on one thread in the time of the processor.

    Args:
        name: the format of the exported one.
        runtime: what runs both.
        make: "dense" and "exported": what loads each of them.
        example: inputs, as many as the largest batch.
        batches: sizes of batches.
        bytes: of the files, by the same keys.
        metrics: of the test set, after the export.
        seconds: of measuring, for each batch size.

    Returns:
        A comparison per batch size.
    """
    clock = time.perf_counter if _on_gpu(runtime) else Runtime().clock
    memory = {key: peak_memory(load, example) for key, load in make.items()}
    runs = {key: load() for key, load in make.items()}
    comparisons = []
    for batch in batches:
        times = latencies(runs, example[:batch], seconds, clock=clock)
        costs = {}
        for key, taken in times.items():
            middle = percentile(taken, 0.5)
            costs[key] = Cost(middle, percentile(taken, 0.95), 1e3 * batch / middle, bytes[key], memory[key])
        faster = ratio(times["dense"], times["exported"])
        comparisons.append(Comparison(name, runtime, batch, costs["dense"], costs["exported"], faster, metrics))
    return comparisons


def _on_gpu(runtime: str) -> bool:
    """Whether a format's runtime is the GPU, where half precision is."""
    return "float16" in runtime


def ratio(dense: Sequence[float], other: Sequence[float]) -> tuple[float, bool]:
    """How much faster `other` is than `dense`: the median over rounds of the ratio, and whether it is to be claimed.

    A difference is claimed if it is 5 % or more and three in four rounds agree on its sign.

    >>> ratio([2.0, 2.2, 2.1, 2.0], [1.0, 1.1, 1.0, 1.0])
    (2.0, True)
    >>> ratio([1.0, 1.2, 0.8, 1.1], [1.0, 1.0, 1.0, 1.0])[1]
    False
    """
    ratios = sorted(a / b for a, b in zip(dense, other, strict=True))
    middle = statistics.median(ratios)
    agree = sum((value > 1) == (middle > 1) for value in ratios) / len(ratios)
    return middle, max(middle, 1 / middle) >= _LEAST and agree >= 0.75


def verdict(rows: Sequence[Comparison], device: str, advice: str) -> str:
    """One plain line: how much faster and smaller than the dense model, on what; or that it is not, and what would be.

    Args:
        rows: one format, at some batch sizes.
        device: what the times were taken on.
        advice: what would make it faster.
    """
    parts = []
    for row in rows:
        times, claimed = row.faster
        if not claimed:
            parts.append(f"no speed-up at batch {row.batch} ({times:.2f}x)")
        else:
            how = f"{times:.2f}x faster" if times > 1 else f"{1 / times:.2f}x SLOWER"
            parts.append(f"{how} at batch {row.batch}")
    smaller = rows[0].dense.bytes / rows[0].exported.bytes
    size = f"{smaller:.1f}x smaller" if smaller >= _LEAST else f"no smaller ({smaller:.2f}x)"
    line = f"{rows[0].name}: {', '.join(parts)}, file {size}, against dense in the same runtime"
    line += f" ({rows[0].runtime}; {device})."
    if any(claimed and times > 1 for times, claimed in (row.faster for row in rows)):
        return line
    return f"{line} No speed-up on this device; what would give one: {advice}."


def cost_table(rows: Sequence[Comparison], device: str) -> Table:
    """A row per format and batch size: dense and exported side by side."""
    scores = sorted({key for row in rows for key in row.metrics if "loss" not in key})
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=device, caption_justify="left")
    table.add_column("format", overflow="fold", min_width=12)
    for column in (
        "batch",
        "dense ms",
        "ms",
        "p95 ms",
        "faster",
        "samples/s",
        "MB",
        "kB",
        *(key.removesuffix("_exported") for key in scores),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        cost, (times, claimed) = row.exported, row.faster
        table.add_row(
            row.name,
            str(row.batch),
            f"{row.dense.median_ms:.3f}",
            f"{cost.median_ms:.3f}",
            f"{cost.p95_ms:.3f}",
            f"{times:.2f}x" if claimed else "no",
            f"{cost.throughput:,.0f}",
            "?" if cost.memory is None else f"{cost.memory / 1e6:.1f}",
            f"{cost.bytes / 1e3:,.0f}",
            *(f"{row.metrics[key]:.4f}" if key in row.metrics else "" for key in scores),
        )
    return table


def plot_costs(rows: Sequence[Comparison], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the median time of a call as bars, dense and exported, a panel per batch size."""
    from matplotlib.figure import Figure

    batches = sorted({row.batch for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(8, 0.9 + len(batches) * (0.7 + 0.5 * len(names))), layout="constrained")
    panels = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
    for panel, batch in zip(panels, batches, strict=True):
        chosen = [row for row in rows if row.batch == batch][::-1]
        for what, colour, shift in (("dense", "#8C8C8C", 0.2), ("exported", "#0072B2", -0.2)):
            costs = [getattr(row, what) for row in chosen]
            places = [index + shift for index in range(len(chosen))]
            bars = panel.barh(places, [cost.median_ms for cost in costs], 0.36, color=colour, label=what)
            texts = [f" {cost.median_ms:.3g} (p95 {cost.p95_ms:.3g})" for cost in costs]
            panel.bar_label(bars, texts, fontsize=8)
        panel.margins(x=0.25)
        panel.set_yticks(range(len(chosen)), [row.name for row in chosen])
        panel.set_xlabel(f"ms per call at batch {batch}: median (95th percentile)")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
