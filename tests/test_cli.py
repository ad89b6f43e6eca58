"""The subcommands that look at runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_pareto import made

import pl_sparse
from pl_sparse.app import cli, doctor
from pl_sparse.core.files import write_csv


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs with masks known by heart."""
    folders = []
    for name, kept in (("a", [1.0, 2, 0, 0]), ("b", [1.0, 0, 3, 4])):
        folder = made(tmp_path / name, 0.9 if name == "a" else 0.8, scorer="magnitude" if name == "a" else "movement")
        save_file(
            {"fc.weight": torch.tensor(kept).reshape(2, 2), "fc.bias": torch.zeros(2)}, folder / "model.safetensors"
        )
        row = {"name": "fc.weight", "shape": "2x2", "structure": "unstructured", "weights": 4}
        count = sum(value != 0 for value in kept)
        write_csv(folder / "layers.csv", [{**row, "kept": count, "density": count / 4, "note": "[x]"}])
        folders.append(folder)
    return folders


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    cli.main()


def test_every_command_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "--help")
    told = capsys.readouterr().out
    for name, (path, text) in cli.COMMANDS.items():
        module, _, function = path.partition(":")
        assert callable(getattr(import_module(module), function)) and name in told and text in told
    assert "-sc install=bash" in told
    for name in ("pareto", "report", "show", "compare", "doctor"):
        with pytest.raises(SystemExit, match="0"):
            called(monkeypatch, name, "--help")
        assert f"usage: pl-sparse {name}" in capsys.readouterr().out


def test_a_torchvision_of_another_build_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(cli, "import_module", broken)
    with pytest.raises(SystemExit, match="2"):
        called(monkeypatch, "doctor")
    assert "torchvision cannot be imported" in capsys.readouterr().err


def test_version_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import runpy, sys; runpy.run_module('pl_sparse', run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "hydra-core")]
    expected = f"pl_sparse {pl_sparse.__version__} ({', '.join(versions)})"
    assert done.stdout.splitlines() == [expected, "False"]
    called(monkeypatch, "--help")
    assert (text := capsys.readouterr().out).splitlines()[-1] == expected
    called(monkeypatch)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(cli.metadata, "version", absent)
    assert cli.version() == f"pl_sparse {pl_sparse.__version__} (no torch, no lightning, no hydra-core)"


def test_a_warning_of_this_package_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", lambda *_: "of others")
    cli.short_warnings()
    assert warnings.formatwarning("the file is old", UserWarning, doctor.__file__, 3) == "warning: the file is old\n"
    assert warnings.formatwarning("the file is old", UserWarning, pytest.__file__, 3) == "of others"


def absent(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pl_sparse", "pareot"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(pl_sparse.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 2 and "Did you mean 'pareto'" in done.stderr


def test_show(runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "show", runs[1])
    told = capsys.readouterr().out
    assert "pl-sparse train scorer=movement sparsity=0.5 seed=0" in told and "75.00%" in told and "[x]" in told
    assert str(runs[1] / "masks.png") in told.replace("\n", "")
    with Image.open(runs[1] / "masks.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None and {(8, 48, 107), (247, 251, 255)} <= {colour for _, colour in colours}


def test_compare(runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "compare", *runs)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "scorer._target_ x.magnitude x.movement" in lines and "test/acc 0.9 0.8 -0.1" in lines
    assert "fc.weight 50.00% 75.00% 25.00%" in lines  # one of the four that either keeps
    assert not any(line.startswith("data._target_") for line in lines)  # the same in both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "nowhere is not a folder"),
        (["show", "."], "is not a run: there are 2 below it, such as a"),
        (["compare", "a", "a/.hydra"], "is not a run: it holds no metrics.json, which a run writes when it ends"),
    ],
)
def test_what_is_no_run_is_told(
    runs: list[Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs[0].parent)
    with pytest.raises(SystemExit, match="2"):
        called(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_a_report_without_a_board_is_the_page(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called(monkeypatch, "report", runs[0].parent)
    told = capsys.readouterr().out
    assert "none of the runs was logged to it" in told and (runs[0].parent / "pareto.html").as_uri() in told


def test_doctor_tries_the_hardware(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise RuntimeError("no such engine\nat all")

    monkeypatch.setattr(doctor, "_TARGETS", {"sparse CSR": doctor._csr, "other": broken})
    assert list(doctor.targets()) == [
        ("sparse CSR", True, "torch.sparse_csr on the CPU"), ("other", False, "no such engine"),
    ]  # fmt: skip
    called(monkeypatch, "doctor")
    told = capsys.readouterr().out
    assert metadata.version("torch") in told and "no such engine" in told


def test_extras_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", "numpy>=99 ; extra == 'new'", "nosuchpackage ; extra == 'new'", "numpy ; extra == 'old'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    known = {"Provides-Extra": ["new", "old"]}
    monkeypatch.setattr(
        doctor.metadata, "metadata", lambda name: type("Found", (), {"get_all": lambda self, key: known[key]})()
    )
    lacking = doctor.extras()
    assert lacking["old"] == [] and lacking["new"][1] == "nosuchpackage"
    assert lacking["new"][0].startswith("numpy>=99 (") and lacking["new"][0].endswith(" is installed)")


def test_completion_passes_over_the_subcommand() -> None:
    line = "pl-sparse train scorer=magn"
    done = subprocess.run(
        [sys.executable, "-c", "from pl_sparse.app.cli import main; main()", "-sc", "query=bash"],
        env={**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["scorer=magnitude"]
