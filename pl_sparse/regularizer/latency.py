"""Expected latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.cost import Network, measured
from pl_sparse.network.runtimes import Runtime
from pl_sparse.regularizer.base import Regularizer, members
from pl_sparse.structure import Channel

__all__ = ["Latency"]


@register
@dataclass(frozen=True, kw_only=True)
class Latency(Regularizer):
    """strength * E[latency] / latency of the dense network, both sums over layers, for coupled channels.

    A channel counts as present to the degree q = |w|^2 / (|w|^2 + softness * m), |w|^2 the mean square of its weights
    and m that of its group when the penalty begins. The expected width of a group is the sum of its q, and the latency
    of a layer that of its expected width, by a table that was measured in `runtime` and is interpolated
    (`latency.LatencyTable`). Channels of the layers that save most time fade first; `structure=coupled` then prunes
    them.

    Source: Cai, Zhu, Han, ProxylessNAS: direct neural architecture search on target task and hardware, 2018,
    arXiv:1812.00332, section 3.3, for the expected latency as a loss; there the degrees are learned probabilities.

    Args:
        softness: the mean square, relative to that of the group, at which a channel counts as half present.
        table: where latencies are kept; None for the user's cache.
        runtime: what latencies are those of: "torch", "onnxruntime" or "openvino"; None: torch.
        device: the device that torch measures on, "cpu" or "cuda"; None: the one that trains.
    """

    strength: float = 0.1
    softness: float = 0.1
    table: str | None = None
    runtime: str | None = None
    device: str | None = None
    needs_example: ClassVar[bool] = True
    _measured: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softness > 0:
            raise ValueError(f"softness={self.softness!r} must be above 0")
        Runtime(self.runtime or "torch", self.device or "cpu")  # refuses what is not there

    @property
    def removes_outputs(self) -> bool:
        return True

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        if example is None:
            example = getattr(model, "example_input_array", None)
        structure = Channel(coupled=True)
        groups = [group for group in structure.groups(params, model, example) if group.reason is None]
        groups = [group for group in groups if group.consumers]
        if not groups:
            raise ValueError("the latency penalty found no channel that could be removed")
        network = Network(groups, model, example)
        table = measured(network, model, self.table, self.runtime, self.device)
        dense = float(network.cost(network.units, "ms", table))
        self._measured.update(network=network, table=table, dense=dense)
        self.start(groups)
        return groups

    def start(self, groups: Sequence[Group]) -> None:
        self._measured["means"] = [float(self._squares(group).detach().mean()) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._measured["means"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._measured["means"] = state["means"]

    def _squares(self, group: Group) -> Tensor:
        """The mean square of the weights of each unit, differentiable."""
        pool = Channel().pool
        parts = [
            pool(layout.view(param.weight.square())) * (layout.shape_of(param.former).numel() / group.numel)
            for param, layout in group.members
        ]
        return torch.stack(parts).sum(0)

    def expected(self, groups: Sequence[Group]) -> Tensor:
        """The expected latency in milliseconds, differentiable."""
        widths: list[Any] = list(self._measured["network"].units)
        index = {id(group): i for i, group in enumerate(self._measured["network"].groups)}
        for group in groups:
            squares, i = self._squares(group), index[id(group)]
            widths[i] = (squares / (squares + self.softness * self._measured["means"][i] + 1e-30)).sum()
        return torch.as_tensor(self._measured["network"].cost(widths, "ms", self._measured["table"]))

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        return self.strength * self.expected(groups) / self._measured["dense"]

    def add_gradient(self, groups: Sequence[Group], step: int) -> None:
        ready = [group for group in groups if all(param.weight.grad is not None for param, _ in group.members)]
        if not ready:
            return
        weights = list(dict.fromkeys(param.weight for param in members(ready)))
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.penalty(ready, step), weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient)
