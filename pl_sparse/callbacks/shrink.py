"""Masked channels are removed from the model during training."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from pl_sparse.callbacks.calibration import example_of
from pl_sparse.callbacks.regularize import Regularize
from pl_sparse.callbacks.rewind import Rewind
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.upstream import averaged_models, override, restore
from pl_sparse.network.norms import is_over_left, norm_over_left
from pl_sparse.structure import Channel, Head
from pl_sparse.structure.units import Whole
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.shrink import shrink

__all__ = ["Shrink"]


class Shrink(Callback):
    """Removes masked channels and heads from the model, the optimizers' state and the averaged weights, so that later
    epochs run faster: `Trainer(callbacks=[Sparsity(structure=Channel(coupled=True), ...), Shrink(every=2)])`.

    Removals happen at the end of an epoch, before checkpoints are written. The losses are those of masking alone, up
    to rounding (dropout draws other numbers for smaller layers); the sparsity remains that of the original model. A
    checkpoint holds the shrunk weights, and in this callback's state the plan of what was removed, for resuming.

    Args:
        every: epochs between two removals.

    Attributes:
        plan: the parts removed so far.
        left: masked layers that could not be shrunk, with the reason.

    Raises:
        ValueError: pruned weights may not be removed, because they can return, the structure is neither coupled
            channels nor heads, a `Rewind` or `Regularize` works on them, or there are several processes.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} must be 1 or more epochs")
        self.every = every
        self.plan = RemovalPlan()
        self.left: dict[str, str] = {}
        self._wrapped: LightningModule | None = None

    @staticmethod
    def of(trainer: Trainer) -> Shrink | None:
        """The trainer's Shrink callback, if it has one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Shrink)), None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Weights are loaded before the state of callbacks, but right after the module's own hook: shapes change there.
        load, me = pl_module.on_load_checkpoint, weakref.ref(self)

        def loading(checkpoint: dict[str, Any]) -> None:
            callback = me()
            if callback is not None:
                callback.load(trainer, pl_module, checkpoint)
            load(checkpoint)

        override(pl_module, "on_load_checkpoint", loading)
        self._wrapped = pl_module
        if stage == "fit":
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        pruner = Sparsity.of(trainer).pruner
        if (reason := pruner.unshrinkable) is not None:
            raise ValueError(f"shrinking during training is not possible: {reason}")
        structure = pruner.structure
        if isinstance(structure, Whole):
            raise ValueError(
                f"structure={structure.label} removes whole modules, which is possible after training alone: leave out "
                "shrink_every and Shrink, and call export.shrink or export to a format with a graph"
            )
        if not isinstance(structure, Head) and not (isinstance(structure, Channel) and structure.coupled):
            raise ValueError(
                f"structure={structure.label} leaves nothing that could be removed during training: use "
                "structure=channel with coupled=true, or structure=head"
            )
        if trainer.world_size > 1:
            raise ValueError("shrinking during training works in one process only: set trainer.devices=1")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (Rewind, Regularize)):
                raise ValueError(
                    f"{type(callback).__name__} works on the weights that shrinking removes during training: leave one "
                    "of them out, or shrink after training (export.shrink)"
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._wrapped is not None:
            restore(self._wrapped, "on_load_checkpoint")
            self._wrapped = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self.shrink(trainer, pl_module, trainer.optimizers)

    def shrink(self, trainer: Trainer, module: LightningModule, optimizers: Sequence[Optimizer] = ()) -> None:
        """Take out what is masked by now.

        Args:
            trainer: with a Sparsity callback.
            module: the one that is trained.
            optimizers: those that go on training the module.
        """
        pruner = Sparsity.of(trainer).pruner
        masks = {param.name: param.mask for param in pruner.params if param.pruned}
        if not masks:
            return
        norms = [part for part in module.modules() if is_over_left(part)]
        result = shrink(module, example_of(trainer, module), masks, optimizers)
        for norm in norms if optimizers else ():  # more of its channels may be masked
            norm_over_left(norm)
        for name, reason in result.left.items():
            if self.left.get(name) != reason:
                rank_zero_info(f"{name} has masked channels that stay: {reason}")
        self.left = result.left
        if result.plan:
            for average in averaged_models(trainer):
                result.plan.apply(average, "module.")
            pruner.shrink(result.plan.tensors)
            self.plan = self.plan.then(result.plan)

    def load(self, trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Give the module the shapes that it has in a checkpoint, before its weights are loaded.

        Args:
            trainer: with a Sparsity callback.
            module: the one that is trained.
            checkpoint: as Lightning loads it.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        plan = RemovalPlan.from_state_dict(state["plan"]) if state else RemovalPlan()
        sparsity = Sparsity.of(trainer)
        if self.plan:
            for model, prefix in self._models(trainer, module):
                self.plan.undo(model, prefix)
            sparsity.pruner.unshrink()
        if plan:
            sparsity.attach(trainer, module)
            for model, prefix in self._models(trainer, module):
                plan.apply(model, prefix)
            sparsity.pruner.shrink(plan.tensors)
        self.plan = plan

    @staticmethod
    def _models(trainer: Trainer, module: LightningModule) -> Iterator[tuple[nn.Module, str]]:
        yield module, ""
        for average in averaged_models(trainer):
            yield average, "module."

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.state_dict()} if self.plan else {}
