"""Rows of a table of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Along
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, name_of, register
from pl_sparse.network.vocabulary import tokens_of
from pl_sparse.structure.units import Whole, beside

__all__ = ["Vocabulary"]


@register
@dataclass(frozen=True)
class Vocabulary(Whole):
    """Tokens that never occur in the training data: their rows of the table, and of the layer that scores tokens.

    It needs `scorer=occurrence` and a schedule that prunes once, at the end, when all of the training data was seen.
    Rows that occurred are kept at any sparsity, so that 1.0 removes all others; padding and the tokens that a config
    names (pad_token_id and the like) stay too. Outputs for known tokens do not change. All other weights stay dense.
    `export.shrink_vocabulary` removes the rows and returns the new numbers of the tokens.

    Args:
        keep: numbers of further tokens to keep, such as tokens that occur only in later data.
    """

    keep: tuple[int, ...] = ()

    def refusal(self, axes: Axes) -> str | None:
        if name_of(axes.scorer) != "occurrence":
            return "structure=vocabulary removes what never occurs: use scorer=occurrence"
        if name_of(axes.schedule) != "oneshot" or axes.schedule.begin != 1.0:
            return (
                "structure=vocabulary prunes at the end, when all tokens were seen: use schedule=oneshot with begin=1.0"
            )
        return None

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if not alone and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "structure=vocabulary notes which tokens occur in this process, and others see other data: train in "
                "one process"
            )
        tokens = tokens_of(model)
        path, table = tokens.table
        weight: Any = table.weight
        size = table.num_embeddings
        if wrong := [token for token in self.keep if not 0 <= token < size]:
            raise ValueError(f"structure.keep has {wrong[0]}, and {path} has the tokens 0 to {size - 1}")
        member = next((p for p in params if p.weight is table.weight), None)
        member = member or beside(f"{path}.weight", table, weight)
        seen = torch.zeros(size, dtype=torch.bool, device=table.weight.device)
        seen[[*tokens.always, *self.keep]] = True
        member.state["seen"] = seen
        companions = []
        if tokens.head is not None:
            path, head = tokens.head
            own = [(name, p) for name, p in head.named_parameters(recurse=False) if p is not table.weight]
            companions = [(beside(f"{path}.{name}", head, p), Along(0)) for name, p in own]
        return [Group(member.name, ((member, Along(0)),), tuple(companions))]

    def select(self, units: Tensor, keep: int) -> Tensor:
        return super().select(units, max(keep, int((units > 0).sum())))
