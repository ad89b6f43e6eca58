"""Several Sparsity callbacks of one trainer: each has weights and names of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from pl_sparse.pruner import Pruner

__all__ = ["log_names", "shared_weight"]


def shared_weight(pruner: Pruner, others: Sequence[Pruner]) -> str | None:
    """The name of a weight that one of the other pruners prunes too, or None."""
    taken = {id(param.weight) for other in others for param in other.params}
    return next((param.name for param in pruner.params if id(param.weight) in taken), None)


def log_names(pruners: Sequence[Pruner]) -> list[str]:
    """What each pruner's sparsity is logged as: "sparsity", of several followed by what its weights' names begin with.

    >>> one, two = Pruner(sparsity=0.5), Pruner(sparsity=0.5)
    >>> log_names([one]), log_names([one, two])
    (['sparsity'], ['sparsity/1', 'sparsity/2'])
    """
    if len(pruners) == 1:
        return ["sparsity"]
    paths = [[param.name.split(".") for param in pruner.params] for pruner in pruners]
    common = [takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False)) for names in paths]
    starts = [".".join(words[0] for words in levels) for levels in common]
    distinct = all(starts) and len(set(starts)) == len(starts)
    return [f"sparsity/{start if distinct else number}" for number, start in enumerate(starts, 1)]
