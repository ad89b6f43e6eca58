"""CONTRIBUTING.md's "Add a scorer in ten minutes", followed to the letter on a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_scorer_of_the_guide_works(tmp_path: Path) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    code, yaml = (
        [textwrap.dedent(found) for found in re.findall(rf"^ *```{kind}\n(.*?)^ *```", guide, re.S | re.M)]
        for kind in ("python", "yaml")
    )
    (name,) = re.findall(r"^class (\w+)\(Scorer\)", code[0], re.M)
    (path,) = re.findall(r"`(conf/scorer/\w+\.yaml)`", guide)
    assert len(code) == len(yaml) == 1 and Path(path).stem == name.lower()

    for part in ("pl_sparse", "conf", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path / part)
    assert not (tmp_path / path).exists()
    with (tmp_path / "pl_sparse" / "scorer.py").open("a") as file:
        file.write("\n\n" + code[0])
    (tmp_path / path).write_text(yaml[0])

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    (command,) = re.findall(r"`python (train\.py scorer=\w+ structure=nm24)`", guide)
    told = run(*command.split(), "trainer.max_epochs=1", "output_dir=run")
    assert "2:4" in told and "actual 50.00%" in told
    told = run(
        "-m", "pytest", "tests/test_contract.py", "-q", "-n", "0", "-p", "no:cacheprovider",
        "-k", f"{name.lower()} and (cubic or linear or oneshot or yaml)",
    )  # fmt: skip
    assert int(re.findall(r"(\d+) passed", told)[0]) > 10 and "failed" not in told
