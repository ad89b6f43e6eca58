"""Folders, names and options of version 0.1.0 work for one more release."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pl_sparse.app import aliases, cli, load_run
from pl_sparse.app.aliases import TARGETS, current_options, current_targets
from pl_sparse.app.settings import CONF, check

OLD = Path(__file__).parent / "data" / "run_0.1.0"


@pytest.fixture(autouse=True)
def _nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "_announced", set())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the runs that 0.1.0 left."""
    shutil.copytree(OLD, tmp_path / "runs")
    return tmp_path / "runs"


def metrics_of(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pl-sparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    GlobalHydra.instance().clear()
    cli.main()


@pytest.mark.parametrize("name", [pytest.param("learned", marks=pytest.mark.slow), "coupled"])
def test_a_finished_run_is_shown_compared_exported_and_measured(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = folder / name, metrics_of(folder / name)
    command(monkeypatch, "show", run)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for key in ("sparsity", "val/acc", "test/acc"):
        assert [key, f"{before[key]:.4g}"] in shown

    command(monkeypatch, "pareto", run)
    with open(run / "pareto.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["sparsity"]) == pytest.approx(before["sparsity"])
    assert float(row["test/acc"]) == pytest.approx(before["test/acc"])
    capsys.readouterr()

    command(monkeypatch, "export", run, "--to", "csr", "onnx")
    printed = capsys.readouterr()
    assert (run / "model_csr.safetensors").is_file() and (run / "model.onnx").is_file()
    assert printed.err.count("pl_sparse.hardware.Hardware is called pl_sparse.export.hardware.Hardware now") == 1
    size = (run / "model_csr.safetensors").stat().st_size
    assert metrics_of(run) == {**before, "size_bytes": {**before["size_bytes"], "exported": size}}

    command(monkeypatch, "bench", run, "--to", "onnx", "--seconds", "0.01")
    assert "against dense in the same runtime" in capsys.readouterr().out
    after = metrics_of(run)
    assert after["test/acc_exported"] == pytest.approx(before["test/acc"])
    assert all(after[key] == before[key] for key in before if key != "size_bytes")


@pytest.mark.parametrize("name", ["learned", "coupled"])
def test_a_finished_run_loads(name: str, folder: Path) -> None:
    module, data, cfg = load_run(folder / name)
    metrics = metrics_of(folder / name)
    parameters = list(module.parameters())
    assert sum(weight.numel() for weight in parameters) == metrics["params_left"]
    assert sum(int(weight.count_nonzero()) for weight in parameters) == metrics["params_nonzero"]
    assert data is not None and cfg.hardware._target_ == "pl_sparse.export.hardware.Hardware"
    check(cfg)


def test_a_killed_run_goes_on(folder: Path) -> None:
    arguments = [sys.executable, "-m", "pl_sparse", "train", "ckpt_path=runs/interrupted/checkpoints/last.ckpt"]
    done = subprocess.run(arguments, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "epoch 3/4" in done.stdout and "epoch 2/4" not in done.stdout
    resumed, whole = metrics_of(folder / "interrupted"), metrics_of(folder / "learned")
    assert resumed["sparsity"] == pytest.approx(whole["sparsity"], abs=1e-6)
    assert resumed["val/acc"] == pytest.approx(whole["val/acc"], abs=1e-3)
    assert resumed["steps"] == whole["steps"] == 80


@pytest.mark.parametrize("name", ["learned", "coupled"])
def test_a_finished_run_is_not_trained_again(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / name
    overrides = [str(override) for override in OmegaConf.load(run / ".hydra" / "overrides.yaml")]
    asked = [override for override in overrides if not override.startswith("output_dir=")]
    if name == "coupled":
        asked.append("schedule.every=10")  # the interval that was the default of then
    files = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}
    command(monkeypatch, "train", *asked, f"hydra.run.dir={run}", "resume=true")
    assert {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()} == files


# Names


def test_every_old_name_has_a_class() -> None:
    for old, new in TARGETS.items():
        try:
            resolve_name(new)
        except (ImportError, AttributeError):
            resolve_name(old)  # not renamed yet


def test_an_old_name_in_settings_is_renamed_and_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    old = {"hardware": {"_target_": "pl_sparse.hardware.Hardware"}, "again": "${hardware}", "missing": "???"}
    old["callbacks"] = [{"_target_": "pl_sparse.callbacks.track.Track"}, {"_target_": "somebody.Elses"}]  # type: ignore[assignment]
    cfg = OmegaConf.create(old)
    plain: Any = OmegaConf.to_container(current_targets(cfg), resolve=True)
    assert plain["hardware"] == plain["again"] == {"_target_": "pl_sparse.export.hardware.Hardware"}
    names = [node["_target_"] for node in plain["callbacks"]]
    assert names == ["pl_sparse.callbacks.Track", "somebody.Elses"]
    assert cfg.hardware._target_ == "pl_sparse.hardware.Hardware"  # a copy was renamed
    current_targets(cfg)
    announced = capsys.readouterr().err.splitlines()
    assert len(announced) == 2
    assert announced[0].startswith("pl_sparse.hardware.Hardware is called pl_sparse.export.hardware.Hardware now")


def test_a_name_without_a_successor_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TARGETS, "pl_sparse.masking.Hard", "pl_sparse.masking.Harder")
    cfg = OmegaConf.create({"masking": {"_target_": "pl_sparse.masking.Hard"}})
    assert current_targets(cfg) == cfg and capsys.readouterr().err == ""


def test_old_options_are_renamed_in_sweeps_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masking").mkdir()
    monkeypatch.setattr(aliases, "CONF", tmp_path)
    asked = ["-m", "masking=hard,shrunk", "+masking='shrunk'", "masking=choice(shrunk,ste)", "sparsity=0.5"]
    others = ["model=shrunk", "masking=unshrunk", "masking=my/shrunk", "masking._target_=shrunk"]
    assert current_options(asked + others) == asked + others  # there is no such option yet
    (tmp_path / "masking" / "softthresholded.yaml").touch()
    assert current_options(asked) == [argument.replace("shrunk", "softthresholded") for argument in asked]
    assert current_options(others) == others
    assert capsys.readouterr().err.count("masking=shrunk is called masking=softthresholded now") == 1


def test_the_masking_of_soft_thresholds_is_found_by_its_old_name() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = current_targets(hydra.compose("train", current_options(["masking=shrunk"])))
    assert resolve_name(cfg.masking._target_) is resolve_name(aliases._current_target("pl_sparse.masking.Shrunk"))


def test_hydra_finds_its_callbacks_by_their_old_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    names = {"overview": "pl_sparse.hooks.Overview", "sweep": "pl_sparse.sweep.monitor.Sweep"}
    lines = [f"    {key}: {{_target_: {name}}}" for key, name in names.items()]
    own = "\n".join(["# @package _global_", "hydra:", "  callbacks:", *lines])
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(own)
    tiny = ["data.limit=128", "trainer.max_epochs=1", "trainer.accelerator=cpu", "threads=1"]
    sweep = [f"hydra.searchpath=[{tmp_path / 'conf'}]", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command(monkeypatch, "sweep", "experiment=own", "sparsity=0.5,0.9", *tiny, *sweep)
    printed = capsys.readouterr()
    assert "2 of 2 runs finished" in printed.out and (tmp_path / "sweep" / "pareto.html").is_file()
    assert all(f"{name} is called pl_sparse.app.sweep" in printed.err for name in names.values())


def test_movement_of_an_old_run_stays_equation_3() -> None:
    scorer = {"_target_": "pl_sparse.scorer.Movement", "lr": 1.0}
    old, new = ({"misfit": "error", **more, "scorer": dict(scorer)} for more in ({}, {"frozen": "skip"}))
    assert current_targets(OmegaConf.create(old)).scorer.rule == "sum"
    assert "rule" not in current_targets(OmegaConf.create(new)).scorer
