"""What every method with an exact target keeps to, at any size, sparsity and seed."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_contract import CONF, compose, pattern
from torch import nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.allocation import kept
from pl_sparse.app.hydra_api import instantiate
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Cyclic
from pl_sparse.structure import Head
from pl_sparse.updater import Prune

LEARNED = {"l0", "str", "soft_movement"}  # a threshold decides how much is kept
METHODS = sorted({path.stem for path in (CONF / "method").glob("*.yaml")} - LEARNED)
STEPS = 10


@cache
def composed(method: str) -> Any:
    return compose([f"method={method}"])


def made(method: str, sparsity: float) -> Pruner:
    cfg = composed(method).copy()
    cfg.sparsity = sparsity
    if "every" in cfg.schedule:
        cfg.schedule.every = 2
    if "rounds" in cfg.schedule:
        cfg.schedule.rounds = min(cfg.schedule.rounds, 3)
    if "rate" in cfg.schedule:
        cfg.schedule.rate = 0.5
    axes = {axis: instantiate(cfg[axis]) for axis in ("scorer", "schedule", "structure", "allocation", "updater")}
    return Pruner(**axes, masking=instantiate(cfg.masking), misfit="dense")


def train(pruner: Pruner, width: int, seed: int) -> list[list[torch.Tensor]]:
    """Train a little network; the masks after each step, and that no pruned weight is other than zero."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, width, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 8), nn.ReLU(),
        nn.Linear(8, 4),
    )  # fmt: skip
    x, y = torch.randn(16, 4, 3, 3), torch.randint(4, (16,))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner.attach(net)
    pruner.prepare(STEPS, probe=Probe(net, [(x, y)], lambda batch: F.cross_entropy(net(batch[0]), batch[1])))
    masks = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pruner.before_forward()
        F.cross_entropy(net(x), y).backward()
        pruner.before_step(step, STEPS, optimizer)
        optimizer.step()
        pruner.after_step(optimizer)
        for param in pruner.params:
            assert not param.weight[~param.mask].any()
        masks.append([param.mask.clone() for param in pruner.params])
    return masks


@pytest.mark.filterwarnings("ignore:.* kept no weight")  # networks this small collapse where much is asked for
@pytest.mark.parametrize("method", METHODS)
def test_counts_patterns_and_seeds(method: str) -> None:
    if isinstance(instantiate(composed(method).structure), Head):
        pytest.skip("the network has no attention")

    @settings(max_examples=1, deadline=None)
    @given(st.sampled_from([4, 8, 12]), st.floats(0.1, 0.9), st.integers(0, 1000))
    def check(width: int, sparsity: float, seed: int) -> None:
        pruner = made(method, sparsity)
        try:
            masks = train(pruner, width, seed)
        except RuntimeError as error:  # a network this small can be cut through
            assume("nothing passes through the network" not in str(error))
            raise
        counts = [sum(int(mask.sum()) for mask in step) for step in masks]
        total, target = pruner.numel, pruner.target
        coarsest = max(
            group.numel // pruner.structure.pool(torch.zeros(group.shape)).numel() for group in pruner.groups
        )
        exact = kept(target, total)
        assert pruner.at_target
        assert counts[-1] == exact if coarsest == 1 else abs(counts[-1] - exact) <= coarsest / 2
        if target > 0:
            pattern(pruner.structure, pruner)
        if pruner.updater.fixed_count:
            assert set(counts) == {exact}
            assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[-1], strict=True))
        elif pruner.masking.remembers or isinstance(pruner.schedule, Cyclic):
            pass  # weights may return
        elif isinstance(pruner.updater, Prune):
            for before, after in pairwise(masks):
                assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))

        again = train(made(method, sparsity), width, seed)
        assert all(
            torch.equal(a, b) for one, two in zip(masks, again, strict=True) for a, b in zip(one, two, strict=True)
        )

    check()
