"""Trains methods on weights that processes share, and once more by one process; prints what differs as JSON.

python -m torch.distributed.run --nproc-per-node 2 tests/sharded.py '{"movement": {"scorer": "movement"}}'
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import (
    all_gather_object,
    all_reduce,
    destroy_process_group,
    get_rank,
    get_world_size,
    init_process_group,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pl_sparse import Pruner
from pl_sparse.allocation import Allocation, Units, choose
from pl_sparse.core import sharded
from pl_sparse.core.group import Group
from pl_sparse.core.registry import build
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import OneShot
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import Unstructured

STEPS = 16
FULL = StateDictOptions(full_state_dict=True)


def network() -> nn.Sequential:
    """Odd sizes, so that processes hold parts of different size, and one of them nothing of the last weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, bias=False),  # a norm follows: its gradient would be nothing but rounding
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(180, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def fsdp(model: nn.Sequential, mesh: DeviceMesh) -> None:
    """Each layer on its own but the last, which is of the whole model."""
    for layer in list(model)[:-1]:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard(model: nn.Sequential, kind: str) -> None:
    """FSDP2; replicas of it; tensor parallelism; or FSDP2 of what is parallel already."""
    count = get_world_size()
    if kind == "fsdp":
        fsdp(model, init_device_mesh("cpu", (count,)))
    elif kind == "hsdp":
        fsdp(model, init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("copies", "parts")))
    else:
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"4": ColwiseParallel(), "6": RowwiseParallel()})
        if kind == "both":
            fsdp(model, mesh["data"])


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean(value: Tensor) -> Tensor:
    """The mean over processes."""
    all_reduce(value)
    return value / get_world_size()


class Training:
    """On batches that are the same in all processes, so that mean gradients are the same to the bit."""

    def __init__(self, make: Callable[[], Pruner], kind: str | None) -> None:
        self.net, self.pruner = network(), make()
        self.model: nn.Module = self.net
        self.reduce = mean if kind is not None else None
        if kind == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif kind is not None:
            shard(self.net, kind)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS, 8, 1, 8, 8, generator=generator)
        self.y = torch.randint(4, (STEPS, 8), generator=generator)

    def begin(self, own: bool = False) -> None:
        self.pruner.attach(self.net)
        batches = [(self.x[0], self.y[0]), (self.x[1], self.y[1])]
        if own:
            batches = batches[get_rank() :: get_world_size()]
        probe = Probe(self.net, batches, lambda batch: F.cross_entropy(self.net(batch[0]), batch[1]), self.reduce)
        self.pruner.prepare(STEPS, probe=probe)

    def run(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.pruner.before_forward()
            F.cross_entropy(self.model(self.x[step]), self.y[step]).backward()
            self.pruner.before_step(step, STEPS, self.optimizer)
            self.optimizer.step()
            self.pruner.after_step()

    def save(self) -> Any:
        return copy.deepcopy((*get_state_dict(self.net, self.optimizer, options=FULL), self.pruner.state_dict()))

    def load(self, state: Any) -> None:
        model, optimizer, pruner = state
        set_state_dict(self.net, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=FULL)
        self.pruner.load_state_dict(pruner)


def difference(expected: Training, seen: Training, limit: float) -> str:
    """What differs between two trainings, or nothing."""
    if seen.pruner.kept != expected.pruner.kept:
        return f"{seen.pruner.kept} kept for {expected.pruner.kept}"
    states = seen.pruner.state_dict()["params"], expected.pruner.state_dict()["params"]
    for name, tensors in states[1].items():
        for key, value in tensors.items():
            exact = isinstance(value, Tensor) and (value.dtype == torch.uint8 or not limit)
            if exact and not torch.equal(value, states[0][name][key]):
                return f"{key} of {name}"
    for (name, a), b in zip(seen.net.named_parameters(), expected.net.parameters(), strict=True):
        if float((full(a.detach()) - b.detach()).abs().max()) > limit:
            return f"{name} by {float((full(a.detach()) - b.detach()).abs().max())}"
    return ""


def compared(make: Callable[[], Pruner], kind: str) -> str:
    """How a training by several processes differs from that of one, interrupted by either or not; or its refusal."""
    # Products that are summed over processes are rounded in another order.
    limit = 0.0 if kind in ("ddp", "fsdp", "hsdp") else 1e-6
    alone, shared = Training(make, None), Training(make, kind)
    try:
        shared.begin()
    except ValueError as error:
        return f"refused: {error}"
    alone.begin()
    half = range(STEPS // 2), range(STEPS // 2, STEPS)
    alone.run(half[0])
    shared.run(half[0])
    states = alone.save(), shared.save()
    alone.run(half[1])
    shared.run(half[1])
    if problem := difference(alone, shared, limit):
        return problem
    if limit:
        return ""
    for other, state in ((kind, states[0]), (None, states[1])):
        resumed = Training(make, other)
        resumed.load(state)
        resumed.begin()
        resumed.run(half[1])
        if problem := difference(alone, resumed, limit):
            return f"resumed by {'one' if other is None else 'several'}: {problem}"
    return ""


def calibrated(make: Callable[[], Pruner]) -> str:
    """How masks and weights differ from those of one process that has the batches of both, at the first update."""
    alone, shared = Training(make, None), Training(make, "fsdp")
    alone.begin()
    shared.begin(own=True)
    return difference(alone, shared, 1e-6) if alone.pruner.sparsity else "nothing was pruned"


def chosen(kind: str) -> dict[str, str]:
    """Masks of weights that are shared in every way against those of one process; nothing is gathered."""
    count, wrong = get_world_size(), dict[str, str]()
    mesh = init_device_mesh("cpu", (2, count // 2) if kind == "two" else (count,))
    places = itertools.product((Shard(0), Shard(1), Replicate()), repeat=mesh.ndim)
    shapes = [(67, 33), (5, 4, 3, 3), (128, 40), (31, 7), (64, 64), (1, 64), (10, 64), (9, 5), (20, 20)]
    placements = list(itertools.islice(itertools.cycle(places), len(shapes)))
    shared_of = sharded.gathered
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        if seed % 3 == 0:
            values = [value.round() for value in values]  # ties everywhere
        if seed == 1:
            values = [value.double() for value in values]
        for name in ("global", "uniform"):
            nets = [
                nn.ParameterList(values).requires_grad_(False),
                nn.ParameterList(
                    nn.Parameter(distribute_tensor(value, mesh, place), requires_grad=False)
                    for value, place in zip(values, placements, strict=True)
                ),
            ]
            params = [[sharded.masked(f"{i}", net, weight) for i, weight in enumerate(net)] for net in nets]
            for level in (0.3, 0.5, 0.501, 0.95, 1.0):  # each time among what is left
                sharded.gathered = None if seed != 5 else shared_of  # type: ignore[assignment]
                for each in params:
                    groups = [Group(param.name, ((param, param.layout),)) for param in each]
                    with sharded.whole(each):
                        units = Units(groups, Unstructured(), Magnitude().score, monotone=True, pointwise=True)
                        choose(units, build(Allocation, name), level)
                sharded.gathered = shared_of
                for one, other in zip(*params, strict=True):
                    with sharded.whole([other]):
                        if not torch.equal(one.mask, other.mask) or one.kept != other.kept:
                            wrong[f"{name} {level} seed {seed}"] = one.name
    shared = params[1]
    if get_rank() == 1:
        sharded.local(shared[4].weight)[0, 0] = float("nan")
    with sharded.whole(shared):
        groups = [Group(param.name, ((param, param.layout),)) for param in shared]
        try:
            choose(Units(groups, Unstructured(), Magnitude().score, pointwise=True), build(Allocation, "global"), 0.5)
            wrong["NaN"] = "was not refused"
        except ValueError as error:
            if "the scores of 4 hold NaN" not in str(error):
                wrong["NaN"] = str(error)
    everywhere: list[Any] = [None] * count
    all_gather_object(everywhere, wrong)
    return {key: value for each in everywhere for key, value in each.items()}


def main(kind: str, settings: dict[str, Any]) -> None:
    results = chosen(kind) if kind in ("one", "two") else {}
    for name, options in settings.items():
        if kind == "own":
            results[name] = calibrated(lambda options=options: Pruner(schedule=OneShot(final=0.7, begin=0), **options))
        elif options is None:
            from test_properties import made

            results[name] = compared(lambda name=name: made(name, 0.8), kind)
        else:
            results[name] = compared(lambda options=options: Pruner(**options), kind)
    if get_rank() == 0:
        print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_process_group("gloo")
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    finally:
        destroy_process_group()
