"""The integers of a quantized network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import integer_data, path_of

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
    for node in converted.graph.nodes:
        if node.op != "get_attr" or not isinstance(value := _attribute(converted, str(node.target)), Tensor):
            continue
        if value.dtype != torch.int8 or value.dim() < 2:
            continue
        users = [user for dequantize in node.users for user in dequantize.users]
        path = next((path for user in users if (path := path_of(user)) is not None), None)
        for name, parameter in net.get_submodule(path or "").named_parameters():
            full = f"{path}.{name}" if path else name
            if parameter.shape == value.shape and full not in by_layer:
                by_layer[full] = value
                break
    return by_layer


def _attribute(module: nn.Module, path: str) -> Any:
    """An attribute of a submodule, by its path."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
