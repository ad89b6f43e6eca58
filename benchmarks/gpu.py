"""What masks cost on a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py [--minutes 9] [--only step update] [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny

The figures go to docs/data/gpu-CARD.json, one part after the other, so that what is measured by then is there if time
runs out. `--device cpu --tiny` runs the same code where there is no GPU; its figures say nothing. A part that cannot
run, or fails, says why in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pl_sparse import Pruner
from pl_sparse.core import topk
from pl_sparse.core.files import write_json
from pl_sparse.schedule import Constant, Cubic

DATA = Path(__file__).parent.parent / "docs" / "data"
WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "hard": {"masking": "hard"},
    "ste": {"masking": "ste"},
    "movement": {"scorer": "movement"},
}
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense",)  # numbers that are read: of the CPU too, where optimizers count their steps
SHAPES = [(768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 11008), (8192, 8192)]


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.convs = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and inputs == out
        self.short = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs(x) + self.short(x))


def resnet(tiny: bool) -> tuple[nn.Module, Tensor]:
    """ResNet-50 and a batch of ImageNet's size."""
    base, depths = (8, (1, 1)) if tiny else (64, (3, 4, 6, 3))
    parts: list[nn.Module] = [nn.Conv2d(3, base, 7, 2, 3, bias=False), nn.BatchNorm2d(base), nn.ReLU()]
    parts.append(nn.MaxPool2d(3, 2, 1))
    inputs = base
    for stage, depth in enumerate(depths):
        for block in range(depth):
            width = base * 2**stage
            parts.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000 if not tiny else 10)]
    return nn.Sequential(*parts), torch.randn(2 if tiny else 128, 3, *([32, 32] if tiny else [224, 224]))


def bert(tiny: bool) -> tuple[nn.Module, Tensor]:
    """The encoder of BERT-base, and a batch of 32 x 128 embeddings."""
    width, heads, depth = (32, 2, 1) if tiny else (768, 12, 12)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True)
    net = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return net, torch.randn(*((2, 4) if tiny else (32, 128)), width)


class Bench:
    """The device, and how it is timed."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.rounds, self.steps = (1, 2) if tiny else (5, 10)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """Of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def memory(self, highest: bool = False) -> int:
        """Bytes that tensors take on a GPU; or the most since they were last asked for."""
        if self.device.type != "cuda":
            return 0
        if highest:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def graphed(self, work: Callable[[], Any], times: int) -> float:
        """Of one call within a CUDA graph of many."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
        graph.replay()
        return self.seconds(graph.replay, 5) / times

    def training(self, make: Callable[[bool], tuple[nn.Module, Tensor]], way: str, compiled: Any = None) -> Training:
        torch.manual_seed(0)
        net, x = make(self.tiny)
        return Training(net.to(self.device), x.to(self.device), WAYS[way], self.device, compiled)


class Training:
    """A plain training loop in bf16, 90 % pruned from its second step on, or dense."""

    def __init__(
        self, net: nn.Module, x: Tensor, options: dict[str, Any] | None, device: torch.device, compiled: Any = None
    ) -> None:
        self.net, self.x, self.device = net, x, device
        self.call = net if compiled is None else torch.compile(net, backend=compiled)
        self.optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
        self.pruner: Pruner | None = None
        self.number = 0
        if options is not None:
            self.pruner = Pruner(schedule=Cubic(final=0.9, begin=0, end=10**6, every=10), **options)
            self.pruner.attach(net)
            self.pruner.prepare(10**6 + 1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.call(self.x).float().square().mean()
        loss.backward()
        if self.pruner is not None:
            self.pruner.before_step(self.number, optimizer=self.optimizer)
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.after_step()
        self.number += 1

    def update(self) -> None:
        """Set masks at once."""
        assert self.pruner is not None
        with torch.no_grad():
            self.pruner._updated = -1
            self.pruner._update(self.number, levels=(0.9,))


def step(bench: Bench) -> dict[str, Any]:
    """Ratios to dense steps, ways in turns; masks are set every tenth step, outside of what is timed."""
    found: dict[str, Any] = {}
    for name, make in (("resnet50", resnet), ("bert-base", bert)):
        trainings = {way: bench.training(make, way) for way in WAYS}
        for training in trainings.values():
            for _ in range(2):
                training.step()
            if training.pruner is not None:
                training.update()
                training.pruner._clock.span = (-1, -1)  # no further masks
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(bench.rounds):
            for way, training in trainings.items():
                times[way].append(bench.seconds(training.step, bench.steps))
        ratios = {way: [a / b for a, b in zip(times[way], times["dense"], strict=True)] for way in WAYS}
        found[name] = {
            way: {"ms": 1e3 * statistics.median(times[way]), "ratio": statistics.median(r), "of": [min(r), max(r)]}
            for way, r in ratios.items()
        }
        del trainings
    return found


def update(bench: Bench) -> dict[str, Any]:
    """Seconds of a mask update and its peak memory over the weights', by size and structure."""
    found: dict[str, Any] = {}
    sizes = [0.02] if bench.tiny else [10, 85, 1000]  # the first calls load kernels
    for millions in sizes:
        for name, options in {
            "global": {"allocation": "global"},
            "uniform": {"allocation": "uniform"},
            "2:4": {"structure": "nm24"},
            "row": {"structure": "row", "allocation": "uniform"},
            "block4x4": {"structure": "block4x4", "allocation": "global"},
            "LAMP": {"allocation": "lamp"},
        }.items():
            width = 64 if bench.tiny else 3072
            count = max(round(millions * 1e6 / width**2), 1)
            with bench.device:
                net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
            pruner = Pruner(schedule=Constant(final=0.5 if name == "2:4" else 0.9, every=1, end=1.0), **options)
            pruner.attach(net)
            pruner._clock.fit(10)
            gc.collect()
            before = bench.memory()
            times = [bench.seconds(partial(masks, pruner), 1) for _ in range(2 if bench.tiny else 4)]
            peak = bench.memory(highest=True) - before
            once = bench.seconds(partial(passed, net), 2)
            found[f"{millions:g} M, {name}"] = {
                "first": times[0],
                "later": min(times[1:]),
                "pass": once,
                "memory": peak / sum(4 * weight.numel() for weight in net.parameters()),
                "kept": pruner.kept / pruner.numel,
            }
            del net, pruner
    return found


def pieces(bench: Bench) -> dict[str, Any]:
    """Seconds of an update and its peak memory over the weights', by how many scores are made at once."""
    found: dict[str, Any] = {}
    usual = topk._RUN
    try:
        for millions in [0.02] if bench.tiny else [10, 85, 1000]:
            width = 64 if bench.tiny else 3072
            with bench.device:
                layers = max(round(millions * 1e6 / width**2), 1)
                net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
            for allocation, power in product(("global", "uniform"), (20, 22, 24, 26)):
                topk._RUN = 1 << power
                pruner = Pruner(schedule=Constant(final=0.9, every=1, end=1.0), allocation=allocation)
                pruner.attach(net)
                pruner._clock.fit(10)
                before = bench.memory()
                seconds = min(bench.seconds(partial(masks, pruner), 1) for _ in range(2 if bench.tiny else 4))
                memory = (bench.memory(highest=True) - before) / sum(4 * weight.numel() for weight in net.parameters())
                row = found.setdefault(f"{millions:g} M, {allocation}", {})
                row[f"2^{power}"] = {"seconds": seconds, "memory": memory}
            del net, pruner
    finally:
        topk._RUN = usual
    return found


def masks(pruner: Pruner) -> None:
    """Set them anew."""
    with torch.no_grad():
        pruner._updated = -1
        pruner._update(1)


def passed(net: nn.Module) -> None:
    """Go over the weights once."""
    for weight in net.parameters():
        weight.detach().abs()


def halved(weight: Tensor, library: str = "cuSPARSELt", fused: bool = False) -> Tensor:
    """A weight with the two largest of each four, in the format of sparse tensor cores.

    Products come out transposed in memory; `fused` has the library write them in the usual order.
    """
    from torch.sparse import semi_structured

    kept = weight.abs().unflatten(1, (-1, 4)).topk(2, -1).indices
    mask = torch.zeros_like(weight).unflatten(1, (-1, 4)).scatter_(-1, kept, 1).flatten(1)
    kind: Any = getattr(semi_structured, f"SparseSemiStructuredTensor{library.upper()}")
    base: Any = semi_structured.SparseSemiStructuredTensor
    usual = base._FUSE_TRANSPOSE
    try:
        base._FUSE_TRANSPOSE = fused
        return cast("Tensor", kind.from_dense(weight * mask))
    finally:
        base._FUSE_TRANSPOSE = usual


def inference(bench: Bench) -> dict[str, Any]:
    """2:4 against dense linear layers in half precision, by shape, batch and library."""
    makers = {library: partial(halved, library=library) for library in ("cuSPARSELt", "CUTLASS")}
    return products(bench, makers) | {f"{k}, with a bias": row for k, row in products(bench, makers, bias=True).items()}


def blocks(bench: Bench) -> dict[str, Any]:
    """Linear layers with nine in ten blocks of 64 x 64 zero, as torch's BSR, against dense ones in half precision."""

    def blocked(weight: Tensor) -> Tensor:
        kept = torch.rand(weight.shape[0] // 64, weight.shape[1] // 64, device=weight.device) < 0.1
        kept[0, 0] = True
        return (weight * kept.repeat_interleave(64, 0).repeat_interleave(64, 1)).to_sparse_bsr((64, 64))

    return products(bench, {"blocks": blocked})


def products(bench: Bench, makers: dict[str, Callable[[Tensor], Tensor]], bias: bool = False) -> dict[str, Any]:
    """Seconds of linear layers in half precision, dense and, on a GPU, with sparse weights made of theirs.

    Each is timed twice: as calls from Python, and in a CUDA graph, where the host's share is gone.
    """
    found: dict[str, Any] = {}
    for out, inputs in [(64, 64)] if bench.tiny else SHAPES:
        for rows in (64,) if bench.tiny else (128, 1024, 8192):
            weight = torch.randn(out, inputs, device=bench.device, dtype=torch.float16)
            x = torch.randn(rows, inputs, device=bench.device, dtype=torch.float16)
            added = torch.randn(out, device=bench.device, dtype=torch.float16) if bias else None
            row: dict[str, Any] = {}
            sparse = makers if bench.device.type == "cuda" else {}
            for kind, made in {"dense": lambda weight: weight, **sparse}.items():
                try:
                    factor = made(weight)
                    work = partial(F.linear, x, factor, added)
                    work()  # the first call starts the library
                    row[kind] = {"calls": bench.seconds(work, 3 if bench.tiny else 50)}
                    if bench.device.type == "cuda":
                        row[kind]["graph"] = bench.graphed(work, 20)
                except RuntimeError as error:  # a library that does not take the shape, or the card
                    row.setdefault(kind, {})["failed"] = str(error)[:200]
            found[f"{out}x{inputs}, {rows} rows"] = row
    return found


class Block(nn.Module):
    """A transformer's block; fewer heads or hidden units are what `shrink` leaves of one."""

    def __init__(self, width: int, heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(self.norms[1](x))))
        return x + hidden


def networks(bench: Bench) -> dict[str, Any]:
    """A forward pass of transformers in half precision: dense, half of heads and hidden units gone, 2:4."""
    found: dict[str, Any] = {}
    sizes = {  # width, heads, size of one, hidden, blocks, batch, tokens
        "BERT-base, 1 x 128": (768, 12, 64, 3072, 12, 1, 128),
        "BERT-base, 32 x 128": (768, 12, 64, 3072, 12, 32, 128),
        "width 4096, 4 x 2048": (4096, 32, 128, 11008, 4, 4, 2048),
    }
    for name, (width, heads, size, hidden, depth, batch, tokens) in sizes.items():
        if bench.tiny:
            width, heads, size, hidden, depth, batch, tokens = 64, 2, 32, 128, 1, 2, 8
        row: dict[str, Any] = {}
        for kind in ("dense", "half", "2:4", "2:4 fused")[: 4 if bench.device.type == "cuda" else 2]:
            share = 2 if kind == "half" else 1
            net = nn.Sequential(*(Block(width, heads // share, size, hidden // share) for _ in range(depth)))
            net = net.to(bench.device, torch.float16).eval().requires_grad_(False)
            for layer in net.modules():
                if kind.startswith("2:4") and isinstance(layer, nn.Linear):
                    layer.weight = nn.Parameter(halved(layer.weight, fused=kind.endswith("fused")), False)
            x = torch.randn(batch, tokens, width, device=bench.device, dtype=torch.float16)
            work = partial(net, x)
            with torch.no_grad():
                work()
                row[kind] = {"calls": bench.seconds(work, 10)}
                if bench.device.type == "cuda":
                    row[kind]["graph"] = bench.graphed(work, 1)
        found[name] = row
    return found


def semi_structured(bench: Bench) -> dict[str, Any]:
    """A training step of BERT-base with 2:4 masks, and by torchao's layers that compute with the sparse weights.

    All weights are bf16: torchao's kernels take no float32.
    """

    def half(tiny: bool) -> tuple[nn.Module, Tensor]:
        net, x = bert(tiny)
        return net.bfloat16(), x.bfloat16()

    trainings = {"dense": bench.training(half, "dense"), "pl_sparse nm24": bench.training(half, "dense")}
    masked = trainings["pl_sparse nm24"]
    masked.pruner = Pruner(schedule=Constant(final=0.5, every=10), structure="nm24", masking="srste")
    masked.pruner.attach(masked.net)
    masked.pruner.prepare(10**6)
    found: dict[str, Any] = {}
    if bench.device.type == "cuda" and not bench.tiny:  # whose shapes its kernels do not take
        from torchao.sparsity.training import SemiSparseLinear, swap_linear_with_semi_sparse_linear

        other = bench.training(half, "dense")
        names = [n for n, m in other.net.named_modules() if n.endswith(("linear1", "linear2"))]
        swap_linear_with_semi_sparse_linear(other.net, dict.fromkeys(names, SemiSparseLinear))
        trainings["torchao SemiSparseLinear"] = other
    for name, training in trainings.items():
        training.step()
        found[name] = 1e3 * statistics.median(bench.seconds(training.step, bench.steps) for _ in range(bench.rounds))
    return found


def syncs(bench: Bench) -> dict[str, Any]:
    """How often the host waits for the device: in a step without new masks, and in one update."""
    found: dict[str, Any] = {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")

    def counted(work: Callable[[], Any]) -> dict[str, int]:
        bench.wait()
        with profile(activities=activities) as profiler:
            work()
        counts = {event.key: event.count for event in profiler.key_averages()}
        wanted = SYNCS if bench.device.type == "cuda" else READS
        return {key: counts.get(key, 0) for key in wanted}

    for way in WAYS:
        training = bench.training(bert, way)
        for _ in range(2):
            training.step()
        row = {"tensors": 0 if training.pruner is None else len(training.pruner.params)}
        if training.pruner is not None:
            training.update()
            row["update"] = counted(training.update)
        found[way] = {**row, "step": counted(training.step)}
    return found


def fsdp(bench: Bench) -> dict[str, Any]:
    """FSDP2 on one device: the time of a step, dense and masked, and whether masks are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh(bench.device.type, (1,))
            found: dict[str, Any] = {}
            masks: dict[str, Tensor] = {}
            for name, shard, way in (("dense", True, "dense"), ("hard", True, "hard"), ("alone", False, "hard")):
                torch.manual_seed(0)
                net, x = bert(bench.tiny)
                net = net.to(bench.device)
                if shard:
                    for layer in net.layers:  # type: ignore[union-attr]
                        fully_shard(layer, mesh=mesh)
                    fully_shard(net, mesh=mesh)
                training = Training(net, x.to(bench.device), WAYS[way], bench.device)
                training.step()
                if training.pruner is not None:
                    training.update()
                    masks[name] = torch.cat([param.mask.flatten() for param in training.pruner.params])
                found[name] = 1e3 * bench.seconds(training.step, bench.steps)
            found["masks differ in"] = int((masks["hard"] != masks["alone"]).sum())
            return found
        finally:
            dist.destroy_process_group()


def compiled(bench: Bench) -> dict[str, Any]:
    """A compiled masked step: its time, and how many graphs there are before and after updates."""
    graphs = [0]

    def counting(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        if bench.device.type != "cuda":
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    found: dict[str, Any] = {}
    for way in ("dense", "hard", "ste"):
        torch._dynamo.reset()
        graphs[0] = 0
        training = bench.training(bert, way, counting)
        for _ in range(3):
            training.step()
        first = graphs[0]
        if training.pruner is not None:
            training.update()
        ms = 1e3 * statistics.median(bench.seconds(training.step, bench.steps) for _ in range(bench.rounds))
        found[way] = {"ms": ms, "graphs": first, "graphs after an update": graphs[0]}
    return found


PARTS = (step, update, pieces, inference, blocks, networks, syncs, fsdp, semi_structured, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins that is likely to end later")
    parser.add_argument(
        "--only", nargs="+", choices=[part.__name__ for part in PARTS], help="these parts; the file keeps its others"
    )
    parser.add_argument("--json", type=Path, help="by default docs/data/gpu-CARD.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu --tiny shows that it runs")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    path = arguments.json or DATA / f"gpu-{name.replace(' ', '-').replace('/', '-')}.json"
    os.makedirs(path.parent, exist_ok=True)
    figures: dict[str, Any] = {"card": name, "torch": torch.__version__, "tiny": arguments.tiny, "failed": {}}
    if arguments.only and path.exists():
        before = json.loads(path.read_text())
        figures = (
            before if figures.items() >= {key: before[key] for key in ("card", "torch", "tiny")}.items() else figures
        )
    bench, start = Bench(arguments.device, arguments.tiny), time.monotonic()
    for part in PARTS:
        if arguments.only and part.__name__ not in arguments.only:
            continue
        if time.monotonic() - start > 60 * arguments.minutes - 75:
            figures["failed"][part.__name__] = "no time was left"
            continue
        began = time.monotonic()
        figures["failed"].pop(part.__name__, None)
        try:
            figures[part.__name__] = part(bench)
        except Exception as error:  # of a part, whatever it is: the others are measured
            figures["failed"][part.__name__] = f"{type(error).__name__}: {error}"[:500]
        figures.setdefault("seconds", {})[part.__name__] = time.monotonic() - began
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        write_json(path, figures)
    Console().print(figures)


if __name__ == "__main__":
    main()
