"""Runs: what a training has left in its folder, read back."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape

from pl_sparse.core.files import read_yaml

__all__ = ["BESIDE", "CHOICES", "Run", "beside", "flat", "gather", "is_run", "key_of", "printable", "read", "shown"]

_LARGEST = 1 << 26  # bytes of a file of figures
CHOICES = ("method", "scorer", "structure", "schedule", "allocation", "masking")
"""The metrics that name the parts of a run's method."""
BESIDE = (
    "output_dir", "ckpt_path", "resume", "resume_with", "overwrite", "prefix_cache", "threads", "print_config",
    "trust",
)  # fmt: skip
"""Settings that say where and how, not what is trained."""
_SHOWN = (
    "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler", "num_sanity_val_steps",
    "default_root_dir", "detect_anomaly", "logger",
)  # fmt: skip
"""Settings of a Trainer that change what it shows, and where."""
_LOADING = ("workers", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "download")


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        folder: the folder.
        state: "finished", "running", "failed", "interrupted", or "unfinished" for a run that left neither an end nor
            an error.
        error: why it failed.
        overrides: the arguments it was started with, without Hydra's own.
        config: its settings, resolved.
        models: the metrics of each model it has so far: several for a whole front or for lottery tickets.
        status: the content of status.json.
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
        """The command that starts it again."""
        return " ".join(["pl-sparse", "train", *map(shlex.quote, self.overrides)])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved settings by dotted key, without seeds and places."""
        output_dir = self.config.get("output_dir")
        return {
            key: value
            for key, value in flat(self.config)
            if key.rpartition(".")[2] not in ("seed", "output_dir", "ckpt_path", "save_dir", "dirpath")
            and not key.startswith(("logger.", "hydra."))
            and not (output_dir and isinstance(value, str) and str(output_dir) in value)
        }

    @cached_property
    def decisive(self) -> dict[str, Any]:
        """The part of `settings` that decides what comes out of training."""
        return {key: value for key, value in self.settings.items() if not beside(key)}

    def setting(self, key: str) -> str | None:
        """The value of a setting in one word.

        Args:
            key: the setting's dotted key on the command line.

        Returns:
            the override's value, else that of the settings, where a class is its name in lower case; None if there is
            neither.
        """
        for override in self.overrides:
            if key_of(override) == key:
                return override.partition("=")[2]
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            return str(node.get("_target_", "")).rpartition(".")[2].lower() or None
        return None if node is None else str(node)


def beside(key: str) -> bool:
    """Whether a setting, by its dotted key, says where and how a run trains and what it shows, not what is trained.

    >>> [beside(key) for key in ("trainer.enable_progress_bar", "trainer.profiler.filename", "trainer.max_epochs")]
    [True, True, False]
    """
    group, *inner = key.split(".")
    if group == "trainer":
        return bool(inner) and inner[0] in _SHOWN
    return group in BESIDE or (group == "data" and key.rpartition(".")[2] in _LOADING)


def key_of(override: str) -> str:
    """The key of an override, as it is without Hydra's signs.

    >>> key_of("+model.width=4"), key_of("~data.limit")
    ('model.width', 'data.limit')
    """
    return override.partition("=")[0].lstrip("+~")


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings with their dotted keys. An empty mapping is a value.

    Args:
        node: the outermost mapping.
        prefix: put before each key.

    >>> dict(flat({"a": {"b": 1, "c": {}}, "d": 2}))
    {'a.b': 1, 'a.c': {}, 'd': 2}
    """
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def printable(text: str) -> str:
    """A text of a run without control characters, which terminals act on.

    >>> printable("a\\x1b]52;c;")
    'a\\\\x1b]52;c;'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """A text of a run for rich: printable, and no markup."""
    return escape(printable(text))


# Reading


def gather(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """All runs in or below some folders.

    Args:
        folders: runs, or folders of runs; a run that several of them contain is read once.

    Returns:
        the runs in the order of their names, numbers by value.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    by_path: dict[Path, Run] = {}
    for folder in folders:
        top = Path(folder)
        if not top.is_dir():
            raise FileNotFoundError(f"{top} is not a folder")
        for path in _run_folders(top):
            by_path.setdefault(path.resolve(), read(path, top))
    return list(by_path.values())


def is_run(folder: Path) -> bool:
    """Whether a training has left its files in the folder."""
    return any((folder / name).is_file() for name in ("metrics.json", "status.json", ".hydra/overrides.yaml"))


def _run_folders(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    below = [
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]  # what a link leads to is elsewhere, or is found without it
    for path in sorted(below, key=lambda path: _natural(path.name)):
        yield from _run_folders(path)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """The key that sorts names with their numbers by value.

    >>> sorted(["10", "9", "b", "a2", "a10"], key=_natural)
    ['9', '10', 'a2', 'a10', 'b']
    """
    parts = "".join(c if c.isdecimal() else f"\0{c}\0" for c in name).split("\0")
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]


def read(folder: Path, within: Path | None = None) -> Run:
    """The run in a folder, as far as its files are there. A run whose files are broken counts as failed.

    Args:
        folder: the run's.
        within: files that are links to what is outside of this folder are not read; None for the run's own.
    """
    run = Run(folder, "unfinished")
    top = (within or folder).resolve()
    try:
        run.status = _json(folder / "status.json", dict, top) or {}
        run.overrides = [
            o for o in map(str, _yaml(folder / ".hydra/overrides.yaml", list, top) or []) if not o.startswith("hydra.")
        ]
        run.config = _yaml(folder / "config.yaml", dict, top) or _yaml(folder / ".hydra/config.yaml", dict, top) or {}
        final = _json(folder / "metrics.json", dict, top)
        models = _json(folder / "front.json", list, top) or [
            _ticket(_json(path, dict, top) or {}, final or {})
            for path in sorted(folder.glob("levels/level_*/metrics.json"))
        ]
    except (ValueError, TypeError, KeyError, OSError) as error:
        run.state, run.error = "failed", f"cannot be read: {error}"
        return run
    run.models = [metrics for metrics in models if isinstance(metrics, dict)]
    if final is not None and not any(metrics.get("sparsity") == final.get("sparsity") for metrics in run.models):
        run.models.append(final)
    run.error = run.status.get("error")
    run.state = run.status.get("state") or ("finished" if final is not None else "unfinished")
    return run


def _ticket(row: dict[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one round of lottery tickets, with the keys of metrics.json.

    Args:
        row: the metrics of the round.
        final: those of the run, for what all rounds have in common.
    """
    common = ("seed", "params_total", "params_prunable", "macs_dense")
    return {
        **{key: final[key] for key in (*CHOICES, *common) if key in final},
        **row,
        "sparsity": 1 - row["remaining"],
    }


def _json(path: Path, kind: type, top: Path) -> Any:
    if not _is_within(path, top):
        return None
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} is larger than {_LARGEST:,} bytes")
    try:
        return _of_kind(json.loads(path.read_text(encoding="utf-8")), kind, path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _yaml(path: Path, kind: type, top: Path) -> Any:
    return _of_kind(read_yaml(path), kind, path) if _is_within(path, top) else None


def _of_kind(value: Any, kind: type, path: Path) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path.name} holds a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _is_within(path: Path, top: Path) -> bool:
    """Whether there is a file, in a folder when links are followed."""
    return path.is_file() and path.resolve().is_relative_to(top)
