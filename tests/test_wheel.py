"""The way of a new user: a wheel, an empty folder, a project, a sweep, its page, files for a target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_overview import links_of, opened
from test_packaging import python

ROOT = Path(__file__).parent.parent
BIN = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with a wheel of this checkout, which sees the packages of the running one."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling import build; print(build.build_wheel(sys.argv[1]))"
    wheel = folder / python(build, str(folder)).split()[-1]
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    made = subprocess.run([environment / BIN / "python", "-c", code], check=True, capture_output=True, text=True)
    (Path(made.stdout.strip()) / "running.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / BIN / "python"), "install", "-q"]
    options = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *options, str(wheel)], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("the running environment has no pip")
    assert done.returncode == 0, done.stderr
    return environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_way_of_a_new_user(installed: Path, tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}

    def shell(program: str, *arguments: str, folder: Path) -> str:
        done = subprocess.run(
            [installed / BIN / program, *arguments], cwd=folder, env=kept, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    code = "import pl_sparse; print(pl_sparse.__file__)"
    package = Path(shell("python", "-c", code, folder=tmp_path).strip()).parent
    assert package.is_relative_to(installed)
    for name in ("py.typed", "conf/train.yaml", "results/page/page.html", "app/project/train.py.in"):
        assert (package / name).is_file()

    assert "python train.py experiment=first" in shell("pl-sparse", "init", "shop", folder=tmp_path)
    shop = tmp_path / "shop"
    shell("python", "train.py", "experiment=first", "output_dir=one", folder=shop)
    metrics = json.loads((shop / "one" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.8, abs=0.001) and metrics["test/acc"] > 0.85

    sweep = ["sweep", "--config-dir", "configs", "experiment=first", "sparsity=0.5,0.9", "trainer.max_epochs=2"]
    shell("pl-sparse", *sweep, "hydra.sweep.dir=two", folder=shop)
    found = [json.loads((shop / "two" / run / "metrics.json").read_text())["sparsity"] for run in ("0", "1")]
    assert found == pytest.approx([0.5, 0.9], abs=0.001)
    page = shop / "two" / "pareto.html"
    assert links_of(page.read_text()) == []

    shell("pl-sparse", "export", "one", "--to", "csr", folder=shop)
    assert (shop / "one" / "model_csr.safetensors").is_file()
    assert f"{metrics['test/acc']:.4f}" in shell("pl-sparse", "test", "one", folder=shop)
    shell("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=shop)
    with opened(page) as tab:
        assert tab.locator("#svg .mark").count() == 2
        tab.screenshot(path=tmp_path / "page.png")
