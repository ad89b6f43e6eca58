"""Which weights the outputs of a model come out of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pl_sparse.core.upstream import plain_name
from pl_sparse.network.hooks import called, stand_ins

__all__ = ["output_weights"]


def output_weights(model: nn.Module, example: Any) -> set[str]:
    """The names of the matrices and kernels that nothing but operations without any stands behind, on the way to an
    output of the model; none where the model cannot be called, or its outputs have no graph.

    Args:
        model: it is left as it is.
        example: inputs, as the model is called with.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head, self.body = nn.Linear(3, 2), nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         return self.head(self.body(x).relu()).log_softmax(1)
    >>> output_weights(Net(), torch.ones(2, 4))
    {'head.weight'}
    """
    found: set[str] = set()
    with stand_ins(model), torch.enable_grad():
        names = {id(weight): plain_name(name) for name, weight in model.named_parameters() if weight.dim() > 1}
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
        try:
            outputs = called(model, example)
        except Exception:
            return set()
        nodes, seen = [out.grad_fn for out in outputs], set[Any]()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            before = [each for each, _ in node.next_functions]
            mine = {names[id(leaf)] for leaf in map(_leaf, before) if id(leaf) in names}
            found |= mine
            nodes += [] if mine else before
    return found


def _leaf(node: Any) -> Any:
    """The parameter that a node hands on, transposed or viewed perhaps; None if there is none."""
    while node is not None and not hasattr(node, "variable"):
        before = node.next_functions
        node = before[0][0] if len(before) == 1 else None
    return None if node is None else node.variable
