"""Trainings that an experiment needs, and what tables are made of."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from pl_sparse.tasks import data, models

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "outputs" / "reproduce"
console = Console()

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training for each seed.

    Attributes:
        name: the folder it is written to.
        arguments: of train.py; {seed} and {out} stand for the seed and the folder of all runs.
        after: whether other runs of the experiment have to be finished before.
        seeds: how many seeds at the most; a long training takes fewer.
        light: whether weights and checkpoints go once it is finished.
    """

    name: str
    arguments: str
    after: bool = False
    seeds: int = 3
    light: bool = False

    def folder(self, seed: int) -> Path:
        return OUT / self.name / f"seed_{seed}"

    def done(self, seeds: Sequence[int]) -> list[int]:
        return [seed for seed in seeds[: self.seeds] if self.finished(seed)]

    def finished(self, seed: int) -> bool:
        return (self.folder(seed) / "metrics.json").is_file()

    def metrics(self, seed: int) -> Metrics:
        found: Metrics = json.loads((self.folder(seed) / "metrics.json").read_text())
        return found

    def saved(self, seed: int, file: str = "model.safetensors") -> dict[str, Tensor]:
        return load_file(self.folder(seed) / file)

    def values(self, seeds: Sequence[int], value: Callable[[Metrics], float]) -> list[float]:
        return [value(self.metrics(seed)) for seed in self.done(seeds)]

    def spread(self, seeds: Sequence[int], value: Callable[[Metrics], float], digits: int = 2) -> str:
        return spread(self.values(seeds, value), digits)

    def last(self, seeds: Sequence[int], model: str, source: str, scale: str = "standard") -> list[float]:
        """Test accuracy after the last epoch."""
        paths = [self.folder(seed) / "checkpoints" / "last.ckpt" for seed in self.done(seeds)]
        return [evaluate(model, source, torch.load(path, weights_only=True)["state_dict"], scale) for path in paths]

    def start(self, seed: int) -> None:
        """Train, or resume a training that was interrupted."""
        folder = self.folder(seed)
        arguments = [part.replace("{seed}", str(seed)).replace("{out}", str(OUT)) for part in self.arguments.split()]
        last = folder / "checkpoints" / "last.ckpt"
        if last.is_file():
            arguments.append(f"ckpt_path={last}")
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with open(folder / "output.txt", "a") as log:
            command = [sys.executable, str(ROOT / "train.py"), *arguments, f"seed={seed}", f"hydra.run.dir={folder}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        seconds = time.perf_counter() - began
        if code == 0:
            self._note(seed, seconds)
        state = "done" if code == 0 else f"FAILED, see {folder / 'output.txt'}"
        console.print(f"{self.name} seed {seed}: {state}, {seconds:.0f} s", highlight=False)

    def _note(self, seed: int, seconds: float) -> None:
        """A line in runs.csv, before what is large goes."""
        metrics = self.metrics(seed)
        with open(OUT / "runs.csv", "a") as rows:
            rows.write(f"{self.name},{seed},{metrics['sparsity']:.6f},{accuracy(metrics):.6f},{seconds:.0f}\n")
        if self.light:
            shutil.rmtree(self.folder(seed) / "checkpoints", ignore_errors=True)
            for file in self.folder(seed).glob("*.safetensors"):
                file.unlink()


@dataclass(frozen=True)
class Experiment:
    """A published claim, the runs that test it, and the section that tells the outcome."""

    runs: list[Run]
    section: Callable[[Sequence[int]], str]
    direct: Callable[[], None] | None = field(default=None)


def accuracy(metrics: Metrics) -> float:
    """Test accuracy of the best epoch by validation."""
    return float(metrics["test/acc"])


def errors(run: Run, seeds: Sequence[int], model: str, source: str = "MNIST", scale: str = "standard") -> list[str]:
    """Test errors in percent, of the best epoch by validation and of the last, and how many seeds."""
    best = spread((1 - value for value in run.values(seeds, accuracy)), 2)
    return [best, spread((1 - value for value in run.last(seeds, model, source, scale)), 2), str(len(run.done(seeds)))]


def evaluate(model: str, source: str, tensors: Mapping[str, Tensor], scale: str = "standard") -> float:
    """Test accuracy of weights on disk, of a training's state or of a model."""
    x, y = _test(source, scale)
    net = getattr(models, model)(shape=tuple(x.shape[1:]), classes=10)
    names = set(net.state_dict())
    net.load_state_dict(
        {name.removeprefix("net."): t for name, t in tensors.items() if name.removeprefix("net.") in names}
    )
    net.eval()
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


@cache
def _test(source: str, scale: str) -> tuple[Tensor, Tensor]:
    module = getattr(data, source)(scale=scale)
    module.prepare_data()
    found: tuple[Tensor, Tensor] = module.load()[2]
    return found


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean +- standard deviation, in percent points."""
    numbers = [100 * value for value in values]
    if not numbers:
        return "not run"
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def section(title: str, text: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", " ".join(text.split()), *parts])
