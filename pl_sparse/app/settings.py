"""Checks of a composed configuration, before anything is built or trained."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationError,
)

from pl_sparse.core.registry import suggestion

__all__ = ["CONF", "ConfigError", "check", "target"]

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
    "prefix_cache": str,
    "threads": int | None,
    "mode": typing.Literal["max", "min"],
    "label_smoothing": float,
    "test": bool,
    "export_measure": bool,
    "ckpt_path": str | None,
    "trust": bool | None,
    "output_dir": str | None,
}
_SPECIAL = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


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
    try:
        return get_object(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        module, _, name = path.rpartition(".")
        hint = ""
        try:
            hint = " " + suggestion(name, [key for key in vars(get_object(module)) if not key.startswith("_")])
        except Exception:
            hint = " Is its folder on the Python path?"
        raise ConfigError(f"{where}._target_={path} cannot be found: {reason}.{hint}") from error


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
    for name, value in values.items():
        _walk(str(name), value)


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
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if open_ended:
        parameters |= _inherited(called)
    hints = _hints(called)
    for key, value in node.items():
        if key in _SPECIAL:
            continue
        if key not in parameters:
            if open_ended and not _is_of_package(called):
                continue
            names = [name for name in parameters if name not in ("self", "shape", "net")]
            hint = suggestion(key, names) if names else "It has none."
            raise ConfigError(f"{where}.{key} is no parameter of {node['_target_']}. {hint}")
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
