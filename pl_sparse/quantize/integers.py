"""The integers of a quantized network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["integers"]


def integers(converted: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The integers of a network in 8 or 4 bits, by the names of `net`'s weights, which it was made of."""
    if not isinstance(converted, torch.fx.GraphModule):
        found = {name: getattr(weight, "qdata", None) for name, weight in converted.named_parameters()}
        return {name: data for name, data in found.items() if data is not None}
    by_layer: dict[str, Tensor] = {}
    for node in converted.graph.nodes:
        if node.op != "get_attr" or not isinstance(value := _attribute(converted, str(node.target)), Tensor):
            continue
        if value.dtype != torch.int8 or value.dim() < 2:
            continue
        users = [user for dequantize in node.users for user in dequantize.users]
        path = next((_layer(user) for user in users if _layer(user) is not None), None)
        for name, parameter in net.get_submodule(path or "").named_parameters():
            full = f"{path}.{name}" if path else name
            if parameter.shape == value.shape and full not in by_layer:
                by_layer[full] = value
                break
    return by_layer


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _layer(node: torch.fx.Node) -> str | None:
    """The path of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path: str = list(stack.values())[-1][0]
    return path.removeprefix("L['self']").lstrip(".")
