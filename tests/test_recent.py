"""Methods of 2018 to 2024 against naive versions written from their papers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from references import lagrangian
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.allocation import kept
from pl_sparse.schedule import Cubic
from pl_sparse.scorer import HardConcrete, SoftMovement
from pl_sparse.structure import Channel, Structure, Unstructured
from pl_sparse.updater import Lagrangian

STEPS = 24


def net(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def batches(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 8, generator=generator) for _ in range(count)]


def loss(out: Tensor) -> Tensor:
    return (out**2).mean() + out.sin().mean()


def steps(model: nn.Module, pruner: Pruner, optimizer: Any, count: int = STEPS) -> Iterator[tuple[int, Tensor]]:
    """Train; yields before each forward pass, when samples are drawn."""
    for step, x in enumerate(batches(count)):
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        pruner.before_forward()
        yield step, x
        loss(model(x)).backward()
        pruner.before_step(step, count, optimizer)
        optimizer.step()
        pruner.after_step()


# The Lagrangian


@pytest.mark.parametrize("structure", [Unstructured(), Channel()])
def test_gates_descend_and_multipliers_ascend(structure: Structure) -> None:
    model, target = net().double(), 0.6
    schedule = Cubic(final=target, end=1.0, every=1)
    pruner = Pruner(HardConcrete(lr=0.2), schedule, structure, "global", Lagrangian(rate=3.0))
    pruner.attach(model)
    pruner.prepare(STEPS)
    gates = [group.gate for group in pruner.groups if group.gate is not None]
    seen: list[Tensor] = []

    def descend(gate: Any) -> None:
        gate.correlation = lambda: torch.zeros_like(gate.value)  # the penalty alone
        gate.step = lambda gradient: (seen.append(gradient), gate.value.data.sub_(gradient.sign(), alpha=0.2))

    for gate in gates:
        descend(gate)
    lambdas = torch.zeros(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected: list[Tensor] = []
    for _ in steps(model, pruner, optimizer):
        assert len(seen) in (0, len(expected)) and all(map(torch.allclose, seen, expected))
        lambdas += 3.0 * torch.tensor([gap, gap**2], dtype=torch.float64) if seen else 0.0
        alphas = [gate.value.detach().clone().requires_grad_() for gate in gates]
        terms, difference = lagrangian.constraint(alphas, [gate.size for gate in gates], lambdas, pruner.level)
        gap, expected = float(difference.detach()), list(torch.autograd.grad(terms, alphas))
        if seen:
            assert gates[-1].multipliers is not None and torch.allclose(gates[-1].multipliers, lambdas)
        seen.clear()
    assert float(lambdas[0].abs()) > 0.1 and float(lambdas[1]) > 0.1


@pytest.mark.parametrize("structure", [Unstructured(), Channel()])
@pytest.mark.parametrize("scorer", [HardConcrete(lr=0.1), SoftMovement(lr=0.1)])
def test_learned_masks_meet_the_sparsity_that_is_asked_for(scorer: Any, structure: Structure) -> None:
    model = net(20)
    pruner = Pruner(scorer, Cubic(final=0.8, every=1), structure, "global", "lagrangian")
    pruner.attach(model)
    pruner.prepare(200)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in steps(model, pruner, optimizer, 200):
        pass
    unit = max(group.gate.size for group in pruner.groups if group.gate is not None)
    zeros = sum(int((param.weight == 0).sum()) for param in pruner.params)
    assert abs(pruner.numel - zeros - kept(0.8, pruner.numel)) <= unit / 2
    if isinstance(scorer, HardConcrete) and isinstance(structure, Unstructured):
        open_ = float(sum(scorer.expected(group) for group in pruner.groups)) / pruner.numel
        assert abs(open_ - 0.2) < 0.15  # samples are as sparse as masks: 0.83 at first


def test_a_threshold_at_a_sparsity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"updater=threshold .* 0\.8 .* updater=lagrangian meets it"):
        Pruner("hardconcrete", updater="threshold", sparsity=0.8)
    with pytest.raises(ValueError, match="scorer=magnitude does not learn: use scorer=hardconcrete"):
        Pruner("magnitude", updater="lagrangian", sparsity=0.8)
