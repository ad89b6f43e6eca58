"""8-bit weights and activations, trained or calibrated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import fake_quantizers, override, restore
from pl_sparse.network.channels import short
from pl_sparse.network.graph import traced
from pl_sparse.quantize.base import Quantization, quiet_torchao
from pl_sparse.quantize.biases import fit_biases
from pl_sparse.quantize.folding import fold_norms
from pl_sparse.quantize.matrices import floats
from pl_sparse.quantize.modes import Modes, trained_graph
from pl_sparse.quantize.x86 import x86_quantizer

__all__ = ["Int8", "post_training"]

_OTHERS = (torch.float16, torch.bfloat16, torch.float64)


class Int8(Quantization):
    """8-bit weights, symmetric in [-127, 127] with a scale for each output channel, and 8-bit activations, affine with
    one scale per tensor; a BatchNorm after a convolution is folded into it.

    q = clamp(round(w / s), -127, 127) with s = max |w| / 127 of the channel: w = 0 gives q = 0. The ranges of
    activations are moving averages over training batches. torchao's PT2E flow finds the layers. All is
    computed in float32, in mixed precision too.

    Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference,
    2017, arXiv:1712.05877, section 3. Here weights have one scale per channel.
    """

    dtype = "int8"

    def __init__(self) -> None:
        self._net: nn.Module | None = None
        self._graph: torch.fx.GraphModule | None = None
        self._modes: Modes | None = None
        self._learned: bool | None = None  # whether ranges were learned in the latest call
        self._frozen = False
        self._example: Tensor | None = None

    def prepare(self, net: nn.Module, example: Tensor) -> None:
        others = {name: weight.dtype for name, weight in net.named_parameters() if weight.dtype in _OTHERS}
        if others:
            name, dtype = next(iter(others.items()))
            raise ValueError(
                f"quantization=int8 simulates integers in float32, and {name} is {dtype}: train in precision=32-true "
                "or a mixed one, whose weights are float32"
            )
        with quiet_torchao(), torch.random.fork_rng(devices=[]):  # its patterns are traced with random inputs
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

            graph, left_out = trained_graph(net, example)
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
        if left_out is not None:
            warnings.warn(left_out, stacklevel=2)
        by_operation: dict[str, list[str]] = {}
        for name, operation in floats(graph, net).items():
            by_operation.setdefault(operation, []).append(name)
        if by_operation:
            listed = "; ".join(f"{', '.join(names)} (read by {operation})" for operation, names in by_operation.items())
            warnings.warn(
                f"in floating point stay {listed}: quantization=int8 finds linear layers, convolutions and products "
                "with a matrix",
                stacklevel=2,
            )
        self._net, self._graph, self._frozen = net, graph, False
        self._modes = Modes(graph, net)
        self._example = example[:2]
        override(net, "forward", self._forward)

    def _forward(self, *args: Any) -> Any:
        assert self._net is not None and self._graph is not None
        self._switch(self._net.training if self.learning is None else self.learning)
        try:
            # In half precision a product of an integer and a scale is another number than the one after conversion.
            with torch.autocast(args[0].device.type, enabled=False):
                return self._graph(*(_single(value) for value in args))
        except AssertionError as error:  # of observers, which say nothing of training
            if all(bool(weight.isfinite().all()) for weight in self._net.parameters()):
                raise
            raise RuntimeError(f"weights of {type(self._net).__name__} are not finite: training diverged") from error

    def _switch(self, learning: bool) -> None:
        """Let dropout and norms do what they do in their modules, and observers of ranges learn or not."""
        assert self._graph is not None and self._modes is not None
        self._modes.follow(self._frozen)
        learning = learning and not self._frozen
        if learning != self._learned:
            self._learned = learning
            for quantizer in fake_quantizers(
                self._graph
            ).values():  # the range of a weight is that of the weight as it is
                quantizer.enable_observer(quantizer.is_per_channel or learning)

    def freeze(self) -> None:
        self._frozen = True

    def release(self) -> None:
        if self._net is not None:
            restore(self._net, "forward")
        self._net = self._graph = self._modes = self._learned = self._example = None

    def convert(self) -> nn.Module:
        if self._graph is None:
            raise ValueError("nothing was prepared: call prepare(net, example) first")
        assert self._example is not None and self._modes is not None
        ends = [value for name, value in _ranges(self._graph).items() if name.endswith("max_val")]
        name = type(self._net).__name__
        if any(bool(value.isnan().any()) for value in [*ends, *self._graph.parameters()]):
            raise ValueError(f"{name} has no integers: its values are not finite, training diverged")
        if any(bool(value.isinf().any()) for value in ends):
            raise ValueError(
                f"no batch of training went through {name} while integers were simulated: the ranges of its "
                "activations are not known"
            )
        self._switch(False)
        self._modes.follow(self._frozen, evaluating=True)
        graph = copy.deepcopy(self._graph).cpu()
        with quiet_torchao(), torch.random.fork_rng(devices=[]):
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            with torch.no_grad():
                graph(self._example.cpu())  # ranges of the weights as they are now
            fold_norms(graph)
            fit_biases(graph)
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
        self._learned = None
        if set(_ranges(self._graph)) != set(tensors):
            raise ValueError("the ranges belong to another model or another version of torchao")
        for name, quantizer in fake_quantizers(self._graph).items():
            if quantizer.is_per_channel:  # of a weight: taken from the weight itself
                tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
        versioned = self._graph.state_dict()  # with the versions of its parts, without which torchao resets their eps
        for name in list(versioned):
            if name in tensors:
                versioned[name] = tensors[name]
            else:
                del versioned[name]
        self._graph.load_state_dict(versioned, strict=False)


def _single(value: Any) -> Any:
    """A tensor of a lower precision in float32, as autocast may have left it; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _OTHERS else value


def _ranges(graph: nn.Module) -> dict[str, Tensor]:
    """The state of what simulates integers in a graph."""
    names = set(fake_quantizers(graph))
    return {key: value for key, value in graph.state_dict().items() if key.partition(".")[0] in names}


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
        fit_biases(graph)
        return convert_pt2e(graph)
