"""The rules by which torchao puts integers into a graph: those of its quantizer for x86, with sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pl_sparse.core.upstream import integer_input, integer_output, tell_calls_apart
from pl_sparse.quantize.folding import simulate_norms
from pl_sparse.quantize.matrices import made_of, mark, reaching
from pl_sparse.quantize.ranges import SMALLEST, moving_range

__all__ = ["x86_quantizer"]

_KEY = "quantization_annotation"


def x86_quantizer(training: bool) -> Any:
    """torchao's quantizer for x86: 8-bit layers, and sums, per-channel weights in [-127, 127].

    Args:
        training: whether ranges are learned as moving averages, or taken from some batches after training.
    """
    from torchao.quantization.pt2e.fake_quantize import FakeQuantize
    from torchao.quantization.pt2e.observer import (
        HistogramObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    tiny = {"eps": torch.finfo(torch.float32).eps}  # a channel of zeros has a scale, and small ones their own
    activation: Any = moving_range().with_args(observer=MovingAverageMinMaxObserver, eps=SMALLEST)
    # A constant of 1 makes the average the last value: the range of a weight is that of the weight as it is now. The
    # fused one takes |min| / 128 for the scale of a channel, the converted network |min| / 127.
    weight: Any = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, **tiny)
    if not training:
        activation, weight = HistogramObserver.with_args(eps=SMALLEST), PerChannelMinMaxObserver.with_args(**tiny)
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=activation,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=weight,
    )

    class WithSums(X86InductorQuantizer):  # type: ignore[misc]
        """With integers in all linear layers, convolutions and products with a matrix, on both sides of a sum, and none
        between a layer or a sum and its ReLU."""

        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            tell_calls_apart(model)
            _layers_of_products(model)
            _number_paddings(model)
            _scale_norms(model)
            return super().transform_for_annotation(model)

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            try:
                model = super().annotate(model)
            except ValueError:  # of layers whose modules compute more than the layer; ours go by operations alone
                for node in model.graph.nodes:
                    node.meta.pop(_KEY, None)
            if training:
                _annotate_signals(model, activations, weights)
            _annotate_others(model, activations, weights)
            _annotate_sums(model, activations)
            _leave_exact(model)
            _leave_unused(model)
            _leave_averages(model)
            mark(model)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            super().validate(model)
            if training:
                simulate_norms(model)

    return WithSums().set_global(QuantizationConfig(activations, activations, weights, None, training))


def _layers_of_products(model: torch.fx.GraphModule) -> None:
    """A linear layer in place of a product with a matrix: of x @ w.t(), and of x @ w with `meta["turned"]` noted."""
    ops = torch.ops.aten
    constants = made_of(model)
    swaps: dict[Any, Any] = {
        ops.t.default: ((),),
        ops.numpy_T.default: ((),),
        ops.transpose.int: ((0, 1), (1, 0), (-2, -1), (-1, -2)),
        ops.permute.default: (([1, 0],),),
    }
    for product in model.graph.nodes:
        if product.target in (ops.mm.default, ops.matmul.default):
            bias, (x, matrix) = None, product.args
        elif product.target is ops.addmm.default and not product.kwargs:
            bias, x, matrix = product.args
        else:
            continue
        if matrix not in constants or x in constants or matrix.meta["val"].dim() != 2:
            continue
        if bias is not None and bias.meta["val"].dim() != 1:
            continue
        if tuple(matrix.args[1:]) in swaps.get(matrix.target, ()):
            rows = matrix.args[0]
        else:
            with model.graph.inserting_before(product):
                rows = model.graph.call_function(ops.t.default, (matrix,))
            rows.meta = {**matrix.meta, "val": matrix.meta["val"].t()}
            product.meta["turned"] = True
        product.target, product.args = ops.linear.default, (x, rows, bias)[: 2 if bias is None else 3]
    model.graph.eliminate_dead_code()
    model.recompile()


def _number_paddings(model: torch.fx.GraphModule) -> None:
    """Paddings of convolutions as numbers in place of words: torchao's rules refuse the words."""
    ops = torch.ops.aten
    numbered = {getattr(ops, name).padding: getattr(ops, name).default for name in ("conv1d", "conv2d", "conv3d")}
    for conv in model.graph.nodes:
        if conv.target not in numbered:
            continue
        given: list[Any] = [*conv.args, *(None, 1, "valid", 1, 1)[len(conv.args) - 2 :]]
        x, weight, bias, stride, padding, dilation, groups = given
        kernel = weight.meta["val"].shape[2:]
        stride, each = ([n] * len(kernel) if isinstance(n, int) else n for n in (stride, dilation))
        reach = [0 if padding == "valid" else d * (k - 1) for d, k in zip(each, kernel, strict=True)]
        if any(total % 2 for total in reach):
            uneven = [pad for total in reversed(reach) for pad in (total // 2, total - total // 2)]
            with model.graph.inserting_before(conv):
                x = model.graph.call_function(ops.constant_pad_nd.default, (x, uneven))
            reach = [0] * len(reach)
        conv.target = numbered[conv.target]
        conv.args = (x, weight, bias, stride, [total // 2 for total in reach], each, groups)
    model.recompile()


def _scale_norms(model: torch.fx.GraphModule) -> None:
    """Ones and zeros for a BatchNorm without scale and shift: torchao folds scales."""
    ops = torch.ops.aten
    for norm in model.graph.nodes:
        if norm.target is not ops.batch_norm.default or norm.args[1] is not None or norm.args[3] is None:
            continue
        mean = norm.args[3].meta["val"]
        with model.graph.inserting_before(norm):
            for index, (part, value) in enumerate((("scale", 1.0), ("shift", 0.0)), start=1):
                name = f"_{norm.name}_{part}"
                model.register_buffer(name, torch.full(mean.shape, value, dtype=mean.dtype, device=mean.device))
                made = model.graph.get_attr(name)
                made.meta["val"] = mean
                norm.update_arg(index, made)
    model.recompile()


def _annotate_signals(model: torch.fx.GraphModule, activation: Any, weight: Any) -> None:
    """Integers into a convolution that torchao's rules have left, and out of the BatchNorm that follows it."""
    ops, key = torch.ops.aten, _KEY
    for norm in model.graph.nodes:
        conv = norm.args[0] if norm.target is ops.batch_norm.default else None
        convolutions = ops.conv1d.default, ops.conv2d.default
        if conv is None or conv.target not in convolutions or len(conv.users) > 1 or conv.meta.get(key):
            continue
        conv.meta[key] = integer_input({conv.args[0]: activation, conv.args[1]: weight})
        norm.meta[key] = integer_output(activation)


def _annotate_others(model: torch.fx.GraphModule, activation: Any, weight: Any) -> None:
    """Integers into what torchao's rules do not know: other convolutions, linear products without a layer (attention).

    A BatchNorm behind them stays as it is.
    """
    ops, key = torch.ops.aten, _KEY
    plain = (ops.conv1d.default, ops.conv1d.padding, ops.conv2d.default, ops.conv2d.padding)
    volumes = (ops.conv3d.default, ops.conv3d.padding)
    transposed = (ops.conv_transpose1d.default, ops.conv_transpose2d.input, ops.conv_transpose3d.input)
    for layer in model.graph.nodes:
        if layer.target in (ops.linear.default, *plain, *volumes, *transposed) and layer.meta.get(key) is None:
            rows = replace(weight, ch_axis=1) if layer.target in transposed else weight  # outputs are its columns
            layer.meta[key] = integer_input({layer.args[0]: activation, layer.args[1]: rows})


def _annotate_sums(model: torch.fx.GraphModule, spec: Any) -> None:
    """Integers into both sides of a sum, and none before a ReLU: runtimes have kernels with the ReLU within."""
    ops, key = torch.ops.aten, _KEY
    for node in model.graph.nodes:
        if node.target in (ops.add.Tensor, ops.add_.Tensor) and node.meta.get(key) is not None:
            for source in node.args:
                if isinstance(source, torch.fx.Node) and source.meta.get(key) is not None:
                    node.meta[key].input_qspec_map[source] = spec
                    source.meta[key].output_qspec = spec
    for node in model.graph.nodes:
        if node.target in (ops.relu.default, ops.relu_.default):
            source = node.args[0]
            layer = source.meta.get(key)
            if layer is not None and layer.output_qspec is not None and len(source.users) == 1:
                layer.output_qspec = None
                node.meta[key] = integer_output(spec)


def _leave_exact(model: torch.fx.GraphModule) -> None:
    """No rounding of what nothing is learned of: positions of tokens, indices, masks, and what is computed of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    exact: set[Any] = set()
    for node in model.graph.nodes:
        value = node.meta.get("val")
        counts = isinstance(value, torch.Tensor) and not value.is_floating_point()
        constant = node.op == "get_attr" and node.target not in parameters
        made = node.op.startswith("call") and all(source in exact for source in node.all_input_nodes)
        if counts or constant or made:
            exact.add(node)
        annotation = node.meta.get(_KEY)
        if annotation is not None and node in exact:
            del node.meta[_KEY]
        elif annotation is not None:
            specs = annotation.input_qspec_map
            for source in [one for one in specs if one in exact and not _of_weight(specs[one])]:
                del specs[source]


def _of_weight(spec: Any) -> bool:
    return getattr(spec, "qscheme", None) is torch.per_channel_symmetric


def _leave_unused(model: torch.fx.GraphModule) -> None:
    """No integers in layers that outputs do not depend on: exporters drop them."""
    used = reaching(model)
    for node in model.graph.nodes:
        if node not in used:
            node.meta.pop(_KEY, None)


def _leave_averages(model: torch.fx.GraphModule) -> None:
    """No integers in averages of windows that end outside of the input: ONNX Runtime's 8-bit kernel divides them by the
    whole window."""
    averages = [getattr(torch.ops.aten, name).default for name in ("avg_pool1d", "avg_pool2d", "avg_pool3d")]
    for node in model.graph.nodes:
        if node.target in averages:
            ceil_mode, count_include_pad = [*node.args, *(None, 0, False, True)[len(node.args) - 2 :]][4:6]
            if ceil_mode and count_include_pad:
                node.meta.pop(_KEY, None)
                source = node.args[0].meta.get(_KEY)
                if source is not None and len(node.args[0].users) == 1:  # what comes of integers is taken for integers
                    source.output_qspec = None
