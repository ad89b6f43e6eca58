"""Which allocation and which interval between updates the default method has: the runs behind docs/defaults.md.

    python benchmarks/defaults.py                  # about an hour of two cores; a run that is finished is not repeated
    python benchmarks/defaults.py --jobs 2 --models lenet300 short

Magnitude pruning on a cubic schedule, hard masks, on Fashion-MNIST, each with one thread. `short` is LeNet-300-100
for 40 optimizer steps.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
MODELS = {  # what is trained, and for how long
    "lenet300": ["model=lenet300", "trainer.max_epochs=6"],
    "resnet20": ["model=resnet20", "model.width=8", "data.limit=2500", "trainer.max_epochs=6"],
    "vit_tiny": ["model=vit_tiny", "data.limit=5000", "trainer.max_epochs=6"],
    "short": ["model=lenet300", "data.limit=2560", "trainer.max_epochs=2"],
}
ALLOCATIONS = ("global", "erk", "uniform", "lamp")
INTERVALS = ("0.05", "10", "100")
SPARSITIES = (0.8, 0.9, 0.95)
SEEDS = (0, 1)


def settings(model: str) -> Iterator[tuple[str, str, float, int]]:
    """Allocation, interval, sparsity and seed of each run: all allocations; for LeNet-300-100 all intervals at two."""
    pairs = [(allocation, "0.05") for allocation in ALLOCATIONS]
    if model in ("short", "lenet300"):
        pairs += [(a, every) for a, every in product(("global", "erk"), INTERVALS) if every != "0.05"]
    for sparsity, seed, (allocation, every) in product(SPARSITIES, SEEDS, pairs):
        yield allocation, every, sparsity, seed
    for seed in SEEDS:
        yield "dense", "0.05", 0.0, seed


def run(folder: Path, model: str, allocation: str, every: str, sparsity: float, seed: int) -> dict[str, Any]:
    """The metrics of one run; trained if it is not there."""
    place = folder / model / f"{allocation}_{every}_{sparsity:g}_{seed}"
    if not (place / "metrics.json").is_file():
        command = [sys.executable, str(ROOT / "train.py"), "data=fashion_mnist", *MODELS[model], f"seed={seed}"]
        command += (
            ["method=dense"] if allocation == "dense" else [f"allocation={allocation}", f"schedule.every={every}"]
        )
        command += [] if allocation == "dense" else [f"sparsity={sparsity}"]
        command += ["threads=1", f"output_dir={place}", f"hydra.run.dir={place}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{model} {allocation} every={every} sparsity={sparsity:g} seed={seed}", flush=True)
    found: dict[str, Any] = json.loads((place / "metrics.json").read_text())
    return found


def _of(folder: Path, model: str, key: tuple[str, str, float, int]) -> dict[str, Any]:
    return run(folder, model, *key)


def cell(values: list[float]) -> str:
    """Mean and deviation in percent."""
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}" if len(values) > 1 else f"{100 * values[0]:.2f}"


def table(model: str, results: dict[tuple[str, str, float, int], dict[str, Any]]) -> list[str]:
    """A row per allocation and interval, a column per sparsity."""
    rows = [f"| {model}: test accuracy % | " + " | ".join(f"{100 * s:g} %" for s in SPARSITIES) + " |"]
    rows.append("|---" * (len(SPARSITIES) + 1) + "|")
    for allocation, every in dict.fromkeys((a, e) for a, e, *_ in results):
        cells = []
        for sparsity in (0.0,) if allocation == "dense" else SPARSITIES:
            cells.append(cell([m["test/acc"] for k, m in results.items() if k[:3] == (allocation, every, sparsity)]))
        if allocation == "dense":
            rows.append(f"| dense | {cells[0]} |" + " |" * (len(SPARSITIES) - 1))
        else:
            rows.append(f"| `allocation={allocation} schedule.every={every}` | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "defaults")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    given = parser.parse_args()
    folder = given.folder.resolve()
    for model in given.models:
        keys = list(settings(model))
        with ThreadPoolExecutor(given.jobs) as pool:
            metrics = pool.map(partial(_of, folder, model), keys)
            results = dict(zip(keys, metrics, strict=True))
        print("\n".join(["", *table(model, results), ""]), flush=True)


if __name__ == "__main__":
    main()
