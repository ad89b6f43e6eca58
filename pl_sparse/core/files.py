"""Files that are written whole or not at all.

A file is made in a temporary folder beside its destination, is flushed to disk and then takes the destination's place
in one step, so a reader (or a crash) never sees half a file.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = [
    "DamagedFileError",
    "finite",
    "is_full",
    "noting",
    "read_yaml",
    "remove_temporaries",
    "replacing",
    "write_csv",
    "write_json",
    "write_text",
]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}(\.[^.]+)?")  # a folder; in 0.1.0 a file with its suffix
_DEEPEST = 64
_notes: list[Callable[[Path], None]] = []


class DamagedFileError(ValueError):
    """A file is not what was written, not of this model, or would fill more memory than it may."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside `path`, which replaces `path` when the block ends.

    The caller creates the file; it gets the mode that a new file has, whatever made it. Missing parent folders are
    made. After an exception `path` is as it was and the temporary folder is gone.

    Raises:
        FileNotFoundError: the block wrote nothing.
        OSError: the disk is full (ENOSPC), whatever the block raised of it; `filename` is `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.stem[:100]}.{uuid4().hex}")
    temporary = folder / path.name
    try:
        folder.mkdir()
        temporary.touch()  # some writers replace it by a file that only its owner may read
        mode = temporary.stat().st_mode & 0o777
        temporary.unlink()
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except Exception as error:
        if is_full(error) or (not isinstance(error, OSError) and _has_no_room(path.parent)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for note in _notes:
        note(path)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _has_no_room(folder: Path) -> bool:
    """Whether the disk of a folder has no block left; what did not fit is still there."""
    try:
        return shutil.disk_usage(folder).free < 1 << 16
    except OSError:
        return False


@contextmanager
def noting(note: Callable[[Path], None]) -> Iterator[None]:
    """Within the block `note(path)` is called for each file that was written."""
    _notes.append(note)
    try:
        yield
    finally:
        _notes.remove(note)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writes left in a folder; none may be under way there."""
    for path in [path for path in Path(folder).glob(".*") if _TEMPORARY.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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

    A key a row lacks, or holds as None, is an empty cell. No rows make an empty file. A text that a spreadsheet would
    take for a formula has an apostrophe before it.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    if columns:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_cell, columns))
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def _cell(value: object) -> object:
    """
    >>> _cell("=1+1"), _cell(" @x"), _cell("-0.5"), _cell(-0.5), _cell("a=b")
    ("'=1+1", "' @x", '-0.5', -0.5, 'a=b')
    """
    if not isinstance(value, str):
        return value
    value = value.replace("\r", " ")  # which begins a row
    if not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def read_yaml(path: str | os.PathLike[str], limit: int = 1 << 19) -> Any:
    """What a YAML file holds, as plain values.

    Anchors and aliases, by which a short text can stand for more than any memory holds, are refused: nothing here
    writes them.

    Args:
        limit: bytes that the file may have.

    Raises:
        ValueError: it is not YAML, uses aliases, nests too deeply or is larger than the limit.
    """
    import yaml  # type: ignore[import-untyped]

    path = Path(path)
    if path.stat().st_size > limit:
        raise ValueError(f"{path.name} is larger than {limit:,} bytes, too large for a configuration")
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise ValueError(f"{path.name} has aliases (*name), which no configuration of a run has")
            name = type(token).__name__  # Block or Flow, Mapping or Sequence, StartToken or EndToken
            depth += name.endswith(("MappingStartToken", "SequenceStartToken"))
            depth -= name.endswith("EndToken") and name.startswith(("Block", "Flow"))
            if depth > _DEEPEST:
                raise ValueError(f"{path.name} nests more than {_DEEPEST} levels")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"{path.name} is not YAML{where}: {getattr(error, 'problem', None) or error}") from error


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
