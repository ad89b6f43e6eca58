"""Distillation: against the formula by loops, beside the module, and in the application."""

import math
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Sparsity
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks import Distill, RandomState
from pl_sparse.callbacks.distill import distillation
from pl_sparse.schedule import OneShot


def divergence(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_divergence_against_loops(temperature: float) -> None:
    student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    found = distillation(student, teacher, temperature)
    assert found.item() == pytest.approx(divergence(student.tolist(), teacher.tolist(), temperature), rel=1e-5)
    tokens = distillation(student.view(2, 3, 4), teacher.view(2, 3, 4), temperature)
    assert tokens.item() == pytest.approx(found.item())
    found.backward()
    assert teacher.grad is None and student.grad is not None
    # the gradient of T^2 KL is T (q - p) / batch
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 6
    torch.testing.assert_close(student.grad, expected.detach())
    assert distillation(student.bfloat16(), teacher.bfloat16(), temperature).dtype == torch.float32


class Foreign(LightningModule):
    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 4))
        self.as_dict = as_dict
        self.steps: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return {"loss": loss} if self.as_dict else loss

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.steps.append(loss.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def loader() -> DataLoader[Any]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16, shuffle=False)


def trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, RandomState(), ModelCheckpoint(folder, "last", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_loss_of_any_module(tmp_path: Path, as_dict: bool) -> None:
    module, teacher = Foreign(as_dict), Foreign().net
    module.net[1].p = 0.0  # so that the formula can be recomputed
    batch = next(iter(loader()))
    cross_entropy = F.cross_entropy(module.net(batch[0]), batch[1])
    expected = 0.3 * cross_entropy.item() + 0.7 * divergence(
        module.net(batch[0]).tolist(), teacher.eval()(batch[0]).tolist(), 3.0
    )
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    callback = Distill(teacher, hardness=0.7, temperature=3.0)
    fit = trainer(tmp_path, 1, callback, Sparsity(schedule=OneShot(final=0.5, begin=0.5)))
    fit.fit(module, loader())
    assert module.steps[0] == pytest.approx(expected, rel=1e-5)
    assert not teacher.training and all(torch.equal(before[n], value) for n, value in teacher.state_dict().items())
    assert float(fit.callback_metrics["train/distillation"]) > 0

    # the teacher is not part of the module, and the module is as it was
    assert {name.partition(".")[0] for name in module.state_dict()} == {"net"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]) == 4
    assert len(Sparsity.of(fit).pruner.params) == 2
    assert "training_step" not in vars(module) and not module.net._forward_hooks


def test_a_share_of_zero_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [Distill(Foreign().net, hardness=0.0)]):
        seed_everything(1, verbose=False)
        module = Foreign()
        trainer(tmp_path, 2, *callbacks).fit(module, loader())
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    torch.save(Foreign().state_dict(), tmp_path / "teacher.ckpt")

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    def run(*more: Callback, resume: Path | None = None) -> Foreign:
        seed_everything(2, verbose=False)
        module = Foreign()
        callbacks = [Distill(tmp_path / "teacher.ckpt"), Sparsity(scorer="movement", sparsity=0.5, report=False)]
        trainer(tmp_path, 4, *callbacks, *more).fit(module, loader(), ckpt_path=resume, weights_only=True)
        return module

    whole = run()
    with pytest.warns(UserWarning, match="before the schedule reached"):
        run(Stop())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
    resumed = run(resume=tmp_path / "last.ckpt")
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in resumed.state_dict().items())


def test_bad_teachers(tmp_path: Path) -> None:
    for options in ({"hardness": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Distill(Foreign().net, **options)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        Distill(tmp_path / "nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        Distill(tmp_path)
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another model or other classes"):
        trainer(tmp_path, 1, Distill(tmp_path)).fit(Foreign(), loader())
    with pytest.raises(ValueError, match=r"shape \(16, 3\), the student's \(16, 4\)"):
        trainer(tmp_path, 1, Distill(nn.Linear(8, 3))).fit(Foreign(), loader())
    with pytest.raises(ValueError, match="one of: net"):
        trainer(tmp_path, 1, Distill(nn.Linear(8, 4), student="nett")).fit(Foreign(), loader())
    module = Foreign()
    module.spare = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="did not call 'spare'"):
        trainer(tmp_path, 1, Distill(nn.Linear(8, 4), student="spare")).fit(module, loader())
    assert "training_step" not in vars(module)


def config(folder: Path, *overrides: str) -> DictConfig:
    short = ["trainer.max_epochs=3", "trainer.enable_progress_bar=false", "data.limit=320"]
    with composition():
        return hydra.compose("train", [*short, f"output_dir={folder}", *overrides])


def test_a_run_teaches_another(tmp_path: Path) -> None:
    train(config(tmp_path / "dense", "method=dense"))
    teacher = [f"distill.teacher={tmp_path / 'dense'}", "distill=teacher"]
    metrics = train(config(tmp_path / "sparse", "method=gmp", *teacher))
    assert metrics["train/distillation"] > 0 and metrics["sparsity"] == 0.9
    assert (tmp_path / "sparse" / "model.safetensors").stat().st_size == pytest.approx(
        (tmp_path / "dense" / "model.safetensors").stat().st_size, rel=0.01
    )
    with pytest.raises(ConfigError, match="another model or other classes"):
        train(config(tmp_path / "other", *teacher, "model=lenet5"))
    with pytest.raises(ConfigError, match=r"distill: teacher=.* is not a file"):
        train(config(tmp_path / "missing", "distill=teacher", "distill.teacher=nowhere"))
