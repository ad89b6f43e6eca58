"""Methods of 2018 to 2024 against naive versions written from their papers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from references import dropgrow, lagrangian
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.allocation import kept
from pl_sparse.schedule import Constant, Cubic
from pl_sparse.scorer import HardConcrete, SoftMovement
from pl_sparse.structure import Channel, Row, Structure, Unstructured
from pl_sparse.updater import ITOP, Lagrangian, SRigL

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


# Dropping and growing


@pytest.mark.parametrize("salient", [0.0, 0.3, 0.7])
def test_srigl_is_the_papers(salient: float) -> None:
    """One update of three tensors whose weights are made so that outputs of the first have none that matter."""
    model = net(12)
    updater = SRigL(fraction=0.4, decay="constant", salient=salient, skip_step=False)
    pruner = Pruner("magnitude", Constant(final=0.5, every=2, end=1.0), "row", "uniform", updater)
    pruner.attach(model)
    pruner.prepare(4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    lost = 0
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        masks = [param.mask.clone() for param in pruner.params]
        gradients = []
        for param in pruner.params:
            faint = torch.ones(len(param.weight), 1)
            faint[: len(faint) // 2] = 1e-3  # half of the outputs matter little: n weights are 2 n per other output
            param.weight.data = torch.randn(param.shape, generator=generator) * faint * param.mask
            param.weight.grad = torch.randn(param.shape, generator=generator) * faint
            gradients.append(param.weight.grad.clone())
        values = [param.weight.detach().clone() for param in pruner.params]
        pruner.before_step(step, 4, optimizer)
        if step == 2:
            for i, param in enumerate(pruner.params):
                drop = int(0.4 * int(masks[i].sum()))
                expected = dropgrow.srigl(values[i], gradients[i], masks[i], drop, salient, i == 2)
                assert torch.equal(param.mask, expected)
                lost += int((~param.mask.any(1)).sum())
            assert pruner.sparsity == 0.5
        optimizer.step()
        pruner.after_step()
    assert (lost > 0) is (salient > 0)


def test_itop_counts_what_was_ever_kept() -> None:
    model = net(12)
    pruner = Pruner("magnitude", Constant(final=0.8, every=2, end=1.0), updater=ITOP())
    pruner.attach(model)
    pruner.prepare(STEPS)
    ever = [param.mask.clone() for param in pruner.params]
    for _ in steps(model, pruner, torch.optim.SGD(model.parameters(), 0.1)):
        ever = [seen | param.mask for seen, param in zip(ever, pruner.params, strict=True)]
    ever = [seen | param.mask for seen, param in zip(ever, pruner.params, strict=True)]
    assert pruner.facts["explored"] == sum(int(seen.sum()) for seen in ever) / pruner.numel
    assert pruner.facts["explored"] > 0.25
