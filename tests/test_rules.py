"""Rules that a small change would break in silence: each of these has killed a mutant that survived all other tests."""

from typing import Any

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.schedule import Constant, Cubic, Decisions, OneShot, Paced
from pl_sparse.structure import NM
from pl_sparse.updater import DropGrow, Splice, Update


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def test_splicing_keeps_overrides() -> None:
    pruner = Pruner(schedule=OneShot(final=0.5), updater="splice", overrides={"0": 0.25})
    pruner.attach(net())
    pruner.prepare(10)
    assert [param.kept for param in pruner.params] == [96, 32]


def test_splicing_has_hysteresis_for_learned_units() -> None:
    pruner = Pruner("soft_movement", Constant(final=0.5), updater=Splice(), structure="channel", last=True)
    pruner.attach(nn.Sequential(nn.Linear(2, 4)))
    gate = pruner.groups[0].gate
    assert gate is not None
    pruner.params[0].set_mask(torch.tensor([True, True, False, False]).unsqueeze(1).expand(4, 2))
    gate.value.data.copy_(
        torch.tensor([0.5, 0.6, 0.55, 0.4]).logit()
    )  # 0.55 is above 0.5, but 0.55 / 1.1 below 0.5 / 0.9
    pruner.prepare(10)
    pruner.before_step(0, 10)
    assert pruner.num_updates == 1 and pruner.params[0].mask[:, 0].tolist() == [True, True, False, False]


def test_wide_patterns_are_bool() -> None:
    mask = NM(2, 16).select(torch.arange(32.0).reshape(1, 2, 16), 0)
    assert mask.dtype == torch.bool and mask.sum(-1).tolist() == [[2, 2]] and mask[0, 0, 14:].all()


def test_epochs_become_steps_even_if_there_is_one() -> None:
    timed = Cubic(final=0.5, begin="0 epochs", end="1 epoch", every="1 epoch").resolved(1)
    assert (timed.begin, timed.end, timed.every) == ("0 steps", "1 steps", 1)


def test_a_constant_sparsity_is_reached_at_once_and_a_decided_one_when_it_is_decided() -> None:
    pruner = Pruner(schedule=Constant(final=0.5))
    pruner.attach(net())
    pruner.prepare(10)
    assert not pruner.at_target
    pruner.step = 1
    assert pruner.at_target and not pruner.settled
    decisions = Decisions()
    paced = Paced(final=0.5, decisions=decisions)
    assert not paced.reached(99, 10)
    decisions.done = True
    assert paced.reached(0, 10)


def test_a_pruner_that_is_reset_has_done_nothing() -> None:
    pruner = Pruner(schedule=OneShot(final=0.5))
    pruner.attach(net())
    pruner.prepare(10)
    assert pruner.num_updates == 1 and pruner.settled
    pruner.reset()
    assert (pruner.num_updates, pruner.level, pruner.step, pruner.attached) == (0, 0.0, 0, False)
    assert not pruner.settled


def regrown(updater: DropGrow, momenta: bool = True, **options: Any) -> tuple[Pruner, list[torch.Tensor]]:
    """A pruner after one update of its first masks, and those masks."""
    pruner = Pruner(schedule=Constant(final=0.8), updater=updater, last=True, **options)
    pruner.attach(net())
    pruner.prepare(10)
    before = [param.mask.clone() for param in pruner.params]
    for param in pruner.params:
        if momenta:
            param.state["momentum"] = torch.arange(float(param.numel)).reshape(param.shape)
    due = Update(0.8, (None, None), monotone=True, progress=0.0)
    pruner.updater.update(pruner.groups, pruner.scorer, pruner.structure, pruner.allocation, due)
    return pruner, before


def test_what_grows_by_momentum_has_the_largest() -> None:
    pruner, before = regrown(DropGrow(grow="momentum"))
    for param, mask in zip(pruner.params, before, strict=True):
        grown, empty = param.mask & ~mask, ~(param.mask | mask)
        assert grown.any() and param.state["momentum"][grown].min() > param.state["momentum"][empty].max()


@pytest.mark.parametrize("momenta", [True, False])
@pytest.mark.parametrize("structure", ["unstructured", "channel", "feature"])
def test_redistribution_keeps_the_count(structure: str, momenta: bool) -> None:
    pruner, before = regrown(DropGrow(grow="momentum", redistribute=True), momenta, structure=structure)
    assert abs(pruner.kept - sum(int(mask.sum()) for mask in before)) < {"unstructured": 1}.get(structure, 16)


def test_the_last_unit_is_not_dropped() -> None:
    pruner, before = regrown(DropGrow(fraction=1.0), structure="channel")
    assert [int(mask.any(1).sum()) for mask in before] == [3, 1]  # of 16 and of 4
    assert torch.equal(pruner.params[1].mask, before[1]) and pruner.params[0].mask[before[0]].any()
