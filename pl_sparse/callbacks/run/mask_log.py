"""What loggers get while a run trains: its masks as they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.upstream import logs_this_step

__all__ = ["Track"]


class Track(Callback):
    """Logs the loss step by step, and at updates of the masks how dense each layer is and how much of them stayed:
    `Trainer(callbacks=[Sparsity(...), Track()], logger=...)`.

    Logged as "train/loss_step", "density/<weight>", and of all masks together, with A the positions kept before the
    update and B those after it, "mask/overlap" |A & B| / |A | B| (Jaccard) and "mask/stayed" |A & B| / |A|.

    Both are logged at most once in `log_every_n_steps` steps: masks that change more often are compared with those that
    were logged before. The steps between need nothing from the device.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor] = []
        self._seen = 0  # updates of the masks that were looked at
        self._logged = 0  # the step at which masks were logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = Sparsity.of(trainer).pruner
        self._seen = pruner.num_updates
        self._logged = trainer.global_step - trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._masks = [param.mask.clone() for param in pruner.params]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and logs_this_step(trainer):
            self._log(trainer, {"train/loss_step": float(loss)})
        if trainer.global_step - self._logged >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)
        self._masks = []

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        pruner = Sparsity.of(trainer).pruner
        if pruner.num_updates == self._seen:
            return
        self._seen, self._logged = pruner.num_updates, trainer.global_step
        if len(self._masks) != len(pruner.params):  # weights joined: nothing to compare theirs with
            self._masks = [param.mask.clone() for param in pruner.params]
        counts = torch.stack(  # (weights, 3): kept before, kept now, kept both times
            [
                torch.stack([param.total(kept) for kept in (before, param.mask, before & param.mask)]).cpu()
                for before, param in zip(self._masks, pruner.params, strict=True)
            ]
        )
        for before, param in zip(self._masks, pruner.params, strict=True):
            before.copy_(param.mask)
        values = {
            f"density/{param.name}": kept / max(param.numel, 1)
            for param, kept in zip(pruner.params, counts[:, 1].tolist(), strict=True)
        }
        before_all, after_all, both = counts.sum(0).tolist()
        values["mask/overlap"] = both / max(before_all + after_all - both, 1)
        values["mask/stayed"] = both / max(before_all, 1)
        self._log(trainer, values)

    @staticmethod
    def _log(trainer: Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step)
