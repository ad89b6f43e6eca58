"""Which channels are one unit: slots of layers, joined as rules say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pl_sparse.network.layers import End, is_source

__all__ = ["Coupling", "Port", "Units"]


@dataclass(frozen=True)
class Port:
    """Channels of a layer.

    Attributes:
        path: the name of the layer.
        side: as in `End`.
        places: for each unit the indices of its channels.
        tensor: as in `End`.
        dim: as in `End`.
    """

    path: str
    side: str
    places: tuple[tuple[int, ...], ...]
    tensor: str = ""
    dim: int = 0

    @property
    def end(self) -> End:
        """The end of the layer that they are at."""
        return End(self.path, self.side, self.tensor, self.dim)


@dataclass(frozen=True)
class Coupling:
    """Units that go through the same layers.

    Attributes:
        ports: where the units are.
        reason: why none of them can be removed, or None.
        counts: attributes of modules that say how many channels there are: the module's path, the attribute, and how
            many of them are a unit.
    """

    ports: tuple[Port, ...]
    reason: str | None = None
    counts: tuple[tuple[str, str, int], ...] = ()

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.ports[0].places)

    def sources(self, model: nn.Module) -> list[Port]:
        """The layers with weights that the units come out of."""
        modules = dict(model.named_modules())
        return [port for port in self.ports if is_source(modules.get(port.path), port.side, port.tensor)]

    def targets(self) -> list[Port]:
        """The layers that take the units in."""
        return [port for port in self.ports if port.side == "in"]


class Units:
    """Slots that are one unit: union and find. A slot is known by its number.

    Attributes:
        ports: by the end of a layer, the slot of each channel there.
        norms: by the name of a norm, the slots that it takes its statistics over.
    """

    def __init__(self) -> None:
        self.ports: dict[End, dict[int, int]] = {}
        self._above: list[int] = []
        self._reasons: dict[int, str] = {}
        self._read: set[int] = set()  # slots that a product takes in
        self.norms: dict[str, tuple[int, ...]] = {}

    def port(self, path: str, side: str, indices: Iterable[int], tensor: str = "", dim: int = 0) -> tuple[int, ...]:
        """The slots of some channels of a layer; they are added where they are new."""
        numbers = self.ports.setdefault(End(path, side, tensor, dim), {})
        for index in indices:
            if index not in numbers:
                numbers[index] = len(self._above)
                self._above.append(len(self._above))
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
        return [self.find(slot) for slot in range(len(self._above))]

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

    def blocked(self, slot: int) -> bool:
        """Whether there is a reason why the unit of a slot cannot be removed."""
        return self.find(slot) in self._reasons

    def read(self, slots: Iterable[int]) -> None:
        """Note that a product of two tensors takes some slots in, and no layer need."""
        self._read.update(slots)

    def couplings(self) -> list[Coupling]:
        """Units that have as many slots in the same ports, together."""
        members: dict[int, dict[End, list[int]]] = defaultdict(lambda: defaultdict(list))
        for port, numbers in self.ports.items():
            for index in sorted(numbers):
                members[self.find(numbers[index])][port].append(index)
        alike: dict[tuple[tuple[End, int], ...], list[int]] = defaultdict(list)
        read = {self.find(slot) for slot in self._read}
        for root, ports in members.items():
            alike[tuple((port, len(places)) for port, places in ports.items())].append(root)
        couplings = []
        for roots in alike.values():
            shared = tuple(
                Port(end.path, end.side, tuple(tuple(members[root][end]) for root in roots), end.tensor, end.dim)
                for end in members[roots[0]]
            )
            reason = next((self._reasons[root] for root in roots if root in self._reasons), None)
            if reason is None and not read.issuperset(roots) and not any(port.side == "in" for port in shared):
                reason = "nothing is known to take its channels in"
            if reason is None and len(roots) == 1:
                reason = "all its channels depend on each other"
            couplings.append(Coupling(shared, reason))
        return couplings
