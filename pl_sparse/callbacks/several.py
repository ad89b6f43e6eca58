"""Several Sparsity callbacks of one trainer: each has weights and names of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from pl_sparse.pruner import Pruner
from pl_sparse.structure import Channel, Head

__all__ = ["log_names", "overlap"]


def overlap(pruner: Pruner, others: Sequence[Pruner]) -> str | None:
    """Which weight another pruner prunes too, and what helps; None if it stands beside the others."""
    for other in others:
        taken = {id(param.weight) for param in other.params}
        name = next((param.name for param in pruner.params if id(param.weight) in taken), None)
        if name is None:
            continue
        structures = pruner.structure, other.structure
        heads = any(isinstance(each, Head) for each in structures)
        if heads and any(isinstance(each, Channel) and each.through_norms for each in structures):
            return (
                f"structure=head and through_norms=true both prune {name}, the one its columns and the other its rows: "
                "train with one of them, remove by `shrink`, then with the other"
            )
        return f"two Sparsity callbacks prune {name}: set them apart by include and exclude"
    return None


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
