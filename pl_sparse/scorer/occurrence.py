"""Which rows of a table were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import Axes, register
from pl_sparse.scorer.base import Scorer
from pl_sparse.structure import Structure, Vocabulary

__all__ = ["Occurrence"]


def _note(param: MaskedParameter, table: nn.Module, args: Any) -> None:
    if table.training and table is param.module:
        param.state["seen"].index_fill_(0, args[0].reshape(-1).to(param.state["seen"].device), True)


@register
@dataclass(frozen=True)
class Occurrence(Scorer):
    """1 for the row of a token that occurred in training, else 0; for structure=vocabulary.

    A hook on the table notes the tokens in each forward pass of training.
    """

    observes: ClassVar[bool] = True  # nothing is known before the first batch

    def refusal(self, axes: Axes) -> str | None:
        if not isinstance(axes.structure, Vocabulary):
            return "scorer=occurrence scores rows of a table of tokens: use structure=vocabulary, or another scorer"
        return super().refusal(axes)

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        for group in groups:
            param, _ = group.members[0]
            param.module.register_forward_pre_hook(partial(_note, param))

    def score(self, param: MaskedParameter) -> Tensor:
        return param.state["seen"].to(param.values).unsqueeze(1).expand(param.shape)
