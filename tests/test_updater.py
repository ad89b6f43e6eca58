"""Dynamic masks against loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pl_sparse import Pruner
from pl_sparse.schedule import Constant, Cubic, OneShot
from pl_sparse.updater import DropGrow, Splice


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def steps(pruner: Pruner, model: nn.Module, total: int, optimizer: torch.optim.Optimizer) -> Any:
    """Train; yields before each optimizer step the step and what there was: masks, weights, gradients."""
    generator = torch.Generator().manual_seed(2)
    pruner.prepare(total)
    for step in range(total):
        x = torch.randn(16, 12, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :8].sin()).square().mean().backward()
        before = [
            (p.mask.clone(), p.weight.detach().clone(), p.grad.clone()) for p in pruner.params if p.grad is not None
        ]
        pruner.before_step(step, total, optimizer)
        optimizer.step()
        pruner.after_step(optimizer)
        yield step, before


def naive(mask: torch.Tensor, weight: torch.Tensor, grow: torch.Tensor, fraction: float) -> torch.Tensor:
    """RigL's Algorithm 1 with lists: drop the smallest of the kept, grow the largest of all that is not kept."""
    kept = [i for i in range(mask.numel()) if mask.view(-1)[i]]
    count = int(fraction * len(kept))
    kept.sort(key=lambda i: -abs(float(weight.view(-1)[i])))
    stay = set(kept[: len(kept) - count])
    rest = sorted((i for i in range(mask.numel()) if i not in stay), key=lambda i: -float(grow.view(-1)[i]))
    chosen = stay | set(rest[:count])
    return torch.tensor([i in chosen for i in range(mask.numel())]).reshape(mask.shape)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_rigl_against_lists(kind: str) -> None:
    model = net()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), 0.01)
    )
    pruner = Pruner("magnitude", Constant(final=0.8, end=0.75, every=5), allocation="erk", updater=DropGrow())
    pruner.attach(model)
    counts: list[int] = []
    biases: list[torch.Tensor] = []
    for step, before in steps(pruner, model, 40, optimizer):
        counts = counts or [p.kept for p in pruner.params]
        assert [p.kept for p in pruner.params] == counts  # to the unit, tensor by tensor
        fraction = 0.15 * (1 + math.cos(math.pi * step / 30))
        for param, (mask, weight, grad) in zip(pruner.params, before, strict=True):
            updated = 0 < step <= 30 and step % 5 == 0
            assert torch.equal(param.mask, naive(mask, weight, grad.abs(), fraction) if updated else mask)
            if updated:  # the update takes the place of the step: kept weights stay as they are, grown ones are zero
                assert torch.equal(param.weight, torch.where(param.mask & mask, weight, 0.0))
            state = optimizer.state[param.weight]
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if name in state:
                    assert not state[name][~mask & param.mask].any() or not updated
        if step and step <= 30 and step % 5 == 0:
            assert torch.equal(biases[-1], model[0].bias)
        biases.append(model[0].bias.detach().clone())
    assert not torch.equal(biases[5], biases[6])


def test_set_grows_at_random_and_takes_the_step() -> None:
    def run() -> list[torch.Tensor]:
        model = net()
        updater = DropGrow(grow="random", decay="constant", skip_step=False)
        pruner = Pruner("magnitude", Constant(final=0.8, every=4), allocation="erk", updater=updater)
        pruner.attach(model)
        masks = []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step, before in steps(pruner, model, 20, optimizer):
            mask, weight, _ = before[0]
            masks.append(pruner.params[0].mask.clone())
            if step and step % 4 == 0:
                kept = pruner.params[0].kept
                lost = mask & ~pruner.params[0].mask
                assert 0 < int(lost.sum()) <= int(0.3 * kept)
                smallest = weight[mask].abs().sort().values[int(0.3 * kept) - 1]
                assert float(weight[lost].abs().max()) <= float(smallest)
                grown = pruner.params[0].mask & ~mask
                assert pruner.params[0].weight[grown].any()  # a step from zero was taken
        return masks

    a, b = run(), run()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (
        len({tuple(mask.reshape(-1).tolist()) for mask in a}) == 6
    )  # the first masks and five updates: other weights grow each time


@given(st.floats(0.3, 0.95), st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_sparse_momentum_moves_weights_between_tensors(sparsity: float, fraction: float, seed: int) -> None:
    """The total stays, to the unit; tensors whose kept weights have more momentum grow more."""
    model = net()
    updater = DropGrow(fraction, grow="momentum", redistribute=True, skip_step=False, seed=seed)
    pruner = Pruner("magnitude", Constant(final=sparsity, every=3), allocation="uniform", updater=updater)
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    total = math.floor((1 - sparsity) * 400 + 0.5)
    average: list[torch.Tensor] = []
    for step, before in steps(pruner, model, 10, optimizer):
        grads = [grad for _, _, grad in before]
        average = [a.lerp(g, 0.1) for a, g in zip(average, grads, strict=True)] if average else grads
        assert abs(pruner.kept - total) <= 1 and sum(int(p.mask.sum()) for p in pruner.params) == pruner.kept
        for param, mean in zip(pruner.params, average, strict=True):
            assert torch.allclose(param.state["momentum"], mean)
        if step == 3 and 0.1 < fraction < 0.5 and sparsity > 0.6:
            kept = [int(mask.sum()) for mask, _, _ in before]
            dropped = [int(updater.rate(3 / 9) * n) for n in kept]
            means = [float(a.abs()[mask].mean()) for a, (mask, _, _) in zip(average, before, strict=True)]
            for i, param in enumerate(pruner.params):
                grown = param.kept - kept[i] + dropped[i]
                assert abs(grown - sum(dropped) * means[i] / sum(means)) <= 2


def test_splicing_has_hysteresis() -> None:
    """A threshold t exists with: kept and below 0.9 t is cut, cut and at 1.1 t or more is spliced, between nothing "
    "changes."""
    model = net()
    schedule = Cubic(final=0.7, end=0.8, every=3)
    pruner = Pruner("magnitude", schedule, allocation="global", updater=Splice())
    pruner.attach(model)
    spliced = 0
    for step, before in steps(pruner, model, 60, torch.optim.SGD(model.parameters(), 0.3)):
        if step % 3 or step > 48:
            continue
        old = torch.cat([mask.reshape(-1) for mask, _, _ in before])
        new = torch.cat([p.mask.reshape(-1) for p in pruner.params])
        spliced += int((new & ~old).sum())
        level = float(schedule.levels(step, 60)[0])
        assert int(new.sum()) == math.floor((1 - level) * 400 + 0.5)
    assert spliced > 0

    param = pruner.params[0]
    scores = torch.tensor([0.95, 1.05, 0.89, 1.2, 1.0, 0.5, 2.0, 3.0])
    kept = torch.tensor([True, False, True, False, True, False, True, False])
    layer = nn.Linear(8, 1, bias=False)
    pruner = Pruner("magnitude", Constant(final=0.375), allocation="global", updater=Splice())
    pruner.attach(layer)
    param = pruner.params[0]
    param.set_mask(kept.view(1, 8))
    param.latent = scores.view(1, 8).clone()
    pruner.prepare(10)
    # 5 stay: 0.95 / 0.9, 1.2 / 1.1, 1.0 / 0.9, 2.0 / 0.9 and 3.0 / 1.1; 1.05 / 1.1 does not come in, 0.89 / 0.9 goes
    assert param.mask.tolist() == [[True, False, False, True, True, False, True, True]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"updater": DropGrow(), "masking": "ste", "schedule": "constant"}, "sparse weights alone"),
        ({"updater": "splice", "masking": "hard"}, "masking=ste or auto"),
        ({"updater": "drop_grow", "schedule": "cubic"}, "schedule=constant"),
        ({"updater": "drop_grow", "schedule": "constant", "structure": "nm24"}, "masking=srste"),
        (
            {"updater": "drop_grow", "schedule": OneShot(final=0.5, rounds=3)},
            "which schedule=oneshot changes: use schedule=constant",
        ),
    ],
)
def test_combinations_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruner(sparsity=0.5, **arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DropGrow(1.5),
        lambda: DropGrow(decay="step"),  # type: ignore[arg-type]
        lambda: DropGrow(grow="magic"),  # type: ignore[arg-type]
        lambda: DropGrow(redistribute=True),
        lambda: Splice(1.2, 1.3),
    ],
)
def test_bad_values(make: Any) -> None:
    with pytest.raises(ValueError):
        make()
