"""The Pruner in plain training loops."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Constant, Cubic, Linear, OneShot, Schedule
from pl_sparse.scorer import Movement


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, index: int, total: int) -> None:
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(index))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    pruner.before_step(index, total, optimizer)
    optimizer.step()
    pruner.after_step()


def test_a_plain_loop_reaches_the_sparsity() -> None:
    model = net()
    pruner = Pruner(schedule="cubic", sparsity=0.9, scorer="magnitude")
    pruner.attach(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for index in range(50):
        assert pruner.at_target is (index > 38)  # the last level is due at step 38
        step(model, optimizer, pruner, index, 50)
    assert pruner.kept == 19 == sum(int((p.weight != 0).sum()) for p in pruner.params)  # 0.1 * 192, rounded
    assert list(model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
@pytest.mark.parametrize("scorer", ["magnitude", "movement", "taylor"])
def test_a_saved_state_goes_on_as_if_nothing_happened(scorer: str, masking: str) -> None:
    if scorer == "movement" and masking == "hard":
        pytest.skip("movement needs the values of pruned weights")

    def made() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = net()
        return (
            model,
            torch.optim.AdamW(model.parameters(), 0.01),
            Pruner(scorer, Linear(final=0.8, every=2), masking=masking),
        )

    model, optimizer, pruner = made()
    pruner.attach(model)
    for index in range(9):
        step(model, optimizer, pruner, index, 20)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), pruner.state_dict()])
    for index in range(9, 20):
        step(model, optimizer, pruner, index, 20)

    again, optimizer_again, pruner_again = made()
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    pruner_again.load_state_dict(saved[2])
    pruner_again.attach(again)
    for index in range(9, 20):
        step(again, optimizer_again, pruner_again, index, 20)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert pruner_again.num_updates == pruner.num_updates and pruner_again.step == 20


def test_a_state_of_another_model_is_refused() -> None:
    pruner = Pruner(sparsity=0.5)
    pruner.attach(net())
    state = pruner.state_dict()
    other = Pruner(sparsity=0.5)
    other.attach(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"another model.*lacks 1.weight"):
        other.load_state_dict(state)
    other = Pruner(sparsity=0.5)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"mask of 0.weight has shape \(16, 8\)"):
        other.attach(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match="version 99"):
        other.load_state_dict({"version": 99})


def test_closures_evaluate_several_times_a_step() -> None:
    model = net()
    pruner = Pruner(schedule=OneShot(final=0.5))
    pruner.attach(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x = torch.randn(10, 8)
    for index in range(4):

        def closure(index: int = index) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            pruner.before_step(index, 4, optimizer)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        pruner.after_step()
        assert pruner.step == index + 1
    assert sum(int((p.weight != 0).sum()) for p in pruner.params) == 96


def test_each_optimizer_opens_its_own_weights() -> None:
    model = net()
    pruner = Pruner(schedule=Constant(final=0.5), masking="ste")
    pruner.attach(model)
    pruner.prepare(10)
    first, second = (torch.optim.SGD(model[i].parameters(), 0.1) for i in (0, 2))
    for index in range(6):
        for optimizer, when in ((first, index), (second, None)):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            pruner.before_step(when, optimizer=optimizer)
            other = pruner.params[1 if optimizer is first else 0]
            assert not other.weight[~other.mask].any()
            optimizer.step()
            pruner.after_step(optimizer)
    assert pruner.step == 6
    for param in pruner.params:
        assert param.latent is not None and param.latent[~param.mask].any() and not param.weight[~param.mask].any()


def test_tied_weights_are_pruned_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    pruner = Pruner(schedule=OneShot(final=0.5))
    pruner.attach(model)
    pruner.prepare(5)
    assert pruner.numel == 16 and int((model[1].weight != 0).sum()) == 8


def test_nothing_is_done_to_a_model_that_is_not_yet_pruned() -> None:
    model = net()
    pruner = Pruner(schedule=Cubic(final=0.5, begin=0.5), masking="ste")
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for index in range(5):
        step(model, optimizer, pruner, index, 10)
    assert all(param.latent is None and not param.pruned for param in pruner.params)


def test_overrides() -> None:
    pruner = Pruner(schedule=Linear(final=0.8, end="8 steps", every=4), overrides={"2": 0.25, "*.weight": 0.5})
    pruner.attach(net())
    pruner.prepare(10)
    pruner.before_step(4)
    assert [param.kept for param in pruner.params] == [96, 56]  # halfway: 0.25 and 0.125 removed
    pruner.after_step()
    pruner.before_step(8)
    assert [param.kept for param in pruner.params] == [64, 48]
    assert pruner.target == pytest.approx((64 + 16) / 192)


def test_an_override_that_a_pattern_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity of 0.9 for 0.weight is above 0.5, which structure=2:4 has"):
        Pruner(structure="nm24", overrides={"0": 0.9}).attach(net())
    pruner = Pruner(structure="nm24", schedule=OneShot(final=0.5), overrides={"0": 0.25})
    pruner.attach(net())
    pruner.prepare(10)
    assert [param.kept for param in pruner.params] == [96, 32]


@pytest.mark.parametrize(
    ("scorer", "message"), [("slimming", "batch norm after their layer"), ("synflow", "models of tokens")]
)
@pytest.mark.parametrize("masking", ["hard", "ste"])
@pytest.mark.parametrize("schedule", [Cubic(final=0.5, begin=0.5), Cubic(final=0.5), OneShot(final=0.5)])
def test_what_a_scorer_cannot_score_is_refused_before_training(
    scorer: str, message: str, schedule: Schedule, masking: str
) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    pruner = Pruner(scorer, schedule, masking=masking)
    pruner.attach(model)
    with pytest.raises(ValueError, match=message):
        pruner.prepare(10, probe=Probe(model, [torch.zeros(2, 3, dtype=torch.long)], lambda b: model(b).sum()))


def test_the_last_level_is_caught_up_where_a_step_has_one_of_its_own() -> None:
    model = net()
    pruner = Pruner(schedule=Linear(final=0.75, begin=0.0, end="4 steps", every=1))
    pruner.attach(model)
    pruner.prepare(float("inf"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for index in range(2):
        pruner.before_step(index, optimizer=optimizer)
        optimizer.step()
        pruner.after_step()
    assert pruner.sparsity == pytest.approx(0.1875, abs=0.01) and not pruner.at_target
    assert pruner.catch_up() and pruner.sparsity == 0.75 and pruner.at_target


def test_an_nm_pattern_keeps_the_shape_of_the_schedule() -> None:
    model = net()
    pruner = Pruner(schedule=Linear(final=0.9, end="8 steps", every=4), structure="nm14")
    pruner.attach(model)
    pruner.prepare(20)
    kept = []
    for index in (0, 4, 8):
        pruner.before_step(index)
        pruner.after_step()
        kept.append(pruner.kept / pruner.numel)
    assert kept == [1.0, 0.75, 0.25] and pruner.target == 0.75  # halfway ceil(4 * (1 - 0.375)) = 3 of 4 stay


def test_a_copied_model_can_be_attached() -> None:
    model = net()
    pruner = Pruner(schedule=OneShot(final=0.5))
    pruner.attach(model)
    pruner.prepare(5)
    twin = copy.deepcopy(model)
    pruner.attach(twin)
    assert pruner.params[0].weight is twin[0].weight and pruner.kept == 96
    pruner.attach(twin)
    assert pruner.kept == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scorer": "movment", "sparsity": 0.5}, "Did you mean 'movement'"),
        ({"schedule": "cubic"}, "needs the final sparsity"),
        ({"sparsity": 0.9, "structure": "nm24"}, "sparsity=0.9 contradicts the structure, whose pattern has 0.5"),
        ({"schedule": Cubic(final=0.9), "sparsity": 0.5}, "contradicts"),
        ({"sparsity": 1.5}, r"final=1.5"),
        ({"scorer": "movement", "masking": "hard", "sparsity": 0.5}, "forgets: use masking=frozen"),
        ({"scorer": Movement(), "allocation": "lamp", "sparsity": 0.5}, "squares the scores"),
        ({"overrides": {"0": 1.2}, "sparsity": 0.5}, "overrides: 0=1.2"),
        ({"misfit": "pad", "sparsity": 0.5}, "neither 'error' nor 'dense'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruner(**arguments)


def test_wrong_types_and_uses() -> None:
    with pytest.raises(TypeError, match="scorer must be a name or a Scorer"):
        Pruner(scorer=3, sparsity=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Pruner has no argument 'exclud'\. Did you mean 'exclude'"):
        Pruner(sparsity=0.5, exclud=["0"])  # type: ignore[call-arg]
    pruner = Pruner(sparsity=0.5)
    with pytest.raises(TypeError, match=r"attach takes a torch.nn.Module, not a generator"):
        pruner.attach(net().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call attach"):
        pruner.before_step(0, 10)
    pruner.attach(net())
    with pytest.raises(ValueError, match="length of training is not known"):
        pruner.before_step(0)
    with pytest.raises(ValueError, match="set max_epochs"):
        pruner.prepare(float("inf"))
    Pruner(schedule=OneShot(final=0.5, begin="3 steps", end="3 steps")).prepare(float("inf"))


def test_misfits_are_named_or_left_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"0.weight of shape 8x3x3x3 .*input dimension 3 is not divisible by m=4"):
        Pruner(sparsity=0.5, structure="nm24").attach(model)
    pruner = Pruner(sparsity=0.5, structure="nm24", misfit="dense")
    pruner.attach(model)
    assert [p.name for p in pruner.params] == ["1.weight"] and "not divisible" in pruner.skipped["0.weight"]


def test_channels_spare_the_last_layer_unless_told() -> None:
    for last, names in ((None, ["0.weight"]), (True, ["0.weight", "2.weight"])):
        pruner = Pruner(sparsity=0.5, structure="channel", last=last)
        pruner.attach(net())
        assert [param.name for param in pruner.params] == names


def test_a_mask_is_saved_as_bits_and_none_where_nothing_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(50, 33), nn.Linear(33, 3))
    pruner = Pruner(sparsity=0.8, include=["0", "1"])
    pruner.attach(model)
    dense = pruner.state_dict()
    assert sum(tensors["mask"].numel() for tensors in dense["params"].values()) == 0
    pruner.params[0].set_mask(torch.rand(33, 50) < 0.5)
    state = pruner.state_dict()
    assert state["params"]["0.weight"]["mask"].numel() == -(-33 * 50 // 8)
    earlier = {**state, "version": 2, "params": {}}  # bools, and no shape
    for param in pruner.params:
        earlier["params"][param.name] = {"pruned": param.pruned, "mask": param.mask.clone()}
    for saved in (state, earlier):
        other = Pruner(sparsity=0.8)
        other.attach(copy.deepcopy(model))
        other.load_state_dict(saved)
        for one, two in zip(other.params, pruner.params, strict=True):
            assert torch.equal(one.mask, two.mask) and one.pruned == two.pruned
    other.load_state_dict(dense)
    assert other.sparsity == 0 and not other.params[0].pruned and bool(other.params[0].mask.all())
