"""Smaller checkpoints of a training whose pruned weights never return."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from pl_sparse.callbacks.shrink import Shrink
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.core.compact import compacted, compacted_weights

__all__ = ["Compact"]


class Compact(Callback):
    """Saves only the optimizer state of kept weights: at 90 % sparsity with Adam 0.9 bytes per weight in place of 8.
    The `Sparsity` callback reads such a checkpoint, and the training resumes bit for bit.

    With `weights=True` the weights themselves are saved so too, 0.5 bytes in place of 4. A plain model loads such a
    checkpoint after `callbacks.expand_weights(checkpoint["state_dict"])`; otherwise weights stay as they are, under the
    model's own names.

    Where pruned weights may return (`masking` other than hard, `updater=dropgrow`, a schedule that falls), or the
    optimizer is none of torch's own, the state is saved whole.

    Args:
        weights: whether only kept weights are saved.

    Raises:
        ValueError: before training: `weights=True` beside `Shrink` or an average of the weights, which read the weights
            of a checkpoint themselves.
    """

    def __init__(self, weights: bool = False) -> None:
        self.weights = weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self.weights and isinstance(callback, (Shrink, WeightAveraging)):
                raise ValueError(
                    f"Compact(weights=True) and {type(callback).__name__} cannot go together: the latter reads the "
                    "weights of a checkpoint itself. Use weights=False"
                )
        if Sparsity.of(trainer).pruner.revives:
            rank_zero_warn(
                "Compact saves checkpoints whole: pruned weights may return in this training. Leave it out, or use "
                "masking=hard with updater=prune"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        pruner = Sparsity.of(trainer).pruner
        states = checkpoint.get("optimizer_states", [])
        if pruner.revives or len(states) != len(trainer.optimizers):
            return
        checkpoint["optimizer_states"] = [
            compacted(state, optimizer, pruner.masked)
            for state, optimizer in zip(states, trainer.optimizers, strict=True)
        ]
        if self.weights:
            checkpoint["state_dict"] = compacted_weights(checkpoint["state_dict"], pl_module, pruner.masked)
