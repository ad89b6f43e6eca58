"""Which tensors of a layer its channels are in, and along which dimension."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from pl_sparse.core.upstream import CHANNEL_NORMS
from pl_sparse.network.attention import keeps_inputs_first

__all__ = [
    "BARE",
    "CONVS",
    "RECURRENT",
    "TABLES",
    "TRANSPOSED",
    "WEIGHTED",
    "End",
    "Held",
    "held",
    "is_depthwise",
    "is_source",
    "is_weighted",
    "numbers",
    "own_tensors",
    "sides",
]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *CONVS, *TRANSPOSED)
"""Layers whose outputs are channels of their own: each is a row of the weight."""

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
TABLES = (nn.Embedding, nn.EmbeddingBag)
BARE = (*CHANNEL_NORMS, nn.GroupNorm)
"""Norms that may have no tensors, but a number of channels all the same."""


class End(NamedTuple):
    """One end of a layer: what its channels are to it.

    Attributes:
        path: the name of the layer.
        side: "out" where channels come out of it, and what changes each on its own (norms); "in" where it takes them
            in; "scale" where they are multiplied by a tensor of it, "norm" where that is the scale of a norm that looks
            at all of them, "shift" where one is added.
        tensor: the parameter or buffer that the channels are indices of, or a part of a recurrent layer; "" for a layer
            of a kind that is known.
        dim: the dimension of that tensor.
    """

    path: str
    side: str
    tensor: str = ""
    dim: int = 0


class Held(NamedTuple):
    """Where channels are in a tensor of a layer.

    Attributes:
        name: the tensor.
        dim: the dimension that they are along.
        period: how many indices the groups of a convolution share; 0 where they share none.
        runs: how many indices a channel has, `size` apart: one in each gate of a recurrent layer.
        size: of a run.
    """

    name: str
    dim: int
    period: int = 0
    runs: int = 1
    size: int = 0

    def indices(self, places: Iterable[int]) -> list[int]:
        """The indices of some channels.

        >>> Held("weight_hh_l0", 0, runs=4, size=10).indices([3])
        [3, 13, 23, 33]
        """
        if self.period:
            return [place % self.period for place in places]
        return [place + run * self.size for place in places for run in range(self.runs)]


def is_weighted(module: nn.Module | None) -> bool:
    """Whether a layer's outputs are channels of its own: linear layers, GPT-2's too, and convolutions."""
    return isinstance(module, WEIGHTED) or (module is not None and keeps_inputs_first(module))


def is_depthwise(module: nn.Module) -> bool:
    """Whether each input of a convolution has outputs of its own: one, or several of a plain convolution."""
    if not isinstance(module, (*CONVS, *TRANSPOSED)) or not 1 < module.groups == module.in_channels:
        return False
    return isinstance(module, CONVS) or module.in_channels == module.out_channels


def is_source(module: nn.Module | None, side: str, tensor: str = "") -> bool:
    """Whether channels come out of the weights of a layer, at an end of it."""
    return side == "out" and (bool(tensor) or is_weighted(module) or isinstance(module, (*RECURRENT, *TABLES)))


def sides(module: nn.Module) -> tuple[str, ...]:
    """The sides of a layer that channels can be taken from: its outputs and inputs may be the same ones."""
    if isinstance(module, nn.PReLU):
        return ("out",) if module.num_parameters > 1 else ()
    if isinstance(module, (*BARE, *TABLES)) or is_depthwise(module):
        return ("out",)
    return ("out", "in") if is_weighted(module) or isinstance(module, RECURRENT) else ()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters and buffers, by their names in it."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def held(module: nn.Module, end: End) -> list[Held]:
    """The tensors of a layer that the channels at one end of it are in."""
    if isinstance(module, RECURRENT):
        return list(_recurrent(module, end))
    if end.tensor:
        return [Held(end.tensor, end.dim)]
    if isinstance(module, TABLES):
        return [Held("weight", 1)]
    if isinstance(module, (*BARE, nn.PReLU)) or is_depthwise(module) or (is_weighted(module) and end.side == "out"):
        depthwise = is_depthwise(module)
        first = int(not depthwise and (isinstance(module, TRANSPOSED) or keeps_inputs_first(module)))
        tensors = [name for name, tensor in own_tensors(module).items() if tensor.dim() > 0]
        shared = _width_of_a_group(module, "out") if isinstance(module, TRANSPOSED) and not depthwise else 0
        return [Held(name, first, shared) if name == "weight" else Held(name, 0) for name in tensors]
    if isinstance(module, TRANSPOSED) or keeps_inputs_first(module):
        return [Held("weight", 0)]
    return [Held("weight", 1, _width_of_a_group(module, "in") if isinstance(module, CONVS) else 0)]


def _width_of_a_group(module: Any, side: str) -> int:
    """How many channels each group of a convolution has; 0 where there is one group."""
    return int(getattr(module, f"{side}_channels") // module.groups) if module.groups > 1 else 0


def _recurrent(module: Any, end: End) -> Iterable[Held]:
    """Of a recurrent layer or cell: its inputs, its outputs and where it reads them again ("hidden"), and the cells
    behind projections ("cell"). All layers and both directions have the same number of each."""
    projected = bool(getattr(module, "proj_size", 0))
    hidden, width = module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size
    directions = 2 if getattr(module, "bidirectional", False) else 1
    for name, tensor in own_tensors(module).items():
        kind, _, rest = name.partition("_")
        first = rest.removesuffix("_reverse") in ("ih", "ih_l0")
        gates = tensor.shape[0] // hidden
        if end.side == "in":
            if kind != "weight":
                continue
            if end.tensor == "cell":
                if rest.startswith("hr"):
                    yield Held(name, 1)
            elif end.tensor == "hidden":
                if rest.startswith("hh"):
                    yield Held(name, 1)
                elif rest.startswith("ih") and not first:
                    yield Held(name, 1, runs=directions, size=width)
            elif first:
                yield Held(name, 1)
        elif rest.startswith("hr"):
            if not end.tensor:
                yield Held(name, 0)
        elif bool(end.tensor) == projected:
            yield Held(name, 0, runs=gates, size=hidden)


def numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The integers that a module of other code than torch's has as attributes, in lists and tuples too: "splits.0"."""
    if type(module).__module__.startswith("torch.nn."):
        return
    for name, value in vars(module).items():
        if type(value) is int:
            yield name, value
        elif type(value) in (list, tuple):
            yield from ((f"{name}.{place}", each) for place, each in enumerate(value) if type(each) is int)
