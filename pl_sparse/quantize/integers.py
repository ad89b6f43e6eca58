"""The integers of a quantized network."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import integer_data

__all__ = ["integers"]


def integers(converted: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The integers of a network in 8 or 4 bits, by the names of the weights that they were made of.

    Args:
        converted: what `Quantization.convert` or `post_training` made.
        net: the network that it was made of.
    """
    if not isinstance(converted, torch.fx.GraphModule):
        data = {name: integer_data(weight) for name, weight in converted.named_parameters()}
        return {name: tensor for name, tensor in data.items() if tensor is not None}
    by_layer: dict[str, Tensor] = {}
    names = {id(weight): name for name, weight in net.named_parameters()}
    for node in converted.graph.nodes:
        if node.op != "get_attr" or not isinstance(value := attrgetter(str(node.target))(converted), Tensor):
            continue
        if value.dtype != torch.int8 or value.dim() < 2:
            continue
        users = [user for dequantize in node.users for user in dequantize.users]
        for user in users:
            if "matrix" in user.meta:
                name = names[id(net.get_parameter(user.meta["matrix"]))]
                turned = user.meta.get("turned") or value.shape != net.get_parameter(name).shape
                by_layer[name] = value.t() if turned and value.dim() == 2 else value
    return by_layer
