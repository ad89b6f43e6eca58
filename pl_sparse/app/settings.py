"""Checks of a composed configuration, before anything is built or trained."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationError,
)

from pl_sparse.app.idle import idle, misdirected, unread
from pl_sparse.core.registry import near_misses, suggestion

__all__ = ["CONF", "ConfigError", "check", "options_of", "parameters_of", "signature_of", "target"]

_PACKAGE = Path(__file__).parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The configuration: inside an installed package (in a checkout by a link), else beside it."""
_TOP: dict[str, Any] = {
    "sparsity": float | None,
    "seed": int,
    "method": str | None,
    "include": list[str] | None,
    "exclude": list[str],
    "first": bool,
    "last": bool | None,
    "overrides": dict[str, float],
    "misfit": typing.Literal["error", "dense"],
    "frozen": typing.Literal["skip", "prune", "error"],
    "layouts": dict[str, typing.Literal["out_in", "in_out", "out_in_kernel", "in_out_kernel"]],
    "ablation": typing.Literal["shuffle", "reinit", "invert"] | None,
    "calibration_batches": int,
    "shrink_every": int | None,
    "objective": str,
    "objectives": list[str],
    "front": bool,
    "levels": list[float] | None,
    "resume": bool,
    "resume_with": typing.Literal["same", "changed"],
    "overwrite": bool,
    "prefix_cache": str,
    "threads": int | None,
    "mode": typing.Literal["max", "min"] | None,
    "label_smoothing": float,
    "test": bool,
    "export_measure": bool,
    "print_config": bool,
    "ckpt_path": str | None,
    "trust": bool | None,
    "output_dir": str | None,
}
_SPECIAL = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def options_of(group: str) -> list[str]:
    """The options of a group of the configuration, in order."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


class ConfigError(ValueError):
    """The configuration cannot be run; the message says what is wrong, where, and what would be right."""


def target(node: Mapping[str, Any] | DictConfig, where: str) -> Any:
    """The class or function that a node's `_target_` names.

    Args:
        node: with `_target_`.
        where: the key of the node, for the message.

    Raises:
        ConfigError: there is no such thing, or it cannot be imported.
    """
    path = str(node["_target_"])
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"{where}._target_={path} is not a name: give package.module.Class")
    found = _located(path, where)
    if isinstance(found, ModuleType):
        names = [name for name, value in vars(found).items() if inspect.isclass(value) and not name.startswith("_")]
        hint = f"such as {path}.{names[-1]}" if names else "and this one has none"
        raise ConfigError(f"{where}._target_={path} is a module: name a class or function in it, {hint}")
    if not callable(found):
        raise ConfigError(f"{where}._target_={path} is {found!r}: name a class, or a function that makes the object")
    return found


def _located(path: str, where: str) -> Any:
    parts = path.split(".")
    found: Any = None
    for depth, name in enumerate(parts, 1):
        dotted = ".".join(parts[:depth])
        if depth > 1 and hasattr(found, name):
            found = getattr(found, name)
            continue
        if depth == 1 or isinstance(found, ModuleType):
            try:
                found = import_module(dotted)
                continue
            except ModuleNotFoundError as error:
                if error.name is None or not f"{dotted}.".startswith(f"{error.name}."):
                    raise ConfigError(
                        f"{where}._target_={path}: {dotted} imports {error.name}, which is not installed"
                    ) from error
        if depth == 1:
            raise ConfigError(
                f"{where}._target_={path} cannot be found: there is no module {name!r} in {os.getcwd()}, nor is one "
                "installed"
            )
        above = ".".join(parts[: depth - 1])
        names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
        raise ConfigError(
            f"{where}._target_={path} cannot be found: {above} has no {name}."
            + (f" {suggestion(name, near_misses(name, names) or names[-8:])}" if names else "")
        )
    return found


def parameters_of(called: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a class or function takes by name, and whether it takes any other name.

    One with `**kwargs` takes what the constructors above it take.
    """
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return {}, True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind in kinds}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if is_open:
        found |= _inherited(called)
    return found, is_open and not _is_of_package(called)


def signature_of(called: Any) -> str:
    """The signature of a class or function in a line, without what the application fills in.

    >>> signature_of(lambda width, depth=2: None)
    '(width, depth=2)'
    """
    parameters, _ = parameters_of(called)
    parts = []
    for name, parameter in parameters.items():
        if name in ("self", "args", "kwargs"):
            continue
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(name + (default if len(default) < 40 else "=..."))
    return f"({', '.join(parts)})"


def check(cfg: DictConfig) -> None:
    """Compare every value with the type it is declared with, and every key with the parameters of its target.

    Args:
        cfg: composed from train.yaml.

    Raises:
        ConfigError: a key its target does not take, a value of a wrong type, or one that is missing.
    """
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    for key, kind in _TOP.items():
        if key not in values:
            raise ConfigError(f"the configuration has no {key!r}: compose it from train.yaml")
        _check_value(key, values[key], kind)
    if values["output_dir"] == "":
        raise ConfigError("output_dir is empty: output_dir=. is the current folder")
    cache = values["prefix_cache"]
    if cache not in ("auto", "off") and Path(cache).exists() and not Path(cache).is_dir():
        raise ConfigError(f"prefix_cache={cache} is a file: give a folder, auto or off")
    reason = unread(cfg, {*_TOP, *(path.name for path in CONF.iterdir() if path.is_dir())})
    reason = reason or misdirected(values["objective"], values["mode"])
    if reason is not None:
        raise ConfigError(reason)
    for name, value in values.items():
        _walk(str(name), value)
    reason = idle({str(name): value for name, value in values.items()})
    if reason is not None:
        raise ConfigError(reason)


def _walk(where: str, node: Any) -> None:
    if node == "???":
        raise ConfigError(f"{where} is missing: give {where}=...")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_node(where, node)
    for key, value in node.items():
        _walk(f"{where}.{key}", value)


def _check_node(where: str, node: dict[str, Any]) -> None:
    called = target(node, where)
    parameters, is_open = parameters_of(called)
    hints = _hints(called)
    for key, value in node.items():
        if key in _SPECIAL:
            continue
        if key not in parameters:
            if is_open:
                continue
            names = [name for name in parameters if name not in ("self", "shape", "net")]
            close = near_misses(str(key), names)
            hint = suggestion(str(key), close) if close else f"Its parameters are {signature_of(called)}."
            raise ConfigError(
                f"{where}.{key} is not a parameter of {node['_target_']}. {hint if names else 'It has none.'}"
            )
        if key in hints and value != "???":
            _check_value(f"{where}.{key}", value, hints[key])


def _is_of_package(called: Any) -> bool:
    return getattr(called, "__module__", "").startswith("pl_sparse.")


def _inherited(called: Any) -> dict[str, inspect.Parameter]:
    """The parameters of the constructors above that one with **kwargs hands on to."""
    parameters: dict[str, inspect.Parameter] = {}
    for cls in inspect.getmro(called)[1:] if inspect.isclass(called) else ():
        if "__init__" in vars(cls):
            parameters |= dict(inspect.signature(cls).parameters)
    return parameters


def _hints(called: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    functions: Iterable[Callable[..., Any]] = (
        [vars(cls)["__init__"] for cls in reversed(inspect.getmro(called)) if "__init__" in vars(cls)]
        if inspect.isclass(called)
        else [called]
    )
    for function in functions:
        try:
            hints |= typing.get_type_hints(function)
        except Exception:
            continue  # names that exist for the type checker alone
    return hints


def _check_value(where: str, value: Any, kind: Any) -> None:
    if _has_target(value):
        return
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception as error:
        if not isinstance(error, PydanticSchemaGenerationError | PydanticUndefinedAnnotation):
            try:
                adapter = TypeAdapter(kind)
            except Exception:
                return
        else:
            return
    strict = not isinstance(value, (list, dict))  # a list may stand for a tuple, but "0.5" never for 0.5
    try:
        adapter.validate_python(value, strict=strict)
    except ValidationError as error:
        kinds = " or ".join(dict.fromkeys(_expected(detail) for detail in error.errors()))
        raise ConfigError(f"{where}={value!r} has a wrong type: {kinds}") from None
    except Exception:
        return


def _expected(detail: Any) -> str:
    message: str = detail["msg"]
    return message[0].lower() + message[1:]


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))
