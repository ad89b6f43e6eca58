"""Shrinking: the shrunk model is the masked one, and training goes on as if nothing had been removed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from loops import loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.callbacks import RandomState, Shrink
from pl_sparse.core.cut import Cut
from pl_sparse.export import (
    load_shrunk,
    save_shrunk,
    shrink,
)
from pl_sparse.results.summary import summarize
from pl_sparse.schedule import Linear
from pl_sparse.structure import Channel, Head
from pl_sparse.surgery.heads import FewerHeads
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.trial import couplings
from pl_sparse.tasks.models import conv4, lenet5, lenet300, resnet20, vit_tiny


class Mobile(nn.Module):
    """An inverted residual block with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.project = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.expand(x))))))
        return self.fc((x + self.project(y)).mean((2, 3)))


class Concat(nn.Module):
    """Two layers of a DenseNet: norms span the channels of several layers; flattened into the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.bn3, self.fc = nn.BatchNorm2d(14), nn.Linear(14 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.fc(F.max_pool2d(F.relu(self.bn3(x)), 2).flatten(1))


class Gated(nn.Module):
    """A grouped convolution, a transposed one, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.squeeze, self.excite = nn.Linear(12, 6), nn.Linear(6, 12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.conv(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc(F.relu(self.up(x * gate[:, :, None, None])).mean((2, 3)))


def vit() -> nn.Module:
    return vit_tiny(shape=(1, 8, 8), classes=5, dim=16, depth=2, heads=4)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet20(shape=(1, 8, 8), classes=5, width=4),
    "conv4": lambda: conv4(shape=(1, 8, 8), classes=5),
    "lenet300": lambda: lenet300(shape=(1, 8, 8), classes=5),
    "mobile": Mobile,
    "concat": Concat,
    "gated": Gated,
    "vit": vit,
}


def trained(net: nn.Module, structure: Any, sparsity: float = 0.5) -> Pruner:
    """A few steps, so that statistics, biases and shifts are none of them zero."""
    x = torch.randn(8, 1, 8, 8)
    pruner = Pruner("magnitude", Linear(final=sparsity, begin=0.0, end=0.6, every=2), structure, "uniform")
    pruner.attach(net, x)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    net.train()
    loop(pruner, optimizer, lambda: (net(x) - 1).square().mean(), 10)
    net.eval()
    return pruner


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_masked_model_and_the_plan_brings_them_back(name: str, tmp_path: Path) -> None:
    net = NETS[name]()
    pruner = trained(net, Channel(coupled=True))
    x = torch.randn(16, 1, 8, 8)
    masked = net(x).detach()
    expected = {id(p.weight): int(p.mask.flatten(1).any(1).sum()) for p in pruner.params}
    result = shrink(net, x[:2])
    assert not result.left
    assert result.after < 0.8 * result.before
    assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)
    for param in pruner.params:  # all that was masked is gone
        assert param.weight.shape[1 if isinstance(param.module, nn.ConvTranspose2d) else 0] == expected[
            id(param.weight)
        ] or (isinstance(param.module, nn.ConvTranspose2d))

    save_shrunk(net, result.plan, tmp_path)
    fresh = NETS[name]().eval()
    load_shrunk(fresh, tmp_path)
    assert torch.equal(fresh(x), net(x))
    with pytest.raises(ValueError, match="another model"):
        load_shrunk(nn.Sequential(nn.Linear(3, 3)), tmp_path)

    result.plan.undo(net)  # zeros where something was removed: the masked model again
    assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_heads(sparsity: float, tmp_path: Path) -> None:
    net = vit()
    trained(net, Head(), sparsity)
    x = torch.randn(4, 1, 8, 8)
    masked = net(x).detach()
    result = shrink(net, x)
    attention = net.get_submodule("blocks.0.self_attn")
    assert isinstance(attention, FewerHeads) and attention.num_heads == (2 if sparsity == 0.5 else 1)
    assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)
    with torch.no_grad():  # torch's fused path must not be taken
        assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)
    save_shrunk(net, result.plan, tmp_path)
    fresh = vit().eval()
    load_shrunk(fresh, tmp_path)
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_fewer_heads_take_masks_as_the_plain_layer_does(batch_first: bool) -> None:
    plain = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    with torch.no_grad():
        plain.out_proj.weight[:, 2:4] = 0
    shrunk = copy.deepcopy(plain)
    RemovalPlan.of(nn.ModuleDict({"a": shrunk}), [], {"a": [1]}).apply(nn.ModuleDict({"a": shrunk}))
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    padding = torch.tensor([[False] * 4 + [True]] * 3)
    causal = torch.ones(5, 5).triu(1).bool()
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal.float() * -1e9}):
        for weights in (True, False):
            a = plain(x, x, x, need_weights=weights, **options)[0]
            assert torch.allclose(shrunk(x, x, x, need_weights=weights, **options)[0], a, atol=1e-6)
    single = torch.randn(5, 8)
    assert torch.allclose(shrunk(single, single, single)[0], plain(single, single, single)[0], atol=1e-6)


def test_constants_are_folded_where_that_is_exact_and_left_where_padding_forbids_it() -> None:
    x = torch.randn(4, 1, 28, 28)
    net = lenet5(shape=(1, 28, 28), classes=5).eval()  # convolutions without padding, biases that are not masked
    with torch.no_grad():
        for name in ("conv1", "conv2", "fc1"):
            net.get_submodule(name).weight[::2] = 0
    masked = net(x).detach()
    result = shrink(net, x[:2])
    assert not result.left and net.get_submodule("conv2").weight.shape[:2] == (25, 10)
    assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)

    padded = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)).eval()
    padded(x)
    with torch.no_grad():
        padded[0].weight[0] = 0
    before = padded(x).detach()
    result = shrink(padded, x)
    assert "padding" in result.left["0"] and torch.equal(padded(x), before)


def test_a_norm_without_parameters_and_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        net[0].weight[0] = 0
    x = torch.randn(2, 1, 8, 8)
    masked = net(x).detach()
    result = shrink(net, x)
    assert not result.left and net[0].out_channels == net[1].num_features == net[3].in_channels == 3
    assert torch.allclose(net(x), masked, rtol=0, atol=1e-5)
    result.plan.undo(net)
    assert net[1].num_features == 4 and torch.allclose(net(x), masked, rtol=0, atol=1e-5)


def test_what_cannot_be_followed_stays() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8)
            self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.norm(self.a(x)))
            return self.d(self.c(x).roll(1, 1))  # an operation that moves channels

    net = Odd()
    with torch.no_grad():
        for layer in (net.a, net.c):
            layer.weight[0] = 0
            layer.bias[0] = 0
    x = torch.randn(3, 4)
    before = net(x).detach()
    result = shrink(net, x)
    assert set(result.left) == {"a", "c"} and "LayerNorm" in result.left["a"] and "aten.roll" in result.left["c"]
    assert torch.equal(net(x), before)
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), sparsity=0.5)
    pruner.attach(net, x)
    assert [param.name for param in pruner.params] == ["b.weight"] and "LayerNorm" in pruner.skipped["a.weight"]


def test_units_of_a_residual_stage_and_of_a_concatenation() -> None:
    found = {
        c.ports[0].path: c for c in couplings(resnet20(shape=(1, 8, 8), classes=5, width=4), torch.randn(2, 1, 8, 8))
    }
    stage = next(c for c in found.values() if any(port.path == "conv1" for port in c.ports))
    outputs = {port.path for port in stage.ports if port.side == "out"}
    convs = {"conv1", *(f"stage1.{i}.conv2" for i in range(3))}
    assert outputs == convs | {"bn1", *(f"stage1.{i}.bn2" for i in range(3))}
    middle = next(
        c
        for c in couplings(Concat(), torch.randn(2, 1, 8, 8))
        if any(p.path == "conv1" and p.side == "out" for p in c.ports)
    )
    places = {(port.path, port.side): port.places for port in middle.ports}
    assert places["bn2", "out"] == tuple((6 + i,) for i in range(4))
    assert places["fc", "in"] == tuple(tuple(range(16 * (6 + i), 16 * (7 + i))) for i in range(4))


def test_scores_of_coupled_channels_against_loops() -> None:
    net = Mobile().double()
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5)
    pruner.attach(net, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    scores = []
    for i in range(24):
        weights = [*net.expand.weight[i].flatten().tolist(), *net.depthwise.weight[i].flatten().tolist()]
        scores.append(sum(abs(w) for w in weights) / len(weights))
    pruner.prepare(1)
    best = set(sorted(range(24), key=lambda i: -scores[i])[:12])
    for tensor in (net.expand.weight, net.depthwise.weight, net.bn1.weight, net.bn2.weight):
        assert {i for i in range(24) if bool(tensor[i].any())} == best


class Net(LightningModule):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.net = resnet20(shape=(1, 8, 8), classes=3, width=4)
        self.optimizer, self.options = optimizer, options
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net.conv1.weight.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **self.options)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1), batch_size=16, shuffle=True)


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 4, ckpt: Path | None = None) -> Trainer:
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *([Stop(epochs)] if epochs < 4 else [])],
    )
    trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=True)
    return trainer


class Stop(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def sparsity(**options: Any) -> Sparsity:
    schedule = Linear(final=0.5, begin=0.0, end=0.8, every=2)
    return Sparsity(schedule=schedule, structure=Channel(coupled=True), allocation="lamp", report=False, **options)


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_shrinking_while_training_gives_the_curve_of_masking(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    runs = []
    for extra in ([], [Shrink()]):
        torch.manual_seed(0)
        module, callback = Net(optimizer, **options).double(), sparsity()
        trainer = fit(module, callback, *extra, *([EMAWeightAveraging(decay=0.9)] if extra == [] else []))
        runs.append((module, callback, trainer))
    (masked, a, _), (shrunk, b, trainer) = runs
    assert shrunk.losses == pytest.approx(masked.losses, rel=1e-6)
    assert a.pruner.sparsity == b.pruner.sparsity and a.pruner.kept == b.pruner.kept
    assert a.summary is not None and b.summary is not None
    assert a.summary.params_total == b.summary.params_total and a.summary.macs_dense == b.summary.macs_dense
    assert b.summary.params_left == sum(p.numel() for p in shrunk.parameters()) < 0.7 * b.summary.params_total
    state = trainer.optimizers[0].state
    for parameter in shrunk.parameters():
        for value in state[parameter].values():
            assert not isinstance(value, Tensor) or value.numel() == 1 or value.shape == parameter.shape


def test_the_optimizer_state_is_sliced_as_the_weight_is() -> None:
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.Adafactor(p),
    ):
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        optimizer = make(net.parameters())
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            net[0].weight[[1, 3]] = 0
            net[0].bias[[1, 3]] = 0
        before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in net.named_parameters()}
        shrink(net, torch.randn(2, 6), optimizers=[optimizer])
        keep = [0, 2, 4]
        for name, parameter in net.named_parameters():
            assert any(parameter is p for p in optimizer.param_groups[0]["params"])
            for key, value in optimizer.state[parameter].items():
                expected = before[name][key]
                if expected.dim() and name in ("0.weight", "0.bias") and expected.shape[0] == 5:
                    expected = expected[keep]
                if expected.dim() == 2 and name == "2.weight" and expected.shape[1] == 5:
                    expected = expected[:, keep]
                assert torch.equal(value, expected), (name, key)
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()


def test_a_state_of_an_unknown_shape_is_refused_before_anything_changes() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight[0] = net[0].bias[0] = 0
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net[0].weight]["sketch"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"SGD keeps sketch of shape \(7,\)"):
        shrink(net, torch.randn(2, 6), optimizers=[optimizer])
    assert net[0].weight.shape == (5, 6)


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        last = ModelCheckpoint(dirpath=folder, save_last=True, save_on_train_epoch_end=True)
        return [sparsity(), Shrink(), RandomState(), EMAWeightAveraging(decay=0.9), last]

    torch.manual_seed(0)
    whole = Net(torch.optim.AdamW, lr=0.01)
    fit(whole, *callbacks(tmp_path / "whole"))
    torch.manual_seed(0)
    first = Net(torch.optim.AdamW, lr=0.01)
    with pytest.warns(UserWarning, match="before the schedule reached"):
        fit(first, *callbacks(tmp_path / "part"), epochs=2)
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in Net().parameters())
    torch.manual_seed(1)
    second = Net(torch.optim.AdamW, lr=0.01)
    fit(second, *callbacks(tmp_path / "part"), ckpt=tmp_path / "part" / "last.ckpt")
    assert whole.losses[8:] == second.losses
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": "channel"}, "coupled=true"),
        ({"structure": Channel(coupled=True), "masking": "ste"}, "masking=hard"),
        (
            {"structure": Channel(coupled=True), "updater": "dropgrow", "schedule": "constant"},
            "brings pruned weights back",
        ),
    ],
)
def test_what_may_return_is_not_removed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit(Net(lr=0.1), Sparsity(**{"schedule": "cubic", "sparsity": 0.5, **options}), Shrink())


def test_cuts_compose() -> None:
    x = torch.arange(24).reshape(4, 6)
    first = Cut((4, 6), {0: (1,), 1: (0, 5)})
    second = Cut((3, 4), {1: (2,)})
    both = first.then(second)
    assert torch.equal(both.take(x), second.take(first.take(x)))
    assert torch.equal(both.take(both.fill(both.take(x))), both.take(x))
    assert RemovalPlan.from_state_dict(
        RemovalPlan({"w": both}, {"l": {"in_features": (6, 3)}}).state_dict()
    ) == RemovalPlan({"w": both}, {"l": {"in_features": (6, 3)}})


@pytest.mark.parametrize(
    "report",
    [
        lambda pruner, net: pruner.sparsity,
        lambda pruner, net: pruner.kept,
        lambda pruner, net: pruner.state_dict(),
        lambda pruner, net: pruner.attach(net),
        lambda pruner, net: pruner.before_step(11),
        lambda pruner, net: pruner.apply(),
        lambda pruner, net: summarize(pruner, net),
    ],
)
def test_a_pruner_that_did_not_follow_a_removal_says_so(report: Callable[[Pruner, nn.Module], Any]) -> None:
    net, x = NETS["lenet300"](), torch.randn(2, 1, 8, 8)
    pruner = trained(net, Channel(coupled=True))
    plan = shrink(net, x).plan
    with pytest.raises(RuntimeError, match=r"fc1\.weight has shape .* Call pruner\.shrink\(result\.plan\.tensors\)"):
        report(pruner, net)
    pruner.shrink(plan.tensors)
    assert pruner.sparsity == summarize(pruner, net).sparsity == pytest.approx(0.5, abs=0.01)


def test_a_pruner_whose_blocks_were_removed_says_so() -> None:
    net, x = NETS["resnet20"]().eval(), torch.randn(2, 1, 8, 8)
    pruner = Pruner("magnitude", "oneshot", "layer", "uniform", sparsity=0.5)
    pruner.attach(net, x)
    pruner.prepare(1)
    assert pruner.sparsity > 0.4 and summarize(pruner, net).kept > 0
    assert shrink(net, x).plan.lists
    for report in (lambda: pruner.sparsity, lambda: summarize(pruner, net), pruner.state_dict):
        with pytest.raises(RuntimeError, match=r"stage\d\.\d.* gone from the model"):
            report()
