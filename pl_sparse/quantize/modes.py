"""A graph of a network that trains and evaluates: dropout and norms do what those of their modules do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pl_sparse.core.upstream import path_of
from pl_sparse.network.channels import short
from pl_sparse.network.graph import traced
from pl_sparse.quantize.folding import NORM
from pl_sparse.quantize.matrices import written

__all__ = ["Modes", "trained_graph"]

_OPS = torch.ops.aten
_NORMS = (NORM, _OPS.batch_norm.default, _OPS.instance_norm.default)
_FLAGS: dict[Any, int] = {
    **dict.fromkeys(_NORMS, 5),
    **{
        operation: 2
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for operation in (getattr(_OPS, name).default, getattr(_OPS, f"{name}_").default)
    },
    **dict.fromkeys((_OPS.rrelu.default, _OPS.rrelu_.default), 3),
    **dict.fromkeys((_OPS.lstm.input, _OPS.gru.input, _OPS.rnn_tanh.input, _OPS.rnn_relu.input), 6),
}
"""Operations that do something else in training, with the place of the argument that switches it."""
_ATTENTION = _OPS.scaled_dot_product_attention.default


class Modes:
    """The operations of a graph that train or evaluate, each as the module that it was traced in.

    Args:
        graph: by torch.export.
        net: what it was traced of.
    """

    def __init__(self, graph: torch.fx.GraphModule, net: nn.Module) -> None:
        self._graph = graph
        modules = dict(net.named_modules())
        self._places: list[tuple[Any, int, Any, nn.Module]] = []
        for node in graph.graph.nodes:
            module = modules.get(path_of(node) or "", net)
            if node.target is _ATTENTION:
                self._places.append((node, 4, _dropout_of(node), module))
            elif node.target in _FLAGS and not (node.target in _NORMS and node.args[3] is None):
                self._places.append((node, _FLAGS[node.target], True, module))
        self._set: Any = None

    def follow(self, frozen: bool, evaluating: bool = False) -> None:
        """Let each train if its module does.

        Args:
            frozen: whether norms evaluate anyway.
            evaluating: whether all evaluate.
        """
        now = [module.training and not evaluating for *_, module in self._places], frozen
        if now == self._set:
            return
        self._set = now
        for (node, place, value, _), training in zip(self._places, now[0], strict=True):
            trains = training and not (frozen and node.target in _NORMS)
            node.update_arg(place, value if trains else type(value)(0))
        self._graph.recompile()


def _dropout_of(attention: Any) -> float:
    """The share of attention that is dropped, which is made the fifth argument."""
    args, rest = list(attention.args), dict(attention.kwargs)
    for key, default in [("attn_mask", None), ("dropout_p", 0.0)][len(args) - 3 :]:
        args.append(rest.pop(key, default))
    attention.args, attention.kwargs = tuple(args), rest
    return float(args[4])


def trained_graph(net: nn.Module, example: Tensor) -> tuple[torch.fx.GraphModule, str | None]:
    """A graph that computes what the network does in evaluation, and in training where `Modes` switches it.

    Where the network does something else in training than dropout and norms, that is left out, and said.

    Args:
        net: the network, whose modules' modes stay.
        example: inputs of some samples.

    Returns:
        The graph, and what its training leaves out.

    Raises:
        ValueError: it cannot be traced, or returns other things in training.
    """
    name = type(net).__name__
    with _modes_kept(net), torch.no_grad():
        try:
            wanted = net.eval()(example[:2])
        except Exception as error:
            raise ValueError(f"{name} cannot be called with one tensor, a batch's first: {short(error)}") from error
        try:
            graph = _plain(net.train(), example)
            why = _otherwise(graph, net.eval(), example[:2], wanted)
        except ValueError as error:
            graph, why = None, str(error)
        if graph is not None and why is None:
            _refuse_writing(name, graph)
            return graph, None
        evaluating = _plain(net.eval(), example)
        if graph is not None and pytree.tree_structure(graph(example[:2])) != pytree.tree_structure(wanted):
            raise ValueError(
                f"{name} returns other things in training than in evaluation, and integers are simulated in one graph: "
                "quantize the part that returns the same, Quantize(network=...)"
            )
        left = _otherwise(evaluating, net, example[:2], wanted)
    if left is not None:
        raise ValueError(f"{name} cannot be quantized as it evaluates: {left}")
    _refuse_writing(name, evaluating)
    return evaluating, (
        f"{name} trains as it evaluates while integers are simulated, with dropout and norms as they are in training: "
        f"{why}"
    )


def _refuse_writing(name: str, graph: torch.fx.GraphModule) -> None:
    """Raise a ValueError if a graph writes to a parameter, which fails in a training."""
    parameters = dict(graph.named_parameters())
    for node in graph.graph.nodes:
        for one in written(node):
            if one.target in parameters:
                raise ValueError(
                    f"{name} writes to its weight {one.target} when it is called, which fails in a training: "
                    "quantize a network that leaves its weights alone, or leave quantization out"
                )


def _plain(net: nn.Module, example: Tensor) -> torch.fx.GraphModule:
    """The graph, without counting batches: that counts those of validation too, and nothing reads it."""
    graph: torch.fx.GraphModule = traced(net, example).module()
    for node in list(graph.graph.nodes):
        if node.target is _OPS.add_.Tensor and "num_batches_tracked" in str(node.all_input_nodes[0]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _otherwise(graph: torch.fx.GraphModule, net: nn.Module, example: Tensor, wanted: Any) -> str | None:
    """What a graph does that the network does not in evaluation; None if it computes the same."""
    Modes(graph, net).follow(frozen=False)
    random = torch.Tag.nondeterministic_seeded
    for node in graph.graph.nodes:
        drawn = isinstance(node.target, torch._ops.OpOverload) and random in node.target.tags
        if drawn and node.target not in _FLAGS and node.target is not _ATTENTION:
            return f"the graph draws random numbers ({node.target})"
    leaves, spec = pytree.tree_flatten(graph(example))
    expected, known = pytree.tree_flatten(wanted)
    if spec != known:
        return "the graph returns other things"
    for found, right in zip(leaves, expected, strict=True):
        if isinstance(right, Tensor) and right.is_floating_point():
            scale = float(right.nan_to_num().abs().max()) if right.numel() else 0.0
            if not torch.allclose(found, right, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
                return "the graph has other outputs"
    return None


@contextmanager
def _modes_kept(net: nn.Module) -> Iterator[None]:
    """Afterwards each module trains or evaluates as before."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        net.train()  # what modules keep for evaluation (LeViT's biases) is forgotten
        for module, training in modes:
            module.training = training
