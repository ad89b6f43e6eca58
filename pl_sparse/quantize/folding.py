"""BatchNorms folded into the layers before them: while integers are simulated, and for good."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pl_sparse.core.upstream import integer_output

__all__ = ["NORM", "fold_norms", "simulate_norms"]

_KEY = "quantization_annotation"
_OPS = torch.ops.aten
_ROWS = (_OPS.linear.default, _OPS.conv1d.default, _OPS.conv2d.default, _OPS.conv3d.default)
"""Layers whose outputs are rows of the weight."""
_COLUMNS = (_OPS.conv_transpose1d.default, _OPS.conv_transpose2d.input, _OPS.conv_transpose3d.input)
"""Layers whose outputs are columns of it."""


def batch_norm(x: Tensor, *args: Any) -> Tensor:
    """torch's, as a function that torchao does not take for one: it would trace its own patterns for half a minute,
    fold convolutions of one and two dimensions alone, and with an eps and momentum that are not the network's."""
    return torch.batch_norm(x, *args)


NORM = batch_norm
"""What computes BatchNorms in a graph that simulates integers; its arguments are those of `torch.batch_norm`."""


def scaled(weight: Tensor, scale: Tensor, var: Tensor, eps: float, groups: int | None) -> Tensor:
    """The weight of a layer times its norm's scale / sqrt(var + eps), one per output.

    Args:
        weight: of the layer.
        scale: of the norm.
        var: its running variance.
        eps: that of the norm.
        groups: of a transposed convolution, whose outputs are columns; None: outputs are rows.
    """
    factor = _factor(scale, var, eps)
    if groups is None:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    columns = factor.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight * columns.reshape(*columns.shape, *[1] * (weight.dim() - 2))


def unscaled(y: Tensor, scale: Tensor, var: Tensor, eps: float, bias: Tensor | None) -> Tensor:
    """What the layer computes without the norm's scale, from what it computes with `scaled`: y / factor + bias.

    A factor of zero, that of a masked channel, counts as 1.
    """
    factor = _factor(scale, var, eps)
    shape = (-1, *[1] * (y.dim() - 2))
    y = y / factor.masked_fill(factor == 0, 1.0).reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _factor(scale: Tensor, var: Tensor, eps: float) -> Tensor:
    return scale / (var + eps).sqrt()


def simulate_norms(graph: torch.fx.GraphModule) -> None:
    """Let layers before BatchNorms compute with the weights that they will have, once the norm is folded into them.

    The norm sees what it saw before, norm(conv(x, round(weight * factor)) / factor + bias), so that its statistics, its
    gradients and what it does in training are its own.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018, arXiv:1806.08342,
    section 3.2.

    Args:
        graph: annotated, nothing inserted yet.
    """
    for norm in _nodes(graph):
        if norm.target is not _OPS.batch_norm.default:
            continue
        norm.target = NORM
        if not _folds(norm):
            continue
        layer = norm.args[0]
        x, weight, bias, *rest = (*layer.args, None) if len(layer.args) == 2 else layer.args
        groups = (rest[3] if len(rest) > 3 else 1) if layer.target in _COLUMNS else None
        with graph.graph.inserting_before(layer):
            factor = [graph.graph.get_attr(norm.args[1].target), graph.graph.get_attr(norm.args[4].target)]
            made = graph.graph.call_function(scaled, (weight, *factor, norm.args[7], groups))
        with graph.graph.inserting_before(norm):
            back = graph.graph.call_function(unscaled, (layer, *factor, norm.args[7], bias))
        layer.args = (x, made, None, *rest)
        norm.args = (back, *norm.args[1:])
        made.meta, back.meta = {**layer.meta, "val": weight.meta["val"]}, dict(norm.meta)
        for node in (made, back):
            node.meta.pop(_KEY, None)
        annotation = layer.meta[_KEY]
        specs = [(made if node is weight else node, spec) for node, spec in annotation.input_qspec_map.items()]
        annotation.input_qspec_map = {node: spec for node, spec in specs if node is not bias}
        if annotation.output_qspec is not None:  # the norm stands between
            norm.meta.setdefault(_KEY, integer_output(annotation.output_qspec))
            annotation.output_qspec = None
    graph.recompile()


def _folds(norm: Any) -> bool:
    """Whether what a norm reads is a layer with integers that nothing else reads, and all of both are constants."""
    layer, *state = norm.args[:5]
    annotation = getattr(layer, "meta", {}).get(_KEY)
    if annotation is None or layer.target not in _ROWS + _COLUMNS or len(layer.users) > 1:
        return False
    if layer.args[1] not in annotation.input_qspec_map:
        return False
    constants = [*state, *(bias for bias in layer.args[2:3] if bias is not None)]
    channels_last = layer.target is _OPS.linear.default and layer.meta["val"].dim() > 2
    return not channels_last and all(isinstance(node, torch.fx.Node) and node.op == "get_attr" for node in constants)


def fold_norms(graph: torch.fx.GraphModule) -> None:
    """Undo `simulate_norms` in evaluation: the layers get weights and biases with the norms within.

    Args:
        graph: that simulates integers.
    """
    for norm in _nodes(graph):
        if norm.target is not NORM or getattr(norm.args[0], "target", None) is not unscaled:
            continue
        back = norm.args[0]
        layer, *_, bias = back.args
        scale, shift, mean, var = (_value(graph, node) for node in norm.args[1:5])
        start = 0 if bias is None else _value(graph, bias)
        name = f"_{layer.name}_bias"
        graph.register_buffer(name, shift + (start - mean) * _factor(scale, var, norm.args[7]))
        with graph.graph.inserting_before(layer):
            layer.update_arg(2, graph.graph.get_attr(name))
        norm.replace_all_uses_with(layer)
        graph.graph.erase_node(norm)
        graph.graph.erase_node(back)
    graph.recompile()


def _value(graph: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
    return attrgetter(str(node.target))(graph).detach()


def _nodes(graph: torch.fx.GraphModule) -> list[Any]:
    return list(graph.graph.nodes)
