"""What stands in nested settings: their keys, their texts, and the targets that they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["keys", "strings", "targets"]


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested settings.

    >>> list(keys({"a": {"b": 1}}))
    ['a', 'a.b']
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from keys(value, f"{prefix}{key}.")


def strings(node: Any) -> Iterator[str]:
    """The texts of nested settings.

    >>> list(strings({"a": ["b", {"c": "d"}], "e": 1}))
    ['b', 'd']
    """
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings(value)


def targets(node: Any) -> Iterator[str]:
    """What `_target_` names in nested settings.

    >>> list(targets({"_target_": "a.B", "x": [{"_target_": "c.D"}]}))
    ['a.B', 'c.D']
    """
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    for value in node if isinstance(node, list) else ():
        yield from targets(value)
