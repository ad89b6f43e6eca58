"""How a weight is seen as (out, in, *kernel), or as (units, weights of a unit), and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How a weight is seen as (out, in, *kernel), and back.

    `kind` is "plain" (Linear, Conv, LSTM: already so), "transposed" (ConvTranspose: (in, out / groups, *kernel) per
    group; and layers that keep (in, out), such as the Conv1D of GPT-2), "heads" (attention: (heads, weights of a
    head)), "blocks" (of shape `block`: (blocks, weights of a block)), or "rows" (coupled channels: `rows[u]` are the
    outputs, as `below` sees them, that belong to unit u; other outputs may belong to other groups).

    A head is a run of rows; with `columns`, of columns of the tensor as it is kept. `parts` are the shares of query,
    key and value where they are stacked in one tensor: (1, 1, 1), or (4, 1, 1) if four queries share a key.
    """

    kind: str = "plain"
    groups: int = 1
    heads: int = 1
    parts: tuple[int, ...] = (1,)
    columns: bool = False
    block: tuple[int, int] = (1, 1)
    rows: tuple[tuple[int, ...], ...] = ()
    below: Layout | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as (out, in, *kernel), or as (units, rest) for heads and blocks."""
        if self.kind == "plain":
            return tensor
        if self.kind == "rows":
            picked = self._below.view(tensor)[torch.tensor(self.rows, device=tensor.device)]
            return picked.flatten(1, 2) if picked.dim() > 2 else picked
        if self.kind == "transposed":
            split = tensor.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return split.flatten(0, 1)
        if self.kind == "blocks":
            h, w = self.block
            return tensor.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2).flatten(2).flatten(0, 1)
        rows = tensor.t() if self.columns else tensor
        if self.parts == (1,):
            return rows.unflatten(0, (self.heads, -1)).flatten(1)
        runs = rows.split([len(rows) // sum(self.parts) * part for part in self.parts])
        return torch.cat([run.unflatten(0, (self.heads, -1)) for run in runs], dim=1).flatten(1)

    @property
    def _below(self) -> Layout:
        return self.below or Layout()

    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        """The tensor with what this layout sees of it replaced by `viewed`."""
        if self.kind != "rows":
            return self.restore(viewed, tensor.shape)
        seen = self._below.view(tensor).clone()
        index = torch.tensor(self.rows, device=tensor.device)
        seen[index] = viewed.reshape(*index.shape, *seen.shape[1:])
        return self._below.restore(seen, tensor.shape)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `view`, for a tensor of the weight's shape; not for "rows", which see a part (`write`)."""
        if self.kind == "plain":
            return viewed.reshape(shape)
        if self.kind == "transposed":
            split = viewed.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return split.reshape(shape)
        if self.kind == "blocks":
            h, w = self.block
            return viewed.reshape(shape[0] // h, shape[1] // w, h, w).transpose(1, 2).reshape(shape)
        total, inner = (shape[1], shape[0]) if self.columns else (shape[0], shape[1])
        runs = viewed.reshape(self.heads, -1, inner)
        if self.parts != (1,):
            each = total // self.heads // sum(self.parts)
            rows = torch.cat([run.flatten(0, 1) for run in runs.split([each * part for part in self.parts], dim=1)])
        else:
            rows = runs.flatten(0, 1)
        return rows.t() if self.columns else rows
