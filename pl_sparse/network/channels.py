"""Which channels belong together, read off the graph of a model.

A residual join adds channel i of one layer to channel i of another, a concatenation shifts it, a flattening spreads it
over several inputs of the next layer. What can be removed is a unit: all places, in all layers, that are one channel.
Torch-Pruning's dependency graph tells which places these are. Its tracing rests on rules: what is removed
passes a trial first (`surgery.trial`).

Source: Fang et al., DepGraph: towards any structural pruning, 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.parametrized import behind, is_computed
from pl_sparse.core.upstream import CHANNEL_NORMS, is_model_output
from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.hooks import called, hooked, trained, undisturbed

__all__ = ["CONVS", "TRANSPOSED", "WEIGHTED", "Coupling", "Port", "Slot", "is_depthwise", "traced_couplings"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *CONVS, *TRANSPOSED)
"""Layers whose outputs are channels of their own: each is a row of the weight."""

Slot = tuple[str, str, int]
"""A channel of a layer: path, side, index."""


@dataclass(frozen=True)
class Port:
    """Channels of a layer.

    Attributes:
        path: the name of the layer.
        side: "out", or "in" of a layer whose inputs and outputs are different channels.
        places: for each unit the indices of its channels.
    """

    path: str
    side: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coupling:
    """Units that go through the same layers.

    Attributes:
        ports: where the units are.
        reason: why none of them can be removed, or None.
    """

    ports: tuple[Port, ...]
    reason: str | None = None

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.ports[0].places)

    def sources(self, model: nn.Module) -> list[Port]:
        """The layers with weights that the units come out of."""
        modules = dict(model.named_modules())
        return [port for port in self.ports if port.side == "out" and isinstance(modules.get(port.path), WEIGHTED)]

    def targets(self) -> list[Port]:
        """The layers that take the units in."""
        return [port for port in self.ports if port.side == "in"]


def traced_couplings(model: nn.Module, example: Any) -> list[Coupling]:
    """The couplings that the graph of a model shows, each with why its units cannot be removed, if the graph says so.

    Args:
        example: inputs, as the model is called with.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model cannot be called with the example.
    """
    graph, ends = _dependency_graph(model, example)
    paths = {module: path for path, module in model.named_modules()}
    units = _Units()
    with undisturbed(model):  # Torch-Pruning reads weights, which for a spectral norm is a power iteration
        _join_channels(units, graph, model, paths)
    _block_ports(units, model, {module: path for module, path in paths.items() if path}, ends)
    return units.couplings()


def _dependency_graph(model: nn.Module, example: Any) -> tuple[Any, set[nn.Module]]:
    """Torch-Pruning's graph of a model, and the layers whose output is one of the model's."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("removing channels needs Torch-Pruning: pip install 'pl_sparse[shrink]'") from error
    made: list[tuple[Tensor, nn.Module]] = []
    ends: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            made.append((out, module))

    def forward(model: nn.Module, example: Any) -> list[Tensor]:
        with hooked([module for module in model.modules() if not list(module.children())], post=note):
            outputs = called(model, example)
        ends.update(module for tensor, module in made if any(tensor is out for out in outputs))
        return [out for out in outputs if out.grad_fn is not None]

    graph = torch_pruning.DependencyGraph()
    with undisturbed(model), trained(model.parameters()), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's remarks on what it guesses; the trial judges that
        try:
            graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced with the example of its inputs: {error}. Give the inputs it "
                "is called with as example_input_array"
            ) from error
    return graph, ends


def _join_channels(units: _Units, graph: Any, model: nn.Module, paths: Mapping[nn.Module, str]) -> None:
    """Join each output channel of a layer with all the places that it goes to, as the graph says."""
    heads = {layer for each in attentions(model) if isinstance(each, Attention) for layer, _, _ in each.weights[:-1]}
    for module in list(graph.module2node):
        if not isinstance(module, WEIGHTED) or module in heads:
            continue
        weight = behind(module, "weight")
        assert weight is not None
        count = weight.shape[1 if isinstance(module, TRANSPOSED) else 0]
        pruner = graph.get_pruner_of_module(module)
        for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(count))):
            port = _port(graph, item, paths)
            if port is None:
                continue
            roots = item.root_idxs if item.root_idxs is not None else [None] * len(item.idxs)
            for root, index in zip(roots, item.idxs, strict=True):
                if root is None:
                    units.block((*port, index), "its channels are repeated")
                else:
                    units.join((paths[module], "out", root), (*port, index))


def _port(graph: Any, item: Any, paths: Mapping[nn.Module, str]) -> tuple[str, str] | None:
    """The layer and side that an item of a pruning group of Torch-Pruning is about; None if it has no channels.

    The outputs of the model are a layer called "", a parameter is one that is named by its shape.
    """
    target = item.dep.target.module
    side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    if target in paths:
        return paths[target], "out" if _sides(target) == ("out",) else side
    if isinstance(target, nn.Parameter):
        return f"the parameter of shape {tuple(target.shape)}", side
    return ("", side) if is_model_output(target) else None


def _block_ports(units: _Units, model: nn.Module, paths: Mapping[nn.Module, str], ends: Collection[nn.Module]) -> None:
    """Block the units whose channels some layer does not let go.

    Args:
        paths: of the layers.
        ends: the layers whose output is one of the model's.
    """
    uses = {id(parameter): 0 for parameter in model.parameters()}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] += 1
    layers = {path: module for module, path in paths.items()}
    for path, side in list(units.ports):
        layer = layers.get(path)
        _join_groups(units, path, side, layer)
        if path == "" or (layer in ends and side == "out"):
            units.block_port((path, side), "its channels are outputs of the model")
        elif layer is None or not _sides(layer):
            place = path if layer is None else f"{path} ({type(layer).__name__})"
            units.block_port((path, side), f"its channels go through {place}, which needs all of them")
        elif is_computed(layer):
            units.block_port((path, side), f"the weight of {path} is computed from other tensors")
        elif any(uses[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            units.block_port((path, side), f"the weights of {path} are used twice")


def _sides(module: nn.Module) -> tuple[str, ...]:
    """The sides of a layer that channels can be taken from: its outputs and inputs may be the same ones."""
    if isinstance(module, (*CHANNEL_NORMS, nn.PReLU)) or is_depthwise(module):
        return ("out",)
    if isinstance(module, TRANSPOSED):
        return ("out", "in") if module.groups == 1 else ()
    return ("out", "in") if isinstance(module, WEIGHTED) else ()


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output of a convolution has one input of its own."""
    return isinstance(module, CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def _join_groups(units: _Units, path: str, side: str, module: nn.Module | None) -> None:
    """The groups of a grouped convolution stay equally wide: channel j of each group is one unit."""
    if isinstance(module, (*CONVS, *TRANSPOSED)) and module.groups > 1 and not is_depthwise(module):
        width = (module.out_channels if side == "out" else module.in_channels) // module.groups
        for index in list(units.ports[path, side]):
            units.join((path, side, index % width), (path, side, index))


class _Units:
    """Slots (layer, side, index) that are one unit: union and find."""

    def __init__(self) -> None:
        self.above: dict[Slot, Slot] = {}
        self.reasons: dict[Slot, str] = {}
        self.ports: dict[tuple[str, str], dict[int, None]] = {}

    def find(self, slot: Slot) -> Slot:
        """The slot that stands for the unit of this one, which is added if it is new."""
        if slot not in self.above:
            self.above[slot] = slot
            self.ports.setdefault(slot[:2], {})[slot[2]] = None
        while self.above[slot] != slot:
            self.above[slot] = self.above[self.above[slot]]
            slot = self.above[slot]
        return slot

    def join(self, a: Slot, b: Slot) -> None:
        """Make the units of two slots one."""
        a, b = self.find(a), self.find(b)
        self.above[b] = a
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons[b])

    def block(self, slot: Slot, reason: str) -> None:
        """Note why the unit of a slot cannot be removed."""
        self.reasons.setdefault(self.find(slot), reason)

    def block_port(self, port: tuple[str, str], reason: str) -> None:
        """Note why no unit of a port can be removed."""
        for index in self.ports[port]:
            self.block((*port, index), reason)

    def couplings(self) -> list[Coupling]:
        """Units that have as many slots in the same ports, together."""
        members: dict[Slot, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
        for path, side in self.ports:
            for index in sorted(self.ports[path, side]):
                members[self.find((path, side, index))][path, side].append(index)
        alike: dict[tuple[Any, ...], list[Slot]] = defaultdict(list)
        for root, ports in members.items():
            alike[tuple((*port, len(places)) for port, places in ports.items())].append(root)
        couplings = []
        for roots in alike.values():
            shared = tuple(
                Port(path, side, tuple(tuple(members[root][path, side]) for root in roots))
                for path, side in members[roots[0]]
            )
            reason = next((self.reasons[root] for root in roots if root in self.reasons), None)
            if reason is None and not any(port.side == "in" for port in shared):
                reason = "nothing is known to take its channels in"
            if reason is None and len(roots) == 1:
                reason = "all its channels depend on each other"
            couplings.append(Coupling(shared, reason))
        return couplings
