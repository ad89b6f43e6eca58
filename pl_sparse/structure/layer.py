"""Whole residual blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pl_sparse.core.candidates import candidates
from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Layout, Part
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.core.upstream import plain_name
from pl_sparse.network.blocks import Block, listed, pass_by_masked, residual_blocks
from pl_sparse.structure.base import divided
from pl_sparse.structure.units import Whole, beside

__all__ = ["Layer"]


@register
@dataclass(frozen=True)
class Layer(Whole):
    """Whole residual blocks: of a ResNet the blocks that keep size and width, of a transformer its layers.

    Blocks are the modules of ModuleLists and Sequentials that hand on their input where all of their parameters are
    zero, as a call of the model on an example shows (`network.blocks`). All parameters of a block are masked with its
    weights. Where a norm comes after the join (BERT), a hook hands the input on (`pass_by_masked`), so that a masked
    block is one that is not there, everywhere. What changes the shape or has no residual connection stays dense, and is
    named with the reason.

    Blocks of one list with as many weights each are chosen together: `allocation=uniform` takes as many of each such
    list, `global` ranks all. The score of a block is the mean over its weights.

    Source: Sajjad et al., On the effect of dropping layers of pre-trained transformer models, 2020, arXiv:2004.03844,
    for leaving whole layers out.
    """

    @property
    def needs_example(self) -> bool:
        return True

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        example = getattr(model, "example_input_array", None) if example is None else example
        if example is None:
            raise ValueError(
                "residual blocks are found by calling the model: give attach(model, example) a batch of inputs, or the "
                "model an example_input_array"
            )
        by_weight = {id(param.weight): param for param in params}
        roles = {id(each.weight) for each in candidates(model) if each.role is not None}
        sizes: dict[tuple[str, int], list[Block]] = defaultdict(list)
        reasons: dict[str, str] = {}
        for block in residual_blocks(model, example):
            weights = [(n, p) for n, p in block.module.named_parameters() if p.dim() > 1 and id(p) not in roles]
            dense = [name for name, p in weights if id(p) not in by_weight]
            reason = block.reason or (f"{block.path}.{dense[0]} is not pruned" if dense else None)
            if reason is not None:
                reasons |= {by_weight[id(p)].name: f"{block.path}: {reason}" for _, p in weights if id(p) in by_weight}
            else:
                size = sum(by_weight[id(p)].numel for _, p in weights)
                sizes[block.path.rpartition(".")[0], size].append(block)
        groups = [_group(blocks, by_weight) for blocks in sizes.values()]
        grouped = {param for group in groups for param, _ in group.members}
        outside = "it is in no module of a ModuleList or Sequential"
        groups += [
            Group(param.name, ((param, param.layout),), reason=reasons.get(param.name, outside))
            for param in params
            if param not in grouped
        ]
        return groups

    def prepare_masked(self, model: nn.Module) -> None:
        for _, part in listed(model):
            if not any(bool(weight.any()) for weight in part.parameters() if weight.dim() > 1):
                pass_by_masked(part)


def _group(blocks: Sequence[Block], by_weight: dict[int, MaskedParameter]) -> Group:
    members: list[tuple[MaskedParameter, Layout]] = []
    companions: list[tuple[MaskedParameter, Layout]] = []
    for unit, block in enumerate(blocks):
        layout = Part(unit, len(blocks))
        for path, module in block.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                param = by_weight.get(id(parameter))
                if param is not None:
                    members.append((param, layout))
                else:
                    full = plain_name(".".join(filter(None, (block.path, path, name))))
                    companions.append((beside(full, module, parameter), layout))
        if not block.exact:
            pass_by_masked(block.module)
    name = blocks[0].path if len(blocks) == 1 else f"{blocks[0].path} to {blocks[-1].path}"
    return Group(name, tuple(members), tuple(companions), reason=divided(members))
