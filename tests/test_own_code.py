"""Channels of networks whose own code reads weights twice, makes states, and takes channels apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_couplings import Net, masked
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.export import shrink
from pl_sparse.structure import Head
from pl_sparse.surgery.trial import couplings


def tied() -> nn.Module:
    """An autoencoder whose decoder reads the weights of the encoder."""

    def call(net: Any, x: Tensor) -> Tensor:
        code = net.b(net.a(x).relu()).relu()
        return F.linear(F.linear(code, net.b.weight.t(), net.shift).relu(), net.a.weight.t())

    net = Net(call, a=nn.Linear(12, 10), b=nn.Linear(10, 8))
    net.register_parameter("shift", nn.Parameter(torch.randn(10)))
    return net


def gates(net: Any, x: Tensor, h: Tensor) -> Tensor:
    """A step of a convolutional GRU."""
    update, reset = net.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
    return (1 - update) * net.new(torch.cat([x, reset * h], 1)).tanh() + update * h


def conv_gru() -> nn.Module:
    """A state that begins as zeros."""

    def call(net: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), net.size, *x.shape[3:])
        for step in x.unbind(1):
            h = gates(net, net.a(step).relu(), h)
        return net.out(h)

    layers = {"a": nn.Conv2d(2, 6, 1), "gates": nn.Conv2d(14, 16, 1), "new": nn.Conv2d(14, 8, 1)}
    net = Net(call, **layers, out=nn.Conv2d(8, 2, 1))
    net.size = 8  # type: ignore[assignment]
    return net


def scan() -> nn.Module:
    """A state space whose states are written into a tensor one after the other, and a token before them."""

    def call(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        h, states = torch.zeros(len(x), x.shape[2]), torch.zeros(x.shape)
        for time in range(x.shape[1]):
            h = net.decay.sigmoid() * h + x[:, time]
            states[:, time] = h
        return net.out(net.b(torch.cat([torch.zeros(len(x), 1, x.shape[2]), states], 1)).relu())

    net = Net(call, a=nn.Linear(4, 12), b=nn.Linear(12, 10), out=nn.Linear(10, 3))
    net.register_parameter("decay", nn.Parameter(torch.randn(12)))
    return net


def selective() -> nn.Module:
    """A projection taken apart into parts of sizes that attributes have, as Mamba's."""

    def call(net: Any, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        rank, b, c = net.split(x).split([net.rank, net.states, net.states], -1)
        return net.out(net.rise(rank) * x * (b * c).sum(-1, keepdim=True))

    net = Net(call, a=nn.Linear(4, 12), split=nn.Linear(12, 16), rise=nn.Linear(6, 12), out=nn.Linear(12, 3))
    net.rank, net.states = 6, 5  # type: ignore[assignment]
    return net


def long_short() -> nn.Module:
    """An LSTM of parameters."""

    def call(net: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), net.size)
        for step in x.unbind(1):
            gate = (step @ net.w + h @ net.u).view(len(x), 4, -1)
            c = gate[:, 0].sigmoid() * c + gate[:, 1].sigmoid() * gate[:, 2].tanh()
            h = gate[:, 3].sigmoid() * c.tanh()
        return net.out(h)

    net = Net(call, out=nn.Linear(8, 3))
    for name, inputs in (("w", 4), ("u", 8)):
        net.register_parameter(name, nn.Parameter(torch.randn(inputs, 32)))
    net.size = 8  # type: ignore[assignment]
    return net


NETS: dict[Callable[[], nn.Module], tuple[tuple[int, ...], tuple[str, ...]]] = {
    tied: ((12,), ("channels come out of b.weight along its other dimension, too",)),
    conv_gru: ((3, 2, 4, 4), ()),
    scan: ((5, 4), ()),
    selective: ((4,), ()),
    long_short: ((5, 4), ()),
}
"""Networks, each with the shape of a sample, and why channels stay."""


@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
def test_half_of_the_channels_leave_and_outputs_stay(make: Callable[[], nn.Module]) -> None:
    shape, left = NETS[make]
    net, x = make().eval(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    reasons = {each.reason for each in couplings(net, x)} - {None, "its channels are outputs of the model"}
    assert reasons == set(left)
    pruner = masked(net, x)
    with torch.no_grad():
        before = net(x)
        result = shrink(net, x)
        after = net(x)
    assert not result.left and result.after < result.before
    pruner.shrink(result.plan.tensors)
    assert all(bool((param.weight != 0).all()) for param in pruner.params)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


class Attend(nn.Module):
    """Attention whose heads are counted where nobody looks, and a last layer that is nearly zero, as at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.counts = 4, (4,)
        self.qkv, self.proj, self.zero = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)
        nn.init.constant_(self.zero.weight, 1e-9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.counts[0], -1).permute(2, 0, 3, 1, 4)
        return self.zero(self.proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)))


def test_heads_stay_whose_removal_a_last_layer_of_small_weights_hides() -> None:
    net, x = Attend(), torch.randn(2, 5, 16)
    pruner = Pruner("magnitude", "oneshot", Head(), "uniform", sparsity=0.5)
    pruner.attach(net)
    pruner.prepare(10)
    left = shrink(net, x).left
    assert list(left.values()) == ["without it the outputs would be others: its channels cannot be followed"]
    assert net.qkv.out_features == 48 and net(x).shape == (2, 5, 3)


def test_channels_that_must_be_a_multiple_of_a_number_stay() -> None:
    def call(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        if y.shape[1] % 8:
            raise ValueError(f"{y.shape[1]} channels are not groups of 8")
        return net.b(y)

    net = Net(call, a=nn.Linear(4, 24), b=nn.Linear(24, 3))
    reason = couplings(net, torch.randn(2, 4))[0].reason
    assert reason is not None
    assert re.search(r"cannot be called without some of its channels \(ValueError: \d+ channels are not groups", reason)


@pytest.mark.parametrize("kept", [True, False])
def test_tensors_without_elements_are_left_alone(kept: bool) -> None:
    net = Net(lambda net, x: net.b(net.a(x)) + net.none.sum(), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    net.register_parameter("none", nn.Parameter(torch.zeros((1, 0, 8) if kept else (0, 8))))
    assert None in {each.reason for each in couplings(net, torch.randn(2, 4))}
