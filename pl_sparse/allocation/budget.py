"""Channels allocated so that the pruned network costs no more than a budget: milliseconds, kilobytes or MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.measured import losses
from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import register
from pl_sparse.network.cost import Network, measured
from pl_sparse.network.runtimes import Runtime
from pl_sparse.surgery.timed import fit

__all__ = ["Budget"]

_LEAST_WORTH = 0.1
"""Of a group that loses nothing; that of the one that loses most is 1 more. A loss of 0 is one that a few batches do
not show."""


@register
@dataclass(frozen=True)
class Budget(Allocation):
    """The channels with the least importance per cost are removed until the network meets the budget.

    The worth of a network is sum over groups log(sum of the scores of its kept units), so that the share of a group's
    importance counts and no group is emptied. The candidates are the `multiple` least important channels of each group.
    Repeatedly, the candidate with the least loss of worth per saved cost is removed, and costs are computed anew. With
    `sensitivity` the worth of a group is multiplied by 0.1 + d / max d, where d is the loss that the model was measured
    to have with its layers pruned alone. A group keeps at least one block. The way there follows the schedule: at a
    level s the budget is full^(1 - p) budget^p with p = s / final, `full` being what the dense network costs.
    `sparsity` sets only the pace; the final sparsity follows from the budget.

    It needs coupled channels, because only these can be removed (`structure=coupled`).

    Source: Shen et al., Structural pruning via latency-saliency knapsack (HALP), 2022, arXiv:2210.06659, sections 3.2
    and 3.4; there importance is summed without the logarithm, and a knapsack solver chooses, not a greedy rule.

    Args:
        final: the schedule's final sparsity.
        ms: milliseconds of the network for one batch of the example's size, by a table of layers and by four networks,
            the dense one and narrower ones, that are measured in `runtime`.
        kb: kilobytes (1000 bytes) of weights and biases.
        macs: multiply-accumulates; a number up to 1 is a fraction of the dense network's, a larger one the number per
            sample.
        bytes: the bytes of a weight, for kb: 4 for float32, 1 for int8.
        multiple: how many channels go at once.
        table: where latencies are kept, see `latency.LatencyTable`.
        runtime: what milliseconds are those of: "torch", "onnxruntime" or "openvino"; None: torch.
        device: the device that torch measures on, "cpu" or "cuda"; None: the one that trains.
        sensitivity: sensitivity.csv of `pl-sparse sensitivity`, of the same model: layers that lose more keep more.

    Raises:
        ValueError: not exactly one of ms, kb and macs is given, or it is not above 0; for ms, a runtime or device that
            is not there. When it starts: the table of `sensitivity` is of another model, or none.
    """

    final: float = 1.0
    ms: float | None = None
    kb: float | None = None
    macs: float | None = None
    bytes: int = 4
    multiple: int = 1
    table: str | None = None
    runtime: str | None = None
    device: str | None = None
    sensitivity: str | None = None
    _measured: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        limits = {key: getattr(self, key) for key in ("ms", "kb", "macs") if getattr(self, key) is not None}
        if len(limits) != 1:
            raise ValueError(
                "allocation=budget needs one of ms (milliseconds), kb (kilobytes), macs (a fraction or a number), got "
                + (", ".join(limits) or "none of them")
            )
        if next(iter(limits.values())) <= 0:
            raise ValueError(f"{next(iter(limits))}={next(iter(limits.values()))!r} must be above 0")
        for key in ("multiple", "bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)!r} must be 1 or more")
        if self.ms is not None:
            Runtime(self.runtime or "torch", self.device or "cpu")  # refuses what is not there

    @property
    def what(self) -> str:
        """What is limited: "ms", "kb" or "macs"."""
        return next(key for key in ("ms", "kb", "macs") if getattr(self, key) is not None)

    def start(self, groups: Sequence[Group], model: nn.Module, example: Any) -> None:
        if example is None or not all(group.consumers for group in groups):
            raise ValueError("allocation=budget needs channels that can be removed: use structure=coupled")
        network = Network(groups, model, example, self.multiple)
        table = None
        if self.what == "ms":
            table = measured(network, model, self.table, self.runtime, self.device)
            fit(network, model, example, table)
        self._measured.update(network=network, table=table, worth=[1.0] * len(groups))
        if self.sensitivity is not None:
            self._measured["worth"] = _worth(groups, self.sensitivity)
        budget = self.limit(1.0)
        if self.least > budget:
            raise ValueError(
                f"the budget of {budget:.4g} {self.what} cannot be met: with {self.multiple} channels in each group "
                f"the network costs {self.least:.4g} {self.what} ({self.cost(self.units):.4g} when dense)"
            )

    @property
    def units(self) -> list[int]:
        """The units of each group."""
        return list(self._measured["network"].units)

    @property
    def least(self) -> float:
        """What the network costs with one block in each group."""
        return self.cost([min(self.multiple, n) for n in self.units])

    def by(self, multiple: int) -> Budget:
        """The same budget, started too, in which so many channels go at once."""
        other = replace(self, multiple=multiple)
        other._measured.update(self._measured)
        return other

    def meet(self, limit: float) -> None:
        """Take another budget from here on, in the unit of `what`: where it is found by a search."""
        self._measured["limit"] = limit

    def cost(self, kept: Sequence[int]) -> float:
        """What the network costs with so many units of each group."""
        cost = float(self._measured["network"].cost(kept, self.what, self._measured["table"]))
        return cost * self.bytes / 4 if self.what == "kb" else cost

    def limit(self, progress: float) -> float:
        """The budget at a part of the way to the final one."""
        full = self.cost(self.units)
        target = float(self._measured.get("limit", getattr(self, self.what)))
        if self.what == "macs" and target <= 1:
            target *= full
        return float(full ** (1 - progress) * target**progress) if target < full else full

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        if not self._measured:
            raise ValueError("allocation=budget is not started: attach the pruner to a model first")
        network: Network = self._measured["network"]
        index = [network.groups.index(group) for group in groups]  # groups with an own sparsity are not shared out
        kept = list(network.units)
        limits = units.limits
        values: dict[int, Tensor] = {}
        for i, g in enumerate(index):
            scores = units[i].reshape(-1).double() * units.weights[i]
            ranked = scores.sort(descending=True, stable=True).values
            values[g] = torch.cat([ranked.new_zeros(1), ranked.clamp_min(0).cumsum(0)]).clamp_min(1e-30).log()
            kept[g] = limits[i]
        budget = self.limit(min(sparsity / self.final, 1.0) if self.final else 0.0)
        now = self.cost(kept)
        while now > budget:
            best: tuple[float, int, float] | None = None
            for g in index:
                fewer = kept[g] - (kept[g] % self.multiple or self.multiple)
                if fewer < min(self.multiple, network.units[g]) or fewer < 1:
                    continue
                cost = self.cost([*kept[:g], fewer, *kept[g + 1 :]])
                lost = self._measured["worth"][g] * float(values[g][kept[g]] - values[g][fewer])
                rate = lost / max(now - cost, 1e-12)
                if best is None or rate < best[0]:
                    best = rate, g, cost
            if best is None:
                raise ValueError(
                    f"the budget of {budget:.4g} {self.what} cannot be met: {now:.4g} {self.what} is the least"
                )
            g, now = best[1], best[2]
            kept[g] -= kept[g] % self.multiple or self.multiple
        return [kept[g] for g in index]


def _worth(groups: Sequence[Group], path: str) -> list[float]:
    """What the scores of each group count for, by what the model loses where its layers are pruned alone.

    Args:
        groups: of coupled channels; where several layers have a loss, the largest counts, and where none has, the mean.
        path: the table.
    """
    measured = {name: curve[-1][1] for name, curve in losses(path).items()}
    found = []
    for group in groups:
        names = [name for param, _ in group.members for name in (param.name, param.name.removeprefix("net."))]
        found.append(max((measured[name] for name in names if name in measured), default=None))
    known = [loss for loss in found if loss is not None]
    if not known:
        raise ValueError(
            f"{path} has no row for {groups[0].name} or another layer with pruned channels: it belongs to another model"
        )
    mean, largest = sum(known) / len(known), max(known)
    return [_LEAST_WORTH + ((mean if loss is None else loss) / largest if largest else 1.0) for loss in found]
