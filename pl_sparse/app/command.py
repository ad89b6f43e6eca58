"""The command: settings in, one run or a sweep, errors in a line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pl_sparse.app.aliases import current_options, current_targets, provide_hydra_callbacks
from pl_sparse.app.earlier import earlier_overrides
from pl_sparse.app.hydra_api import composition, entry
from pl_sparse.app.namespaces import unify
from pl_sparse.app.plugins import provide_options
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.app.sweep.job import run
from pl_sparse.app.sweep.launch import arguments
from pl_sparse.app.training import train
from pl_sparse.core.registry import suggestion

__all__ = ["main", "sweep"]


@entry
def _entry(cfg: DictConfig) -> float | tuple[float, ...] | None:
    unify()  # here too: jobs of a sweep may have processes of their own
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data in memory needs none
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning uses a name that torch renamed
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run
    cfg = current_targets(cfg)
    if cfg.output_dir is None:
        OmegaConf.set_struct(cfg, False)
        cfg.output_dir = HydraConfig.get().runtime.output_dir
    board = (cfg.get("logger") or {}).get("wandb")
    if board is not None and board.get("group") is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        board.group = Path(HydraConfig.get().sweep.dir).name
    return run(cfg, train)


def main() -> float | None:
    """`python train.py ...` and `pl-sparse ...`: one run, or a sweep with -m; the objective is what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and are printed in a few lines
    unify()
    provide_hydra_callbacks()
    try:
        provide_options()
        sys.argv[1:] = arguments(current_options(_with_earlier(sys.argv[1:])))
        result: float | None = _entry()
        return result
    except ConfigError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = _explanation(error, sys.argv[1:])
    except (FileNotFoundError, ImportError) as error:
        if not str(error):
            raise
        message = str(error)
    except KeyboardInterrupt:
        sweep = {"-m", "--multirun"} & set(sys.argv)
        message = f"interrupted. It goes on with {'resume=true' if sweep else 'ckpt_path=<run>/checkpoints/last.ckpt'}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def sweep() -> float | None:
    """`pl-sparse sweep ...`: `pl-sparse train -m ...`."""
    if not {"-m", "--multirun"} & set(sys.argv):
        sys.argv.insert(1, "-m")
    return main()


def _with_earlier(arguments: list[str]) -> list[str]:
    """The arguments of a command; with `ckpt_path` of a run, after the settings and folder that the run had."""
    values = {_key(argument): argument.partition("=")[2] for argument in arguments}
    path = values.get("ckpt_path", "null").strip("'\"")
    if path == "null":
        return arguments
    run = Path(path).parent.parent
    taken_over = (run / ".hydra" / "overrides.yaml").is_file() and "hydra.run.dir" not in values
    folder = [f"hydra.run.dir='{run}'"] if taken_over else []
    return [*earlier_overrides(path, arguments), *folder, *arguments]


def _key(argument: str) -> str:
    """
    >>> _key("+model.width=4")
    'model.width'
    """
    return argument.partition("=")[0].lstrip("+~")


def _explanation(error: BaseException, arguments: list[str]) -> str:
    """The message of a composition error, with what was probably meant."""
    for link in _chain(error):
        options = getattr(link, "options", None)
        missing = getattr(link, "missing_cfg_file", None)
        group, _, name = str(missing).rpartition("/")
        if missing and not options and (CONF / str(missing)).parent.is_dir():  # one of a list: export=[onnx,csv]
            options = [path.stem for path in (CONF / group).glob("*.yaml")]
        if missing and options:
            return f"{group}={name}: there is no such {group}. {suggestion(name, options)}"
    settings = _settings(arguments)
    for key in (_key(argument) for argument in arguments if "=" in argument):
        if key not in settings and not key.startswith("hydra"):
            hint = suggestion(key, settings)  # without a near miss it lists all settings
            return f"{key} is no setting. {hint if hint.startswith('Did') else ''}".strip()
    return str(error).strip().splitlines()[0]


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that it comes from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _settings(arguments: list[str]) -> set[str]:
    """The keys of all settings that the groups have which the arguments choose."""
    groups = {path.parent.name for path in CONF.glob("*/*.yaml")}
    choices = [argument for argument in arguments if argument.partition("=")[0] in groups and "," not in argument]
    GlobalHydra.instance().clear()
    with composition():
        try:
            cfg = hydra.compose("train", choices)
        except Exception:
            cfg = hydra.compose("train")
    return groups | set(_keys(OmegaConf.to_container(cfg, resolve=False)))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested settings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
