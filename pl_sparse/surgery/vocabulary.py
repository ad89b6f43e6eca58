"""Rows of masked tokens taken out of a model, and the numbers that the others get."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.cut import Cut
from pl_sparse.core.files import write_json
from pl_sparse.network.hooks import called, evaluated
from pl_sparse.network.vocabulary import tokens_of
from pl_sparse.surgery.plan import RemovalPlan

__all__ = ["TokenMap", "shrink_vocabulary"]

_FILE, _VERSION = "vocabulary.json", 1
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class TokenMap:
    """Which tokens are left: number `kept[i]` of the tokenizer is row i of the model.

    Attributes:
        kept: ascending.
        size: how many tokens there were.

    >>> TokenMap((0, 2, 5), 6)(torch.tensor([5, 0, -100])).tolist()
    [2, 0, -100]
    """

    kept: tuple[int, ...]
    size: int

    def __call__(self, ids: Tensor, unknown: int | None = None) -> Tensor:
        """The model's numbers of the tokenizer's; negative ones, which stand for no token, are left alone.

        Args:
            ids: of the tokenizer.
            unknown: the tokenizer's number of the token that stands for those that are gone; None: they are refused.

        Raises:
            ValueError: a token is gone, and nothing stands for it.
        """
        new = torch.full((self.size,), -1, device=ids.device)
        new[list(self.kept)] = torch.arange(len(self.kept), device=ids.device)
        if unknown is not None:
            new[new < 0] = new[unknown].clone()
        out = torch.where(ids < 0, ids, new[ids.clamp_min(0)])
        if bool(((out < 0) & (ids >= 0)).any()):
            gone = int(ids[(out < 0) & (ids >= 0)][0])
            raise ValueError(
                f"token {gone} was removed from the vocabulary: give unknown=, the token that stands for it"
            )
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a folder, as vocabulary.json."""
        write_json(Path(folder) / _FILE, {"version": _VERSION, "size": self.size, "kept": list(self.kept)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TokenMap:
        """What `save` wrote."""
        state = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
        if state.get("version") != _VERSION:
            raise ValueError(
                f"{Path(folder) / _FILE} has version {state.get('version')!r}, and this release reads version "
                f"{_VERSION}"
            )
        return cls(tuple(state["kept"]), int(state["size"]))


def shrink_vocabulary(model: nn.Module, example: Any, masks: Mapping[str, Tensor]) -> tuple[RemovalPlan, TokenMap]:
    """Take the rows of masked tokens out of a model, in place: of the table, of the layer that scores tokens, of both.

    Sizes and token numbers in the config follow. What the model returns for known tokens is compared before and after.

    Args:
        model: it is changed in place; from here on it is called with `tokens(ids)`.
        example: inputs of known tokens: a tensor of their numbers, or keywords with `input_ids`.
        masks: which weights are kept, by name, as `{p.name: p.mask for p in pruner.params}`.

    Returns:
        What was taken out, and the numbers that tokens have now.

    Raises:
        ValueError: no rows are masked, or the outputs for known tokens would change; the model is as it was.
    """
    found = tokens_of(model)
    path, table = found.table
    mask = masks.get(f"{path}.weight")
    masked = [] if mask is None else (~mask.any(1)).nonzero().flatten().tolist()
    gone = tuple(token for token in masked if token not in found.always)
    if not gone:
        raise ValueError(f"no row of {path} is masked: every token occurs, or structure=vocabulary was not used")
    size = table.num_embeddings
    tokens = TokenMap(tuple(sorted(set(range(size)) - set(gone))), size)
    cut, left = {0: gone}, len(tokens.kept)
    plan = RemovalPlan(
        {f"{path}.weight": Cut(tuple(table.weight.shape), cut)}, {path: {"num_embeddings": (size, left)}}
    )
    if table.padding_idx is not None:
        plan.layers[path]["padding_idx"] = (table.padding_idx, tokens.kept.index(table.padding_idx))
    if found.head is not None:
        head_path, head = found.head
        plan.layers[head_path] = {"out_features": (size, left)}
        for name, parameter in head.named_parameters(recurse=False):
            if parameter is not table.weight:
                plan.tensors[f"{head_path}.{name}"] = Cut(tuple(parameter.shape), cut)
    configs: set[int] = set()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is not None and id(config) not in configs:
            configs.add(id(config))
            changes = {f"config.{k}": (size, left) for k, v in vars(config).items() if k == "vocab_size" and v == size}
            for key, value in vars(config).items():
                if key.endswith("_token_id") and type(value) is int and value in tokens.kept:
                    changes[f"config.{key}"] = (value, tokens.kept.index(value))
            plan.layers[name] = {**plan.layers.get(name, {}), **changes}
    kept = torch.tensor(tokens.kept)
    with evaluated(model), torch.no_grad():
        before = called(model, example)
        plan.apply(model)
        after = called(model, _renumbered(example, tokens))
    for a, b in zip(before, after, strict=True):
        a = a[..., kept.to(a.device)] if a.dim() and a.shape[-1] == size else a
        if a.shape != b.shape or not torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE):
            plan.undo(model)
            raise ValueError(
                f"without the rows of masked tokens {type(model).__name__} computes other outputs for known tokens"
            )
    return plan, tokens


def _renumbered(example: Any, tokens: TokenMap) -> Any:
    if isinstance(example, Mapping):
        return {key: tokens(value) if key == "input_ids" else value for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return (tokens(example[0]), *example[1:])
    return tokens(example)
