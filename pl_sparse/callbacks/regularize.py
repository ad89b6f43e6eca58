"""The callback that penalizes weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.masked import Group, Patterns, find
from pl_sparse.regularizer import Regularizer
from pl_sparse.schedule import OneShot

__all__ = ["Regularize"]


class Regularize(Callback):
    """Adds a penalty to the loss of any LightningModule: `Trainer(callbacks=[Regularize(L1(strength=1e-4)),
    Sparsity(...)])`.

    It comes before `Sparsity`, if there is one, so that a proximal step acts on the values that the optimizer wrote.
    The value of the penalty is logged as "penalty" at the end of each epoch. Weights that a proximal step makes zero
    are zero in checkpoints.

    Args:
        regularizer: the penalty.
        until: when it ends, as a fraction of training, "500 steps" or "3 epochs".
        include: patterns of the weights; None for all that are pruned by default.
        exclude: patterns of weights that are left out.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        until: float | str = 1.0,
        include: Patterns | None = None,
        exclude: Patterns = (),
    ) -> None:
        self.regularizer = regularizer
        self.until = until
        self.include = include
        self.exclude = exclude
        self.groups: list[Group] = []
        self._marked: Mapping[str, torch.Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        self._end = 0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        params = find(pl_module, self.include, self.exclude)
        self.groups = self.regularizer.groups(params, pl_module)
        with torch.no_grad():
            self.regularizer.start(self.groups, pl_module)
            for group in self.groups:
                for param, _ in group.members:
                    if self._marked is not None and param.name in self._marked:
                        param.set_mask(self._marked[param.name].to(param.weight.device))
        batches = trainer.num_training_batches
        per_epoch = None if batches == float("inf") else -(-int(batches) // max(trainer.accumulate_grad_batches, 1))
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            self._end = 2**62
        else:
            self._end = OneShot(final=0.0, begin=self.until).resolved(per_epoch).span(int(total))[0]
        me = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
            found = me()
            if found is not None and found._active:
                with torch.no_grad():
                    found.regularizer.shrink(found._of(optimizer), optimizer)

        self._handles = [optimizer.register_step_post_hook(stepped) for optimizer in trainer.optimizers]

    @property
    def _active(self) -> bool:
        return self._step < self._end

    def _of(self, optimizer: Optimizer) -> list[Group]:
        own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [group for group in self.groups if all(id(param.weight) in own for param, _ in group.members)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._step = trainer.global_step // max(len(trainer.optimizers), 1)
        if self._active:
            with torch.no_grad():
                self.regularizer.add_gradient(self._of(optimizer), self._step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            pl_module.log("penalty", self.regularizer.penalty(self.groups), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        marked = {p.name: p.mask.cpu() for group in self.groups for p, _ in group.members if p.pruned}
        return {"marked": marked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._marked = state_dict["marked"] or None
