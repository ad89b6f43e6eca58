"""The Hydra callback of a sweep as a whole: where it is, how far its runs are, how it ended."""

from __future__ import annotations

import atexit
import json
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pl_sparse.app.aliases import current_targets
from pl_sparse.app.folder import lock, of_hydra, take, unlock
from pl_sparse.app.hydra_api import as_typed, quoted
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep.job import REFUSED, plain_overrides
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.core.files import read_yaml, remove_temporaries, write_json

__all__ = ["Sweep", "statuses"]

_LOST: dict[str, Any] = {
    "state": "lost", "error": None, "step": 0, "steps_trained": 0, "steps_shared": 0,
}  # fmt: skip
"""The status of a run that left none."""


class Sweep(Callback):
    """Shows how far a sweep is: a live table on a terminal, else a line when a run starts and ends. It reads the runs'
    status.json files, so that it is the same for every launcher.

    With `resume=true` the sweep goes on in its folder: `hydra.sweep.dir` if given, else the newest one beside it that
    was asked for the same. A study of optuna goes on, too: trials that were interrupted come first, and as many are
    run as are missing.

    At the end it lists the runs that failed or were lost, and the command's exit code is 1 if there are any.

    The folder of a run, or of a sweep, is taken here, before Hydra writes into it.
    """

    def __init__(self) -> None:
        self._watch: _Watch | None = None
        self._lock: FileLock | None = None

    def __reduce__(self) -> Any:
        return type(self), ()  # launchers send callbacks to their workers, which do not watch

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            take(current_targets(of_hydra(config)))
        except ConfigError as error:
            _refuse(error)
        except OmegaConfBaseException:
            return  # which the check of all settings explains

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        hydra = config.hydra
        searched = [override for override in as_typed(hydra.overrides.hydra) if _is_searched(override)]
        overrides = plain_overrides([*as_typed(hydra.overrides.task), *searched])
        folder = Path(str(hydra.sweep.dir))
        if any(override.partition("=")[0].lstrip("+") == "output_dir" for override in map(str, hydra.overrides.task)):
            _refuse(
                "output_dir is the folder of one run: that of a sweep, with a folder for each run, is hydra.sweep.dir"
            )
        if "direction" in hydra.sweeper:
            _check_directions(config)
        if config.get("resume"):
            if not any(str(override).startswith("hydra.sweep.dir=") for override in hydra.overrides.hydra):
                folder = _latest(folder, overrides) or folder
                _set(config, "sweep.dir", str(folder))
            print(f"continuing the sweep in {folder}" if folder.is_dir() else f"no such sweep yet: {folder} is new")
        elif not config.get("overwrite") and any(folder.glob("*/status.json")):
            _refuse(
                f"{folder} holds a sweep\n  resume=true continues it, overwrite=true trains its runs again, "
                "hydra.sweep.dir=... is another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder)
        except ConfigError as error:
            _refuse(error)
        except OSError as error:
            _refuse(f"hydra.sweep.dir={folder} cannot be written into: {error.strerror}")
        remove_temporaries(folder)
        shutil.rmtree(folder / REFUSED, ignore_errors=True)
        write_json(folder / "sweep.json", {"overrides": overrides, "started": time.time()})
        if "direction" in hydra.sweeper:
            _prepare_study(config)
        self._watch = _Watch(folder)
        self._watch.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self._watch is None:
            return
        self._watch.stop()
        folder = Path(str(config.hydra.sweep.dir))
        by_run = statuses(folder)
        by_run |= _lost(folder, by_run) | _refused(folder)
        _print_end(folder, by_run, self._watch.since)
        if self._lock is not None:
            unlock(self._lock)
        if not by_run:
            _refuse(f"no run was asked for: {shlex.join(as_typed(config.hydra.overrides.task))} stands for no value")
        if any(status["state"] != "finished" for status in by_run.values()):
            sys.exit(1)


def statuses(folder: Path) -> dict[str, dict[str, Any]]:
    """The status of each run of a sweep, by its folder's name, in the order of their numbers.

    Args:
        folder: the sweep's.
    """
    by_run = {path.parent.name: read_status(path.parent) for path in folder.glob("*/status.json")}
    order = sorted(by_run, key=lambda name: (len(name.partition("-")[0]), name))
    return {name: status for name in order if (status := by_run[name]) is not None}


def _lost(folder: Path, by_run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs that were begun and left no status."""
    begun = {path.parent.parent.name for path in folder.glob("*/.hydra/overrides.yaml")}
    return {name: dict(_LOST) for name in sorted(begun - set(by_run))}


def _refused(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs that were given a folder that is not theirs."""
    told = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{REFUSED}/*"))}
    return {f"run {number}": {**_LOST, "state": "refused", "error": error} for number, error in told.items()}


def _is_searched(override: str) -> bool:
    """Whether an override of Hydra's own settings says what is swept, not where and how."""
    return override.lstrip("+~").startswith(("hydra/sweeper", "hydra.sweeper"))


def _latest(folder: Path, overrides: list[str]) -> Path | None:
    """The newest sweep that was asked for the same: outputs/<date>/<time>, as `folder` is."""
    for path in sorted(folder.parent.parent.glob("*/*/sweep.json"), reverse=True):
        if plain_overrides(json.loads(path.read_text(encoding="utf-8"))["overrides"]) == overrides:
            return path.parent
    return None


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Change one of Hydra's own settings, for the sweeper and for the runs, which are composed anew."""
    with read_write(config.hydra), open_dict(config.hydra):
        OmegaConf.update(config.hydra, key, value)
        text = quoted(value) if isinstance(value, str) else value
        config.hydra.overrides.hydra.append(f"hydra.{key}={text}")


def _refuse(error: object) -> NoReturn:
    """End the command: what Hydra's callbacks raise would be a warning."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _check_directions(config: DictConfig) -> None:
    """Check that each objective has a direction."""
    directions = config.hydra.sweeper.direction
    if isinstance(directions, (list, ListConfig)) and len(directions) != len(config.objectives):
        _refuse(
            f"objectives={list(config.objectives)} and hydra.sweeper.direction={list(directions)} must be as many: a "
            "direction for each objective"
        )


def _prepare_study(config: DictConfig) -> None:
    """Make a study go on where it was interrupted."""
    sweeper = config.hydra.sweeper
    if not isinstance(sweeper.storage, str) or not sweeper.study_name:
        return
    import optuna

    if sweeper.storage.startswith("sqlite:"):
        # this version of optuna relies on statements that commit themselves to make a storage, as SQLAlchemy 1 did it
        optuna.storages.RDBStorage(sweeper.storage, engine_kwargs={"isolation_level": "AUTOCOMMIT"})
    if not config.get("resume"):
        return
    try:
        study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
    except KeyError:
        return  # it did not come to its first trial
    states = optuna.trial.TrialState
    done = [trial for trial in study.trials if trial.state in (states.COMPLETE, states.PRUNED)]
    for trial in study.trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)
    _set(config, "sweeper.n_trials", max(int(sweeper.n_trials) - len(done), 0))


class _Watch:
    """Reads the statuses once a second, and shows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.since = time.time()
        self._out = sys.stdout  # runs of this process send their own elsewhere
        self._over = threading.Event()
        self._shown: dict[str, str] = {}  # the state that was printed last, by run
        self._names: dict[str, str] = {}
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._thread = threading.Thread(target=self._watch, name="sweep-watch", daemon=True)

    def start(self) -> None:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        atexit.register(self.stop)  # an interrupted sweep gives the terminal back, too

    def stop(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            self._look()
            if self._live is not None:
                self._live.stop()

    def _watch(self) -> None:
        while not self._over.wait(1):
            self._look()

    def _look(self) -> None:
        if self._live is None:
            self._lines()
        else:
            self._live.update(self._table(), refresh=True)

    def _name(self, run: str) -> str:
        """What distinguishes a run: its overrides."""
        if run not in self._names:
            try:
                overrides = read_yaml(self.folder / run / ".hydra" / "overrides.yaml")
            except (OSError, ValueError):
                overrides = []
            self._names[run] = " ".join(plain_overrides(overrides if isinstance(overrides, list) else []))
        return self._names[run]

    def _lines(self) -> None:
        for run, status in statuses(self.folder).items():
            state = self._state(status)
            if self._shown.get(run) == state or state == "interrupted":
                continue
            first = run not in self._shown
            self._shown[run] = state
            if first and state == "finished" and status["updated"] < self.since:
                print(f"run {run} finished before: {self._name(run)}", file=self._out, flush=True)
                continue
            if state == "running" or first:
                print(f"run {run} started: {self._name(run)}", file=self._out, flush=True)
            if state != "running":
                seconds = status["updated"] - status["started"]
                scores = f"sparsity {status['sparsity']:.4f}, accuracy {_number(status['accuracy'])}"
                print(
                    f"run {run} {state} after {seconds:.0f} s: {status['error'] or scores}", file=self._out, flush=True
                )

    def _state(self, status: dict[str, Any]) -> str:
        """A run that said it was running before this sweep was started does so no longer."""
        if status["state"] == "running" and status["updated"] < self.since:
            return "interrupted"
        return str(status["state"])

    def _table(self) -> Table:
        table = Table("run", "settings", "state", "step", "sparsity", "accuracy", "ETA", title=str(self.folder))
        by_run = statuses(self.folder)
        names = {run: self._name(run).split(" ") for run in by_run}
        common = set.intersection(*map(set, names.values())) if len(names) > 1 else set()
        for run, status in by_run.items():
            state = self._state(status)
            table.add_row(
                run,
                " ".join(override for override in names[run] if override not in common),
                {"failed": "[red]failed[/]", "finished": "[green]finished[/]"}.get(state, state),
                f"{status['step']}/{status['total'] or '?'}",
                f"{status['sparsity']:.4f}",
                _number(status["accuracy"]),
                _left(status) if state == "running" else "",
            )
        return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _left(status: dict[str, Any]) -> str:
    """Time that a run still needs, if its steps go on taking as long as they took."""
    started = status.get("from", 0)
    done, left = status["step"] - started, status["total"] - status["step"]
    if done <= 0 or left < 0:
        return "?"
    seconds = int((status["updated"] - status["started"]) * left / done)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _print_end(folder: Path, by_run: dict[str, dict[str, Any]], since: float) -> None:
    """Print how the sweep that was started at a time ended: what failed, and what sharing saved."""
    failed: Sequence[tuple[str, dict[str, Any]]] = [
        (run, status) for run, status in by_run.items() if status["state"] != "finished"
    ]
    if by_run and not failed and all(status["updated"] < since for status in by_run.values()):
        print(f"nothing was to be done: all {len(by_run)} runs in {folder} were finished before")
        return
    print(f"{len(by_run) - len(failed)} of {len(by_run)} runs finished in {folder}")
    for run, status in failed:
        print(f"  {folder / run} {status['state']}: {status['error'] or 'its process was killed'}")
    if failed:
        print("  resume=true tries them again, and continues what was begun")
    shared = sum(status["steps_shared"] for status in by_run.values())
    if shared:
        trained = sum(status["steps_trained"] for status in by_run.values())
        every = sum(status["step"] for status in by_run.values())
        print(
            f"{trained:,} optimizer steps were trained, {shared:,} shared with other runs: {trained / every:.0%} of "
            f"the {every:,} that the runs have alone"
        )
