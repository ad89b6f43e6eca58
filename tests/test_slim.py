"""A trained network made faster by one command, and by one function."""

import copy
import csv
import json
import shlex
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from test_app import config
from torch import nn

import pl_sparse
from pl_sparse.app import cli
from pl_sparse.app.instantiate import network
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.slim_command import _found, _parser, main
from pl_sparse.app.training import train
from pl_sparse.callbacks import CostTarget, Distill
from pl_sparse.export import load_shrunk
from pl_sparse.export.onnx import open_onnx
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits


def untrained() -> nn.Module:
    conv1, conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, stride=2)
    return nn.Sequential(conv1, nn.BatchNorm2d(32), nn.ReLU(), conv2, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))


def trained() -> nn.Module:
    """Named on the command line: a convolutional network that knows digits."""
    torch.manual_seed(0)
    module = Classifier(untrained(), 10)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    Trainer(max_epochs=2, accelerator="cpu", limit_val_batches=0, **quiet).fit(module, Digits())
    return module.net.eval()


def accuracy(net: Any) -> float:
    x, y = next(iter(Digits().val_dataloader()))
    return float((net(x).argmax(1) == y).float().mean())


def test_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "slim"
    arguments = ["slim", "test_slim:trained", "--data", "digits", "limit=600", "--speedup", "1.3", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *arguments, "--to", str(folder)])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/pl-sparse", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.MonkeyPatch.context() as patch:  # whether the machine is busy is not what is tested
        patch.setattr(CostTarget, "_faster", lambda self, a, b, x: parameters(a) / parameters(b))
        patch.setattr("pl_sparse.app.slim._SECONDS", 0.01)
        with suppress(SystemExit):  # where the file is slower than asked for
            cli.main()
    out, error = capsys.readouterr()
    assert (folder / "slim.json").is_file(), error
    summary = json.loads((folder / "slim.json").read_text())
    assert bool(summary["misses"]) == (summary["speedup"] < 1.3) == ("and 1.3x was asked for" in error)
    before, after = summary["before"], summary["after"]
    assert summary["metric"] == "val/acc" and summary["asked"] == 1.3
    assert before["val/acc"] == pytest.approx(accuracy(trained())) and before["val/acc"] > 0.8
    assert before["parameters"] == parameters(untrained()) and before["macs"] == 64 * 9 * 32 + 16 * 9 * 32 * 64 + 10_240
    # what is saved and exported is what was judged
    smaller = untrained()
    load_shrunk(smaller, folder / "shrunk")
    assert accuracy(smaller.eval()) == pytest.approx(after["val/acc"])
    assert accuracy(open_onnx(folder / "model.onnx")) == pytest.approx(after["val/acc"], abs=0.006)
    assert parameters(smaller) == after["parameters"] < before["parameters"] / 1.25
    assert summary["lost"] == pytest.approx(before["val/acc"] - after["val/acc"]) and summary["lost"] < 0.1
    assert summary["exports"]["onnx"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert f"{before['val/acc']:.4f}" in out and f"{summary['speedup']:.2f}x faster" in out
    assert (folder / "slim.png").stat().st_size > 5000
    page = (folder / "README.md").read_text()
    assert f"| parameters | {before['parameters']:,} | {after['parameters']:,} |" in page
    assert "pl-sparse slim test_slim:trained --data digits" in page and "| `3.weight` | 64 x 32 x 3 x 3 |" in page
    with (folder / "sensitivity.csv").open() as file:
        layers = {row["layer"] for row in csv.DictReader(file)}
    assert layers == {"0.weight", "3.weight"}


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_one_function_leaves_the_network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostTarget, "_faster", lambda self, a, b, x: parameters(a) / parameters(b))
    monkeypatch.setattr("pl_sparse.app.slim._SECONDS", 0.01)
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller, result = pl_sparse.slim(
        model, Digits(limit=300), 2.0, epochs=2, drop=0.0, folder=tmp_path, sensitive=False
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert 1.9 < parameters(model) / parameters(smaller) < 2.6 and parameters(smaller) == result.after["parameters"]
    assert accuracy(smaller) == pytest.approx(result.after["val/acc"])
    assert any("val/acc lost" in line for line in result.misses) == (result.lost > 0)
    with pytest.raises(ConfigError, match="already holds a slimmed network"):
        pl_sparse.slim(model, Digits(limit=300), folder=tmp_path)


class Rows(nn.Module):
    """A transformer over the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.encoder(self.embed(x[:, 0]))).mean(1))
        return out


def test_the_width_of_a_transformer_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostTarget, "_faster", lambda self, a, b, x: parameters(a) / parameters(b))
    monkeypatch.setattr("pl_sparse.app.slim._SECONDS", 0.01)
    torch.manual_seed(0)
    model, data = Rows(), Digits(limit=300)
    smaller, result = pl_sparse.slim(model, data, 1.8, epochs=2, folder=tmp_path, sensitive=False, through_norms=True)
    width = smaller.norm.normalized_shape[0]
    assert width < 32 and smaller.embed.out_features == smaller.head.in_features == width
    assert accuracy(smaller) == pytest.approx(result.after["val/acc"])
    assert accuracy(open_onnx(tmp_path / "model.onnx")) == pytest.approx(result.after["val/acc"], abs=0.006)
    again = Rows()
    load_shrunk(again, tmp_path / "shrunk")
    assert torch.equal(again.embed.weight, smaller.embed.weight)


class Own(LightningModule):
    """A module with a loss of its own, whose logits are those of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.model = trained()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(x)
        return out

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_a_module_imitates_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostTarget, "_faster", lambda self, a, b, x: parameters(a) / parameters(b))
    monkeypatch.setattr("pl_sparse.app.slim._SECONDS", 0.01)
    teachers, start = [], Distill.on_fit_start

    def started(self: Distill, trainer: Trainer, module: LightningModule) -> None:
        start(self, trainer, module)
        teachers.append((self.student, copy.deepcopy(self._net)))

    monkeypatch.setattr(Distill, "on_fit_start", started)
    module = Own()
    options: dict[str, Any] = {"epochs": 2, "sensitive": False}
    smaller, _ = pl_sparse.slim(module, Digits(limit=300), 1.5, folder=tmp_path / "a", student="model", **options)
    ((student, teacher),) = teachers
    assert student == "model" and parameters(smaller) < parameters(module)
    same = zip(teacher.parameters(), module.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    with pytest.raises(ConfigError, match="student='net' is not part of Own: give one of model"):
        pl_sparse.slim(module, Digits(limit=300), 1.5, folder=tmp_path / "b", student="net", **options)
    with pytest.raises(ConfigError, match="a classifier imitates its outputs; leave it out"):
        pl_sparse.slim(trained(), Digits(limit=300), 1.5, folder=tmp_path / "b", student="0", **options)


class Steps(Own):
    """Trains by its steps alone."""

    forward = LightningModule.forward


def test_a_module_without_a_forward_is_refused_with_what_to_write(tmp_path: Path) -> None:
    written = r"Steps has no forward, .* def forward\(self, x\): return self\.model\(x\)"
    with pytest.raises(ConfigError, match=written):
        pl_sparse.slim(Steps(), Digits(limit=64), folder=tmp_path / "slim")
    assert not (tmp_path / "slim").exists()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    sparsity = pl_sparse.Sparsity(structure="coupled", sparsity=0.5, report=False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[sparsity], default_root_dir=tmp_path, **quiet)
    with pytest.raises(ValueError, match=written):
        trainer.fit(Steps(), Digits(limit=64))
    assert trainer.global_step == 0


def test_what_layers_lose_decides_where_channels_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostTarget, "_faster", lambda self, a, b, x: parameters(a) / parameters(b))
    monkeypatch.setattr("pl_sparse.app.slim._SECONDS", 0.01)

    def losing(layer: str) -> list[int]:
        def measured(module: Any, data: Any, structure: Any, levels: Any, batches: Any, metric: str, to: Path) -> None:
            rows = [f"{name},0.5,{0.2 * (name == layer)}" for name in ("0.weight", "3.weight")]
            (to / "sensitivity.csv").write_text("\n".join(["layer,sparsity,drop", *rows]))

        monkeypatch.setattr("pl_sparse.app.slim.sensitivity", measured)
        smaller, _ = pl_sparse.slim(trained(), Digits(limit=128), 2.0, epochs=2, folder=tmp_path / layer)
        return [layer.out_channels for layer in smaller.modules() if isinstance(layer, nn.Conv2d)]

    first, last = losing("0.weight"), losing("3.weight")
    assert first[0] > last[0] and last[1] >= first[1]


@pytest.mark.slow
def test_integers_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pl_sparse.app.slim._SECONDS", 0.1)
    # the time of so small a network hardly depends on its channels, which is refused elsewhere
    monkeypatch.setattr("pl_sparse.callbacks.cost_target._SPARED", float("inf"))
    _, result = pl_sparse.slim(trained(), Digits(), 1.1, int8=True, epochs=3, folder=tmp_path, sensitive=False)
    costs = result.exports
    assert set(costs) == {"onnx", "onnx_int8"} and costs["onnx_int8"]["bytes"] < 0.6 * costs["onnx"]["bytes"]
    assert costs["onnx_int8"]["test/acc_exported"] == pytest.approx(costs["onnx"]["test/acc_exported"], abs=0.03)


def found(**options: Any) -> tuple[nn.Module, Any]:
    return _found(Namespace(**{"data": None, "weights": None, "seed": 0, "trust": False, **options}))


def test_runs_and_their_checkpoints_are_found(tmp_path: Path) -> None:
    train(config(tmp_path, "method=dense", "model=lenet5", "data.limit=64", "trainer.max_epochs=1"))
    module, data = found(model=str(tmp_path))
    assert isinstance(data, Digits) and data.limit == 64
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in network(module).state_dict().items())  # type: ignore[arg-type]
    last = tmp_path / "checkpoints" / "last.ckpt"
    module, data = found(model=str(last), data=["digits", "limit=32"])
    weights = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items()) and data.limit == 32


def test_networks_of_timm_are_found(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    made, _ = found(model="resnet10t", data=["digits"], weights=str(tmp_path / "w.pth"))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in made.state_dict().items())
    with pytest.raises(ConfigError, match="Did you mean 'resnet10t'"):
        found(model="resnet10", data=["digits"])


def test_the_commands_of_the_page_are_read() -> None:
    page = (Path(__file__).parent.parent / "docs" / "slim.md").read_text()
    commands = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("pl-sparse slim ")]
    assert len(commands) > 3
    for words in commands:
        options = _parser(None).parse_args(words[2:])
        assert options.model and options.speedup > 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere/run/here", "--data", "digits"], "nowhere/run/here is not a folder, checkpoint"),
        (["gone.ckpt"], "gone.ckpt is not a file"),
        (["test_slim:missing", "--data", "digits"], "test_slim has no missing"),
        (["test_slim:untrained", "--data", "gone:Data"], "there is no module 'gone' in"),
        (["test_slim:untrained", "--data", "digit"], "Did you mean 'digits'"),
        (["test_slim:untrained", "--data", "image_folder"], "needs root: give --data image_folder root=..."),
        (["test_slim:untrained", "--data", "digits", "limit"], "its settings are KEY=VALUE"),
        (["test_slim:untrained", "--data", "digits", "limit=0"], "limit=0 must be at least 1"),
        (["test_slim:untrained", "--data", "digits", "--speedup", "1"], "speedup=1.0 must be above 1"),
        (["test_slim:untrained", "--data", "digits", "--drop", "-1"], "drop=-1 must not be negative"),
        (["test_slim:untrained", "--data", "digits", "--epochs", "1"], "epochs=1 must be 2 or more"),
        (["test_slim:untrained", "--data", "mnist1d"], "does not take inputs of shape"),
        (["test_slim:untrained", "--data", "digits", "--weights", "w.pt"], "has weights of its own"),
        (["test_slim:untrained"], "there is no data with `classes`"),
        (["."], "neither a finished run"),
    ],
)
def test_what_cannot_be_slimmed_is_a_line_before_training(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--to", str(tmp_path / "slim")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error and len(error.splitlines()) <= 2
    assert not (tmp_path / "slim").exists()
