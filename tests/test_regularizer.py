"""Penalties against loops in float64, and the callback in training."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.allocation import Uniform
from pl_sparse.callbacks import RandomState, Regularize
from pl_sparse.core.targets import find
from pl_sparse.network.probe import Probe
from pl_sparse.regularizer import L1, GroupLasso, GrowingL2, Latency, Regularizer, Slimming, step_sizes
from pl_sparse.schedule import OneShot
from pl_sparse.structure import Block, Channel, Head, Kernel, Row, Structure, Unstructured

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: Adam(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.1, weight_decay=0.5),
    "rmsprop": lambda p: RMSprop(p, 0.1, centered=True),
}


def naive(kind: str, w: list[float], a: list[float], b: list[float], strength: float, lrs: list[float]) -> list[float]:
    """Each coordinate by itself: the optimizer's step on a/2 (w - b)^2, then the soft threshold in its metric."""
    out = []
    for x, slope, goal in zip(w, a, b, strict=True):
        m = v = mean = top = 0.0
        for t, lr in enumerate(lrs, 1):
            g = slope * (x - goal)
            eta = lr
            if kind == "sgd":
                x -= lr * g
            elif kind == "momentum":
                m = 0.9 * m + g + 0.1 * x if t > 1 else g + 0.1 * x
                x -= lr * m
            elif kind == "rmsprop":
                v, mean = 0.99 * v + 0.01 * g * g, 0.99 * mean + 0.01 * g
                eta = lr / (max(v - mean * mean, 0) ** 0.5 + 1e-8)
                x -= eta * g
            else:
                if kind == "adamw":
                    x *= 1 - lr * 0.5
                g += 0.1 * x if kind == "adam" else 0.0
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                top = max(top, v) if kind == "amsgrad" else v
                eta = lr / ((top / (1 - 0.999**t)) ** 0.5 + 1e-8)
                x -= eta * m / (1 - 0.9**t)
            x = (1 if x > 0 else -1) * max(abs(x) - eta * strength, 0.0)
        out.append(x)
    return out


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_l1_is_a_proximal_step_in_the_metric_of_the_optimizer(kind: str) -> None:
    layer = nn.Linear(6, 3, bias=False).double()
    start = layer.weight.detach().flatten().tolist()
    a, b = torch.rand(3, 6).double() + 0.5, torch.randn(3, 6).double() * 0.5
    optimizer: Optimizer = OPTIMIZERS[kind]([layer.weight])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    strength = 0.6 if kind in ("sgd", "momentum") else 0.1
    groups = L1(strength=strength).groups(find(layer), layer)
    lrs = []
    for _ in range(7):
        optimizer.zero_grad()
        (a / 2 * (layer.weight - b).square()).sum().backward()
        optimizer.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            L1(strength=strength).prox(groups, optimizer)
        scheduler.step()
    expected = naive(kind, start, a.flatten().tolist(), b.flatten().tolist(), strength, lrs)
    assert layer.weight.detach().flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 0 < int((layer.weight == 0).sum()) < 18


def test_the_l1_subgradient_makes_no_zeros_and_what_does_not_step_does_not_shrink() -> None:
    layer = nn.Linear(4, 4, bias=False)
    before = layer.weight.detach().clone()
    optimizer = SGD(layer.parameters(), 0.1)
    groups = L1(strength=0.5).groups(find(layer), layer)
    with torch.no_grad():
        L1(strength=0.5).prox(groups, optimizer)  # no gradient, so no step was done
        L1(strength=0.5).prox(groups, SGD([nn.Parameter(torch.ones(1))], 0.1))
    assert torch.equal(layer.weight, before)
    layer.weight.grad = torch.zeros(4, 4)
    L1(strength=0.5, proximal=False).add_gradient(groups, 0)
    assert torch.equal(layer.weight.grad, 0.5 * before.sign())
    assert L1(strength=0.5).penalty(groups, 0).item() == pytest.approx(0.5 * float(before.abs().sum()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4)


def units(structure: Structure, group: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights of each unit, by asking which ones its mask keeps."""
    count = structure.pool(torch.zeros(group.shape)).numel()
    shape = structure.pool(torch.zeros(group.shape)).shape
    found = []
    for i in range(count):
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[i] = True
        parts = [
            tensor[
                layout.restore(
                    structure.expand(chosen.reshape(shape), layout.view(torch.empty(param.shape)).shape), param.shape
                )
            ]
            for (param, layout), tensor in zip(group.members, tensors, strict=True)
        ]
        found.append(torch.cat(parts))
    return found


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("structure", "model"),
    [
        (Channel(), lambda: nn.Conv2d(3, 8, 2, bias=False)),
        (Channel(), lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)),
        (Block(2, 2), lambda: nn.Linear(6, 8, bias=False)),
        (Kernel(), lambda: nn.Conv2d(4, 5, 3, bias=False)),
        (Head(), Attention),
    ],
)
def test_group_lasso_is_the_exact_proximal_step(kind: str, structure: Structure, model: Any) -> None:
    """The optimality conditions of sum |w_i - v_i|^2 / (2 eta_i) + c |w|, unit by unit."""
    net = model().double()
    groups = structure.groups(find(net), net)
    optimizer: Optimizer = SGD(net.parameters(), 0.2) if kind == "sgd" else Adam(net.parameters(), 0.1)
    weights = [param.weight for group in groups for param, _ in group.members]
    for _ in range(3):
        for weight in weights:
            scale = torch.rand_like(weight) + 0.1
            scale.view(-1)[::5] = 0  # a coordinate without a gradient, as of a pixel that is always black
            weight.grad = scale * torch.randn_like(weight)
        optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    etas = [
        eta if isinstance(eta, torch.Tensor) else torch.full_like(weight, eta)
        for weight, eta in zip(weights, step_sizes(optimizer, weights), strict=True)
    ]
    duals = [  # a unit becomes zero where |v / eta| <= c: half of them
        float((v / e).norm()) / len(v) ** 0.5
        for group in groups
        for v, e in zip(units(structure, group, before), units(structure, group, etas), strict=True)
    ]
    lasso = GroupLasso(strength=sorted(duals)[len(duals) // 2] * 1.001, structure=structure)
    with torch.no_grad():
        lasso.prox(lasso.groups(find(net), net), optimizer)
    after = [weight.detach() for weight in weights]
    zero = alive = 0
    total = 0.0
    for group in groups:
        old, new, eta = (units(structure, group, tensors) for tensors in (before, after, etas))
        for v, w, e in zip(old, new, eta, strict=True):
            c = lasso.strength * len(v) ** 0.5
            total += c * float(w.norm())
            if not w.any():
                zero += 1
                assert float((v / e).norm()) <= c * (1 + 1e-9)
            else:
                alive += 1
                moved = (w - v) + e * c * w / w.norm()
                assert float((moved.abs() / (v.abs() + 1e-6)).max()) < 1e-6
    assert zero and alive
    assert lasso.penalty(groups, 0).item() == pytest.approx(total)


def test_a_channel_that_is_zero_emits_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3), nn.ReLU())
    net.append(nn.Linear(3, 2))
    lasso = GroupLasso(strength=1.0, structure=Channel())
    groups = lasso.groups(find(net, last=False), net)
    x = torch.randn(5, 2, 3, 3)
    lasso.prepare(groups, net, Probe(net, [x], lambda batch: net(batch).sum()))
    with torch.no_grad():
        net[0].weight[2] *= 1e-4
        net[1].bias.fill_(1.0)
        net[4].weight[1] *= 1e-4
        untouched = net[6].weight.clone(), net[6].bias.clone()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lasso.prox(groups, SGD(net.parameters(), 0.01))
    zero = [i for i in range(4) if not net[0].weight[i].any()]
    assert zero == [2]
    assert [net[0].bias[2], net[1].weight[2], net[1].bias[2], net[4].bias[1]] == [0, 0, 0, 0]
    assert net[0].bias[0] != 0 and net[1].bias[0] == 1 and net[4].bias[0] != 0
    assert not net[1](net[0](x))[:, 2].any() and not net[4](net[3](net[2](net[1](net[0](x)))))[:, 1].any()
    assert torch.equal(net[6].weight, untouched[0]) and torch.equal(net[6].bias, untouched[1])


def test_growing_l2_against_loops() -> None:
    """GReg-1: lambda rises for the smallest weights of the start; the others go on as they were."""
    layer = nn.Linear(5, 4, bias=False).double()
    start = layer.weight.detach().flatten().tolist()
    small = sorted(range(20), key=lambda i: abs(start[i]))[:12]
    goal = torch.randn(4, 5).double()
    greg = GrowingL2(strength=0.3, sparsity=0.6, every=2, ceiling=0.8)
    groups = greg.groups(find(layer), layer)
    greg.start(groups)
    optimizer = SGD([layer.weight], 0.1)
    expected = list(start)
    for step in range(9):
        grown = min(0.3 * (1 + step // 2), 0.8)
        value = sum(grown / 2 * expected[i] ** 2 for i in small)
        assert greg.penalty(groups, step).item() == pytest.approx(value)
        for i in range(20):
            gradient = expected[i] - float(goal.flatten()[i]) + (grown * expected[i] if i in small else 0)
            expected[i] -= 0.1 * gradient
        optimizer.zero_grad()
        ((layer.weight - goal).square() / 2).sum().backward()
        greg.add_gradient(groups, step)
        optimizer.step()
    assert layer.weight.detach().flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_growing_l2_takes_what_would_be_pruned() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    greg = GrowingL2(strength=0.1, sparsity=0.5, structure=Channel(), allocation=Uniform())
    groups = greg.groups(find(net, last=not greg.removes_outputs), net)
    greg.start(groups)
    pruner = Pruner(schedule=OneShot(final=0.5), structure="channel", allocation="uniform")
    pruner.attach(net)
    pruner.prepare(10)
    assert len(groups) == len(pruner.params) == 2
    assert all(torch.equal(group.members[0][0].mask, p.mask) for group, p in zip(groups, pruner.params, strict=True))


def normed(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * 16, 3),
    )  # fmt: skip


def test_slimming_is_a_subgradient_on_the_scales_alone() -> None:
    net = normed()
    slim = Slimming(strength=0.1)
    groups = slim.groups(find(net), net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        net[1].weight[0], net[1].weight[1] = -0.5, 0.0
    slim.add_gradient(groups, 0)
    assert net[1].weight.grad.tolist() == pytest.approx([-0.1, 0.0] + [0.1] * 4)
    assert net[4].weight.grad.tolist() == pytest.approx([0.1] * 6)
    assert not any(p.grad.any() for name, p in net.named_parameters() if name not in ("1.weight", "4.weight"))
    assert slim.penalty(groups, 0).item() == pytest.approx(0.1 * (0.5 + 4 + 6))


@pytest.mark.parametrize(("sparsity", "guarded"), [(0.5, False), (0.8, True)])
def test_slimming_prunes_by_one_threshold_and_spares_a_channel_of_each_layer(sparsity: float, guarded: bool) -> None:
    net = normed()
    net[3] = nn.Conv2d(6, 6, 1)
    net[0] = nn.Conv2d(1, 6, 3, padding=1)  # 9 weights per channel; the other has 6
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.9, -0.8, 0.7, 0.05, 0.6, 0.5]))
        net[4].weight.copy_(torch.tensor([0.01, 0.02, -0.4, 0.03, 0.3, 0.04]))
    pruner = Pruner("slimming", OneShot(final=sparsity), "channel", "global")
    pruner.attach(net)
    x = torch.randn(4, 1, 4, 4)
    pruner.prepare(10, probe=Probe(net, [x], lambda batch: net(batch).sum()))
    alive = [p.mask.flatten(1).any(1) for p in pruner.params]
    gammas = sorted(
        ((abs(g), layer, i) for layer, k in ((0, 1), (1, 4)) for i, g in enumerate(net[k].weight.tolist())),
        reverse=True,
    )
    best = {0: 0, 1: 2}
    gammas.sort(key=lambda item: (item[2] != best[item[1]], -item[0]))  # the guard: the best of each layer first
    left, expected = (1 - sparsity) * 90, [torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)]
    for _, layer, i in gammas:
        size = 9 if layer == 0 else 6
        if left < size / 2:
            break
        expected[layer][i] = True
        left -= size
    assert all(torch.equal(a, b) for a, b in zip(alive, expected, strict=True))
    assert bool(alive[1].any())
    if guarded:  # without it the second layer, all of whose scales are small, would be gone
        assert int(alive[1].sum()) == 1


# The callback


class Net(LightningModule):
    """A little regression with a batch norm; its loss can be switched off."""

    def __init__(self, kind: str = "sgd", weight: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.kind = kind
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)}


def fit(module: LightningModule, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> Trainer:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        **{"max_epochs": 4, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(x, x[:, :4].sin()), batch_size=8)
    trainer.fit(module, loader, ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    return trainer


class Reversed(Net):
    """The layer that the outputs come out of is declared first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"head": nn.Linear(16, 4), "body": nn.Linear(8, 16)})  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net["head"](self.net["body"](x).relu())  # type: ignore[index]
        return out

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def test_the_last_layer_is_that_of_the_outputs_in_whatever_order_layers_are_declared() -> None:
    regularize = Regularize(GroupLasso(strength=0.02, structure=Channel()))
    fit(Reversed(), regularize, max_epochs=1)
    assert [group.name for group in regularize.groups] == ["net.body.weight"]
    regularize = Regularize(GroupLasso(strength=0.02, structure=Channel()), last=True)
    fit(Reversed(), regularize, max_epochs=1)
    assert [group.name for group in regularize.groups] == ["net.head.weight", "net.body.weight"]


def soft(values: torch.Tensor, amount: float) -> torch.Tensor:
    return values.sign() * (values.abs() - amount).clamp_min(0)


def test_once_an_optimizer_step_with_its_learning_rate_while_it_lasts() -> None:
    module = Net(weight=0.0)
    before = [module.net[i].weight.detach().clone() for i in (0, 3)]
    # 6 batches make 3 steps per epoch, 12 in all; the penalty acts from step 3 to step 8, the rate falls at step 6
    penalty = Regularize(L1(strength=0.02), begin="1 epoch", until="9 steps", exclude=["net.3"])
    trainer = fit(module, penalty, accumulate_grad_batches=2)
    assert torch.allclose(module.net[0].weight, soft(before[0], 0.02 * (3 * 0.1 + 3 * 0.07)), atol=1e-6)
    assert torch.equal(module.net[3].weight, before[1])
    assert "penalty" in trainer.callback_metrics and penalty._hooks is None


@pytest.mark.parametrize("masking", ["hard", "frozen", "ste", "srste"])
def test_on_which_values_it_acts(masking: str) -> None:
    """On the latent values where masking trains them, else on the sparse weights."""
    module = Net(weight=0.0)
    sparsity = Sparsity(schedule=OneShot(final=0.5), masking=masking, report=False)
    if masking == "srste":
        sparsity.pruner.masking = type(sparsity.pruner.masking)(decay=0.0)
    before = module.net[0].weight.detach().clone()
    fit(module, Regularize(L1(strength=0.01)), sparsity, max_epochs=1)
    param = sparsity.pruner.params[0]
    after = soft(before, 6 * 0.1 * 0.01)
    assert torch.allclose(param.weight, after * param.mask, atol=1e-6) and not param.weight[~param.mask].any()
    assert not param.mask.all()
    if masking in ("ste", "srste"):
        assert param.latent is not None and torch.allclose(param.latent, after, atol=1e-6)
    if masking == "frozen":
        assert param.latent is not None and torch.equal(param.latent[~param.mask], before[~param.mask])


@pytest.mark.parametrize(
    "regularizer",
    [
        L1(strength=0.01),
        GroupLasso(strength=0.02, structure=Channel()),
        GrowingL2(strength=0.1, sparsity=0.5, every=3),
        Slimming(strength=0.01),
        Latency(strength=0.1),
    ],
    ids=lambda regularizer: type(regularizer).__name__,
)
@pytest.mark.parametrize("begin", [0.1, 0.6])
def test_a_resumed_training_is_the_uninterrupted_one(regularizer: Regularizer, begin: float, tmp_path: Path) -> None:
    if isinstance(regularizer, Latency):
        regularizer = replace(regularizer, table=str(tmp_path / "table.json"))

    def callbacks() -> list[Callback]:
        sparsity = Sparsity(schedule=OneShot(final=0.5, begin=0.9), report=False)
        return [Regularize(regularizer, begin=begin, until=0.8), sparsity, RandomState()]

    module = Net("adam")
    halved = copy.deepcopy(module)
    fit(module, *callbacks())

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(halved, *callbacks(), Save())
    again, resumed = Net("adam"), callbacks()
    fit(again, *resumed, ckpt=tmp_path / "half.ckpt")
    for (name, a), (_, b) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    if isinstance(regularizer, GrowingL2):
        marked = resumed[0].state_dict()["marked"]
        assert sum(int((~mask).sum()) for mask in marked.values()) == 96


def test_zeros_are_in_the_checkpoint(tmp_path: Path) -> None:
    module = Net("adamw")
    trainer = fit(module, Regularize(L1(strength=0.02)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    zeros = sum(int((saved[f"net.{i}.weight"] == 0).sum()) for i in (0, 3))
    assert 10 < zeros < 192

    module = Net("adam")
    fit(module, Regularize(GroupLasso(strength=0.02, structure=Channel())))
    gone = [not row.any() for row in module.net[0].weight]
    assert 0 < sum(gone) < 16
    for i, dead in enumerate(gone):
        for value in (module.net[0].bias[i], module.net[1].weight[i], module.net[1].bias[i]):
            assert (value == 0) == dead
    assert all(row.any() for row in module.net[3].weight)  # the last layer's outputs are the model's


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_what_cannot_be_is_refused_before_training() -> None:
    for make, message in (
        (lambda: L1(strength=-1.0), "negative"),
        (lambda: GroupLasso(strength=1.0, structure=Unstructured()), "no groups"),
        (lambda: GroupLasso(strength=1.0, structure=Row()), "no groups"),
        (lambda: GrowingL2(strength=1.0, sparsity=1.5), r"in \[0, 1\]"),
        (lambda: GrowingL2(strength=1.0, sparsity=0.5, every=0), "1 or more"),
        (lambda: Regularize(L1(strength=1.0), until=1.5), "until=1.5"),
        (lambda: Regularize(L1(strength=1.0), begin=-1), "begin=-1"),
        (lambda: Regularize(L1(strength=1.0), until="soon"), "until='soon' is not a time"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for callbacks, message in (
        ([Regularize(L1(strength=1.0), include=["conv9"])], "'conv9' matches no prunable weight"),
        ([Regularize(L1(strength=1.0), until="900 steps")], "until='900 steps' is step 900, but training has only 24"),
        ([Regularize(L1(strength=1.0), begin=0.5, until=0.1)], "ends before it begins"),
        ([Sparsity(sparsity=0.5), Regularize(L1(strength=1.0))], "before Sparsity"),
        ([Regularize(GroupLasso(strength=1.0, structure=Block(5, 5)))], "net.0.weight cannot be penalized"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Net(), *callbacks)
    with pytest.raises(ValueError, match="length is not known"):
        fit(Net(), Regularize(L1(strength=1.0), until=0.5), max_epochs=-1)
    with pytest.raises(ValueError, match="manual optimization"):
        fit(Manual(), Regularize(GroupLasso(strength=1.0, structure=Channel())))
    module = Net()
    module.net[1] = nn.Identity()
    with pytest.raises(ValueError, match="the model has none"):
        fit(module, Regularize(Slimming(strength=1.0)))
    with pytest.raises(ValueError, match="scorer=slimming ranks"):
        fit(module, Sparsity(scorer="slimming", schedule=OneShot(final=0.5), structure="channel"))
    module = Net()
    module.configure_optimizers = lambda: SGD(module.net[1].parameters(), 0.1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no optimizer trains"):
        fit(module, Regularize(L1(strength=1.0)))
