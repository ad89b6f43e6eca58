"""Weights that processes share: the masks are those of one process, and what cannot be had so is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from test_properties import METHODS

from pl_sparse.callbacks.strategies import refuse_strategy

HERE = Path(__file__).parent
fsdp2_on_cpus = pytest.mark.skipif(torch.__version__ < (2, 7), reason="FSDP2 runs on CPUs from torch 2.7 on")
CALIBRATED = {"force", "grasp", "iterative_snip", "obert", "snip", "synflow"}
OF_WHOLE_TENSORS = {"sste"}  # its masking scales by a sum over the tensor
BY_INPUTS = {
    "wanda": {"scorer": "wanda", "structure": "row", "allocation": "uniform"},
    "ria": {"scorer": "ria", "allocation": "uniform"},
    "owl": {"scorer": "wanda", "allocation": "owl"},
    "dsnot": {"scorer": "wanda", "updater": "dsnot", "structure": "row", "allocation": "uniform"},
    "sparsegpt": {"updater": "reconstruct", "allocation": "uniform", "masking": "hard"},
}
LEARNED = {
    "l0": {"scorer": "hardconcrete", "updater": "threshold", "sparsity": 1.0},
    "soft_movement": {"scorer": "softmovement", "updater": "threshold", "sparsity": 1.0},
    "str": {"scorer": "softthreshold", "updater": "threshold", "sparsity": 1.0},
}
STRUCTURES = {
    name: {"structure": name, "sparsity": 0.5, "misfit": "dense", "schedule": "linear"}
    for name in ("unstructured", "nm24", "nm24t", "row", "block4x4", "channel", "feature", "kernel")
}
ALLOCATIONS = {name: {"allocation": name, "sparsity": 0.8} for name in ("global", "uniform", "erk", "lamp", "owl")}


def run(kind: str, settings: dict[str, Any], processes: int = 2) -> dict[str, str]:
    """What differs, by name."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(HERE / "sharded.py"), kind, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, done.stderr[-3000:]
    results: dict[str, str] = json.loads(lines[0].removeprefix("RESULTS "))
    return results


QUICK = ("gmp", "movement", "rigl", "snip", "srste", "topkast")


@fsdp2_on_cpus
@pytest.mark.parametrize("methods", [QUICK, pytest.param([*METHODS, *LEARNED], marks=pytest.mark.slow)])
def test_methods_are_those_of_one_process_and_resume_on_either(methods: list[str]) -> None:
    results = run("fsdp", {name: LEARNED.get(name) for name in methods if name not in ("slimming", "group_lasso")})
    for name, result in results.items():
        if name in CALIBRATED:
            assert "looks at the whole model at once: use another one, or strategy=ddp" in result, name
        elif name in OF_WHOLE_TENSORS:
            assert "does not say that it works on parts of weights" in result, name
        else:
            assert not result, (name, result)


@pytest.mark.parametrize(("kind", "processes"), [("one", 2), pytest.param("two", 4, marks=pytest.mark.slow)])
def test_histograms_choose_the_masks_of_one_process(kind: str, processes: int) -> None:
    """Parts along any dimension, copies, tied scores: no weight and no mask is gathered for it."""
    assert run(kind, {}, processes) == {}


@fsdp2_on_cpus
def test_layers_inputs_of_all_processes_make_the_masks_of_one() -> None:
    """Each process calibrates on a batch of its own: masks are equal, weights that SparseGPT moves to 1e-6."""
    assert run("own", BY_INPUTS) == dict.fromkeys(BY_INPUTS, "")


@pytest.mark.slow
def test_every_method_of_two_replicas_is_that_of_one() -> None:
    methods = [name for name in [*METHODS, *LEARNED] if name not in ("slimming", "group_lasso")]
    results = run("ddp", {name: LEARNED.get(name) for name in methods})
    assert results == dict.fromkeys(methods, "")


@fsdp2_on_cpus
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_every_structure_and_allocation(kind: str) -> None:
    settings = STRUCTURES | ALLOCATIONS
    results = run(kind, settings, 2 if kind == "fsdp" else 4)
    assert results == dict.fromkeys(settings, "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "both"])
def test_tensor_parallel_weights(kind: str) -> None:
    settings = {**ALLOCATIONS, "wanda": {**BY_INPUTS["wanda"], "sparsity": 0.8}}
    results = run(kind, settings, 2 if kind == "tensor" else 4)
    assert "looks at the inputs of layers, which none of them has whole" in results.pop("wanda")
    assert results == dict.fromkeys(ALLOCATIONS, "")


LIGHTNING = """
import sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from pl_sparse import Sparsity
from pl_sparse.callbacks import AccuracyBudget, Regularize, Rewind
from pl_sparse.regularizer import L1

torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.randn(64, 12), torch.randint(3, (64,))

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 3))

    def configure_model(self):
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        zeros = {name: int((p == 0).sum()) for name, p in self.named_parameters() if p.dim() > 1}
        if not self.trainer.sanity_checking and index == 0:
            seen.append(zeros)
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

def full(module):
    return [p.full_tensor().detach() for p in module.parameters()]

def fit(folder, *callbacks, path=None, whole=False, **options):
    seen.clear()
    module, sparsity = Net(), Sparsity(report=False, **{"sparsity": 0.8, "allocation": "global", **options})
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False, enable_progress_bar=False,
        strategy=ModelParallelStrategy(save_distributed_checkpoint=not whole), enable_model_summary=False,
        callbacks=[*callbacks, sparsity, save])
    trainer.fit(module, DataLoader(TensorDataset(x, y), 8), DataLoader(TensorDataset(x, y), 32), ckpt_path=path)
    return module, sparsity, trainer

def says(*words, **options):
    try:
        fit(folder / "refused", **options)
    except ValueError as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(words)

if __name__ == "__main__":
    folder, seen = Path(sys.argv[1]), []
    for whole in (False, True):
        for options in ({}, {"scorer": "movement"}, {"structure": "row", "masking": "ste", "allocation": "uniform"}):
            here = folder / f"{whole}_{len(options)}"
            module, sparsity, trainer = fit(here, whole=whole, **options)
            weights = full(module)
            numel = sum(w.numel() for w in weights if w.dim() > 1)
            zeros = sum(int((w == 0).sum()) for w in weights if w.dim() > 1)
            assert zeros == sparsity.summary.weights - sparsity.summary.kept == numel - round(0.2 * numel), zeros
            assert abs(sparsity.sparsity - zeros / numel) < 1e-9
            assert sparsity.summary.params_nonzero == sum(int((w != 0).sum()) for w in weights)
            assert len(seen) == 3
            again, other, _ = fit(here / "again", path=here / "epoch=1.ckpt", whole=whole, **options)
            assert other.summary == sparsity.summary, (other.summary, sparsity.summary)
            assert all(torch.equal(a, b) for a, b in zip(full(again), weights, strict=True))
            assert all(torch.equal(p._mask, q._mask) for p, q in zip(other.pruner.params, sparsity.pruner.params))
    for callback in (Regularize(L1()), Rewind()):
        try:
            fit(folder / "refused", callback)
        except ValueError as error:
            assert f"{type(callback).__name__} needs whole weights" in str(error), error
        else:
            raise AssertionError(callback)
    says("scorer=snip looks at the whole model at once", scorer="snip", schedule="oneshot")
    says("structure=channel couples layers", structure="coupled")
    print(f"rank {trainer.global_rank} is right")
"""


@fsdp2_on_cpus
def test_lightning_shares_weights(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LIGHTNING)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert done.stdout.count("is right") == 2, done.stdout[-2000:] + done.stderr[-4000:]


def test_strategies_that_leave_no_weights_are_refused() -> None:
    for kind, words in ((FSDPStrategy, "flattens the weights"), (DeepSpeedStrategy, "engine of its own")):
        strategy = object.__new__(kind)
        with pytest.raises(ValueError, match=f"^{kind.__name__} .*{words}.*ModelParallelStrategy"):
            refuse_strategy(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]
