"""Runs that are killed at random moments, go on, and are compared with runs that nothing disturbed.

    python benchmarks/kill.py --kills 300 --seed 0 --configurations 30

A kill is a SIGINT, SIGTERM, SIGHUP or SIGKILL to a process that trains, or (as root) a file system that is full. The
run goes on by `ckpt_path=...`, `resume=true` or the same command, and may be killed again. At its end all of its files
have to be those of the undisturbed run: weights, masks, optimizer, tables and figures to the bit, times and paths
apart. What was done is in outputs/kill/<seed>/kills.jsonl, which the script continues, and the table in kills.md
beside it.

Runs are real processes, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
VIT = ["model=vit_tiny", "model.depth=1", "model.dim=32", "model.dropout=0.1"]
SHORT = ["data.limit=256", "trainer.max_epochs=6", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
CONFIGURATIONS: dict[str, list[str]] = {
    "magnitude": [],
    "lth": ["method=lth", "sparsity=0.36", "schedule.epochs=2"],
    "int8": ["quantization=int8", "quantization.begin=0.3", "model=lenet5"],
    "int4": ["quantization=int4_weight", "quantization.begin=0.3", *VIT],
    "rigl": ["method=rigl", "schedule.every=4"],
    "front": ["schedule=staircase", "levels=[0.5,0.8]", "front=true"],
    "shrink": ["structure=coupled", "allocation=uniform", "sparsity=0.5", "shrink_every=2"],
    "ema": ["callbacks=ema"],
    "movement": ["scorer=movement"],
    "accuracy_drop": ["target=accuracy_drop", "target.warmup=0.2"],
    "dropout": ["masking=ste", *VIT],
    "csr": ["export=[csr,safetensors]"],
    "l0": ["method=l0"],
    "str": ["method=str"],
    "soft_movement": ["method=soft_movement"],
    "set": ["method=set"],
    "sparse_momentum": ["method=sparse_momentum"],
    "topkast": ["method=topkast"],
    "dns": ["method=dns"],
    "acdc": ["method=acdc", "sparsity=0.7"],
    "snip": ["method=snip"],
    "grasp": ["method=grasp"],
    "synflow": ["method=synflow"],
    "imp": ["method=imp", "sparsity=0.7"],
    "taylor": ["method=taylor"],
    "srste": ["method=srste"],
    "nm24": ["structure=nm24", "optimizer=sgd"],
    "group_lasso": ["method=group_lasso"],
    "growing_l2": ["method=growing_l2", "sparsity=0.7"],
    "sparsegpt": ["method=sparsegpt"],
}
SIGNALS = {"INT": 130, "TERM": 143, "HUP": 129, "KILL": -9}
"""The signals, and the exit code of a run that each ends."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}(\.[^.]+)?|\.tmp.*")
_NOT_COMPARED = ("seconds", "train_seconds", "current_score")  # the last is one that ModelCheckpoint does not restore
_LAST = "checkpoints/last.ckpt"


# Processes


def prepare() -> None:
    """Import what runs need, so that forked processes have it."""
    import matplotlib
    import sklearn.datasets

    import pl_sparse.app
    import pl_sparse.app.command
    import pl_sparse.export
    import pl_sparse.results.figures  # noqa: F401

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    sklearn.datasets.load_digits()
    try:
        import torchao.quantization.pt2e.quantize_pt2e
        import torchao.quantization.qat  # noqa: F401
    except ImportError:
        pass


def start(folder: Path, arguments: Sequence[str], log: Path) -> int:
    """Fork a process that trains into a folder, and give its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder.parent)
        sys.argv = ["train.py", *arguments]
        from pl_sparse.app.command import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int, seconds: float | None = None) -> int | None:
    """The exit code of a process, minus the number of the signal that killed it; None if it still runs by then."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            return None
        time.sleep(0.01)


def trained(folder: Path, arguments: Sequence[str], log: Path) -> int:
    """The exit code of a run that nothing disturbs."""
    code = wait(start(folder, arguments, log))
    assert code is not None
    return code


# What has to be the same


def contents(folder: Path) -> dict[str, Any]:
    """What the files of a run hold, by name, without times, paths and how the run was run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if _TEMPORARY.fullmatch(path.name):
                found[name] = "left over"
            continue
        if name.startswith(".hydra/"):
            continue
        mode = path.stat().st_mode & 0o777
        found[name] = (mode, _content(path, folder))
    return found


def _content(path: Path, folder: Path) -> Any:
    if path.name == "status.json":
        status = json.loads(path.read_text())
        return {
            key: status[key] for key in ("state", "error", "step", "total", "sparsity", "accuracy", "config", "files")
        }
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()), folder)
    if path.suffix == ".csv":
        with open(path) as file:
            return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    if path.suffix == ".yaml":
        settings = yaml.safe_load(path.read_text())
        return _timeless(
            {key: settings[key] for key in settings.keys() - {"ckpt_path", "trust", "resume", "output_dir"}}, folder
        )
    if path.suffix == ".ckpt":
        return _timeless(torch.load(path, weights_only=True), folder)
    return path.read_bytes()


def _timeless(value: Any, folder: Path) -> Any:
    """A copy of nested values that can be compared, without times and with paths below the folder."""
    if isinstance(value, dict):
        return {
            _below(str(key), folder): _timeless(part, folder) for key, part in value.items() if key not in _NOT_COMPARED
        }
    if isinstance(value, (list, tuple)):
        return [_timeless(part, folder) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, str):
        return _below(value, folder)
    return repr(value) if isinstance(value, float) else value


def _below(text: str, folder: Path) -> str:
    """A text with paths from the folder."""
    text = text.replace(str(folder), ".")
    return f".{text.removeprefix(folder.name)}" if text.startswith(f"{folder.name}/") or text == folder.name else text


def compared(whole: Path, killed: Path) -> list[str]:
    """Where the files of two runs differ."""
    one, two = contents(whole), contents(killed)
    return [place for name in sorted({*one, *two}) for place in _places(one.get(name), two.get(name), name)]


def _places(one: Any, two: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}):
            yield from _places(one.get(key), two.get(key), f"{where}:{key}")
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from _places(a, b, f"{where}:{index}")
    elif one != two:
        yield where if isinstance(one, bytes) or isinstance(two, bytes) else f"{where} ({one!r:.60} -> {two!r:.60})"


# Kills


def killed(
    name: str, draw: random.Random, work: Path, whole: Path, seconds: float, most: int, done: int
) -> list[dict[str, Any]]:
    """Kill a run up to so often, let it end, and compare it; a row a kill, the last of which has what differs.

    Args:
        seconds: that the undisturbed run took.
        done: kills that were done before: the signals come in turns.
    """
    folder, log = work / f"{name}-killed", work / f"{name}-killed.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    asked = [*SHORT, *CONFIGURATIONS[name], f"output_dir={folder.name}"]
    command, rows = asked, []
    for turn in range(done, done + draw.randint(1, most)):
        kind = list(SIGNALS)[turn % len(SIGNALS)]
        process = start(folder, command, log)
        code = wait(process, draw.uniform(0, seconds * (1 - 0.7 * _progress(folder))))
        late = code is not None
        if not late:
            os.kill(process, signal.Signals[f"SIG{kind}"])
            code = wait(process, 120)
        faults = [] if late and code == 0 else _faults(kind, code, folder, process)
        rows.append({"configuration": name, "signal": kind, "code": code, "late": late, "differs": faults})
        if late:
            break
        last = folder / _LAST
        ways = [[*asked, "resume=true"], [f"ckpt_path={folder.name}/{_LAST}"]] if last.is_file() else [asked]
        command = draw.choice(ways)
    if not (rows[-1]["late"] and rows[-1]["code"] == 0):
        code = trained(folder, command, log)
        if code:
            rows[-1]["differs"] += [f"it resumed with exit code {code}: {_tail(log)}"]
    rows[-1]["differs"] += compared(whole, folder)
    return rows


def _progress(folder: Path) -> float:
    """The part of training that a run has behind it: one that goes on takes less time."""
    path = folder / "status.json"
    if not (folder / _LAST).is_file() or not path.is_file():
        return 0.0
    status = json.loads(path.read_text())
    return float(min(status["step"] / status["total"], 1)) if status.get("total") else 0.0


def _faults(kind: str, code: int | None, folder: Path, process: int) -> list[str]:
    """What is wrong with how a run ended."""
    path = folder / "status.json"
    status = json.loads(path.read_text()) if path.is_file() else {}
    state = status["state"] if status.get("process") == process else None  # else it did not come to it
    faults = [] if code in (SIGNALS[kind], -int(signal.Signals[f"SIG{kind}"])) else [f"exit code {code} after {kind}"]
    if kind != "KILL" and code == SIGNALS[kind] and state not in (None, "interrupted", "finished"):
        faults.append(f"{state} after {kind}")
    return faults


def _tail(log: Path) -> str:
    return " / ".join(log.read_text().splitlines()[-3:])[:300]


def filled(name: str, draw: random.Random, work: Path, whole: Path) -> dict[str, Any]:
    """Let the disk be full while a run trains, make room, and compare it in the end."""
    log = work / f"{name}-full.log"
    log.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    with mounted(int(size * draw.uniform(0.05, 1.0))) as disk:
        folder = disk / f"{name}-full"
        asked = [*SHORT, *CONFIGURATIONS[name], f"output_dir={folder}"]
        code = trained(folder, asked, log)
        row: dict[str, Any] = {"configuration": name, "signal": "full", "code": code, "late": code == 0, "differs": []}
        if code and "the disk is full" not in log.read_text():
            row["differs"] = [f"exit code {code}: {_tail(log)}"]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        if code:
            command = [f"ckpt_path={folder / _LAST}"] if (folder / _LAST).is_file() else asked
            again = trained(folder, command, log)
            row["differs"] += [] if again == 0 else [f"it resumed with exit code {again}: {_tail(log)}"]
        row["differs"] += compared(whole, folder)
    return row


@contextmanager
def mounted(size: int) -> Iterator[Path]:
    """A file system of so many bytes in memory; it needs root."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    try:
        with mounted(1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# The table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The kills of each configuration and signal, and what differs, as Markdown."""
    kinds = [*SIGNALS, "full"]
    lines = [f"| configuration | {' | '.join(kinds)} | after its end | differs |", "|---" * (len(kinds) + 3) + "|"]
    for name in CONFIGURATIONS:
        own = [row for row in rows if row["configuration"] == name]
        if own:
            counts = Counter(row["signal"] for row in own if not row["late"])
            bad = sum(bool(row["differs"]) for row in own)
            cells = [str(counts[kind]) for kind in kinds] + [str(sum(row["late"] for row in own)), str(bad)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    total = Counter(row["signal"] for row in rows if not row["late"])
    cells = [str(total[kind]) for kind in kinds]
    cells += [str(sum(row["late"] for row in rows)), str(sum(bool(row["differs"]) for row in rows))]
    lines += [f"| **all** | {' | '.join(cells)} |", ""]
    for row in rows:
        if row["differs"]:
            lines.append(f"- {row['configuration']}, {row['signal']} (exit code {row['code']}): {row['differs'][:6]}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="of runs that had not ended yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configurations", type=int, default=len(CONFIGURATIONS), help="how many of the list")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, help="these")
    parser.add_argument("--most", type=int, default=3, help="kills of one run")
    parser.add_argument("--full", type=float, default=0.1, help="share of full disks, where mounting is possible")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; it goes on next time")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "kill")
    options = parser.parse_args()
    names = options.only or list(CONFIGURATIONS)[: options.configurations]
    work = (options.out / str(options.seed)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    journal = work / "kills.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []
    prepare()
    full = options.full if options.full and can_mount() else 0.0
    if options.full and not full:
        print("full disks are left out: a tmpfs cannot be mounted here")
    until = time.monotonic() + 60 * options.minutes
    seconds: dict[str, float] = {}
    while (done := sum(not row["late"] for row in rows)) < options.kills and time.monotonic() < until:
        draw = random.Random(f"{options.seed} {len(rows)}")
        counts = Counter(row["configuration"] for row in rows if not row["late"])
        name = min(names, key=lambda name: counts[name])
        whole = work / f"{name}-whole"
        if name not in seconds:  # measured anew: the machine may be another
            shutil.rmtree(whole, ignore_errors=True)
            since, log = time.monotonic(), work / f"{name}-whole.log"
            code = trained(whole, [*SHORT, *CONFIGURATIONS[name], f"output_dir={whole.name}"], log)
            if code:
                print(f"{name} does not run: {_tail(log)}", file=sys.stderr)
                return 1
            seconds[name] = time.monotonic() - since
        if draw.random() < full:
            new = [filled(name, draw, work, whole)]
        else:
            most = min(options.most, options.kills - done)
            new = killed(name, draw, work, whole, seconds[name], most, done)
        rows += new
        with open(journal, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        for row in new:
            print(f"{done} {name} {row['signal']} {row['code']} {row['differs'][:3] or ''}", flush=True)
    text = table(rows)
    (work / "kills.md").write_text(text)
    print(text)
    return int(any(row["differs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
