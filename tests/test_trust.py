"""Runs of strangers: what their folders name is not called, what their files hold is not believed."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file, save, save_file
from torch import nn

from pl_sparse.app import cli, load_run
from pl_sparse.app.earlier import earlier_overrides, loads_plain
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.app.trust import Untrusted
from pl_sparse.core.files import read_yaml, write_csv
from pl_sparse.export import (
    CSR,
    Compressed,
    DamagedFileError,
    load_compressed,
    load_csr,
    load_semi_structured,
    save_compressed,
)
from pl_sparse.export.compressed import loaded
from pl_sparse.results.runs import read

OLD = Path(__file__).parent / "data" / "run_0.1.0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the current folder, by a path as one types it."""
    shutil.copytree(OLD / "learned", tmp_path / "got" / "run")
    shutil.copytree(OLD / "interrupted" / "checkpoints", tmp_path / "got" / "run" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Path("got/run")


def rewrite(run: Path, **nodes: Any) -> None:
    """Give the config.yaml of a run other nodes."""
    cfg = OmegaConf.load(run / "config.yaml")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.merge(cfg, nodes)))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *map(str, arguments)])
    GlobalHydra.instance().clear()
    cli.main()


# What a target names

MINE = """
import subprocess
from subprocess import run as re_exported
import numpy
from torch import nn
import lightning.pytorch as pl

class Net(nn.Module): ...
class Lit(pl.LightningModule): ...
class Writer:
    def __init__(self, path): open(path, "w")
class Names:
    class Inner(nn.Module): ...
def make() -> nn.Module: return Net()
def anything(): return Net()
def erase(path: str) -> None: ...
instance = Net()
"""


def refusal(run: Path, target: Any) -> str | None:
    try:
        Untrusted(run / "config.yaml", run, "say so").check_value("model._target_", target)
    except ConfigError as error:
        return str(error)
    return None


REFUSED = """
numpy.load subprocess.Popen builtins.eval builtins.exec pickle.loads hydra.utils.call hydra.utils.instantiate
hydra._internal.instantiate._instantiate2.instantiate importlib.import_module torch.load torch.hub.load
torch.jit.load torch.jit.ScriptModule torch.package.PackageImporter torch.utils.cpp_extension.load_inline
torch.utils.model_zoo.load_url torch.serialization.pickle.loads torch.os.system torch.sys.exit
torch.nn.modules.module.warnings.sys.exit torch.compile torch.fx.GraphModule torch.distributed.nn.RemoteModule
torch.nn.Module.load_state_dict torch.nn.Module.__subclasses__ torch.nn.init.normal_ torch.optim.adam.F
torch.export.load torch._dynamo.optimize lightning.fabric.utilities.cloud_io._load
lightning.pytorch.LightningModule.load_from_checkpoint lightning.pytorch.demos.mnist_datamodule.MNISTDataModule
lightning.pytorch.cli.LightningCLI lightning.pytorch.callbacks.lambda_function.Callable
lightning.pytorch.Trainer.fit pl_sparse.export.load_compressed pl_sparse.app.load_run pl_sparse.app.cli.main
pl_sparse.app.sweep.job.subprocess.run pl_sparse.core.files.write_text pl_sparse.tasks.text._pretrained
pl_sparse.export.hardware.Hardware.__init__.__globals__ mine.Writer mine.re_exported mine.subprocess.run
mine.numpy.load mine.anything mine.erase mine.instance mine.Lit.load_from_checkpoint mine nowhere.Net __main__
run_outside.Net os.system
"""


@pytest.mark.parametrize("target", [*REFUSED.split(), "", "..", "a b.c", 3, None, ["os.system"]])
def test_a_target_that_does_something_else_is_refused(target: Any, run: Path) -> None:
    Path("mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    message = refusal(run, target)
    assert message is not None and "is not built from the folder of a run" in message
    assert "config.yaml: model._target_=" in message and message.endswith("say so")


BUILT = """
mine.Net mine.Lit mine.Names.Inner mine.make torch.nn.Linear torch.nn.modules.linear.Linear torch.optim.SGD
torch.optim.lr_scheduler.StepLR lightning.pytorch.Trainer lightning.pytorch.callbacks.EarlyStopping
lightning.pytorch.loggers.CSVLogger torchmetrics.classification.MulticlassAccuracy pl_sparse.Sparsity
pl_sparse.scorer.Magnitude pl_sparse.tasks.data.Digits pl_sparse.masking.Shrunk pl_sparse.hardware.Hardware
pl_sparse.tasks.lr.CosineLR
"""


@pytest.mark.parametrize("target", BUILT.split())
def test_a_part_of_a_run_is_built(target: str, run: Path) -> None:
    Path("mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    assert refusal(run, target) is None


def test_all_of_the_configuration_is_built(run: Path) -> None:
    texts = [path.read_text() for path in CONF.glob("*/*.yaml")]
    names = {name for text in texts for name in text.replace("_target_: ", "\0").split("\0")[1:]}
    found = {name.split()[0] for name in names} - {"pl_sparse.app.sweep.overview.Overview"}
    assert len(found) > 60
    assert {name: refusal(run, name) for name in found} == dict.fromkeys(found)


def test_classes_that_installed_packages_register_are_built(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pl_sparse.app import trust
    from pl_sparse.core.registry import Entry

    kind = type("Plugged", (nn.Module,), {"__module__": "plugged"})
    assert refusal(run, "plugged.Plugged") is not None
    monkeypatch.setattr(trust, "registered", lambda axis: {"plugged": Entry(kind)})
    assert refusal(run, "plugged.Plugged") is None


NET = "import pathlib\npathlib.Path('executed').touch()\nfrom torch import nn\nclass Net(nn.Linear): ...\n"


@pytest.mark.parametrize(
    ("file", "target"),
    [
        ("got/run/evil.py", "got.run.evil.Net"),  # in the run
        ("got/evil.py", "got.evil.Net"),  # in the archive that brought it
        ("venv/lib/site-packages/evil.py", "venv.lib.evil.Net"),
    ],
)
def test_modules_that_came_with_a_run_are_not_imported(file: str, target: str, run: Path) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(NET)
    rewrite(run, model={"_target_": target})
    with pytest.raises(ConfigError, match="is not built from the folder of a run"):
        load_run(run)
    assert not Path("executed").exists()


def test_within_a_run_no_module_is_of_the_current_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "evil.py").write_text(NET)
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    rewrite(Path(), model={"_target_": "evil.Net"})
    for path in (".", Path.cwd(), "../run"):
        with pytest.raises(ConfigError, match="is not built from the folder of a run"):
            load_run(path)
    assert not Path("executed").exists()


def test_installed_packages_below_the_current_folder_are_not_of_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Path("venv/lib/site-packages")
    site.mkdir(parents=True)
    (site / "installed.py").write_text(NET)
    monkeypatch.syspath_prepend(str(site.resolve()))
    assert refusal(run, "installed.Net") is not None
    monkeypatch.chdir("/")  # the standard library is below it
    assert refusal(run, "turtledemo.clock.Net") is not None
    assert not Path("executed").exists()


# config.yaml


def exploit(run: Path, name: str) -> None:
    """The exploits by config.yaml; each would make the file `executed`."""
    load = {"_target_": "numpy.load", "file": str(run / "data.npy"), "allow_pickle": True}
    touch = {"_target_": "subprocess.call", "_args_": [["touch", "executed"]]}
    nodes: dict[str, dict[str, Any]] = {
        "data": {"data": {**load, "batch_size": None}},
        "nested": {"model": {"_target_": "torch.nn.Sequential", "_args_": [touch]}},
        "partial": {"optimizer": {"_target_": "torch.load", "_partial_": True}},
        "not recursive": {"callbacks": {"x": {"_target_": "torch.nn.Identity", "_recursive_": False, "y": touch}}},
        "list": {"callbacks": {"x": [[touch]]}},
        "reference": {"data": {"_target_": "${name}"}, "name": "os.system"},
        "resolver": {"seed": "${oc.env:HOME}"},
        "resolved twice": {"a": "$", "b": "{oc.env:HOME}", "c": "${a}${b}"},
    }
    cfg = OmegaConf.load(run / "config.yaml")
    for key, node in nodes[name].items():
        cfg[key] = node
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))


class Touching:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "name", ["data", "nested", "partial", "not recursive", "list", "reference", "resolver", "resolved twice"]
)
def test_what_a_run_names_is_not_executed(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    np.save(run / "data.npy", np.array([Touching()]), allow_pickle=True)
    exploit(run, name)
    for subcommand in ("export", "bench"):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, subcommand, run)
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 2 and printed[0].startswith(f"error: {run}/config.yaml: ") and "--trust" in printed[1]
    with pytest.raises(ConfigError):
        load_run(run)
    command(monkeypatch, "show", run)
    assert not Path("executed").exists()


def test_who_trusts_a_run_has_all_of_it(run: Path) -> None:
    import numpy as np

    np.save(run / "data.npy", np.array([Touching()]), allow_pickle=True)
    cfg = OmegaConf.load(run / "config.yaml")
    cfg["data"] = {"_target_": "numpy.load", "file": str(run / "data.npy"), "allow_pickle": True}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    with pytest.raises(ConfigError, match="vit_tiny takes classes of the data"):
        load_run(run, trust=True)
    assert Path("executed").exists()


def test_the_name_of_a_format_is_no_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up = "/".join([".."] * len((CONF / "export").resolve().parts[1:]))
    path = f"{up}{(run / 'evil').resolve()}"
    assert (CONF / "export" / f"{path}.yaml").resolve() == (run / "evil.yaml").resolve()
    touch = {"_target_": "subprocess.call", "_args_": [["touch", "executed"]]}
    (run / "evil.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({path: touch})))
    cfg = OmegaConf.load(run / "config.yaml")
    cfg["export"] = {path: {"level": 1}}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "export", run)
    assert not Path("executed").exists()


def test_a_link_out_of_a_run_is_not_followed(run: Path) -> None:
    Path("precious").mkdir()
    (run / "shrunk").symlink_to(Path("precious").resolve())
    with pytest.raises(ConfigError, match="is a link out of the run's folder"):
        load_run(run)
    (run / "shrunk").unlink()
    (run / "latest").symlink_to(run.resolve() / "checkpoints")
    load_run(run)


# Going on


def go_on(run: Path, *overrides: str, typed: tuple[str, ...] = ()) -> list[str]:
    (run / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    return earlier_overrides(checkpoint, [f"ckpt_path={checkpoint}", *typed])


@pytest.mark.parametrize(
    "overrides",
    [
        ["+callbacks.x={_target_: subprocess.call, _args_: [[touch, executed]]}"],
        ["model._target_=torch.hub.load"],
        ["+a=os.system", "model._target_=${a}"],
        ["hydra.run.dir=elsewhere"],
        ["hydra.sweep.dir=elsewhere"],
        ["hydra.searchpath=[file://got/run]"],
        ["hydra/launcher=joblib"],
        ["+hydra.job.env_set.PYTHONPATH=got/run"],
        ["+hydra.callbacks.x={_target_: subprocess.call, _args_: [[touch, executed]]}"],
        ["+experiment@hydra.callbacks=x"],
        [" hydra.mode=MULTIRUN"],
        ["--config-dir=got/run"],
        ["--experimental-rerun=got/run/config.pickle"],
        [" -m"],
        ["model=../../got/run/evil"],
        ["export=[../../got/run/evil]"],
        ["seed=${oc.env:HOME}"],
        ["+a=$", "+b='{oc.env:HOME}'", "+c=${a}${b}"],
        ["seed=1,2"],
        [" output_dir=elsewhere"],
        ["logger=mlflow", "logger.mlflow.tracking_uri=https://somewhere"],
        ["{"],
    ],
    ids=lambda overrides: overrides[-1][:30],
)  # fmt: skip
def test_what_a_run_asked_for_is_not_taken_over_unseen(overrides: list[str], run: Path) -> None:
    with pytest.raises(ConfigError, match=r"^got/run/.hydra/overrides.yaml: (.|\n)*add trust=true$"):
        go_on(run, *overrides)
    assert go_on(run, *overrides, typed=("trust=true",)) == overrides


def test_what_a_run_asked_for_is_taken_over(run: Path) -> None:
    asked = [
        "method=str",
        "model=vit_tiny",
        "model.dim=16",
        "export=[safetensors]",
        "+data.root=../data",
        "logger=mlflow",
    ]
    assert go_on(run, *asked, "output_dir=mid", "ckpt_path=x", "trust=true") == [*asked, "trust=false"]
    assert go_on(run, "seed=1", typed=("seed=2", "trust=false")) == []


def test_what_is_typed_is_trusted(run: Path) -> None:
    typed = (
        "+callbacks.x={_target_: somebody.Elses}", "hydra.job.chdir=true", "++model.width=3", "hydra.run.dir=here",
        "logger.mlflow.tracking_uri=https://mine",
    )  # fmt: skip
    assert go_on(run, "model=resnet20", "logger=mlflow", typed=typed) == [
        "model=resnet20",
        "logger=mlflow",
        "trust=false",
    ]
    own = Path("own/model")
    own.mkdir(parents=True)
    (own / "big.yaml").write_text("_target_: somebody.Elses\n")
    for where in ("--config-dir=own", "hydra.searchpath=[own]"):
        assert go_on(run, "seed=1", typed=("model=big", where)) == ["seed=1", "trust=false"]


def test_a_checkpoint_of_a_run_is_not_unpickled(run: Path) -> None:
    for name in ("last", "best"):
        torch.save({"state_dict": {}, "hyper_parameters": Touching()}, run / "checkpoints" / f"{name}.ckpt")
    with pytest.raises(ConfigError, match=r"last.ckpt holds pickled objects .*\n.*add trust=true"):
        go_on(run)
    with pytest.raises(ConfigError, match=r"best.ckpt holds pickled objects .*\n.*add trust=true"):
        loads_plain(run / "checkpoints" / "best.ckpt", run, False)
    assert go_on(run, typed=("trust=true",)) == []
    assert not loads_plain(run / "checkpoints" / "best.ckpt", run, True)
    assert not loads_plain(run / "checkpoints" / "best.ckpt", run, None)  # what a run itself wrote
    assert not Path("executed").exists()


def test_a_checkpoint_does_not_say_what_is_removed(run: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    changed = [value for value in state["callbacks"].values() if "best_model_path" in value]
    changed[-1]["best_model_path"] = f"{run}/checkpoints/../../../precious"
    torch.save(state, last)
    with pytest.raises(ConfigError, match=r"precious is a path outside of the run's folder"):
        go_on(run)


def test_the_command_goes_on_with_what_it_may(run: Path) -> None:
    shutil.copy(OLD / "interrupted" / ".hydra" / "overrides.yaml", run / ".hydra" / "overrides.yaml")
    saved = run / ".hydra" / "overrides.yaml"
    saved.write_text(saved.read_text() + "- +callbacks.x={_target_:subprocess.call,_args_:[[touch,executed]]}\n")
    arguments = [sys.executable, "-m", "pl_sparse", "train", f"ckpt_path={run}/checkpoints/last.ckpt"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: {saved}: callbacks.x._target_=subprocess.call is not"
    )
    assert not Path("executed").exists()


# Files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.bn = nn.Conv2d(1, 4, 3), nn.Linear(4, 10), nn.BatchNorm1d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.fc(self.conv(x).mean((2, 3))))
        return out


@pytest.fixture
def net() -> nn.Module:
    net = Net().eval()
    with torch.no_grad():
        for weight in (net.conv.weight, net.fc.weight):
            weight.mul_(torch.rand_like(weight) > 0.7)
    return net


@pytest.mark.parametrize("export", [Compressed(), CSR("all")], ids=["compressed", "csr"])
def test_every_flipped_bit_and_every_truncation_is_found(
    export: Compressed | CSR, net: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / export.file
    export.write(net, torch.zeros(2, 1, 8, 8), path)
    export.open(path, Net())
    content, chance = path.read_bytes(), random.Random(0)
    broken = [content[:end] for end in range(0, len(content), 17)] + [content + b"\0"]
    bits = [*range(8 * 64), *(chance.randrange(8 * len(content)) for _ in range(300))]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    reader: Callable[..., Any] = load_csr if isinstance(export, CSR) else loaded
    for damaged in broken:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=export.file):
            reader(path, Net())


def test_a_model_of_another_shape_is_named(net: nn.Module, tmp_path: Path) -> None:
    for export in (Compressed(), CSR("all")):
        export.write(net, torch.zeros(2, 1, 8, 8), tmp_path / export.file)
        with pytest.raises(DamagedFileError, match="another model"):
            export.open(tmp_path / export.file, nn.Sequential(nn.Linear(100, 100)))
    with pytest.raises(FileNotFoundError):
        load_csr(tmp_path / "nowhere", net)


def test_files_of_the_earlier_formats_are_read_with_a_warning(net: nn.Module, tmp_path: Path) -> None:
    save_compressed({"w": torch.eye(9)}, tmp_path / "new.zst")
    (tmp_path / "old.zst").write_bytes((tmp_path / "new.zst").read_bytes()[68:])
    with pytest.warns(UserWarning, match=r"old.zst has no checksum: it was written by version 0\.1\.0"):
        assert torch.equal(load_compressed(tmp_path / "old.zst")["w"], torch.eye(9))
    path = tmp_path / "model_csr.safetensors"
    CSR("all").write(net, torch.zeros(2, 1, 8, 8), path)
    save_file(load_file(path), path, {"csr": json.dumps(["conv", "fc"])})
    x = torch.randn(3, 1, 8, 8)
    with pytest.warns(UserWarning, match="has no checksum"), torch.no_grad():
        torch.testing.assert_close(load_csr(path, Net())(x), net(x))


def compressed(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file of the earlier format, without a checksum."""
    zstandard: Any = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.ZstdCompressor().compress(save(tensors)))
    return path


@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    zstandard: Any = pytest.importorskip("zstandard")
    size = 1 << 28
    frame = zstandard.ZstdCompressor().compress(bytes(size))
    bomb = tmp_path / "bomb.zst"
    bomb.write_bytes(frame)
    assert len(frame) < 1 << 16
    unpacked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstandard, "ZstdDecompressor", lambda: unpacked.append(1))
        with pytest.raises(DamagedFileError, match=r"would unpack to 268,435,456 bytes, and limit=1,000"):
            load_compressed(bomb, limit=1000)
        with pytest.raises(DamagedFileError, match="would unpack to"):
            loaded(bomb, nn.Linear(4, 4))
        save_compressed({"w": torch.zeros(1 << 20)}, bomb)
        with pytest.raises(DamagedFileError, match=r"would unpack to 4,194,304 bytes"):
            load_compressed(bomb, limit=1 << 20)
    assert not unpacked
    parts = {"w.bitmask": torch.zeros(1 << 17, dtype=torch.uint8), "w.values": torch.zeros(0)}
    path = compressed(tmp_path / "w.zst", {**parts, "w.shape": torch.tensor([1 << 20])})
    with pytest.raises(DamagedFileError, match=r"its tensors have 4,194,304 bytes, and limit=1,048,576"):
        load_compressed(path, limit=1 << 20)
    assert load_compressed(path)["w"].numel() == 1 << 20
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    bomb.write_bytes(stream)
    with pytest.raises(DamagedFileError, match="does not state its size"):
        load_compressed(bomb)


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@pytest.mark.parametrize(
    "changed",
    [
        {"w.shape": torch.tensor([1 << 62, 4])},
        {"w.shape": torch.tensor([-3, -3])},
        {"w.shape": torch.tensor([3.0, 3.0])},
        {"w.shape": torch.tensor([4, 5])},
        {"w.shape": torch.tensor([1 << 40])},
        {"w.values": torch.ones(2)},
        {"w.values": torch.ones(3, 1)},
        {"w.values": None},
        {"w.bitmask": torch.tensor([17, 1], dtype=torch.int64)},
        {"w.bitmask": torch.tensor([17, 255], dtype=torch.uint8)},
    ],
    ids=str,
)
def test_masks_that_do_not_fit_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    mask = torch.tensor([0b00010001, 0b1], dtype=torch.uint8)
    whole = {"w.bitmask": mask, "w.values": torch.ones(3), "w.shape": torch.tensor([3, 3])}
    assert torch.equal(load_compressed(compressed(tmp_path / "w.zst", whole))["w"], torch.eye(3))
    parts = {key: value for key, value in {**whole, **changed}.items() if value is not None}
    with pytest.raises(DamagedFileError):
        load_compressed(compressed(tmp_path / "w.zst", parts))


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("columns", lambda t: t.fill_(1 << 30)),
        ("columns", lambda t: t.fill_(-1)),
        ("columns", lambda t: t.flip(0)),
        ("columns", lambda t: t[:-1]),
        ("columns", lambda t: t.long()),
        ("rows", lambda t: t.add(1)),
        ("rows", lambda t: t.flip(0)),
        ("rows", lambda t: torch.cat([t[:-1], t[-1:] + (1 << 20)])),
        ("rows", lambda t: t[1:]),
        ("rows", lambda t: t[None]),
        ("values", lambda t: t.double()),
        ("values", lambda t: torch.cat([t, t])),
        ("bias", lambda t: t[1:]),
        ("bias", None),
    ],
)
@pytest.mark.parametrize("layer", ["conv.matrix", "fc"])
def test_rows_that_do_not_fit_are_refused(layer: str, part: str, change: Any, net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_csr.safetensors"
    CSR("all").write(net, torch.zeros(2, 1, 8, 8), path)
    tensors = load_file(path)
    tensor = tensors.pop(f"{layer}.{part}")
    if change is not None:
        tensors[f"{layer}.{part}"] = change(tensor).contiguous()
    save_file(tensors, path, {"csr": json.dumps(["conv", "fc"])})
    with pytest.raises(DamagedFileError, match=r"model_csr\.safetensors is not a model in sparse rows"):
        load_csr(path, Net())


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@pytest.mark.parametrize("names", [["bn"], ["nowhere"], [3], "fc", {"fc": 1}, 7, ["fc", "fc"]], ids=str)
def test_layers_that_have_no_rows_are_refused(names: Any, net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_csr.safetensors"
    CSR("all").write(net, torch.zeros(2, 1, 8, 8), path)
    save_file(load_file(path), path, {"csr": json.dumps(names)})
    with pytest.raises(DamagedFileError):
        load_csr(path, Net())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be sparse tensor cores")
def test_the_reader_of_the_file_for_gpus_reads_the_file_first(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_24.safetensors.zst"
    save_compressed(net.state_dict(), path)
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        load_semi_structured(path, Net())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="is incomplete"):
        load_semi_structured(path, Net())


def test_a_truncated_model_is_one_line(run: Path) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="the weights in got/run belong to another model"):
        load_run(run)


def test_tables_hold_no_formulas(tmp_path: Path) -> None:
    cells = ["=1+1", "+x", "-x", "@x", "\t=1", " =1", "-0.5", "+1e3", "a=b", ""]
    write_csv(tmp_path / "a.csv", [{"=name": cell, "b": -1.5} for cell in cells])
    with open(tmp_path / "a.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=name", "b"] and {row[1] for row in rows} == {"-1.5"}
    assert [row[0] for row in rows] == [f"'{cell}" for cell in cells[:6]] + cells[6:]


def test_a_yaml_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ValueError, match="has aliases"):
        read_yaml(path)
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_yaml(path)
    path.write_text("a: " + "x" * 1000)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_yaml(path, limit=100)
    path.write_text("a: !!python/object/apply:os.system [true]")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(path)
    assert read(tmp_path).state == "failed"


def test_what_is_shown_does_not_act_on_the_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    escape = "\x1b]52;c;ZXZpbA==\x07"
    (run / "status.json").write_text(json.dumps({"state": "failed" + escape, "error": escape}))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, escape: escape}))
    (run / ".hydra" / "overrides.yaml").write_text(json.dumps([f"seed={escape}"]))
    command(monkeypatch, "show", run)
    command(monkeypatch, "compare", run, run)
    printed = capsys.readouterr().out
    assert "\\x1b]52" in printed and "\x1b]52" not in printed
    with pytest.raises(ConfigError) as caught:
        go_on(run, f"model._target_={escape}")
    assert "\x1b" not in str(caught.value)
