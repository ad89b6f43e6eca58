"""A run's folder: one run, one process, what it wrote; and checkpoints that say what they were trained with."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from test_app import config
from test_sweep import command

from pl_sparse.app.ends import EndedError
from pl_sparse.app.folder import FolderError, lock, unlock
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.core.files import read_yaml, remove_temporaries, replacing, write_text
from pl_sparse.core.ledger import Ledger
from pl_sparse.results.runs import gather

ONE = "trainer.max_epochs=1"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run by the command, in `output_dir`."""
    folder = tmp_path_factory.mktemp("runs") / "a b"
    assert command(f"output_dir='{folder}'", "sparsity=0.5", ONE) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_all_of_a_run_is_in_its_output_dir(run: Path) -> None:
    assert {".hydra/overrides.yaml", "metrics.json", "checkpoints/last.ckpt"} <= names(run)
    assert set(run.parent.iterdir()) == {run}
    assert {stat.S_IMODE((run / name).stat().st_mode) for name in names(run)} == {
        stat.S_IMODE((run / "status.json").stat().st_mode)
    }


def test_a_folder_with_another_run_is_refused_and_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    for more in ([], ["sparsity=0.9", "resume=true"]):
        assert command(f"output_dir='{run}'", "sparsity=0.5", ONE, *more) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and "overwrite=true" in lines[1] and str(run) in lines[0]
    assert command(f"output_dir='{run}'", f"hydra.run.dir='{run}/else'") == 2
    assert "two folders" in capsys.readouterr().err
    assert contents(run) == before


def test_other_settings_are_refused_with_the_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    asked = f"ckpt_path='{run}/checkpoints/last.ckpt'"
    assert command(asked, "scorer=random", "model=lenet5", "trainer.max_epochs=2") == 2
    told = capsys.readouterr().err
    assert (
        "scorer._target_=Magnitude there, Random here" in told and "model._target_=lenet300 there, lenet5 here" in told
    )
    assert "max_epochs" not in told and "resume_with=changed" in told and len(told.splitlines()) == 2
    assert command(asked, "trainer.devices=0") == 2  # refused later, by the Trainer
    assert contents(run) == before


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_changed_settings_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    asked = [f"ckpt_path='{run}/checkpoints/last.ckpt'", f"output_dir={tmp_path}/b", "trainer.max_epochs=2"]
    assert command(*asked, "sparsity=0.6") == 2
    assert not (tmp_path / "b").exists()
    assert command(*asked, "sparsity=0.6", "resume_with=changed") == 0
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["sparsity_requested"] == 0.6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "it is damaged"),
        (lambda content: b"", "it is damaged"),
        (lambda content: b"no checkpoint at all", "it is not a checkpoint of torch"),
        (lambda content: content[:90_000] + bytes([content[90_000] ^ 1]) + content[90_001:], "its checksums"),
    ],
)
def test_damaged_checkpoints_are_two_lines(run: Path, tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_text(path.with_name("best.ckpt"), "")
    path.write_bytes(damage((run / "checkpoints" / "last.ckpt").read_bytes()))
    with pytest.raises(ConfigError, match=message) as refused:
        train(config(tmp_path / "new", f"ckpt_path={path}"))
    assert len(str(refused.value).splitlines()) == 2 and "best.ckpt is beside it" in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_foreign_checkpoints_are_two_lines(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    torch.save({"state_dict": {}, "loops": {}, "optimizer_states": []}, tmp_path / "plain.ckpt")
    for name, message in (
        ("weights", "it lacks loops, optimizer_states"),
        ("plain", "lacks the settings of its training"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            train(config(tmp_path / "new", f"ckpt_path={tmp_path / name}.ckpt"))
        assert len(str(refused.value).splitlines()) == 2
    assert not (tmp_path / "new").exists()


def test_overwrite_clears_what_the_run_wrote_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    mine = {"notes.txt", "checkpoints/mine.txt", "tickets.csv", "layers.csv"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "layers.csv").unlink()
    train(config(tmp_path, ONE, "export=[csr]", "logger=csv", "method=lth", "sparsity=0.2", "schedule.epochs=1"))
    (tmp_path / "later.txt").write_text("mine")
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"sparsity=1\.5"):
        train(config(tmp_path, "overwrite=true", "sparsity=1.5"))
    assert (tmp_path / "metrics.json").is_file() and (tmp_path / "csv").is_dir()  # it was refused, and changed nothing
    train(config(tmp_path, ONE, "overwrite=true"))
    assert {"notes.txt", "checkpoints/mine.txt", "later.txt"} <= names(tmp_path)
    assert not {"csv", "model_csr.safetensors", "tickets.png", "levels"} & set(os.listdir(tmp_path))
    listed = capsys.readouterr().out.partition("written to")[2]
    assert "layers.csv" in listed and "tickets" not in listed
    assert not [name for name in names(tmp_path) if "/." in f"/{name}"]


def test_what_is_refused_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for refused in (["sparsity=1.5"], ["trainer.devices=0"], ["quantization=int8", "quantization.begin=1.0"]):
        assert command(*refused) == 2
        assert command(*refused, "output_dir=deep/er") == 2
    assert command("-m", "sparsity=0.5,0.9", "output_dir=x") == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    assert command("sparsity=1.5", "output_dir=there") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


LOCKED = """
import sys
from filelock import FileLock
held = FileLock(sys.argv[1] + "/.lock")
held.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    with process.stdout, process.stdin:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderError, match=r"another process writes into .*output_dir="):
            train(config(tmp_path, ONE))
        assert not (tmp_path / "status.json").exists()
        process.kill()
        process.wait()
    unlock(lock(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_temporaries_of_killed_writes_are_removed_at_resume(run: Path, tmp_path: Path) -> None:
    asked = [f"ckpt_path={tmp_path}/checkpoints/last.ckpt", f"output_dir={tmp_path}", "sparsity=0.5"]
    for name, content in contents(run).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    left = tmp_path / "checkpoints" / f".last.{'0a' * 16}"
    left.mkdir()
    (left / "last.ckpt").write_bytes(b"half")
    (tmp_path / f".metrics.{'0a' * 16}.json").write_text("{")
    (tmp_path / ".mine.json").write_text("{}")
    train(config(tmp_path, *asked, "trainer.max_epochs=2", "data.limit=128"))
    assert {name for name in names(tmp_path) if "/." in f"/{name}" and ".hydra" not in name} == {".mine.json"}


def test_replacing_gives_every_file_the_mode_of_a_new_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "b") as temporary:
        raise KeyboardInterrupt
    remove_temporaries(tmp_path)
    assert names(tmp_path) == {"a.safetensors", "plain"}


def test_a_ledger_touches_nothing_outside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a").write_text("")
    (inside / "link").symlink_to(outside)
    Ledger(inside, ["../out/a", str(outside / "a"), "link/a", "link", ".", "a"]).clear()
    assert names(outside) == {"a"} and not list(inside.iterdir())


class Diverges(Callback):
    """Makes a weight infinite in the third epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 2:
            next(pl_module.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("settings", [["sparsity=0"], ["schedule.every=1"]])
def test_divergence_is_two_lines_and_nothing_is_lost(tmp_path: Path, settings: list[str]) -> None:
    with pytest.raises(EndedError, match=r"training diverged in epoch 3: net\.fc1\.weight holds NaN") as ended:
        train(config(tmp_path, *settings, "+callbacks.x._target_=test_folder.Diverges"))
    assert len(str(ended.value).splitlines()) == 2 and "optimizer.lr" in str(ended.value)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1 and all(value.isfinite().all() for value in saved["state_dict"].values())
    status = read_status(tmp_path)
    assert status is not None and status["state"] == "failed" and "diverged" in status["error"]


# Reading runs of others


BOMB = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{p: *{a}, q: *{a}, r: *{a}}}\n" for a, b in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize("text", [BOMB, "[" * 100_000, "a: " + "x" * (5 << 20)])
def test_yaml_bombs_are_broken_runs(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "bad" / "config.yaml", text)
    write_text(tmp_path / "bad" / "metrics.json", "{}")
    write_text(tmp_path / "deep" / "metrics.json", "[" * 100_000)
    write_text(tmp_path / "list" / "status.json", "[]")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_yaml(tmp_path / "bad" / "config.yaml")
    assert [run.state for run in gather([tmp_path])] == ["failed"] * 3


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write_text(tmp_path / "secret" / "metrics.json", '{"sparsity": 0.1}')
    write_text(tmp_path / "runs" / "a" / "metrics.json", '{"sparsity": 0.5}')
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "secret")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "metrics.json").symlink_to(tmp_path / "secret" / "metrics.json")
    found = {run.folder.name: run.models for run in gather([tmp_path / "runs"])}
    assert found == {"a": [{"sparsity": 0.5}], "c": []}


def test_what_is_unfinished_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_pareto import made

    from pl_sparse.results.overview import overview

    made(tmp_path / "done")
    for i in range(3):
        write_text(tmp_path / f"bad{i}" / "status.json", '{"state": "failed", "error": "broken"}')
    overview([tmp_path], tmp_path)
    assert "3 failed: --unfinished lists them" in (told := capsys.readouterr().out) and "broken" not in told
    overview([tmp_path], tmp_path, others=True)
    assert capsys.readouterr().out.count("broken") == 3
