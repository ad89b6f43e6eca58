"""The weights of a model compared with their masks, so that what is reported as pruned is zero in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from pl_sparse.core.dtensor import is_sharded
from pl_sparse.core.parameter import MaskedParameter, zero_pruned
from pl_sparse.pruner import Pruner

__all__ = ["Audit", "nonzeros"]


class Audit:
    """Puts weights right that are not zero where their masks are, and warns of them, once each."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def fits(self, trainer: Trainer, *place: Any) -> bool:
        """Whether this is the first batch of a validation within training; `place` is its index, and the loader's."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not any(place)

    @torch.no_grad()
    def check(self, pruner: Pruner, trainer: Trainer) -> dict[str, int]:
        """Compare, between two optimizer steps, and mask again what differs.

        Returns:
            How many pruned weights were not zero, by name.
        """
        params = [param for param in pruner.masked if param.pruned]
        counts = {param: count for param, count in zip(params, nonzeros(params), strict=True) if count}
        if not counts:
            return {}
        zero_pruned([param.data for param in counts], list(counts))
        pruner.trusts_steps = False
        by_cause: dict[str, list[str]] = {}
        for param, count in counts.items():
            if param.name not in self._named:
                self._named.add(param.name)
                names = by_cause.setdefault(_cause(param, trainer.optimizers), [])
                names.append(f"{param.name} ({count})")
        for cause, names in by_cause.items():
            rank_zero_warn(
                f"pruned weights of {', '.join(names)} were not zero: {cause}. They are masked again, here and at each "
                "validation, but not in between"
            )
        return {param.name: count for param, count in counts.items()}


@torch.no_grad()
def nonzeros(params: Sequence[MaskedParameter]) -> list[int]:
    """How many pruned weights of each are not zero; a single transfer from their device if none is."""
    if any(is_sharded(param.weight) for param in params):
        return [int(param.total(param.data.bool() & ~param.mask)) for param in params]
    # bytes that are compared say whether there is one in a fifth of the time that a count takes
    some = [param.weight.bool().gt_(param.mask).view(torch.int8).amax() for param in params]
    if some and some[0].device.type != "cpu":
        some = torch.stack([one.to(some[0].device) for one in some]).tolist()
    return [
        int(torch.count_nonzero(param.weight.bool() & ~param.mask)) if one else 0
        for param, one in zip(params, some, strict=True)
    ]


def _cause(param: MaskedParameter, optimizers: Sequence[Optimizer]) -> str:
    """What wrote the weight, as far as that can be seen."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(weight is param.weight for weight in group["params"]):
                if "train_mode" in group:
                    return f"{type(optimizer).__name__} puts averaged weights in their place"
                return "something wrote them outside of the steps of their optimizer"
    return "no optimizer trains them, and something else writes them (as a target network is written)"
