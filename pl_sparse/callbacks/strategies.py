"""What a trainer's strategy makes of the model, where pruning cannot follow it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from pl_sparse.core.dtensor import is_sharded
from pl_sparse.core.upstream import of_kind

__all__ = ["refuse_parts", "refuse_strategy"]

_REFUSED = {
    FSDPStrategy: "flattens the weights of a module into one tensor, which has no rows or columns any more",
    DeepSpeedStrategy: "keeps the weights that are trained in an engine of its own, whose steps nothing can follow",
}


def refuse_strategy(trainer: Trainer) -> None:
    """Raise a ValueError if the strategy leaves no weights that could be masked."""
    for kind, reason in _REFUSED.items():
        if of_kind(trainer.strategy, kind):
            raise ValueError(
                f"{type(trainer.strategy).__name__} {reason}: use ModelParallelStrategy with `fully_shard` (FSDP2) in "
                "the module's configure_model, or strategy=ddp"
            )


def refuse_parts(model: nn.Module, who: str) -> None:
    """Raise a ValueError if processes share the weights of a model, for a callback that needs them whole."""
    if any(is_sharded(weight) for weight in model.parameters()):
        raise ValueError(
            f"{who} needs whole weights, and processes share those of {type(model).__name__} (FSDP2, tensor "
            "parallelism): leave it out, or use strategy=ddp"
        )
