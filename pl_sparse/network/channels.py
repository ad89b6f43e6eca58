"""Which channels belong together.

A residual join adds channel i of one layer to channel i of another, a concatenation shifts it, a flattening spreads it
over several inputs of the next layer. What can be removed is a unit: all places, in all layers, that are one channel.
Torch-Pruning's dependency graph tells which places these are. Its tracing rests on rules, so nothing is believed that a
trial (`surgery.trial`) does not show.

Source: Fang et al., DepGraph: towards any structural pruning, 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.probe import undisturbed

__all__ = ["Coupling", "Port", "Slot", "called"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_WEIGHTED = (nn.Linear, *_CONVS, *_TRANSPOSED)


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
        return [port for port in self.ports if port.side == "out" and isinstance(modules.get(port.path), _WEIGHTED)]

    def targets(self) -> list[Port]:
        """The layers that take the units in."""
        return [port for port in self.ports if port.side == "in"]


# Tracing


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs of a model for an example of its inputs: a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(example, Mapping):
        out = model(**example)
    elif isinstance(example, (tuple, list)):
        out = model(*example)
    else:
        out = model(example)
    return list(_tensors(out))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _traced(model: nn.Module, example: Any) -> list[Coupling]:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("removing channels needs Torch-Pruning: pip install 'pl_sparse[shrink]'") from error
    paths = {module: path for path, module in model.named_modules()}
    units = _Units()
    ends: list[Any] = []
    made: list[tuple[Tensor, nn.Module]] = []

    def forward(model: nn.Module, example: Any) -> list[Tensor]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                made.append((out, module))

        handles = [module.register_forward_hook(note) for module in paths if not list(module.children())]
        try:
            outputs = called(model, example)
        finally:
            for handle in handles:
                handle.remove()
        ends.extend(module for tensor, module in made if any(tensor is out for out in outputs))
        return [out for out in outputs if out.grad_fn is not None]

    graph = torch_pruning.DependencyGraph()
    with undisturbed(model), _differentiable(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's remarks on what it guesses; the trial judges that
        try:
            graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced with the example of its inputs: {error}. Give the inputs it "
                "is called with as example_input_array"
            ) from error
    heads = {layer for each in attentions(model) if isinstance(each, Attention) for layer, _, _ in each.weights[:-1]}
    seen: set[tuple[str, str]] = set()
    for module in list(graph.module2node):
        if not isinstance(module, _WEIGHTED) or (paths[module], "out") in seen or module in heads:
            continue
        count = module.weight.shape[1 if isinstance(module, _TRANSPOSED) else 0]
        pruner = graph.get_pruner_of_module(module)
        for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(count))):
            target = item.dep.target.module
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            if target in paths and _sides(target) == ("out",):
                side = "out"
            if target in paths:
                key = (paths[target], side)
            elif isinstance(target, nn.Parameter):
                key = (f"the parameter of shape {tuple(target.shape)}", side)
            elif isinstance(target, torch_pruning.ops._OutputOp):
                key = ("", side)
            else:
                continue
            roots = item.root_idxs if item.root_idxs is not None else [None] * len(item.idxs)
            for root, index in zip(roots, item.idxs, strict=True):
                if root is None:
                    units.block((*key, index), "its channels are repeated")
                else:
                    units.join((paths[module], "out", root), (*key, index))
            if side == "out" and len(item.idxs) == count and target is module:
                seen.add(key)
    names = {id(parameter): 0 for parameter in model.parameters()}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] += 1
    layers = {path: module for module, path in paths.items() if path}
    for path, side in list(units.ports):
        layer = layers.get(path)
        _joined_groups(units, path, side, layer)
        if path == "" or (layer is not None and any(layer is end for end in ends) and side == "out"):
            units.block_port((path, side), "its channels are outputs of the model")
        elif layer is None or not _sides(layer):
            what = path if layer is None else f"{path} ({type(layer).__name__})"
            units.block_port((path, side), f"its channels go through {what}, which needs all of them")
        elif any(names[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            units.block_port((path, side), f"the weights of {path} are used twice")
    return units.couplings()


def _sides(module: nn.Module) -> tuple[str, ...]:
    """The sides of a layer that channels can be taken from: its outputs and inputs may be the same ones."""
    if isinstance(module, (*_NORMS, nn.PReLU)) or _depthwise(module):
        return ("out",)
    if isinstance(module, _TRANSPOSED):
        return ("out", "in") if module.groups == 1 else ()
    return ("out", "in") if isinstance(module, _WEIGHTED) else ()


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def _joined_groups(units: _Units, path: str, side: str, module: nn.Module | None) -> None:
    """The groups of a grouped convolution stay equally wide: channel j of each group is one unit."""
    if isinstance(module, (*_CONVS, *_TRANSPOSED)) and module.groups > 1 and not _depthwise(module):
        width = (module.out_channels if side == "out" else module.in_channels) // module.groups
        for index in list(units.ports[path, side]):
            units.join((path, side, index % width), (path, side, index))


Slot = tuple[str, str, int]


class _Units:
    """Slots (layer, side, index) that are one unit: union and find."""

    def __init__(self) -> None:
        self.above: dict[Slot, Slot] = {}
        self.reasons: dict[Slot, str] = {}
        self.ports: dict[tuple[str, str], dict[int, None]] = {}

    def find(self, slot: Slot) -> Slot:
        if slot not in self.above:
            self.above[slot] = slot
            self.ports.setdefault(slot[:2], {})[slot[2]] = None
        while self.above[slot] != slot:
            self.above[slot] = self.above[self.above[slot]]
            slot = self.above[slot]
        return slot

    def join(self, a: Slot, b: Slot) -> None:
        a, b = self.find(a), self.find(b)
        self.above[b] = a
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons[b])

    def block(self, slot: Slot, reason: str) -> None:
        self.reasons.setdefault(self.find(slot), reason)

    def block_port(self, port: tuple[str, str], reason: str) -> None:
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
        found = []
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
            found.append(Coupling(shared, reason))
        return found


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
