"""Hooks around the steps of a trainer's optimizers, of those too that come while training goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeAlias

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.core.upstream import steps_directly

__all__ = ["StepHooks"]

Hook: TypeAlias = "Callable[[Trainer, Optimizer], None]"


class StepHooks:
    """Calls `before` and `after` the steps of optimizers.

    Args:
        before: a method, called before a step that Lightning does not see, as of `optimizers(use_pl_optimizer=False)`,
            for which it calls no `on_before_optimizer_step`.
        after: a method, called after each step.
    """

    def __init__(self, before: Hook, after: Hook) -> None:
        # An optimizer may outlive the callback, and its hooks must not keep it alive.
        self._before, self._after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self._handles: dict[int, tuple[Optimizer, list[RemovableHandle]]] = {}

    def follow(self, trainer: Trainer, *optimizers: Optimizer) -> None:
        """Hook the optimizers that are not hooked yet."""
        for optimizer in optimizers:
            hooked = self._handles.get(id(optimizer))
            if hooked is None or hooked[0] is not optimizer:
                self._handles[id(optimizer)] = optimizer, self._hook(trainer, optimizer)

    def _hook(self, trainer: Trainer, optimizer: Optimizer) -> list[RemovableHandle]:
        trainer_of, before, after = weakref.ref(trainer), self._before, self._after

        def starts(optimizer: Optimizer, args: object, kwargs: object) -> None:
            running, call = trainer_of(), before()
            if running is not None and call is not None and steps_directly(running):
                call(running, optimizer)

        def stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
            running, call = trainer_of(), after()
            if running is not None and call is not None:
                call(running, optimizer)

        return [optimizer.register_step_pre_hook(starts), optimizer.register_step_post_hook(stepped)]

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for _, handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}
