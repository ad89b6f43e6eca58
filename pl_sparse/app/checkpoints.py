"""Checkpoints read back: without pickled objects where they have none, with them where the run itself wrote them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from pl_sparse.app.settings import ConfigError

__all__ = ["is_plain"]


def is_plain(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is of tensors and plain values alone, as `weights_only` has to be for it.

    A module that saves networks or partial functions as its hyperparameters pickles them into its checkpoints.
    Loading such a one runs code, so that it has to be the run's own.

    Args:
        path: the checkpoint.
        folder: the run's; below it are the checkpoints that it wrote.

    Raises:
        ConfigError: it holds pickled objects, and is not the run's own.
    """
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=_is_archive(path))
    except pickle.UnpicklingError as error:
        if Path(folder).resolve() in Path(path).resolve().parents:
            return False
        kind = " ".join(str(error).partition("Unsupported global: ")[2].split(" ")[:2]) or "see save_hyperparameters"
        raise ConfigError(
            f"ckpt_path={path} holds pickled objects ({kind}), and loading them runs code: a run takes those of "
            f"its own folder alone, which is {folder}"
        ) from error
    return True


def _is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is in torch's format since 1.6, which alone can be mapped into memory."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
