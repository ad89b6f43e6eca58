"""What was taken out of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cut"]


@dataclass(frozen=True)
class Cut:
    """What was taken out of a tensor.

    Attributes:
        shape: what its shape was.
        removed: the indices that were removed, ascending, by dimension.

    >>> cut = Cut((2, 3), {1: (0,)})
    >>> cut.take(torch.arange(6).reshape(2, 3)).tolist()
    [[1, 2], [4, 5]]
    >>> cut.fill(torch.tensor([[1, 2], [4, 5]])).tolist()
    [[0, 1, 2], [0, 4, 5]]
    """

    shape: tuple[int, ...]
    removed: Mapping[int, tuple[int, ...]]

    def kept(self, dim: int) -> list[int]:
        """The indices along a dimension that are left."""
        gone = set(self.removed.get(dim, ()))
        return [i for i in range(self.shape[dim]) if i not in gone]

    @property
    def left(self) -> tuple[int, ...]:
        """What the shape is now."""
        return tuple(size - len(self.removed.get(dim, ())) for dim, size in enumerate(self.shape))

    def take(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor; dimensions of size 1, where that of the cut one was more, are left alone."""
        for dim, gone in self.removed.items():
            if gone and tensor.shape[dim] == self.shape[dim]:
                index = torch.tensor(self.kept(dim), device=tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor

    def fill(self, tensor: Tensor) -> Tensor:
        """A tensor of the former shape, zero (False) where something was removed."""
        for dim, gone in self.removed.items():
            if gone and tensor.shape[dim] == self.shape[dim] - len(gone):
                shape = (*tensor.shape[:dim], self.shape[dim], *tensor.shape[dim + 1 :])
                index = torch.tensor(self.kept(dim), device=tensor.device)
                tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    def then(self, later: Cut) -> Cut:
        """This cut, and a later one of what it left, as one.

        >>> Cut((4,), {0: (1,)}).then(Cut((3,), {0: (0, 1)})).removed
        {0: (0, 1, 2)}
        """
        both = {dim: set(gone) for dim, gone in self.removed.items()}
        for dim, gone in later.removed.items():
            left = self.kept(dim)
            both[dim] = both.get(dim, set()) | {left[i] for i in gone}
        return Cut(self.shape, {dim: tuple(sorted(gone)) for dim, gone in sorted(both.items())})
