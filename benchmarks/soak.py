"""Whether memory grows in a long training: thousands of mask updates, and resumes, in one process.

    python benchmarks/soak.py [--updates 2000] [--resumes 20]

The table has the memory of the process (resident set) after a tenth of them, and after all.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import quiet_trainer

from pl_sparse import Pruner, Sparsity
from pl_sparse.schedule import Cubic

METHODS = {
    "magnitude, global": {"allocation": "global"},
    "movement": {"scorer": "movement"},
    "2:4, straight through": {"structure": "nm24", "masking": "ste", "misfit": "dense"},
    "RigL": {"updater": "dropgrow", "schedule": "constant", "sparsity": 0.9},
    "channels": {"structure": "channel"},
}


def resident() -> float:
    """MiB of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def updates(settings: dict[str, object], count: int) -> tuple[float, float]:
    """Memory after a tenth of a training whose every step sets masks, and after all of it."""
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 12))
    options = {"schedule": Cubic(final=0.5 if settings.get("structure") == "nm24" else 0.9, every=1), **settings}
    pruner = Pruner(**options)  # type: ignore[arg-type]
    pruner.attach(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    x, y = torch.randn(16, 784), torch.randint(12, (16,))
    early = 0.0
    for step in range(count):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        pruner.before_step(step, count, optimizer)
        optimizer.step()
        pruner.after_step()
        if step == count // 10:
            early = resident()
    return early, resident()


class Module(LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 12))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def resumes(count: int, sparse: bool) -> tuple[float, float]:
    """Memory after a tenth of so many trainings, each of which goes on where the one before ended, and after all.

    Trainer and module refer to each other: garbage is collected after each training.
    """
    data = DataLoader(TensorDataset(torch.randn(64, 784), torch.randint(12, (64,))), 16)
    early = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = None
        for number in range(count):
            trainer = quiet_trainer(
                max_epochs=number + 1,
                callbacks=[Sparsity(sparsity=0.9, report=False)] if sparse else [],
            )
            trainer.fit(Module(), data, ckpt_path=path)
            path = f"{folder}/last.ckpt"
            trainer.save_checkpoint(path)
            gc.collect()
            if number == count // 10:
                early = resident()
    return early, resident()


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--resumes", type=int, default=20)
    options = parser.parse_args()
    table = Table("", "after a tenth, MiB", "after all, MiB", "growth")
    # in a process of its own each, so that none sees the holes that another has left in the heap
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet, max_tasks_per_child=1) as pool:
        rows = {
            f"{options.updates} updates: {name}": pool.submit(updates, m, options.updates)
            for name, m in METHODS.items()
        }
        for name, sparse in {"resumes": True, "resumes, dense": False}.items():
            rows[f"{options.resumes} {name}"] = pool.submit(resumes, options.resumes, sparse)
        for name, row in rows.items():
            early, late = row.result()
            table.add_row(name, f"{early:.1f}", f"{late:.1f}", f"{late / early - 1:+.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
