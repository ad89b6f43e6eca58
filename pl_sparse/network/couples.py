"""How operations pass channels on: the table of rules, and what a rule sees of a call.

A tensor of a network has its channels along one dimension; a track says which slots are there. A rule says what an
operation makes of the tracks of its inputs: which channels it joins, which it hands over to a layer, and where they are
in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pl_sparse.network.layers import End, numbers
from pl_sparse.network.origins import Origins, varies
from pl_sparse.network.units import Units

__all__ = ["NONE", "RULES", "Call", "Rule", "Track", "couples"]

NONE = -1
"""In a track: what is not a channel of a layer, such as an input of the model."""


class Track(NamedTuple):
    """Where channels are in a tensor.

    Attributes:
        dim: the dimension that they are along.
        slots: for each index of it the number of the slot (`Units`), or `NONE`.
    """

    dim: int
    slots: tuple[int, ...]


Rule = Callable[["Call"], Any]
"""What an operation makes of the tracks of its inputs: the track of its output, a list of them for several outputs, or
None where no output has channels that could be removed."""

RULES: dict[Any, Rule] = {}
"""The rules by operation, such as `torch.ops.aten.cat.default`."""


def couples(*operations: Any) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations.

    >>> @couples(torch.ops.aten.lift.default)
    ... def lift(call):
    ...     return call.track(call["self"])
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


class Call:
    """One call of an operation, as a rule sees it: `call["dim"]` is an argument by its name in the operation's schema.

    Attributes:
        operation: what was called.
        output: what it returned.
        units: the slots, and which of them are joined.
        path: of the innermost module that it was called in.
        module: that module.
        heads: layers whose outputs are heads of attention, and are removed as such.
        norms: norms that take their statistics over the channels that are left.
    """

    def __init__(
        self,
        operation: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        output: Any,
        units: Units,
        tracks: Callable[[Tensor], Track | None],
        place: tuple[str, nn.Module],
        origins: Origins,
        heads: Collection[nn.Module] = (),
        norms: Collection[nn.Module] = (),
    ) -> None:
        self.operation = operation
        self.output = output
        self.units = units
        self.path, self.module = place
        self.heads = heads
        self.norms = norms
        self._args, self._kwargs = list(args), kwargs
        self._tracks = tracks
        self._origins = origins
        self._schema = operation._schema.arguments

    @property
    def name(self) -> str:
        """The operation in messages."""
        return str(self.operation)

    def __getitem__(self, name: str) -> Any:
        for place, argument in enumerate(self._schema):
            if argument.name == name:
                given = self._args[place] if place < len(self._args) else argument.default_value
                return self._kwargs.get(name, given)
        raise KeyError(f"{self.name} has no argument {name}")

    def counted(self, sizes: Collection[int]) -> bool:
        """Whether the module that the operation is called in has all of these numbers as attributes."""
        return {value for _, value in numbers(self.module)} >= set(sizes)

    def dim(self, of: Tensor, name: str = "dim") -> int:
        """An argument that is a dimension of a tensor, counted from the first."""
        return int(self[name]) % of.dim()

    def track(self, value: Any) -> Track | None:
        """The track of a tensor, or None."""
        return self._tracks(value) if isinstance(value, Tensor) else None

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        found: list[Tensor] = []
        for value in [*self._args, *self._kwargs.values()]:
            parts = value if isinstance(value, (list, tuple)) else [value]
            found += [part for part in parts if isinstance(part, Tensor)]
        return found

    def written(self) -> list[Tensor]:
        """The tensors among the arguments that the operation writes to."""
        writes = [each.name for each in self._schema if each.alias_info is not None and each.alias_info.is_write]
        return [value for name in writes if isinstance(value := self[name], Tensor)]

    def owner(self, tensor: Any) -> tuple[str, nn.Module] | None:
        """The path and the module that a parameter or buffer is of."""
        owner = self._origins.owner(tensor) if isinstance(tensor, Tensor) else None
        return None if owner is None else owner[:2]

    def is_constant(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter or buffer of the model, or made of some alone."""
        return isinstance(tensor, Tensor) and self._origins.known(tensor)

    def is_same(self, tensor: Tensor, dim: int) -> bool:
        """Whether a tensor is made of the model's own and of states that begin as one number, and is the same for all
        indices of a dimension."""
        return self._origins.same(tensor, dim)

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        return self.is_constant(tensor) and all(isinstance(t, nn.Parameter) for t in self._origins.roots(tensor))

    def claim(self, tensor: Tensor, dim: int, side: str) -> tuple[int, ...] | None:
        """The slots of a parameter or buffer along a dimension; None of what is none, or where they are not known.

        Args:
            tensor: it, or what is made of it by moving elements or one by one: `gamma.view(1, -1, 1, 1)`, `1 + gamma`.
            side: what it is to the channels, as in `End`.
        """
        found = self._origins.along(tensor, dim % tensor.dim()) if self.is_constant(tensor) else None
        if found is None:
            return None
        ends: dict[End, list[int]] = {}
        scaling = set()
        for root, axis, line in found:
            owner = self._origins.owner(root)
            assert owner is not None
            path, _, name = owner
            ends[End(path, side, name, axis)] = line
            if not isinstance(root, nn.Parameter) and End(path, "scale", name, axis) in self.units.ports:
                scaling.add(End(path, side, name, axis))
        if side == "shift" and len(scaling) < len(ends):  # of `bias - mean * scale` bias and mean alone are masked
            ends = {end: line for end, line in ends.items() if end not in scaling}
        slots = [self.units.port(end.path, end.side, line, end.tensor, end.dim) for end, line in ends.items()]
        self.join(*slots)
        return slots[0]

    def again(self, tensors: dict[int, Tensor], operation: Any = None) -> Any:
        """Call the operation with other tensors.

        Args:
            tensors: by the identity of those that they stand for.
            operation: what is called, if not the same.
        """

        def other(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [other(part) for part in value]
            return tensors.get(id(value), value) if isinstance(value, Tensor) else value

        kwargs = {key: other(value) for key, value in self._kwargs.items()}
        return (operation or self.operation)(*map(other, self._args), **kwargs)

    def join(self, *slots: Sequence[int]) -> None:
        """Join slots one by one; what is joined with no channel cannot be removed."""
        for together in zip(*slots, strict=True):
            channels = [slot for slot in together if slot != NONE]
            for slot in channels[1:]:
                self.units.join(channels[0], slot)
            if len(channels) < len(together):
                self.units.block(channels, f"its channels are joined with no channels by {self.name}")

    def pass_to(self, track: Track, path: str, side: str) -> None:
        """Join the channels of a track with those of a layer at the same places.

        Args:
            side: of the layer, "in" or "out".
        """
        known = [index for index, slot in enumerate(track.slots) if slot != NONE]
        self.join([track.slots[index] for index in known], self.units.port(path, side, known))

    def keep(self, track: Track | None, reason: str) -> None:
        """Note why the channels of a track cannot be removed."""
        if track is not None:
            self.units.block([slot for slot in track.slots if slot != NONE], reason)

    def stay(self, track: Track) -> bool:
        """Whether none of the channels of a track can be removed."""
        return all(self.units.blocked(slot) for slot in track.slots if slot != NONE)

    def need(self, track: Track | None, path: str, module: nn.Module | None = None) -> None:
        """Note that something needs all channels of a track."""
        kind = f" ({type(module).__name__})" if module is not None else ""
        self.keep(track, f"its channels go through {path or 'the model'}{kind}, which needs all of them")

    def need_here(self, track: Track | None) -> None:
        """Note that the module, if it is a single layer, or else the operation needs all channels of a track.

        A norm that takes its statistics over the channels that are left does not.
        """
        if track is not None and self.module in self.norms and NONE not in track.slots:
            self.units.norms[self.path] = track.slots
            return
        if next(self.module.children(), None) is None and self.path:
            self.need(track, self.path, self.module)
        else:
            self.need(track, self.name)

    def labels(self, tensor: Tensor, track: Track) -> Tensor:
        """The slot of each element of a tensor, in its shape."""
        slots = torch.tensor(track.slots)
        return slots.view(-1, *(1,) * (tensor.dim() - 1 - track.dim)).expand(tensor.shape)

    def read(self, labels: Tensor) -> Track | None:
        """The track of a tensor with these labels.

        Where channels lie along two dimensions, those that differ in the smaller one alone are joined, so that the
        larger one can become smaller.
        """
        dims = _varied(labels)
        if len(dims) > 1:
            labels = torch.tensor([*self.units.roots(), NONE])[labels]
            dims = _varied(labels) or dims[:1]
        if not dims:
            return None
        main = max(dims, key=lambda dim: labels.shape[dim])
        if len(dims) > 1:
            index = tuple(slice(None) if dim in dims else 0 for dim in range(labels.dim()))
            runs = labels[index].movedim(dims.index(main), -1).flatten(0, -2)  # (joined, channels)
            self.join(*runs.tolist())
        line = labels[tuple(slice(None) if dim == main else 0 for dim in range(labels.dim()))]
        return Track(main, tuple(line.tolist()))

    def moved(self, operation: Any = None) -> Any:
        """The tracks of the outputs of an operation that only moves elements: it is called with their slots."""
        tensors = {}
        for tensor in self.tensors():
            track = self.track(tensor)
            none = torch.tensor(NONE).expand(tensor.shape)
            tensors[id(tensor)] = none if track is None else self.labels(tensor, track)
        out = self.again(tensors, operation)
        return self.read(out) if isinstance(out, Tensor) else [self.read(part) for part in out]


def _varied(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    return [dim for dim in range(labels.dim()) if varies(labels, dim)]
