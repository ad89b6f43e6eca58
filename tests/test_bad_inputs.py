"""What cannot be run is refused in a line or two that name the fix, before training."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loops import _FitLoop

from pl_sparse.app import cli

DATA = Path(__file__).parent / "data"
LINES = [line for line in (DATA / "bad_inputs.txt").read_text().splitlines() if line and not line.startswith("#")]
PARTS = 16
FOREIGN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUMBER = 3


class Net(LightningModule):
    def __init__(self, hidden: int = 8, lr: float = 0.1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 2))
        self.lr = lr

    def training_step(self, batch, index):
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Needs(Net):
    def __init__(self, width):
        super().__init__(width)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x):
        return self.layer(x)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return {"boxes": self.layer(x)}


class Other(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

    def training_step(self, batch, index):
        return 0


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 4), torch.ones(8).long()), self.batch_size)


class Labelled(Data):
    classes = 2


class Boxes(Labelled):
    def train_dataloader(self):
        return [{"image": torch.randn(2, 4), "boxes": []}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    (made / "foreign.py").write_text(FOREIGN)
    (made / "lacking.py").write_text("import no_such_library\n")
    (made / "conf" / "model").mkdir(parents=True)
    (made / "conf" / "model" / "mine.yaml").write_text("_target_: foreign.Net\n")
    (made / "text.csv").write_text("a,b\nc,d\n")
    np.save(made / "wrong.npy", np.zeros((3, 7), dtype=np.float32))
    (made / "broken" / "experiment").mkdir(parents=True)
    (made / "broken" / "wrong.yaml").write_text("seed: [1\n")
    (made / "broken" / "experiment" / "tab.yaml").write_text("# @package _global_\n\tseed: 1\n")
    for name, other in (("round", "about"), ("about", "round")):
        (made / "broken" / "experiment" / f"{name}.yaml").write_text(f"defaults:\n  - {other}\n")
    for name in ("run", "damaged"):
        shutil.copytree(DATA / "run_0.1.0" / "learned", made / name)
    (made / "damaged" / "model.safetensors").write_bytes(b"nothing")
    return made


@pytest.mark.filterwarnings("default")  # what users see is the error; a warning of torch is none to them
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.slow] * (part % 3 != 0)) for part in range(PARTS)]
)
def test_each_is_refused_by_name(
    part: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(self: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(_FitLoop, "advance", trained)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    wrong = []
    for line in LINES[part::PARTS]:
        typed, _, words = line.partition(" => ")
        monkeypatch.setattr(sys, "argv", ["pl-sparse", *shlex.split(typed)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:  # what a shell would show as a traceback
            code = f"{type(error).__name__}: {error}"
        told = capsys.readouterr().err
        message = told[told.index("error: ") :].strip() if "error: " in told else told.strip()
        missing = [word for word in words.split("; ") if word not in message]
        if code != 2 or missing or message.count("\n") > 1 or "Traceback" in told:
            wrong.append(f"pl-sparse {typed}\n  exit {code}, lacks {missing}: {told[-700:]}")
    others = [line for line in wrong if "pip install 'pl_sparse[" not in line]
    assert not others, "\n".join(others)  # before --without-extras skips what needs an extra
    assert not wrong, "\n".join(wrong)


def test_there_are_enough() -> None:
    assert len(LINES) >= 250 and len({line.partition(" => ")[0] for line in LINES}) == len(LINES)
    assert all(line.partition(" => ")[2] for line in LINES)
