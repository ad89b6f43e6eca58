"""What exports gain: sparse kernels on a CPU, compressed files, and channels that are gone under ONNX Runtime.

    python benchmarks/export.py [--threads 1] [--seconds 3]

Dense and exported models take turns in one process; the table has their medians and the median of the rounds' ratios.
Weights are random, with zeros at random places: times do not depend on the values.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pl_sparse.core.files import write_json
from pl_sparse.export import ONNX, save_compressed, to_csr
from pl_sparse.export.measure import device_name, latencies, percentile, ratio
from pl_sparse.export.onnx import open_onnx, save_onnx
from pl_sparse.quantize import post_training
from pl_sparse.tasks import models

OUT = Path(__file__).parent.parent / "outputs" / "benchmarks"
console = Console()


def pruned(net: nn.Module, sparsity: float) -> nn.Module:
    net = copy.deepcopy(net).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape, generator=generator) >= sparsity)
    return net


class FeedForward(nn.Module):
    """The two linear layers of a transformer block of BERT's size, 768 to 3072 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(768, 3072)
        self.down = nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def side_by_side(
    what: str, dense: Callable[[Tensor], Any], other: Callable[[Tensor], Any], x: Tensor, seconds: float
) -> dict[str, Any]:
    times = latencies({"dense": dense, "exported": other}, x, seconds, most=2000)
    faster, claimed = ratio(times["dense"], times["exported"])
    return {
        "what": what,
        "batch": len(x),
        "dense_ms": percentile(times["dense"], 0.5),
        "exported_ms": percentile(times["exported"], 0.5),
        "faster": faster,
        "claimed": claimed,
    }


def sparse_kernels(seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    lenet, block = models.lenet300(shape=(1, 28, 28), classes=10).eval(), FeedForward().eval()
    rows = []
    for net, shape, batches, levels in (
        (lenet, (1, 28, 28), (1, 32, 128), (0.95,)),
        (block, (768,), (128,), (0.9, 0.95, 0.98)),
    ):
        for sparsity in levels:
            for batch in batches:
                x = torch.randn(batch, *shape)
                converted, replaced, _ = to_csr(pruned(net, sparsity), x)
                name = (
                    f"{type(net).__name__ if net is block else 'lenet300'}, {sparsity:.0%}, CSR: {len(replaced)} layers"
                )
                rows.append(side_by_side(name, net, converted, x, seconds))
    return rows


def fewer_channels(seconds: float) -> list[dict[str, Any]]:
    """resnet20 of half the width: what is left where half of the channels of each layer are gone."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width in (16, 32):
            runs = {}
            for kept in (width, width // 2):
                torch.manual_seed(0)
                net = models.resnet20(shape=(1, 28, 28), classes=10, width=kept).eval()
                path = Path(folder) / f"{kept}.onnx"
                ONNX().write(net, torch.randn(2, 1, 28, 28), path)
                runs[kept] = ONNX().open(path, net)
            for batch in (1, 32):
                x = torch.randn(batch, 1, 28, 28)
                name = f"resnet20, width {width}, half the channels, ONNX"
                rows.append(side_by_side(name, runs[width], runs[width // 2], x, seconds))
    return rows


def integers(seconds: float) -> list[dict[str, Any]]:
    """8-bit weights and activations beside floating point, both under ONNX Runtime."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width in (16, 32):
            torch.manual_seed(0)
            net, x = models.resnet20(shape=(1, 28, 28), classes=10, width=width).eval(), torch.randn(32, 1, 28, 28)
            paths = [Path(folder) / name for name in ("float.onnx", "int8.onnx")]
            save_onnx(net, x, paths[0])
            save_onnx(post_training(net, [x]), x, paths[1])
            dense, whole = (open_onnx(path) for path in paths)
            for batch in (1, 32):
                rows.append(side_by_side(f"resnet20, width {width}, 8 bits, ONNX", dense, whole, x[:batch], seconds))
    return rows


def files() -> list[dict[str, Any]]:
    rows = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, net in (
            ("lenet300", models.lenet300(shape=(1, 28, 28), classes=10)),
            ("resnet20", models.resnet20(shape=(1, 28, 28), classes=10)),
        ):
            for sparsity in (0.9, 0.95, 0.98):
                tensors = pruned(net, sparsity).state_dict()
                path = Path(folder) / "weights.zst"
                save_compressed(tensors, path)
                dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                size = path.stat().st_size
                rows.append({"what": f"{name}, {sparsity:.0%}", "dense": dense, "file": size, "ratio": size / dense})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, each row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_name()
    with torch.no_grad():
        timed = [row for part in (sparse_kernels, fewer_channels, integers) for row in part(options.seconds)]
    sizes = files()

    table = Table("model", "batch", "dense ms", "exported ms", "faster", caption=device, caption_justify="left")
    for row in timed:
        times = [f"{row['dense_ms']:.3f}", f"{row['exported_ms']:.3f}"]
        table.add_row(row["what"], str(row["batch"]), *times, f"{row['faster']:.2f}x" if row["claimed"] else "no")
    console.print(table)
    table = Table("compressed file", "dense bytes", "bytes", "of dense")
    for row in sizes:
        table.add_row(row["what"], f"{row['dense']:,}", f"{row['file']:,}", f"{row['ratio']:.3f}")
    console.print(table)
    write_json(OUT / "export.json", {"device": device, "times": timed, "files": sizes})


if __name__ == "__main__":
    main()
