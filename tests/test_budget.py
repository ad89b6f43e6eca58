"""What pruned networks cost, and channels allocated to a budget."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.allocation import Budget, Units
from pl_sparse.core.targets import find
from pl_sparse.export import shrink
from pl_sparse.network.cost import Network
from pl_sparse.network.latency import LatencyTable
from pl_sparse.network.macs import MacCounter, macs
from pl_sparse.network.runtimes import Runtime
from pl_sparse.regularizer import Latency
from pl_sparse.structure import Channel
from pl_sparse.surgery.timed import narrowed
from pl_sparse.tasks.models import resnet20


class Small(nn.Module):
    """A depthwise convolution between two others, flattened into a classifier with a bias."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4 * times, 3, padding=1, groups=4)
        self.conv2 = nn.Conv2d(4 * times, 3, 3, stride=2)
        self.fc = nn.Linear(3 * 9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.depthwise(F.relu(self.conv1(x))))
        return self.fc(F.relu(self.conv2(x)).flatten(1))


class Transposed(nn.Module):
    """Transposed convolutions, one of them in groups and one depthwise, beside what they began with."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.depthwise = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.groups = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.up(F.relu(self.down(x))))
        return self.out(F.relu(self.groups(F.relu(self.depthwise(x)))))


def pruned(net: nn.Module, budget: Budget, x: torch.Tensor, level: float = 0.9) -> Pruner:
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), budget, sparsity=level)
    pruner.attach(net, x)
    pruner.prepare(1)
    return pruner


def counted(net: nn.Module, x: torch.Tensor) -> float:
    with MacCounter(net) as counter:
        net(x)
    return macs(net, counter, batch_size=len(x)).dense


@pytest.mark.parametrize(
    "make", [Small, lambda: Small(2), Transposed, lambda: resnet20(shape=(1, 8, 8), classes=5, width=8)]
)
def test_the_shrunk_model_costs_what_was_said_and_meets_the_budget(make: Any) -> None:
    net, x = make().eval(), torch.randn(2, 1, 8, 8)
    dense = counted(net, x)
    budget = Budget(final=0.9, macs=0.3)
    pruner = pruned(net, budget, x)
    kept = [int(Units([group], Channel(), lambda p: p.mask.float()).alive(0).sum()) for group in pruner.groups]
    assert all(kept)
    shrink(net, x)
    assert counted(net, x) == pytest.approx(budget.cost(kept))
    assert budget.cost(kept) <= 0.3 * dense
    # of a block more in any group the budget would not be met, or it would not be the cheapest to keep
    assert max(budget.cost([*kept[:g], n + 1, *kept[g + 1 :]]) for g, n in enumerate(kept)) > 0.3 * dense

    net = make().eval()
    before = 0.004 * sum(p.numel() for n, p in net.named_parameters() if "bn" not in n and "shortcut.1" not in n)
    budget = Budget(final=0.9, kb=0.5 * before)
    pruned(net, budget, x)
    shrink(net, x)
    after = 0.004 * sum(p.numel() for n, p in net.named_parameters() if "bn" not in n and "shortcut.1" not in n)
    assert 0.4 * before < after <= 0.5 * before


def test_greedy_against_every_choice() -> None:
    """On a network of two groups the greedy choice loses no more than one block against the best of all choices."""
    for seed in range(5):
        torch.manual_seed(seed)
        net, x = Small(), torch.randn(2, 1, 8, 8)
        pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), Budget(final=0.9, macs=0.4), sparsity=0.9)
        pruner.attach(net, x)
        units = Units(pruner.groups, Channel(), lambda p: p.weight.detach().abs())
        budget = pruner.allocation
        assert isinstance(budget, Budget)
        value = [(units[g] * units.weights[g]).sort(descending=True).values for g in range(2)]

        def worth(kept: Any, value: Any = value) -> float:
            return sum(float(v[:n].sum().log()) for v, n in zip(value, kept, strict=True))

        within = [kept for kept in product(range(1, 5), range(1, 4)) if budget.cost(kept) <= budget.limit(1.0)]
        chosen = budget.keep(pruner.groups, units, 0.9)
        assert tuple(chosen) in within
        block = max(float(v[:2].sum().log() - v[0].log()) for v in value)
        assert worth(chosen) >= max(map(worth, within)) - block


def test_the_budget_shrinks_with_the_level_and_widths_are_whole_blocks() -> None:
    net, x = resnet20(shape=(1, 8, 8), classes=5, width=8), torch.randn(2, 1, 8, 8)
    budget = Budget(final=0.8, macs=0.25, multiple=4)
    Pruner("magnitude", "oneshot", Channel(coupled=True), budget, sparsity=0.8).attach(net, x)
    full = budget.limit(0.0)
    assert budget.limit(0.5) == pytest.approx(0.5 * full) and budget.limit(1.0) == pytest.approx(0.25 * full)
    pruner = pruned(net, budget, x, 0.8)
    for group in pruner.groups:
        assert int(group.members[0][0].mask.flatten(1).any(1).sum()) % 4 == 0


def test_layers_that_lose_more_keep_more(tmp_path: Path) -> None:
    """By a table of single layers; with one that says nothing of them it is as without."""
    x, path, kept = torch.randn(2, 1, 8, 8), tmp_path / "sensitivity.csv", {}

    def table(**losses: float) -> str:
        rows = [f"{name.removeprefix('_')}.weight,0.5,{loss}" for name, loss in losses.items()]
        path.write_text("\n".join(["layer,sparsity,drop", *rows]))
        return str(path)

    def small() -> nn.Module:
        torch.manual_seed(0)
        convs = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten(), nn.Linear(1024, 2))

    for which, losses in {"first": (0.2, 0.0), "last": (0.0, 0.2), "even": (0.0, 0.0), "none": None}.items():
        sensitivity = None if losses is None else table(_0=losses[0], _2=losses[1])
        budget = Budget(final=0.9, macs=0.4, sensitivity=sensitivity)
        pruner = pruned(small(), budget, x)
        kept[which] = [int(group.members[0][0].mask.flatten(1).any(1).sum()) for group in pruner.groups]
        assert budget.cost(kept[which]) <= budget.limit(1.0)
    assert kept["even"] == kept["none"]
    assert kept["first"][0] > kept["last"][0] and kept["first"][1] < kept["last"][1]
    with pytest.raises(ValueError, match=r"has no row for 0\.weight or"):
        pruned(small(), Budget(macs=0.4, sensitivity=table(other=0.1)), x)


def test_a_budget_that_cannot_be_met_or_makes_no_sense_is_refused() -> None:
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="cannot be met"):
        pruned(Small(), Budget(macs=10), x)
    with pytest.raises(ValueError, match="needs one of"):
        Budget()
    with pytest.raises(ValueError, match="needs one of"):
        Budget(macs=0.5, kb=3)
    with pytest.raises(ValueError, match="structure=coupled"):
        Pruner("magnitude", "oneshot", "channel", Budget(macs=0.5), sparsity=0.5).attach(Small())


def table(net: nn.Module, x: torch.Tensor, path: Path) -> tuple[Network, LatencyTable]:
    """A table of made-up latencies: a millisecond for each thousand products of inputs and outputs, and 0.1."""
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    network, made = Network(groups, net, x), LatencyTable(path)
    for layer in network.layers:
        ins = [0] if layer.depthwise else sorted({1, layer.widths(network.units)[0]})
        outs = [1, layer.widths(network.units)[1]]
        made._rows[made._name(layer)] = {
            "ins": ins,
            "outs": outs,
            "ms": [[0.1 + (i or 1) * o / 1000 for i in ins] for o in outs],
        }
    return network, made


def test_latency_is_interpolated_and_differentiable(tmp_path: Path) -> None:
    net, x = Small(), torch.randn(2, 1, 8, 8)
    network, made = table(net, x, tmp_path / "table.json")
    assert [(g, n) for g, n in enumerate(network.units)] == [(0, 4), (1, 3)]
    for a, b in product(range(1, 5), range(1, 4)):
        products = [1 * a, a, a * b, 9 * b * 2]  # the depthwise layer has one input for each output
        assert float(network.cost([a, b], "ms", made)) == pytest.approx(0.4 + sum(products) / 1000)
    width = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    network.cost([width, 3], "ms", made).backward()
    assert width.grad is not None and float(width.grad) == pytest.approx((1 + 1 + 3) / 1000)


def test_milliseconds_are_those_of_a_network_measured_at_two_widths(tmp_path: Path) -> None:
    """A network that takes 5 ms for what is between its layers, and twice as long for them as each takes alone."""
    net, x = Small(), torch.randn(2, 1, 8, 8)
    network, made = table(net, x, tmp_path / "table.json")

    def layers(a: Any, b: Any) -> Any:
        return 0.4 + (2 * a + a * b + 9 * b * 2) / 1000

    network.samples = [[4, 3], [1, 3], [2, 2]]
    network.fit(made, [5 + 2 * layers(*kept) for kept in network.samples])
    for a, b in product(range(1, 5), range(1, 4)):
        assert float(network.cost([a, b], "ms", made)) == pytest.approx(5 + 2 * layers(a, b))
    width = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    network.cost([width, 3], "ms", made).backward()
    assert width.grad is not None and float(width.grad) == pytest.approx(2 * (1 + 1 + 3) / 1000)
    # noise: fewer channels are never slower, and what is between layers takes no negative time
    network.fit(made, [5.0, 5.2, 5.1])
    assert (
        float(network.cost([1, 1], "ms", made)) == float(network.cost([4, 3], "ms", made)) == pytest.approx(5.1, 0.01)
    )
    network.fit(made, [3 * layers(*kept) ** 2 for kept in network.samples])
    ratio = float(network.cost([1, 1], "ms", made)) / float(network.cost([4, 3], "ms", made))
    assert ratio == pytest.approx(layers(1, 1) / layers(4, 3))


def test_errors_of_milliseconds_are_relative_and_least(tmp_path: Path) -> None:
    """Against a search over both numbers."""
    net, x = Small(), torch.randn(2, 1, 8, 8)
    network, made = table(net, x, tmp_path / "table.json")
    network.samples = [[4, 3], [1, 3], [2, 2], [1, 1]]
    alone = torch.tensor([float(network.cost(kept, "ms", made)) for kept in network.samples])
    measured = torch.tensor([2.1, 1.9, 1.7, 1.8])
    network.fit(made, measured.tolist())

    def error(constant: Any, factor: Any) -> Any:
        return ((constant + factor * alone) / measured - 1).square().sum(-1)

    grid = torch.cartesian_prod(torch.linspace(0, 2, 201), torch.linspace(0, 5, 201))
    found = error(torch.tensor(network._constant), torch.tensor(network._factor))
    assert found <= error(grid[:, :1], grid[:, 1:]).min() + 1e-6


def test_each_group_is_measured_at_three_widths_that_pruning_may_leave() -> None:
    net, x = resnet20(shape=(1, 8, 8), classes=5, width=40), torch.randn(2, 1, 8, 8)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    dense, *others = Network(groups, net, x, 8).samples
    widths = {40: [16, 24, 40], 80: [24, 48, 80], 160: [48, 96, 160]}
    assert [sorted(kept) for kept in zip(*others, strict=True)] == [widths[n] for n in dense]
    assert all(len({w / n for w, n in zip(kept, dense, strict=True)}) > 1 for kept in others)


class Attends(nn.Module):
    """Tokens that are mixed by attention, then a feed-forward network: only its neurons can be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("make", [Small, Attends, lambda: resnet20(shape=(1, 8, 8), classes=5, width=8)])
def test_a_budget_of_milliseconds_is_that_of_the_network(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers alone take a second per multiply-accumulate, the network takes seven times that and 1000 seconds."""
    net = make().eval()
    x, now, calls = torch.randn(2, 5, 8) if make is Attends else torch.randn(2, 1, 8, 8), [0.0], []

    def takes(model: nn.Module, x: torch.Tensor, constant: float, factor: float) -> Any:
        seconds = constant + factor * counted(model, x)
        return lambda: now.__setitem__(0, now[0] + seconds)

    def whole(self: Runtime, model: nn.Module, x: torch.Tensor) -> Any:
        calls.append(model)
        return takes(model, x, 1000, 7)

    monkeypatch.setattr(Runtime, "opened", lambda self, layers, x, copies=1: takes(layers, x, 0, 1))
    monkeypatch.setattr(Runtime, "network", whole)
    monkeypatch.setattr(Runtime, "clock", property(lambda self: lambda: now[0]))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    budget = Budget(ms=1e12, table=str(tmp_path / "table.json"))
    Pruner("magnitude", "oneshot", Channel(coupled=True), budget, sparsity=0.9).attach(net, x)
    network = budget._measured["network"]
    assert len(calls) == 4 and all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for kept in (network.units, [max(n // 2, 1) for n in network.units], [max(n - 3, 1) for n in network.units]):
        smaller = narrowed(net, network.groups, kept, x)
        assert budget.cost(kept) == pytest.approx(1e3 * (1000 + 7 * counted(smaller, x)))
    again = Budget(ms=1e5, table=str(tmp_path / "table.json"))
    with pytest.raises(ValueError, match="cannot be met"):  # what is between layers stays
        Pruner("magnitude", "oneshot", Channel(coupled=True), again, sparsity=0.9).attach(net, x)
    kept = network.samples[1]
    assert len(calls) == 4 and again.cost(kept) == budget.cost(kept)


def test_a_narrowed_copy_has_the_first_units_of_each_group() -> None:
    net, x = resnet20(shape=(1, 8, 8), classes=5, width=8).eval(), torch.randn(2, 1, 8, 8)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    kept = [n // 2 for n in Network(groups, net, x).units]
    smaller = narrowed(net, groups, kept, x)
    for group, count in zip(groups, kept, strict=True):
        for param, _ in (*group.members, *group.companions):
            left = smaller.get_parameter(param.name)
            torch.testing.assert_close(left, param.weight[tuple(map(slice, left.shape))])
            assert left.shape[0] == count


def test_a_network_that_cannot_be_measured_is_taken_for_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Runtime, net: nn.Module, x: torch.Tensor) -> Any:
        raise ValueError("torch.export cannot trace it")

    monkeypatch.setattr(Runtime, "network", refuse)
    budget, path = Budget(ms=1e9, table=str(tmp_path / "table.json")), tmp_path / "table.json"
    with pytest.warns(UserWarning, match="time between layers.* left out: ValueError: torch.export cannot trace it"):
        Pruner("magnitude", "oneshot", Channel(coupled=True), budget, sparsity=0.9).attach(
            Small(), torch.randn(2, 1, 8, 8)
        )
    network, made = budget._measured["network"], budget._measured["table"]
    layers = sum(float(made.predict(layer, *layer.widths(network.units))) for layer in network.layers)
    assert budget.cost(network.units) == pytest.approx(layers)
    assert not any(key.startswith("network") for key in json.loads(path.read_text())["layers"])  # tried again


def test_the_penalty_of_latency_against_finite_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Small().double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    _, made = table(net, x, tmp_path / "table.json")
    monkeypatch.setattr(LatencyTable, "measure", lambda self, layers: self._rows.update(made._rows))
    penalty = Latency(strength=2.0, softness=0.5)
    groups = penalty.groups(find(net, last=False), net, x)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradient(groups, 0)
    for weight in (net.conv1.weight, net.depthwise.weight, net.conv2.weight):
        at = (1, 0, 2, 1)
        values = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                weight[at] += shift
                values.append(float(penalty.penalty(groups, 0)))
                weight[at] -= shift
        assert weight.grad is not None
        assert float(weight.grad[at]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
    assert net.fc.weight.grad is not None and not net.fc.weight.grad.any()


def test_measurements_are_kept_and_monotone(tmp_path: Path) -> None:
    net, x = Small(), torch.randn(2, 1, 8, 8)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    network, made = Network(groups, net, x), LatencyTable(tmp_path / "table.json", repeats=2)
    made.measure(network.layers)
    saved = json.loads((tmp_path / "table.json").read_text())
    assert len(saved["layers"]) == 4 and saved["fingerprint"]["torch"] == torch.__version__
    for row in saved["layers"].values():
        ms = torch.tensor(row["ms"])
        assert (ms > 0).all() and (ms.diff(dim=0) >= 0).all() and (ms.diff(dim=1) >= 0).all()
    again = LatencyTable(tmp_path / "table.json")
    assert again.predict(network.layers[0], 1, 2) == made.predict(network.layers[0], 1, 2)


def test_a_depthwise_layer_that_multiplies_channels_is_measured_at_its_widths(tmp_path: Path) -> None:
    net, x = Small(times=2), torch.randn(2, 1, 8, 8)
    groups = [group for group in Channel(coupled=True).groups(find(net, last=False), net, x) if not group.reason]
    layer = next(layer for layer in Network(groups, net, x).layers if layer.name.startswith("depthwise"))
    made = LatencyTable(tmp_path / "table.json")
    made.measure([layer])
    row = made._rows[made._name(layer)]
    assert row["ins"] == [0] and row["outs"] == [2, 4, 6, 8] and layer.widths([4, 3]) == (8, 8)
