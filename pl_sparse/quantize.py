"""Integers in place of floating point, learned with (quantization-aware training) or found after training.

The mask comes before the quantizer, whose grid has zero in it: what is pruned is the integer 0. The network keeps its
parameters and their names; while it simulates integers, its `forward` is that of a graph of the same parameters.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.trace import traced

__all__ = ["Int4Weight", "Int8", "Quantization", "integers", "post_training"]

_OBSERVERS = "activation_post_process"
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class Quantization(ABC):
    """How integers are simulated in training, and made afterwards.

    Attributes:
        dtype: the type of the weights that come out.
    """

    dtype: ClassVar[str]

    @abstractmethod
    def prepare(self, net: nn.Module, example: Tensor) -> None:
        """From here on calls of `net` compute with weights (and activations) rounded to integers.

        Gradients pass the rounding as if it were not there. The parameters of `net` are the same objects as before.

        Args:
            example: inputs of some samples, for tracing.

        Raises:
            ValueError: the network cannot be quantized so.
            ImportError: torchao is missing.
        """

    @abstractmethod
    def release(self) -> None:
        """Calls of the network are in floating point again."""

    @abstractmethod
    def convert(self) -> nn.Module:
        """A copy of the network whose weights are integers."""

    # What follows has a meaning where ranges are learned.

    def freeze(self) -> None:  # noqa: B027
        """Ranges and BatchNorm's statistics stay what they are from here on."""

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned of the ranges."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take up what `state_dict` gave, after `prepare`."""


class Int8(Quantization):
    """8-bit weights, symmetric in [-127, 127] with a scale for each output channel, and 8-bit activations, affine with
    one scale a tensor; a BatchNorm after a convolution is folded into it.

    q = clamp(round(w / s), -127, 127) with s = max |w| / 127 of the channel: w = 0 gives q = 0. The ranges of
    activations are moving averages over training batches. torchao's PT2E flow finds the layers.

    Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference,
    2017, arXiv:1712.05877, section 3. It differs in the scales of weights, which are a channel's here.
    """

    dtype = "int8"

    def __init__(self) -> None:
        self._net: nn.Module | None = None
        self._graph: torch.fx.GraphModule | None = None
        self._mode: tuple[bool, bool] | None = None
        self._frozen = False
        self._example: Tensor | None = None

    def prepare(self, net: nn.Module, example: Tensor) -> None:
        with _torchao(), torch.random.fork_rng(devices=[]):  # its patterns are traced with random inputs
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

            training = net.training
            try:
                graph = traced(net.train(), example).module()
            finally:
                net.train(training)
            graph = prepare_qat_pt2e(graph, _quantizer(training=True))
        if not any(name.startswith(_OBSERVERS) for name, _ in graph.named_children()):
            raise ValueError(
                f"{type(net).__name__} has no layer that is quantized: quantization=int8 finds Linear, Conv"
            )
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten.add_.Tensor and "num_batches_tracked" in str(node.args[0]):
                graph.graph.erase_node(node)  # it counts validation batches too, and nothing reads it
        _guard(graph)
        self._net, self._graph, self._mode, self._frozen = net, graph, None, False
        self._example = example[:2]
        vars(net)["forward"] = self._forward

    def _forward(self, *args: Any) -> Any:
        assert self._net is not None and self._graph is not None
        self._switch(self._net.training)
        return self._graph(*args)

    def _switch(self, training: bool) -> None:
        """Let dropout, BatchNorm and the observers of ranges do what they do in training, or in evaluation."""
        graph, mode = self._graph, (training, self._frozen)
        assert graph is not None
        if mode == self._mode:
            return
        self._mode = mode
        ops = torch.ops.aten
        for node in graph.graph.nodes:
            if node.target is ops.batch_norm.default:
                node.args = (*node.args[:5], training and not self._frozen, *node.args[6:])
            elif node.target in (ops.dropout.default, ops.dropout_.default):
                node.args = (*node.args[:2], training)
        graph.recompile()
        for name, module in graph.named_children():
            if name.startswith(_OBSERVERS):  # the range of a weight is always that of the weight as it is
                module.enable_observer(module.is_per_channel or (training and not self._frozen))  # type: ignore[operator]

    def freeze(self) -> None:
        self._frozen = True

    def release(self) -> None:
        if self._net is not None:
            vars(self._net).pop("forward", None)
        self._net = self._graph = self._mode = self._example = None

    def convert(self) -> nn.Module:
        if self._graph is None:
            raise ValueError("nothing was prepared: call prepare(net, example) first")
        assert self._example is not None
        self._switch(False)
        graph = copy.deepcopy(self._graph).cpu()
        with _torchao(), torch.random.fork_rng(devices=[]):
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            with torch.no_grad():
                graph(self._example.cpu())  # ranges of the weights as they are now
            _unguard(graph)
            return convert_pt2e(graph)

    def state_dict(self) -> dict[str, Tensor]:
        if self._graph is None:
            return {}
        state = self._graph.state_dict()
        found = {name: value.detach().clone() for name, value in state.items() if name.startswith(_OBSERVERS)}
        return {**found, "frozen": torch.tensor(self._frozen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert self._graph is not None
        tensors = dict(state)
        self._frozen = bool(tensors.pop("frozen"))
        self._mode = None
        known = {name for name in self._graph.state_dict() if name.startswith(_OBSERVERS)}
        if known != set(tensors):
            raise ValueError("the ranges are of another model, or of another version of torchao")
        for name, module in self._graph.named_children():
            if name.startswith(_OBSERVERS) and module.is_per_channel:  # of a weight: taken from the weight itself
                for key in [key for key in tensors if key.startswith(f"{name}.")]:
                    del tensors[key]
        self._graph.load_state_dict(tensors, strict=False)


def _guard(graph: torch.fx.GraphModule) -> None:
    """Divide by 1 in place of a scale of 0.

    In training, a folded convolution is divided by its BatchNorm's scale, and that of a masked channel is zero.
    """
    ops = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is ops.div.Tensor and _is_convolution(node.args[0]):
            with graph.graph.inserting_before(node):
                zero = graph.graph.call_function(ops.eq.Scalar, (node.args[1], 0))
                safe = graph.graph.call_function(ops.masked_fill.Scalar, (node.args[1], zero, 1.0))
            node.args = (node.args[0], safe)
    graph.recompile()


def _unguard(graph: torch.fx.GraphModule) -> None:
    """Undo `_guard`: torchao recognizes its own pattern only."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.masked_fill.Scalar and all(_is_folded(user) for user in node.users):
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_convolution(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and "aten.conv" in str(node.target)


def _is_folded(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.aten.div.Tensor and _is_convolution(node.args[0])


class Int4Weight(Quantization):
    """4-bit weights of linear layers, symmetric in [-8, 7] with a scale for each group of inputs.

    Activations, other layers, and layers whose inputs are no multiple of `group` stay in floating point.

    Args:
        group: neighbouring inputs that share a scale.
    """

    dtype = "int4"

    def __init__(self, group: int = 32) -> None:
        if group < 2:
            raise ValueError(f"group={group!r} must be 2 or more")
        self.group = group
        self._net: nn.Module | None = None

    def _fits(self, module: nn.Module, name: str = "") -> bool:
        return isinstance(module, nn.Linear) and module.in_features % self.group == 0 and _called(module)

    def prepare(self, net: nn.Module, example: Tensor) -> None:
        with _torchao():
            from torchao.quantization import quantize_
            from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

            layers = {name: m.in_features for name, m in net.named_modules() if type(m) is nn.Linear}
            if not any(self._fits(module) for module in net.modules()):
                raise ValueError(
                    f"no linear layer has a multiple of group={self.group} inputs; there are "
                    + (", ".join(f"{name} with {size}" for name, size in list(layers.items())[:8]) or "none")
                )
            weights = IntxFakeQuantizeConfig(_INT4, group_size=self.group, is_symmetric=True)
            quantize_(net, QATConfig(weight_config=weights, step="prepare"), self._fits)
        for module in net.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its fused path reads the weights of its layers
        self._net = net

    def release(self) -> None:
        if self._net is not None:
            _plain(self._net)
        self._net = None

    def convert(self) -> nn.Module:
        if self._net is None:
            raise ValueError("nothing was prepared: call prepare(net, example) first")
        net = copy.deepcopy(self._net).eval().cpu()
        with _torchao():
            _plain(net)
            return _int4(net, self.group, self._fits)


def _called(module: nn.Module) -> bool:
    """Whether a linear layer is called, and not read by an attention layer around it."""
    return type(module).__name__ != "NonDynamicallyQuantizableLinear"


def _plain(net: nn.Module) -> None:
    """Linear layers in place of those that simulate integers."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    with _torchao():
        quantize_(net, QATConfig(step="convert"))


def _int4(net: nn.Module, group: int, fits: Any) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(net, IntxWeightOnlyConfig(_INT4, PerGroup(group)), fits)
    return net


def post_training(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The network in 8 bits as `Int8` makes it, but quantized after training: the baseline.

    Args:
        batches: inputs, of which the ranges of activations are taken.
    """
    batches = list(batches)
    with _torchao(), torch.random.fork_rng(devices=[]), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        graph = traced(copy.deepcopy(net).eval().cpu(), batches[0]).module()
        graph = prepare_pt2e(graph, _quantizer(training=False))
        for batch in batches:
            graph(batch)
        return convert_pt2e(graph)


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


def _quantizer(training: bool) -> Any:
    from torchao.quantization.pt2e.fake_quantize import FusedMovingAvgObsFakeQuantize
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
    fused = FusedMovingAvgObsFakeQuantize
    activation: Any = fused.with_args(observer=MovingAverageMinMaxObserver, **tiny)
    # A constant of 1 makes the average the last value: the range of a weight is that of the weight as it is now.
    weight: Any = fused.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, **tiny)
    if not training:
        activation, weight = HistogramObserver.with_args(**tiny), PerChannelMinMaxObserver.with_args(**tiny)
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
        """With integers on both sides of a sum, too, and none between a layer or a sum and its ReLU."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            model = super().annotate(model)
            _annotate_sums(model, activations)
            return model

    return WithSums().set_global(QuantizationConfig(activations, activations, weights, None, training))


def _annotate_sums(model: torch.fx.GraphModule, spec: Any) -> None:
    """Runtimes have kernels for layers, and sums, of integers with a ReLU within."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    ops, key = torch.ops.aten, "quantization_annotation"
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
                node.meta[key] = QuantizationAnnotation(output_qspec=spec, _annotated=True)


@contextlib.contextmanager
def _torchao() -> Iterator[None]:
    """What torchao and torch say of themselves is left out; a missing torchao names its extra."""
    names = ("torchao", "torch.utils._pytree")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import torchao  # noqa: F401
            except ImportError as error:
                raise ImportError("quantization needs torchao: pip install 'pl_sparse[quantize]'") from error
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
