"""Checkpoints read back: whole, of the same settings, without pickled objects unless the run itself wrote them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from pl_sparse.app.settings import ConfigError
from pl_sparse.app.sweep.identity import run_fingerprint, settings
from pl_sparse.callbacks.run.saved_settings import SavedSettings, plain
from pl_sparse.callbacks.run.status import read_status
from pl_sparse.results.runs import flat

__all__ = ["differences", "is_plain", "refuse_other_settings"]

_FREE = ("trainer", "logger", "callbacks", "export", "export_measure", "test", "objective", "objectives", "mode")
"""Settings that may change when a run is resumed: how long, on what, and what is made of it."""
_SHOWN = 4


def is_plain(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is of tensors and plain values alone, as `weights_only` has to be for it.

    A module that saves networks or partial functions as its hyperparameters pickles them into its checkpoints.
    Loading such a one runs code, so that it has to be the run's own.

    Args:
        path: the checkpoint.
        folder: the run's; below it are the checkpoints that it wrote.

    Raises:
        ConfigError: it cannot be read, or holds pickled objects and is not the run's own.
    """
    try:
        _loaded(path, weights_only=True)
    except pickle.UnpicklingError as error:
        kind = " ".join(str(error).partition("Unsupported global: ")[2].split(" ")[:2])
        if not kind and not _is_archive(path):
            raise ConfigError(_unreadable(path, "it is not a checkpoint of torch")) from error
        if Path(folder).resolve() not in Path(path).resolve().parents:
            raise ConfigError(
                f"ckpt_path={path} holds pickled objects ({kind or 'see save_hyperparameters'}), and loading them runs "
                f"code: a run loads them from its own folder alone, which is {folder}"
            ) from error
        return False
    except Exception as error:
        raise ConfigError(_unreadable(path, _reason(error))) from error
    return True


def _read(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Any:
    """What a checkpoint holds, its tensors without values."""
    plain = is_plain(path, folder)
    try:
        return _loaded(path, weights_only=plain)
    except Exception as error:
        raise ConfigError(_unreadable(path, _reason(error))) from error


def _loaded(path: str | os.PathLike[str], weights_only: bool) -> Any:
    return torch.load(path, map_location="meta", weights_only=weights_only, mmap=_is_archive(path))


def _is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is in torch's format since 1.6, which alone can be mapped into memory."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: BaseException) -> str:
    return f"it is damaged ({' '.join(str(error).split())[:100] or type(error).__name__})"


def _unreadable(path: str | os.PathLike[str], reason: str) -> str:
    """The lines for a checkpoint that cannot be used, with the others that are beside it."""
    path = Path(path)
    others = sorted(other for other in path.parent.glob("*.ckpt") if other != path)
    instead = f"ckpt_path={others[0]} is beside it" if others else "there is no other one beside it: train again"
    return f"ckpt_path={path} cannot be resumed from: {reason}\n  {instead}"


def _is_damaged(path: str | os.PathLike[str]) -> bool:
    """Whether the checksums of an archive are not those of its contents; torch does not compare them."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is not None


def refuse_other_settings(cfg: DictConfig) -> None:
    """Check that `ckpt_path` can be gone on from: it is whole, and was trained with these settings.

    Args:
        cfg: with `ckpt_path`, `output_dir` and `resume_with`; "changed" allows for other settings.

    Raises:
        ConfigError: it cannot.
    """
    path = Path(str(cfg.ckpt_path))
    if not path.is_file():
        raise ConfigError(f"ckpt_path={path} is not a file: checkpoints are in <run>/checkpoints/last.ckpt")
    checkpoint = _read(path, os.devnull if cfg.get("trust") is False else cfg.output_dir)
    missing = [key for key in ("state_dict", "loops", "optimizer_states") if key not in checkpoint]
    if not isinstance(checkpoint, Mapping) or missing:
        raise ConfigError(_unreadable(path, f"it is not a checkpoint of Lightning: it lacks {', '.join(missing)}"))
    saved = SavedSettings.of(checkpoint)
    if saved is not None and _is_damaged(path):
        raise ConfigError(_unreadable(path, "it is damaged: its checksums do not match"))
    if cfg.get("resume_with") == "changed":
        return
    if saved is None:
        if not _is_of_its_run(path, cfg):
            raise ConfigError(
                f"ckpt_path={path} lacks the settings of its training, which checkpoints of pl_sparse have\n"
                "  resume_with=changed resumes with the settings that are given here"
            )
        return
    changed = differences(saved, settings(cfg))
    if changed:
        shown = "; ".join(changed[:_SHOWN]) + (f"; {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
        raise ConfigError(
            f"ckpt_path={path} was trained with other settings: {shown}\n"
            "  leave them out to resume with those of the run; resume_with=changed resumes with those given here"
        )


def _is_of_its_run(path: Path, cfg: DictConfig) -> bool:
    """Whether a checkpoint of 0.1.0 is in the folder of a run whose settings were taken over, or are these."""
    run = path.parent.parent
    status = read_status(run)
    if status is not None and status.get("config") == run_fingerprint(cfg, run):
        return True
    return (run / ".hydra" / "overrides.yaml").is_file()


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a run and those that it would be resumed with, a phrase for each.

    >>> differences({"seed": 0, "trainer": {"max_epochs": 2}}, {"seed": 1, "trainer": {"max_epochs": 4}})
    ['seed=0 there, 1 here']
    """
    there, here = (dict(flat({k: v for k, v in plain(node).items() if k not in _FREE})) for node in (saved, asked))
    absent = object()
    phrases = []
    for key in dict.fromkeys([*there, *here]):
        values = there.get(key, absent), here.get(key, absent)
        if values[0] != values[1]:
            one, two = ("none" if value is absent else _shown(value) for value in values)
            phrases.append(f"{key}={one} there, {two} here")
    return sorted(phrases, key=lambda phrase: "._target_" not in phrase)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).rpartition(".")[2] if _is_target(value) else str(value)[:60]


def _is_target(value: Any) -> bool:
    return isinstance(value, str) and value.count(".") > 1 and value.replace(".", "").replace("_", "").isalnum()
