"""What was typed, before Hydra runs it: options in any place, and keys that only the target of a node knows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.idle import references
from pl_sparse.app.nodes import keys
from pl_sparse.app.seen import Seen
from pl_sparse.app.settings import ConfigError, parameters_of, signature_of, target
from pl_sparse.core.optional import beginning
from pl_sparse.core.registry import near_misses, suggestion

__all__ = ["COMPLETION", "arranged", "completed", "here", "ignored", "refusal", "without_leftovers"]

_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
)  # fmt: skip
COMPLETION = ("--shell-completion", "-sc")
_INFO = ("--info", "-i")
_SEVERAL = ("export", "callbacks", "logger", "experiment")
"""Groups of which several options go together."""
_NODES = {"overrides", "layouts"}
"""Settings whose keys are names of the model."""
_LONG = 160
"""A longer signature is left out of a message that names the parameter."""


def here() -> None:
    """Put the working directory on the path, as `python -m` does, so that `_target_` may name a module in it."""
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)


def arranged(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command into Hydra's options and the settings, whatever their order.

    >>> arranged(["sparsity=0.5,0.9", "-m", "seed=1", "--config-dir", "conf"])
    (['-m', '--config-dir', 'conf'], ['sparsity=0.5,0.9', 'seed=1'])

    Raises:
        ConfigError: an option that there is not, one without its value, or an argument that is not a setting.
    """
    options: list[str] = []
    settings: list[str] = []
    left = list(arguments)
    if any(argument in COMPLETION for argument in left):
        return left, []
    while left:
        argument = left.pop(0)
        name, given, _ = argument.partition("=")
        if argument in _INFO:
            options += [argument, *([left.pop(0)] if left and left[0].isidentifier() else [])]
        elif name in _WITH_VALUE or name in _INFO:
            if not given and not left:
                raise ConfigError(f"{argument} needs a value")
            options += [argument] if given else [argument, left.pop(0)]
        elif argument in _FLAGS:
            options.append(argument)
        elif argument.startswith("-"):
            known = [*_FLAGS, *_WITH_VALUE, *_INFO]
            if name.lstrip("-").isidentifier() and given:
                raise ConfigError(f"{argument}: settings have no dashes, {argument.lstrip('-')}")
            raise ConfigError(f"{argument} is not an option of this command. {suggestion(name, known)}")
        elif not name.strip("+~") or not (given or argument.startswith("~")):
            raise ConfigError(f"{argument!r} is not a setting: settings are key=value, and group=option")
        else:
            settings.append(argument)
    return options, settings


def _first(override: Override) -> str | None:
    """A setting as it is typed; of several values the first; None where that cannot be known."""
    if not override.is_sweep_override():
        return override.input_line
    if not override.is_choice_sweep() and not override.is_range_sweep():
        return None
    try:
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    except Exception:
        return None  # glob(*): the options are known to Hydra


def completed(seen: Seen, settings: Sequence[str]) -> tuple[list[str], DictConfig | None]:
    """Settings, with `++` before each key that is new and that something takes.

    That is a parameter of the node's target, a `_target_` in a group that is empty, and the name of a weight in
    `overrides` and `layouts`.

    Args:
        seen: of these settings.
        settings: as they were typed.

    Returns:
        the settings for Hydra, and what is composed of them; of several values the first.

    Raises:
        ConfigError: a key that nothing takes.
        HydraException: the settings cannot be composed.
    """
    for override in seen.overrides:
        if override.key_or_group in seen.groups and not override.is_delete():
            _refuse_other_choices(override, seen)
    lines = {id(override): _first(override) for override in seen.overrides}
    own = [override for override in seen.overrides if not override.is_hydra_override()]
    if not seen.multirun and any(override.is_sweep_override() for override in own):
        return list(settings), None  # Hydra says what is to be done
    dotted = [
        override
        for override in own
        if override.type == OverrideType.CHANGE and "." in override.key_or_group and lines[id(override)]
    ]
    others = [line for override in own if override not in dotted and (line := lines[id(override)]) is not None]
    base = seen.compose(others)
    OmegaConf.set_struct(base, False)
    new = [override for override in dotted if not _has(base, override.key_or_group)]
    cfg = base.copy()
    for override in dotted:
        _put(cfg, override)
    for override in new:
        reason = _takes(cfg, override.key_or_group, seen)
        if reason is not None:
            raise ConfigError(reason)
    added = {override.input_line for override in new}
    return [f"++{setting}" if setting in added else setting for setting in settings], cfg


def _refuse_other_choices(override: Override, seen: Seen) -> None:
    """Refuse null and numbers for a group, and a list where the last option would take the place of the others."""
    group, value = override.key_or_group, override.value()
    options = seen.options(group)
    if value is None:
        raise ConfigError(f"{group}=null: ~{group} leaves the group out. Its options are {', '.join(options)}")
    if isinstance(value, (bool, int, float)):
        raise ConfigError(f"{override.input_line}: there is no such {group}. {suggestion(str(value), options)}")
    if isinstance(value, list) and group not in _SEVERAL and not override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: {group} is one of {', '.join(options)}")


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a key is in the configuration, whatever its value, and in no node that is empty."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    except Exception:
        return True  # an interpolation: Hydra sees to it
    if isinstance(node, DictConfig):
        return name in node
    return False


def _put(cfg: DictConfig, override: Override) -> None:
    line = _first(override)
    value = override.value() if not override.is_sweep_override() else None
    if value is None and line is not None and override.is_sweep_override():
        value = OmegaConf.create([line.partition("=")[2]])[0]
    try:
        OmegaConf.update(cfg, override.key_or_group, value, merge=True, force_add=True)
    except Exception as error:
        raise ConfigError(f"{override.input_line}: {beginning(error)}") from error


def _takes(cfg: DictConfig, key: str, seen: Seen) -> str | None:
    """None if something takes a new key, else what is wrong with it."""
    parent, _, name = key.rpartition(".")
    top = key.partition(".")[0]
    node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    if top in _NODES or (isinstance(node, DictConfig) and "_target_" not in node and _in_target(cfg, parent)):
        return None  # a dictionary that a target takes whole
    if isinstance(node, DictConfig) and "_target_" in node:
        if name.startswith("_") and name.endswith("_"):
            return None if top in seen.groups else refusal(key, cfg, seen)
        called = target(node, parent)
        parameters, is_open = parameters_of(called)
        if name in parameters or is_open:
            return None
    return refusal(key, cfg, seen)


def _in_target(cfg: DictConfig, key: str) -> bool:
    """Whether a node above has a target that takes what is below it."""
    parent, _, name = key.rpartition(".")
    if not parent:
        return False
    node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    if isinstance(node, DictConfig) and "_target_" in node:
        parameters, is_open = parameters_of(target(node, parent))
        return name in parameters or is_open
    return _in_target(cfg, parent)


def refusal(key: str, cfg: DictConfig | None, seen: Seen) -> str:
    """What to say of a key that is not in the configuration.

    Args:
        key: with its dots.
        cfg: what else was asked for; None if that cannot be composed.
        seen: where groups and their options are.
    """
    if cfg is None:
        cfg = seen.compose([])
    known = {name for name in keys(OmegaConf.to_container(cfg, resolve=False)) if not f"{name}.".startswith(f"{key}.")}
    parent, _, name = key.rpartition(".")
    top = key.partition(".")[0]
    if top not in seen.groups:
        close = near_misses(key, [*known, *seen.groups])
        hint = suggestion(key, close) if close else "pl-sparse train --cfg job prints all settings."
        return f"{key} is not a setting. {hint}"
    node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    chosen = f" of {top}={_choice(top, seen)}" if _choice(top, seen) else ""
    elsewhere = seen.choosing(top, key)
    if isinstance(node, DictConfig) and "_target_" in node:
        called = target(node, parent)
        parameters, _ = parameters_of(called)
        close = near_misses(name, parameters)
        if close:
            signature = signature_of(called)
            shown = signature if len(signature) <= _LONG else ""
            return f"{key} is not a parameter of {node['_target_']}{shown}. {suggestion(name, close)}"
        if elsewhere:
            return f"{key} is not a setting{chosen}: {_names(top, elsewhere)} {_have(elsewhere)} it"
        return f"{key} is not a parameter of {node['_target_']}, whose parameters are {signature_of(called)}"
    if elsewhere:
        return f"{key} is not a setting{chosen}: {_names(top, elsewhere)} {_have(elsewhere)} it"
    close = near_misses(key, known)
    close = [other for other in close if other.startswith(f"{top}.")]
    below = sorted(other for other in known if other.startswith(f"{top}."))
    hint = suggestion(key, close or below) if close or below else f"Options of {top}: {', '.join(seen.options(top))}."
    return f"{key} is not a setting{chosen}. {hint}"


def _choice(group: str, seen: Seen) -> str | None:
    for override in reversed(seen.overrides):
        if override.key_or_group == group:
            return str(override.value())
    for entry in seen.defaults:
        if isinstance(entry, DictConfig) and group in entry:
            return str(entry[group])
    return None


def _names(group: str, options: list[str]) -> str:
    return f"{group}={', '.join(options[:4])}" if len(options) < 5 else f"{group}={', '.join(options[:4])} and others"


def _have(options: list[str]) -> str:
    return "has" if len(options) == 1 else "have"


def ignored(seen: Seen, cfg: DictConfig, typed: Sequence[str]) -> str | None:
    """What to say of a typed setting that nothing reads: a sweep's for a run alone, or `sparsity`; None where all are.

    In a sweep over options `sparsity` is that of the other runs.

    Args:
        seen: of the settings.
        cfg: composed of them.
        typed: what this command says, without the settings of a run that goes on.
    """
    of_a_sweep = next((text for text in typed if text.startswith(("hydra.sweep.", "hydra.sweep="))), None)
    if of_a_sweep is not None and not seen.multirun:
        return f"nothing reads {of_a_sweep}: it belongs to a sweep, which -m starts. A run has output_dir=..."
    value = next((text.partition("=")[2] for text in typed if text.startswith("sparsity=")), "null")
    if value in ("null", "0", "0.0") or any(_is_sweep_of_options(override, seen) for override in seen.overrides):
        return None
    levels = cfg.get("levels")
    if levels:
        return None if float(levels[-1]) == cfg.sparsity else (
            f"nothing reads sparsity={value}: the last of levels={list(levels)} is the final sparsity"
        )  # fmt: skip
    n, m = (OmegaConf.select(cfg, f"structure.{key}") for key in "nm")
    if n and m and cfg.sparsity != 1 - n / m:
        return f"nothing reads sparsity={value}: the structure keeps {n} of {m} weights, which is {1 - n / m:g}"
    if "sparsity" in references(cfg):
        return None
    final = OmegaConf.select(cfg, "schedule.final")
    if final == cfg.sparsity:
        return None
    why = f"method={cfg.method}" if cfg.get("method") else f"schedule={_choice('schedule', seen)}"
    return f"nothing reads sparsity={value}: {why} has schedule.final={final}. Leave one of the two out"


def _is_sweep_of_options(override: Override, seen: Seen) -> bool:
    return override.is_sweep_override() and override.key_or_group in seen.groups


def without_leftovers(cfg: DictConfig, settings: Sequence[str]) -> DictConfig:
    """A copy of a configuration without the keys that an option brought for a target which another one replaced.

    `data._target_=mymod.Data` keeps of data=digits what `mymod.Data` has as parameters; what was typed stays.

    Args:
        cfg: composed.
        settings: of this run.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    given = {setting.partition("=")[0].lstrip("+") for setting in settings}
    for key in given:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent and name == "_target_" else None
        if not isinstance(node, DictConfig):
            continue
        parameters, _ = parameters_of(target(node, parent))
        for left in list(node):
            typed = any(other == f"{parent}.{left}" or other.startswith(f"{parent}.{left}.") for other in given)
            if not typed and left not in parameters and not str(left).startswith("_"):
                del node[left]
    return cfg
