"""Whole experts of mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Along, Layout, Part
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.experts import LOOKED_FOR, Experts, close_masked, expert_layers
from pl_sparse.structure.base import divided
from pl_sparse.structure.units import Whole, beside
from pl_sparse.surgery.experts import refusal_of

__all__ = ["Expert"]


@register
@dataclass(frozen=True)
class Expert(Whole):
    """Whole experts of mixture-of-experts layers: all weights of an expert, and its row of the router.

    A masked expert is chosen no more: hooks on the router give it the lowest logit there is, wherever its row of the
    router's weight is zero, so that the masked model is the one that has fewer experts (`close_masked`). A layer keeps
    at least as many experts as its router chooses. Layers are recognised by what they consist of
    (`network.experts`); all other weights stay dense, shared experts too. Whether masking and removing give the same is
    tried out on each layer before training; where not, it is refused by name.

    The score of an expert is the mean over its weights; scorer=reap looks at what its outputs add.

    Source: Lasby et al., REAP the experts: why pruning prevails for one-shot MoE compression, 2025, arXiv:2510.13999,
    for removing experts with their rows of the router.
    """

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        by_weight = {id(param.weight): param for param in params}
        groups = []
        for layer in expert_layers(model):
            tensors = list(layer.tensors(model))
            members = [by_weight.get(id(parameter)) for *_, parameter, _ in tensors]
            if not any(members):  # left dense by include and exclude
                continue
            lacking = [
                name for (name, _, _, p, _), m in zip(tensors, members, strict=True) if m is None and layer.is_weight(p)
            ]
            if lacking:
                raise ValueError(
                    f"structure=expert removes experts whole, but include and exclude leave {lacking[0]} dense: name "
                    f"all weights of {layer.name} or none"
                )
            if (reason := layer.reason or refusal_of(model, layer)) is not None:
                raise ValueError(
                    f"structure=expert cannot prune the experts of {layer.name}: {reason}. Leave them dense by "
                    f"exclude=['{layer.name}.*']"
                )
            groups.append(_group(model, layer, by_weight))
            close_masked(model.get_submodule(layer.router))
        if not groups:
            raise ValueError(
                f"structure=expert found no experts to prune in {type(model).__name__}. It looks for {LOOKED_FOR}"
            )
        return groups

    def prepare_masked(self, model: nn.Module) -> None:
        for layer in expert_layers(model):
            if layer.reason is None:
                close_masked(model.get_submodule(layer.router))


def _group(model: nn.Module, layer: Experts, by_weight: dict[int, MaskedParameter]) -> Group:
    members: list[tuple[MaskedParameter, Layout]] = []
    companions: list[tuple[MaskedParameter, Layout]] = []
    for name, module, _, parameter, unit in layer.tensors(model):
        layout: Layout = Along(0) if unit is None else Part(unit, layer.count)
        param = by_weight.get(id(parameter)) if layer.is_weight(parameter) else None
        if param is not None:
            members.append((param, layout))
        else:
            companions.append((beside(name, module, parameter), layout))
    companions += [(beside(name, m, parameter), Along(0)) for name, m, _, parameter in layer.rows(model)]
    return Group(layer.name, tuple(members), tuple(companions), reason=divided(members), least=layer.chosen)
