"""Modules that leave a list of modules, or are passed by, and what of their model follows: numbers, configs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Former", "PassedBy", "attribute", "former_index", "former_name", "set_attribute", "take_out"]

Former = tuple[nn.Module, str, Any]
"""A module, an attribute, and the value that it had."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


class PassedBy(nn.Module):
    """Returns the first of its inputs, in the place of a block that is gone."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def take_out(
    model: nn.Module, prefix: str, lists: Mapping[str, Collection[int]], skipped: Sequence[str]
) -> list[Former]:
    """Take modules out of a model, in place.

    Those after one that leaves a list are numbered anew, in their own `layer_idx` too, and the config of the module
    that holds the list counts fewer layers.

    Args:
        prefix: what the names of the model's modules have before them that those given lack.
        lists: indices by the name of a ModuleList or Sequential.
        skipped: names of modules whose place a `PassedBy` takes.

    Returns:
        What was changed, in this order.
    """
    former: list[Former] = []

    def put(module: nn.Module, key: str, value: Any) -> None:
        former.append((module, key, vars(module)[key]))
        vars(module)[key] = value

    for path in skipped:
        above, _, name = (prefix + path).rpartition(".")
        parent = model.get_submodule(above)
        put(parent, "_modules", {**parent._modules, name: PassedBy()})
    for path in sorted(lists, key=lambda path: path.count("."), reverse=True):  # those within others first
        parts, gone = model.get_submodule(prefix + path), set(lists[path])
        before = list(parts._modules.items())
        kept = [(i, name, part) for i, (name, part) in enumerate(before) if i not in gone]
        numbered = all(name.isdigit() for name, _ in before)
        put(parts, "_modules", {str(now) if numbered else name: part for now, (_, name, part) in enumerate(kept)})
        for now, (i, _, part) in enumerate(kept):
            for module in part.modules() if part is not None else ():
                if vars(module).get("layer_idx") == i != now:
                    put(module, "layer_idx", now)
        holder = model.get_submodule((prefix + path).rpartition(".")[0])
        config = getattr(holder, "config", None)
        if config is not None and "expert" not in path.rpartition(".")[2]:
            _replace_config(model, config, partial(_shallower, layers=len(before), gone=gone), put)
    return former


def _shallower(config: Any, layers: int, gone: Collection[int]) -> None:
    """Let a config count the layers that are left, and leave the others out of its lists."""
    for key in _DEPTHS:
        if getattr(config, key, None) == layers:
            setattr(config, key, layers - len(gone))
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, key, [each for i, each in enumerate(value) if i not in gone])


def _replace_config(
    model: nn.Module, config: Any, change: Callable[[Any], None], put: Callable[[nn.Module, str, Any], None]
) -> None:
    """Put a changed copy of a config where it is, in all modules."""
    new = copy.deepcopy(config)
    change(new)
    for module in model.modules():
        if vars(module).get("config") is config:
            put(module, "config", new)


def attribute(module: nn.Module, key: str) -> Any:
    """An attribute of a module, of its config, or in a tuple: "config.num_experts", "normalized_shape.0"."""
    owner: Any = module
    for part in key.split("."):
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    return owner


def set_attribute(model: nn.Module, module: Any, key: str, value: Any) -> None:
    """Set it. A config is replaced by a copy, wherever the model has it."""
    first, _, rest = key.partition(".")
    if rest.isdigit():
        before = getattr(module, first)
        setattr(module, first, type(before)((*before[: int(rest)], value, *before[int(rest) + 1 :])))
    elif rest:
        _replace_config(model, getattr(module, first), lambda new: setattr(new, rest, value), nn.Module.__setattr__)
    else:
        setattr(module, key, value)


def former_index(gone: Collection[int], index: int) -> int:
    """What the index of a module of a list was before some left it.

    >>> former_index((0, 2), 1)
    3
    """
    left = index
    for each in sorted(gone):
        left += each <= left
    return left


def former_name(name: str, lists: Mapping[str, Collection[int]]) -> str:
    """What a name was before modules left lists of the model."""
    for path in sorted(lists, key=lambda path: path.count(".")):
        head = f"{path}." if path else ""
        number, dot, rest = name.removeprefix(head).partition(".")
        if name.startswith(head) and number.isdigit():
            name = f"{head}{former_index(lists[path], int(number))}{dot}{rest}"
    return name
