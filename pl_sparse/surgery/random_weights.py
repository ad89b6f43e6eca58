"""Random weights that take no memory: each is made of a short line of numbers while an operation reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pl_sparse.core.cut import Cut
from pl_sparse.core.upstream import DispatchMode, replace_data

__all__ = ["RandomWeights"]

_STEP = 31  # an odd number of places, so that rows and columns overlap little


@dataclass
class _Recipe:
    """What a tensor is, while nobody holds it.

    Attributes:
        values: of its shape, a view of far fewer numbers.
        changes: what becomes of it, in this order: channels set to zero, cuts.
    """

    values: Tensor
    changes: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def make(self) -> Tensor:
        made = self.values
        for change in self.changes:
            made = change(made)
        return made.contiguous()  # some operations look at strides


class RandomWeights(DispatchMode):
    """Within the block tensors that were given random values have them wherever an operation reads them.

    Element (i, j) of a tensor is number `_STEP` i + j of a random line, which is no longer than the tensor, so that no
    channel is that of another. In between the tensor itself has the shape alone.

    Attributes:
        operations: how many were called within the block.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._recipes: dict[int, _Recipe] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*map(self._made, args), **{key: self._made(value) for key, value in (kwargs or {}).items()})

    def _made(self, value: Any) -> Any:
        """An argument of an operation, with the tensors that it reads."""
        if isinstance(value, Tensor):
            recipe = self._recipes.get(id(value))
            return value if recipe is None else recipe.make()
        return [*map(self._made, value)] if isinstance(value, (list, tuple)) else value

    def randomize(self, tensor: Tensor) -> None:
        """Give a tensor random values, from torch's own generator, at which no channel is zero by chance."""
        later = [[size for size in tensor.shape[dim + 1 :] if size > 1] for dim in range(tensor.dim())]
        steps = [min(_STEP ** len(sizes), 4096, math.prod(sizes)) for sizes in later]
        length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=True))
        fan = tensor[0].numel()
        line = torch.randn(length, dtype=tensor.dtype, device=tensor.device) * fan**-0.5
        self._recipes[id(tensor)] = _Recipe(line.as_strided(tensor.shape, steps))
        replace_data(tensor, line.new_zeros(1).expand(tensor.shape))

    def silence(self, tensor: Tensor, dim: int, places: Sequence[int]) -> bool:
        """Make indices of such a tensor zero; whether it is one."""
        recipe = self._recipes.get(id(tensor))
        if recipe is not None:
            index = torch.tensor(places, device=tensor.device)
            recipe.changes.append(lambda made: made.index_fill(dim, index, 0))
        return recipe is not None

    def cut(self, tensor: Tensor, cut: Cut) -> Tensor:
        """What is left of a tensor: of such a one a shape alone, as it is cut when it is read."""
        recipe = self._recipes.get(id(tensor))
        if recipe is None:
            return cut.take(tensor.detach())
        recipe.changes.append(cut.take)
        return recipe.values.new_zeros(1).expand(cut.left)
