"""The masks as they were after each of their updates, on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.files import replacing
from pl_sparse.core.parameter import packed
from pl_sparse.core.sharded import whole

__all__ = ["MaskHistory"]


class MaskHistory(Callback):
    """Keeps the masks after their updates in `folder`, for `pl-sparse overlap`: `Trainer(callbacks=[Sparsity(...),
    MaskHistory("masks")])`.

    A file `step_<optimizer step>.safetensors` has the bits of each mask by the weight's name, eight to a byte, and the
    shapes in its metadata. If there would be more than `most` files, every second one is removed, and from then on
    every second update is kept. The first update and the last masks are always kept. Weights that were removed from the
    model count as pruned. A training that begins anew removes the files of an earlier one, a resumed one those of later
    steps.

    Args:
        folder: the folder of the files.
        most: the largest number of files.
    """

    def __init__(self, folder: str | os.PathLike[str], most: int = 64) -> None:
        if most < 2:
            raise ValueError(f"most={most!r} must be 2 or more")
        self.folder = Path(folder)
        self.most = most
        self._stride = 1
        self._steps: list[int] = []
        self._seen = 0  # updates of the masks so far

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = Sparsity.of(trainer).pruner
        if trainer.global_step == 0:
            self._stride, self._steps = 1, []
        self._seen = pruner.num_updates
        if trainer.is_global_zero:
            for path in self.folder.glob("step_*.safetensors"):
                if path not in map(self._path, self._steps):
                    path.unlink()
        if pruner.num_updates and not self._steps:  # masks that training begins with
            self._keep(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates = Sparsity.of(trainer).pruner.num_updates
        if updates == self._seen:
            return
        due = not self._steps or updates // self._stride > self._seen // self._stride
        self._seen = updates
        if due:
            self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Sparsity.of(trainer).pruner.num_updates:
            self._keep(trainer)

    @torch.no_grad()
    def _keep(self, trainer: Trainer) -> None:
        params, step = Sparsity.of(trainer).pruner.params, trainer.global_step
        with whole(params):
            tensors = {param.name: packed(param.fill(param.mask)) for param in params}
        if step in self._steps:
            self._steps.remove(step)
        self._steps.append(step)
        gone: list[int] = []
        if len(self._steps) > self.most:
            self._stride *= 2
            gone, self._steps = self._steps[1::2], self._steps[::2]
            if step in gone:
                gone.remove(step)
                self._steps.append(step)
        if trainer.is_global_zero:
            shapes = json.dumps({param.name: list(param.former) for param in params})
            with replacing(self._path(step)) as temporary:
                save_file(tensors, temporary, {"shapes": shapes})
            for earlier in gone:
                self._path(earlier).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def state_dict(self) -> dict[str, Any]:
        return {"stride": self._stride, "steps": list(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stride, self._steps = state_dict["stride"], list(state_dict["steps"])
