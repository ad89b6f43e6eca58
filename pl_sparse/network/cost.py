"""What a network costs with some of its channels gone."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.network.hooks import called, evaluated, hooked
from pl_sparse.network.latency import LatencyTable, Layer, sized
from pl_sparse.network.layers import TRANSPOSED, WEIGHTED

__all__ = ["Network", "measured"]


class Network:
    """The layers of a model whose channels are pruned, and what they cost.

    Args:
        groups: coupled channels, as `Channel(coupled=True)` finds them.
        model: what they are in.
        example: inputs of one batch; latencies are those of a batch of this size.
        multiple: pruning leaves widths that are multiples of it, and so are `samples`.

    Attributes:
        units: how many each group has.
        samples: the widths of the networks that are measured for `fit`: the dense one, and three in which groups have
            0.3, 0.6 and all of their units in turn, each group once each. Pruning leaves widths that differ.

    Raises:
        ValueError: a group is not made of whole output channels.
    """

    def __init__(self, groups: Sequence[Group], model: nn.Module, example: Any, multiple: int = 1) -> None:
        self.groups = list(groups)
        self.units = [_units(group) for group in groups]
        parts = (0.3, 0.6, 1.0)
        self.samples = [self.units]
        for turn in range(3):
            self.samples.append([_part(n, parts[(g + turn) % 3], multiple) for g, n in enumerate(self.units)])
        self._constant, self._factor = 0.0, 1.0  # of milliseconds
        calls = _calls(model, example)
        outs: dict[int, dict[int, int]] = {}
        ins: dict[int, dict[int, int]] = {}
        for g, group in enumerate(groups):
            for param, layout in group.members:
                rows = layout.outputs_per_unit
                outs.setdefault(id(param.module), {})[g] = rows
            for param, units in group.consumers:
                groups_of = getattr(param.module, "groups", 1)
                ins.setdefault(id(param.module), {})[g] = int((units == 0).sum()) * groups_of
        self.layers = []
        for name, module in model.named_modules():
            if module not in calls:
                continue
            shape, positions = calls[module]
            out, into = outs.get(id(module), {}), ins.get(id(module), {})
            linear = isinstance(module, nn.Linear)
            full_out = int(getattr(module, "out_features" if linear else "out_channels"))
            full_in = int(getattr(module, "in_features" if linear else "in_channels"))
            rest_out = full_out - sum(count * self.units[g] for g, count in out.items())
            rest_in = full_in - sum(count * self.units[g] for g, count in into.items())
            twin = sized(module, full_in, full_out, device="meta")
            self.layers.append(Layer(f"{name}.weight", twin, positions, shape, (out, rest_out), (into, rest_in)))

    def fit(self, table: LatencyTable, measured: Sequence[float]) -> None:
        """Make milliseconds those of the network, not of its layers alone: c + f * (sum over layers).

        c is what does not depend on widths: attention, norms of tokens, calls. f is how much longer layers take in the
        network than alone, where caches hold what is their own. Both minimize the squares of relative errors, with
        0 <= f and 0 <= c whatever noise says.

        Args:
            table: of the layers.
            measured: milliseconds of networks with the widths of `samples`, in turns.
        """
        self._constant, self._factor = 0.0, 1.0
        alone = [float(self.cost(kept, "ms", table)) for kept in self.samples]
        weights = [1 / whole**2 for whole in measured]
        x, y = (sum(map(mul, weights, values)) / sum(weights) for values in (alone, measured))
        spread = sum(w * (a - x) ** 2 for w, a in zip(weights, alone, strict=True))
        slope = sum(w * (a - x) * (m - y) for w, a, m in zip(weights, alone, measured, strict=True))
        factor = slope / spread if spread else 1.0
        self._factor = min(max(factor, 0.0), y / x if x else 1.0)
        self._constant = y - self._factor * x

    def cost(self, kept: Sequence[Any], unit: str, table: LatencyTable | None = None) -> Any:
        """What the network costs with `kept[g]` units left in group g.

        Args:
            kept: numbers, or scalars that the cost is differentiated by.
            unit: "macs" (of a sample), "kb" (of 1000 bytes, weights and biases in 4 bytes each), or "ms" (of a batch:
                the sum over layers, or what `fit` made of it).
            table: of latencies, for "ms".

        Returns:
            A number, or a scalar tensor where `kept` has some.
        """
        total: Any = 0.0
        for layer in self.layers:
            inputs, outputs = layer.widths(kept)
            if unit == "ms":
                assert table is not None
                total = total + table.predict(layer, inputs, outputs)
                continue
            kernel = layer.module.weight[0, 0].numel()
            groups = 1 if isinstance(layer.module, nn.Linear) else layer.module.groups
            weights = outputs * kernel if layer.depthwise else inputs * outputs * kernel / groups
            if unit == "macs":
                total = total + weights * layer.positions
            else:
                total = total + 0.004 * (weights + (outputs if layer.module.bias is not None else 0))
        return self._constant + self._factor * total if unit == "ms" else total


def measured(
    network: Network, model: nn.Module, path: str | None, runtime: str | None, device: str | None
) -> LatencyTable:
    """A table of all layers of a network.

    Args:
        network: the layers of `model`.
        model: on the device that trains.
        path, runtime: as in `LatencyTable`.
        device: the device of torch; None for the one that `model` is on.
    """
    if device is None and runtime in (None, "torch"):
        device = str(next(model.parameters()).device)
    table = LatencyTable(path, runtime=runtime, device=device)
    table.measure(network.layers)
    return table


def _part(units: int, part: float, multiple: int) -> int:
    """A part of some units, to the nearest multiple.

    >>> [_part(units, 0.3, 4) for units in (512, 64, 16, 8, 3)]
    [152, 20, 4, 4, 3]
    """
    return min(multiple * max(round(units * part / multiple), 1), units)


def _units(group: Group) -> int:
    """How many units a group has."""
    param, layout = group.members[0]
    return layout.shape_of(param.former)[0]


def _calls(model: nn.Module, example: Any) -> dict[nn.Module, tuple[tuple[int, ...], float]]:
    """The input shape of each layer that is called, and the positions of a sample that it is used at."""
    calls: dict[nn.Module, tuple[tuple[int, ...], float]] = {}

    def note(module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, TRANSPOSED):  # each weight is used once per input
            positions = x.numel() / module.in_channels / len(out)
        else:
            positions = (
                out.numel() / (out.shape[-1] if isinstance(module, nn.Linear) else module.out_channels) / len(out)
            )
        calls[module] = tuple(x.shape), positions + calls.get(module, ((), 0.0))[1]

    layers = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    with hooked(layers, post=note), evaluated(model), torch.no_grad():
        called(model, example)
    return calls
