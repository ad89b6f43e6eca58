"""What a training step costs with masks, as a ratio to dense Lightning training of the same model.

    python benchmarks/step.py [--models lenet300 resnet20] [--steps 200] [--rounds 9]

All variants take turns in one process. A round's ratio is that of the median times from one batch to the next; the
table has the median of the rounds' ratios and their span. Weights are 90 % pruned from the first step on, and the
movement scorer observes every step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from pl_sparse import Sparsity
from pl_sparse.core.files import write_json
from pl_sparse.schedule import Constant
from pl_sparse.tasks import models
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches

VARIANTS: dict[str, dict[str, str] | None] = {
    "dense": None,
    "hard": {"scorer": "magnitude", "masking": "hard"},
    "ste": {"scorer": "magnitude", "masking": "ste"},
    "frozen": {"scorer": "magnitude", "masking": "frozen"},
    "frozen, movement scores": {"scorer": "movement", "masking": "frozen"},
}
LIMITS = {"lenet300": (1.06, 1.15), "resnet20": (1.02, 1.10)}  # hard, latent


class Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)][5:]


def run(model: str, options: dict[str, str] | None, steps: int) -> list[float]:
    torch.manual_seed(0)
    net = getattr(models, model)(shape=(1, 28, 28), classes=10)
    data = Batches(torch.randn(128 * steps, 1, 28, 28), torch.randint(10, (128 * steps,)), 128)
    clock = Clock()
    callbacks: list[Callback] = [clock]
    if options is not None:
        schedule = Constant(final=0.9, every=10**6)
        callbacks.append(Sparsity(schedule=schedule, allocation="uniform", report=False, **options))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net, 10, lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9)), data)
    return clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet300", "resnet20"], choices=models.__all__)
    parser.add_argument("--steps", type=int, default=None, help="of each run; by default 200, and 30 of resnet20")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console()
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for model in arguments.models:
        steps = arguments.steps or (30 if model == "resnet20" else 200)
        medians: dict[str, list[float]] = {name: [] for name in VARIANTS}
        run(model, None, 10)
        for _ in range(arguments.rounds):
            for name, options in VARIANTS.items():
                medians[name].append(statistics.median(run(model, options, steps)))
        title = f"{model}, batch 128, {torch.get_num_threads()} threads, {arguments.rounds} x {steps} steps"
        table = Table("variant", "ms per step", "ratio to dense", "over rounds", "limit", title=title)
        for name, times in medians.items():
            ratios = sorted(time / dense for time, dense in zip(times, medians["dense"], strict=True))
            ratio = statistics.median(ratios)
            hard, latent = LIMITS.get(model, (float("nan"),) * 2)
            limit = 1.0 if name == "dense" else hard if name == "hard" else latent
            figures.setdefault(model, {})[name] = {"ms": 1e3 * statistics.median(times), "ratio": ratio, "limit": limit}
            spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            table.add_row(name, f"{1e3 * statistics.median(times):.3f}", f"{ratio:.3f}", spread, f"{limit:.2f}")
        console.print(table)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
