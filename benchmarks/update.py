"""The time of a mask update by structure and allocation: the first masks of a model, and those after them.

    python benchmarks/update.py [--millions 20] [--only LAMP row] [--json FILE]

Seconds are of the wall; later ones are the best of several. The processor's time, all threads together, is given in
passes: multiples of `weight.abs()` of all weights. Extra memory is the peak of the process beyond what it had before,
as a share of the weights'; the masks and what applies them are part of it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pl_sparse import Pruner
from pl_sparse.core.files import write_json
from pl_sparse.schedule import Constant, Cubic
from pl_sparse.updater import DropGrow

WAYS: dict[str, dict[str, Any]] = {
    "global": {"allocation": "global"},
    "uniform": {"allocation": "uniform"},
    "ERK": {"allocation": "erk"},
    "LAMP": {"allocation": "lamp"},
    "global, ste": {"allocation": "global", "masking": "ste"},
    "2:4": {"structure": "nm24"},
    "row": {"structure": "row"},
    "block 4x4, global": {"structure": "block4x4", "allocation": "global"},
    "channel": {"structure": "channel", "allocation": "uniform"},
    "drop and grow": {"updater": DropGrow()},
}
UPDATES = 6


def measure(way: str, millions: float) -> None:
    """In a process of its own, so that the peak of its memory is its own."""
    torch.manual_seed(0)
    layers = max(round(millions / (768 * 3072 / 1e6)), 1)
    net = nn.Sequential(*(nn.Linear(3072, 768, bias=False) for _ in range(layers)))
    weights = [weight.detach() for weight in net.parameters()]
    options = WAYS[way]
    final = 0.5 if options.get("structure") == "nm24" else 0.9
    if "updater" in options:
        schedule: Constant | Cubic = Constant(final=final, end=1.0, every=1)
        for weight in net.parameters():
            weight.grad = torch.randn_like(weight)
    else:
        schedule = Cubic(final=final, begin=0.0, end=1.0, every=1)
    pruner = Pruner(schedule=schedule, **options)
    pruner.attach(net)
    passes = []
    for _ in range(5):
        start = time.process_time()
        for weight in weights:
            weight.abs()
        passes.append(time.process_time() - start)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pruner._clock.fit(UPDATES)
    times = []
    for step in range(UPDATES):
        wall, processor = time.perf_counter(), time.process_time()
        with torch.no_grad():
            pruner._update(step)
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    first = 0 if "updater" in options else 1  # the cubic curve begins at 0
    wall, processor = (min(spent) for spent in zip(*times[first + 1 :], strict=True))
    share = peak / sum(4 * w.numel() for w in weights)
    print(times[first][0], wall, processor / min(passes), share, pruner.kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=20)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, arguments.millions)
        return
    title = f"{arguments.millions:g} million weights, {torch.get_num_threads()} threads"
    table = Table("masks", "first, s", "later, s", "passes", "extra memory / weights", "kept", title=title)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    figures["millions"] = arguments.millions
    for way in arguments.only:
        command = [sys.executable, __file__, "--way", way, "--millions", str(arguments.millions)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        first, later, passes, memory, kept = map(float, out.split())
        figures[way] = {"first": first, "later": later, "passes": passes, "memory": memory, "kept": kept}
        table.add_row(way, f"{first:.3f}", f"{later:.3f}", f"{passes:.1f}", f"{memory:.2f}", f"{kept:,.0f}")
    Console(width=120).print(table)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
