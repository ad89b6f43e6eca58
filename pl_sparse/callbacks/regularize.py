"""The callback that penalizes weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_sparse.callbacks.calibration import Calibration, example_of
from pl_sparse.callbacks.clock import current_step, steps_per_epoch, total_steps
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.group import Group
from pl_sparse.core.targets import Patterns, find
from pl_sparse.core.upstream import unscale_gradients
from pl_sparse.regularizer import Regularizer
from pl_sparse.schedule import OneShot, Time

__all__ = ["Regularize"]


class Regularize(Callback):
    """Adds a penalty to the loss of any LightningModule: `Trainer(callbacks=[Regularize(L1(strength=1e-4)),
    Sparsity(...)])`.

    It comes before `Sparsity`, if there is one, so that a proximal step acts on the values that the optimizer wrote:
    latent ones, where masking trains them. Gradients that scorers observe are those with the penalty's. A proximal step
    is done once for each optimizer step, with the learning rate of that step; a step that a gradient scaler leaves
    out has none. Weights that it makes zero are zero in checkpoints.

    The value of the penalty is logged as "penalty" at the end of each epoch.

    Args:
        regularizer: the penalty.
        begin: when it begins: a fraction of training, "500 steps" or "3 epochs".
        until: when it ends.
        include: patterns of the weights; None for all that are pruned by default.
        exclude: patterns of weights that are left out.
        first: whether the first convolution is penalized.
        last: whether the last layer is penalized; None for yes, unless whole outputs would become zero.

    Raises:
        ValueError: before training starts: a time that is none or beyond training, patterns that match nothing, a
            Sparsity callback before this one, no optimizer that trains a weight, or what the penalty refuses.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        begin: Time = 0.0,
        until: Time = 1.0,
        include: Patterns | None = None,
        exclude: Patterns = (),
        first: bool = True,
        last: bool | None = None,
    ) -> None:
        for what, time in (("begin", begin), ("until", until)):
            _at(what, time)
        self.regularizer = regularizer
        self.begin = begin
        self.until = until
        self.include = include
        self.exclude = exclude
        self.first = first
        self.last = not regularizer.removes_outputs if last is None else last
        self.groups: list[Group] = []
        self._marked: Mapping[str, torch.Tensor] | None = None
        self._decided: Mapping[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._span = (0, 0)
        self._started = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Sparsity) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("the Regularize callback must come before Sparsity: callbacks=[Regularize, Sparsity]")
        self._span = self._spans(trainer)
        self._step = current_step(trainer)
        example = example_of(trainer, pl_module) if self.regularizer.needs_example else None
        self.groups = self.regularizer.groups(
            find(pl_module, self.include, self.exclude, self.first, self.last), pl_module, example
        )
        if not any(self._of(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                "no optimizer trains a weight that is to be penalized: "
                + ", ".join(group.name for group in self.groups[:5])
                + ". Unfreeze them, or choose others by `include`"
            )
        probe = Calibration(trainer, pl_module, 1).probe() if pl_module.automatic_optimization else None
        self.regularizer.prepare(self.groups, pl_module, probe)
        self._started = self._marked is not None
        for group in self.groups:
            for param, _ in group.members:
                if self._marked is not None and param.name in self._marked:
                    param.set_mask(self._marked[param.name].to(param.weight.device))
        if self._started and self._decided:
            self.regularizer.load_state_dict(self._decided)
        self._marked = None
        me = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
            callback = me()
            if callback is not None and callback._active:
                with torch.no_grad():
                    callback.regularizer.prox(callback._of(optimizer), optimizer)

        self._handles = [optimizer.register_step_post_hook(stepped) for optimizer in trainer.optimizers]

    def _spans(self, trainer: Trainer) -> tuple[int, int]:
        """The first step with the penalty, and the first without it again."""
        total, per_epoch = total_steps(trainer), steps_per_epoch(trainer)
        for what, time in (("begin", self.begin), ("until", self.until)):
            if total == float("inf") and not isinstance(time, str) and 0 < time < 1:
                raise ValueError(
                    f"penalty: {what}={time!r} is a fraction of training, whose length is not known: set max_epochs or "
                    "max_steps, or give the time in steps or epochs"
                )
        steps = 2**62 if total == float("inf") else int(total)
        begin, until = _at("begin", self.begin, per_epoch, steps), _at("until", self.until, per_epoch, steps)
        if until < begin:
            raise ValueError(
                f"the penalty ends before it begins: begin={self.begin!r} is step {begin}, until={self.until!r} is "
                f"step {until}"
            )
        return begin, until

    @property
    def _active(self) -> bool:
        return self._span[0] <= self._step < self._span[1]

    def _of(self, optimizer: Optimizer) -> list[Group]:
        """The groups whose weights an optimizer trains."""
        trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [group for group in self.groups if all(id(param.weight) in trained for param, _ in group.members)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._step = current_step(trainer)
        if not self._active:
            return
        unscale_gradients(trainer, optimizer)
        with torch.no_grad():
            if not self._started:
                self.regularizer.start(self.groups)
                self._started = True
            self.regularizer.add_gradient(self._of(optimizer), self._step - self._span[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            value = self.regularizer.penalty(self.groups, max(self._step - self._span[0], 0))
        pl_module.log("penalty", value, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        if not self._started:
            return {"marked": None}
        marked = {p.name: p.mask.cpu() for group in self.groups for p, _ in group.members if p.pruned}
        return {"marked": marked, "decided": self.regularizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._marked = state_dict["marked"]
        self._decided = state_dict.get("decided", {})


def _at(what: str, time: Time, per_epoch: int | None = 1, total: int = 2**62) -> int:
    """A time in optimizer steps.

    Raises:
        ValueError: it is none, or beyond training.
    """
    try:
        return OneShot(final=0.0, begin=time).resolved(per_epoch).span(total)[0]
    except ValueError as error:
        raise ValueError(f"penalty: {error}".replace("begin=", f"{what}=")) from None
