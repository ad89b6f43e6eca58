"""CONTRIBUTING.md's "Add a scorer in ten minutes" to the letter: in a package of its own, in a copy of this one."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent


def blocks(language: str) -> list[str]:
    """The guide's blocks of code in a language."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    return [textwrap.dedent(code) for code in re.findall(rf"^ *```{language}\n(.*?)^ *```", guide, re.S | re.M)]


def run(cwd: Path, paths: list[Path], *arguments: str) -> str:
    """The output of a command of Python that must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_scorer_of_the_guide_in_a_package_of_its_own(tmp_path: Path) -> None:
    cls, imports = blocks("python")
    (toml,) = blocks("toml")
    (module,) = re.findall(r"`(\w+)\.py`", (ROOT / "CONTRIBUTING.md").read_text())[:1] or [""]
    project = tmp_path / "project"
    project.mkdir()
    (project / f"{module}.py").write_text(imports + "\n\n" + cls)
    (project / "pyproject.toml").write_text(toml)
    # what an installer makes of it: the module, and the entry points
    site = tmp_path / "site"
    (site / "relative_scorer-0.1.0.dist-info").mkdir(parents=True)
    shutil.copy(project / f"{module}.py", site)
    tomllib = pytest.importorskip("tomllib")
    (group,) = tomllib.loads(toml)["project"]["entry-points"].items()
    lines = [f"[{group[0]}]", *(f"{name} = {value}" for name, value in group[1].items())]
    (site / "relative_scorer-0.1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (site / "relative_scorer-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: relative-scorer\nVersion: 0.1.0\n"
    )

    paths = [site, ROOT]
    output = run(
        tmp_path,
        paths,
        "-c",
        "from pl_sparse import Sparsity\nprint(Sparsity(scorer='relative', sparsity=0.9).pruner.scorer)",
    )
    assert output.strip() == "Relative(power=1.0)"
    (command,) = re.findall(
        r"`pl-sparse (train scorer=\w+ scorer\.power=[\d.]+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    output = run(tmp_path, paths, "-m", "pl_sparse", *command.split(), "trainer.max_epochs=1", "output_dir=run")
    assert "actual 90.00%" in output
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "_target_: relative_scorer.Relative" in config and "power: 0.5" in config
    (target,) = re.findall(r"`(scorer\._target_=[\w.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    output = run(
        tmp_path, [project, ROOT], "-m", "pl_sparse", "train", target, "trainer.max_epochs=1", "output_dir=named"
    )
    assert "actual 90.00%" in output


def test_the_scorer_of_the_guide_in_this_package(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    cls, _ = blocks("python")
    (yaml,) = blocks("yaml")
    (name,) = re.findall(r"^class (\w+)\(Scorer\)", cls, re.M)
    (path,) = re.findall(r"`(conf/scorer/\w+\.yaml)`", guide)
    (module,) = re.findall(r"The class in `(pl_sparse/scorer/\w+\.py)`", guide)
    assert Path(path).stem == name.lower()

    for part in ("pl_sparse", "conf", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=ignored)
    for part in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path / part)
    assert not (tmp_path / path).exists()
    with (tmp_path / module).open("a") as file:
        file.write("\n\n" + cls)
    face = tmp_path / "pl_sparse" / "scorer" / "__init__.py"
    face.write_text(face.read_text() + f"from pl_sparse.scorer.{Path(module).stem} import {name}\n")
    (tmp_path / path).write_text(yaml)

    (command,) = re.findall(r"`python (train\.py scorer=\w+ structure=nm24)`", guide)
    output = run(tmp_path, [tmp_path], *command.split(), "trainer.max_epochs=1", "output_dir=run")
    assert "2:4" in output and "actual 50.00%" in output
    output = run(
        tmp_path, [tmp_path],
        "-m", "pytest", "tests/test_contract.py", "-q", "-n", "0", "-p", "no:cacheprovider",
        "-k", f"{name.lower()} and (cubic or linear or oneshot or yaml)",
        *(f"-W{action}" for action in pytestconfig.getoption("pythonwarnings") or ()),
    )  # fmt: skip
    assert int(re.findall(r"(\d+) passed", output)[0]) > 10 and "failed" not in output
