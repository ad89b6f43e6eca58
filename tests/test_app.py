"""`python train.py`, from the command line to the files it leaves."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pl_sparse.app.export_command import export
from pl_sparse.app.finished import load_run
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.instantiate import make_module
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.export import load_shrunk
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

ROOT = Path(__file__).parent.parent
SHORT = ["trainer.max_epochs=4", "trainer.enable_progress_bar=false", "data.limit=320"]


def config(folder: Path, *overrides: str) -> DictConfig:
    with composition():
        cfg = hydra.compose("train", [*SHORT, f"output_dir={folder}", *overrides])
    return cfg


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def test_a_run_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train(config(tmp_path, "sparsity=0.9"))
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "checkpoints", "config.yaml", "history.csv", "layers.csv", "layers.png", "metrics.json", "model.safetensors",
        "status.json", "training.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    keys = (
        "method scorer schedule structure seed sparsity sparsity_model params_total params_prunable params_nonzero "
        "macs_dense macs_sparse val/acc test/acc test/loss size_bytes train_seconds epochs device"
    )
    assert set(keys.split()) <= set(metrics)
    assert metrics["method"] == "magnitude" and metrics["device"] == "cpu" and metrics["epochs"] == 4
    assert metrics["sparsity"] == 0.9 and metrics["params_nonzero"] == 5_020 + 410 and metrics["macs_sparse"] == 5_020

    # the file holds the sparse weights under the model's own names, and they are what was tested
    tensors = load_file(tmp_path / "model.safetensors")
    net = lenet300(shape=(1, 8, 8), classes=10)
    net.load_state_dict(tensors, strict=True)
    zeros = sum(int((t == 0).sum()) for name, t in tensors.items() if name.endswith("weight"))
    assert zeros == 50_200 - 5_020
    test = Digits().test_dataloader()
    assert float((net(test.x).argmax(1) == test.y).float().mean()) == pytest.approx(metrics["test/acc"])

    with open(tmp_path / "layers.csv") as file:
        layers = list(csv.DictReader(file))
    assert [row["name"] for row in layers] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert sum(int(row["kept"]) for row in layers) == 5_020
    with open(tmp_path / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in history] == [1, 2, 3, 4] and float(history[-1]["sparsity"]) == 0.9
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "seconds"} <= set(history[0])
    told = capsys.readouterr().out
    assert "epoch 4/4" in told and "actual 90.00%" in told and "training.png" in told


def test_masked_channels_leave_the_model_of_each_level(tmp_path: Path) -> None:
    options = "structure=coupled", "allocation=uniform", "schedule=staircase", "levels=[0.3,0.5]", "front=true"
    metrics = train(config(tmp_path, *options, "shrink_every=1"))
    levels = json.loads((tmp_path / "front.json").read_text())
    test, lefts = Digits().test_dataloader(), []
    for folder, row in [*zip(sorted((tmp_path / "levels").iterdir()), levels, strict=True), (tmp_path, metrics)]:
        net = lenet300(shape=(1, 8, 8), classes=10)
        load_shrunk(net, folder)
        assert float((net(test.x).argmax(1) == test.y).float().mean()) == pytest.approx(row["test/acc"])
        lefts.append(sum(p.numel() for p in net.parameters()))
        assert lefts[-1] == row["params_left"] == row["params_nonzero"] < row["params_total"]
        assert row["sparsity"] == pytest.approx(row["sparsity_requested"], abs=0.01)
    assert lefts[0] > lefts[1] == lefts[2]


def test_checkpoints_load_strictly_without_the_callback(tmp_path: Path) -> None:
    metrics = train(config(tmp_path, "scorer=movement", "structure=nm24"))
    for name in ("best", "last"):
        saved = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)
        module = Classifier(lenet300(shape=(1, 8, 8), classes=10), 10)
        module.load_state_dict(saved["state_dict"], strict=True)
        for layer in ("fc1", "fc2", "fc3"):
            weight = module.net.get_submodule(layer).weight  # type: ignore[operator]
            assert int((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1).max()) <= 2  # type: ignore[union-attr,operator]
    assert metrics["sparsity"] == 0.5 and metrics["structure"] == "2:4"
    test = Digits().test_dataloader()
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(best)
    assert float((module(test.x).argmax(1) == test.y).float().mean()) == pytest.approx(metrics["test/acc"])


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    a, b, c = (train(config(tmp_path / str(i), f"seed={seed}")) for i, seed in enumerate((1, 1, 2)))
    one, two, other = (load_file(tmp_path / str(i) / "model.safetensors") for i in range(3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])
    assert a["test/loss"] == b["test/loss"] != c["test/loss"]


def test_exports_and_what_they_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train(config(tmp_path, "export=[onnx,csr]", "export_measure=true"))
    assert {"model.onnx", "model_csr.safetensors", "bench.json", "bench.csv", "bench.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert metrics["test/acc_exported"] == pytest.approx(metrics["test/acc"])
    assert metrics["latency_ms"] > 0 and metrics["latency_dense_ms"] > 0
    assert metrics["size_bytes"]["exported"] == (tmp_path / "model.onnx").stat().st_size
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert {(row["format"], row["batch"]) for row in bench["rows"]} == {
        (f, b) for f in ("onnx", "csr") for b in (1, 32)
    }
    assert "against dense in the same runtime" in capsys.readouterr().out

    # the finished run once more, from its folder
    export([str(tmp_path), "--to", "safetensors"])
    assert json.loads((tmp_path / "metrics.json").read_text())["size_bytes"]["exported"] < 50_000
    with pytest.raises(SystemExit):
        export([str(tmp_path), "--to", "onxx"])
    assert "Did you mean 'onnx'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export([str(tmp_path / "nowhere")])
    assert "not a folder of a finished run" in capsys.readouterr().err
    module, _, _ = load_run(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(module.net.state_dict()[name], value) for name, value in saved.items())  # type: ignore[operator,union-attr]


COUPLED = [
    "model=resnet20", "model.width=4", "structure=coupled", "allocation=uniform", "sparsity=0.5", "schedule.every=10",
]  # fmt: skip


def plain(data: Any) -> LightningModule:
    cfg = config(Path(), *COUPLED)
    OmegaConf.set_struct(cfg, False)
    return make_module(cfg, data)[0]


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_masked_channels_leave_exported_files(tmp_path: Path, quantization: str) -> None:
    name = "onnx" if quantization == "none" else "onnx_int8"
    options = [*COUPLED, f"quantization={quantization}", f"export={name}", "export_measure=true", "hardware=cpu"]
    metrics = train(config(tmp_path, *options))
    assert metrics["test/acc_exported"] == pytest.approx(metrics["test/acc"], abs=0.005)
    module, data, _ = load_run(tmp_path)
    whole, small = module.net, plain(data).net  # type: ignore[union-attr]
    load_shrunk(small, tmp_path / "shrunk")  # type: ignore[arg-type]
    x = Digits().test_dataloader().x[:50]
    assert torch.allclose(small.eval()(x), whole(x), atol=1e-4)  # type: ignore[operator,union-attr]
    stages = small.get_submodule("stage3")  # type: ignore[union-attr]
    assert {block.conv2.out_channels for block in stages} == {8} and stages[0].conv1.out_channels % 4 == 0  # type: ignore[union-attr]
    size = sum(weight.numel() for weight in small.parameters())  # type: ignore[union-attr]
    written = (tmp_path / ("model.onnx" if name == "onnx" else "model_int8.onnx")).read_bytes()
    onnx = pytest.importorskip("onnx")
    found = sum(math.prod(tensor.dims) for tensor in onnx.load_from_string(written).graph.initializer)
    assert size * 0.9 < found < size * 1.3 < 0.6 * sum(weight.numel() for weight in whole.parameters())  # type: ignore[union-attr]


def test_a_run_that_was_shrunk_in_training_is_exported_and_measured_against_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path, *COUPLED, "shrink_every=1"))
    module, _, _ = load_run(tmp_path)
    full = plain(Digits())
    few, many = (sum(weight.numel() for weight in net.parameters()) for net in (module, full))
    assert few < 0.5 * many
    capsys.readouterr()
    export([str(tmp_path), "--to", "safetensors"])
    size = (tmp_path / "model.safetensors.zst").stat().st_size
    (told,) = re.findall(r"\((\d+\.\d)x smaller than dense\)", capsys.readouterr().out)
    assert float(told) == pytest.approx(4 * many / size, rel=0.1)  # against `few` it would be half of that


def test_a_run_has_its_metrics_once_it_has_its_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "config.yaml").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("pl_sparse.app.training.deploy", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, "export=[csr]", "trainer.max_epochs=1"))
    assert not (tmp_path / "metrics.json").exists()  # resume=true takes those for a finished run


class Own(LightningModule):
    """A module with its own loss, data and optimizer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("error", F.cross_entropy(self.body(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_any_lightning_module(tmp_path: Path) -> None:
    cfg = config(tmp_path, "model._target_=test_app.Own", "+model.width=16", "objective=error", "mode=min")
    metrics = train(cfg)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["body.1.weight"].shape == (16, 64) and metrics["sparsity"] == pytest.approx(0.9, abs=0.0005)
    assert "test/acc" not in metrics and metrics["epoch_best"] == 4


def test_dense_is_dense_whatever_the_dial_says(tmp_path: Path) -> None:
    metrics = train(config(tmp_path, "method=dense", "sparsity=0.9"))
    assert metrics["sparsity"] == 0 and metrics["method"] == "dense" and metrics["sparsity_requested"] == 0


def test_loggers_get_the_curves(tmp_path: Path) -> None:
    train(config(tmp_path, "logger=csv"))
    head = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"sparsity", "train/loss", "val/acc"} <= set(head)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity=1.5"], r"sparsity=1.5 must be in \[0, 1\]"),
        (["sparsity=much"], "sparsity='much' has a wrong type: input should be a valid number"),
        (["sparsity='0.5'"], "sparsity='0.5' has a wrong type"),
        (["schedule.begin=[1]"], r"schedule.begin=\[1\] has a wrong type"),
        (["optimizer.lr=fast"], "optimizer.lr='fast' has a wrong type"),
        (["+scorer.power=2"], "scorer.power is not a parameter of pl_sparse.scorer.Magnitude. It has none"),
        (["+model.widht=2", "model=resnet20"], "Did you mean 'width'"),
        (["structure=nm24", "structure.n=5"], "0 < n <= m"),
        (["structure=nm24", "model=resnet20"], "input dimension 1 is not divisible by m=4"),
        (["hardware=ampere"], r"cannot use zeros of structure=unstructured.*structure=nm24"),
        (["exclude=[fc9]"], "Did you mean 'fc3'"),
        (["schedule.begin=0.9"], "ends before it begins"),
        (["schedule.end=400 steps", "lr_schedule=constant"], "only 20 optimizer steps"),
        (["scorer=movement", "masking=hard"], "use masking=frozen"),
        (["model._target_=pl_sparse.tasks.models.lenet30"], "Did you mean 'lenet300'"),
        (["model._target_=nowhere.Net"], "cannot be found"),
        (["data=mnist1d", "model=lenet5"], "needs images"),
        (["data=image_folder"], "data.root is missing"),
        (["trainer.devices=0"], "trainer: "),
        (["ckpt_path=nowhere.ckpt"], "is not a file"),
        (["mode=maximum"], "mode='maximum'"),
        (["export=semi_structured"], "export=semi_structured: sparse tensor cores know 2:4 alone"),
        (["hardware=mcu", "structure=channel"], "hardware=mcu does not compute with float32.*quantization=int8"),
        (["quantization=int4_weight", "export=onnx_int8"], "trains 4-bit ones"),
        (["hardware.budget_ms=2"], "hardware.budget_ms needs allocation=budget structure=coupled"),
        (["hardware.macs=-1"], "macs=-1 must be above 0"),
        (["quantization=int8", "quantization.begin=1.0"], "begin must be before the end of training"),
        (["quantization=int4_weight", "quantization.quantization.group=48"], "no linear layer has a multiple of"),
        (
            ["front=true", "schedule=staircase", "levels=[0.5,0.9]", "quantization=int8"],
            "front=true needs quantization=none",
        ),
        (["front=true", "target=accuracy_drop"], "front=true needs target=none"),
    ],
)
def test_what_cannot_run_is_refused_before_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path, *overrides))
    assert not tmp_path.joinpath("history.csv").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "a"))
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    with pytest.raises(ConfigError, match="another model"):
        train(config(tmp_path / "a", f"ckpt_path={last}", "model=lenet5", "resume_with=changed"))
    assert last.read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        pytest.param("scorer=movment", "there is no such scorer. Did you mean 'movement'", marks=pytest.mark.slow),
        ("method=gmpp", "there is no such method. Did you mean 'gmp'"),
        ("sparsty=0.5", "sparsty is not a setting. Did you mean 'sparsity'"),
        pytest.param("structure.m=4", "structure.m is not a setting", marks=pytest.mark.slow),
        ("export=[onnx,csrr]", "there is no such export. Did you mean 'csr'"),
    ],
)
def test_misspelt_arguments_are_told_in_one_line(tmp_path: Path, argument: str, message: str) -> None:
    done = subprocess.run(command(argument), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["scorer=movement"], marks=pytest.mark.slow),  # test_methods resumes it too
        pytest.param(["masking=ste", "model=vit_tiny", "model.dropout=0.1"], marks=pytest.mark.slow),
        pytest.param(["target=accuracy_drop", "target.warmup=0.1"], marks=pytest.mark.slow),
        pytest.param(["quantization=int8", "quantization.begin=0.2", "model=lenet5"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, options: list[str]) -> None:
    arguments = [*options, "trainer.max_epochs=12", "hydra.run.dir=whole"]
    subprocess.run(command(*arguments), cwd=tmp_path, check=True, capture_output=True)

    process = subprocess.Popen(
        command(*options, "trainer.max_epochs=12", "hydra.run.dir=killed"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        next(line for line in lines if line.startswith("epoch 5/"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()

    # no other argument: the settings of that run are taken over, and its folder
    subprocess.run(command("ckpt_path=killed/checkpoints/last.ckpt"), cwd=tmp_path, check=True, capture_output=True)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))
    assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}
    assert not (tmp_path / "outputs").exists()


def test_processes_hold_the_same_masks(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    for scorer, masking in (("random", "hard"), ("taylor", "ste")):
        script.write_text(TWO.format(tests=str(Path(__file__).parent), scorer=scorer, masking=masking))
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.count("same 0.8") == 2, done.stdout + done.stderr


TWO = """
import sys
sys.path.insert(0, {tests!r})
import torch
from lightning.pytorch import Trainer
from pl_sparse import Sparsity
from pl_sparse.schedule import Linear
from pl_sparse.tasks.data import Digits
from test_app import Own
callback = Sparsity(scorer={scorer!r}, schedule=Linear(final=0.8, every=2), masking={masking!r}, report=False)
trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[callback],
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
module = Own()
trainer.fit(module, datamodule=Digits(limit=320))
for param in callback.pruner.params:
    for tensor in (param.mask.float(), param.weight.detach(), param.values):
        gathered = [torch.empty_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(gathered, tensor.contiguous())
        assert torch.equal(*gathered), param.name
sys.stdout.write(f"same {{callback.sparsity:.1f}}\\n")
torch.distributed.destroy_process_group()
"""


def test_a_list_of_settings_is_open(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with open_dict(cfg):
        del cfg["exclude"]
    with pytest.raises(ConfigError, match="has no 'exclude'"):
        train(cfg)
