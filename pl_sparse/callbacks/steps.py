"""Hooks around the steps of a trainer's optimizers, of those too that come while training goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.core.optimizers import with_inner
from pl_sparse.core.registry import name_of
from pl_sparse.core.upstream import has_hooks_beside, override, steps_directly, wrappers_of
from pl_sparse.masking import Masking

__all__ = ["StepHooks", "refuse_optimizers"]

Hook: TypeAlias = "Callable[[Trainer, Optimizer], None]"


class StepHooks:
    """Calls `before` and `after` the steps of optimizers.

    An optimizer that another one holds and steps (SAM's, for one) is followed like its holder. One that puts averaged
    weights into the model by `eval`, and takes them back by `train`, is followed there too, also after `release`.

    Args:
        after: a method, called after each step.
        before: a method, called before a step that Lightning does not see, as of `optimizers(use_pl_optimizer=False)`,
            for which it calls no `on_before_optimizer_step`.
        written: a method, called after an optimizer has written other weights into the model.
    """

    def __init__(self, after: Hook, before: Hook | None = None, written: Callable[[], None] | None = None) -> None:
        # An optimizer may outlive the callback, and its hooks must not keep it alive.
        self._after = weakref.WeakMethod(after)
        self._before = None if before is None else weakref.WeakMethod(before)
        self._written = None if written is None else weakref.WeakMethod(written)
        self._handles: dict[int, tuple[Optimizer, list[RemovableHandle]]] = {}

    def follow(self, trainer: Trainer, *optimizers: Optimizer) -> None:
        """Hook the optimizers that are not hooked yet, or whose hooks something has removed."""
        for outer in optimizers:
            for optimizer in with_inner(outer):
                if not self.follows(optimizer):
                    self._start(trainer, optimizer)

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer is hooked, those apart that it holds."""
        held, handles = self._handles.get(id(optimizer), (None, ()))
        return held is optimizer and all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)

    def _start(self, trainer: Trainer, optimizer: Optimizer) -> None:
        held, handles = self._handles.get(id(optimizer), (None, []))
        for handle in handles:
            handle.remove()
        self._handles[id(optimizer)] = optimizer, self._hook(trainer, optimizer)
        if held is not optimizer and self._written is not None:
            for swapping in (optimizer, *wrappers_of(trainer, optimizer)):
                self._follow_averages(swapping)

    def _hook(self, trainer: Trainer, optimizer: Optimizer) -> list[RemovableHandle]:
        trainer_of, before, after = weakref.ref(trainer), self._before, self._after

        def starts(optimizer: Optimizer, args: object, kwargs: object) -> None:
            running, call = trainer_of(), None if before is None else before()
            if running is not None and call is not None and steps_directly(running):
                call(running, optimizer)

        def stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
            running, call = trainer_of(), after()
            if running is not None and call is not None:
                call(running, optimizer)

        return [optimizer.register_step_pre_hook(starts), optimizer.register_step_post_hook(stepped)]

    def _follow_averages(self, optimizer: Any) -> None:
        written = self._written

        def with_masks(own: Callable[[], None]) -> Callable[[], None]:
            def swapped() -> None:
                own()
                if written is not None and (call := written()) is not None:
                    call()

            return swapped

        for name in ("train", "eval"):
            if callable(own := getattr(optimizer, name, None)):
                override(optimizer, name, with_masks(own))

    @property
    def alone(self) -> bool:
        """Whether no other hooks are called around the steps of the optimizers that are followed."""
        return not any(has_hooks_beside(optimizer, handles) for optimizer, handles in self._handles.values())

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for _, handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}


def refuse_optimizers(trainer: Trainer, masking: Masking) -> None:
    """Raise a ValueError where an optimizer cannot be followed, or does not go together with a masking."""
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"{name} is not a torch.optim.Optimizer, so that nothing can follow its steps: give an optimizer that "
                "is one, e.g. AdamWScheduleFree in place of a ScheduleFreeWrapper"
            )
        if isinstance(optimizer, LBFGS) and masking.trains_pruned:
            raise ValueError(
                f"{name} evaluates the loss again within its step, where masking={name_of(masking)} has the values "
                "behind the masks in the weights: use masking=hard or frozen, or another optimizer"
            )
        if (reason := masking.optimizer_refusal(optimizer)) is not None:
            raise ValueError(reason)
        if callable(getattr(optimizer, "eval", None)) and masking.transforms:
            raise ValueError(
                f"{name} averages the values behind the masks, from which masking={name_of(masking)} computes other "
                "weights: use masking=hard, frozen or ste, or another optimizer"
            )
