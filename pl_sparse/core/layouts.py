"""How a weight is seen: as (out, in, *kernel), or as (units, weights of a unit), and back.

A `Whole` layout sees all of a tensor, so that it can be turned back. `Rows` sees a part: outputs that are units of one
group, beside others that belong to other groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "Along",
    "Blocks",
    "Heads",
    "InputsFirst",
    "Layout",
    "Matrices",
    "Part",
    "Plain",
    "Rows",
    "Unoriented",
    "Whole",
]


class Layout(ABC):
    """How the units of a group are seen in a weight.

    Attributes:
        output_dim: the dimension of the tensor, as it is kept, that holds the outputs.
        outputs_per_unit: how many outputs of the layer belong to a unit, where a unit is made of outputs.
    """

    output_dim: ClassVar[int] = 0

    @property
    def outputs_per_unit(self) -> int:
        return 1

    @abstractmethod
    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as this layout sees it."""

    @abstractmethod
    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        """The tensor with what this layout sees of it replaced by `viewed`."""

    def shape_of(self, shape: torch.Size) -> torch.Size:
        """The shape that `view` gives a tensor of this shape.

        >>> InputsFirst().shape_of(torch.Size([5, 7]))
        torch.Size([7, 5])
        """
        return self.view(torch.empty(shape, device="meta")).shape

    def numel_of(self, shape: torch.Size) -> int:
        """How many elements of a tensor of this shape belong to the units."""
        return self.shape_of(shape).numel()

    def pooled(self, tensor: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """What `pool` makes of the tensor as this layout sees it, (units,)."""
        return pool(self.view(tensor))


class Whole(Layout):
    """A layout that sees every element of the tensor."""

    @abstractmethod
    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `view`, for a tensor of this shape."""

    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        return self.restore(viewed, tensor.shape)


@dataclass(frozen=True)
class Plain(Whole):
    """Kept as (out, in, *kernel) already: linear, convolutional and recurrent layers."""

    def view(self, tensor: Tensor) -> Tensor:
        return tensor

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        return viewed.reshape(shape)


@dataclass(frozen=True)
class InputsFirst(Whole):
    """Kept as (in, out / groups, *kernel): transposed convolutions, and the linear layers of GPT-2.

    Args:
        groups: of a transposed convolution. Its outputs are those of one group after the other.
    """

    groups: int = 1
    output_dim: ClassVar[int] = 1

    def view(self, tensor: Tensor) -> Tensor:
        split = tensor.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, *kernel)
        return split.transpose(1, 2).flatten(0, 1)  # (out, in / groups, *kernel)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        split = viewed.unflatten(0, (self.groups, -1))  # (groups, out / groups, in / groups, *kernel)
        return split.transpose(1, 2).reshape(shape)


@dataclass(frozen=True)
class Unoriented(Plain):
    """Of a module that is not known: as it is kept, which of its dimensions are outputs is not known."""


@dataclass(frozen=True)
class Along(Whole):
    """Whose outputs are along any dimension: it is seen as the first.

    Args:
        dim: the dimension.
    """

    dim: int

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, 0)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        rest = (*shape[: self.dim], *shape[self.dim + 1 :])
        return viewed.reshape(shape[self.dim], *rest).movedim(0, self.dim)


@dataclass(frozen=True)
class Matrices(Whole):
    """A matrix, or a batch of them, such as the experts of a mixture: (..., out, in), seen as (outputs of all, in).

    Args:
        inputs_first: whether they are kept as (..., in, out).
    """

    inputs_first: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        matrices = tensor.mT if self.inputs_first else tensor  # (..., out, in)
        return matrices.flatten(0, -2)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        if not self.inputs_first:
            return viewed.reshape(shape)
        return viewed.reshape(*shape[:-2], shape[-1], shape[-2]).mT


@dataclass(frozen=True)
class Heads(Whole):
    """Attention heads, or neurons, of a matrix: (heads, weights of a head).

    Args:
        heads: how many there are.
        parts: the shares of query, key and value where they are stacked in one tensor: (1, 1, 1), or (4, 1, 1) if four
            queries share a key.
        columns: whether a head is a run of columns of the tensor as it is kept, not of rows.
    """

    heads: int
    parts: tuple[int, ...] = (1,)
    columns: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        rows = tensor.t() if self.columns else tensor
        if self.parts == (1,):
            return rows.unflatten(0, (self.heads, -1)).flatten(1)
        # query, key and value lie below each other, each as (heads, part * size, in): a head has its run of each
        runs = rows.split([len(rows) // sum(self.parts) * part for part in self.parts])
        return torch.cat([run.unflatten(0, (self.heads, -1)) for run in runs], dim=1).flatten(1)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        outputs, inputs = (shape[1], shape[0]) if self.columns else (shape[0], shape[1])
        runs = viewed.reshape(self.heads, -1, inputs)  # (heads, rows of a head, in)
        if self.parts == (1,):
            rows = runs.flatten(0, 1)
        else:
            each = outputs // self.heads // sum(self.parts)
            rows = torch.cat([run.flatten(0, 1) for run in runs.split([each * part for part in self.parts], dim=1)])
        return rows.t() if self.columns else rows


@dataclass(frozen=True)
class Blocks(Whole):
    """Blocks of a matrix: (blocks, weights of a block).

    Args:
        h: rows of a block.
        w: columns of a block.
    """

    h: int
    w: int

    def view(self, tensor: Tensor) -> Tensor:
        tiles = tensor.unflatten(1, (-1, self.w)).unflatten(0, (-1, self.h))  # (out / h, h, in / w, w)
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        tiles = viewed.reshape(shape[0] // self.h, shape[1] // self.w, self.h, self.w)
        return tiles.transpose(1, 2).reshape(shape)


@dataclass(frozen=True)
class Rows(Layout):
    """Outputs that belong to units which go through several layers: (units, outputs of a unit x in, *kernel).

    Args:
        rows: the outputs that belong to each unit, as `whole` sees them. Other outputs may belong to other groups.
        whole: how the weight is seen as (out, in, *kernel).
    """

    rows: tuple[tuple[int, ...], ...]
    whole: Whole = field(default_factory=Plain)

    @property
    def outputs_per_unit(self) -> int:
        return len(self.rows[0])

    def view(self, tensor: Tensor) -> Tensor:
        picked = self.whole.view(tensor)[torch.tensor(self.rows, device=tensor.device)]  # (units, outputs, in, *kernel)
        return picked.flatten(1, 2) if picked.dim() > 2 else picked

    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        seen = self.whole.view(tensor).clone()
        index = torch.tensor(self.rows, device=tensor.device)  # (units, outputs of a unit)
        seen[index] = viewed.reshape(*index.shape, *seen.shape[1:])
        return self.whole.restore(seen, tensor.shape)


@dataclass(frozen=True)
class Part(Layout):
    """A tensor that belongs to one unit as a whole: (units, weights of it), zero in the rows of the others.

    Args:
        unit: the one.
        units: how many the group has.
    """

    unit: int
    units: int

    def view(self, tensor: Tensor) -> Tensor:
        row = tensor.reshape(1, -1)
        return torch.cat(
            [
                row.new_zeros(self.unit, 1).expand(-1, row.shape[1]),
                row,
                row.new_zeros(self.units - self.unit - 1, 1).expand(-1, row.shape[1]),
            ]
        )

    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        return viewed[self.unit].reshape(tensor.shape)

    def numel_of(self, shape: torch.Size) -> int:
        return shape.numel()

    def pooled(self, tensor: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        own = pool(tensor.reshape(1, -1))  # the rows of zeros need not be made
        return own.new_zeros(self.units).index_copy(0, torch.tensor([self.unit], device=own.device), own)
