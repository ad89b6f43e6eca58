"""Names: what a string stands for, and what was probably meant when it stands for nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


def near_misses(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names most like `word`, best first.

    >>> near_misses("movment", ["magnitude", "movement", "taylor"])
    ['movement']
    """
    return get_close_matches(word, list(known), n=most, cutoff=0.5)


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence for an error message: the near misses, else all that is known."""
    names = sorted(set(known))
    close = near_misses(word, names)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "Known: " + ", ".join(names) + "."


def _subclasses(kind: type[T]) -> Iterable[type[T]]:
    for cls in kind.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def catalogue(kind: type[T]) -> dict[str, type[T]]:
    """Every concrete class of an axis under its name: the class name in lower case ("OneShot" is "oneshot")."""
    return {cls.__name__.lower(): cls for cls in _subclasses(kind) if not inspect.isabstract(cls)}


def build(kind: type[T], name: str, **arguments: Any) -> T:
    """The object that `name` stands for on the axis `kind`, e.g. `build(Scorer, "magnitude")`.

    Underscores and case do not matter. Arguments that the class does not take are an error of the caller.

    Raises:
        ValueError: the axis has no such name; the message has the near misses.
    """
    known = catalogue(kind)
    found = known.get(name.replace("_", "").lower())
    if found is None:
        raise ValueError(f"no {kind.__name__.lower()} is called {name!r}. {suggestion(name, known)}")
    return found(**arguments)
