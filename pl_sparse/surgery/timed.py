"""Networks measured at a few widths, so that their milliseconds are predicted and not those of their layers alone."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.optional import nice_to_have
from pl_sparse.network.cost import Network
from pl_sparse.network.latency import LatencyTable
from pl_sparse.network.runtimes import Runtime
from pl_sparse.surgery.plan import named_tensors
from pl_sparse.surgery.shrink import shrink

__all__ = ["fit", "narrowed"]


def fit(network: Network, model: nn.Module, example: Any, table: LatencyTable) -> None:
    """Make the milliseconds of `network` those that `model` takes (`Network.fit`).

    The model and three copies with fewer channels are measured in the runtime of the table, once: the table keeps it.
    Where that is not possible, milliseconds stay the sum over layers, with a warning.

    Args:
        network: the layers of `model`.
        model: as it is trained; it does not change.
        example: inputs of a batch.
        table: of the layers.
    """

    def times(runtime: Runtime, repeats: int) -> list[float] | None:
        found = None
        with nice_to_have("the time between layers, which allocation.ms counts"), torch.no_grad():
            nets = [narrowed(model, network.groups, kept, example) for kept in network.samples]
            found = runtime.timed([runtime.network(net, example) for net in nets], repeats)
        return found

    looks = [(layer.key, layer.positions, layer.outs, layer.ins) for layer in network.layers]
    weights = [tuple(weight.shape) for weight in model.parameters()]
    digest = hashlib.sha256(repr((model, looks, weights, network.samples)).encode()).hexdigest()[:16]
    measured = table.kept(f"network {digest}", times)
    if measured is not None:
        network.fit(table, measured)


def narrowed(model: nn.Module, groups: Sequence[Group], kept: Sequence[int], example: Any) -> nn.Module:
    """A copy of a model in evaluation mode that has only the first `kept[g]` units of each group.

    Raises:
        ValueError: some of the others cannot be removed.
    """
    smaller = copy.deepcopy(model).eval()
    masks: dict[str, Tensor] = {}
    for group, count in zip(groups, kept, strict=True):
        for param, layout in (*group.members, *group.companions):
            shape = layout.shape_of(param.former)
            first = torch.arange(shape[0], device=param.weight.device) < count
            mask = masks.get(param.name, torch.ones_like(param.weight, dtype=torch.bool))
            masks[param.name] = layout.write(mask, first.view(-1, *(1,) * (len(shape) - 1)).expand(shape))
    if all(bool(mask.all()) for mask in masks.values()):
        return smaller
    with torch.no_grad():
        tensors = named_tensors(smaller)
        for name, mask in masks.items():
            tensors[name].mul_(mask)
    if left := shrink(smaller, example, masks).left:
        raise ValueError(f"channels of {', '.join(left)} cannot be removed")
    return smaller
