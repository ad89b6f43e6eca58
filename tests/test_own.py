"""A model, data and a folder of one's own."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import OmegaConf
from test_bad_inputs import FOREIGN
from torch import nn
from torch.utils.data import DataLoader

from pl_sparse.app import cli, evaluate
from pl_sparse.core.optional import library
from pl_sparse.export import ONNXInt8, OpenVINOInt8, from_pretrained
from pl_sparse.quantize import Int4Weight, Int8
from pl_sparse.results.direction import direction
from pl_sparse.structure import Unstructured
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits, HuggingFace, Torchvision
from pl_sparse.tasks.pretrained import huggingface, timm_model

ROOT = Path(__file__).parent.parent
SHORT = ["trainer.max_epochs=2", "trainer.enable_progress_bar=false"]
VALIDATED = """

class Own(Net):
    def validation_step(self, batch, index):
        self.log("val/loss", self.body(batch[0]).square().mean())



class Whole(Data):
    val_dataloader = Data.train_dataloader


class Broken(Own):
    def training_step(self, batch, index):
        return helper(batch)


def helper(batch):
    return batch["nothing"]
"""
OWN = ["model._target_=mine.Own", "data._target_=mine.Whole", "objective=val/loss", *SHORT]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FOREIGN + VALIDATED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_module_of_the_page_trains_by_the_commands_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/own.md has `mymod.py` whole; other pages use it."""
    page = (ROOT / "docs" / "own.md").read_text()
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class Data(" in block)
    (tmp_path / "mymod.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymod", raising=False)
    pages = (
        ROOT / "docs" / name
        for name in ("own.md", "start/five_minutes.md", "howto/smaller_onnx.md", "migrate/sparseml.md")
    )
    lines = [re.findall(r"^    (pl-sparse train model._target_=mymod.*)$", path.read_text(), re.M) for path in pages]
    assert [len(found) for found in lines] == [1, 1, 1, 1]
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = (ROOT / "docs" / "migrate" / "sparseml.md").read_text()
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe.split("```yaml\n")[1].split("```")[0])
    for number, (line,) in enumerate(lines):
        words = [word for word in shlex.split(line)[1:] if word != "export_measure=true"]
        words += [*SHORT, f"hydra.run.dir=run{number}", *(["trainer.max_epochs=4"] if "--config-dir" in words else [])]
        assert called(monkeypatch, *words) == 0, capsys.readouterr().err
        assert json.loads((tmp_path / f"run{number}" / "metrics.json").read_text())["sparsity"] > 0.4
    assert (tmp_path / "run2" / "model.onnx").is_file()


def test_a_module_and_data_of_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, *OWN, "model.hidden=6", "hydra.run.dir='a[/b]c d'", "seed=1") == 0
    cfg = OmegaConf.load(folder / "a[/b]c d" / "config.yaml")
    assert cfg.model == {"_target_": "mine.Own", "hidden": 6} and cfg.mode == "min"  # of the metric's name
    assert cfg.data == {"_target_": "mine.Whole", "batch_size": 64}  # seed and limit of data=digits are not its own
    assert not {"optimizer", "lr_schedule", "label_smoothing"} & set(cfg)  # the module reads none of them
    assert json.loads((folder / "a[/b]c d" / "metrics.json").read_text())["epoch_best"] is not None


def test_groups_of_a_folder_of_one_s_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, target in (("model", "mine.Own"), ("data", "mine.Whole")):
        (folder / "groups" / group).mkdir(parents=True)
        (folder / "groups" / group / "mine.yaml").write_text(f"_target_: {target}\n")
    chosen = ["model=mine", "data=mine", "model.hidden=5", "objective=val/loss", "+rate=0.3", *SHORT]
    ways = (["--config-dir", "groups"], ["hydra.searchpath=[file://groups]"])
    for number, way in enumerate(ways):
        arguments = ["train", *chosen[:2], *way, *chosen[2:], f"hydra.run.dir={number}", "model.lr=${rate}"]
        assert called(monkeypatch, *arguments) == 0
        assert OmegaConf.load(folder / str(number) / "config.yaml").model.lr == 0.3
    assert called(monkeypatch, "ckpt_path=0/checkpoints/last.ckpt", "trainer.max_epochs=3") == 0  # finds its groups


def test_a_configuration_of_one_s_own_over_that_of_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "groups" / "data").mkdir(parents=True)
    (folder / "groups" / "own.yaml").write_text("defaults:\n  - train\n  - _self_\nseed: 3\n")
    (folder / "groups" / "data" / "mine.yaml").write_text("_target_: mine.Whole\n")
    own = ["train", "--config-dir", "groups", "--config-name", "own", "data=mine"]
    assert called(monkeypatch, *own, "--cfg", "job") == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg.seed == 3 and cfg.sparsity == 0.9 and cfg.data._target_ == "mine.Whole"
    assert called(monkeypatch, *own, "sparsty=0.5") == 2
    assert "Did you mean 'sparsity'" in capsys.readouterr().err


def test_the_user_s_own_error_keeps_its_own_frames(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [argument.replace("mine.Own", "mine.Broken") for argument in OWN]
    assert called(monkeypatch, *broken) == 1
    told = capsys.readouterr().err
    assert "in training_step" in told and "in helper" in told and told.count("File ") == 2
    assert told.rstrip().endswith("TypeError: list indices must be integers or slices, not str")
    assert called(monkeypatch, *(argument for argument in broken if not argument.startswith("data."))) == 1
    assert "the data is data=digits, the default; data._target_=" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert called(monkeypatch, *broken) == 1
    assert "lightning/pytorch" in capsys.readouterr().err
    assert called(monkeypatch, "seed=-1") == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "error: seed=-1" in told and os.environ["HYDRA_FULL_ERROR"] == "1"


def test_settings_as_a_tree(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, *OWN, "print_config=true", "hydra.run.dir=run") == 0
    told = capsys.readouterr().out
    assert "├── sparsity: 0.9" in told and "├── model\n" in told and "└── hidden: 8" not in told
    assert "_target_: mine.Own" in told and told.index("_target_: mine.Own") < told.index("epoch 1/2")


def test_options_in_any_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *OWN, "seed=1,2", "-m", "model.hidden=3", "hydra.sweep.dir=sweep"]
    assert called(monkeypatch, *arguments) == 0
    runs = [OmegaConf.load(folder / "sweep" / str(number) / "config.yaml") for number in range(2)]
    assert [run.seed for run in runs] == [1, 2] and {run.model.hidden for run in runs} == {3}
    assert "no overview: none of the 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["debug", "overfit", "profile"])
def test_trainers_to_look_for_faults(folder: Path, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["trainer.max_epochs=1", "data.batch_size=16", "trainer.enable_progress_bar=false"]
    assert called(monkeypatch, f"trainer={trainer}", *short, "hydra.run.dir=run") == 0
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["steps"] == {"debug": 10, "overfit": 3, "profile": 79}[trainer]
    assert (folder / "run" / "profile" / "fit-profile.txt").is_file() == (trainer == "profile")


def test_a_finished_run_is_tested_and_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *SHORT, "data.limit=320", "hydra.run.dir=run") == 0
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert called(monkeypatch, "test", "run") == 0
    assert f"{metrics['test/acc']:.4f}" in capsys.readouterr().out
    sizes: list[int] = []
    tests = Classifier.test_step
    monkeypatch.setattr(
        Classifier, "test_step", lambda self, batch, index: [sizes.append(len(batch[0])), tests(self, batch, index)][1]
    )
    assert called(monkeypatch, "test", "run", "--batch-size", "100") == 0
    assert sizes == [100, 100, 100, 60] and f"{metrics['test/acc']:.4f}" in capsys.readouterr().out
    assert called(monkeypatch, "predict", "run", "--to", "all.npy", "--batch-size", "100") == 0
    assert np.load("all.npy").shape == (360, 10)
    x = Digits().test_dataloader().x
    np.save("some.npy", x[:7].flatten(1).numpy())
    assert called(monkeypatch, "predict", "run", "--data", "some.npy") == 0
    rows = (folder / "run" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 8 and rows[0].startswith("sample,class,output_0")
    assert [int(row.split(",")[1]) for row in rows[1:]] == np.load("all.npy")[:7].argmax(1).tolist()


class Saved(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def test_dataloader(self) -> Any:
        return DataLoader(torch.ones(8), self.hparams["batch_size"])


class Kept(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.loader = 4, DataLoader(torch.ones(8), 4)

    def test_dataloader(self) -> Any:
        return self.loader


class Fixed(LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader(torch.ones(8), 4)


class Seen(LightningModule):
    def test_step(self, batch: Any, index: int) -> None:
        self.log("test/size", float(len(batch)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_size_of_batches_acts_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: list[type[LightningDataModule]] = [Saved, Kept, Fixed]
    told = []
    for kind in kinds:
        monkeypatch.setattr(evaluate, "load_run", lambda run, trust, kind=kind: (Seen(), kind(), None))
        code = called(monkeypatch, "test", "run", "--batch-size", "2")
        printed = capsys.readouterr()
        told.append((code, printed.err or printed.out))
    assert told[0][0] == 0 and "2.0000" in told[0][1]
    assert told[1] == (2, "error: --batch-size: the test data of run have batches of 4 that cannot be changed\n")
    assert told[2] == (2, "error: --batch-size: Fixed of run has no batch_size that could be set\n")


@pytest.mark.docs
def test_a_project_of_one_s_own(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def shell(*command: str, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    assert shell("-m", "pl_sparse", "init", "project").returncode == 0
    again = shell("-m", "pl_sparse", "init", "project")
    assert again.returncode == 2 and "project is not empty" in again.stderr
    project = tmp_path / "project"
    assert (project / ".gitignore").is_file() and (project / "configs" / "experiment" / "first.yaml").is_file()

    one = shell("train.py", "experiment=first", "hydra.run.dir=one", folder=project)
    assert one.returncode == 0, one.stderr
    metrics = json.loads((project / "one" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.8, abs=0.001) and metrics["test/acc"] > 0.85
    sweep = ["experiment=first", "sparsity=0.5,0.9", "-m", "hydra.sweep.dir=two", "trainer.max_epochs=1"]
    assert shell("train.py", *sweep, folder=project).returncode == 0
    assert (project / "two" / "pareto.html").is_file() and (project / "two" / "1" / "metrics.json").is_file()
    for command in (["test", "one"], ["export", "one", "--to", "csr"], ["predict", "one"]):
        done = shell("-m", "pl_sparse", *command, folder=project)
        assert done.returncode == 0, done.stderr
    assert (project / "one" / "model_csr.safetensors").is_file()
    assert shell("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=project).returncode == 0


# Libraries of models and data


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("timm", lambda: timm_model(name="resnet18", classes=2)),
        ("torchvision", lambda: Torchvision(name="CIFAR10", root="x")),
        ("datasets", lambda: HuggingFace(name="x")),
        ("transformers", lambda: huggingface(name="x", classes=2)),
        ("transformers", lambda: from_pretrained("x")),
        ("transformers", lambda: importlib.import_module("pl_sparse.integrations.hugging_face")),
    ],
)
def test_an_extra_that_is_missing_is_named(library: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.delitem(sys.modules, "pl_sparse.integrations.hugging_face", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'pl_sparse\[{library}\]'"):
        make()


def test_a_model_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.update(options, name=name)
        if "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        if options["pretrained"] is True and "pretrained_cfg_overlay" not in options:
            raise OSError("no such weights in the cache")
        return nn.Linear(2, options["num_classes"])

    facts = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    timm = ModuleType("timm")
    timm.__dict__.update(
        create_model=create_model,
        list_models=lambda: ["resnet18"],
        get_pretrained_cfg=lambda name, allow_unregistered: SimpleNamespace(input_size=(3, 20, 20)),
        data=SimpleNamespace(resolve_model_data_config=lambda model: facts),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = timm_model(name="resnet18", classes=4, shape=(1, 8, 8))
    assert asked["in_chans"] == 1 and asked["num_classes"] == 4 and asked["pretrained"] is False
    assert model.preprocessing.shape == (1, 8, 8)  # type: ignore[union-attr]
    assert timm_model(name="resnet18", classes=4).preprocessing.mean == (0.1, 0.2, 0.3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Did you mean 'resnet18'"):
        timm_model(name="resnt18", classes=2)
    with pytest.raises(FileNotFoundError, match="neither in the cache"):
        timm_model(name="resnet18", classes=2, pretrained=True)
    with pytest.raises(FileNotFoundError, match="is not a file of weights"):
        timm_model(name="resnet18", classes=2, pretrained="nowhere.pth")


def test_images_of_torchvision_are_scaled_as_the_model_s_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    class Shades:
        classes = ("dark", "light")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if root == "nowhere":
                raise RuntimeError("Dataset not found")
            self.count = 12 if train else 4

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (5, 5), (51, 102, 255)), index % 2

    kinds = ModuleType("torchvision.datasets")
    kinds.__dict__["Shades"] = Shades
    monkeypatch.setitem(sys.modules, "torchvision.datasets", kinds)
    data = Torchvision(name="Shades", root="x", validation=2, batch_size=3)
    assert data.shape is None and data.classes == 2
    data.adapt(SimpleNamespace(shape=(3, 4, 4), mean=(0.2, 0.2, 0.2), std=(0.1, 0.2, 0.4)))
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (3, 3, 4, 4) and y.dtype == torch.int64
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([0.0, 1.0, 2.0]), atol=1e-6)
    with pytest.raises(FileNotFoundError, match="download=true fetches it"):
        Torchvision(name="Shades", root="nowhere")
    with pytest.raises(ValueError, match="Did you mean 'Shades'"):
        Torchvision(name="Shade", root="x")


def real(name: str) -> Any:
    """A library as it is installed; one that is made for another torch does not count."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name}: {error}")


def test_a_model_of_the_real_timm() -> None:
    real("timm")
    model = timm_model(name="resnet10t", classes=4, shape=(1, 32, 32), options={"drop_rate": 0.25})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4) and model.drop_rate == 0.25
    assert model.preprocessing.shape == (1, 32, 32)  # type: ignore[union-attr]
    assert timm_model(name="vit_tiny_patch16_224", classes=3, shape=(3, 32, 32)).eval()(
        torch.randn(1, 3, 32, 32)
    ).shape == (1, 3)
    with pytest.raises(ValueError, match=r"does not take options=.*drop_rte"):
        timm_model(name="resnet10t", classes=4, options={"drop_rte": 0.25})


def test_the_real_torchvision_reads_idx_files(tmp_path: Path) -> None:
    real("torchvision.datasets")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 4)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28)
        header = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([2049, count], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + np.arange(count, dtype=np.uint8).tobytes())
    data = Torchvision(name="MNIST", root=tmp_path, validation=2, channels=1, size=14, eval_batch_size=4)
    x, y = next(iter(data.test_dataloader()))
    assert data.classes == 10 and x.shape == (4, 1, 14, 14) and y.tolist() == [0, 1, 2, 3]
    assert x[:, 0, 0, 0].diff().gt(0).all()
    for name, message in (("SVHN", "does not hold SVHN"), ("CIFAR10", "download=true fetches it")):
        with pytest.raises(FileNotFoundError, match=message):
            Torchvision(name=name, root=tmp_path)
    for name, message in (("FakeData", "neither `train` nor `split`"), ("EMNIST", "no training and test part")):
        with pytest.raises(ValueError, match=message):
            Torchvision(name=name, root=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_real_datasets_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = real("datasets")
    from PIL import Image

    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    parts = {}
    for part, count in (("train", 10), ("test", 4)):
        pictures = [Image.new("RGB", (5, 5), (9 * number,) * 3) for number in range(count)]
        columns = {"picture": pictures, "label": [number % 2 for number in range(count)]}
        parts[part] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "pictures"))
    data = HuggingFace(name=str(tmp_path / "pictures"), size=4, validation=0.2)
    x, y = next(iter(data.test_dataloader()))
    assert data.classes == 2 and x.shape == (4, 3, 4, 4) and y.tolist() == [0, 1, 0, 1]
    assert x[:, 0, 0, 0].diff().gt(0).all()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no data set can be read there"):
        HuggingFace(name=str(tmp_path))


def test_a_library_made_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"cannot be imported: operator nms does not exist\n.*torch is \d"):
        library("broken_library", "data=x", "torchvision")


def test_integers_are_refused_where_torchao_is_made_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchao.py").write_text("import torch\ntorch.utils._pytree.register_nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    words = "quantization needs the library torchao, which cannot be imported: .*register_nothing'\n.*torch is "
    net, x = nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4)
    for quantization in (Int8(), Int4Weight(2)):
        with pytest.raises(ImportError, match=words):
            quantization.prepare(net, x)
    for export in (ONNXInt8(), OpenVINOInt8()):
        assert re.match(words, str(export.refusal(net, x, Unstructured(), 0.5)))


def test_a_vision_model_of_hugging_face_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=7)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    facts = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    for pretrained in (True, False):
        model = huggingface(name=str(tmp_path), classes=3, pretrained=pretrained)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3) and model.training
        assert model.preprocessing.shape == (3, 8, 8)  # type: ignore[union-attr]
        assert model.preprocessing.mean == (0.1, 0.2, 0.3)  # type: ignore[union-attr]


def test_the_direction_of_a_metric() -> None:
    names = {"val/loss": "min", "val_acc": "max", "test/top5_error": "min", "bbox/mAP": "max", "perplexity": "min"}
    assert {name: direction(name) for name in names} == names
    assert direction("val/F1") == "max" and direction("valLoss") == "min" and direction("mystery") is None
