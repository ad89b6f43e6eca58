"""Processes that train one model decide alike, or say what differs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from pl_sparse import Sparsity
from pl_sparse.callbacks import AccuracyBudget, RandomState, Regularize, Rewind
from pl_sparse.regularizer import Latency
from pl_sparse.allocation import Budget
from pl_sparse.schedule import Tickets
from pl_sparse.scorer import Scorer

torch.set_num_threads(1)
folder = Path(sys.argv[1])

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        if self.trainer.global_step == 0:
            torch.manual_seed(self.trainer.global_rank)  # unlike in the processes
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        # not synchronized: each process logs what it sees
        self.log("val/acc", 0.9 - 0.8 * self.trainer.global_rank * float(self.trainer.current_epoch > 1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

def fit(*callbacks, epochs=4, path=None, **options):
    torch.manual_seed(3)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(3, (32,))
    module, sparsity = Net(), Sparsity(report=False, **{"sparsity": 0.5, **options})
    before = [c for c in callbacks if isinstance(c, Regularize)]
    after = [c for c in callbacks if c not in before]
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*before, sparsity, *after],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), default_root_dir=folder)
    trainer.fit(module, DataLoader(TensorDataset(x, y), 4), DataLoader(TensorDataset(x, y), 16), ckpt_path=path)
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    ranks = trainer.strategy.all_gather(flat)
    assert torch.equal(ranks[0], ranks[1]), float((ranks[0] - ranks[1]).abs().max())
    return flat, sparsity

def shuffle(): return fit(ablation="shuffle", schedule="oneshot", scorer="random")
def reinit(): return fit(ablation="reinit", schedule="oneshot")
def rewind():
    schedule = Tickets(final=0.5, sparsities=(0.3, 0.5))
    return fit(Rewind("reinit"), schedule=schedule, sparsity=None)
def accuracy_budget(): return fit(AccuracyBudget(drop=0.1, warmup=1), schedule="paced", sparsity=0.9, epochs=5)
def synflow(): return fit(scorer="synflow", schedule="oneshot")
def milliseconds():
    table = folder / "table.json"
    return fit(structure="coupled", allocation=Budget(ms=0.8, table=table), sparsity=1.0)
def latency(): return fit(Regularize(Latency(table=folder / "other.json")))
def dropout():
    whole, _ = fit(RandomState(), ModelCheckpoint(folder / "dropout", "{epoch}", save_top_k=-1))
    again, _ = fit(RandomState(), path=folder / "dropout" / "epoch=1.ckpt")
    assert torch.equal(whole, again)
    again, _ = fit(path=folder / "dropout" / "epoch=1.ckpt")
    assert not torch.equal(whole, again)
def unlike():
    @dataclass(frozen=True)
    class Mine(Scorer):
        observes: ClassVar[bool] = True
        def observe(self, param): pass
        def score(self, param):
            rank = torch.distributed.get_rank()
            return torch.rand(param.shape, generator=torch.Generator().manual_seed(rank))
    try:
        fit(scorer=Mine())
    except RuntimeError as error:
        assert "net.3.weight" in str(error) and "differ between processes" in str(error), error
    else:
        raise AssertionError("not seen")

if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name]()
        print(f"{name} is right")
"""


def run(folder: Path, *cases: str) -> None:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    for case in cases:
        assert done.stdout.count(f"{case} is right") == 2, done.stdout[-1500:] + done.stderr[-4000:]


def test_what_draws_and_what_judges(tmp_path: Path) -> None:
    run(tmp_path, "shuffle", "reinit", "rewind", "accuracy_budget", "synflow", "dropout", "unlike")


def test_what_measures(tmp_path: Path) -> None:
    run(tmp_path, "milliseconds", "latency")
