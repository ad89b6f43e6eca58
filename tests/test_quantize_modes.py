"""A network that simulates integers trains and evaluates as its modules do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantize import Module, data, fit
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse.quantize import Int8, integers

pytest.importorskip("torchao")


class Attention(nn.Module):
    """Attention that drops half of its weights in training, before a norm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.norm, self.outputs = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.inputs(x))[None, None]
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=0.5 if self.training else 0.0)
        return self.outputs(self.drop(y[0, 0]))


class Dropped(nn.Module):
    """A path that is dropped in training at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            y = y * (torch.rand_like(y) < 0.5)
        return self.second(x + y)


def test_what_attention_drops_in_training_it_keeps_in_evaluation() -> None:
    torch.manual_seed(0)
    net, x, quantization = Attention(), torch.randn(16, 8), Int8()
    wanted = net.eval()(x).detach()
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantization.prepare(net, x)
    assert all(module.training for module in net.modules())
    net.norm.momentum = 0.0
    with torch.no_grad():
        assert not torch.equal(net(x), net(x))
        net.norm.reset_running_stats()
        simulated, converted = net.eval()(x), quantization.convert()
        assert torch.equal(simulated, net(x)) and torch.equal(converted(x), converted(x))
    assert float((simulated - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    torch.testing.assert_close(converted(x), simulated, atol=1e-5, rtol=1e-5)


def test_what_is_drawn_in_training_alone_is_left_out_and_said() -> None:
    torch.manual_seed(0)
    net, x, quantization = Dropped(), torch.randn(16, 8), Int8()
    with pytest.warns(UserWarning, match=r"^Dropped trains as it evaluates.*draws random numbers \(aten.rand_like"):
        quantization.prepare(net, x)
    wanted = Dropped.forward(net.eval(), x).detach()
    with torch.no_grad():
        net.train()(x)
        converted = quantization.convert()
        assert float((converted(x) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_what_returns_more_in_training_is_refused() -> None:
    class Both(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, x) if self.training else y

    net = Both(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^Both returns other things in training than in evaluation"):
        Int8().prepare(net, torch.randn(4, 8))
    assert "forward" not in vars(net) and net.training


def test_a_norm_in_evaluation_mode_stays_so() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    net[1].eval()
    quantization, x = Int8(), 3 + torch.randn(16, 8)
    quantization.prepare(net, x)
    assert [module.training for module in net] == [True, False, True, True]
    net(x)
    assert not net[1].running_mean.any() and bool(net[3].running_mean.all())


@pytest.mark.filterwarnings("ignore:Found 9 module")
def test_a_network_in_evaluation_mode_learns_its_ranges(tmp_path: Path) -> None:
    module = Module()
    module.net.eval()  # as pretrained ones come
    _, quantize = fit(tmp_path, module, Int8())
    x, _ = data()
    with torch.no_grad():
        wanted = nn.Sequential.forward(module.net, x)
        converted = quantize.quantization.convert()
        assert float((converted(x) - wanted).abs().median()) < 0.01 * float(wanted.abs().max())


def test_ranges_that_are_not_known_are_no_integers() -> None:
    net, quantization = nn.Sequential(nn.Linear(8, 8)), Int8()
    quantization.prepare(net, torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"^no batch of training went through Sequential"):
        quantization.convert()


def test_a_network_that_diverged_has_no_integers() -> None:
    net, x, quantization = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), Int8()
    with torch.no_grad():
        net[0].weight[0] = torch.nan
    quantization.prepare(net, x)
    with pytest.raises(RuntimeError, match=r"^weights of Sequential are not finite: training diverged"):
        net(x)
    with pytest.raises(ValueError, match=r"^Sequential has no integers: its values are not finite"):
        quantization.convert()


def test_a_network_of_two_tensors_is_refused() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    with pytest.raises(ValueError, match=r"^Two cannot be called with one tensor, a batch's first: TypeError"):
        Int8().prepare(Two(8, 8), torch.randn(4, 8))


def test_a_norm_without_statistics_of_its_own_is_what_it_was() -> None:
    """A weight that is standardized by the norm of a batch, and a norm that keeps no statistics."""

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.reshape(1, len(self.weight), -1)
            weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape(self.weight.shape)
            return F.conv2d(x, weight, self.bias)

    torch.manual_seed(0)
    net = nn.Sequential(Standardized(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    x, quantization = torch.randn(8, 2, 5, 5), Int8()
    wanted = net.eval()(x).detach()
    quantization.prepare(net.train(), x)
    net(x)
    with torch.no_grad():
        simulated, converted = net.eval()(x), quantization.convert()
        assert float((simulated - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
        assert float((converted(x) - simulated).abs().median()) < 1e-6
    assert set(integers(converted, net)) == {"0.weight"}


def test_what_a_module_keeps_for_evaluation_is_forgotten() -> None:
    class Keeping(nn.Linear):
        kept: Tensor | None = None

        def train(self, mode: bool = True) -> Any:
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training and self.kept is None:
                self.kept = 2 * self.weight
            return F.linear(x, 2 * self.weight if self.training else self.kept)  # type: ignore[arg-type]

    net, quantization = nn.Sequential(Keeping(8, 8)), Int8()
    quantization.prepare(net.eval(), torch.randn(4, 8))
    assert net[0].kept is None and not net[0].training
