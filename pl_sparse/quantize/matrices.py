"""Which parameters the matrices of a graph are made of."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

__all__ = ["floats", "made_of", "mark", "reaching", "written"]

_KEY = "quantization_annotation"
_PRODUCT = re.compile(r"(_?conv\w*|linear|\w*matmul|\w*mm|einsum|bilinear|lstm|gru|rnn_\w+)$")
"""Operations that multiply matrices."""


def made_of(graph: torch.fx.GraphModule) -> dict[torch.fx.Node, set[str]]:
    """What is computed of parameters and buffers alone, with their names."""
    names: dict[torch.fx.Node, set[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            names[node] = {str(node.target)}
        elif node.op.startswith("call") and node.all_input_nodes and all(n in names for n in node.all_input_nodes):
            names[node] = set().union(*(names[source] for source in node.all_input_nodes))
    return names


def reaching(graph: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """What the outputs depend on, or what is written into it."""
    nodes = list(graph.graph.nodes)
    found: set[torch.fx.Node] = set()
    waiting = [node for node in nodes if node.op == "output"]
    while waiting:
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting.extend(node.all_input_nodes)
        waiting = [node for node in nodes if node not in found and any(one in found for one in written(node))]
    return found


def written(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What an operation in place writes to: arguments, and what they are views of."""
    found: list[torch.fx.Node] = []
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    for argument, value in zip(schema.arguments, node.args, strict=False) if schema is not None else ():
        source: Any = value if argument.alias_info is not None and argument.alias_info.is_write else None
        while isinstance(source, torch.fx.Node):
            found.append(source)
            source = source.args[0] if source.args and _is_view(source) else None
    return found


def _is_view(node: torch.fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return any(made.alias_info is not None for made in node.target._schema.returns)
    return node.target is operator.getitem


def mark(graph: torch.fx.GraphModule) -> None:
    """Note at each layer with integers, in `meta["matrix"]`, the largest parameter that its matrix is made of.

    A matrix that is made of activations is none: its integers would have the scales of one batch.
    """
    parameters = dict(graph.named_parameters(remove_duplicate=False))  # a tied one has several names
    constants = made_of(graph)
    for layer in graph.graph.nodes:
        annotation = layer.meta.get(_KEY)
        for source, spec in list((getattr(annotation, "input_qspec_map", None) or {}).items()):
            if getattr(spec, "qscheme", None) is not torch.per_channel_symmetric:
                continue
            if source not in constants:
                del layer.meta[_KEY]
            elif names := constants[source] & set(parameters):
                layer.meta["matrix"] = max(sorted(names), key=lambda name: parameters[name].numel())


def floats(graph: torch.fx.GraphModule, net: nn.Module) -> dict[str, str]:
    """The parameters of several dimensions that no integers are simulated of, with the operation that reads each.

    Args:
        graph: with what simulates integers.
        net: the network.
    """
    names = {id(weight): name for name, weight in net.named_parameters()}
    attributes = {key: names.get(id(weight), key) for key, weight in graph.named_parameters(remove_duplicate=False)}
    rounded: dict[torch.fx.Node, dict[str, bool]] = {}  # of what is made of parameters: which, and whether in integers
    readers: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    used = reaching(graph)
    for node in graph.graph.nodes:
        if node not in used:
            continue
        sources, operation = node.all_input_nodes, _operation(node)
        if node.op == "get_attr":
            rounded[node] = {attributes.get(str(node.target), str(node.target)): False}
        elif sources and all(source in rounded for source in sources) and not _PRODUCT.match(operation):
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            whole = getattr(module, "is_per_channel", False)
            items = [item for source in sources for item in rounded[source].items()]
            rounded[node] = {name: before or whole for name, before in items}
        else:
            for source in sources:
                for name, before in rounded.get(source, {}).items():
                    readers[name].append((operation, before))
    left = {}
    for name, weight in net.named_parameters():
        plain = [operation for operation, before in readers[name] if not before]
        products = [operation for operation in plain if _PRODUCT.match(operation)]
        if weight.dim() > 1 and (products or len(plain) == len(readers[name])):
            left[name] = (products or plain or ["nothing"])[0]
    return left


def _operation(node: torch.fx.Node) -> str:
    """The name of what a node calls, without its package and overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))
