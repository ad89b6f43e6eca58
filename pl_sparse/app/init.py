"""`pl-sparse init FOLDER`: a project of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_TEMPLATES = Path(__file__).parent / "project"


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse init FOLDER`: make a project of one's own, with a module, data, settings and a test."""
    parser = argparse.ArgumentParser(prog="pl-sparse init", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the project, which is empty or does not exist yet")
    folder: Path = parser.parse_args(arguments).folder
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: give a folder that is, or a new one")
        for source in sorted(_TEMPLATES.rglob("*.in")):
            name = source.relative_to(_TEMPLATES).with_suffix("")
            target = folder / (".gitignore" if str(name) == "gitignore" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    except OSError as error:
        reason = (
            str(error) if isinstance(error, FileExistsError) and error.errno is None else f"{folder}: {error.strerror}"
        )
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    here = folder.resolve() == Path.cwd()
    print(
        f"{folder} is a project. It trains by:"
        + ("" if here else f"\n  cd {folder}")
        + "\n  python train.py experiment=first"
    )
