"""The command: settings in, one run or a sweep, errors in a line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pl_sparse.app.aliases import current_options, current_targets, provide_hydra_callbacks
from pl_sparse.app.arguments import COMPLETION, arranged, completed, here, ignored, without_leftovers
from pl_sparse.app.cli import short_warnings
from pl_sparse.app.deploy import UnmetError
from pl_sparse.app.earlier import earlier_overrides
from pl_sparse.app.ends import EndedError, Interrupted, end_with_parent, how_to_go_on, say, signals
from pl_sparse.app.explanation import damaged_yaml, explanation, is_of_the_user, own_frames
from pl_sparse.app.folder import leave
from pl_sparse.app.hydra_api import entry, given, quoted
from pl_sparse.app.namespaces import unify
from pl_sparse.app.plugins import provide_options
from pl_sparse.app.seen import Seen
from pl_sparse.app.settings import ConfigError, check
from pl_sparse.app.subcommand import quiet
from pl_sparse.app.sweep.job import run
from pl_sparse.app.sweep.launch import arguments as plugin_settings
from pl_sparse.app.training import train
from pl_sparse.core.files import is_full, read_yaml
from pl_sparse.results.runs import key_of

__all__ = ["main", "sweep"]

_SHORT = "PL_SPARSE_SHORT_ERRORS"


class _Ended(BaseException):
    """Carries an error past Hydra, which would print a line of its own."""


@entry
def _entry(cfg: DictConfig) -> float | tuple[float, ...] | None:
    try:
        return _job(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        raise _Ended from error


def _job(cfg: DictConfig) -> float | tuple[float, ...] | None:
    unify()  # here too: jobs of a sweep may have processes of their own
    here()
    quiet()
    cfg = without_leftovers(current_targets(cfg), given())
    if cfg.output_dir is None:
        OmegaConf.set_struct(cfg, False)
        cfg.output_dir = HydraConfig.get().runtime.output_dir
    board = (cfg.get("logger") or {}).get("wandb")
    if board is not None and board.get("group") is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        board.group = Path(HydraConfig.get().sweep.dir).name
    failed: dict[str, str] = {}

    def noting(cfg: DictConfig) -> dict[str, Any]:
        metrics = train(cfg)
        failed.update({f"export={name}": reason for name, reason in metrics.get("exports_failed", {}).items()})
        goal = metrics.get("target", {})
        if goal.get("met") is False:
            what, asked = next(iter(goal.items()))
            failed[f"target.{what}={asked:g}"] = (
                f"the trained network has {goal['achieved']:.3g}. Ask for more than you need"
            )
        return metrics

    value = run(cfg, noting)
    if failed and HydraConfig.get().mode != RunMode.MULTIRUN:  # a run of a sweep has them in its metrics and run.log
        raise UnmetError(failed, Path(cfg.output_dir))
    return value


def main(config_dir: str | os.PathLike[str] | None = None) -> float | None:
    """`python train.py ...` and `pl-sparse ...`: one run, or a sweep with -m; the objective is what it returns.

    An error is a line or two, or the user's own frames where it comes from them. HYDRA_FULL_ERROR=1 shows all frames.
    The exit code is 2 for a refusal before training, 1 for a training that ended early, 3 where the run is there and an
    export failed or a target of cost was missed, and 128 plus the number of the signal that ended it.

    Args:
        config_dir: a folder with your own groups, unless the command names one by --config-dir.
    """
    if config_dir is not None and not any(argument.startswith(("--config-dir", "-cd")) for argument in sys.argv[1:]):
        sys.argv.insert(1, f"--config-dir={os.fspath(config_dir)}")
    asked, refused = sys.argv[1:], True
    end_with_parent()
    unify()
    provide_hydra_callbacks()
    here()
    short_warnings()
    cause: BaseException
    with _errors() as full:
        try:
            with signals():
                result = _command(asked)
            refused = False
            return result
        except ConfigError as error:
            message, code, cause = f"error: {error}", 2, error
        except UnmetError as error:
            refused = False  # the run is finished
            message, code, cause = f"error: {error}", 3, error
        except EndedError as error:
            message, code, cause = f"error: {error}", 1, error
        except KeyboardInterrupt as end:
            refused = False
            code, cause = 128 + (end.number if isinstance(end, Interrupted) else signal.SIGINT), end
            message = how_to_go_on(end, asked, sweep=bool({"-m", "--multirun"} & set(sys.argv)))
        except Exception as error:
            explained, code, cause = _told(error)
            message = f"error: {explained}"
            if code == 1 and _left_to_the_default("data", "model._target_=", asked):
                message = (
                    f"{message.rstrip()}\n  the data is data=digits, the default; data._target_=mymod.Data takes yours"
                )
        finally:
            leave(undo=refused)
    if full and not isinstance(cause, KeyboardInterrupt):
        traceback.print_exception(cause)
    say(message)
    sys.exit(code)


def _left_to_the_default(group: str, other: str, typed: list[str]) -> bool:
    """Whether a setting is typed, and nothing of a group."""
    chosen = any(setting.startswith((f"{group}=", f"{group}.", f"{group}@", "experiment=", "-")) for setting in typed)
    return any(setting.startswith(other) for setting in typed) and not chosen


def _command(typed: list[str]) -> float | None:
    """Run what was typed, completed by what Hydra needs to hear."""
    provide_options()
    try:
        options, settings = arranged(current_options(_with_earlier(typed)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explanation(error, *arranged(current_options(typed)))) from error
    settings = plugin_settings(settings)
    if not {"-h", "--help", "--hydra-help", "--version", *COMPLETION} & set(options):
        try:
            seen = Seen(options, settings)
            settings, cfg = completed(seen, settings)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explanation(error, options, settings)) from error
        except RecursionError as error:
            raise ConfigError(
                "the defaults of a configuration include the configuration itself: remove the circle"
            ) from error
        if cfg is not None:
            _check(seen, cfg, typed)
    sys.argv[1:] = [*options, *settings]
    try:
        result: float | None = _entry()
    except _Ended as ended:
        cause = ended.__cause__
        assert isinstance(cause, Exception)
        if isinstance(cause, (HydraException, OmegaConfBaseException)):
            raise ConfigError(explanation(cause, options, settings)) from cause
        raise cause from cause.__cause__
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explanation(error, options, settings)) from error
    return result


def _check(seen: Seen, cfg: DictConfig, typed: list[str]) -> None:
    """Refuse settings before Hydra makes a folder for the run."""
    reason = ignored(seen, cfg, typed)
    if reason is not None:
        raise ConfigError(reason)
    if seen.multirun or seen.name != "train":
        return  # what is wrong with a run of a sweep ends that run alone
    try:
        cfg = without_leftovers(current_targets(cfg), [str(override.input_line) for override in seen.overrides])
        if "output_dir" in cfg and cfg.output_dir is None:
            OmegaConf.set_struct(cfg, False)
            cfg.output_dir = "outputs"  # the folder within it is known to Hydra alone
        check(cfg)
    except OmegaConfBaseException:
        return  # an interpolation of what Hydra knows alone


def _told(error: Exception) -> tuple[str, int, BaseException]:
    """What to print of an error that nobody foresaw, the exit code, and the error itself."""
    if isinstance(error, OSError) and is_full(error):
        return f"the disk is full: {error.filename} could not be written\n  make room on it, then start again", 1, error
    if (damaged := damaged_yaml(error)) is not None:
        return damaged, 2, error
    if is_of_the_user(error):
        return own_frames(error), 1, error
    if isinstance(error, (FileNotFoundError, ImportError)) and str(error):
        return str(error), 2, error
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}\nHYDRA_FULL_ERROR=1 shows where it comes from", 1, error


@contextmanager
def _errors() -> Iterator[bool]:
    """Let errors come here from Hydra, which would print them otherwise; yields whether all frames are wanted."""
    before = {key: os.environ.get(key) for key in ("HYDRA_FULL_ERROR", _SHORT)}
    full = before["HYDRA_FULL_ERROR"] == "1" and before[_SHORT] is None
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if not full:
        os.environ[_SHORT] = "1"  # for the processes that this one starts
    try:
        yield full
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def sweep() -> float | None:
    """`pl-sparse sweep ...`: `pl-sparse train -m ...`."""
    if not {"-m", "--multirun"} & set(sys.argv):
        sys.argv.insert(1, "-m")
    return main()


def _with_earlier(arguments: list[str]) -> list[str]:
    """The arguments of a command; with `ckpt_path` of a run, after the settings and folder that the run had."""
    values = {key_of(argument): argument.partition("=")[2] for argument in arguments}
    path = values.get("ckpt_path", "null").strip("'\"")
    if path == "null":
        return arguments
    run = Path(path).parent.parent
    taken_over = (run / ".hydra" / "overrides.yaml").is_file() and not {"hydra.run.dir", "output_dir"} & set(values)
    folder = [f"hydra.run.dir={quoted(run)}"] if taken_over else []
    groups = _folder_of_groups(run, arguments, trusted=values.get("trust", "").lower() == "true")
    return [*groups, *earlier_overrides(path, [*groups, *arguments]), *folder, *arguments]


def _folder_of_groups(run: Path, arguments: list[str], trusted: bool) -> list[str]:
    """The option --config-dir that a run had: a folder of the user's, and none that came with the run."""
    saved = run / ".hydra" / "hydra.yaml"
    if not saved.is_file() or any(argument.startswith(("--config-dir", "-cd")) for argument in arguments):
        return []
    try:
        settings: Any = read_yaml(saved)
        sources = settings["hydra"]["runtime"]["config_sources"]
        folders = [Path(source["path"]) for source in sources if source["provider"] == "command-line"]
    except (ValueError, KeyError, TypeError):
        return []
    for folder in folders:
        if not trusted and folder.resolve().is_relative_to(run.resolve()):
            raise ConfigError(
                f"{saved} names {folder} as --config-dir, which came with the run\n"
                "  if you trust whoever wrote the run, add trust=true"
            )
    return [f"--config-dir={folder}" for folder in folders]
