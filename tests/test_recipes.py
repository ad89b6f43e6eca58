"""Methods against independent versions of the recipes that they were published with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from references import dropgrow, movement, posttraining
from test_contract import compose, pattern
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.allocation import OWL
from pl_sparse.callbacks import Rewind
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.targets import find
from pl_sparse.network.probe import Probe
from pl_sparse.schedule import Constant, Cyclic, Linear, OneShot, Tickets
from pl_sparse.scorer import RIA, SNIP, GraSP, HardConcrete, Movement, Scorer, SoftMovement, Taylor
from pl_sparse.updater import DropGrow, GraNet

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}
SECOND = {"exp_avg_sq", "square_avg", "sum"}


@dataclass(frozen=True)
class Fickle(Scorer):
    """Other scores at each update, from torch's generator."""

    def score(self, param: MaskedParameter) -> Tensor:
        return torch.rand(param.shape)


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    first, second, third = sizes or (8, 16, 4)
    return nn.Sequential(nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third))


def batches(count: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(10, size, generator=generator) for _ in range(count)]


def loss(out: Tensor) -> Tensor:
    return (out**2).mean() + out.sin().mean()


# The optimizer's memory of weights that return


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_weights_keep_what_the_optimizer_remembers(kind: str) -> None:
    """Masks that change at each step, against a loop whose optimizer sees mask * weight and mask * gradient."""
    model, naive = net(), net()
    pruner = Pruner(Fickle(), Constant(final=0.5, every=1), masking="frozen")
    pruner.attach(model)
    optimizer, reference = (OPTIMIZERS[kind](m.parameters()) for m in (model, naive))
    pruner.prepare(12)
    for step, x in enumerate(batches(12)):
        latent = {i: naive[i].weight.detach().clone() for i in (0, 2)}
        optimizer.zero_grad()
        loss(model(x)).backward()
        gradients = [p.weight.grad.clone() for p in pruner.params if p.weight.grad is not None]
        pruner.before_step(step, 12, optimizer)
        optimizer.step()
        pruner.after_step()
        masks = {i: param.mask for i, param in zip((0, 2), pruner.params, strict=True)}
        for i, gradient in zip((0, 2), gradients, strict=True):
            naive[i].weight.data = latent[i] * masks[i]
            naive[i].weight.grad = gradient * masks[i]
            naive[i].bias.grad = model[i].bias.grad.clone()
        reference.step()
        for i, param in zip((0, 2), pruner.params, strict=True):
            naive[i].weight.data = torch.where(masks[i], naive[i].weight.data, latent[i])
            assert torch.allclose(param.values, naive[i].weight.data, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hard_masks_clear_the_first_moment_alone(kind: str) -> None:
    """Weights that come back begin at zero and without a direction; their rate is what it was."""
    model = net()
    pruner = Pruner(Fickle(), Cyclic(final=0.5, begin=0.25, end=1.0, cycles=2), masking="hard")
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step, x in enumerate(batches(16)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        before = pruner.num_updates
        pruner.before_step(step, 16, optimizer)
        if pruner.num_updates > before and not pruner.params[0].mask.all():
            for param in pruner.params:
                for name, value in optimizer.state[param.weight].items():
                    if value.shape == param.shape:
                        assert bool(value[~param.mask].any()) is (name in SECOND), name
                        assert value[param.mask].all(), name
        optimizer.step()
        pruner.after_step()
    assert pruner.num_updates >= 3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grown_weights_start_with_nothing_remembered(kind: str) -> None:
    """RigL's slots of new connections are zero, all of them."""
    model = net()
    pruner = Pruner("magnitude", Constant(final=0.5, every=5), updater=DropGrow(skip_step=False))
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner.prepare(16)
    for step, x in enumerate(batches(16)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        masks = [param.mask.clone() for param in pruner.params]
        pruner.before_step(step, 16, optimizer)
        for param, mask in zip(pruner.params, masks, strict=True):
            for value in optimizer.state[param.weight].values():
                if value.shape == param.shape:
                    assert not value[param.mask & ~mask].any() and not value[~param.mask].any()
        optimizer.step()
        pruner.after_step()


# Movement


def test_movement_is_the_recipe_of_its_numbers() -> None:
    """Scores under an Adam with the schedule of the weights, clipped with them, and masks at every step."""
    steps, density = 30, 0.4
    model = net().double()
    start = {f"{i}.weight": model[i].weight.detach().clone() for i in (0, 2)}
    biases = {f"{i}.bias": model[i].bias.detach() for i in (0, 2)}
    for i in (0, 2):
        model[i].bias.requires_grad_(False)
    rates = [min(1.0, (step + 1) / 5) * (1 - step / steps) for step in range(steps)]
    data = [4 * x.double() for x in batches(steps)]
    scores, masks = movement.train(
        start,
        [lambda w, x=x: loss(torch.func.functional_call(model, {**w, **biases}, x)) for x in data],
        [density] * steps,
        rates,
        score_lr=0.02,
        lr=0.1,
        clip=0.05,
    )

    schedule = Constant(final=1 - density, every=1, end=1.0)
    pruner = Pruner(Movement(0.02, clip=0.05), schedule, allocation="uniform", masking="frozen")
    pruner.attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, steps - 1)])
    shrunk = 0
    for step, x in enumerate(data):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, steps, optimizer)
        shrunk += float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)) > 0.05
        optimizer.step()
        pruner.after_step()
        scheduler.step()
    assert shrunk > 0
    for group in pruner.groups:
        assert group.gate is not None
        assert torch.allclose(-group.gate.value.detach(), -scores[group.name], atol=1e-6)
        assert torch.equal(group.members[0][0].mask, masks[group.name].bool())


def test_the_preset_of_movement_is_the_recipe() -> None:
    cfg = compose(["method=movement"])
    assert (cfg.scorer.rule, cfg.scorer.lr, cfg.scorer.clip) == ("adam", 0.01, 1.0)
    assert cfg.schedule.every == 1 and cfg.trainer.gradient_clip_val == 1.0 and cfg.lr_schedule.warmup > 0


@pytest.mark.parametrize("scorer", [SoftMovement(penalty=400.0, lr=0.1), HardConcrete(penalty=0.1, lr=0.1)])
def test_a_penalty_acts_under_a_threshold_alone(scorer: SoftMovement | HardConcrete) -> None:
    """With another updater what is kept is asked for, and a default of the scorer must not bend it."""

    def masks(penalty: float, updater: str) -> list[Tensor]:
        model = net()
        final = 1.0 if updater == "threshold" else 0.5
        pruner = Pruner(replace(scorer, penalty=penalty), Constant(final=final, every=1), updater=updater)
        pruner.attach(model)
        pruner.prepare(20)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step, x in enumerate(batches(20)):
            optimizer.zero_grad()
            pruner.before_forward()
            loss(model(x)).backward()
            pruner.before_step(step, 20, optimizer)
            optimizer.step()
            pruner.after_step()
        return [group.gate.value.detach() for group in pruner.groups if group.gate is not None]

    for free, priced in zip(masks(0.0, "prune"), masks(scorer.penalty, "prune"), strict=True):
        assert torch.equal(free, priced)
    for free, priced in zip(masks(0.0, "threshold"), masks(scorer.penalty, "threshold"), strict=True):
        assert not torch.equal(free, priced)


# Dynamic sparse training


def test_rows_drop_and_grow_alike() -> None:
    """RigL with a constant fan-in, against loops over rows."""
    model = net(24, 12, 6)
    pruner = Pruner(
        "magnitude", Constant(final=0.5, every=4), "row", "uniform", DropGrow(fraction=0.5, decay="constant")
    )
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pruner.prepare(20)
    moved = 0
    for step, x in enumerate(batches(20, 24)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        seen = [(p.weight.detach().clone(), p.weight.grad.clone(), p.mask.clone()) for p in pruner.params]  # type: ignore[union-attr]
        before = pruner.num_updates
        pruner.before_step(step, 20, optimizer)
        if pruner.num_updates > before:
            for param, (weight, gradient, mask) in zip(pruner.params, seen, strict=True):
                fan_in = int(mask.sum()) // len(mask)
                assert torch.equal(param.mask, dropgrow.update(weight, gradient, mask, fan_in // 2))
                assert set(param.mask.sum(1).tolist()) == {fan_in}
                moved += int((param.mask & ~mask).sum())
        optimizer.step()
        pruner.after_step()
    assert moved > 20


@pytest.mark.parametrize("grow", ["gradient", "random", "momentum"])
@pytest.mark.parametrize("structure", ["row", "block2x2", "channel"])
def test_growth_keeps_the_structure(structure: str, grow: Any) -> None:
    """Rows that do not divide: as many in each, but for one; no unit is in part."""
    model = net(9, 12, 6)
    updater = DropGrow(fraction=0.4, grow=grow)
    pruner = Pruner("magnitude", Constant(final=0.6, every=3), structure, "uniform", updater, misfit="dense", last=True)
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    kept = None
    for step, x in enumerate(batches(20, 9)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, 20, optimizer)
        optimizer.step()
        pruner.after_step()
        pattern(pruner.structure, pruner)
        assert kept in (None, pruner.kept)
        kept = pruner.kept


# Scores at initialization


class Module(LightningModule):
    """Notes which batches it sees, and trains with dropout and a batch norm."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(p), nn.Linear(24, 3)]
        self.net = nn.Sequential(*layers)
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(int(batch[2][0]))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: LightningModule, *callbacks: Any, epochs: int = 1, folder: Any = None) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y, torch.arange(40) // 8), batch_size=8))
    return trainer


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
def test_scores_at_initialization_do_not_depend_on_dropout(scorer: str) -> None:
    """Half of what is dropped out would decide half of the masks; norms have the statistics of their batch."""

    def masks(p: float) -> list[Tensor]:
        sparsity = Sparsity(scorer=scorer, schedule=OneShot(final=0.9), allocation="global", report=False)
        fit(Module(p), sparsity)
        return [param.mask for param in sparsity.pruner.params]

    for a, b in zip(masks(0.5), masks(0.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fresh", [True, False])
def test_rounds_of_snip_look_at_fresh_batches(fresh: bool) -> None:
    """Round after round through the training data and from its start again; the old way stays on the first."""
    module = Module()
    schedule = OneShot(final=0.9, rounds=7)
    fit(module, Sparsity(scorer=SNIP(fresh=fresh), schedule=schedule, calibration_batches=1, report=False))
    looked = module.seen[:-5]  # each is tried for a loss, then scored
    assert looked == ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1] if fresh else [0] * 8)


def test_rounds_of_snip_against_a_loop_over_batches() -> None:
    model, naive = net(6, 12, 3), net(6, 12, 3)
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]
    following = iter([[batch] for batch in data[1:]])
    probe = Probe(model, lambda: data[:1], lambda b: F.cross_entropy(model(b[0]), b[1]), fresh=lambda: next(following))
    schedule = OneShot(final=0.875, rounds=3)
    pruner = Pruner("snip", schedule, allocation="global")
    pruner.attach(model)
    pruner.prepare(10, probe=probe)
    weights = [naive[0].weight, naive[2].weight]
    total = sum(w.numel() for w in weights)
    alive = torch.ones(total, dtype=torch.bool)
    for (x, y), density in zip(data, (0.5, 0.25, 0.125), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(naive(x), y), weights)
        score = torch.cat([(g * w).abs().flatten() for g, w in zip(gradients, weights, strict=True)])
        order = torch.where(alive, score, -1.0).argsort(descending=True, stable=True)
        alive = torch.zeros(total, dtype=torch.bool).index_fill(0, order[: round(density * total)], True)
        with torch.no_grad():
            for w, mask in zip(weights, alive.split([w.numel() for w in weights]), strict=True):
                w *= mask.view_as(w)
    assert torch.equal(torch.cat([p.mask.flatten() for p in pruner.params]), alive)


class Heads(nn.Module):
    """Two heads; the auxiliary one is registered last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), self.aux(h)


def test_the_temperature_of_grasp_acts_on_the_logits() -> None:
    model = Heads().double()
    x, y = torch.randn(20, 6).double(), torch.randint(3, (20,))
    probe = Probe(model, [(x, y)], lambda b: F.cross_entropy(model(b[0])[0], b[1]))
    weights = [model.body.weight, model.head.weight]

    def expected(temperature: float) -> list[Tensor]:
        loss = F.cross_entropy(model(x)[0] / temperature, y)
        first = torch.autograd.grad(loss, weights, create_graph=True)
        product = torch.stack([(g * g.detach()).sum() for g in first]).sum()
        return list(torch.autograd.grad(product, weights))

    for temperature in (1.0, 200.0):
        found = probe.hessian_gradients(weights, temperature, logits="head")
        for a, b in zip(found, expected(temperature), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-15)
    pruner = Pruner(GraSP(logits="head"), OneShot(final=0.5))
    pruner.attach(model)
    pruner.prepare(10, probe=probe)
    for scorer, message in (
        (GraSP(), "the loss does not depend on the output of aux"),
        (GraSP(logits="haed"), "matches no module of the model. Did you mean 'head'"),
    ):
        pruner = Pruner(scorer, OneShot(final=0.5))
        pruner.attach(model)
        with pytest.raises(ValueError, match=message):
            pruner.prepare(10, probe=probe)


# Lottery tickets


class Record(Callback):
    """The weights after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("weights", ["rewind", "reinit"])
def test_averaged_weights_are_taken_back_with_a_ticket(weights: Any, tmp_path: Path) -> None:
    """At the end they are the average of the last round alone."""
    module, record = Module(0.0), Record()
    sparsity = Sparsity(schedule=Tickets(final=0.5, rate=0.3), report=False)
    average = EMAWeightAveraging(decay=0.9)
    fit(module, sparsity, Rewind(weights), average, record, epochs=3, folder=tmp_path)
    last = record.weights[-5:]
    for name, value in module.named_parameters():
        expected = last[0][name]
        for step in last[1:]:
            expected = 0.9 * expected + 0.1 * step[name]
        assert torch.allclose(value, expected, atol=1e-6), name


# After training


def test_ria_against_loops() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(6, 5), [torch.randn(3, 4, 6), torch.randn(3, 4, 6)]
    pruner = Pruner(RIA(power=0.7), OneShot(final=0.5))
    pruner.attach(layer)
    pruner.scorer.calibrate(pruner.params, Probe(layer, data, lambda x: layer(x).sum()))
    expected = posttraining.ria(layer.weight.detach(), torch.cat(data).flatten(0, 1), 0.7)
    assert torch.allclose(pruner.scorer.score(pruner.params[0]), torch.tensor(expected), rtol=1e-5)


def test_ria_of_a_convolution_looks_at_its_groups() -> None:
    """A convolution with two groups is two of one."""
    torch.manual_seed(0)
    whole, x = nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5)
    parts = [nn.Conv2d(2, 3, 3, bias=False) for _ in range(2)]
    scores = []
    for i, layer in enumerate((whole, *parts)):
        if i:
            layer.weight.data = whole.weight.data[3 * i - 3 : 3 * i]
        pruner = Pruner("ria", OneShot(final=0.5))
        pruner.attach(layer)
        inputs = x if not i else x[:, 2 * i - 2 : 2 * i]
        pruner.scorer.calibrate(pruner.params, Probe(layer, [inputs], lambda x, layer=layer: layer(x).sum()))
        scores.append(pruner.scorer.score(pruner.params[0]))
    assert torch.allclose(scores[0], torch.cat(scores[1:]), rtol=1e-5)


def test_owl_against_loops() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 10))
    for index, layer in enumerate(model):  # the later, the more outliers
        layer.weight.data[torch.rand(layer.weight.shape) < 0.05 * index] *= 30
    scores = [layer.weight.detach().abs().flatten().tolist() for layer in model]
    pruner = Pruner("magnitude", OneShot(final=0.7), allocation=OWL(outlier=3.0, spread=0.1))
    pruner.attach(model)
    pruner.prepare(10)
    densities = posttraining.owl(scores, 0.7, 3.0, 0.1)
    assert max(densities) - min(densities) == pytest.approx(0.2)
    for param, density in zip(pruner.params, densities, strict=True):
        assert abs(param.kept - density * param.numel) <= 1
    assert pruner.kept == round(0.3 * pruner.numel)
    with pytest.raises(ValueError, match="allocation=owl compares scores with their mean"):
        Pruner("movement", OneShot(final=0.7), allocation="owl")


def test_granet_prunes_and_grows_to_the_schedules_count() -> None:
    """Each update by sorting: the best of all at the level, then half of each tensor's weights exchanged."""
    model = net(16, 12, 8)
    updater = GraNet(fraction=0.5, decay="constant")
    pruner = Pruner("magnitude", Linear(final=0.75, begin=0.0, end=1.0, every=5), "unstructured", "global", updater)
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    returned = 0
    for step, x in enumerate(batches(30, 16)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        seen = [(p.weight.detach().clone(), p.weight.grad.clone(), p.mask.clone()) for p in pruner.params]  # type: ignore[union-attr]
        before = pruner.num_updates
        pruner.before_step(step, 30, optimizer)
        if pruner.num_updates > before and pruner.level:
            total = sum(mask.numel() for *_, mask in seen)
            keep = round((1 - pruner.level) * total)
            flat = torch.cat([w.abs().where(m, torch.tensor(-1.0)).flatten() for w, _, m in seen])
            best = torch.zeros(total).index_fill(0, flat.argsort(descending=True, stable=True)[:keep], 1.0).bool()
            parts = best.split([mask.numel() for *_, mask in seen])
            for param, (weight, gradient, mask), part in zip(pruner.params, seen, parts, strict=True):
                left = int(part.sum()) - int(part.sum()) // 2
                order = weight.abs().flatten().where(part, torch.tensor(-1.0)).argsort(descending=True, stable=True)
                stay = torch.zeros_like(part).index_fill(0, order[:left], True)
                order = gradient.abs().flatten().where(~stay, torch.tensor(-1.0)).argsort(descending=True, stable=True)
                new = stay.index_fill(0, order[: int(part.sum()) - left], True)
                assert torch.equal(param.mask.flatten(), new)
                returned += int((param.mask & ~mask).sum())
        optimizer.step()
        pruner.after_step()
    assert pruner.kept == round(0.25 * pruner.numel) and returned > 10


def test_taylor_squares_or_not() -> None:
    """Over two steps the mean of squares and the square of means rank another way round."""
    (param,) = find(nn.Linear(2, 1, bias=False))
    param.weight.data = torch.ones(1, 2)
    found = []
    for squared in (True, False):
        param.state.clear()
        scorer = Taylor(decay=0.5, squared=squared)
        for gradient in ([3.0, 2.0], [0.0, 2.0]):
            param.weight.grad = torch.tensor([gradient])
            scorer.observe(param)
        found.append(scorer.score(param).flatten().tolist())
    assert found == [[4.5, 4.0], [1.5, 2.0]]
