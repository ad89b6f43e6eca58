"""Work that is only nice to have: where it fails, a warning of one line takes its place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pl_sparse.core.files import is_full

__all__ = ["beginning", "first_line", "nice_to_have"]


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
