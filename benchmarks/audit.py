"""What comparing weights with masks costs, as a part of the validation that it happens at.

    python benchmarks/audit.py [--models lenet300 resnet20] [--samples 10000] [--rounds 9]

A model that is 90 % pruned is validated on so many samples, in batches of 128, on one thread. The table has the median
times of the processor, so that what else runs on the machine does not count.
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
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from training import quiet_trainer

from pl_sparse import Sparsity
from pl_sparse.core.files import write_json
from pl_sparse.schedule import OneShot
from pl_sparse.tasks import models
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches

LIMIT = 0.01


class Timed(Sparsity):
    """Measures its audits, and the validations that they are a part of."""

    def __init__(self) -> None:
        super().__init__(schedule=OneShot(final=0.9), allocation="uniform", report=False)
        self.audits: list[float] = []
        self.validations: list[float] = []
        self._started = 0.0

    def _check(self, trainer: Trainer) -> None:
        started = time.process_time()
        super()._check(trainer)
        self.audits.append(time.process_time() - started)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append(time.process_time() - self._started)


def run(model: str, samples: int, rounds: int) -> tuple[float, float]:
    """Seconds of an audit, and of a validation with it."""
    torch.manual_seed(0)
    net = getattr(models, model)(shape=(1, 28, 28), classes=10)
    train, val = (Batches(torch.randn(n, 1, 28, 28), torch.randint(10, (n,)), 128) for n in (256, samples))
    timed = Timed()
    callbacks: list[Callback] = [timed]
    trainer = quiet_trainer(
        max_epochs=rounds + 1,
        callbacks=callbacks,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(net, 10, lambda groups: torch.optim.SGD(groups, 0.1)), train, val)
    return statistics.median(timed.audits[1:]), statistics.median(timed.validations[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet300", "resnet20"], choices=models.__all__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    title = f"{arguments.samples} samples, {torch.get_num_threads()} threads, {arguments.rounds} rounds"
    table = Table("model", "validation, ms", "audit, ms", "part", "limit", title=title)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for model in arguments.models:
        audit, validation = run(model, arguments.samples, arguments.rounds)
        figures[model] = {"audit": audit, "validation": validation, "part": audit / validation}
        part = f"{audit / validation:.2%}"
        table.add_row(model, f"{1e3 * validation:.1f}", f"{1e3 * audit:.3f}", part, f"{LIMIT:.0%}")
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
