"""Real signals to real processes, and full disks: runs end as asked, and go on to the same end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_sweep import command

from pl_sparse.app.ends import EndedError, Interrupted, asked, explained, how_to_go_on, signals
from pl_sparse.core.files import replacing
from pl_sparse.core.optional import nice_to_have

ROOT = Path(__file__).parent.parent
KILL = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--only", "magnitude", "--seed", "0"]


def kill(folder: Path, *options: str) -> list[dict[str, object]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*KILL, "--out", str(folder), *options], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "0" / "kills.jsonl").read_text().splitlines()]
    assert all(not row["differs"] for row in rows) and "| **all** |" in done.stdout
    return rows


@pytest.mark.timeout(600)
def test_each_signal_ends_a_run_that_goes_on_to_the_same_end(tmp_path: Path) -> None:
    rows = kill(tmp_path, "--kills", "4", "--most", "1", "--full", "0")
    assert [row["signal"] for row in rows if not row["late"]] == ["INT", "TERM", "HUP", "KILL"]


@pytest.mark.skipif(sys.platform != "linux", reason="a process of another system does not hear of its parent")
def test_a_further_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SPARSE_STARTED_BY", str(os.getpid()))  # of a training around it, which started another
    waits = "import time; from pl_sparse.app.ends import end_with_parent; end_with_parent(); print(1, flush=True)"
    child = f"[sys.executable, '-c', {waits + '; time.sleep(90)'!r}], env={{**os.environ, 'LOCAL_RANK': '1'}}"
    code = f"import os, subprocess, sys; child = subprocess.Popen({child}); print(child.pid, flush=True); child.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        number, one = int(parent.stdout.readline()), parent.stdout.readline()
        assert one.strip() == "1" and runs(number)
        parent.kill()
    until = time.monotonic() + 30
    while time.monotonic() < until and runs(number):
        time.sleep(0.05)
    assert not runs(number)


def runs(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_to_the_same_end(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.kill import can_mount

    if not can_mount():
        pytest.skip("a tmpfs can be mounted by root alone")
    rows = kill(tmp_path, "--kills", "4", "--full", "1")
    assert {row["signal"] for row in rows} == {"full"} and any(row["code"] == 1 for row in rows)


SWEEP = """
import os, signal
from lightning.pytorch import Callback
class Ends(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.timeout(600)
def test_a_sweep_that_is_ended_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(SWEEP)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    asked = ["-m", "sparsity=0.5,0.9", "data.limit=128", "trainer.max_epochs=3", "hydra.sweep.dir=s"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *asked, "+callbacks.ends._target_=ends.Ends"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 143 and "interrupted by SIGTERM" in done.stderr and "Traceback" not in done.stderr
    assert "-m sparsity=0.5,0.9" in done.stderr and done.stderr.rstrip().endswith("resume=true")
    assert json.loads((tmp_path / "s" / "0" / "status.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "s" / "1").exists()


def test_what_is_said_of_a_signal(tmp_path: Path) -> None:
    end = Interrupted(signal.SIGHUP, tmp_path)
    assert "the same command" in how_to_go_on(end, [], sweep=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert how_to_go_on(end, [], sweep=False).endswith(f" ckpt_path={tmp_path}/checkpoints/last.ckpt")


def test_whatever_lightning_makes_of_a_signal_is_one() -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    for raised, number in ((SIGTERMException(), 15), (KeyboardInterrupt(), 2)):
        with pytest.raises(Interrupted) as caught, explained(Path(), torch.nn.Linear(1, 1)):
            raise raised
        assert caught.value.number == number
    with pytest.raises(Interrupted) as caught, explained(Path(), torch.nn.Linear(1, 1)):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    assert caught.value.number == 2
    with pytest.raises(SystemExit, match="3"), explained(Path(), torch.nn.Linear(1, 1)):
        sys.exit(3)


def test_an_error_that_a_library_makes_of_a_signal_is_the_signal(tmp_path: Path) -> None:
    for within in (False, True):
        with pytest.raises(Interrupted) as caught, signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except KeyboardInterrupt:
                if not within:
                    raise ValueError("cannot be composed") from None
                with explained(tmp_path, torch.nn.Linear(1, 1)):
                    raise ValueError("cannot be trained") from None
        assert caught.value.number == signal.SIGTERM and asked() is None
        assert caught.value.folder == (tmp_path if within else None)
    with pytest.raises(ValueError, match="no signal"), signals():
        raise ValueError("no signal")


LOADING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{})
    time.sleep(5)
except BaseException:
    pass
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", [["train.py"], ["-m", "pl_sparse", "train"], ["-m", "pl_sparse", "export", "x"]])
def test_a_signal_while_libraries_are_imported_is_a_line(tmp_path: Path, command: list[str], name: str) -> None:
    (tmp_path / "torch.py").write_text(LOADING.format(name))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONSAFEPATH": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs behind
    )  # fmt: skip
    assert done.returncode == 128 + signal.Signals[name]
    assert done.stderr == f"interrupted by {name} before anything was done\n"


def test_a_run_that_ended_in_its_first_epoch_starts_again_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked_for = ["data.limit=128", "trainer.max_epochs=1", f"hydra.run.dir={folder}"]
    assert command(*asked_for) == 0
    for name in ("metrics.json", "checkpoints/last.ckpt"):  # as a full disk or a kill leaves it
        (folder / name).unlink()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert command(*asked_for, "sparsity=0.5") == 2  # another run
    assert command(*asked_for) == 0
    assert (folder / "metrics.json").is_file() and not list(folder.glob(".replaced*"))
    assert command(*asked_for) == 2  # it is finished


def test_a_full_disk_is_two_lines(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EndedError, match=f"the disk is full: {tmp_path}/a could not be written") as ended:  # noqa: SIM117
        with explained(tmp_path, torch.nn.Linear(1, 1)), nice_to_have("a picture"), replacing(tmp_path / "a"):
            raise full
    assert len(str(ended.value).splitlines()) == 2 and not list(tmp_path.iterdir())
