"""Runs that trainings have left in folders."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["Run", "gather", "is_run", "read"]

_NAMES = ("method", "scorer", "structure", "schedule", "allocation", "masking")


# Runs


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        folder: where.
        state: "finished", "running", "failed", or "unfinished" for one that left neither an end nor an error.
        error: why it failed.
        overrides: what it was started with, without Hydra's own.
        config: its settings, resolved.
        models: the metrics of each model it has so far: several for a whole front or for lottery tickets.
        status: what it last said of itself.
    """

    folder: Path
    state: str
    error: str | None = None
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What starts it again."""
        return " ".join(["pl-sparse", "train", *map(shlex.quote, self.overrides)])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved settings by dotted key, without seeds and places."""
        place = self.config.get("output_dir")
        return {
            key: value
            for key, value in _flat(self.config)
            if key.rpartition(".")[2] not in ("seed", "output_dir", "ckpt_path", "save_dir", "dirpath")
            and not key.startswith(("logger.", "hydra."))
            and not (place and isinstance(value, str) and str(place) in value)
        }

    def setting(self, key: str) -> str | None:
        """What was chosen for a key of the command line, or what it is by default, in a word."""
        for override in self.overrides:
            name, _, value = override.partition("=")
            if name.lstrip("+~") == key:
                return value
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            return str(node.get("_target_", "")).rpartition(".")[2].lower() or None
        return None if node is None else str(node)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def gather(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """All runs in or below folders, in the order of their names, numbers by value.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        top = Path(folder)
        if not top.is_dir():
            raise FileNotFoundError(f"{top} is no folder")
        for path in _runs(top):
            found.setdefault(path.resolve(), read(path))
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a training has left its files there."""
    return any((folder / name).is_file() for name in ("metrics.json", "status.json", ".hydra/overrides.yaml"))


def _runs(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(below, key=lambda path: _natural(path.name)):
        yield from _runs(path)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """
    >>> sorted(["10", "9", "b", "a2", "a10"], key=_natural)
    ['9', '10', 'a2', 'a10', 'b']
    """
    parts = "".join(c if c.isdecimal() else f"\0{c}\0" for c in name).split("\0")
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]


def read(folder: Path) -> Run:
    """One run, as far as it is readable."""
    run = Run(folder, "unfinished")
    try:
        run.status = _json(folder / "status.json") or {}
        run.overrides = [
            o for o in map(str, _yaml(folder / ".hydra/overrides.yaml") or []) if not o.startswith("hydra.")
        ]
        run.config = _yaml(folder / "config.yaml") or _yaml(folder / ".hydra/config.yaml") or {}
        final = _json(folder / "metrics.json")
        levels = _json(folder / "front.json") or [
            _ticket(_json(path), final or {}) for path in sorted(folder.glob("levels/level_*/metrics.json"))
        ]
    except (ValueError, KeyError, OSError) as error:
        run.state, run.error = "failed", f"cannot be read: {error}"
        return run
    run.models = [level for level in levels if isinstance(level, dict)]
    if final is not None and not any(level.get("sparsity") == final.get("sparsity") for level in run.models):
        run.models.append(final)
    run.error = run.status.get("error")
    run.state = run.status.get("state") or ("finished" if final is not None else "unfinished")
    return run


def _ticket(row: dict[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one round of lottery tickets, in the words of metrics.json: its own, and what the run is."""
    same = {
        key: final[key] for key in (*_NAMES, "seed", "params_total", "params_prunable", "macs_dense") if key in final
    }
    return {**same, **row, "sparsity": 1 - row["remaining"]}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _yaml(path: Path) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {error}") from error
