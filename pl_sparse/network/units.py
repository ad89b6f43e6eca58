"""Which channels are one unit: slots of layers, joined as rules say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from pl_sparse.core.upstream import CHANNEL_NORMS
from pl_sparse.network.attention import keeps_inputs_first

__all__ = [
    "CONVS",
    "TRANSPOSED",
    "WEIGHTED",
    "Coupling",
    "Port",
    "Slot",
    "Units",
    "is_depthwise",
    "is_weighted",
    "sides",
]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *CONVS, *TRANSPOSED)
"""Layers whose outputs are channels of their own: each is a row of the weight."""


class Slot(NamedTuple):
    """A channel of a layer.

    Attributes:
        path: the name of the layer.
        side: "out", or "in" of a layer whose inputs and outputs are different channels.
        place: its number.
    """

    path: str
    side: str
    place: int


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
        return [port for port in self.ports if port.side == "out" and is_weighted(modules.get(port.path))]

    def targets(self) -> list[Port]:
        """The layers that take the units in."""
        return [port for port in self.ports if port.side == "in"]


def is_weighted(module: nn.Module | None) -> bool:
    """Whether a layer's outputs are channels of its own: linear layers, GPT-2's too, and convolutions."""
    return isinstance(module, WEIGHTED) or (module is not None and keeps_inputs_first(module))


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output of a convolution has one input of its own."""
    return isinstance(module, CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def sides(module: nn.Module) -> tuple[str, ...]:
    """The sides of a layer that channels can be taken from: its outputs and inputs may be the same ones."""
    if isinstance(module, nn.PReLU):
        return ("out",) if module.num_parameters > 1 else ()
    if isinstance(module, CHANNEL_NORMS) or is_depthwise(module):
        return ("out",)
    if isinstance(module, TRANSPOSED):
        return ("out", "in") if module.groups == 1 else ()
    return ("out", "in") if is_weighted(module) else ()


class Units:
    """Slots that are one unit: union and find. A slot is known by its number."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.ports: dict[tuple[str, str], dict[int, int]] = {}
        self._above: list[int] = []
        self._reasons: dict[int, str] = {}

    def port(self, path: str, side: str, indices: Iterable[int]) -> tuple[int, ...]:
        """The slots of some channels of a layer; they are added where they are new."""
        numbers = self.ports.setdefault((path, side), {})
        for index in indices:
            if index not in numbers:
                numbers[index] = len(self.slots)
                self._above.append(len(self.slots))
                self.slots.append(Slot(path, side, index))
        return tuple(numbers[index] for index in indices)

    def find(self, slot: int) -> int:
        """The slot that stands for the unit of this one."""
        above = self._above
        while above[slot] != slot:
            above[slot] = above[above[slot]]
            slot = above[slot]
        return slot

    def roots(self) -> list[int]:
        """The slot that stands for the unit of each."""
        return [self.find(slot) for slot in range(len(self.slots))]

    def join(self, a: int, b: int) -> None:
        """Make the units of two slots one."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._above[b] = a
            if b in self._reasons:
                self._reasons.setdefault(a, self._reasons.pop(b))

    def block(self, slots: Iterable[int], reason: str) -> None:
        """Note why the units of some slots cannot be removed."""
        for slot in slots:
            self._reasons.setdefault(self.find(slot), reason)

    def couplings(self) -> list[Coupling]:
        """Units that have as many slots in the same ports, together."""
        members: dict[int, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
        for port, numbers in self.ports.items():
            for index in sorted(numbers):
                members[self.find(numbers[index])][port].append(index)
        alike: dict[tuple[tuple[str, str, int], ...], list[int]] = defaultdict(list)
        for root, ports in members.items():
            alike[tuple((*port, len(places)) for port, places in ports.items())].append(root)
        couplings = []
        for roots in alike.values():
            shared = tuple(
                Port(path, side, tuple(tuple(members[root][path, side]) for root in roots))
                for path, side in members[roots[0]]
            )
            reason = next((self._reasons[root] for root in roots if root in self._reasons), None)
            if reason is None and not any(port.side == "in" for port in shared):
                reason = "nothing is known to take its channels in"
            if reason is None and len(roots) == 1:
                reason = "all its channels depend on each other"
            couplings.append(Coupling(shared, reason))
        return couplings
