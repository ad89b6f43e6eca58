"""Who is joined with whom: networks of many kinds lose half of their channels, and compute what the masked ones did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.export import shrink
from pl_sparse.network.blocks import residual_blocks
from pl_sparse.network.couples import RULES, couples
from pl_sparse.network.outputs import output_weights
from pl_sparse.structure import Channel
from pl_sparse.surgery.trial import couplings


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Module:
    """A convolution, its norm and a ReLU."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        a, b = net.stem(x).chunk(2, 1)
        x = shuffled(torch.cat([a, net.branch(b)], 1))
        return net.fc(net.tail(x).mean((2, 3)))

    branch = nn.Sequential(conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1))
    return Net(call, stem=conv(1, 16), branch=branch, tail=conv(16, 24, 1), fc=nn.Linear(24, 5))


def densenet() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        for layer in (net.a, net.b, net.c):
            x = torch.cat([x, layer(x)], 1)
        return net.fc(F.avg_pool2d(net.transition(x), 2).flatten(1))

    layers = {
        name: nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), conv(8 + 4 * i, 4)) for i, name in enumerate("abc")
    }
    return Net(call, stem=conv(1, 8), **layers, transition=conv(20, 8, 1), fc=nn.Linear(8 * 16, 5))


def c2f_sppf() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        y = list(net.cv1(net.stem(x)).chunk(2, 1))
        y += [y[-1] + net.m1(y[-1])]
        y += [y[-1] + net.m2(y[-1])]
        x = net.cv3(net.cv2(torch.cat(y, 1)))
        p = F.max_pool2d(x, 5, 1, 2)
        q = F.max_pool2d(p, 5, 1, 2)
        return net.head(net.cv4(torch.cat([x, p, q, F.max_pool2d(q, 5, 1, 2)], 1))).flatten(1)

    bottlenecks = {f"m{i}": nn.Sequential(conv(8, 8), conv(8, 8)) for i in (1, 2)}
    layers = {"cv1": conv(8, 16, 1), "cv2": conv(32, 16, 1), "cv3": conv(16, 8, 1), "cv4": conv(32, 16, 1)}
    return Net(call, stem=conv(1, 8), **bottlenecks, **layers, head=nn.Conv2d(16, 3, 1))


def unet() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        b = net.b(F.max_pool2d(a, 2))
        c = net.c(F.max_pool2d(b, 2))
        y = net.d(torch.cat([F.interpolate(c, scale_factor=2.0, mode="bilinear"), b], 1))
        return net.out(net.e(torch.cat([net.up(y), a], 1)))

    layers = {"a": conv(1, 8), "b": conv(8, 12), "c": conv(12, 16), "d": conv(28, 12), "e": conv(16, 8)}
    return Net(call, **layers, up=nn.ConvTranspose2d(12, 8, 2, stride=2), out=nn.Conv2d(8, 2, 1))


def inception() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([net.a(x), net.b(x), net.c(F.avg_pool2d(x, 3, 1, 1))], 1)
        return net.fc(net.tail(F.pad(x, (1, 1, 1, 1))).amax((2, 3)))

    b = nn.Sequential(conv(8, 6, 1), conv(6, 8))
    return Net(call, stem=conv(1, 8), a=conv(8, 4, 1), b=b, c=conv(8, 4, 1), tail=conv(16, 12), fc=nn.Linear(12, 5))


def squeeze_excite() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.a(x)
        y = y * torch.sigmoid(net.excite(F.relu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return net.fc((x + y).mean((2, 3)))

    gates = {"squeeze": nn.Conv2d(12, 4, 1), "excite": nn.Conv2d(4, 12, 1)}
    return Net(call, stem=conv(1, 12), a=conv(12, 12), **gates, fc=nn.Linear(12, 5))


def resnext() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.fc((x + net.block(x)).mean((2, 3)))

    block = nn.Sequential(conv(8, 16, 1), conv(16, 16, groups=4), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
    return Net(call, stem=conv(1, 8), block=block, fc=nn.Linear(8, 5))


def grouped_up() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        return net.fc(net.tail(F.relu(net.norm(net.up(net.stem(x))))).mean((2, 3)))

    up = nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2)
    return Net(call, stem=conv(1, 8), up=up, norm=nn.BatchNorm2d(12), tail=conv(12, 8), fc=nn.Linear(8, 5))


def mobilenet() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.fc(F.hardswish(net.tail(x + net.block(x))).mean((2, 3)))

    block = nn.Sequential(conv(8, 24, 1), conv(24, 24, groups=24), nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
    return Net(call, stem=conv(1, 8), block=block, tail=conv(8, 16, 1), fc=nn.Linear(16, 5))


def convnext() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.norm(net.depthwise(x).permute(0, 2, 3, 1))
        x = x + net.down(F.gelu(net.up(y))).permute(0, 3, 1, 2)
        return net.fc(x.mean((2, 3)))

    mlp = {"norm": nn.LayerNorm(8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}
    return Net(
        call, stem=nn.Conv2d(1, 8, 2, 2), depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8), **mlp, fc=nn.Linear(8, 5)
    )


def glu_mlp() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = F.glu(net.a(x.flatten(1)), -1)
        gate, value = net.b(x).chunk(2, -1)
        return net.fc(net.d(F.silu(net.c(F.silu(gate) * value)) * net.e(x)))

    layers = {"a": nn.Linear(64, 32), "b": nn.Linear(16, 24), "c": nn.Linear(12, 20), "d": nn.Linear(20, 8)}
    return Net(call, **layers, e=nn.Linear(16, 20), fc=nn.Linear(8, 5))


def prelu() -> nn.Module:
    one, each = nn.PReLU(), nn.PReLU(12)
    layers = (nn.Conv2d(1, 12, 3), one, nn.Conv2d(12, 12, 3, padding=1), each, nn.Conv2d(12, 8, 3), nn.PReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))


def decoder() -> nn.Module:
    up = nn.Sequential(nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.LeakyReLU(0.1))
    shuffle = nn.Sequential(nn.Conv2d(12, 32, 3, padding=1), nn.PixelShuffle(2), nn.ReLU())
    return nn.Sequential(conv(1, 8), up, shuffle, nn.Upsample(scale_factor=0.5), nn.Conv2d(8, 1, 3, padding=1))


def signal() -> nn.Module:
    first = nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.ChannelShuffle(2))
    rest = (nn.Conv1d(8, 12, 3, groups=2), nn.InstanceNorm1d(12, affine=True), nn.MaxPool1d(2), nn.Conv1d(12, 6, 3))
    return nn.Sequential(first, *rest, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(24, 5))


def rows(x: Tensor) -> Tensor:
    """A picture as a sequence of its rows."""
    return x.flatten(0, 1)  # (batch, 8, 8)


def recurrent(kind: Any, **options: Any) -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        out, _ = net.rnn(net.a(rows(x)).relu())
        return net.fc(net.b(out).mean(1))

    rnn = kind(12, 10, batch_first=True, **options)
    width = (rnn.proj_size or 10) * (2 if rnn.bidirectional else 1)
    return Net(call, a=nn.Linear(8, 12), rnn=rnn, b=nn.Linear(width, 8), fc=nn.Linear(8, 5))


def lstm() -> nn.Module:
    return recurrent(nn.LSTM, num_layers=2, bidirectional=True)


def projected() -> nn.Module:
    return recurrent(nn.LSTM, proj_size=6)


def gru() -> nn.Module:
    return recurrent(nn.GRU, bidirectional=True)


def cells() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        state = cell = torch.zeros(len(x), net.width)  # a number that changes with the cells
        for step in net.a(rows(x)).unbind(1):
            state, cell = net.cell(step, (state, cell))
        return net.fc(state)

    net = Net(call, a=nn.Linear(8, 12), cell=nn.LSTMCell(12, 10), fc=nn.Linear(10, 5))
    net.width = 10  # type: ignore[assignment]
    return net


def products() -> nn.Module:
    """Attention whose layers have names that say nothing: widths of queries and keys, and of values."""

    def call(net: Any, x: Tensor) -> Tensor:
        x = rows(x)
        a, b, c = (layer(x).view(len(x), 8, 2, -1).transpose(1, 2) for layer in (net.a, net.b, net.c))
        scores = (a @ b.mT * 0.3).softmax(-1)
        x = net.d((scores @ c).transpose(1, 2).flatten(2))
        a, b, c = net.e(x).unflatten(-1, (3, -1)).unbind(2)
        x = F.scaled_dot_product_attention(a, b, c, scale=0.25)
        return net.fc(torch.einsum("bld,ld->bd", x, net.pool.weight).relu())

    layers = {name: nn.Linear(8, 16) for name in "abc"}
    return Net(call, **layers, d=nn.Linear(16, 12), e=nn.Linear(12, 24), pool=Weight(8, 8), fc=nn.Linear(8, 5))


class Weight(nn.Module):
    """A parameter of its own."""

    def __init__(self, *shape: int, buffer: bool = False) -> None:
        super().__init__()
        value = torch.randn(shape)
        self.register_buffer("weight", value) if buffer else setattr(self, "weight", nn.Parameter(value))


def own_weights() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = (net.a(x.flatten(1)) @ net.up.weight + net.shift.weight).relu()
        x = F.linear(x, net.down.weight, net.bias.weight).relu()
        return net.fc(torch.einsum("bi,io->bo", x, net.mix.weight))

    shapes = {"up": (12, 20), "shift": (20,), "down": (16, 20), "bias": (16,), "mix": (16, 8)}
    weights = {name: Weight(*shape) for name, shape in shapes.items()}
    return Net(call, a=nn.Linear(64, 12), **weights, fc=nn.Linear(8, 5))


def layer_scale() -> nn.Module:
    """Parameters and buffers with an entry per channel, that are multiplied, added and put beside."""

    def call(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.gamma.weight.reshape(1, -1, 1, 1) * net.block(x)
        x = x / (1 + net.divisor.weight.abs())[:, None, None] + net.beta.weight
        x = F.conv2d(x, net.blur.weight, padding=1, groups=x.shape[1])
        x = net.mix(torch.cat([net.token.weight.expand(len(x), -1, -1), x.flatten(2).mT], 1))
        return net.fc(x.sum(1))

    tables = {"gamma": Weight(12), "divisor": Weight(12), "beta": Weight(12, 1, 1), "token": Weight(1, 1, 12)}
    layers = {"block": conv(12, 12), "blur": Weight(12, 1, 3, 3, buffer=True), "mix": nn.Linear(12, 8)}
    return Net(call, stem=conv(1, 12), **layers, **tables, fc=nn.Linear(8, 5))


def group_norms() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.fc(F.silu(net.bare(net.c(x + net.b(x)))).mean((2, 3)))

    a = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
    b = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(6, 24), nn.SiLU(), nn.Conv2d(24, 16, 1))
    layers = {"c": nn.Conv2d(16, 12, 3), "bare": nn.GroupNorm(6, 12, affine=False)}
    return Net(call, a=a, b=b, **layers, fc=nn.Linear(12, 5))


def graph() -> nn.Module:
    def call(net: Any, x: Tensor) -> Tensor:
        x = net.b(net.a(x.flatten(1)).relu())
        sums = x.new_zeros(x.shape).index_add_(0, torch.tensor([1, 0]), x[torch.tensor([1, 1])])
        return net.fc(sums / (1 + torch.ones(2, 1)).expand_as(sums))

    return Net(call, a=nn.Linear(64, 12), b=nn.Linear(12, 16), fc=nn.Linear(16, 5))


def counted() -> nn.Module:
    """Sizes of slices and views that stand in attributes."""

    def call(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x).split([net.width, net.width], 1)
        return net.fc(net.b(a * b).view(len(x), net.flat))

    net = Net(call, a=conv(1, 24), b=nn.Sequential(nn.Conv2d(12, 10, 3), nn.AdaptiveAvgPool2d(1)), fc=nn.Linear(10, 5))
    net.width, net.flat = 12, 10  # type: ignore[assignment]
    return net


def listed() -> nn.Module:
    """Widths of parts in a list and in a tuple, each part with filters of its own, as in MixNet and InceptionNeXt."""

    def call(net: Any, x: Tensor) -> Tensor:
        parts = net.stem(x).split(net.parts, 1)
        x = net.mix(torch.cat([net.small(parts[0]), net.large(parts[1])], 1))
        same, a, b = torch.split(x, net.widths, dim=1)
        return net.fc(torch.cat([same, net.wide(a), net.high(b)], 1).mean((2, 3)))

    layers = {"stem": conv(1, 24), "small": conv(14, 14, groups=14), "large": conv(10, 10, groups=10)}
    bands = {"wide": conv(7, 7, groups=7), "high": conv(7, 7, groups=7)}
    net = Net(call, **layers, mix=conv(24, 20, 1), **bands, fc=nn.Linear(20, 5))
    net.parts, net.widths = [14, 10], (6, 7, 7)  # type: ignore[assignment]
    return net


def by_chance() -> nn.Module:
    """An attribute that is as large as the channels that another stands for, and has nothing to do with them."""

    def call(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x).split([net.width, net.width], 1)
        points = F.adaptive_avg_pool1d(x.flatten(1), net.points)
        return net.fc((a * b).mean((2, 3))) + net.beside(points)

    net = Net(call, a=conv(1, 24), fc=nn.Linear(12, 5), beside=nn.Linear(24, 5))
    net.width, net.points = 12, 24  # type: ignore[assignment]
    return net


def multiplier() -> nn.Module:
    """Each channel makes two, or is made larger, by filters of its own."""
    layers = {
        "stem": conv(1, 8),
        "wide": conv(8, 16, groups=8),
        "mix": conv(16, 6, 1),
        "up": nn.ConvTranspose2d(6, 6, 2, 2, groups=6),
        "last": conv(6, 8),
    }
    return Net(
        lambda net, x: net.fc(net.last(net.up(net.mix(net.wide(net.stem(x)))).relu()).mean((2, 3))),
        **layers,
        fc=nn.Linear(8, 5),
    )


def packed() -> nn.Module:
    """Sequences of two lengths."""

    def call(net: Any, x: Tensor) -> Tensor:
        steps = pack_padded_sequence(net.a(x.flatten(1, 2)).relu(), torch.tensor([5, 8]), True, enforce_sorted=False)
        states, _ = pad_packed_sequence(net.rnn(steps)[0], batch_first=True)
        last, _ = net.second(pack_padded_sequence(states, torch.tensor([8, 5]), True))
        return net.fc(pad_packed_sequence(last)[0].sum(0))

    rnn = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
    return Net(call, a=nn.Linear(8, 12), rnn=rnn, second=nn.GRU(20, 6, batch_first=True), fc=nn.Linear(6, 5))


ZOO: dict[Callable[[], nn.Module], tuple[float, dict[str, str]]] = {
    shufflenet: (1.0, {}),
    densenet: (1.0, {}),
    c2f_sppf: (1.0, {}),
    unet: (1.0, {}),
    inception: (1.0, {}),
    squeeze_excite: (1.0, {}),
    resnext: (1.0, {}),
    grouped_up: (1.0, {}),
    mobilenet: (1.0, {}),
    convnext: (4 / 7, dict.fromkeys(("stem.weight", "depthwise.weight", "down.weight"), "norm (LayerNorm)")),
    glu_mlp: (1.0, {}),
    prelu: (1.0, {}),
    decoder: (1.0, {}),
    signal: (1.0, {}),
    lstm: (1.0, {}),
    projected: (1.0, {}),
    gru: (1.0, {}),
    cells: (1.0, {}),
    products: (1.0, {"pool.weight": "no channel"}),
    own_weights: (1.0, {}),
    layer_scale: (1.0, {"beta.weight": "scale", "token.weight": "token"}),
    group_norms: (1.0, {}),
    graph: (1.0, {}),
    counted: (1.0, {}),
    listed: (1.0, {}),
    by_chance: (24 / 29, {"beside.weight": "outputs of the model"}),
    multiplier: (1.0, {}),
    packed: (1.0, {}),
}
"""Networks, the share of the outputs of layers but for the last that can be removed, and why others stay."""


def masked(net: nn.Module, x: Tensor) -> Pruner:
    """Half of the channels masked; biases, shifts and statistics of the rest are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_((noise - 0.5) * 2 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else noise + 0.5)
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5)
    pruner.attach(net.eval(), x)
    pruner.prepare(10)
    for name, buffer in net.named_buffers():
        if "running_mean" in name:  # as training leaves it where a channel is always zero
            norm = net.get_submodule(name.rpartition(".")[0])
            buffer.mul_((norm.get_parameter("weight") != 0).float())
    return pruner


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_half_of_the_channels_leave_and_outputs_stay(make: Callable[[], nn.Module]) -> None:
    share, reasons = ZOO[make]
    net, x = make(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = couplings(net.eval(), x)
    last = next(port.path for c in found if c.reason and "outputs of the model" in c.reason for port in c.sources(net))
    sizes = [(c.reason, sum(len(p.places) * len(p.places[0]) for p in c.sources(net) if p.path != last)) for c in found]
    assert sum(n for reason, n in sizes if reason is None) == pytest.approx(share * sum(n for _, n in sizes), rel=0.02)
    pruner = masked(net, x)
    for name, reason in reasons.items():
        assert reason in pruner.skipped[name]
    assert {name for name in pruner.skipped if not name.startswith(last)} == set(reasons)
    with torch.no_grad():
        before = net(x)
        result = shrink(net, x)
        after = net(x)
    assert not result.left and result.after < 0.75 * result.before
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.roll(1, 1), "aten.roll"),
        (lambda x: x.softmax(1), "aten.softmax"),
        (lambda x: x @ torch.eye(8), "aten.matmul"),
        (lambda x: torch.fft.rfft(x).real[:, :3].repeat(1, 2), "fft"),
        (lambda x: x.split([3, 5], 1)[1], "aten.split_with_sizes"),
        (lambda x: x + torch.arange(8.0), "no channels of a layer"),
        (lambda x: x.cumsum(1), "aten.cumsum"),
        (lambda x: x[:, [1, 0, 3]], "aten.index"),
        (lambda x: torch.einsum("bi,ij->bj", x, torch.eye(8)), "aten"),
        (lambda x: x.view(2, 4, 2).amax(1), "channels"),
        (lambda x: (x > 0).all(1, keepdim=True) * x, "aten.all"),
        (lambda x: x[:, :4].sigmoid(), "trial"),  # what is zero does not stay so
        (lambda x: x.cos(), "trial"),
    ],
)
def test_what_no_rule_follows_stays_by_the_name_of_the_operation(make: Callable[[Tensor], Tensor], reason: str) -> None:
    width = make(torch.ones(2, 8)).shape[1]
    net = Net(lambda net, x: net.b(make(net.a(x))), a=nn.Linear(4, 8), b=nn.Linear(width, 3))
    x = torch.randn(2, 4)
    found = next(c for c in couplings(net, x) if any(port.path == "a" for port in c.ports))
    assert found.reason is not None and reason in found.reason
    before = net(x)
    with torch.no_grad():
        net.a.weight.zero_()
    assert list(shrink(net, x).left) == ["a"] and net(x).shape == before.shape


def test_a_rule_that_fails_is_a_reason_and_one_of_a_stranger_is_taken() -> None:
    operation = torch.ops.aten.roll.default
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    net[0].register_forward_hook(lambda module, args, out: out.roll(1, 0))  # samples change places
    assert couplings(net, x)[0].reason is None
    own = RULES.get(operation)
    try:

        @couples(operation)
        def broken(call: Any) -> None:
            raise IndexError("index 9 is out of bounds")

        (reason,) = {c.reason for c in couplings(net, x) if c.ports[0].path == "0"}
        assert reason is not None and "the rule of aten.roll.default failed (IndexError: index 9" in reason

        @couples(operation)
        def right(call: Any) -> Any:
            return call.track(call["self"])

        assert couplings(net, x)[0].reason is None
    finally:
        RULES.pop(operation)
        if own is not None:
            RULES[operation] = own


def test_code_that_cannot_be_followed_keeps_all_channels_and_a_wrong_example_is_refused() -> None:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    with pytest.raises(ValueError, match="Net cannot be called with the example of its inputs"):
        couplings(net, torch.randn(2, 5))
    with pytest.raises(ValueError, match="Net cannot be called with the example of its inputs"):
        residual_blocks(net, torch.randn(2, 5))
    for look in (couplings, residual_blocks):
        with pytest.raises(ValueError, match=r"Module has no forward, .*: define .* def forward\(self, x\)"):
            look(LightningModule(), torch.randn(2, 5))

    def call(net: Any, x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotImplementedError("not under a dispatch mode")
        return net.b(net.a(x))

    net.call = call
    reasons = {c.ports[0].path: c.reason for c in couplings(net, torch.randn(2, 4))}
    assert reasons.keys() == {"a", "b"} and all("not under a dispatch mode" in str(r) for r in reasons.values())


def test_attaching_leaves_the_module_alone() -> None:
    """Its parameters, their gradients and nodes of autograd, buffers, hooks, modes and random numbers."""
    net, x = mobilenet().train(), torch.randn(2, 1, 8, 8)
    net.stem[0].register_forward_hook(lambda *_: None)
    net(x).sum().backward()
    graph = net(x).square().sum()  # alive while channels are looked for

    def seen() -> list[Any]:
        parts = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in net.modules()]
        nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in net.parameters()]  # type: ignore[union-attr]
        memory = [(id(t), t.data_ptr(), t._version) for t in [*net.parameters(), *net.buffers()]]
        values = [t.clone().tolist() for t in [*net.parameters(), *net.buffers()]]
        grads = [id(p.grad) for p in net.parameters()]
        return [parts, nodes, memory, values, grads, torch.get_rng_state().tolist()]

    before = seen()
    couplings(net, x)
    assert seen() == before
    graph.backward()
    handles = [m.register_forward_hook(lambda *_: None) for m in net.modules()]
    for handle in handles:
        handle.remove()


def test_attaching_within_data_parallel_leaves_its_gradients_shared(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net, x = mobilenet(), torch.randn(2, 1, 8, 8)
        parallel = nn.parallel.DistributedDataParallel(net)
        reduced = []
        parallel.register_comm_hook(
            None, lambda _, bucket: reduced.append(bucket.buffer().numel()) or bucket_of(bucket)
        )
        couplings(net, x)
        for _ in range(2):
            parallel(x).sum().backward()
        assert sum(reduced) == 2 * sum(p.numel() for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def bucket_of(bucket: Any) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_heads_that_leave_are_not_named_as_channels_that_stay() -> None:
    class Attention(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 2)).mT for f in (self.q_proj, self.k_proj, self.v_proj))
            return self.out_proj(F.scaled_dot_product_attention(q.mT, k.mT, v.mT).flatten(-2))

    net, x = nn.Sequential(Attention(), nn.Linear(8, 3)), torch.randn(2, 3, 8)
    paths = {port.path for coupling in couplings(net, x) for port in coupling.ports if port.side == "out"}
    assert paths == {"0.out_proj", "1"}


def test_outputs_are_found_not_guessed() -> None:
    """The classifier is declared first; the last that is declared is within."""
    net = Net(lambda net, x: net.fc(F.relu(net.a(x))), fc=nn.Linear(8, 3), a=nn.Linear(4, 8))
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5)
    pruner.attach(net, torch.randn(2, 4))
    assert [param.name for param in pruner.params] == ["a.weight"]
    assert pruner.skipped["fc.weight"] == "its channels are outputs of the model"


class HeadFirst(LightningModule):
    """The classifier is declared first, and one of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu()).log_softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_last_layer_is_the_last_that_is_called(frozen: bool) -> None:
    module, callback = HeadFirst(), Sparsity(structure="channel", sparsity=0.5, report=False, frozen="prune")
    module.head.requires_grad_(not frozen)
    x = torch.randn(16, 4)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8))
    assert [param.name for param in callback.pruner.params] == ["body.0.weight"]
    assert "it is the last layer" in callback.pruner.skipped["head.weight"]
    assert module.head.weight.all() and int(module.body[0].weight.any(1).sum()) == 4


def test_where_outputs_come_out_of_is_looked_at_without_a_trace() -> None:
    module = HeadFirst()
    before = {name: (id(value), value.clone()) for name, value in module.state_dict(keep_vars=True).items()}
    assert output_weights(module, torch.randn(5, 4)) == {"head.weight"} and module.training
    for name, value in module.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0] and torch.equal(value, before[name][1]) and value.grad is None
    assert output_weights(module, torch.randn(5, 3)) == set()  # it cannot be called so
    net = Net(
        lambda net, x: (net.a(x), net.norm(net.b(x).relu())), a=nn.Linear(4, 2), b=nn.Linear(4, 2), norm=nn.LayerNorm(2)
    )
    assert output_weights(net, torch.randn(5, 4)) == {"a.weight", "b.weight"}


def test_hooks_that_a_model_registers_in_its_first_call_are_gone_afterwards() -> None:
    """As outputs are collected in transformers 5; a flag that says that they are there would be gone as well."""

    def call(net: Any, x: Tensor) -> Tensor:
        if not hasattr(net, "seen"):
            net.seen = []
            net.a.register_forward_hook(lambda module, args, out: net.seen.append(out))
        net.seen.clear()
        out = net.b(net.a(x))
        assert len(net.seen) == 1
        return out

    net = Net(call, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert couplings(net, torch.randn(2, 4))[0].reason is None
    assert not net.a._forward_hooks and not hasattr(net, "seen")


def test_a_model_that_cannot_be_called_without_channels_says_why() -> None:
    net = Net(lambda net, x: net.b(net.a(x).view(2, 2, 4).flatten(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    reason = couplings(net, torch.randn(2, 4))[0].reason
    assert (
        reason is not None
        and "cannot be called without some of its channels (RuntimeError: shape '[2, 2, 4]'" in reason
    )


def test_a_table_whose_columns_are_pruned_gets_narrower() -> None:
    net, x = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 3)), torch.randint(9, (2, 5))
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5, include=["0", "1"])
    pruner.attach(net, x)
    pruner.prepare(10)
    before = net(x)
    shrink(net, x)
    assert (net[0].embedding_dim, net[1].in_features, net[1].out_features) == (4, 4, 3)
    assert torch.allclose(net(x), before, atol=1e-5)


class Halves(nn.Module):
    """Half of the channels pass on, cut by a number of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = width // 2
        self.inner, self.cv1, self.m = conv(width, width, 1), conv(width, width, 1), conv(self.c, self.c)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(self.inner(x)).split((self.c, self.c), 1)
        return torch.cat([a, self.m(b)], 1)


def counting(net: nn.Module) -> list[int]:
    """A list that gets an entry per call of a network."""
    calls: list[int] = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_repeated_blocks_that_count_their_channels_are_tried_where_a_call_fails() -> None:
    blocks = [Halves(16) for _ in range(3)]
    net = nn.Sequential(conv(1, 16), *blocks, nn.Flatten(), nn.Linear(16 * 16, 3)).eval()
    calls = counting(net)
    found = couplings(net, torch.randn(2, 1, 4, 4))
    assert [each.reason for each in found if each.reason] == ["its channels are outputs of the model"]
    assert sum(bool(each.counts) for each in found) >= 3
    assert len(calls) < 25


class Scores(nn.Module):
    """Positions attend to each other, by queries and values of their own width, which one number says."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.out, self.fc = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, self.width)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.fc(self.out(mixed.transpose(1, 2).flatten(2)).relu())


def test_channels_that_share_a_number_with_others_stay() -> None:
    """They hold where as many of both leave, and no mask sees to that."""
    net, x = Scores().eval(), torch.randn(2, 5, 6)
    by_path = {port.path: each for each in couplings(net, x) for port in each.ports if port.side == "out"}
    assert all("cannot be called without some" in str(by_path[name].reason) for name in "qkv")
    assert by_path["out"].reason is None


def test_what_has_no_mask_is_not_tried() -> None:
    net = nn.Sequential(conv(1, 16), *[Halves(16) for _ in range(3)], nn.Flatten(), nn.Linear(16 * 64, 3)).eval()
    inner: Any = net[2]
    inner.inner[0].weight.data[:4], x = 0, torch.randn(2, 1, 8, 8)
    calls = counting(net)
    assert shrink(net, x).after < 16 * 16 * 9 + sum(p.numel() for p in net.parameters())
    assert inner.inner[0].out_channels == 12 and len(calls) < 16


class Windows(nn.Module):
    """Sums over windows, weighted by numbers of each place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weights, self.fc = nn.Conv2d(1, 12, 1), nn.Conv2d(12, 9, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        windows = F.unfold(x, 3, padding=1)
        again = F.fold(windows, (h, w), 3, padding=1)
        mixed = (windows.view(n, c, 9, h, w) * self.weights(x)[:, None].softmax(2)).sum(2)
        return self.fc(mixed + again)


@pytest.mark.parametrize(
    "make",
    [
        Windows,
        lambda: Net(  # a mask of another type
            lambda net, x: net.b(net.a(x) * (x.mean(1, keepdim=True) > 0).type_as(net.a(x))),
            a=nn.Conv2d(1, 12, 1),
            b=nn.Conv2d(12, 3, 1),
        ),
        lambda: Net(  # waves over space
            lambda net, x: net.b(torch.fft.irfft2(torch.fft.rfft2(net.a(x)), s=x.shape[2:])),
            a=nn.Conv2d(1, 12, 1),
            b=nn.Conv2d(12, 3, 1),
        ),
        lambda: Net(  # one number of all channels
            lambda net, x: F.linear(net.a(x.flatten(1)).relu(), net.v[0].weight[0])[:, None] + net.b(x.flatten(1)),
            a=nn.Linear(16, 12),
            v=nn.ModuleList([nn.Linear(12, 1)]),
            b=nn.Linear(16, 3),
        ),
        lambda: Net(  # points by how near they are to others
            lambda net, x: (points := net.a(x.flatten(2).mT), net.b((-torch.cdist(points, points)).exp() @ points))[1],
            a=nn.Linear(1, 12),
            b=nn.Linear(12, 3),
        ),
    ],
    ids=["windows", "type_as", "fourier", "vector", "distances"],
)
def test_channels_leave_through(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(2, 1, 4, 4)
    pruner = masked(net, x)
    with torch.no_grad():
        before, result = net(x), shrink(net, x)
        after = net(x)
    assert {cut.shape[0] for cut in result.plan.tensors.values()} >= {12} and not result.left and pruner.skipped
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())


class Pooled(nn.Module):
    """Positions are mixed by a score that is a channel beside keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.qkv, self.out, self.fc = nn.Conv1d(3, 17, 1), nn.Conv1d(8, 6, 1), nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([1, self.dim, self.dim], 1)
        context = (k * q.softmax(-1)).sum(-1, keepdim=True)
        return self.fc(self.out(v.relu() * context).relu())


def test_a_single_channel_beside_others_stays_and_they_leave() -> None:
    net, x = Pooled().eval(), torch.randn(2, 3, 10)
    reasons = {port.path: each.reason for each in couplings(net, x) for port in each.ports if port.side == "in"}
    assert reasons["out"] is None and reasons["fc"] is None
    pruner = masked(net, x)
    before, result = net(x), shrink(net, x)
    assert pruner.attached and not result.left and net.dim == 4 and net.qkv.out_channels == 9
    torch.testing.assert_close(net(x), before)


def test_places_that_channels_are_read_at_have_their_reason() -> None:
    def call(net: Any, x: Tensor) -> Tensor:
        places = net.places(x).permute(0, 2, 3, 1).tanh()
        return net.fc(F.grid_sample(net.a(x), places, align_corners=False))

    net = Net(call, a=nn.Conv2d(1, 12, 1), places=nn.Conv2d(1, 2, 1), fc=nn.Conv2d(12, 3, 1))
    reasons = {port.path: each.reason for each in couplings(net, torch.randn(2, 1, 4, 4)) for port in each.ports}
    assert reasons["a"] is None and "takes them as places" in str(reasons["places"])
