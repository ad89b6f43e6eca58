"""Which files of a folder a run wrote, and which it found there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from pl_sparse.core.files import noting

__all__ = ["Ledger"]


class Ledger:
    """What is written below a folder by `core.files`, and what else is noted.

    Args:
        folder: the folder.
        written: names that are known already, relative to the folder, with slashes; that of a folder stands for all
            that is in it.
        found: names of what was there before.
    """

    def __init__(self, folder: str | os.PathLike[str], written: Iterable[str] = (), found: Iterable[str] = ()) -> None:
        self.folder = Path(folder)
        self.written = set(written)
        self.found = set(found)

    def note(self, path: str | os.PathLike[str]) -> None:
        """Note a file or folder as written, if it is below the folder."""
        try:
            name = Path(os.path.abspath(path)).relative_to(os.path.abspath(self.folder))
        except ValueError:
            return
        self.written.add(name.as_posix())

    def noting(self) -> AbstractContextManager[None]:
        """Within the context every file that is written is noted."""
        return noting(self.note)

    def has(self, name: str) -> bool:
        """Whether a file, or anything in a folder of that name, was written."""
        return any(entry == name or entry.startswith(f"{name}/") for entry in self.written)

    def clear(self, names: Iterable[str] = ()) -> None:
        """Remove what was written, and of further names what was not found; and the folders that this empties.

        Nothing outside of the folder is touched, whatever the names say, and links are not followed.
        """
        for path in self._places(names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            self._remove_empty(path)
        self.written = set()

    def move(self, to: Path, names: Iterable[str] = ()) -> None:
        """Move to another folder what `clear` would remove, to the same names there."""
        for path in self._places(names):
            if path.exists() or path.is_symlink():
                place = to / path.relative_to(self.folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
                self._remove_empty(path)
        self.written = set()

    def _places(self, names: Iterable[str]) -> list[Path]:
        top = self.folder.resolve()
        places = []
        for name in sorted({*self.written, *(set(names) - self.found)}):
            path = self.folder / name
            outside = os.path.isabs(name) or ".." in Path(name).parts or name in ("", ".")
            if not outside and path.parent.resolve().is_relative_to(top):
                places.append(path)
        return places

    def _remove_empty(self, path: Path) -> None:
        """Remove the folders that a file was in, as far as they are empty."""
        for parent in list(path.relative_to(self.folder).parents)[:-1]:
            try:
                (self.folder / parent).rmdir()
            except OSError:
                return
