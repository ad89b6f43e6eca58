"""Methods of 2018 to 2024 against naive versions written from their papers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from references import admm, dropgrow, lagrangian, reparameterized, surgeon
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.allocation import kept
from pl_sparse.core.targets import find
from pl_sparse.masking import SRSTE, SSTE, Powerprop
from pl_sparse.network.probe import Probe
from pl_sparse.regularizer import ADMM
from pl_sparse.schedule import Constant, Cubic, OneShot
from pl_sparse.scorer import Fisher, HardConcrete, SoftMovement
from pl_sparse.structure import NM, Channel, Structure, Unstructured
from pl_sparse.updater import ITOP, Lagrangian, SRigL, Surgeon

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
    pruner = Pruner(HardConcrete(lr=0.2), schedule, structure, "global", Lagrangian(rate=70.0))
    pruner.attach(model)
    pruner.prepare(STEPS)
    rate = 70.0 / (pruner._clock.span[1] - pruner._clock.span[0])
    gates = [group.gate for group in pruner.groups if group.gate is not None]
    seen: list[Tensor] = []

    def descend(gate: Any) -> None:
        gate.correlation = lambda: torch.zeros_like(gate.value)  # the penalty alone
        gate.step = lambda gradient: (seen.append(gradient), gate.value.data.sub_(gradient.sign(), alpha=0.2))

    for gate in gates:
        descend(gate)
    lambdas = torch.zeros(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gap, expected = 0.0, list[Tensor]()
    for _ in steps(model, pruner, optimizer):
        assert len(seen) in (0, len(expected)) and all(map(torch.allclose, seen, expected))
        lambdas += rate * torch.tensor([gap, gap**2], dtype=torch.float64) if seen else 0.0
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


def test_multipliers_ascend_as_far_however_long_training_is() -> None:
    """A gap that stays moves lambda1 by rate times it over a schedule of 20 steps and of 200."""
    moved = []
    for count in (20, 200):
        model = net()
        pruner = Pruner(
            HardConcrete(), Cubic(final=0.6, initial=0.6, begin=0, end=1.0, every=1), updater=Lagrangian(5.0)
        )
        pruner.attach(model)
        pruner.prepare(count)
        for gate in (gate for group in pruner.groups if (gate := group.gate) is not None):
            gate.step = lambda gradient: None  # type: ignore[method-assign]
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        for _ in steps(model, pruner, optimizer, count):
            pass
        gate = pruner.groups[0].gate
        assert gate is not None and gate.multipliers is not None
        gap = 1 - float(sum(pruner.scorer.expected(group) for group in pruner.groups)) / pruner.numel - 0.6
        assert float(gate.multipliers[0]) == pytest.approx(5.0 * gap, rel=2 / count)
        moved.append(float(gate.multipliers[0]))
    assert moved[0] == pytest.approx(moved[1], rel=0.1) and moved[0] < -1


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


# Reparameterized weights


def test_powerprop_is_autograds() -> None:
    model, reference = net().double(), net().double()
    pruner = Pruner("magnitude", OneShot(final=0.5, begin=0.5), allocation="global", masking=Powerprop(alpha=3.0))
    pruner.attach(model)
    pruner.prepare(STEPS)
    layers = [layer for layer in reference if isinstance(layer, nn.Linear)]
    values = [nn.Parameter(layer.weight.detach().sign() * layer.weight.detach().abs() ** (1 / 3)) for layer in layers]
    masks = [torch.ones_like(value) for value in values]
    biases = [layer.bias for layer in layers]
    inner = torch.optim.SGD([*values, *biases], 0.05, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step, x in steps(model, pruner, optimizer):
        weights = {
            f"{2 * i}.weight": reparameterized.power(value, 3.0) * mask
            for i, (value, mask) in enumerate(zip(values, masks, strict=True))
        }
        for param, weight in zip(pruner.params, weights.values(), strict=True):
            assert torch.allclose(param.weight, weight, atol=1e-12)
        inner.zero_grad()
        loss(torch.func.functional_call(reference, weights, x)).backward()
        if step == STEPS // 2:  # masks are set before the step that they are due at
            bound = torch.cat([value.abs().flatten() for value in values]).quantile(0.5)
            masks = [(value.abs() > bound).double() for value in values]
            for value, mask in zip(values, masks, strict=True):
                assert value.grad is not None
                value.grad *= mask
        inner.step()
    assert pruner.sparsity == 0.5


def test_sste_is_the_papers() -> None:
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner("magnitude", Constant(final=0.5, every=1, end=1.0), "nm24", "uniform", masking=SSTE())
    pruner.attach(model)
    latent = [param.weight.detach().clone() for param in pruner.params]
    betas = [reparameterized.scale(v, reparameterized.soft(v, 2, 4)) for v in latent]
    velocities = [torch.zeros_like(v) for v in latent]
    pruner.prepare(STEPS)
    for _, x in steps(model, pruner, optimizer):
        for param, v, beta in zip(pruner.params, latent, betas, strict=True):
            assert torch.allclose(param.weight, beta * reparameterized.soft(v, 2, 4), atol=1e-2 * float(v.abs().max()))
            assert torch.allclose(param.weight, param.state["beta"] * reparameterized.soft(v, 2, 4), atol=1e-12)
        gradients = torch.autograd.grad(loss(model(x)), [param.weight for param in pruner.params])
        for v, velocity, gradient in zip(latent, velocities, gradients, strict=True):
            velocity.mul_(0.9).add_(gradient)
            v.sub_(velocity, alpha=0.1)
    with pytest.raises(ValueError, match="masking=sste has groups of m=8, structure=1:4 others"):
        Pruner(structure="nm14", masking=SSTE(m=8))


# The alternating direction method of multipliers


def test_admm_is_the_papers() -> None:
    model = net().double()
    penalty = ADMM(strength=0.3, sparsity=0.7, every=4)
    params = find(model)
    groups = penalty.groups(params, model)
    penalty.start(groups)
    weights = [param.weight for param in params]
    numel = sum(weight.numel() for weight in weights)
    naive = admm.Naive([w.detach() for w in weights], kept(0.7, numel))
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)
    off = []
    for step, x in enumerate(batches(40)):
        optimizer.zero_grad()
        loss(model(x.double())).backward()
        before = [w.grad.clone() for w in weights if w.grad is not None]
        with torch.no_grad():
            penalty.add_gradient(groups, step)
        if step and step % 4 == 0:
            naive.update([w.detach() for w in weights])
        for weight, own, expected in zip(weights, before, naive.gradients(weights, 0.3), strict=True):
            assert weight.grad is not None and torch.allclose(weight.grad, own + expected, atol=1e-12)
        if step == 20:  # a training that goes on
            again = ADMM(strength=0.3, sparsity=0.7, every=4)
            again.load_state_dict(penalty.state_dict())
            penalty = again
        off.append(sum(float((w.detach() - z).square().sum()) for w, z in zip(weights, naive.z, strict=True)))
        optimizer.step()
    assert off[-1] < off[0] / 20  # the weights have come to the sparse set


def test_admm_draws_to_any_structure() -> None:
    model = net(8)
    penalty = ADMM(strength=1.0, sparsity=0.5, structure=NM(2, 4), every=2)
    groups = penalty.groups(find(model), model)
    penalty.start(groups)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for step, x in enumerate(batches(60)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        with torch.no_grad():
            penalty.add_gradient(groups, step)
        optimizer.step()
    for group in groups:
        for param, _ in group.members:
            fours = param.weight.detach().abs().unflatten(1, (-1, 4)).sort(-1).values
            assert float(fours[..., :2].max()) < 0.03 < float(fours[..., 3].mean())


# The optimal BERT surgeon


def test_the_surgeon_is_the_papers() -> None:
    model = net(9).double()
    data = [x.double() for x in batches(6)]
    updater, scorer = Surgeon(block=16, damping=1e-3), Fisher(block=16, damping=1e-3)
    pruner = Pruner(scorer, OneShot(final=0.6, begin=0.0), allocation="global", updater=updater)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.dim() > 1}
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    for x in data:
        for name, g in zip(
            before, torch.autograd.grad(loss(model(x)), [model.get_parameter(n) for n in before]), strict=True
        ):
            gradients[name].append(g.flatten())
    places, scores, inverses = [], [], {}
    for name, weight in before.items():
        flat = weight.flatten()
        for start in range(0, len(flat), 16):
            block = slice(start, start + 16)
            inverses[name, start] = surgeon.inverse(torch.stack([g[block] for g in gradients[name]]), 1e-3)
            for q, w in enumerate(flat[block].tolist()):
                places.append((name, start, q))
                scores.append(w**2 / (2 * float(inverses[name, start][q, q])))
    order = sorted(range(len(places)), key=lambda i: -scores[i])
    gone = {places[i] for i in order[kept(0.6, len(places)) :]}

    pruner.attach(model)
    pruner.prepare(4, probe=Probe(model, data, lambda x: loss(model(x))))
    for param in pruner.params:
        for start in range(0, param.numel, 16):
            block = slice(start, start + 16)
            out = [q for q in range(16) if (param.name, start, q) in gone]
            new = surgeon.removed(before[param.name].flatten()[block], inverses[param.name, start], out)
            assert torch.allclose(param.weight.detach().flatten()[block], new, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(p.weight, before[p.name] * p.mask) for p in pruner.params)


# The decay of SR-STE


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_stays_masked_falls_by_the_efolds_that_are_asked_for(momentum: float) -> None:
    layer = nn.Linear(8, 4, bias=False).double()
    pruner = Pruner("magnitude", OneShot(final=0.5), "nm24", masking=SRSTE("3 efolds"))
    behind = layer.weight.detach().clone()
    pruner.attach(layer)
    pruner.prepare(1000)
    optimizer = torch.optim.SGD(layer.parameters(), 0.2, momentum=momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000, eta_min=0.02)
    mask = pruner.params[0].mask.clone()
    for step in range(1000):
        layer.weight.grad = torch.zeros_like(layer.weight)
        pruner.before_step(step, 1000, optimizer)
        optimizer.step()
        pruner.after_step()
        scheduler.step()
    left = (pruner.params[0].values / behind)[~mask]
    assert torch.allclose(left.log(), torch.full_like(left, -3.0), atol=0.06)


def test_efolds_are_of_sgd() -> None:
    layer = nn.Linear(8, 4, bias=False)
    pruner = Pruner("magnitude", OneShot(final=0.5), "nm24", masking=SRSTE("3 efolds"))
    pruner.attach(layer)
    layer(torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError, match="counts e-folds of SGD, and Adam divides"):
        pruner.before_step(0, 10, torch.optim.Adam(layer.parameters()))
    with pytest.raises(ValueError, match="decay='fast' is not a decay"):
        SRSTE("fast")
