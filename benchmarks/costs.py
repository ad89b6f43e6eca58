"""What a method costs beside its steps: memory, checkpoints, imports, the first step, a sweep.

    python benchmarks/costs.py [--millions 2] [--only memory checkpoints import first sweep] [--json FILE]

Memory is counted, not measured: the tensors that belong to masks, in bytes per weight, beside weights, gradients and
optimizer. Checkpoints are those of Lightning with Adam, in bytes per weight. Seconds are of the processor. An import is
that of a fresh process, a run one of `python train.py` with two steps, and
the sweep's runs per minute are those of one process that runs four, against four processes.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import quiet_trainer

from pl_sparse import Sparsity
from pl_sparse.callbacks import Compact
from pl_sparse.core.files import write_json
from pl_sparse.schedule import OneShot
from pl_sparse.scorer import Movement
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches

ROOT = Path(__file__).parent.parent
WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "hard": {"masking": "hard"},
    "hard, callbacks=compact": {"masking": "hard"},
    "hard, callbacks=compact, weights=true": {"masking": "hard"},
    "ste": {"masking": "ste"},
    "frozen, movement scores (sum)": {"scorer": Movement(rule="sum")},
    "frozen, movement scores (adam)": {"scorer": Movement()},
    "topkast": {"masking": "topkast"},
}
GOALS = {
    "memory": {"hard": 1.25, "ste": 5.25, "frozen, movement scores (sum)": 9.25},
    "checkpoint": {"hard, callbacks=compact, weights=true": 2.5},
}
RUN = ["train.py", "data.limit=256", "trainer.max_epochs=1", "callbacks=[]"]
SWEEP = ["sparsity=0.5,0.6,0.7,0.8"]


def trained(way: str, millions: float) -> tuple[Trainer, Sparsity | None, int]:
    torch.manual_seed(0)
    width = round(millions * 1e6 / 1024)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, width, bias=False), nn.ReLU(), nn.Linear(width, 10))
    options, callbacks = WAYS[way], list[Callback]()
    if options is not None:
        callbacks.append(
            Sparsity(schedule=OneShot(final=0.9, begin=0.25), report=False, exclude=["*3.weight"], **options)
        )
    if "compact" in way:
        callbacks.append(Compact(weights="weights" in way))
    trainer = quiet_trainer(
        max_epochs=1,
        callbacks=callbacks,
    )
    data = Batches(torch.randn(16, 1, 32, 32), torch.randint(10, (16,)), 4)
    trainer.fit(Classifier(net, 10, lambda groups: torch.optim.Adam(groups, 1e-3)), data)
    return trainer, Sparsity.of(trainer, required=False), width * 1024


def held(sparsity: Sparsity) -> int:
    """The bytes of all tensors that belong to masks."""
    tensors: list[Tensor | None] = []
    for param in sparsity.pruner.masked:
        tensors += [param.mask, param.latent, param._factor, param._bits, *param.state.values()]
    for group in sparsity.pruner.groups:
        if group.gate is not None:
            tensors += [group.gate.value, *group.gate.optimizer.state[group.gate.value].values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def sizes(millions: float) -> dict[str, dict[str, float]]:
    rows = {}
    for way in WAYS:
        trainer, sparsity, weights = trained(way, millions)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.ckpt"
            trainer.save_checkpoint(path)
            checkpoint = path.stat().st_size / weights
        rows[way] = {"memory": 0.0 if sparsity is None else held(sparsity) / weights, "checkpoint": checkpoint}
    return rows


def processor(command: list[str]) -> float:
    """Seconds of the processor that a process takes, its own processes included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def times(only: list[str]) -> dict[str, float]:
    found = {}
    if "import" in only:
        modules = {
            "import lightning.pytorch, torchmetrics, s": "lightning.pytorch, torchmetrics",
            "the same and pl_sparse.Sparsity, s": "pl_sparse as p; p.Sparsity",
        }
        for name, module in modules.items():
            found[name] = min(processor(["-c", f"import {module}"]) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        if "first" in only or "sweep" in only:
            one = processor([*RUN, f"hydra.run.dir={folder}/one"])
            found["a run of 2 steps, all of it, s"] = one
        if "sweep" in only:
            together = processor([*RUN, "-m", *SWEEP, f"hydra.sweep.dir={folder}/sweep"])
            found["runs per minute, one sweep"] = 60 * 4 / together
            found["runs per minute, a process each"] = 60 / one
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=2)
    parts = ["memory", "checkpoints", "import", "first", "sweep"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = {"torch": torch.__version__, "goals": GOALS}
    console = Console()
    if {"memory", "checkpoints"} & {*arguments.only}:
        figures["sizes"] = sizes(arguments.millions)
        table = Table("", "memory, bytes per weight", "goal", "checkpoint, bytes per weight", "goal")
        for way, row in figures["sizes"].items():
            goals = [str(GOALS[kind].get(way, "")) for kind in ("memory", "checkpoint")]
            table.add_row(way, f"{row['memory']:.2f}", goals[0], f"{row['checkpoint']:.2f}", goals[1])
        console.print(table)
    if {"import", "first", "sweep"} & {*arguments.only}:
        figures["times"] = times(arguments.only)
        table = Table("", "")
        for name, value in figures["times"].items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
