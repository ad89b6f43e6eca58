"""Whole channels, alone or joined through a network, and whole input features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Along, InputsFirst, Layout, Plain, Rows, Unoriented
from pl_sparse.core.parameter import MaskedBuffer, MaskedParameter
from pl_sparse.core.parametrized import behind, is_computed
from pl_sparse.core.registry import register
from pl_sparse.network.layers import TABLES, Held, held
from pl_sparse.network.norms import kept_channels, last_norms, norm_over_all, norm_over_left
from pl_sparse.network.units import Coupling
from pl_sparse.structure.base import Structure
from pl_sparse.structure.units import RowUnits
from pl_sparse.surgery.shrink import dead
from pl_sparse.surgery.trial import couplings

__all__ = ["Channel", "Feature"]


@register("coupled", coupled=True)
@register
@dataclass(frozen=True)
class Channel(RowUnits):
    """Whole output channels: the filters of a convolution, the neurons of a linear layer (its rows).

    The last layer stays dense unless `last=True` is given: its outputs are the model's.

    With `coupled` a unit is a channel through all layers that it goes through: residual joins, concatenations and
    depthwise convolutions are pruned together, and biases, scales and shifts of norms with them. A pruned channel is
    then zero wherever it is read, and can be removed without changing the outputs (`export.shrink`). The score of a
    unit is the mean over its weights in all layers. Layers whose outputs cannot be removed stay dense: the model's own
    outputs, what a LayerNorm reads, and what is joined with a layer that is excluded.

    With `through_norms` the channels that a LayerNorm or RMSNorm reads can go too, such as the residual width of a
    transformer. Such a norm then takes mean and variance over the channels that are left, by hooks
    (`network.norms.norm_over_left`), so that the masked model is the one without them. The dense model's outputs change
    more at the moment of pruning than by zeros alone, and training goes on from there. Look-up tables (of tokens, of
    positions) are masked with the channels, without being scored or counted.

    Sources: Li et al., Pruning filters for efficient ConvNets, 2016, arXiv:1608.08710. Fang et al., DepGraph: towards
    any structural pruning, 2023, arXiv:2301.12900, for the coupling; there inputs count in a unit's score too.
    Muralidharan et al., Compact language models via pruning and knowledge distillation (Minitron), 2024,
    arXiv:2407.14679, for the width of transformers; there units are scored by activations.

    Args:
        coupled: whether channels that are joined are one unit.
        through_norms: whether channels that a LayerNorm or RMSNorm takes its statistics over are pruned too.
    """

    coupled: bool = False
    through_norms: bool = False

    def __post_init__(self) -> None:
        if self.through_norms and not self.coupled:
            raise ValueError("through_norms=true needs coupled channels: use structure=coupled (coupled=true)")

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        if not self.coupled:
            return super().groups(params, model)
        example = getattr(model, "example_input_array", None) if example is None else example
        if example is None:
            raise ValueError(
                "coupled channels are found by calling the model: give attach(model, example) a batch of inputs, or "
                "the model an example_input_array"
            )
        order = {param.name: index for index, param in enumerate(params)}
        by_weight = {id(param.weight): param for param in params}
        companions: dict[str, MaskedParameter] = {}  # a norm that several groups share is one
        groups = []
        norms = dict(last_norms(model)) if self.through_norms else {}
        for norm in norms.values():
            norm_over_left(norm)
        for coupling in couplings(model, example):
            coupling = _with_silent_scales(model, coupling)
            group = _group(coupling, dict(model.named_modules()), by_weight, companions, self.through_norms)
            if group is not None:
                group.members = tuple(sorted(group.members, key=lambda member: order[member[0].name]))
                group.name = group.members[0][0].name
                groups.append(group)
        pruned = {companion.module for group in groups if not group.reason for companion, _ in group.companions}
        for norm in norms.values():
            if norm not in pruned:
                norm_over_all(norm)
        grouped = {param.name for group in groups for param, _ in group.members}
        reason = "no channel that can be removed was found in it"
        groups += [Group(p.name, ((p, p.layout),), reason=reason) for p in params if p.name not in grouped]
        return sorted(groups, key=lambda group: order[group.name])

    @property
    def adapts(self) -> bool:
        return self.through_norms

    def adapt(self, model: nn.Module) -> None:
        for _, norm in last_norms(model) if self.through_norms else ():
            if not bool(kept_channels(norm).all()):
                norm_over_left(norm)

    @property
    def needs_example(self) -> bool:
        return self.coupled

    @property
    def oriented(self) -> bool:
        return not self.coupled  # which looks for channels by itself

    def spares(self, param: MaskedParameter) -> bool:
        return self.coupled

    @property
    def removes_outputs(self) -> bool:
        return True


def _group(
    coupling: Coupling,
    modules: Mapping[str, nn.Module],
    by_weight: Mapping[int, MaskedParameter],
    companions: dict[str, MaskedParameter],
    tables: bool,
) -> Group | None:
    """The weights that a coupling goes through, as a group without a name; None if none of them is pruned.

    Args:
        by_weight: the weights that are pruned, by the identity of the parameter.
        companions: biases and norms seen so far, by name; those of this coupling are added.
        tables: whether look-up tables are companions too.
    """
    group = Group("", (), reason=coupling.reason)
    for port in coupling.ports:
        module: Any = modules.get(port.path)
        if module is None or port.side == "scale":  # the outputs of the model; what scales is harmless: zero stays zero
            continue
        tensors: dict[str, Any] = dict(module.named_parameters(recurse=False))
        if port.side == "shift":
            tensors |= dict(module.named_buffers(recurse=False))
        if is_computed(module):
            tensors["weight"] = behind(module, "weight")
        for each in held(module, port.end):
            tensor, name = tensors.get(each.name), f"{port.path}.{each.name}".lstrip(".")
            if tensor is None:  # a buffer that is not added
                continue
            param = by_weight.get(id(tensor))
            if port.side == "in":
                consumer = param or _unpruned(name, each, module, tensor)
                if coupling.reason is None and each.dim == 1 - consumer.layout.output_dim:
                    group.consumers += ((consumer, _unit_of_input(consumer, each, port.places)),)
            elif param is not None and port.side == "out":
                layout = param.layout if coupling.reason is not None else _units_as_rows(param, each, port.places)
                group.members += ((param, layout),)
            elif group.reason is not None:
                continue
            elif port.side == "out" and tensor.dim() > 1 and not (tables and isinstance(module, TABLES)):
                group.reason = f"its channels are joined with those of {port.path or 'the model'}, which is not pruned"
            elif not isinstance(module, nn.PReLU):  # a slope is harmless, too
                mask = torch.ones_like(tensor, dtype=torch.bool, requires_grad=False)
                kind = MaskedParameter if isinstance(tensor, nn.Parameter) else MaskedBuffer
                companion = companions.setdefault(name, kind(name, module, tensor, mask))
                group.companions += ((companion, _units_as_rows(companion, each, port.places)),)
    return group if group.members else None


def _with_silent_scales(model: nn.Module, coupling: Coupling) -> Coupling:
    """A coupling, which stays if the scale of a norm is zero where its channels are not: they would pass for masked."""
    norms = [port for port in coupling.ports if port.side == "norm" and coupling.reason is None]
    alive = torch.ones(coupling.units, dtype=torch.bool)
    for _, units in dead(model, [coupling]) if norms else ():
        alive[units] = False
    for port in norms:
        kept = kept_channels(model.get_submodule(port.path)).cpu()[torch.tensor(port.places)]  # (units, places)
        silent = int((alive & ~kept.all(1)).sum())
        if silent:
            reason = f"the scale of {port.path} is zero for {silent} of its channels, which would be taken for masked"
            return replace(coupling, reason=reason)
    return coupling


def _unpruned(name: str, each: Held, module: Any, weight: Any) -> MaskedParameter:
    """A weight that is not pruned, but reads what is."""
    layout = InputsFirst() if each.dim == 0 else Plain()
    mask = torch.ones_like(weight, dtype=torch.bool, requires_grad=False)
    return MaskedParameter(name, module, weight, mask, layout=layout)


def _units_as_rows(param: MaskedParameter, each: Held, places: tuple[tuple[int, ...], ...]) -> Layout:
    """How the units with these outputs are seen in a weight."""
    layout = param.layout
    if isinstance(layout, Unoriented) or (each.dim != layout.output_dim and layout.output_dim == 0):
        layout = Along(each.dim)
    # outputs that groups of a transposed convolution share an index for are rows of their own
    rows = tuple(tuple(of if each.period else each.indices(of)) for of in places)
    if rows == tuple((index,) for index in range(layout.shape_of(param.shape)[0])):
        return layout
    return Rows(rows, layout)


def _unit_of_input(param: MaskedParameter, each: Held, places: tuple[tuple[int, ...], ...]) -> Tensor:
    """The unit that each input of a weight takes in, (in,), -1 for none; inputs that groups share count once."""
    units = torch.full((param.layout.shape_of(param.shape)[1],), -1)
    for unit, of in enumerate(places):
        units[[index % len(units) for index in each.indices(of)]] = unit
    return units


@register
@dataclass(frozen=True)
class Feature(Structure):
    """Whole features: the filters of a convolution (its output channels), the input units of a linear layer (columns).

    Without its column an input unit has no effect, with or without a bias, so that the unit can be removed from the
    layer before.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    section 4.1. There a filter's gate also acts on its bias; here the bias stays.
    """

    @property
    def least(self) -> int:
        return 1

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1) if scores.dim() > 2 else scores.mean(0)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1) if len(shape) > 2 else ()).expand(shape)
