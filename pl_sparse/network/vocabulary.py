"""The table of a model's tokens, and the layer that scores each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Tokens", "tokens_of"]


@dataclass(frozen=True)
class Tokens:
    """Where tokens are in a model.

    Attributes:
        table: the name of the module with a row per token, and the module.
        head: the same of the linear layer with an output per token, or None. Its weight may be the table's.
        always: tokens that are kept whatever occurs: that of padding, and those that the config names.
    """

    table: tuple[str, nn.Embedding]
    head: tuple[str, nn.Linear] | None
    always: tuple[int, ...]


def tokens_of(model: nn.Module) -> Tokens:
    """Where tokens are in a model: what it says itself (`get_input_embeddings`), else its only `nn.Embedding`.

    Raises:
        ValueError: there is none, or more than one.
    """
    named = {module: path for path, module in model.named_modules()}
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "get_input_embeddings")]
    said = parts[0].get_input_embeddings() if parts else None
    tables = [said] if said is not None else [m for m in named if isinstance(m, nn.Embedding)]
    if len(tables) != 1 or not isinstance(tables[0], nn.Embedding):
        found = ", ".join(named[m] for m in tables if m in named) or "none"
        raise ValueError(
            f"structure=vocabulary looks for one table of tokens in {type(model).__name__}, its only nn.Embedding or "
            f"what get_input_embeddings() returns, and found {found}"
        )
    (table,) = tables
    size = table.num_embeddings
    said = parts[0].get_output_embeddings() if parts and hasattr(parts[0], "get_output_embeddings") else None
    heads = [said] if said is not None else [m for m in named if isinstance(m, nn.Linear) and m.out_features == size]
    if len(heads) > 1 or (heads and heads[0].out_features != size):
        raise ValueError(
            f"{', '.join(named[m] for m in heads)}: it is not known which of these scores the {size} tokens, so that "
            "rows of the table cannot be removed"
        )
    config = getattr(parts[0], "config", None) if parts else None
    numbers = {v for k, v in (vars(config) if config is not None else {}).items() if k.endswith("_token_id")}
    always = {n for n in (*numbers, table.padding_idx) if type(n) is int and 0 <= n < size}
    return Tokens((named[table], table), (named[heads[0]], heads[0]) if heads else None, tuple(sorted(always)))
