"""The callback that penalizes weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from pl_sparse.callbacks.calibration import Calibration, example_at_hand, example_of
from pl_sparse.callbacks.clock import Timetable
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.callbacks.steps import StepHooks
from pl_sparse.callbacks.strategies import refuse_parts, together
from pl_sparse.core.group import Group
from pl_sparse.core.places import Places
from pl_sparse.core.targets import Patterns, Targets
from pl_sparse.core.upstream import unscale_gradients
from pl_sparse.network.outputs import output_weights
from pl_sparse.regularizer import Regularizer
from pl_sparse.schedule import Time

__all__ = ["Regularize"]


class Regularize(Callback):
    """Adds a penalty to the loss of any LightningModule: `Trainer(callbacks=[Regularize(L1(strength=1e-4)),
    Sparsity(...)])`.

    It comes before `Sparsity`, if there is one, so that a proximal step acts on the values that the optimizer wrote,
    latent ones if the masking trains them. Scorers observe gradients that include the penalty's. Each optimizer step is
    followed by one proximal step with its learning rate; a step that a gradient scaler skips is not. Weights that
    become zero are zero in checkpoints.

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
        ValueError: before training starts: a time that is invalid or beyond training, patterns that match nothing, a
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
        self._times = Timetable("penalty", begin=begin, until=until)
        self.regularizer = regularizer
        self.begin = begin
        self.until = until
        self.include = include
        self.exclude = exclude
        self.first = first
        self.last = last
        self.groups: list[Group] = []
        self._marked: Mapping[str, torch.Tensor] | None = None
        self._decided: Mapping[str, Any] = {}
        self._hooks: StepHooks | None = None
        self._places: Places | None = None
        self._started = False
        self._stepping: set[int] = set()  # optimizers whose step has begun with the penalty

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Sparsity) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("the Regularize callback must come before Sparsity: callbacks=[Regularize, Sparsity]")
        self._times.start(trainer)
        if self._times.at("until") < self._times.at("begin"):
            raise ValueError(
                f"the penalty ends before it begins: begin={self.begin!r} is step {self._times.at('begin')}, "
                f"until={self.until!r} is step {self._times.at('until')}"
            )
        guess = self.regularizer.removes_outputs and self.last is None  # which layer the outputs come out of
        outputs: set[str] = set()
        example = example_of(trainer, pl_module) if self.regularizer.needs_example else None
        if guess and (shown := example_at_hand(trainer, pl_module) if example is None else example) is not None:
            outputs = output_weights(pl_module, shown)
        targets = Targets(self.include, self.exclude, self.first, self.last)
        weights = targets.choose(pl_module, guess, outputs=outputs).params
        with together(trainer):
            self.groups = self.regularizer.groups(weights, pl_module, example)
        if not any(self._of(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                "no optimizer trains a weight that is to be penalized: "
                + ", ".join(group.name for group in self.groups[:5])
                + ". Unfreeze them, or choose others by `include`"
            )
        probe = Calibration(trainer, pl_module, 1).probe() if pl_module.automatic_optimization else None
        with together(trainer):
            self.regularizer.prepare(self.groups, pl_module, probe)
        self._started = self._marked is not None
        for group in self.groups:
            for param, _ in group.members:
                if self._marked is not None and param.name in self._marked:
                    param.set_mask(self._marked[param.name].to(param.weight.device))
        if self._started and self._decided:
            self.regularizer.load_state_dict(self._decided)
        self._marked = None
        self._places = Places(pl_module)
        self._stepping = set()
        self._hooks = StepHooks(before=self._before_step, after=self._after_step)
        self._hooks.follow(trainer, *trainer.optimizers)

    @property
    def _active(self) -> bool:
        return self._times.passed("begin") and not self._times.passed("until")

    @property
    def _step(self) -> int:
        """The steps since the penalty began."""
        return max(self._times.step - self._times.at("begin"), 0)

    def _of(self, optimizer: Optimizer) -> list[Group]:
        """The groups whose weights an optimizer trains."""
        trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [group for group in self.groups if all(id(param.weight) in trained for param, _ in group.members)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._times.batch_starts(trainer)
        self._stepping = set()
        if self._hooks is not None:
            self._hooks.follow(trainer, *trainer.optimizers)
        if self._places is not None and not self._places.hold:
            self._places = Places(pl_module)
            weights = [param for group in self.groups for param, _ in group.members]
            if gone := [param.name for param in weights if param.weight not in self._places]:
                raise RuntimeError(
                    f"{', '.join(gone[:5])}: penalized weights that were replaced during training. Replace layers "
                    "before training, in configure_model"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times.batch_ended(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._before_step(trainer, optimizer)

    @torch.no_grad()
    def _before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._hooks is not None:
            self._hooks.follow(trainer, optimizer)  # one that was made or replaced in this batch
        if not self._active:
            return
        unscale_gradients(trainer, optimizer)
        if not self._started:
            self.regularizer.start(self.groups)
            self._started = True
        self.regularizer.add_gradient(self._of(optimizer), self._step)
        self._stepping.add(id(optimizer))

    @torch.no_grad()
    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if id(optimizer) in self._stepping:
            self._stepping.discard(id(optimizer))
            self.regularizer.prox(self._of(optimizer), optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            value = self.regularizer.penalty(self.groups, self._step)
        pl_module.log("penalty", value, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._times.release()
        if self._hooks is not None:
            self._hooks.release()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        if not self._started:
            return {"marked": None, "times": self._times.state_dict()}
        marked = {p.name: p.mask.cpu() for group in self.groups for p, _ in group.members if p.pruned}
        return {"marked": marked, "decided": self.regularizer.state_dict(), "times": self._times.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._marked = state_dict["marked"]
        self._decided = state_dict.get("decided", {})
        self._times.load_state_dict(state_dict.get("times"))
