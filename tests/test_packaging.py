"""What a wheel holds, what imports bring along, and the configuration groups in another Hydra application."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import pl_sparse

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, *arguments: str, folder: Path = ROOT) -> str:
    """What a new process prints that imports this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:hydra", "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Imports


def loaded(statement: str, libraries: tuple[str, ...]) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*(name for name in sys.argv[1:] if name in sys.modules))"
    return set(python(code, *libraries).split())


def test_the_package_alone_imports_nothing() -> None:
    libraries = ("torch", "numpy", "lightning", "hydra", "omegaconf", "pydantic", "sklearn", "matplotlib")
    assert loaded("import pl_sparse", libraries) == set()
    assert loaded("from pl_sparse import Pruner", libraries) == {"torch", "numpy"}


def test_the_callback_imports_neither_the_configuration_nor_data_and_figures() -> None:
    libraries = ("hydra", "omegaconf", "pydantic", "sklearn", "matplotlib", "pl_sparse.results.figures")
    # torchmetrics imports matplotlib where it is installed; figures.py is what imports it here
    brought = loaded("import lightning.pytorch, torchmetrics", libraries)
    assert "hydra" not in brought and "omegaconf" not in brought
    assert loaded("from pl_sparse import Sparsity", libraries) == brought


# Distributions


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A wheel and an sdist of this checkout, and a wheel of the sdist."""
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
    folder = tmp_path_factory.mktemp("dist")
    wheel = folder / python(build, "build_wheel", str(folder)).split()[-1]
    sdist = folder / python(build, "build_sdist", str(folder)).split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    again = folder / "again"
    return wheel, sdist, again / python(build, "build_wheel", str(again), folder=source).split()[-1]


def test_the_wheel_is_whole(distributions: tuple[Path, Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in (("pl_sparse", ROOT / "pl_sparse"), ("pl_sparse/conf", ROOT / "conf"))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"pl_sparse/py.typed", "pl_sparse/conf/train.yaml", "pl_sparse/results/page/page.html"} <= expected
    assert {name for name in names if name.startswith("pl_sparse/")} == expected
    assert max(Counter(names).values()) == 1
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pl_sparse"}
    assert f"\nVersion: {pl_sparse.__version__}\n" in metadata and "\nRequires-Python: >=3.11\n" in metadata


def test_the_sdist_builds_the_same_wheel(distributions: tuple[Path, Path, Path]) -> None:
    wheel, sdist, again = distributions
    assert wheel.read_bytes() == again.read_bytes()
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isfile()]
        names = Counter(archive.getnames())
    assert not members and max(names.values()) == 1
    assert f"pl_sparse-{pl_sparse.__version__}/tests/test_packaging.py" in names


def test_every_dependency_has_a_lower_bound() -> None:
    lines = python((ROOT / ".ci" / "lowest.py").read_text().replace("__file__", "'.ci/lowest.py'")).split()
    assert len(lines) == len(PROJECT["project"]["dependencies"])
    assert all(re.fullmatch(r"[\w-]+==\d[\w.]*", line) for line in lines)


# The groups in another application

_APPLICATION = """
import hydra
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

NEW = hasattr(hydra.utils, "execution_whitelist")
VERSION = {"execution_whitelist": ["pl_sparse.*"]} if NEW else {"version_base": "1.3"}


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@hydra.main(config_path=".", config_name="config", **VERSION)
def main(cfg):
    seed_everything(cfg.get("seed", 0))
    sparsity = hydra.utils.instantiate(cfg[cfg.get("callback", "sparsity")])
    module = Line()
    trainer = Trainer(
        max_epochs=3, callbacks=[sparsity], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4))
    pruner = sparsity.pruner
    kept = module.layer.weight != 0
    axes = (pruner.scorer, pruner.schedule, pruner.structure)
    print(*(type(axis).__name__ for axis in axes), int(kept.sum()), kept.reshape(-1, 4).sum(1).unique().tolist())


if __name__ == "__main__":
    main()
"""
_OWN_NODE = """
defaults:
  - scorer@sparsity.scorer: movement
  - schedule@sparsity.schedule: cubic
  - structure@sparsity.structure: nm24
  - _self_

sparsity:
  _target_: pl_sparse.Sparsity
  allocation: uniform
  schedule:
    final: 0.5
    every: 1

hydra:
  searchpath: [pkg://pl_sparse.conf]
  output_subdir: null
  run:
    dir: .
"""
_ROOT_KEYS = """
defaults:
  - scorer@pruning.scorer: random
  - schedule@pruning.schedule: linear
  - structure@pruning.structure: unstructured
  - allocation@pruning.allocation: erk
  - _self_

callback: pruning
sparsity: 0.75
seed: 1
pruning:
  _target_: pl_sparse.Sparsity
  schedule: {every: 1}

hydra:
  searchpath: [pkg://pl_sparse.conf]
  output_subdir: null
  run:
    dir: .
"""


@pytest.mark.parametrize(
    ("config", "expected"),
    [(_OWN_NODE, "Movement Cubic NM 16 [2]"), (_ROOT_KEYS, "Random Linear Unstructured 8")],
    ids=["a node of its own", "keys at the root"],
)
def test_groups_in_another_application(tmp_path: Path, config: str, expected: str) -> None:
    (tmp_path / "application.py").write_text(_APPLICATION)
    (tmp_path / "config.yaml").write_text(config)
    printed = python("import runpy; runpy.run_path('application.py', run_name='__main__')", folder=tmp_path)
    assert printed.splitlines()[-1].startswith(expected)
