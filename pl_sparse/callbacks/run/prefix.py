"""The start that several runs have in common, trained by one of them."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.files import replacing

__all__ = ["Prefix"]


class Prefix(Callback):
    """Takes the first epochs of a training over from a cache, or trains them and puts them there.

    A stage is the state of training after a number of whole epochs: weights, optimizer, random generators, loaders,
    callbacks. Its name in the cache says everything that determines it, so that a run which goes on from a stage is
    the run which trained it, bit for bit. Of several runs that need a stage at once one trains it, and the others wait
    at a file lock, which the system releases when its process ends in whatever way.

    Args:
        cache: a folder that all runs see.
        stages: the name of the stage after so many epochs.
        pruned: the stages that hold masks; at the others nothing has been pruned or scored yet, and the state of the
            pruner is not taken over, since it may be of other weights (another structure).
        folder: the run's; `levels` in it is a part of a stage.
    """

    def __init__(
        self,
        cache: str | os.PathLike[str],
        stages: Mapping[int, str],
        pruned: frozenset[int],
        folder: str | os.PathLike[str],
    ) -> None:
        self.cache = Path(cache)
        self.stages = dict(sorted(stages.items()))
        self.pruned = pruned
        self.folder = Path(folder)
        self._locks: dict[int, FileLock] = {}

    def fork(self, sparsity: Sparsity, checkpoint: str | None, needed: int) -> tuple[str | None, int]:
        """Where training starts: from the furthest stage there is, or from the run's own checkpoint if it is further.

        Args:
            sparsity: the run's callback, attached.
            checkpoint: the run's own, if it was interrupted.
            needed: epochs that this run trains; a stage at its end or later is not gone on from.

        Returns:
            A checkpoint and the optimizer steps that it takes over: (checkpoint, 0) where there is nothing to take.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        before = [epochs for epochs in self.stages if epochs < needed]
        for epochs in before:
            self._drop_damaged(epochs)
            self._claim(epochs)
        for epochs in self.stages:
            if epochs >= needed and not self._state(epochs).is_file():  # left for longer runs, if nobody else trains it
                self._claim(epochs, wait=False)
        cached = [epochs for epochs in before if self._state(epochs).is_file()]
        if not cached:
            return checkpoint, 0
        epochs = cached[-1]
        try:
            own = None if checkpoint is None else torch.load(checkpoint, map_location="cpu", weights_only=True)
            state = torch.load(self._state(epochs), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # a stage of another run with pickled objects is not read: train it anew
            return checkpoint, 0
        if own is not None and _epochs(own) >= epochs:
            return checkpoint, 0
        for key in [key for key in state["callbacks"] if key.startswith("ModelCheckpoint")]:
            del state["callbacks"][key]  # what a run has saved, and where, is its own affair
        if epochs not in self.pruned:
            step = state["callbacks"][sparsity.state_key]["step"]
            state["callbacks"][sparsity.state_key] = {**sparsity.pruner.state_dict(), "step": step}
        levels = self._state(epochs).parent / "levels"
        if levels.is_dir():
            shutil.copytree(levels, self.folder / "levels", dirs_exist_ok=True)
        path = self.folder / "checkpoints" / "prefix.ckpt"
        with replacing(path) as temporary:
            torch.save(state, temporary)
        return str(path), int(state["global_step"])

    def _state(self, epochs: int) -> Path:
        """The file of the stage after so many epochs."""
        return self.cache / self.stages[epochs] / "state.ckpt"

    def _drop_damaged(self, epochs: int) -> None:
        """Remove a stage whose file is not whole, or whose checksums are not those of its content."""
        state = self._state(epochs)
        if not state.is_file():
            return
        try:
            with zipfile.ZipFile(state) as archive:
                damaged = archive.testzip() is not None
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error):
            damaged = True
        if damaged:
            print(f"{state} is damaged: its {epochs} epochs are trained again", flush=True)
            state.unlink(missing_ok=True)

    def _claim(self, epochs: int, wait: bool = True) -> None:
        """Become the one who trains a stage, unless it is there; wait for another one who does."""
        state = self._state(epochs)
        if state.is_file():
            return
        lock = FileLock(self.cache / f"{self.stages[epochs]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                return
            print(f"waiting for another run, which trains the first {epochs} epochs of both", flush=True)
            lock.acquire()
        if state.is_file():
            lock.release()
        else:
            self._locks[epochs] = lock

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        lock = self._locks.pop(epochs, None)
        if lock is None:
            return
        state = self._state(epochs)
        if (self.folder / "levels").is_dir():
            shutil.copytree(self.folder / "levels", state.parent / "levels", dirs_exist_ok=True)
        with replacing(state) as temporary:
            trainer.save_checkpoint(temporary)
        lock.release()

    def release(self) -> None:
        """Let others train what this run did not come to, and throw away what it started from."""
        (self.folder / "checkpoints" / "prefix.ckpt").unlink(missing_ok=True)
        for lock in self._locks.values():
            lock.release()
        self._locks = {}


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    """Whole epochs that a checkpoint has behind it."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
