"""What removing channels during training saves: wall clock against masking alone, in the same run, and accuracy.

    python benchmarks/shrink.py [--epochs 6] [--seeds 3] [--samples 1000]

conv4 on Fashion-MNIST (on random images of its size with --random: the times are the same, the accuracy means nothing).
Half of the channels go by the middle of training; one run masks them, the other removes them after each epoch. The runs
take turns, seed by seed. The table has the median of the ratios and their span.
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
from lightning.pytorch import Callback, seed_everything
from rich.console import Console
from rich.table import Table
from training import quiet_trainer

from pl_sparse import Sparsity
from pl_sparse.callbacks import Shrink
from pl_sparse.core.files import write_json
from pl_sparse.schedule import Linear
from pl_sparse.structure import Channel
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches, FashionMNIST
from pl_sparse.tasks.models import conv4

Images = tuple[torch.Tensor, torch.Tensor]


class Clock(Callback):
    """The seconds of each epoch, without validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter())

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds[-1] = time.perf_counter() - self.seconds[-1]


def run(train: Images, test: Images, epochs: int, seed: int, shrinking: bool) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    net = conv4(shape=(1, 28, 28), classes=10)
    schedule = Linear(final=0.5, begin=0.0, end=0.5, every=max(len(train[0]) // 128 // 2, 1))
    sparsity = Sparsity(schedule=schedule, structure=Channel(coupled=True), allocation="uniform", report=False)
    clock = Clock()
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=[clock, sparsity, *([Shrink(every=1)] if shrinking else [])],
    )
    start = time.perf_counter()
    module = Classifier(net, 10, lambda groups: torch.optim.Adam(groups, 1e-3))
    trainer.fit(module, Batches(*train, 128, shuffle=True))
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        net.eval()
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in Batches(*test, 500))
    return {
        "seconds": seconds,
        "epochs": clock.seconds,
        "accuracy": right / len(test[0]),
        "params": sum(p.numel() for p in net.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=6000, help="training images")
    parser.add_argument("--random", action="store_true", help="random images, where the data set is not at hand")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.random:
        train = torch.randn(arguments.samples, 1, 28, 28), torch.randint(10, (arguments.samples,))
        test = torch.randn(500, 1, 28, 28), torch.randint(10, (500,))
    else:
        (x, y), _, (test_x, test_y) = FashionMNIST().load()
        train, test = (x[: arguments.samples], y[: arguments.samples]), (test_x[:2000], test_y[:2000])
    rows = [
        {kind: run(train, test, arguments.epochs, seed, kind == "shrunk") for kind in ("masked", "shrunk")}
        for seed in range(arguments.seeds)
    ]
    speed = sorted(row["masked"]["seconds"] / row["shrunk"]["seconds"] for row in rows)
    late = sorted(row["masked"]["epochs"][-1] / row["shrunk"]["epochs"][-1] for row in rows)
    threads = torch.get_num_threads()
    title = f"conv4, {len(train[0])} images, {arguments.epochs} epochs, {threads} threads, {arguments.seeds} seeds"
    table = Table("", "masked", "shrunk", "masked / shrunk", "target", title=title)

    def mean(kind: str, key: str) -> float:
        return statistics.mean(row[kind][key] for row in rows)

    span = f"{statistics.median(speed):.2f} ({speed[0]:.2f} to {speed[-1]:.2f})"
    table.add_row(
        "seconds of training", f"{mean('masked', 'seconds'):.1f}", f"{mean('shrunk', 'seconds'):.1f}", span, "1.3"
    )
    table.add_row("of the last epoch", "", "", f"{statistics.median(late):.2f} ({late[0]:.2f} to {late[-1]:.2f})", "")
    table.add_row("parameters", f"{mean('masked', 'params'):,.0f}", f"{mean('shrunk', 'params'):,.0f}", "", "")
    table.add_row("accuracy", *(f"{mean(kind, 'accuracy'):.4f}" for kind in ("masked", "shrunk")), "", "equal")
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"torch": torch.__version__, "threads": threads, "rows": rows})


if __name__ == "__main__":
    main()
