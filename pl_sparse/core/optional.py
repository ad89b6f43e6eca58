"""What may be missing: work that is only nice to have, whose failure is a warning of one line, and extras."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pl_sparse.core.files import is_full

__all__ = ["beginning", "first_line", "library", "missing", "nice_to_have"]


def beginning(error: BaseException) -> str:
    """The first line of an error's message; its kind where there is none.

    >>> beginning(ValueError("one\\ntwo")), beginning(KeyError())
    ('one', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_line(error: BaseException, length: int = 160) -> str:
    """The kind of an error, and how its message begins."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:length]}".rstrip(": ")


def library(name: str, who: str, extra: str) -> Any:
    """A module of a library that an extra brings.

    Args:
        name: of the module.
        who: needs it.
        extra: its name.

    Raises:
        ImportError: it is not installed, or made for another version of what it stands on.
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except Exception as error:  # made for another torch: an AttributeError, a RuntimeError, an OSError
        if find_spec(package) is None:
            raise ImportError(f"{who} needs the library {package}: pip install 'pl_sparse[{extra}]'") from error
        torch = getattr(sys.modules.get("torch"), "__version__", "none")
        raise ImportError(
            f"{who} needs the library {package}, which cannot be imported: {beginning(error)}\n"
            f"  install versions that match; torch is {torch}"
        ) from error


def missing(extra: str, *packages: str) -> str | None:
    """What to install, if one of the packages is not there; None if all are.

    Args:
        extra: the extra of pl_sparse that brings them.
        packages: names as they are imported.
    """
    if any(find_spec(package) is None for package in packages):
        *others, last = packages
        return f"it needs {', '.join(others)}{' and ' if others else ''}{last}: pip install 'pl_sparse[{extra}]'"
    return None


@contextmanager
def nice_to_have(result: str) -> Iterator[None]:
    """An exception within the block becomes a warning, and the program goes on after the block. A full disk stays an
    error: what comes next would not fit either.

    Args:
        result: what is missing where the block fails, as the beginning of a sentence.

    >>> with warnings.catch_warnings(record=True, action="always") as caught, nice_to_have("the picture"):
    ...     raise OSError("no such font")
    >>> str(caught[0].message)
    'the picture is left out: OSError: no such font'
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise
        warnings.warn(f"{result} is left out: {first_line(error)}", stacklevel=4)
