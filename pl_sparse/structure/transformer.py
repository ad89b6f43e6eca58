"""Attention heads, and blocks and neurons of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.dtensor import is_sharded
from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Blocks, InputsFirst
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.parametrized import behind
from pl_sparse.core.registry import register
from pl_sparse.network.attention import LOOKED_FOR, Attention, Unknown, attentions, feed_forwards
from pl_sparse.structure.base import Structure, divided
from pl_sparse.surgery.stacks import together

__all__ = ["Head", "Hybrid"]


@register
@dataclass(frozen=True)
class Head(Structure):
    """Whole attention heads: a head's rows of the query, key and value projections and its columns of the output one.

    Attention layers are recognised by their parts (see `attention.attentions`): nn.MultiheadAttention, fused
    projections, the attention of Hugging Face's models. Query heads that share a key/value head are pruned with it. All
    other weights stay dense.

    Layers that share a table of heads (the biases by relative position of T5) lose the same heads or none: a unit is
    then a head through all of them. They are found by trials, if there is an example to call the model with.

    Biases keep their values: with its columns of the output projection zero, a head adds nothing to the output, its
    value bias included, and its biases have no gradient. The score of a head is the mean over its weights. With
    scorer=taylor that is the mean of |w g|, where Michel et al. take |sum w g| over the head's output columns, which is
    |dL/dgate| for a gate on the head.

    Source: Michel, Levy, Neubig, Are sixteen heads really better than one?, 2019, arXiv:1905.10650.

    Args:
        empty: whether a ranking over all layers may remove the last head of a layer. If not, each layer keeps its best
            head; with more layers than heads to keep, the model is denser than requested. A sparsity of 1 removes all
            heads.
    """

    empty: bool = False

    @property
    def oriented(self) -> bool:
        return False  # it takes layers that it recognises alone

    @property
    def sees_example(self) -> bool:
        return True

    def spares(self, param: MaskedParameter) -> bool:
        return True

    @property
    def least(self) -> int:
        return 0 if self.empty else 1

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        by_weight = {id(param.weight): param for param in params}
        groups: list[Group] = []
        whole = example is not None and not any(is_sharded(param.weight) for param in params)
        stacked = {
            path: index for index, paths in enumerate(together(model, example) if whole else ()) for path in paths
        }
        stacks: dict[int, Group] = {}
        for attention in attentions(model):
            weights = [behind(module, name) for module, name, *_ in attention.weights]
            members = [by_weight.get(id(weight)) for weight in weights]
            if not any(members):  # left dense by include and exclude
                continue
            if isinstance(attention, Unknown):
                raise ValueError(
                    f"structure=head cannot find the heads of {attention.name}: {attention.reason}. Leave it dense by "
                    f"exclude=[{attention.name!r}]"
                )
            if None in members:
                raise ValueError(
                    f"structure=head removes heads whole, but include and exclude leave {members.count(None)} of the "
                    f"{len(weights)} weights of {attention.name} dense: name all of them or none, {attention.name!r}"
                )
            layouts = [layout for *_, layout in attention.weights]
            pairs = tuple((param, layout) for param, layout in zip(members, layouts, strict=True) if param)
            stack = stacks.get(stacked.get(attention.path, -1))
            if stack is None:
                groups.append(Group(attention.name, pairs, reason=divided(pairs)))
                if attention.path in stacked:
                    stacks[stacked[attention.path]] = groups[-1]
            else:
                stack.members += pairs
                stack.reason = stack.reason or divided(pairs)
        if not groups:
            raise ValueError(
                f"structure=head found no attention layer to prune in {type(model).__name__}. It looks for "
                f"{LOOKED_FOR}. structure=channel prunes the outputs of any layer"
            )
        return groups

    def pool(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.unsqueeze(1).expand(shape)


@register
@dataclass(frozen=True)
class Hybrid(Structure):
    """Blocks of `h` outputs by `w` inputs in the attention layers of a transformer, neurons in the feed-forward ones.

    A neuron is a row of a feed-forward network's first layer, of its gate's too, and a column of its last, with one
    score. In the output projection of attention a block has `w` outputs and `h` inputs, so that a head whose blocks in
    query, key and value are all pruned can be pruned there as well. All other weights stay dense. With scorer=movement
    it is block movement pruning; there the sparsity follows from a threshold and a penalty, here it is given.

    Source: Lagunas et al., Block pruning for faster transformers, 2021, arXiv:2109.04838, section 3 (Hybrid).

    Args:
        h: outputs of a block.
        w: inputs of a block.
    """

    h: int = 32
    w: int = 32

    @property
    def oriented(self) -> bool:
        return False  # it takes layers that it recognises alone

    def spares(self, param: MaskedParameter) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"h={self.h}, w={self.w}: a block has at least one row and one column")

    @property
    def label(self) -> str:
        return f"hybrid {self.h}x{self.w}"

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        by_weight = {id(param.weight): param for param in params}
        groups = []
        for attention in attentions(model):
            for module, name, *layout in attention.weights:
                param = by_weight.pop(id(behind(module, name)), None)
                if param is None:
                    continue
                turned = isinstance(param.layout, InputsFirst)  # GPT-2 keeps (in, out)
                last = isinstance(attention, Attention) and (module, name, *layout) == attention.weights[-1]
                block = (self.w, self.h) if turned != last else (self.h, self.w)
                if param.shape[0] % block[0] or param.shape[1] % block[1]:
                    raise ValueError(
                        f"{param.name} of shape {param.shape[0]}x{param.shape[1]} is not made of blocks of "
                        f"{block[0]}x{block[1]}: choose other h and w, or leave it dense by exclude=[{param.name!r}]"
                    )
                pair = (param, Blocks(*block))
                groups.append(Group(param.name, (pair,), reason=divided([pair])))
        for network in feed_forwards(model):
            candidates = [(by_weight.pop(id(behind(m, name)), None), layout) for m, name, layout in network.weights]
            pairs = tuple((param, layout) for param, layout in candidates if param is not None)
            if pairs:
                groups.append(Group(network.name, pairs, reason=divided(pairs)))
        if not groups:
            raise ValueError(
                f"structure=hybrid found neither attention nor feed-forward layers to prune in {type(model).__name__}. "
                f"It looks for {LOOKED_FOR}; and for pairs of linear layers named like "
                "intermediate.dense/output.dense, fc1/fc2, up_proj/down_proj"
            )
        order = {param.name: index for index, param in enumerate(params)}
        return sorted(groups, key=lambda group: order[group.members[0][0].name])

    def pool(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.unsqueeze(1).expand(shape)
