"""Sweeps: what is done is not repeated, what is common is trained once, and no run takes another down."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from pl_sparse import app
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep import launch
from pl_sparse.app.sweep.monitor import statuses
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.schedule import Tickets

ROOT = Path(__file__).parent.parent
TINY = ["data.limit=128", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]


def ordered(*arguments: str) -> list[str]:
    flags = [argument for argument in arguments if argument.startswith("-")]
    return [*flags, *TINY, *(argument for argument in arguments if argument not in flags)]


def command(*arguments: str) -> int:
    """`python train.py`, in this process; its exit code."""
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["train.py", *ordered(*arguments)]
    GlobalHydra.instance().clear()
    try:
        app.main()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    figures = [json.loads((run / "metrics.json").read_text()) | {"train_seconds": 0} for run in (a, b)]
    return all(torch.equal(one[name], two[name]) for name in two) and figures[0] == figures[1]


def steps(sweep: Path) -> tuple[int, int]:
    """Optimizer steps that were trained, and that the runs have."""
    found = statuses(sweep).values()
    assert all(s["steps_trained"] + s["steps_shared"] == s["step"] == s["total"] for s in found)
    return sum(s["steps_trained"] for s in found), sum(s["step"] for s in found)


def test_a_failure_ends_one_run_alone_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["-m", "sparsity=0.5,1.7,0.9", "trainer.max_epochs=2"]
    assert command(*asked) == 1
    (sweep,) = tmp_path.glob("outputs/*/*")
    assert {run: status["state"] for run, status in statuses(sweep).items()} == {
        "0": "finished", "1": "failed", "2": "finished",
    }  # fmt: skip
    failed = read_status(sweep / "1")
    assert failed is not None and failed["error"] == "ConfigError: sparsity=1.7 must be in [0, 1]"
    told = capsys.readouterr().out
    assert "2 of 3 runs finished" in told and "1 failed: ConfigError: sparsity=1.7" in told and "epoch 1/2" not in told
    assert "epoch 2/2" in (sweep / "0" / "run.log").read_text()

    # the same settings find the same sweep; what is done is not touched, whatever its number is now
    times = {run: (sweep / run / "metrics.json").stat().st_mtime_ns for run in ("0", "2")}
    assert command("-m", "sparsity=0.5,1.7,0.9", "trainer.max_epochs=2", "resume=true") == 1
    assert "continuing the sweep" in capsys.readouterr().out
    assert (
        command("-m", "sparsity=0.9,0.5,0.8", "trainer.max_epochs=2", "resume=true", f"hydra.sweep.dir={sweep}") == 1
    )  # the failed one is still listed
    assert {run: (sweep / run / "metrics.json").stat().st_mtime_ns for run in ("0", "2")} == times
    assert json.loads((sweep / "2" / "metrics.json").read_text())["sparsity"] == 0.9
    new = [run for run in statuses(sweep) if run not in ("0", "1", "2")]
    assert len(new) == 1 and json.loads((sweep / new[0] / "metrics.json").read_text())["sparsity"] == 0.8
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1


def test_a_dense_start_is_trained_once_bit_for_bit(tmp_path: Path) -> None:
    levels = ["0.5", "0.6", "0.7", "0.8", "0.85", "0.9", "0.95", "0.98"]
    asked = ["model=lenet300", "schedule.begin=0.5", "schedule.every=1", "trainer.max_epochs=4"]
    assert command("-m", f"sparsity={','.join(levels)}", *asked, f"hydra.sweep.dir={tmp_path / 'shared'}") == 0
    trained, every = steps(tmp_path / "shared")
    assert trained == every * (1 + 8) / 16 <= 0.6 * every

    # another structure shares it as well; a scorer that looks at gradients from the start does not
    others = ["structure=nm24", "scorer=taylor"]
    for i, other in enumerate(others):
        shared, alone = tmp_path / "shared" / f"more{i}", tmp_path / f"alone{i}"
        cache = f"prefix_cache={tmp_path / 'shared' / 'prefixes'}"
        assert command(*asked, other, "sparsity=0.5", cache, f"hydra.run.dir={shared}") == 0
        assert command(*asked, other, "sparsity=0.5", f"hydra.run.dir={alone}") == 0
        assert same(shared, alone)
        status = read_status(shared)
        assert status is not None and status["steps_shared"] == (4 if i == 0 else 0)
    assert command(*asked, "sparsity=0.98", f"hydra.run.dir={tmp_path / 'alone'}") == 0
    assert same(tmp_path / "shared" / "7", tmp_path / "alone")
    assert not (tmp_path / "shared" / "7" / "checkpoints" / "prefix.ckpt").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_start_is_trained_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    asked = ["schedule.begin=0.5", "trainer.max_epochs=2", f"prefix_cache={tmp_path / 'prefixes'}"]
    assert command(*asked, f"hydra.run.dir={tmp_path / 'first'}") == 0
    (state,) = tmp_path.glob("prefixes/*/state.ckpt")
    data = bytearray(state.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    state.write_bytes(data[:middle] if damage == "cut" else data)
    assert command(*asked, "sparsity=0.5", f"hydra.run.dir={tmp_path / 'second'}") == 0
    assert "state.ckpt is damaged: its 1 epochs are trained again" in capsys.readouterr().out
    assert command(*asked, "sparsity=0.8", f"hydra.run.dir={tmp_path / 'third'}") == 0
    assert (read_status(tmp_path / "third") or {})["steps_shared"] > 0
    assert command(*asked[:2], "sparsity=0.8", f"hydra.run.dir={tmp_path / 'alone'}") == 0
    assert same(tmp_path / "third", tmp_path / "alone")


def test_a_finished_run_or_sweep_that_is_resumed_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["trainer.max_epochs=1", "resume=true"]
    for arguments, where in (([], "hydra.run.dir"), (["-m", "sparsity=0.5,0.8"], "hydra.sweep.dir")):
        folder = tmp_path / where
        assert command(*arguments, *asked, f"{where}={folder}") == 0
        assert "nothing was to be done" not in capsys.readouterr().out
        assert command(*arguments, *asked, f"{where}={folder}") == 0
        assert "nothing was to be done" in capsys.readouterr().out


def test_runs_of_a_sweep_do_not_replace_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["-m", "sparsity=0.5,0.9", "data.limit=64", "trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}"]
    assert command(*asked, "hydra.sweep.subdir=one") == 1
    told = capsys.readouterr()
    assert "holds another run of this sweep" in told.out + told.err
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["sparsity"] == pytest.approx(0.5, abs=1e-3)
    again = [argument.replace("0.5,0.9", "0.9") for argument in asked]
    assert command(*again, "hydra.sweep.subdir=one", "overwrite=true") == 0  # another sweep may have the folder


def test_rounds_of_lottery_tickets_are_trained_once_bit_for_bit(tmp_path: Path) -> None:
    levels = [round(1 - 0.8**k, 12) for k in range(1, 9)]
    asked = ["method=lth", "allocation=uniform", "schedule.epochs=1", "data.limit=64"]
    sweep = tmp_path / "shared"
    assert command("-m", *asked, f"sparsity={','.join(map(str, levels))}", f"hydra.sweep.dir={sweep}") == 0
    trained, every = steps(sweep)
    assert (trained, every) == (9, 44) and trained <= 0.3 * every
    assert command(*asked, f"sparsity={levels[7]}", f"hydra.run.dir={tmp_path / 'alone'}") == 0
    assert same(sweep / "7", tmp_path / "alone")
    for name in ("tickets.csv", "levels/level_03/ticket.safetensors"):
        assert (sweep / "7" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert Tickets(final=0.36, epochs=5, to=0.2).training_epochs == 5 + 2 * 4
    with pytest.raises(ValueError, match="a whole number"):
        Tickets(final=0.36, epochs=5, to=0.3)


@pytest.mark.parametrize("asked", [["schedule=cubic"], ["method=lth", "sparsity=0.36", "schedule.epochs=2"]])
def test_a_run_that_is_killed_after_its_training_is_not_trained_again(tmp_path: Path, asked: list[str]) -> None:
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        assert command(*asked, "trainer.max_epochs=6", f"hydra.run.dir={run}") == 0
    for name in ("metrics.json", "model.safetensors"):
        (runs[1] / name).unlink()
    trained = (read_status(runs[1]) or {})["steps_trained"]
    assert command(*asked, "trainer.max_epochs=6", f"hydra.run.dir={runs[1]}", "resume=true") == 0
    assert same(*runs)
    assert (read_status(runs[1]) or {})["steps_trained"] == trained
    if "method=lth" in asked:
        assert (runs[0] / "tickets.csv").read_bytes() == (runs[1] / "tickets.csv").read_bytes()


def test_one_run_gives_the_front(tmp_path: Path) -> None:
    asked = ["schedule=staircase", "levels=[0.5,0.8,0.9]", "front=true", "trainer.max_epochs=8", "schedule.begin=0.25"]
    assert command(*asked, f"hydra.run.dir={tmp_path}") == 0
    rows = json.loads((tmp_path / "front.json").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["sparsity"] for row in rows] == [0, 0.5, 0.8, 0.9]  # before the first step it is dense
    assert [row["steps"] for row in rows] == [4, 8, 12, 16] and set(metrics) <= {*rows[0], "train/loss", "train/acc"}
    for level, row in enumerate(rows):
        folder = tmp_path / "levels" / f"level_{level:02d}"
        tensors = weights(folder)
        zeros = sum(int((tensors[f"fc{i}.weight"] == 0).sum()) for i in (1, 2, 3))
        assert zeros == round(50_200 * row["sparsity"]) and row["macs_sparse"] == 50_200 - zeros
        saved = torch.load(folder / "level.ckpt", weights_only=True)
        assert torch.equal(saved["state_dict"]["net.fc1.weight"], tensors["fc1.weight"])
        from pl_sparse.tasks.data import Digits
        from pl_sparse.tasks.models import lenet300

        net = lenet300(shape=(1, 8, 8), classes=10)
        net.load_state_dict(tensors)
        for loader, name in ((Digits().val_dataloader(), "val/acc"), (Digits().test_dataloader(), "test/acc")):
            hits = net(loader.x).argmax(1) == loader.y
            assert float(hits.float().mean()) == pytest.approx(row[name])


def test_a_front_needs_levels_that_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("front=true", f"hydra.run.dir={tmp_path}") == 2
    assert "cubic does not: use schedule=staircase" in capsys.readouterr().err
    assert command("levels=[0.5,0.9]", f"hydra.run.dir={tmp_path}") == 2
    assert "levels=... needs schedule=staircase" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # this version of optuna calls names that its libraries have moved
def test_a_search_with_two_objectives_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")

    asked = ["-m", "hydra/sweeper=optuna", "sparsity=interval(0.5,0.95)", "scorer=magnitude,random"]
    asked += ["trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}", "hydra.sweeper.sampler.seed=0"]
    assert command(*asked, "hydra.sweeper.n_trials=2") == 0
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.load_study(study_name="pl_sparse", storage=storage)
    lost = study.ask()  # as a killed process leaves it
    for name, distribution in study.trials[0].distributions.items():
        lost._suggest(name, distribution)
    assert command(*asked, "hydra.sweeper.n_trials=3", "resume=true") == 0
    study = optuna.load_study(study_name="pl_sparse", storage=storage)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) == 3 and done[-1].params == lost.params
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.json")]
    assert sorted(tuple(trial.values) for trial in done) == sorted(
        (row["val/acc"], 1 - row["sparsity"]) for row in found
    )
    assert (tmp_path / "optimization_results.yaml").is_file()

    assert command(*asked, "objectives=[val/acc]") == 2
    assert "a direction for each objective" in capsys.readouterr().err


def test_a_plugin_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    for choice, extra in (("launcher=joblib", "sweep"), ("launcher=ray", "ray"), ("launcher=submitit_slurm", "slurm")):
        with pytest.raises(ImportError, match=rf"pip install 'pl_sparse\[{extra}\]'"):
            launch.arguments(["-m", f"hydra/{choice}"])


def test_an_objective_that_is_no_metric_is_told() -> None:
    from pl_sparse.app.sweep.job import metric

    metrics: dict[str, Any] = {"sparsity": 0.9, "val/acc": 0.5, "size_bytes": {"compressed": 10}}
    assert metric(metrics, "density") == pytest.approx(0.1) and metric(metrics, "size") == 10
    with pytest.raises(ConfigError, match=r"no metric 'val/ac'\. Did you mean 'val/acc'"):
        metric(metrics, "val/ac")


# Processes


def start(sweep: Path, *arguments: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(ROOT / "train.py"), *ordered("-m", *arguments, f"hydra.sweep.dir={sweep}")]
    with open(sweep.parent / "out.txt", "ab") as out:
        return subprocess.Popen(line, cwd=sweep.parent, stdout=out, stderr=out, start_new_session=True)


def begun(sweep: Path) -> int:
    """Runs that have a checkpoint to go on from, or are done."""
    return len(list(sweep.glob("*/checkpoints/last.ckpt")))


def check_kills(tmp_path: Path, arguments: list[str], runs: int, moments: list[int], launcher: list[str]) -> None:
    assert command("-m", *arguments, f"hydra.sweep.dir={tmp_path / 'whole'}") == 0
    sweep = tmp_path / "killed"
    for moment in moments:
        process = start(sweep, *arguments, *launcher, "resume=true")
        while begun(sweep) < moment and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.random())
        with suppress(ProcessLookupError):  # it was faster
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
    done = {path.parent.name: path.stat().st_mtime_ns for path in sweep.glob("*/metrics.json")}
    assert start(sweep, *arguments, *launcher, "resume=true").wait(600) == 0, (tmp_path / "out.txt").read_text()
    found = statuses(sweep)
    assert len(found) == runs and all(status["state"] == "finished" for status in found.values())
    assert all((sweep / run / "metrics.json").stat().st_mtime_ns == at for run, at in done.items())
    for run in found:
        assert same(tmp_path / "whole" / run, sweep / run), run
    # nothing was begun again that had a checkpoint: only an epoch can be lost with each kill
    for run in found:
        first = (sweep / run / "run.log").read_text().count("epoch 1/")
        assert first <= 1, run


def test_a_killed_sweep_ends_with_the_same_results(tmp_path: Path) -> None:
    asked = ["sparsity=0.5,0.9", "trainer.max_epochs=6", "schedule.begin=0.34", "data.limit=640"]
    check_kills(tmp_path, asked, runs=2, moments=[random.choice([1, 2])], launcher=[])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]])
def test_a_sweep_of_twelve_killed_three_times(tmp_path: Path, launcher: list[str]) -> None:
    asked = ["sparsity=0.5,0.8,0.9", "seed=0,1", "scorer=magnitude,movement", "trainer.max_epochs=6"]
    asked += ["schedule.begin=0.34", "data.limit=640", "threads=1"]
    check_kills(tmp_path, asked, runs=12, moments=sorted(random.sample(range(1, 9), 3)), launcher=launcher)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray", "submitit_local"])
def test_launchers(tmp_path: Path, launcher: str) -> None:
    sweep = tmp_path / "sweep"
    asked = [f"hydra/launcher={launcher}", "sparsity=0.5,1.7,0.9", "schedule.begin=0.5", "trainer.max_epochs=2"]
    assert start(sweep, *asked).wait(300) == 1, (tmp_path / "out.txt").read_text()
    assert [status["state"] for status in statuses(sweep).values()] == ["finished", "failed", "finished"]
    good = [status for status in statuses(sweep).values() if status["state"] == "finished"]
    assert sum(s["steps_shared"] for s in good) == 2  # one of them waited for the other
    assert sum(s["steps_trained"] for s in good) == 6
    assert "2 of 3 runs finished" in (tmp_path / "out.txt").read_text()


@pytest.mark.slow
def test_trainings_of_two_processes_in_a_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    asked = ["trainer=ddp_cpu", "sparsity=0.5,0.9", "trainer.max_epochs=2"]
    assert start(sweep, *asked).wait(300) == 0, (tmp_path / "out.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "out.txt"}
    assert {path.name for path in sweep.iterdir() if not path.name.startswith("pareto.")} == {
        "0", "1", "multirun.yaml", "sweep.json",
    }  # fmt: skip
    for run, sparsity in (("0", 0.5), ("1", 0.9)):
        assert {path.name for path in (sweep / run).iterdir()} == {
            ".hydra", "checkpoints", "config.yaml", "history.csv", "layers.csv", "layers.png", "metrics.json",
            "model.safetensors", "run.log", "status.json", "training.png",
        }  # fmt: skip
        assert json.loads((sweep / run / "metrics.json").read_text())["sparsity"] == sparsity
        assert (sweep / run / "run.log").read_text().count("epoch 2/2") == 1


@pytest.mark.slow
def test_a_process_that_dies_takes_its_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "sweep"
    (tmp_path / "dies.py").write_text(DIES)
    asked = ["trainer=ddp_cpu", "sparsity=0.5,0.9", "trainer.max_epochs=2", "+callbacks.dies._target_=dies.Dies"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert start(sweep, *asked).wait(300) == 1, (tmp_path / "out.txt").read_text()
    assert [status["state"] for status in statuses(sweep).values()] == ["failed", "finished"]


DIES = """
import os
from lightning.pytorch import Callback
from pl_sparse import Sparsity
class Dies(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.global_rank == 1 and Sparsity.of(trainer).pruner.schedule.final == 0.5:
            os._exit(3)
"""
