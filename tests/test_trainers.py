"""Sparsity beside what else a Trainer does: tuners, other batches, other modules, metrics by any name."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.app.checkpoints import is_plain
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.instantiate import make_module
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks.mac_count import sample_count
from pl_sparse.callbacks.monitored import MissingMetricError
from pl_sparse.network.dropout import without_dropout
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import OneShot

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Net(LightningModule):
    """A small classifier whose loaders are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        self.batch_size, self.lr = 16, 1e-3

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), 48)


def make_trainer(folder: Path, *callbacks: Callback, epochs: int = 2, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), **(quiet | options))


def make_net(kind: type[Net] = Net) -> Net:
    seed_everything(0, verbose=False)
    return kind()


def zeros(module: nn.Module, pruner: Pruner) -> float:
    """The fraction of the prunable weights that are zero, counted in the module."""
    weights = dict(module.named_parameters())
    return sum(int((weights[param.name] == 0).sum()) for param in pruner.params) / pruner.numel


def sparse(**options: Any) -> Sparsity:
    return Sparsity(**({"sparsity": 0.75, "schedule": "oneshot", "report": False} | options))


class EveryEpoch(LearningRateFinder):
    """Looks for a learning rate at the start of each epoch but the first."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self.lr_find(trainer, pl_module)


# Tuners


def finder() -> Callback:
    return LearningRateFinder(num_training_steps=12, update_attr=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_finder_of_the_learning_rate_leaves_no_trace(tmp_path: Path, first: bool, schedule: str) -> None:
    plain, alone = make_net(), sparse(schedule=schedule)
    make_trainer(tmp_path, alone).fit(plain)
    tuned, sparsity = make_net(), sparse(schedule=schedule)
    make_trainer(tmp_path, *((finder(), sparsity) if first else (sparsity, finder()))).fit(tuned)
    assert sparsity.pruner.step == alone.pruner.step == 12
    assert zeros(tuned, sparsity.pruner) == 0.75
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tuned.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_finder_of_the_batch_size_leaves_no_trace(tmp_path: Path) -> None:
    for first in (True, False):
        net, sparsity = make_net(), sparse()
        size = BatchSizeFinder(max_trials=1, steps_per_trial=2, init_val=8)
        make_trainer(tmp_path, *((size, sparsity) if first else (sparsity, size))).fit(net)
        assert sparsity.pruner.step == 2 * len(net.train_dataloader())
        assert zeros(net, sparsity.pruner) == 0.75


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_a_tuner_prunes_nothing_and_training_follows(tmp_path: Path, tune: str) -> None:
    net, sparsity = make_net(), sparse()
    trainer = make_trainer(tmp_path, sparsity)
    options: dict[str, Any] = {"num_training": 12} if tune == "lr_find" else {"max_trials": 1, "steps_per_trial": 2}
    getattr(Tuner(trainer), tune)(net, **options)
    assert not any(bool((weight == 0).any()) for weight in net.parameters() if weight.dim() > 1)
    trainer.fit(net)
    assert zeros(net, sparsity.pruner) == 0.75
    assert sparsity.pruner.step == 2 * len(net.train_dataloader())


@pytest.mark.filterwarnings("ignore")
def test_a_search_in_the_middle_of_training_keeps_masks(tmp_path: Path) -> None:
    net, sparsity = make_net(), sparse(masking="ste")
    make_trainer(tmp_path, sparsity, EveryEpoch(num_training_steps=6, update_attr=True), epochs=3).fit(net)
    assert zeros(net, sparsity.pruner) == 0.75


def test_a_checkpoint_saved_before_training_loads(tmp_path: Path) -> None:
    net, path = make_net(), tmp_path / "validated.ckpt"
    trainer = make_trainer(tmp_path, sparse())
    trainer.validate(net, verbose=False)
    trainer.save_checkpoint(path)
    other, sparsity = make_net(), sparse()
    make_trainer(tmp_path, sparsity).fit(other, ckpt_path=path, weights_only=True)
    assert zeros(other, sparsity.pruner) == 0.75
    attached = Pruner(sparsity=0.5)
    attached.attach(nn.Linear(4, 4))
    attached.load_state_dict(Pruner(sparsity=0.5).state_dict())  # saved before there were weights
    assert attached.numel == 16


# What is only nice to know


class Graph:
    """One object with tensors, as batches of graphs are."""

    def __init__(self, rows: list[Any]) -> None:
        self.x, self.y = (torch.stack(column) for column in zip(*rows, strict=True))

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return self


class GraphNet(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch.x), batch.y)

    def train_dataloader(self) -> Any:
        return DataLoader(list(zip(X, Y, strict=True)), 20, collate_fn=Graph)


class Detector(Net):
    """Takes tuples of images and tuples of boxes."""

    def training_step(self, batch: Any, index: int) -> Any:
        losses = [
            nn.functional.cross_entropy(self.net(image.flatten()[None]), boxes["labels"][:1])
            for image, boxes in zip(*batch, strict=True)
        ]
        return torch.stack(losses).mean()

    def train_dataloader(self) -> Any:
        rows = [(x.view(1, 2, 4), {"labels": y.repeat(2)}) for x, y in zip(X, Y, strict=True)]
        return DataLoader(rows, 8, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))


class Batches:
    """A loader that is not a DataLoader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class UnknownLoader(Detector):
    def train_dataloader(self) -> Any:
        return Batches(super().train_dataloader())


MACS = 8 * 32 + 32 * 3


@pytest.mark.parametrize(("kind", "dense"), [(Net, MACS), (GraphNet, MACS), (Detector, MACS), (UnknownLoader, 0)])
def test_macs_are_of_one_sample_or_left_out(tmp_path: Path, kind: type[Net], dense: int) -> None:
    sparsity = sparse()
    make_trainer(tmp_path, sparsity, epochs=1).fit(make_net(kind))
    assert sparsity.summary is not None and sparsity.summary.macs_dense == dense
    assert sparsity.sparsity == 0.75


def test_samples_of_a_batch() -> None:
    six = torch.zeros(6, 2)
    assert sample_count({"x": six, "y": six[:, 0], "temperature": torch.tensor(1.0)}) == 6
    assert sample_count([[six, six], six[:, 0], ["a name"] * 6]) == 6
    assert sample_count([six, six[:2]]) is None
    assert sample_count([six] * 5) is None  # five samples, or five inputs
    assert sample_count(object()) is None
    loader = DataLoader(TensorDataset(torch.zeros(10, 1)), 4)
    assert [sample_count(object(), loader, index) for index in range(4)] == [4, 4, 2, None]


def test_a_scripted_part_and_a_failing_count_end_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.net[1] = torch.jit.script(nn.ReLU())
    sparsity = sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        make_trainer(tmp_path, sparsity, epochs=1).fit(net)
    assert zeros(net, sparsity.pruner) == 0.75
    monkeypatch.setattr("pl_sparse.network.macs.MacCounter._add", lambda *args: 1 / 0)
    sparsity = sparse()
    with pytest.warns(UserWarning, match="the count of MACs is left out: ZeroDivisionError"):
        make_trainer(tmp_path, sparsity, epochs=1).fit(make_net())
    assert sparsity.sparsity == 0.75


def test_a_table_that_fails_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no terminal\nat all")

    monkeypatch.setattr("pl_sparse.callbacks.sparsity.summary_table", fail)
    with pytest.warns(UserWarning, match="the table of the layers is left out: OSError: no terminal$"):
        make_trainer(tmp_path, sparse(report=True), epochs=1).fit(make_net())


# pytorch_lightning


USER = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.early_stopping import EarlyStopping
from pytorch_lightning.utilities.types import STEP_OUTPUT

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 3))
"""


def test_one_name_space_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    code = """
import pl_sparse.app.command as command
command.run = lambda cfg, train: None
command._entry = command.unify
assert command.main()
import lightning.pytorch as pl
import user
import lightning.pytorch.callbacks.early_stopping as early_stopping
assert issubclass(user.Lit, pl.LightningModule) and user.EarlyStopping is early_stopping.EarlyStopping
assert early_stopping.__spec__.name == "lightning.pytorch.callbacks.early_stopping" and pl.__name__ == pl.__spec__.name
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_a_module_that_trains_itself_is_no_network() -> None:
    class Other(nn.Linear):
        def training_step(self, batch: Any) -> None: ...

    cfg = OmegaConf.create({"model": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pl_sparse.app.instantiate._built_with", lambda *args: Other(2, 2))
        with pytest.raises(ConfigError, match="has a training_step, but is not a LightningModule"):
            make_module(cfg, None)
        Other.__module__ = "pytorch_lightning.core"
        with pytest.raises(ConfigError, match="is a module of pytorch_lightning"):
            make_module(cfg, None)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_pytorch_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    body = {name: vars(Net)[name] for name in vars(Net) if name.endswith(("_step", "loader", "optimizers"))}
    kind: Any = type("Old", (pl.LightningModule,), body)
    net = kind()
    net.net, net.batch_size, net.lr = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), 16, 1e-3
    sparsity, best = sparse(schedule="cubic"), ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=1)
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[sparsity, best, EarlyStopping("val_acc", mode="max", patience=1)],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net)
    assert zeros(net, sparsity.pruner) == 0.75
    saved = torch.load(best.best_model_path, weights_only=True)
    assert float((saved["state_dict"]["net.0.weight"] == 0).float().mean()) > 0.5  # judged at the target alone


# Checkpoints of a run


def test_a_run_reads_its_own_pickled_checkpoints_alone(tmp_path: Path) -> None:
    own, plain = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "plain.ckpt"
    own.parent.mkdir(parents=True)
    torch.save({"hyper_parameters": {"net": nn.Linear(2, 2)}, "weight": torch.zeros(3)}, own)
    torch.save({"weight": torch.zeros(3), "rate": 0.1}, plain)
    assert is_plain(plain, tmp_path / "run")
    assert not is_plain(own, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"torch\.nn\.modules\.linear\.Linear"):
        is_plain(own, tmp_path / "another")


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train on digits for two epochs, by the application."""
    settings = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    with composition():
        cfg = hydra.compose("train", [*settings, f"output_dir={folder}", *overrides])
    return train(cfg)


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings for a module whose network and optimizer are hyperparameters."""
    (tmp_path / "template.py").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    return [
        "model._target_=template.Lit",
        "+model.net={_target_: torch.nn.Linear, in_features: 64, out_features: 10}",
        "+model.optimizer={_target_: torch.optim.Adam, _partial_: true, lr: 0.001}",
    ]


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
def test_hyperparameters_that_are_networks(tmp_path: Path, template: list[str]) -> None:
    first = run(tmp_path / "run", *template)
    assert first["epochs"] == 2 and first["sparsity"] == 0.9
    last = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    assert run(tmp_path / "run", *template, last, "trainer.max_epochs=3")["epochs"] == 3
    with pytest.raises(ConfigError, match="holds pickled objects"):
        run(tmp_path / "another", *template, last, "trainer.max_epochs=4")


TEMPLATE = """
import lightning.pytorch as pl
import torch

class Lit(pl.LightningModule):
    def __init__(self, net: torch.nn.Module, optimizer):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, index):
        self.log("val/acc", (self.net(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.hparams.optimizer(params=self.parameters())
"""


# Metrics by any name


@pytest.mark.parametrize("sanity_steps", [2, 0])
@pytest.mark.parametrize("judge", [ModelCheckpoint, EarlyStopping])
def test_a_metric_that_is_not_logged_is_named_as_soon_as_it_is_known(
    tmp_path: Path, judge: Any, sanity_steps: int
) -> None:
    late = sparse(schedule=OneShot(final=0.75, begin=0.9))
    options: dict[str, Any] = {"epochs": 4, "enable_checkpointing": judge is ModelCheckpoint}
    options["num_sanity_val_steps"] = sanity_steps
    trainer = make_trainer(tmp_path, late, judge(monitor="val/acc", mode="max"), **options)
    with pytest.raises(MissingMetricError, match=r"did you mean 'val_acc'\? There are"):
        trainer.fit(make_net())
    assert trainer.global_step == (0 if sanity_steps else 6)
    trainer = make_trainer(tmp_path, late, judge(monitor="val_acc", mode="max"), **options)
    trainer.fit(make_net())
    assert trainer.current_epoch == 4


class Guarded(Net):
    """Logs one of its metrics in training alone, and one not in the sanity check."""

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        if not self.trainer.sanity_checking:
            self.log("val/later", 1.0)

    def on_train_epoch_end(self) -> None:
        self.log("train/seen", 1.0)


class Neighbours(Net):
    """Logs a metric that is called one of validation when an epoch of training ends."""

    def on_train_epoch_end(self) -> None:
        self.log("val/knn", 1.0)


@pytest.mark.parametrize(("kind", "metric"), [(Guarded, "val/later"), (Guarded, "train/seen"), (Neighbours, "val/knn")])
def test_a_metric_that_the_sanity_check_cannot_know_is_waited_for(tmp_path: Path, kind: type[Net], metric: str) -> None:
    best = ModelCheckpoint(tmp_path, monitor=metric, save_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, sparse(), best, epochs=2, enable_checkpointing=True)
    trainer.fit(make_net(kind))
    assert trainer.current_epoch == 2 and best.best_model_score == 1.0


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
def test_a_run_shows_what_the_module_logs(
    tmp_path: Path, template: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "template.py"
    path.write_text(path.read_text().replace("val/acc", "valid_f1").replace("class Lit", "class Other"))
    template[0] = "model._target_=template.Other"
    sys.modules.pop("template", None)
    message = r"objective=val/acc: ModelCheckpoint monitors 'val/acc'.*There are .*valid_f1\n  objective=NAME chooses"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "wrong", *template)
    assert not (tmp_path / "wrong" / "status.json").exists()  # it was refused before training
    metrics = run(tmp_path / "right", *template, "objective=valid_f1")
    printed = capsys.readouterr().out
    assert f"valid_f1 {metrics['valid_f1']:.4f} (best at the target" in printed.replace("\n", " ")
    assert re.search(r"epoch 1/2  sparsity 0\.\d+  valid_f1 0\.\d+", printed)
    assert (tmp_path / "right" / "training.png").is_file()


# Calibration


class Passing(Net):
    """Its batches need both hooks of a transfer, and every other one has no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(32))
        self.net.append(nn.Dropout(0.9))
        self.norms_trained = True

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": 2 * batch["x"]}

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        if torch.equal(batch["x"][0], 2 * X[0].to(batch["x"])):
            return None
        self.norms_trained &= self.net[1].training
        out = nn.functional.dropout(self.net(batch["x"]), 0.5, self.training)
        return nn.functional.cross_entropy(out, batch["y"])


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("scorer", ["snip", "grasp", "wanda"])
def test_calibration_sees_what_training_sees(tmp_path: Path, scorer: str) -> None:
    def loss(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net.net[:-1](2 * batch[0]), batch[1])

    sparsity = sparse(scorer=scorer, calibration_batches=2)
    net = make_net(Passing)
    reference, plain = copy.deepcopy(net), Pruner(scorer, "oneshot", sparsity=0.75)
    make_trainer(tmp_path, sparsity, epochs=1, limit_val_batches=0).fit(net)
    net = reference
    plain.attach(net)
    batches = list(net.train_dataloader())[1:3]
    plain.prepare(12, probe=Probe(net, batches, loss))
    for mine, other in zip(sparsity.pruner.params, plain.params, strict=True):
        assert torch.equal(mine.mask, other.mask)


def test_dropout_is_off_wherever_it_stands() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    net = nn.ModuleList([nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True), layer, nn.Dropout(0.9), nn.BatchNorm1d(5)])
    x = torch.randn(3, 5, 8)

    def forward() -> Tensor:
        y: Tensor = net[3](net[2](net[1](net[0](x)[0])))
        y = nn.functional.scaled_dot_product_attention(y, y, y, None, 0.5)
        return nn.functional.dropout(y, 0.5)

    with without_dropout(net):
        assert net[3].training and torch.equal(forward(), forward())
    assert net[0].dropout == 0.5 and not torch.equal(forward(), forward())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("scorer", ["snip", "taylor", "movement"])
def test_other_precisions(tmp_path: Path, precision: Any, scorer: str) -> None:
    net, sparsity = make_net(), sparse(scorer=scorer, schedule="cubic")
    make_trainer(tmp_path, sparsity, precision=precision).fit(net)
    assert zeros(net, sparsity.pruner) == 0.75


# Several callbacks


def test_two_callbacks_share_no_weight(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two Sparsity callbacks prune net\.2\.weight"):
        make_trainer(tmp_path, sparse(), sparse(include=["net.2"])).fit(make_net())
    one, two = sparse(include=["net.0"]), sparse(include=["net.2"], sparsity=0.5)
    trainer = make_trainer(tmp_path, one, two)
    trainer.fit(make_net())
    assert trainer.callback_metrics["sparsity/net.0.weight"] == 0.75
    assert trainer.callback_metrics["sparsity/net.2.weight"] == 0.5
    assert "sparsity" not in trainer.callback_metrics
