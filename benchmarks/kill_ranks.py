"""Trainings of two processes, one of which is killed at a random moment: nothing hangs, and they go on exactly.

    python benchmarks/kill_ranks.py [--kills 30] [--seed 0]

A SIGKILL goes to the process that was started or to the one that it started. Within five minutes no process of the run
may be left: one that waits for the other sees that it is gone. The run goes on from its last checkpoint, or begins
again where there is none, and has to end with the files of a run that nothing disturbed, times apart (as
`benchmarks/kill.py` compares them).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kill import compared

CONFIGURATIONS = {
    "magnitude": [],
    "movement": ["method=movement"],
    "rigl": ["method=rigl", "schedule.every=4"],
    "dropout": ["masking=ste", "model=vit_tiny", "model.depth=1", "model.dim=32", "model.dropout=0.1"],
}
ASKED = ["trainer=ddp_cpu", "data.limit=256", "trainer.max_epochs=8", "trainer.enable_progress_bar=false"]
LIMIT = 300.0  # seconds until all processes of a run have ended


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A run in a process group of its own."""
    command = [sys.executable, "-m", "pl_sparse", "train", *arguments]
    log = open(folder.parent / f"{folder.name}.log", "ab")  # noqa: SIM115  # the process has it
    return subprocess.Popen(command, cwd=folder.parent, stdout=log, stderr=log, start_new_session=True)


def members(group: int) -> list[int]:
    """The processes of a group, by age."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append((int(fields[19]), int(path.parent.name)))
    return [number for _, number in sorted(found)]


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether all processes of a run end in time; those that do not are killed."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        process.poll()
        if not members(process.pid):
            return True
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        seconds = {}
        for number in range(options.kills):
            kind = list(CONFIGURATIONS)[number % len(CONFIGURATIONS)]
            asked = [*ASKED, *CONFIGURATIONS[kind]]
            whole, folder = work / f"{kind}-whole", work / f"{kind}-killed"
            if kind not in seconds:
                since = time.monotonic()
                if start(whole, [*asked, f"output_dir={whole.name}"]).wait():
                    print((work / f"{whole.name}.log").read_text()[-2000:], file=sys.stderr)
                    return 1
                seconds[kind] = time.monotonic() - since
            shutil.rmtree(folder, ignore_errors=True)
            process = start(folder, [*asked, f"output_dir={folder.name}"])
            time.sleep(draw.uniform(0.3, 1.0) * seconds[kind])
            running = members(process.pid)
            if not running:
                outcomes["after its end"] += 1
                continue
            rank = draw.randrange(len(running))
            os.kill(running[rank], signal.SIGKILL)
            since = time.monotonic()
            hangs = not ended(process)
            took = time.monotonic() - since
            last = folder / "checkpoints" / "last.ckpt"
            again = [f"ckpt_path={folder.name}/checkpoints/last.ckpt"]
            code = start(folder, again if last.is_file() else [*asked, f"output_dir={folder.name}"]).wait()
            differs = [] if code else compared(whole, folder)
            outcome = "hangs" if hangs else "does not go on" if code else "differs" if differs else "exact"
            outcomes[outcome] += 1
            where = f"gone in {took:.0f} s, {'resumed' if last.is_file() else 'from the start'}"
            print(
                f"{number + 1} {kind}, process {rank} of {len(running)}, {where}: {outcome} {differs[:4] or ''}",
                flush=True,
            )
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return int(any(outcomes[bad] for bad in ("hangs", "does not go on", "differs")))


if __name__ == "__main__":
    sys.exit(main())
