"""The time and memory of a global magnitude mask over many weights, against torch's own ways.

    python benchmarks/topk.py [--millions 0.1 1 10 85 1000] [--json FILE]

Each way is run in a process of its own, several times: the best time of the processor, and the extra memory at its
peak as a share of the weights'. `torch.nn.utils.prune.global_unstructured` takes some 0.2 s per million weights, and is
run up to 10 million; `kthvalue` holds the scores of all weights, and is run up to 85 million.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import prune

from pl_sparse.allocation import Global, Units, choose
from pl_sparse.core.files import write_json
from pl_sparse.core.targets import find
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import Unstructured

SPARSITY = 0.9


def model(millions: float) -> nn.Module:
    torch.manual_seed(0)
    count = max(round(millions / (768 * 3072 / 1e6)), 1)
    width = round(millions * 1e6 / 3072) if count == 1 else 768
    return nn.Sequential(*(nn.Linear(3072, width, bias=False) for _ in range(count)))


def pl_sparse(net: nn.Module) -> Callable[[], int]:
    params = find(net)
    groups = Unstructured().groups(params, net)

    def masks() -> int:
        choose(Units(groups, Unstructured(), Magnitude().score, pointwise=True), Global(), SPARSITY)
        return 0

    return lambda: masks() + sum(param.kept for param in params)


def kthvalue(net: nn.Module) -> Callable[[], int]:
    weights = list(net.parameters())

    def masks() -> int:
        scores = torch.cat([w.detach().abs().reshape(-1) for w in weights])
        threshold = scores.kthvalue(round(SPARSITY * len(scores))).values
        return sum(int((w.detach().abs() > threshold).sum()) for w in weights)

    return masks


def torch_prune(net: nn.Module) -> Callable[[], int]:
    layers = [(layer, "weight") for layer in net]  # type: ignore[union-attr]

    def masks() -> int:
        prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
        kept = sum(int(layer.weight_mask.sum()) for layer, _ in layers)
        for layer, name in layers:
            prune.remove(layer, name)
        return kept

    return masks


MOST = {"torch.nn.utils.prune": 10, "cat and kthvalue": 85}  # million weights
WAYS = {"pl_sparse": pl_sparse, "cat and kthvalue": kthvalue, "torch.nn.utils.prune": torch_prune}


def measure(way: str, millions: float, times: int) -> None:
    """In a process of its own, so that the peak of its memory is its own."""
    net = model(millions)
    size = sum(w.numel() * w.element_size() for w in net.parameters())
    work = WAYS[way](net)
    if way == "pl_sparse":  # torch loads some code at its first use
        pl_sparse(nn.Linear(8, 8))()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        kept = work()
        best = min(best, time.process_time() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(best, peak / size, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[0.1, 1, 10, 85, 1000])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, *arguments.millions, 1 if arguments.way == "torch.nn.utils.prune" else 5)
        return
    title = f"global mask at {SPARSITY:.0%}, {torch.get_num_threads()} threads"
    table = Table("millions", "way", "seconds", "ns per weight", "extra memory / weights", "kept", title=title)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": []}
    for millions in arguments.millions:
        for way in WAYS:
            if millions > MOST.get(way, millions):
                continue
            command = [sys.executable, __file__, "--way", way, "--millions", str(millions)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, memory, kept = map(float, out.split())
            figures["rows"].append({"millions": millions, "way": way, "seconds": seconds, "memory": memory})
            per_weight = f"{1e3 * seconds / millions:.2f}"
            table.add_row(f"{millions:g}", way, f"{seconds:.4f}", per_weight, f"{memory:.3f}", f"{kept:,.0f}")
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
