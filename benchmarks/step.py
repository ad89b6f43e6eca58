"""What a training step costs with masks, as a ratio to dense Lightning training of the same model, beside others.

    python benchmarks/step.py [--models lenet300 resnet20 bert2] [--steps 60] [--rounds 9] [--only hard ste]

All variants take turns in one process, each round in another order. A round's ratio is that of the median times from
one batch to the next; the table has the median of the rounds' ratios and their quartiles, of the wall's time and of the
processor's, which a machine with other work changes less. Weights are 90 % pruned from the first step on, and the
movement scorer observes every step. bert2 is two layers of BERT-base on 8 x 32 embeddings.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from peers import MASKED, SPARSITY, missing, sgd
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from training import quiet_trainer

from pl_sparse import Sparsity
from pl_sparse.core.files import write_json
from pl_sparse.schedule import Constant
from pl_sparse.scorer import Movement
from pl_sparse.tasks import models
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches

VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "hard": {"scorer": "magnitude", "masking": "hard"},
    "ste": {"scorer": "magnitude", "masking": "ste"},
    "frozen": {"scorer": "magnitude", "masking": "frozen"},
    "frozen, movement scores": {"scorer": Movement(rule="sum"), "masking": "frozen"},
}
GOALS = {
    "lenet300": {"hard": 1.03, "ste": 1.05, "frozen, movement scores": 1.05},
    "resnet20": {"hard": 1.01, "ste": 1.05, "frozen, movement scores": 1.05},
    "bert2": {"hard": 1.01, "ste": 1.05, "frozen, movement scores": 1.05},
}
STEPS = {"lenet300": 200, "resnet20": 30, "bert2": 12}


class Layer(nn.Module):
    """A layer of BERT-base, whose projections are layers of their own, as in transformers: others see no more."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        layers = self.query, self.key, self.value
        parts = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = self.norm(x + self.output(mixed))
        return self.last(x + self.down(F.gelu(self.up(x))))


class Bert2(nn.Module):
    """Two layers of BERT-base, and a class by the mean of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []
        self.processor: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())

    def steps(self, times: list[float]) -> float:
        return statistics.median(b - a for a, b in [*pairwise(times)][3:])


def run(model: str, variant: str, steps: int) -> tuple[float, float]:
    """The median seconds of a step, of the wall's and of the processor's time."""
    torch.manual_seed(0)
    if model == "bert2":
        net: nn.Module = Bert2()
        data = Batches(torch.randn(8 * steps, 32, 768), torch.randint(10, (8 * steps,)), 8)
    else:
        net = getattr(models, model)(shape=(1, 28, 28), classes=10)
        data = Batches(torch.randn(128 * steps, 1, 28, 28), torch.randint(10, (128 * steps,)), 128)
    clock = Clock()
    callbacks: list[Callback] = [clock]
    optimizer = sgd
    if variant in MASKED:
        more, optimizer = MASKED[variant](net)
        callbacks += more
    elif (options := VARIANTS[variant]) is not None:
        schedule = Constant(final=SPARSITY, every=10**6)
        callbacks.append(Sparsity(schedule=schedule, allocation="uniform", report=False, **options))
    trainer = quiet_trainer(
        max_epochs=1,
        callbacks=callbacks,
    )
    trainer.fit(Classifier(net, 10, optimizer), data)
    return clock.steps(clock.times), clock.steps(clock.processor)


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the quartiles."""
    ratios = sorted(ratios)
    return statistics.median(ratios), ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet300", "resnet20", "bert2"], choices=list(STEPS))
    parser.add_argument("--steps", type=int, default=None, help=f"of each run; by default {STEPS}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[*VARIANTS, *MASKED], choices=[*VARIANTS, *MASKED], metavar="WAY")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console()
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "models": {}}
    figures["missing"] = {name: reason for name in arguments.only if (reason := missing(name)) is not None}
    variants = ["dense", *(name for name in arguments.only if name != "dense" and name not in figures["missing"])]
    for model in arguments.models:
        steps = arguments.steps or STEPS[model]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        run(model, "dense", 6)
        for turn in range(arguments.rounds):
            for name in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
                times[name].append(run(model, name, steps))
        title = f"{model}, {torch.get_num_threads()} threads, {arguments.rounds} x {steps} steps"
        table = Table("variant", "ms per step", "ratio to dense", "of the processor's time", "goal", title=title)
        rows = figures["models"][model] = {}
        for name in variants:
            wall, processor = (
                spread([ours[i] / dense[i] for ours, dense in zip(times[name], times["dense"], strict=True)])
                for i in (0, 1)
            )
            ms = 1e3 * statistics.median(wall for wall, _ in times[name])
            goal = GOALS[model].get(name)
            rows[name] = {"ms": ms, "wall": wall, "processor": processor, "goal": goal, "rounds": arguments.rounds}
            shown = [f"{median:.3f} ({low:.3f} to {high:.3f})" for median, low, high in (wall, processor)]
            table.add_row(name, f"{ms:.3f}", *shown, "" if goal is None else f"{goal:.2f}")
        console.print(table)
    if arguments.json:
        if arguments.json.exists():  # models that are measured at another time stay
            figures["models"] = json.loads(arguments.json.read_text())["models"] | figures["models"]
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
