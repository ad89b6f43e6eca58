"""As many channels as a cost allows: the least pruned model that is so much faster, smaller or cheaper."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, sqrt
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from pl_sparse.allocation import ERK, Budget, Units, choose
from pl_sparse.callbacks.calibration import example_of, network_of
from pl_sparse.callbacks.sparsity import Sparsity
from pl_sparse.callbacks.strategies import refuse_parts, together
from pl_sparse.core.agreement import agreed
from pl_sparse.export.format import Executable
from pl_sparse.export.measure import latencies, one_thread, ratio, stored_bytes
from pl_sparse.export.onnx import open_onnx, save_onnx
from pl_sparse.export.openvino import open_openvino
from pl_sparse.network.graph import traceable
from pl_sparse.network.macs import counted
from pl_sparse.network.runtimes import Runtime
from pl_sparse.pruner import Pruner
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import Channel
from pl_sparse.surgery.plan import named_tensors
from pl_sparse.surgery.shrink import shrink

__all__ = ["CostTarget", "opened"]

_MARGIN = {"speedup": 1.05, "ms": 1.03}
"""Time is looked for so much below what is asked: trained scores choose other widths than magnitudes before."""
_MULTIPLES = (16, 4, 1)
"""How many channels go at once, for a speed-up: ONNX Runtime computes channels in blocks of 16 where they are a
multiple of 4, and takes twice as long for a convolution where they are not."""
_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}
"""Runtimes, as they are written."""
_NEAR = 1.03
"""Budgets that differ by less are not told apart."""
_SPARED = 4.0
"""A speed-up s leaves 1 / s of the MACs where time follows them. So many times less than 1 / s^2 is refused: the time
is that of something else, and next to nothing of the network would be left."""


class CostTarget(Callback):
    """Prunes coupled channels until the network without them meets a cost, and no further.

    It needs a `Sparsity(structure="coupled", sparsity=0.9)` callback before it, whose allocation it makes a `Budget`;
    `sparsity` is only the pace. Before training it prunes a copy by magnitude to budgets between the cost of the dense
    network and the lowest possible one, removes the channels, and measures. Training uses the largest budget that
    meets the target. The trained network is measured again at the end.

    Args:
        speedup: how many times faster than the dense network: in `runtime` on the CPU, batch 1, one thread, both in
            turns.
        size: the fraction of the bytes of its weights and buffers that may be left.
        macs: the fraction of its multiply-accumulates that may be left.
        ms: the milliseconds that it may take, measured as a speed-up is.
        seconds: the seconds of each measurement of latency.
        runtime: what time is measured in: "onnxruntime", "openvino" or "torch"; None: ONNX Runtime.

    Attributes:
        achieved: the targeted figure as measured at the end of training; None before.
        met: whether that is what was asked for.

    Raises:
        ValueError: not one of speedup, size, macs and ms is given, or it is out of range, or the runtime is not there.
            Before training starts: channels are not coupled, another allocation is given, the dense network or no
            budget meets the target, or the network cannot be exported.
    """

    def __init__(
        self,
        speedup: float | None = None,
        size: float | None = None,
        macs: float | None = None,
        seconds: float = 0.5,
        runtime: str | None = None,
        ms: float | None = None,
    ) -> None:
        asked = {"speedup": speedup, "size": size, "macs": macs, "ms": ms}
        given = {key: value for key, value in asked.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "a target of cost is one of speedup (2: twice as fast), size and macs (0.5: half is left) and ms, got "
                + (", ".join(given) or "none of them")
            )
        ((self.what, self.asked),) = given.items()
        if self.what == "speedup" and not 1 < self.asked < inf:
            raise ValueError(f"speedup={self.asked!r} must be above 1: how many times faster than the dense network")
        if self.what == "ms" and not 0 < self.asked < inf:
            raise ValueError(f"ms={self.asked!r} must be above 0: the milliseconds that the network may take")
        if self.what in ("size", "macs") and not 0 < self.asked < 1:
            raise ValueError(f"{self.what}={self.asked!r} must be in (0, 1): the fraction that may be left")
        if not seconds > 0:
            raise ValueError(f"seconds={seconds!r} must be above 0: the time that a latency is measured for")
        self.seconds = seconds
        self.runtime = runtime or "onnxruntime"
        self._timed = self.what in ("speedup", "ms")
        if self._timed:
            Runtime(self.runtime)  # refuses what is not there
        self.achieved: float | None = None
        self.met: bool | None = None
        self._limit: float | None = None  # of the budget
        self._multiple = 1  # how many channels go at once
        self._restored = False
        self._dense: Executable | None = None  # while it is measured beside others
        self._ms = (0.0, 0.0)  # of the dense network and the smaller one, as measured last

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        pruner = Sparsity.of(trainer).pruner
        asked = f"target {self.what}={self.asked:g}"
        if not (isinstance(pruner.structure, Channel) and pruner.structure.coupled):
            left = max(self.asked - 1 / 32, 0)  # of a file: a bit for each weight, and the values that are left
            file = f", or for a compressed file of that size sparsity={1 - left:.3g} export=[safetensors]"
            raise ValueError(
                f"{asked} is met by channels that can be removed, and structure={pruner.structure.label} leaves them "
                f"where they are: use structure=coupled{file if self.what == 'size' else ''}"
            )
        unlimited: dict[str, Any] = {_UNITS[self.what]: inf}
        budget = Budget(final=pruner.schedule.final, **unlimited)
        given = pruner.allocation
        if not (isinstance(given, Budget) and getattr(given, budget.what) == inf):
            if pruner.allocation != ERK():
                name = type(pruner.allocation).__name__.lower()
                raise ValueError(
                    f"{asked} shares channels out by what they cost, and allocation={name} does so otherwise: leave "
                    "allocation out, or the target"
                )
            pruner.allocation = budget

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        pruner = Sparsity.of(trainer).pruner
        restored, self._restored = self._restored, False
        if self._limit is None or not (restored or pruner.num_updates):
            with together(trainer):
                self._limit, self._multiple = agreed(lambda: self._search(trainer, pl_module, pruner))
        assert isinstance(pruner.allocation, Budget)
        if self._multiple != pruner.allocation.multiple:
            pruner.allocation = pruner.allocation.by(self._multiple)
        pruner.allocation.meet(self._limit)

    @torch.no_grad()
    def _search(self, trainer: Trainer, module: LightningModule, pruner: Pruner) -> tuple[float, int]:
        """The largest budget at which the target is met, and how many channels go at once.

        Raises:
            ValueError: none meets it.
        """
        budget, example = pruner.allocation, example_of(trainer, module)
        assert isinstance(budget, Budget)
        params = pruner.masked
        before = {param.name: param.mask.clone() for param in params if param.pruned}
        self._dense = None
        overrides = [override for _, override in pruner.group_overrides]

        def left(budget: Budget, fraction: float) -> tuple[float, float]:
            """How many times less the network costs at a fraction of the dense one's budget, and how much of it."""
            for param in params:
                param.unset_mask()  # scores leave out what an earlier try has cut off
            budget.meet(fraction * full)
            units = Units(pruner.groups, pruner.structure, Magnitude().score)
            choose(units, budget, budget.final, overrides)
            kept = [int(units.alive(i).sum()) for i in range(len(pruner.groups))]
            return self._times_less(module, pruner, example), budget.cost(kept)

        full = budget.cost(budget.units)
        wanted = self._enough * _MARGIN.get(self.what, 1.0)
        multiples = _MULTIPLES if self._timed and budget.multiple == 1 else (budget.multiple,)
        found = most = 0.0
        chosen = budget
        try:
            if self.what == "ms" and left(budget, 1.0)[0] >= 1:
                raise ValueError(
                    f"target ms={self.asked:g}: the dense network takes {self._ms[0]:.3g} ms in "
                    f"{_NAMES[self.runtime]} (batch 1, one thread), which meets it. Ask for less"
                )
            for multiple in multiples:
                tried = budget.by(multiple)
                if multiple == 1 and found:
                    break
                low = tried.least / full * (1 + 1e-6)
                times, cost = left(tried, low)
                most = max(most, times)
                if times >= wanted and (cost := _largest(partial(left, tried), low, cost, wanted)) > found:
                    chosen, found = tried, cost
            if not found:
                spare = f", and {wanted:.3g} is needed, with a margin" if self.what == "speedup" else ""
                raise ValueError(
                    f"target {self.what}={self.asked:g} cannot be met: with {budget.multiple} channel"
                    f"{'s' * (budget.multiple > 1)} in each group that can be pruned, {self.what} is "
                    f"{self._figure(most):.3g}" + spare
                )
            times = self._ms[0] / self.asked if self.what == "ms" else self.asked
            if self._timed and found * _SPARED * times**2 < full:
                raise ValueError(
                    f"target {self.what}={self.asked:g} would remove {1 - found / full:.1%} of the "
                    "multiply-accumulates: the time of this network hardly depends on its channels. Ask for less, or "
                    "use target=macs"
                )
        finally:
            for param in params:
                param.unset_mask()
                if param.name in before:
                    param.set_mask(before[param.name])
        rank_zero_info(f"target {self.what}={self.asked:g}: a budget of {found:.4g} {chosen.what} of {full:.4g}")
        return found * (1 + 1e-9), chosen.multiple

    # Costs

    @property
    def _enough(self) -> float:
        """What `_times_less` is where the target is just met."""
        return {"speedup": self.asked, "ms": 1.0}.get(self.what, 1 / self.asked)

    def _figure(self, times: float) -> float:
        """What `_times_less` is, as the target is given."""
        return {"speedup": times, "ms": self.asked / times}.get(self.what, 1 / times)

    def _times_less(self, module: LightningModule, pruner: Pruner, example: Any) -> float:
        """How many times less than the dense network, or than asked for, it costs without the channels masked now."""
        masks = {param.name: param.mask for param in pruner.masked if param.pruned}
        dense, smaller = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
        tensors = named_tensors(smaller)
        for name, mask in masks.items():
            tensors[name].mul_(mask)
        shrink(smaller, example, masks)
        if self.what == "size":
            return stored_bytes(dense) / stored_bytes(smaller)
        if self.what == "macs":
            return counted(dense, example).dense / counted(smaller, example).dense
        faster = self._faster(network_of(dense.cpu()), network_of(smaller.cpu()), example)
        return self.asked / self._ms[1] if self.what == "ms" else faster

    def _faster(self, dense: nn.Module, smaller: nn.Module, example: Any) -> float:
        """How many times faster one network is than another, in turns in the runtime.

        In the time of the processor: a call that takes longer meets more of what else a busy machine does.
        """
        x = example[0] if isinstance(example, tuple) else example
        if not isinstance(x, Tensor):
            raise ValueError(
                f"target {self.what}={self.asked:g} is measured on networks with one input tensor, and the inputs are "
                f"a {type(x).__name__}: use target=macs or target=size"
            )
        x = x.cpu()
        where = _NAMES[self.runtime]
        if self._dense is None and self.runtime != "torch" and (reason := traceable(dense, x)) is not None:
            raise ValueError(f"target {self.what}={self.asked:g} is measured in {where}: {reason}")
        with one_thread():
            if self._dense is None:  # of one try or another: what it costs does not depend on values
                self._dense = opened(dense, x, self.runtime)
            runs = {"dense": self._dense, "smaller": opened(smaller, x, self.runtime)}
            times = latencies(runs, x[:1], self.seconds, clock=process_time)
        self._ms = median(times["dense"]), median(times["smaller"])
        return ratio(times["dense"], times["smaller"])[0]

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        times = self._times_less(pl_module, Sparsity.of(trainer).pruner, example_of(trainer, pl_module))
        self._dense = None
        self.achieved = self._figure(times)
        line = f"target {self.what}={self.asked:g}: {self.achieved:.3g}"
        self.met = times >= self._enough
        if not self.met:
            rank_zero_warn(f"{line}, of the trained network, misses the target")
        else:
            rank_zero_info(line)

    # State

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self._limit, "multiple": self._multiple}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._limit, self._restored = state_dict["limit"], True
        self._multiple = state_dict.get("multiple", 1)  # a checkpoint of an earlier release has none


def _largest(left: Callable[[float], tuple[float, float]], low: float, found: float, wanted: float) -> float:
    """The cost of the largest budget that makes a network so many times less costly.

    Args:
        left: from a fraction of the dense network's budget to how many times less it costs, and its cost.
        low: a fraction that does.
        found: its cost.
        wanted: how many times less.
    """
    high, middle = 1.0, 1 / wanted
    while high / low > _NEAR:
        middle = middle if low < middle < high else sqrt(low * high)
        times, cost = left(middle)
        if times >= wanted:
            low, found = middle, cost
        else:
            high = middle
        middle = 0.0
    return found


_UNITS = {"speedup": "macs", "size": "kb", "macs": "macs", "ms": "macs"}
"""What a `Budget` counts for each target. For time MACs: the milliseconds of small layers are noise."""


def opened(net: nn.Module, x: Tensor, runtime: str) -> Executable:
    """A network in a runtime.

    Args:
        net: in evaluation mode.
        x: inputs of some samples.
        runtime: one of `RUNTIMES`.
    """
    if runtime == "torch":
        return net
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(net, x, path)
        return open_onnx(path) if runtime == "onnxruntime" else open_openvino(path)
