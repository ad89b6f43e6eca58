"""Biases as integers of 32 bits, which runtimes make of them."""

from __future__ import annotations

from operator import attrgetter

import torch

from pl_sparse.core.upstream import fake_quantizers, observer_of

__all__ = ["fit_biases"]

_OPS = torch.ops.aten
_LAYERS = (_OPS.linear.default, _OPS.conv1d.default, _OPS.conv2d.default, _OPS.conv3d.default)
_TRANSPOSED = (_OPS.conv_transpose1d.default, _OPS.conv_transpose2d.input, _OPS.conv_transpose3d.input)
_LARGEST = 2**30
"""Of a bias; the other half of the range is for the sum that it is added to."""


def fit_biases(graph: torch.fx.GraphModule) -> None:
    """Widen the ranges of channels whose bias would be larger than an integer of 32 bits can be.

    A runtime adds round(bias / (s_x s_w)) to sums of products. ONNX Runtime cuts off what does not fit. A channel of
    zeros, or one of tiny inputs, has a tiny scale; with s_w >= |bias| / (2^30 s_x) the bias fits, and no product
    is off by more than 2^-23 of it.

    Args:
        graph: that simulates integers, with ranges of the weights as they are.
    """
    quantizers = fake_quantizers(graph)
    for layer in graph.graph.nodes:
        if layer.target not in _LAYERS + _TRANSPOSED or len(layer.args) < 3 or layer.args[2] is None:
            continue
        x, weight, bias = layer.args[:3]
        inputs, matrix = quantizers.get(str(x.target)), quantizers.get(str(weight.target))
        if inputs is None or matrix is None or bias.op != "get_attr":
            continue
        values = attrgetter(str(bias.target))(graph).detach().abs()
        observer = observer_of(matrix)
        least = values * 127 / (_LARGEST * inputs.calculate_qparams()[0])
        if layer.target in _TRANSPOSED:  # its scales are those of columns, which all groups share, or one of all rows
            columns = len(observer.max_val) if observer.ch_axis == 1 else 1
            least = least.reshape(-1, columns).amax(0)
        observer.max_val.copy_(torch.maximum(observer.max_val, least))
