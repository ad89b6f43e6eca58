"""Every method preset: it trains, resumes bit for bit, keeps its counts, and leaves a plain model."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from test_app import config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.training import quiet_trainer
from pl_sparse import Sparsity
from pl_sparse.allocation import kept
from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.settings import CONF
from pl_sparse.app.training import train
from pl_sparse.callbacks import RandomState
from pl_sparse.core.targets import find
from pl_sparse.schedule import Tickets
from pl_sparse.structure import NM, Row, Unstructured

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
QUICK = ["trainer.max_epochs=8", "optimizer.lr=0.003"]
UNIFORM = ["allocation=uniform"]  # one threshold over all leaves a layer of so young a network nothing
SMALL = {"slimming": ["model.width=4"], "acdc": UNIFORM, "lth": UNIFORM, "force": UNIFORM}


class Interrupt(Callback):
    """Ends training after the fifth epoch's checkpoint was written."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 5:
            raise RuntimeError("stopped here")


@pytest.mark.filterwarnings("ignore:.*kept no weight")  # global allocation, so early in training
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    def settings(folder: str, *more: str) -> Any:
        return config(tmp_path / folder, f"method={method}", *QUICK, *SMALL.get(method, []), *more)

    metrics = train(settings("whole"))
    assert metrics["method"] == method and metrics["at_target"]
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    check_masks(settings("whole"), tensors, metrics)

    with pytest.raises(RuntimeError, match="stopped here"):
        train(settings("cut", "+callbacks.stop._target_=test_methods.Interrupt"))
    assert not (tmp_path / "cut" / "metrics.json").exists()
    train(settings("cut", f"ckpt_path={tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}"))
    again = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    ends = [
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in ("whole", "cut")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    a, b = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "cut"))
    assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}


def check_masks(cfg: Any, tensors: dict[str, torch.Tensor], metrics: Any) -> None:
    """In the saved file: the pattern, and as many units with a weight left as the sparsity asks for."""
    net = instantiate(cfg.model, shape=(1, 8, 8), classes=10)
    net.load_state_dict(tensors, strict=True)
    structure = instantiate(cfg.structure)
    sparsity = instantiate(cfg.schedule).final if structure.fixed is None else structure.fixed
    groups = structure.groups(find(net, last=not structure.removes_outputs), net)
    total = sum(group.numel for group in groups)
    alive, coarsest = 0, 1
    for group in groups:
        units = torch.zeros(())
        for param, layout in group.members:
            units = units + structure.pool((layout.view(param.weight.detach()) != 0).double())
        size = group.numel // units.numel()
        coarsest = max(coarsest, size)
        alive += int((units > 0).sum()) * size
        if isinstance(structure, NM):
            assert int(units.sum(-1).max()) <= structure.n
    if metrics["sparsity_requested"] is None:  # what a method learns is what the file has
        assert total - alive == round(metrics["sparsity"] * total)
    elif sparsity == 0:
        assert alive > 0.998 * total
    elif isinstance(structure, (NM, Row, Unstructured)):
        # a kept weight may be zero too: what was grown last and has not been trained, or has no gradient
        assert 0 <= kept(sparsity, total) - alive <= 0.02 * kept(sparsity, total)
    else:
        assert abs(alive - kept(sparsity, total)) <= coarsest / 2


# Other precisions


class Small(LightningModule):
    """Convolutions with norms, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Save(Callback):
    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epoch:
            trainer.save_checkpoint(self.path)


def precisions() -> Any:
    """Each method in one of the two; the other is slow."""
    for (i, method), (j, precision) in product(enumerate(METHODS), enumerate(["bf16-true", "64-true"])):
        yield pytest.param(method, precision, marks=() if (i + j) % 2 == 0 else (pytest.mark.slow,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "precision"), list(precisions()))
def test_every_method_in_other_precisions(method: str, precision: Any, tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        f"method={method}",
        *["sparsity=0.5", "schedule.epochs=1"] * (method == "lth"),
        *UNIFORM * (method == "force"),
    )
    epochs = 4

    def fit(*extra: Callback, ckpt_path: Path | None = None) -> tuple[Small, Sparsity]:
        axes = ("scorer", "schedule", "structure", "allocation", "updater", "masking")
        sparsity = Sparsity(**{axis: instantiate(cfg[axis]) for axis in axes}, misfit="dense", report=False)
        others = [instantiate(cfg[group]) if cfg.get(group) else None for group in ("regularizer", "rewind")]
        callbacks = [callback for callback in (others[0], sparsity, others[1], RandomState(), *extra) if callback]
        schedule = sparsity.pruner.schedule
        trainer = quiet_trainer(
            max_epochs=schedule.training_epochs if isinstance(schedule, Tickets) else epochs,
            precision=precision,
            callbacks=callbacks,
            default_root_dir=tmp_path,
        )
        x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        module = Small() if precision == "bf16-true" else Small().double()  # Lightning loads weights before it converts
        trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(16) % 4), 4), ckpt_path=ckpt_path)
        return module, sparsity

    whole, sparsity = fit(Save(tmp_path / "half.ckpt", epochs // 2))
    again, _ = fit(ckpt_path=tmp_path / "half.ckpt")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert {weight.dtype for weight in whole.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    pruner = sparsity.pruner
    pruned = sum(int((param.weight == 0).sum()) for param in pruner.params)
    assert pruned >= pruner.numel - pruner.kept and pruner.at_target
