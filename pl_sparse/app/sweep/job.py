"""One run, alone or in a sweep: it does not repeat what is done, takes no other run down, and says how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf

from pl_sparse.app.aliases import current_options
from pl_sparse.app.ends import EndedError, Interrupted, asked
from pl_sparse.app.folder import FolderError, take
from pl_sparse.app.hydra_api import as_typed, given, quoted, register_resolver
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep.identity import digest, run_fingerprint
from pl_sparse.callbacks.run.status import Status, read_status
from pl_sparse.core.files import read_yaml, write_json, write_text
from pl_sparse.core.registry import suggestion
from pl_sparse.results.runs import key_of

__all__ = ["REFUSED", "Train", "metric", "objective", "plain_overrides", "run", "subdir", "threads"]

REFUSED = ".refused"
"""The folder of a sweep with the reasons of runs that were given a folder that is not theirs, by their number."""
_HOW = (
    "resume", "resume_with", "overwrite", "ckpt_path", "prefix_cache", "threads", "output_dir", "print_config",
    "trust",
)  # fmt: skip
"""Settings that say how and where a run is run."""
_PATIENCE = 30
"""Seconds that an interrupted process has for its end."""
Train = Callable[[DictConfig], dict[str, Any]]
"""From a configuration to the metrics of the run."""


def run(cfg: DictConfig, train: Train) -> float | tuple[float, ...] | None:
    """Train as configured, or resume with `resume=true`.

    With `resume`, a run that has its metrics is not trained again, and one that was interrupted goes on from its last
    checkpoint. In a sweep an error ends this run alone: it is in status.json, and the sweeper gets None; what a run
    prints goes to run.log in its folder; a training of several processes has a process of its own as their parent,
    since Lightning starts the others by the arguments of the command, and kills the parent when one of them dies.

    Args:
        cfg: the configuration of the run, `output_dir` included.
        train: trains one run.

    Returns:
        the objective, for a sweeper; None where the run failed or has none.

    Raises:
        ConfigError: as `train` does, outside of a sweep.
    """
    hydra = HydraConfig.get()
    folder = Path(cfg.output_dir)
    status = read_status(folder)
    same = status is not None and status.get("config") == run_fingerprint(cfg, folder)
    if cfg.resume and same:
        metrics = _read_json(folder / "metrics.json")
        if metrics is not None:
            assert status is not None
            if status["state"] != "finished":  # it was interrupted after its last file
                write_json(folder / "status.json", {**status, "state": "finished", "error": None})
            elif hydra.mode != RunMode.MULTIRUN:
                print(f"nothing was to be done: the run in {folder} was finished before")
            return objective(cfg, metrics)
        last = folder / "checkpoints" / "last.ckpt"
        if last.is_file() and cfg.ckpt_path is None:
            cfg.ckpt_path = str(last)
    if hydra.mode != RunMode.MULTIRUN:
        return objective(cfg, train(cfg))
    try:
        place = take(cfg)
    except FolderError as error:  # what is there stays as it is
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_text(Path(hydra.sweep.dir) / REFUSED / str(hydra.job.num), str(error))
        return None
    apart = _has_processes(cfg)
    if apart:
        place.release()

    count = threads(cfg)
    if count is not None:
        torch.set_num_threads(count)
    if cfg.trainer.enable_progress_bar is None:
        cfg.trainer.enable_progress_bar = False
    try:
        with _printing_to(folder / "run.log"):
            return objective(cfg, _train_apart(cfg) if apart else train(cfg))
    except Exception as error:
        if (number := asked()) is not None:
            raise Interrupted(number, folder) from error
        explained = isinstance(error, (ConfigError, EndedError, ImportError, FileNotFoundError))
        with open(folder / "run.log", "a", encoding="utf-8") as file:
            file.write(f"error: {error}\n" if explained else traceback.format_exc())
        status = read_status(folder)
        if status is None or status["state"] != "failed":
            _write_failure(cfg, error)
        return None
    finally:
        place.release()


def objective(cfg: DictConfig, metrics: Mapping[str, Any]) -> float | tuple[float, ...] | None:
    """What a sweeper optimizes: `objective`, or for one with several directions the tuple of `objectives`.

    Besides the keys of metrics.json (a dot goes into it: size_bytes.dense) there are `density`, 1 - sparsity, and
    `size`, the compressed bytes.

    Args:
        cfg: with `objective` and `objectives`.
        metrics: those of metrics.json; none in a process that writes no files.

    Raises:
        ConfigError: the run has no such metric.
    """
    if not metrics:
        return None
    sweeper: Any = HydraConfig.get().sweeper if HydraConfig.initialized() else {}
    if isinstance(sweeper.get("direction"), (list, ListConfig)):
        return tuple(metric(metrics, name) for name in cfg.objectives)
    value = metrics.get(cfg.objective)
    return metric(metrics, cfg.objective) if value is not None or cfg.objective in ("density", "size") else None


def metric(metrics: Mapping[str, Any], name: str) -> float:
    """One metric of a run, by the name that it has in `objectives`.

    Raises:
        ConfigError: the run has no such metric.
    """
    if name == "density":
        return 1 - float(metrics["sparsity"])
    node: Any = metrics
    for part in {"size": "size_bytes.compressed"}.get(name, name).split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        names = [*(key for key, value in metrics.items() if isinstance(value, (int, float))), "density", "size"]
        raise ConfigError(f"objectives: the run has no metric {name!r}. {suggestion(name, names)}")
    return float(node)


def threads(cfg: DictConfig) -> int | None:
    """Threads of one run, so that those that run at once share the cores: `threads`, or the cores divided by the jobs
    of the launcher. None leaves torch as it is.
    """
    if cfg.threads is not None:
        return int(cfg.threads)
    launcher: Any = HydraConfig.get().launcher
    name = str(launcher.get("_target_")).rpartition(".")[2]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if name == "JoblibLauncher":
        jobs = int(launcher.n_jobs)
        return max(cores // (jobs if jobs > 0 else max(cores + 1 + jobs, 1)), 1)
    if name == "RayLauncher":
        return max(int(launcher.ray.remote.get("num_cpus", 1)), 1)
    if name in ("SlurmLauncher", "LocalLauncher"):
        return int(launcher.cpus_per_task or 1)
    return None


def plain_overrides(overrides: Sequence[Any]) -> list[str]:
    """What a run was asked for, without how it is run, in the names that options have today."""
    names = current_options(map(str, overrides))
    return sorted(override for override in names if key_of(override) not in _HOW)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where the file is missing or is not whole."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file):
        yield


def _write_failure(cfg: DictConfig, error: Exception) -> None:
    """Write the status of a run that failed before it had one."""
    try:
        with Status(cfg.output_dir, cfg.objective, run_fingerprint(cfg, cfg.output_dir)):
            raise error
    except type(error):
        pass


# Trainings of several processes


def _has_processes(cfg: DictConfig) -> bool:
    """Whether Lightning would start further processes."""
    node = cfg.trainer
    devices = {key: node[key] for key in ("accelerator", "devices", "strategy", "num_nodes") if key in node}
    plain: Any = OmegaConf.to_container(OmegaConf.create(devices), resolve=True)
    if not all(isinstance(value, (str, int, list)) for value in plain.values()):
        return True  # a strategy of the user's
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    plain |= dict.fromkeys(quiet, False)
    try:
        trainer = Trainer(**plain)
    except Exception:
        return False  # the training itself fails with a message
    return trainer.strategy.launcher is not None


def _train_apart(cfg: DictConfig) -> dict[str, Any]:
    """Train in a process of its own, as the single run that it is, and read what it wrote."""
    folder = Path(cfg.output_dir)
    overrides = [override for override in given() if not override.startswith(("resume=", "ckpt_path="))]
    sources = HydraConfig.get().runtime.config_sources
    groups = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    command = [sys.executable, "-m", "pl_sparse", "train", *groups, *overrides, "prefix_cache='off'"]
    command += [f"hydra.run.dir={quoted(str(folder))}", "hydra.output_subdir=null", "trainer.enable_progress_bar=false"]
    if cfg.ckpt_path is not None:  # with resume=true it is the run's own
        command += [f"ckpt_path={quoted(cfg.ckpt_path)}", f"trust={str(cfg.trust is not False).lower()}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with open(folder / "run.log", "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it says in its folder that it was interrupted
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    metrics = _read_json(folder / "metrics.json")
    if code or metrics is None:
        lines = (folder / "run.log").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines[-20:] if line.startswith("error: ")]
        raise ConfigError(errors[-1]) if errors else RuntimeError(f"its process ended with code {code}: see run.log")
    return metrics


def subdir(number: Any, *, _root_: DictConfig) -> str:
    """The folder of a run below that of its sweep: its number, unless another run has that folder.

    With `resume` it is the folder of the run that was asked for the same, whatever number that had.

    Args:
        number: the job's in the sweep.
        _root_: the whole configuration, which the resolver is given.
    """
    sweep = Path(str(_root_.hydra.sweep.dir))
    overrides = plain_overrides(as_typed(_root_.hydra.overrides.task))
    earlier = _overrides_of(sweep / str(number))
    numbered = str(number) if earlier is None or earlier == overrides else f"{number}-{digest(overrides)[:6]}"
    if earlier == overrides or not _root_.get("resume"):
        return numbered
    return next((path.name for path in sorted(sweep.glob("*")) if _overrides_of(path) == overrides), numbered)


def _overrides_of(run: Path) -> list[str] | None:
    """What a run was asked for; None where there is no run."""
    path = run / ".hydra" / "overrides.yaml"
    try:
        overrides = read_yaml(path)
    except (OSError, ValueError):
        return None
    return plain_overrides(as_typed(overrides)) if isinstance(overrides, list) else None


register_resolver("sweep_subdir", subdir)
