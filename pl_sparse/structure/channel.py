"""Whole channels, alone or joined through a network, and whole input features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.structure.base import Structure
from pl_sparse.surgery.trial import couplings

__all__ = ["Channel", "Feature"]


@dataclass(frozen=True)
class Channel(Structure):
    """Whole output channels: the filters of a convolution, the neurons of a linear layer (its rows).

    The last layer stays dense unless `last=True` is given: its outputs are the model's.

    With `coupled` a unit is a channel through all layers that it goes through: residual joins, concatenations and
    depthwise convolutions are pruned together, and biases, scales and shifts of norms with them. A pruned channel is
    then zero wherever it is read, and can be removed without a trace (`export.shrink`). The score of a unit is the mean
    over its weights in all layers. Layers whose outputs cannot be removed stay dense: the model's own outputs, what a
    LayerNorm reads, and what is joined with a layer that is excluded.

    Sources: Li et al., Pruning filters for efficient ConvNets, 2016, arXiv:1608.08710. Fang et al., DepGraph: towards
    any structural pruning, 2023, arXiv:2301.12900, for the coupling; there inputs count in a unit's score too.

    Args:
        coupled: whether channels that are joined are one unit; it needs Torch-Pruning.

    Raises:
        ImportError: Torch-Pruning is not installed.
    """

    coupled: bool = False

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        if not self.coupled:
            return super().groups(params, model)
        example = getattr(model, "example_input_array", None) if example is None else example
        if example is None:
            raise ValueError(
                "coupled channels are found by calling the model: give attach(model, example) a batch of inputs, or "
                "the model an example_input_array"
            )
        by_weight = {id(param.weight): param for param in params}
        order = {param.name: index for index, param in enumerate(params)}
        others: dict[str, MaskedParameter] = {}
        modules = dict(model.named_modules())

        def reader(path: str, module: Any) -> MaskedParameter:
            """A layer that is not pruned, but reads what is."""
            layout = Layout("transposed") if getattr(module, "transposed", False) else Layout()
            mask = torch.ones_like(module.weight, dtype=torch.bool, requires_grad=False)
            return MaskedParameter(f"{path}.weight", module, module.weight, mask, layout=layout)

        groups = []
        for coupling in couplings(model, example):
            members: list[tuple[MaskedParameter, Layout]] = []
            followers: list[tuple[MaskedParameter, Layout]] = []
            feeds: list[tuple[MaskedParameter, Tensor]] = []
            reason = coupling.reason
            for port in coupling.ports:
                module: Any = modules.get(port.path)
                if module is None or not port.path:  # a parameter, or the outputs of the model: there is a reason
                    continue
                if port.side == "in":
                    if coupling.reason is None:
                        into = by_weight.get(id(module.weight)) or reader(port.path, module)
                        feeds.append((into, _readers(into, port.places)))
                    continue
                for short, tensor in module.named_parameters(recurse=False):
                    param = by_weight.get(id(tensor))
                    if param is not None:
                        whole = coupling.reason is not None
                        members.append((param, param.layout if whole else _rows(param, port.places)))
                    elif reason is not None:
                        continue
                    elif short == "weight" and tensor.dim() > 1:
                        reason = reason or f"its channels are joined with those of {port.path}, which is not pruned"
                    elif not isinstance(module, nn.PReLU):
                        name = f"{port.path}.{short}"
                        mask = torch.ones_like(tensor, dtype=torch.bool, requires_grad=False)
                        other = others.setdefault(name, MaskedParameter(name, module, tensor, mask))
                        followers.append((other, _rows(other, port.places)))
            if members:
                members.sort(key=lambda member: order[member[0].name])
                groups.append(Group(members[0][0].name, tuple(members), tuple(followers), tuple(feeds), reason))
        found = {param.name for group in groups for param, _ in group.members}
        why = "no channel that can be removed was found in it"
        groups += [Group(p.name, ((p, p.layout),), reason=why) for p in params if p.name not in found]
        return sorted(groups, key=lambda group: order[group.name])

    @property
    def needs_example(self) -> bool:
        return self.coupled

    @property
    def removes_outputs(self) -> bool:
        return True

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)


def _rows(param: MaskedParameter, places: tuple[tuple[int, ...], ...]) -> Layout:
    """How the units with these outputs are seen in a weight."""
    outputs = param.layout.view(torch.empty(param.shape, device="meta")).shape[0]
    if places == tuple((index,) for index in range(outputs)):
        return param.layout
    return Layout("rows", rows=places, below=param.layout)


def _readers(param: MaskedParameter, places: tuple[tuple[int, ...], ...]) -> Tensor:
    """The unit that each input of a weight takes in, -1 for none of these; inputs that groups share count once."""
    inputs = param.layout.view(torch.empty(param.shape, device="meta")).shape[1]
    units = torch.full((inputs,), -1)
    for unit, at in enumerate(places):
        for place in at:
            units[place % inputs] = unit
    return units


@dataclass(frozen=True)
class Feature(Structure):
    """Whole features: the filters of a convolution (its output channels), the input units of a linear layer (columns).

    Without its column an input unit is of no use, bias or not, so that the unit can be removed from the layer before.

    Source: Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2017, arXiv:1712.01312,
    section 4.1. There a filter's gate is on its bias too, which here stays.
    """

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).mean(1) if scores.dim() > 2 else scores.mean(0)

    def expand(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        return chosen.reshape(-1, *(1,) * (len(shape) - 1) if len(shape) > 2 else ()).expand(shape)
