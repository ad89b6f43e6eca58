"""The command: settings in, one run or a sweep, errors in a line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pl_sparse.app.hydra_api import composition, entry
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.app.sweep.job import run
from pl_sparse.app.sweep.launch import arguments
from pl_sparse.app.training import train
from pl_sparse.core.registry import suggestion

__all__ = ["main", "sweep"]


# The command


@entry
def _entry(cfg: DictConfig) -> float | tuple[float, ...] | None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data in memory needs none
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning uses a name that torch renamed
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run
    if cfg.output_dir is None:
        OmegaConf.set_struct(cfg, False)
        cfg.output_dir = HydraConfig.get().runtime.output_dir
    board = (cfg.get("logger") or {}).get("wandb")
    if board is not None and board.get("group") is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        board.group = Path(HydraConfig.get().sweep.dir).name
    return run(cfg, train)


def main() -> float | None:
    """`python train.py ...` and `pl-sparse ...`: one run, or a sweep with -m; the objective is what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, to be told in a few lines
    try:
        sys.argv[1:] = arguments(_resumed(sys.argv[1:]))
        result: float | None = _entry()
        return result
    except ConfigError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = _explained(error, sys.argv[1:])
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


def _resumed(arguments: list[str]) -> list[str]:
    """With `ckpt_path` of a run, that run's own settings and folder, before those given."""
    given = {argument.partition("=")[0].lstrip("+~"): argument.partition("=")[2] for argument in arguments}
    path = given.get("ckpt_path", "null").strip("'\"")
    run = Path(path).parent.parent
    saved = run / ".hydra" / "overrides.yaml"
    if path == "null" or not saved.is_file():
        return arguments
    earlier = [
        override
        for override in OmegaConf.load(saved)
        if str(override).partition("=")[0].lstrip("+~") not in {*given, "ckpt_path", "output_dir"}
    ]
    placed = [] if "hydra.run.dir" in given else [f"hydra.run.dir='{run}'"]
    return [*map(str, earlier), *placed, *arguments]


def _explained(error: BaseException, arguments: list[str]) -> str:
    """The message of a composition error with what was probably meant."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = str(error).strip().splitlines()[0]
    for found in chain:
        options = getattr(found, "options", None)
        missing = getattr(found, "missing_cfg_file", None)
        if options and missing:
            group, _, name = str(missing).rpartition("/")
            return f"{group}={name}: there is no such {group}. {suggestion(name, options)}"
        if missing and (CONF / str(missing)).parent.is_dir():  # one of a list: export=[onnx,csv]
            group, _, name = str(missing).rpartition("/")
            names = [path.stem for path in (CONF / group).glob("*.yaml")]
            return f"{group}={name}: there is no such {group}. {suggestion(name, names)}"
    keys = [argument.partition("=")[0].lstrip("+~") for argument in arguments if "=" in argument]
    known = _keys(arguments)
    wrong = [key for key in keys if key not in known and not key.startswith("hydra")]
    if wrong:
        return f"{wrong[0]} is no setting. {suggestion(wrong[0], known) if _near(wrong[0], known) else ''}".strip()
    return text


def _near(word: str, known: set[str]) -> bool:
    return suggestion(word, known).startswith("Did")


def _keys(arguments: list[str]) -> set[str]:
    """Every setting that the chosen groups have."""
    groups = {path.parent.name for path in CONF.glob("*/*.yaml")}
    chosen = [argument for argument in arguments if argument.partition("=")[0] in groups and "," not in argument]
    GlobalHydra.instance().clear()
    with composition():
        try:
            cfg = hydra.compose("train", chosen)
        except Exception:
            cfg = hydra.compose("train")
    keys = set(groups)

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                name = f"{path}.{key}" if path else str(key)
                keys.add(name)
                walk(value, name)

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys
