"""Files that are written whole or not at all.

Text goes to a temporary file beside its destination, is flushed to disk and then takes the destination's place in
one step, so a reader (or a crash) never sees half a file.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["finite", "replacing", "write_csv", "write_json", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, which replaces `path` when the block ends.

    The caller creates the file. Missing parent folders are made. After an exception `path` is as it was and the
    temporary file is gone.

    Raises:
        FileNotFoundError: the block wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:100]}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, line ends as given."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` to `path` as indented JSON; floats JSON lacks (NaN, infinities) become null.

    Raises:
        TypeError: `obj` holds something JSON cannot; nothing is written.
    """
    write_text(path, json.dumps(finite(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` to `path` under one header line: the keys of all rows, in order of first appearance.

    A key a row lacks, or holds as None, is an empty cell. No rows make an empty file.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    if columns:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())


def finite(obj: object) -> object:
    """A copy of `obj` in which every float that is not finite is None.

    >>> finite({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [finite(value) for value in obj]
    return obj
