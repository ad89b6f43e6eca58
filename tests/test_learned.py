"""Learned masks (L0, STR, soft movement) against autograd and loops written from the papers."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from references.movement import Straight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.allocation import Global
from pl_sparse.core.gate import Gate, open_probability, slope, stretched
from pl_sparse.core.targets import find
from pl_sparse.schedule import Constant, Cubic
from pl_sparse.scorer import HardConcrete, Magnitude, SoftMovement, SoftThreshold
from pl_sparse.structure import Channel, Feature, Head, Structure, Unstructured
from pl_sparse.updater import Threshold, Update

STEPS = 25


def net(convolution: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    if convolution:
        layers = [nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)]
        return nn.Sequential(nn.Unflatten(1, (1, 3, 3)), *layers).double()
    return nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def batches(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 9, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss(out: Tensor) -> Tensor:
    return (out**2).mean() + out.sin().mean()


def steps(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Train; yields before each forward pass, when the sample is drawn, and goes on to the end of the step."""
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        pruner.before_forward()
        yield step, x
        loss(model(x)).backward()
        pruner.before_step(step, STEPS, optimizer)
        optimizer.step()
        pruner.after_step()


# The hard concrete distribution


def test_gates_are_those_of_the_paper() -> None:
    for alpha in (-4.0, -2.5, -1.0, 0.0, 0.7, 3.0):
        s = 1 / (1 + math.exp(-alpha))
        assert float(stretched(torch.tensor(alpha, dtype=torch.float64))) == pytest.approx(s * 1.2 - 0.1)
        assert float(open_probability(torch.tensor(alpha, dtype=torch.float64))) == pytest.approx(
            1 / (1 + math.exp(-(alpha - 2 / 3 * math.log(0.1 / 1.1))))
        )
        for u in (0.01, 0.4, 0.97):
            s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha) / (2 / 3)))
            value = stretched(torch.tensor(alpha, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
            assert float(value) == pytest.approx(s * 1.2 - 0.1)


def test_slopes_are_autograds() -> None:
    alpha = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    for noise in (None, torch.rand(41, dtype=torch.float64)):
        (expected,) = torch.autograd.grad(stretched(alpha, noise).clamp(0, 1).sum(), alpha)
        assert torch.allclose(slope(alpha.detach(), noise), expected, atol=1e-14)


def test_samples_are_open_as_often_as_they_should_be() -> None:
    layer = nn.Linear(100, 100)
    pruner = Pruner(HardConcrete(keep=0.3), Constant(final=1.0, every=1), updater=Threshold())
    pruner.attach(layer)
    pruner.prepare(10)
    pruner.before_forward()
    gate = pruner.groups[0].gate
    assert gate is not None and gate.sample is not None
    expected = float(open_probability(gate.value.detach()).mean())
    assert float((gate.sample > 0).double().mean()) == pytest.approx(expected, abs=0.015)
    full = torch.sigmoid(gate.value.detach() + 2 / 3 * math.log(0.1 / 1.1)).mean()  # by the symmetry of the limits
    assert float((gate.sample == 1).double().mean()) == pytest.approx(float(full), abs=0.01)
    assert pruner.scorer.facts(pruner.groups)["expected_sparsity"] == pytest.approx(1 - expected)
    assert pruner.sparsity == 0  # sigmoid(log alpha) = 0.3 is above 1/12


# L0 against a model that has its gates inside


@pytest.mark.parametrize("structure", [Unstructured(), Channel(), Feature()])
def test_l0_is_autograds_l0(structure: Structure) -> None:
    model, reference = net(convolution=True), net(convolution=True)
    scorer = HardConcrete(penalty=3e-3, lr=0.2, keep=0.4)
    pruner = Pruner(scorer, Constant(final=1.0, end=1.0, every=1), structure, updater=Threshold())
    pruner.attach(model)
    pruner.prepare(STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    gates = [group.gate for group in pruner.groups]
    assert all(isinstance(gate, Gate) for gate in gates)
    layers = [1, 4] if not structure.removes_outputs else [1]  # the last layer stays dense under channels
    weights = [reference[i].weight for i in layers]
    alphas = [nn.Parameter(gate.value.detach().clone()) for gate in gates if gate is not None]
    outer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    inner = torch.optim.Adam(alphas, 0.2)

    def shaped(z: Tensor, weight: Tensor) -> Tensor:
        if isinstance(structure, Unstructured):
            return z
        if weight.dim() == 4:
            return z[:, None, None, None]
        return z[:, None] if isinstance(structure, Channel) else z[None, :]

    shut = 0
    for _, x in steps(model, pruner, optimizer):
        drawn, price = {}, torch.zeros((), dtype=torch.float64)
        for i, alpha, gate, weight in zip(layers, alphas, gates, weights, strict=True):
            assert gate is not None and gate.noise is not None
            u = gate.noise
            s = torch.sigmoid(((u / (1 - u)).log() + alpha) / (2 / 3))
            z = (s * 1.2 - 0.1).clamp(0, 1)
            drawn[f"{i}.weight"] = shaped(z, weight) * weight
            probability = torch.sigmoid(alpha - 2 / 3 * math.log(0.1 / 1.1))
            price = price + 3e-3 * probability.sum() * weight.numel() / alpha.numel()
            assert torch.allclose(model[i].weight, drawn[f"{i}.weight"], atol=1e-10)
        outer.zero_grad()
        inner.zero_grad()
        (loss(torch.func.functional_call(reference, drawn, x)) + price).backward()
        outer.step()
        inner.step()
        with torch.no_grad():
            for alpha in alphas:
                alpha.clamp_(math.log(1e-2), math.log(1e2))
            shut = sum(int((alpha <= math.log(1 / 11)).sum()) for alpha in alphas)
    for i, param, alpha, gate, weight in zip(layers, pruner.params, alphas, gates, weights, strict=True):
        assert gate is not None and param.latent is not None
        assert torch.allclose(gate.value, alpha, atol=1e-10)
        assert torch.allclose(param.latent, weight, atol=1e-10)
        z = (alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1).detach()
        assert torch.allclose(model[i].weight, shaped(z, weight) * weight * param.mask, atol=1e-10)
    assert shut > 0  # else nothing was pruned, and the test saw nothing


def test_a_gate_spans_the_weights_of_a_head() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 4, batch_first=True).double()
    pruner = Pruner(HardConcrete(penalty=0.01, lr=0.1), Constant(final=1.0, every=1), Head(), updater=Threshold())
    pruner.attach(model)
    pruner.prepare(STEPS)
    (gate,) = {group.gate for group in pruner.groups}
    assert gate is not None and gate.value.shape == (4,) and gate.size == 8 * 8 * 4 // 4
    pruner.before_forward()
    assert gate.noise is not None
    alpha = gate.value.detach().clone().requires_grad_()
    z = (torch.sigmoid((gate.noise.logit() + alpha) / (2 / 3)) * 1.2 - 0.1).clamp(0, 1).repeat_interleave(2)
    values = [param.latent.clone() for param in pruner.params if param.latent is not None]
    weights = {"in_proj_weight": z.repeat(3)[:, None] * values[0], "out_proj.weight": z[None, :] * values[1]}
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    out = torch.func.functional_call(model, weights, (x, x, x))[0]
    probability = torch.sigmoid(alpha - 2 / 3 * math.log(0.1 / 1.1))
    (expected,) = torch.autograd.grad((out**2).sum() + 0.01 * gate.size * probability.sum(), alpha)

    seen: list[Tensor] = []
    gate.step = lambda gradient: seen.append(gradient)  # type: ignore[method-assign]
    (model(x, x, x)[0] ** 2).sum().backward()
    pruner.before_step(0)
    assert len(seen) == 1 and torch.allclose(seen[0], expected, atol=1e-10)


def test_accumulation_has_one_sample_and_one_step() -> None:
    def run(parts: int) -> tuple[Tensor, Tensor]:
        model = net()
        pruner = Pruner(HardConcrete(lr=0.1), Constant(final=1.0, every=1), updater=Threshold())
        pruner.attach(model)
        pruner.prepare(STEPS)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step, x in enumerate(batches()):
            optimizer.zero_grad()
            for i, part in enumerate(x.chunk(parts)):
                pruner.before_forward()
                sample = model[0].weight.clone()
                (loss(model(part)) / parts).backward()
                if i == parts - 1:
                    pruner.before_step(step)
                    optimizer.step()
                pruner.after_step()
                assert not torch.equal(model[0].weight, sample)  # between batches the gates are deterministic
        gate = pruner.groups[0].gate
        assert gate is not None and gate.optimizer.state[gate.value]["step"] == STEPS
        return gate.value.detach(), model[0].weight.detach()

    for whole, halves in zip(run(1), run(2), strict=True):
        assert torch.allclose(whole, halves, atol=1e-9)


def test_gates_are_fixed_once_the_schedule_is_over() -> None:
    model = net()
    pruner = Pruner(HardConcrete(lr=0.1), Constant(final=1.0, every=1, end="10 steps"), updater=Threshold())
    pruner.attach(model)
    pruner.prepare(STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for step, _ in steps(model, pruner, optimizer):
        gate = pruner.groups[0].gate
        assert gate is not None and (gate.sample is None) is (step > 10)
        assert pruner.at_target is (step >= 10)
        seen.append(gate.value.detach().clone())
    assert torch.equal(seen[11], seen[-1]) and not torch.equal(seen[9], seen[10])


# Soft thresholds


def test_soft_thresholds_are_autograds() -> None:
    model, reference = net(), net()
    scorer = SoftThreshold(init=-2.5, lr=0.2, momentum=0.6, decay=0.01)
    pruner = Pruner(scorer, Constant(final=1.0, end=1.0, every=1), updater=Threshold())
    pruner.attach(model)
    pruner.prepare(STEPS)
    thresholds = [torch.full((), -2.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.2, momentum=0.9, weight_decay=0.03)  # type: ignore[arg-type]

    outer = optimizer(reference.parameters())
    inner = torch.optim.SGD(thresholds, 0.2, momentum=0.6, weight_decay=0.01)
    for _, x in steps(model, pruner, optimizer(model.parameters())):
        drawn = {}
        for i, s in zip((0, 2), thresholds, strict=True):
            weight = reference[i].weight
            drawn[f"{i}.weight"] = weight.sign() * torch.relu(weight.abs() - s.sigmoid())
            assert torch.allclose(model[i].weight, drawn[f"{i}.weight"], atol=1e-12)
        outer.zero_grad()
        inner.zero_grad()
        loss(torch.func.functional_call(reference, drawn, x)).backward()
        outer.step()
        inner.step()
    for param, learned in zip(pruner.params, thresholds, strict=True):
        s = learned.detach()
        assert float(param.state["threshold"]) == pytest.approx(float(s), abs=1e-10)
        assert param.latent is not None
        assert torch.equal(param.weight == 0, ~param.mask | (param.latent.abs() <= s.sigmoid()))
    assert 0.1 < pruner.sparsity < 0.9


def test_a_threshold_far_below_is_moved_by_its_decay_alone() -> None:
    layer = nn.Linear(4, 3)
    scorer = SoftThreshold(init=-3200.0, lr=0.1, momentum=0.0, decay=0.01)
    pruner = Pruner(scorer, Constant(final=1.0, every=1), updater=Threshold())
    pruner.attach(layer)
    pruner.prepare(STEPS)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for step in range(STEPS):
        pruner.before_forward()
        layer(torch.randn(2, 4)).sum().backward()
        pruner.before_step(step)
        optimizer.step()
        pruner.after_step()
    assert float(pruner.params[0].state["threshold"]) == pytest.approx(-3200 * (1 - 0.1 * 0.01) ** STEPS, rel=1e-5)
    assert pruner.sparsity == 0


# Soft movement


def test_soft_movement_is_the_papers() -> None:
    model, reference = net(), net()
    penalty, tau, rate = 2.0, 0.3, 0.2
    schedule = Cubic(final=1.0, begin="3 steps", end="20 steps", every=1)
    pruner = Pruner(SoftMovement(penalty, rate), schedule, updater=Threshold(tau=tau, minimum=0.05))
    pruner.attach(model)
    pruner.prepare(STEPS)
    scores = [torch.zeros_like(reference[i].weight, requires_grad=True) for i in (0, 2)]
    masks = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    inner = torch.optim.Adam(scores, rate)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    level, sparsities = 0.0, []
    for step, x in steps(model, pruner, optimizer):
        if 3 <= step <= 20:
            level = 1 - (1 - (step - 3) / 17) ** 3
            for score, mask in zip(scores, masks, strict=True):
                for j in range(score.numel()):
                    mask.view(-1)[j] = float(score.detach().view(-1)[j].sigmoid()) > tau * level
        sparsities.append(pruner.sparsity)
        for param, mask in zip(pruner.params, masks, strict=True):
            assert torch.equal(param.mask, mask)
        weights = {f"{i}.weight": Straight.apply(reference[i].weight, s, m) for i, s, m in _three(scores, masks)}
        reference.zero_grad()
        inner.zero_grad()
        price = sum(score.sigmoid().mean() for score in scores) / 2
        (loss(torch.func.functional_call(reference, weights, x)) + penalty * level * price).backward()
        if step <= 20:
            inner.step()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
    for i, param in zip((0, 2), pruner.params, strict=True):
        assert param.latent is not None and torch.allclose(param.latent, reference[i].weight, atol=1e-10)
    assert sparsities[2] == 0 and 0.2 < sparsities[-1] < 0.95 and pruner.at_target


def _three(scores: list[Tensor], masks: list[Tensor]) -> list[tuple[int, Tensor, Tensor]]:
    return list(zip((0, 2), scores, masks, strict=True))


# The updater


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([None, 0.5, 0.75]),
    st.sampled_from([0.5, 1.0]),
)
def test_threshold_against_loops(
    values: list[int], tau: float, minimum: float, at_least: float | None, progress: float
) -> None:
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor(values, dtype=torch.float32).view(3, 4)
    params = find(layer)
    groups = Unstructured().groups(params, layer)
    due = Update(level=0.5, overrides=(None,), monotone=False, progress=progress)
    Threshold(tau, minimum, at_least).update(groups, Magnitude(), Unstructured(), Global(), due)
    order = sorted(range(12), key=lambda i: (-abs(values[i]), i))
    count = max(sum(abs(v) > tau * 0.5 for v in values), math.ceil(minimum * 12))
    if progress == 1.0 and at_least is not None:
        count = min(count, round(12 * (1 - at_least)))
    assert params[0].mask.view(-1).tolist() == [i in order[:count] for i in range(12)]


def test_a_sparsity_can_be_made_sure_of() -> None:
    model = net()
    pruner = Pruner(HardConcrete(), Constant(final=1.0, end=1.0, every=1), updater=Threshold(at_least=0.75))
    pruner.attach(model)
    pruner.prepare(STEPS)
    for step, _ in steps(model, pruner, torch.optim.SGD(model.parameters(), 0.1)):
        assert pruner.sparsity == (0.75 if step == STEPS - 1 else 0) and pruner.target == 0.75
    assert all(not param.weight[~param.mask].any() for param in pruner.params)


def test_bad_combinations_are_refused() -> None:
    schedule = Constant(final=1.0, every=1)
    with pytest.raises(ValueError, match="masking=gated applies what scorer=hardconcrete learns"):
        Pruner("magnitude", schedule, masking="gated")
    with pytest.raises(ValueError, match="knows nothing of the pattern of structure=2:4"):
        Pruner("hardconcrete", schedule, "nm24", updater="threshold")
    with pytest.raises(ValueError, match="overrides are sparsities"):
        Pruner("hardconcrete", schedule, updater="threshold", overrides={"0": 0.5})
    with pytest.raises(ValueError, match="forgets"):
        Pruner("softmovement", schedule, updater="threshold", masking="hard")
    for bad in (lambda: HardConcrete(penalty=-1), lambda: HardConcrete(keep=1.0), lambda: SoftMovement(lr=0)):
        with pytest.raises(ValueError, match="must"):
            bad()
    with pytest.raises(ValueError, match="at_least=1"):
        Threshold(at_least=1.5)
    with pytest.raises(ValueError, match="momentum=1"):
        SoftThreshold(momentum=1.0)

    model = net()
    pruner = Pruner("hardconcrete", schedule, updater="threshold")
    pruner.attach(model)
    with pytest.raises(ValueError, match=r"call prepare\(total\) first"):
        pruner.before_forward()
    pruner.prepare(10)
    loss(model(batches(1)[0])).backward()
    with pytest.raises(ValueError, match=r"call before_forward\(\) before each forward pass"):
        pruner.before_step(0)
    other = Pruner("hardconcrete", schedule, Channel(), updater="threshold", last=True)
    state = {key: value for key, value in pruner.state_dict().items() if key != "settings"}  # of an earlier release
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"another structure: the gates of 0.weight have shape \(6, 9\), here \(6,\)"):
        other.attach(net())


# Lightning


class Watched(LightningModule):
    """Notes whether the weights are the deterministic ones in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net().float()
        self.seen: list[tuple[bool, bool, bool]] = []

    def _note(self) -> None:
        sparsity = Sparsity.of(self.trainer)
        param = sparsity.pruner.params[0]
        gate = sparsity.pruner.groups[0].gate
        assert gate is not None and param.latent is not None
        z = stretched(gate.value.detach()).clamp(0, 1) * param.mask
        self.seen.append((self.training, torch.equal(param.weight, z * param.latent), bool(gate.noise is None)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self._note()
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self._note()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def test_only_training_samples() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 9), torch.randint(0, 5, (64,)))
    module = Watched()
    sparsity = Sparsity(
        scorer=HardConcrete(lr=0.1), schedule=Constant(final=1.0, every=1, end=1.0), updater=Threshold(), report=False
    )
    trainer = Trainer(
        max_epochs=2, accumulate_grad_batches=2, val_check_interval=3, callbacks=[sparsity], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8), DataLoader(data, 32))
    training = [(deterministic, off) for in_training, deterministic, off in module.seen if in_training]
    validation = [deterministic for in_training, deterministic, _ in module.seen if not in_training]
    assert len(training) == 16 and not any(deterministic or off for deterministic, off in training)
    assert len(validation) == 8 and all(validation)  # in the middle of an accumulation too
    assert sparsity.pruner.step == 8 and sparsity.pruner.at_target
    assert 0 < trainer.callback_metrics["expected_sparsity"] < 1


# Gradual N:M


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_gradual_nm_tightens_one_by_one(n: int, m: int) -> None:
    layer = nn.Linear(16, 8)
    pruner = Pruner("magnitude", Cubic(final=1 - n / m, end="90 steps", every=1), f"{n}:{m}")
    pruner.attach(layer)
    pruner.prepare(100)
    seen = []
    for step in range(100):
        pruner.before_step(step)
        pruner.after_step()
        groups = pruner.params[0].mask.view(-1, m).sum(1).unique().tolist()
        assert len(groups) == 1  # all groups are alike
        seen.append(groups[0])
    assert seen == sorted(seen, reverse=True)
    assert list(dict.fromkeys(seen)) == list(range(m, n - 1, -1))
