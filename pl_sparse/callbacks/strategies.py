"""What a trainer's strategy makes of the model, where pruning cannot follow it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from pl_sparse.core.agreement import agreeing
from pl_sparse.core.dtensor import is_sharded
from pl_sparse.core.upstream import of_kind, starts_from_here
from pl_sparse.pruner import Pruner

__all__ = ["refuse_difference", "refuse_parts", "refuse_strategy", "together"]

_ALONE = nullcontext()

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
    if starts_from_here(trainer.strategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} trains in spawned or forked processes, from which this one gets the "
            "weights alone: masks, sparsity and summary would stay there. Use strategy=ddp, from a script"
        )


def together(trainer: Trainer) -> AbstractContextManager[None]:
    """Within the block rank 0 of a trainer decides (`core.agreement`), where it has several; all of them enter it."""
    return agreeing(True) if trainer.world_size > 1 else _ALONE


def refuse_difference(pruner: Pruner, trainer: Trainer) -> None:
    """Raise a RuntimeError if processes have set different masks, from which on each would train another network.

    Every process calls it after each update; it compares a checksum per mask.
    """
    if trainer.world_size == 1:
        return
    sums = torch.stack([param.checksum().to(trainer.strategy.root_device) for param in pruner.params])
    of_all = trainer.strategy.all_gather(sums)
    differ = (of_all != of_all[0]).any(0).tolist()
    names = [param.name for param, differs in zip(pruner.params, differ, strict=True) if differs]
    if names:
        raise RuntimeError(
            f"the masks of {', '.join(names[:5])} differ between processes after {pruner.step} optimizer steps. Either "
            "a scorer of your own sees the data of its process alone, or the weights differed before"
        )


def refuse_parts(model: nn.Module, who: str) -> None:
    """Raise a ValueError if processes share the weights of a model, for a callback that needs them whole."""
    if any(is_sharded(weight) for weight in model.parameters()):
        raise ValueError(
            f"{who} needs whole weights, and processes share those of {type(model).__name__} (FSDP2, tensor "
            "parallelism): leave it out, or use strategy=ddp"
        )
