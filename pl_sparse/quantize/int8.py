"""8-bit weights and activations, trained or calibrated."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import fake_quantizers, override, restore
from pl_sparse.network.channels import short
from pl_sparse.network.graph import traced
from pl_sparse.quantize.base import Quantization, quiet_torchao
from pl_sparse.quantize.x86 import x86_quantizer

__all__ = ["Int8", "post_training"]

_PRODUCT = re.compile(r"aten\.(_?conv\w*|linear|\w*matmul|\w*mm|einsum|bilinear|lstm|gru|rnn_\w+)\.")
"""Operations that multiply matrices."""


class Int8(Quantization):
    """8-bit weights, symmetric in [-127, 127] with a scale for each output channel, and 8-bit activations, affine with
    one scale per tensor; a BatchNorm after a convolution is folded into it.

    q = clamp(round(w / s), -127, 127) with s = max |w| / 127 of the channel: w = 0 gives q = 0. The ranges of
    activations are moving averages over training batches. torchao's PT2E flow finds the layers.

    Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference,
    2017, arXiv:1712.05877, section 3. Here weights have one scale per channel.
    """

    dtype = "int8"

    def __init__(self) -> None:
        self._net: nn.Module | None = None
        self._graph: torch.fx.GraphModule | None = None
        self._mode: tuple[bool, bool] | None = None
        self._frozen = False
        self._example: Tensor | None = None

    def prepare(self, net: nn.Module, example: Tensor) -> None:
        with quiet_torchao(), torch.random.fork_rng(devices=[]):  # its patterns are traced with random inputs
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

            training = net.training
            try:
                graph = traced(net.train(), example).module()
            finally:
                net.train(training)
            shared = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and len(node.users) > 1]
            try:
                graph = prepare_qat_pt2e(graph, x86_quantizer(training=True))
            except Exception as error:
                twice = f"{', '.join(shared)}: used by several calls, each of which needs a layer of its own"
                raise ValueError(
                    f"torchao cannot quantize {type(net).__name__} ({short(error)}). "
                    + (twice if shared else "Leave quantization out, or replace what it names")
                ) from error
        if not fake_quantizers(graph):
            raise ValueError(
                f"{type(net).__name__} has no layer that is quantized: quantization=int8 finds Linear, Conv"
            )
        floats = _in_floating_point(graph, net)
        if floats:
            warnings.warn(
                f"{', '.join(floats)} stay in floating point: quantization=int8 finds linear layers and convolutions",
                stacklevel=2,
            )
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten.add_.Tensor and "num_batches_tracked" in str(node.args[0]):
                graph.graph.erase_node(node)  # it counts validation batches too, and nothing reads it
        _guard(graph)
        self._net, self._graph, self._mode, self._frozen = net, graph, None, False
        self._example = example[:2]
        override(net, "forward", self._forward)

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
        for quantizer in fake_quantizers(graph).values():  # the range of a weight is always that of the weight as it is
            quantizer.enable_observer(quantizer.is_per_channel or (training and not self._frozen))

    def freeze(self) -> None:
        self._frozen = True

    def release(self) -> None:
        if self._net is not None:
            restore(self._net, "forward")
        self._net = self._graph = self._mode = self._example = None

    def convert(self) -> nn.Module:
        if self._graph is None:
            raise ValueError("nothing was prepared: call prepare(net, example) first")
        assert self._example is not None
        self._switch(False)
        graph = copy.deepcopy(self._graph).cpu()
        with quiet_torchao(), torch.random.fork_rng(devices=[]):
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            with torch.no_grad():
                graph(self._example.cpu())  # ranges of the weights as they are now
            _unguard(graph)
            return convert_pt2e(graph)

    def state_dict(self) -> dict[str, Tensor]:
        if self._graph is None:
            return {}
        ranges = {name: value.detach().clone() for name, value in _ranges(self._graph).items()}
        return {**ranges, "frozen": torch.tensor(self._frozen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert self._graph is not None
        tensors = dict(state)
        self._frozen = bool(tensors.pop("frozen"))
        self._mode = None
        if set(_ranges(self._graph)) != set(tensors):
            raise ValueError("the ranges belong to another model or another version of torchao")
        for name, quantizer in fake_quantizers(self._graph).items():
            if quantizer.is_per_channel:  # of a weight: taken from the weight itself
                tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
        self._graph.load_state_dict(tensors, strict=False)


def _ranges(graph: nn.Module) -> dict[str, Tensor]:
    """The state of what simulates integers in a graph."""
    names = set(fake_quantizers(graph))
    return {key: value for key, value in graph.state_dict().items() if key.partition(".")[0] in names}


def _in_floating_point(graph: torch.fx.GraphModule, net: nn.Module) -> list[str]:
    """The matrices and kernels of a network that no integers are simulated of, whatever multiplies with them."""
    above: dict[torch.fx.Node, dict[str, bool]] = {}  # of what is made of parameters: which, and whether in integers
    found: dict[str, bool] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            above[node] = {str(node.target): False}
        elif _PRODUCT.search(str(node.target)):
            for source in node.all_input_nodes:
                for name, rounded in above.get(source, {}).items():
                    found[name] = rounded and found.get(name, True)
        elif node.op.startswith("call") and node.all_input_nodes and all(n in above for n in node.all_input_nodes):
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            rounds = getattr(module, "is_per_channel", False)
            sources = [item for source in node.all_input_nodes for item in above[source].items()]
            above[node] = {name: rounded or rounds for name, rounded in sources}
    return [name for name, weight in net.named_parameters() if weight.dim() > 1 and found.get(name) is False]


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


def post_training(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The network in 8 bits like that of `Int8`, but quantized after training: the baseline.

    Args:
        net: the trained network, which does not change.
        batches: inputs, from which the ranges of activations are taken.
    """
    batches = list(batches)
    with quiet_torchao(), torch.random.fork_rng(devices=[]), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        graph = traced(copy.deepcopy(net).eval().cpu(), batches[0]).module()
        graph = prepare_pt2e(graph, x86_quantizer(training=False))
        for batch in batches:
            graph(batch)
        return convert_pt2e(graph)
