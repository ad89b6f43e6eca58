"""Networks of many kinds trained for integers: what is computed, exported, zero, and named where it stays as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pl_sparse import Pruner
from pl_sparse.export import ONNXInt8
from pl_sparse.export.onnx import saturates
from pl_sparse.quantize import Int8, integers, post_training
from pl_sparse.schedule import OneShot

pytest.importorskip("torchao")
pytest.importorskip("onnxruntime")


class Functional(nn.Module):
    """Parameters of its own, and constants, in functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.matrix = nn.Parameter(torch.randn(4, 8) / 3)
        self.mix = nn.Parameter(torch.randn(4, 4) / 2)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        x = F.relu(F.conv2d(x, self.kernel, padding=1)) * 2.0 + torch.ones(1, 8, 1, 1)
        return F.linear(x.mean((2, 3)), self.matrix) @ self.mix


class Products(nn.Module):
    """Products with matrices of its own, of one shape, used in another order than declared."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("inward", "middle", "outward", "mix"):
            setattr(self, name, nn.Parameter(torch.randn(8, 8) / 3))
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.addmm(self.shift, F.relu(x @ self.middle), self.inward))
        return F.linear(x, self.outward) @ self.mix.T


class Tied(nn.Module):
    """A head that is tied to a table, which is read as such too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.table(torch.tensor([1, 2])).mean(0))
        return out


class Block(nn.Module):
    """A residual block whose ReLU is one module that is called twice, as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.second, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.first(x)))
        return self.relu(self.norm2(self.second(y)) + x)


class Activated(nn.BatchNorm2d):
    """A norm with an activation and a second output within, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.silu(y) + y.mean((2, 3), keepdim=True)


class Mobile(nn.Module):
    """A depthwise convolution with norms, activations that are cut off, and a squeeze, in the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.down, self.up, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm2(self.depthwise(F.relu6(self.norm(self.conv(x))))))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))


class UNet(nn.Module):
    """A transposed convolution with its norm, beside what it began with."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.up, self.norm2, self.out = (
            nn.ConvTranspose2d(8, 6, 2, 2, bias=False),
            nn.BatchNorm2d(6),
            nn.Conv2d(9, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.up(F.relu(self.norm(self.down(x))))))
        return self.out(torch.cat([x, y], 1))


class Signal(nn.Module):
    """Convolutions of signals, one of them depthwise beside a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(4, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.depthwise, self.head = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head((x + self.depthwise(x)).mean(-1))


class Attention(nn.Module):
    """Patches, a position, an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 4, 16))
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x).flatten(2).transpose(1, 2) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Shared(nn.Module):
    """A layer that is called twice, and a constant that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.scale = nn.Linear(8, 8), nn.Linear(8, 3), 3.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x)) + torch.arange(8.0) / 8
        return self.head(torch.relu(self.layer(x)) * self.scale)


class Positions(nn.Module):
    """A product of integers, as positions of tokens are, that a table looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        there = (x[..., 0] > -9).int()
        places = ((there.cumsum(1).type_as(there) + 0) * there).long() + 1
        return self.head(torch.relu(self.layer(x) + self.table(places)))


class Counted(nn.Module):
    """Positions that are counted in floating point, and a part that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused, self.norm, self.relu = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU(inplace=True)
        self.last = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        there = torch.ones(x.shape[:2])
        y = torch.relu(self.layer(x) + self.table((there.cumsum(1) * there - 1).long()))
        self.last(self.relu(self.norm(self.unused(y.mT))))
        return self.head(y)


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        make: makes it.
        shape: of a batch.
        floats: the weights that stay in floating point, by the operation that reads them; it is said before training.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    floats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


CASES = {
    "itself, depthwise, norms, squeeze": Case(Mobile, (8, 3, 8, 8)),
    "functional, constants": Case(Functional, (8, 3, 8, 8)),
    "products": Case(Products, (8, 8)),
    "a ReLU that is called twice": Case(lambda: _of(Block(), Block(), nn.Conv2d(3, 4, 1)), (8, 3, 8, 8)),
    "a norm with more within": Case(lambda: _of(nn.Conv2d(3, 4, 3), Activated(4), nn.Conv2d(4, 4, 1)), (8, 3, 8, 8)),
    "tied": Case(lambda: _of(nn.Linear(8, 8), Tied()), (8, 8)),
    "shared, constants": Case(Shared, (8, 8)),
    "attention": Case(Attention, (8, 3, 8, 8), {"add": ("position",)}),
    "products of integers": Case(Positions, (8, 5, 8), {"embedding": ("table.weight",)}),
    "counted in floating point, unused": Case(
        Counted, (8, 5, 8), {"embedding": ("table.weight",), "nothing": ("unused.weight", "last.weight")}
    ),
    "recurrent": Case(Recurrent, (8, 5, 6), {"lstm": ("rnn.weight_ih_l0", "rnn.weight_hh_l0")}),
    "signals, depthwise": Case(Signal, (8, 4, 12)),
    "transposed with a norm": Case(UNet, (8, 3, 8, 8)),
    "volumes with a norm": Case(
        lambda: _of(
            nn.Conv3d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.Conv3d(4, 4, 3, groups=4),
            nn.Flatten(),
            nn.Linear(128, 3),
        ),
        (4, 2, 4, 6, 6),
    ),
    "paddings in words": Case(
        lambda: _of(
            nn.Conv2d(4, 8, 3, padding="valid"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1, padding="valid"),
        ),
        (8, 4, 8, 8),
    ),
    "linear with a norm": Case(lambda: _of(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)), (8, 8)),
    "norms before layers": Case(
        lambda: _of(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (8, 3, 8, 8),
    ),
}
SLOW = {
    "signals, transposed": Case(
        lambda: _of(nn.Conv1d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose1d(8, 4, 4, 2, 1)), (8, 4, 12)
    ),
    "volumes, transposed": Case(
        lambda: _of(nn.Conv3d(2, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, 2)), (4, 2, 4, 6, 6)
    ),
    "transposed in groups": Case(
        lambda: _of(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2, groups=2)), (8, 3, 8, 8)
    ),
    "group norm, SiLU, GELU": Case(
        lambda: _of(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)
        ),
        (8, 3, 8, 8),
    ),
    "dilated, same, circular, PReLU": Case(
        lambda: _of(
            nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2),
            nn.LeakyReLU(),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
            nn.PReLU(),
            nn.Conv2d(4, 2, 1),
        ),
        (8, 4, 8, 8),
    ),
    "norms without scales": Case(
        lambda: _of(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4, affine=False),
        ),
        (8, 3, 8, 8),
    ),
    "weight norm": Case(
        lambda: _of(parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)), (8, 8)
    ),
    "tokens": Case(lambda: _of(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), (8, 3, 8)),
}


def params() -> list[Any]:
    slow = [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]
    return [*(pytest.param(case, id=name) for name, case in CASES.items()), *slow]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", params())
def test_integers_compute_what_was_simulated_and_zeros_stay(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = case.make(), torch.randn(case.shape)
    for norm in net.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    pruner = Pruner("magnitude", OneShot(final=0.5), allocation="uniform", misfit="dense")
    pruner.attach(net, (x,))
    pruner.prepare(2)
    quantization = Int8()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantization.prepare(net, x)
    told = [str(warning.message) for warning in caught if "floating point" in str(warning.message)]
    listed = "; ".join(f"{', '.join(names)} (read by {operation})" for operation, names in case.floats.items())
    assert told == ([f"in floating point stay {listed}: quantization=int8 finds linear layers, convolutions and "
                     "products with a matrix"] if case.floats else [])  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        net.train()(torch.randn(case.shape)).square().mean().backward()
        pruner.before_step(step)
        optimizer.step()
        pruner.after_step()
    quantization.freeze()
    with torch.no_grad():
        simulated, converted = net.eval()(x), quantization.convert()
        assert float((converted(x) - simulated).abs().max()) < 1e-5 * float(simulated.abs().max())

    found = integers(converted, net)
    masked = {param.name: param.mask for param in pruner.params}
    left = {name for names in case.floats.values() for name in names}
    assert not [name for name in masked if name not in found and name not in left]
    for name, values in found.items():
        assert values.dtype == torch.int8 and (name not in masked or not values[~masked[name]].any())
    assert all(int((mask == 0).sum()) for mask in masked.values())

    file = tmp_path / ONNXInt8.file
    ONNXInt8(tolerance=0.05).write(converted, x, file)  # compares its outputs
    import onnx

    eight = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    stored = [t for t in onnx.load(str(file)).graph.initializer if t.data_type in eight]
    assert len([t for t in stored if len(t.dims) > 1]) == len(found)


def dequantized(file: Path) -> list[tuple[str, np.ndarray]]:
    """The type and the numbers of each 8-bit matrix of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    result = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and stored.get(node.input[0], np.zeros(1)).ndim > 1:
            weight, scale, zero = (stored[name] for name in node.input)
            axis = next((each.i for each in node.attribute if each.name == "axis"), 1) if scale.ndim else 0
            shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)] if scale.ndim else []
            values = (weight.astype(np.int64) - zero.astype(np.int64).reshape(shape)) * scale.reshape(shape)
            result.append((str(weight.dtype), values))
    return result


def test_weights_are_the_same_numbers_in_int8_and_in_uint8(tmp_path: Path) -> None:
    """ONNX Runtime computes int8 wrongly on x86 processors without VNNI: the file was refused there."""
    torch.manual_seed(0)
    x = 3 * torch.rand(8, 4, 5, 5)
    net = nn.Sequential(nn.Conv2d(4, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(360, 7))
    nn.init.zeros_(net[0].weight[:, 1])
    nn.init.uniform_(net[3].weight, 0.5, 1.0)  # sums of products that 16 bits cannot hold
    converted, files = post_training(net.eval(), [x]), {}
    for weights in ("auto", "int8", "uint8"):
        files[weights] = tmp_path / f"{weights}.onnx"
        ONNXInt8(tolerance=2.0 if weights == "int8" else 0.02, weights=weights).write(converted, x, files[weights])
    read = {weights: dequantized(file) for weights, file in files.items()}
    assert [len(each) for each in read.values()] == [2, 2, 2]
    for weights, pairs in read.items():
        assert {kind for kind, _ in pairs} == {("uint8" if saturates() else "int8") if weights == "auto" else weights}
        for (_, values), (_, wanted) in zip(pairs, read["int8"], strict=True):
            assert np.array_equal(values, wanted)
        assert not pairs[0][1][:, 1].any()
    with pytest.raises(ValueError, match="weights='int4' is unknown"):
        ONNXInt8(weights="int4")


@pytest.mark.parametrize("wrong", [True, False])
def test_a_file_is_what_its_processor_computes_rightly(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pl_sparse.export.onnx.saturates", lambda: wrong)
    x = torch.rand(4, 8) / 8
    net, file = post_training(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), [x]), tmp_path / ONNXInt8.file
    notes = ONNXInt8(tolerance=2.0).write(net, x, file)
    assert [kind for kind, _ in dequantized(file)] == ["uint8" if wrong else "int8"]
    assert notes[-1].startswith("weights are uint8" if wrong else "weights are int8: x86 processors without VNNI")


def _trained(net: nn.Module, x: Tensor) -> nn.Module:
    quantization = Int8()
    quantization.prepare(net, x)
    net.train()(x)
    converted = quantization.convert()
    quantization.release()
    return converted


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 3), nn.Conv2d(4, 3, 1), nn.ConvTranspose2d(4, 3, 1), _of(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))],
    ids=["linear", "convolution", "transposed", "with a norm"],
)
def test_the_bias_of_a_channel_of_zeros_is_in_the_file_as_it_is(layer: nn.Module, tmp_path: Path) -> None:
    """ONNX Runtime cuts off a bias whose scale is too small for an integer of 32 bits."""
    torch.manual_seed(0)
    linear = isinstance(layer, nn.Linear)
    x = torch.rand(8, 4) / 100 if linear else torch.rand(8, 4, 5, 5) / 100
    net = _of(copy.deepcopy(layer), nn.ReLU(), nn.Linear(3, 3) if linear else nn.Conv2d(3, 3, 1))
    first = net[0] if not isinstance(net[0], nn.Sequential) else net[0][0]
    nn.init.zeros_(first.weight[:, 0] if isinstance(first, nn.ConvTranspose2d) else first.weight[0])
    for part in (first, net[0][1] if isinstance(net[0], nn.Sequential) else first):
        nn.init.constant_(part.bias, 1.0)
    for converted in (_trained(net, x), post_training(net.eval(), [x])):
        file = tmp_path / ONNXInt8.file
        ONNXInt8(tolerance=0.02).write(converted, x, file)


@pytest.mark.parametrize("size", [1e2, 1e-3, 1e-10])
def test_activations_of_any_size_are_simulated_as_they_are_converted(size: float) -> None:
    """The error is that of 255 steps of their range."""
    torch.manual_seed(0)
    net, x = nn.Linear(8, 8, bias=False), size * torch.randn(16, 8)
    wanted = net(x).detach()
    quantization = Int8()
    quantization.prepare(net, x)
    net.train()(x)
    simulated, converted = net.eval()(x).detach(), quantization.convert()(x)
    assert float((simulated - converted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert 0 < float((simulated - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("behind", ["Conv2d", "Linear"])
@pytest.mark.parametrize("padding", [0, 1])
def test_averages_of_windows_that_end_outside_are_those_of_torch(padding: int, behind: str, tmp_path: Path) -> None:
    """ONNX Runtime's 8-bit kernel divides them by the whole window."""
    torch.manual_seed(0)
    pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True)
    last: list[nn.Module] = [nn.Conv2d(8, 4, 1)]
    if behind == "Linear":
        pool, last = nn.AvgPool2d(32, ceil_mode=True, padding=padding), [nn.Flatten(), nn.Linear(8, 4)]
    net, x = _of(nn.Conv2d(3, 8, 1), nn.SiLU(), pool, *last), torch.randn(4, 3, 6, 6)
    ONNXInt8(tolerance=0.05).write(_trained(net, x), x, tmp_path / ONNXInt8.file)


class Rescaled(nn.Module):
    """Writes to a weight when it is called, as RWKV of Hugging Face does."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.one, self.two, self.viewed = nn.Linear(8, 8), nn.Linear(8, 4), viewed

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            (self.one.weight.view(-1) if self.viewed else self.one.weight).mul_(1.0)
        out: Tensor = self.two(self.one(x).relu())
        return out


@pytest.mark.parametrize("viewed", [False, True])
def test_a_network_that_writes_to_its_weights_is_refused_before_training(viewed: bool) -> None:
    with pytest.raises(ValueError, match=r"Rescaled writes to its weight .*one\.weight when it is called"):
        Int8().prepare(Rescaled(viewed), torch.randn(4, 8))


class TiedAutoencoder(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.encoder(x).relu(), self.encoder.weight.t())


def test_integers_of_a_weight_that_is_read_transposed_have_its_shape() -> None:
    net, x = TiedAutoencoder(), torch.randn(4, 8)
    quantization = Int8()
    quantization.prepare(net, x)
    net(x)
    found = integers(quantization.convert(), net)
    assert {name: value.shape for name, value in found.items()} == {"encoder.weight": net.encoder.weight.shape}
