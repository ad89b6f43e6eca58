"""The settings of a run that is resumed: what its folder says is less trusted than what was typed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pl_sparse.app.aliases import current_options, current_targets
from pl_sparse.app.checkpoints import is_plain
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.trust import Untrusted, leaves
from pl_sparse.core.files import read_yaml
from pl_sparse.results.runs import key_of

__all__ = ["earlier_overrides", "loads_plain"]

_WAY = "add trust=true"
_NOT_TAKEN = {"ckpt_path", "output_dir", "overwrite", "resume", "resume_with", "trust"}
_LOCAL = {"sqlite", "file"}
_CHANGING = ("overrides", "runtime", "job")  # what Hydra fills in of the arguments


def earlier_overrides(checkpoint: str, typed: Sequence[str]) -> list[str]:
    """What a run was asked for whose checkpoint a training goes on from, without what is typed anew.

    Args:
        checkpoint: `ckpt_path`, which lies in RUN/checkpoints; RUN/.hydra/overrides.yaml is read, if it is there.
        typed: the arguments of the command.

    Returns:
        the overrides, and `trust=false` unless it was typed.

    Raises:
        ConfigError: without `trust=true` among what is typed, the run's folder asks for something that is not taken
            over from it, or the checkpoint holds pickled objects.
    """
    run = Path(checkpoint).parent.parent
    saved = run / ".hydra" / "overrides.yaml"
    values = {key_of(argument): argument.partition("=")[2] for argument in typed}
    trusted = values.get("trust", "").lower() == "true"
    try:
        overrides = read_yaml(saved) or [] if saved.is_file() else []
    except ValueError as error:
        raise ConfigError(f"{saved} cannot be read: {error}") from error
    if not isinstance(overrides, list):
        raise ConfigError(f"{saved} holds no list of settings")
    taken = [override for override in map(str, overrides) if key_of(override) not in {*values, *_NOT_TAKEN}]
    if not trusted:
        untrusted = Untrusted(saved, run, _WAY)
        if saved.is_file():
            untrusted.check_links()
        if taken:
            _check(taken, typed, untrusted)
        if Path(checkpoint).is_file() and loads_plain(checkpoint, run, False):
            _check_paths(checkpoint, Untrusted(Path(checkpoint), run, _WAY))
    return taken if "trust" in values else [*taken, "trust=false"]


def loads_plain(path: str | os.PathLike[str], folder: str | os.PathLike[str], trust: bool | None) -> bool:
    """`is_plain`, for a run that goes on: with `trust=false` its own folder may hold no pickled objects either.

    Args:
        path: the checkpoint.
        folder: the run's.
        trust: the setting; None where no other run is gone on with.

    Raises:
        ConfigError: the checkpoint holds pickled objects that are not loaded.
    """
    try:
        return is_plain(path, os.devnull if trust is False else folder)
    except ConfigError as error:
        if trust is not False or "pickled" not in str(error):
            raise
        reason = str(error).partition(": a run takes")[0]
        raise ConfigError(f"{reason}\n  if you trust whoever wrote the run, {_WAY}") from error


def _check_paths(checkpoint: str, untrusted: Untrusted) -> None:
    """Check the paths that callbacks have kept: Lightning removes an earlier checkpoint by the path in its state."""
    state = torch.load(checkpoint, map_location="meta", weights_only=True)
    callbacks = state.get("callbacks") if isinstance(state, dict) else None
    for key, value in leaves(callbacks):
        if isinstance(value, str) and (".." in Path(value).parts or "://" in value):
            raise untrusted.refusal(f"{key}={value}", "is a path outside of the run's folder")


def _check(taken: Sequence[str], typed: Sequence[str], untrusted: Untrusted) -> None:
    """Check what a run asked for: by itself, and in what Hydra makes of it together with what is typed."""
    parser = OverridesParser.create()
    for override in taken:
        if override.lstrip().startswith("-"):
            raise untrusted.refusal(override, "is an option of the command, and not taken over")
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise untrusted.refusal(override, "is not a setting") from error
        key, _, text = override.partition("=")
        if parsed.key_or_group in _NOT_TAKEN or "hydra" in re.split(r"[./@:+~\s]", key):
            raise untrusted.refusal(override, "is a setting of the command, and not taken over")
        if "." not in str(parsed.key_or_group) and (".." in text or text.lstrip(" '\"[").startswith("/")):
            raise untrusted.refusal(override, "is not an option of this configuration")
        if parsed.is_sweep_override():
            raise untrusted.refusal(override, "is a choice of several, and not taken over")
        untrusted.check_text(key_of(key), text)
    typed = [*_search_path(typed), *(argument for argument in typed if "=" in argument and argument[0] != "-")]
    known: dict[str, list[Any]] = {}
    single = []
    for argument in typed:
        try:
            parsed = parser.parse_override(argument)
        except HydraException:
            continue  # Hydra refuses it later
        if not parsed.is_sweep_override():
            single.append(argument)
            if not parsed.is_delete():
                for key, value in leaves(parsed.value(), key_of(argument)):
                    known.setdefault(key, []).append(value)
    mine = [argument for argument in single if key_of(argument).startswith("hydra") or "." not in key_of(argument)]
    try:
        before = _composed(mine)
    except HydraException:
        before = _composed([argument for argument in single if key_of(argument).startswith("hydra")])
    after = _composed([*taken, *single])
    if _of_hydra(before) != _of_hydra(after):
        raise untrusted.refusal("it", "changes settings of Hydra, which are not taken over")
    for key, value in leaves(_plain(current_targets(before), "hydra")):
        known.setdefault(key, []).append(value)
    for key, value in leaves(_plain(current_targets(after), "hydra")):
        if value in known.get(key, ()):
            continue
        untrusted.check_value(key, value)
        if isinstance(value, str) and set(re.findall(r"([\w+.-]+):/", value)) - _LOCAL:
            raise untrusted.refusal(f"{key}={value}", "is an address of the network, and not called")


def _search_path(typed: Sequence[str]) -> list[str]:
    """The folder of `--config-dir`, as Hydra's search path."""
    for index, argument in enumerate(typed):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = value or next(iter(typed[index + 1 :]), "")
            return [f"hydra.searchpath=['file://{Path(folder).resolve()}']"]
    return []


def _composed(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with composition():
        return hydra.compose("train", current_options(overrides), return_hydra_config=True)


def _of_hydra(cfg: DictConfig) -> dict[str, Any]:
    """The settings of Hydra, as they stand, without what it fills in of the arguments."""
    settings: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    return {key: value for key, value in settings.items() if key not in _CHANGING} | {
        "env": (settings["job"]["env_set"], settings["job"]["env_copy"], settings["job"]["chdir"])
    }


def _plain(node: Any, *without: str) -> Any:
    """Plain values, resolved where that is possible before Hydra runs."""
    if isinstance(node, (DictConfig, ListConfig)):
        raw: Any = OmegaConf.to_container(node, resolve=False)
        keys: Any = [key for key in raw if key not in without] if isinstance(raw, dict) else range(len(raw or ()))
        values = {}
        for key in keys:
            try:
                values[key] = _plain(node[key])
            except OmegaConfBaseException:
                values[key] = raw[key]
        return values if isinstance(raw, dict) else list(values.values())
    return node
