"""What makes two runs the same, or the same up to some point: hashes of settings, code and data."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.aliases import ADDED, ADDED_WITHIN, former_targets
from pl_sparse.app.nodes import strings, targets
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.results.runs import BESIDE

__all__ = ["code", "data", "digest", "fingerprint", "run_fingerprint", "settings"]

_PACKAGE = Path(__file__).parents[2]


def settings(cfg: DictConfig) -> dict[str, Any]:
    """All settings of a run that change what comes out of it, resolved, without its folder."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.output_dir = "."
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for key in BESIDE:
        plain.pop(key, None)
    for key, default in ADDED.items():  # with its default it is a run of 0.1.0
        if plain.get(key) == default:
            plain.pop(key, None)
    for key in ("runtime", "device"):  # those that measure have it
        (plain.get("hardware") or {}).pop(key, None)
    for group, added in ADDED_WITHIN.items():
        node = plain
        for part in group.split("."):
            node = node.get(part) or {}
        for key, default in added.items():
            if key in node and node[key] == default:
                del node[key]
    plain["trainer"].pop("enable_progress_bar", None)
    if plain["trainer"].get("num_sanity_val_steps", 0) is None:  # which changes nothing that is trained; 0.1.0 had 0
        plain["trainer"]["num_sanity_val_steps"] = 0
    return plain


def fingerprint(cfg: DictConfig) -> str:
    """A hash of a run's settings: with the same one, it is the same run."""
    return digest(settings(cfg))


def run_fingerprint(cfg: DictConfig, folder: str | os.PathLike[str]) -> str:
    """The hash that a run has in its folder: `fingerprint`, but a run that 0.1.0 began there keeps the hash of then."""
    status = read_status(folder)
    former = digest(former_targets(settings(cfg)))
    return former if status is not None and status.get("config") == former else fingerprint(cfg)


def digest(value: Any) -> str:
    """A short hash of what JSON can hold.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code(plain: dict[str, Any]) -> dict[str, str]:
    """Hashes of this package's source and of the modules of all other targets, and versions of what they stand on.

    Args:
        plain: resolved settings.
    """
    hashes = {"pl_sparse": _hash(*sorted(_PACKAGE.rglob("*.py")))}
    for name in sorted(set(targets(plain))):
        try:
            module = inspect.getmodule(get_object(name))
            source = inspect.getsourcefile(module) if module is not None else None
        except Exception:
            continue  # the run itself fails with a message
        if source is not None and not name.startswith(("pl_sparse.", "torch.", "lightning.")):
            hashes[name] = _hash(Path(source))
    versions = {library: version(library) for library in ("torch", "lightning", "numpy")}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    machine = {"python": platform.python_version(), "device": f"{device}, {torch.get_num_threads()} threads"}
    return {**hashes, **versions, **machine}


def data(plain: Any) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that the settings of the data name.

    Args:
        plain: the resolved settings of the data.
    """
    facts = []
    for value in strings(plain):
        path = Path(value)
        if value and path.exists():
            files = [path] if path.is_file() else [Path(top, name) for top, _, names in os.walk(path) for name in names]
            facts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return facts


def _hash(*files: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:16]
