"""What is awkward for pruning, made of what torch has."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from zoo.entry import Case, entry


def rows(width: int = 16, count: int = 8) -> Any:
    return lambda: torch.randn(count, width)


def tokens(size: int = 32, count: int = 4, length: int = 8) -> Any:
    return lambda: torch.randint(size, (count, length))


def mlp(*layers: nn.Module) -> nn.Sequential:
    """The layers, with a plain one behind them."""
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 16))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16) / 4)
        self.kernel = nn.Parameter(torch.randn(8, 1, 4) / 2)
        self.mix = nn.ParameterDict({"a": torch.randn(16, 8), "b": torch.randn(16, 8)})
        self.shift = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w, self.shift).relu()
        h = F.conv1d(h[:, None], self.kernel, stride=2).relu().mean(1)
        return h @ torch.cat([self.mix["a"], self.mix["b"]], 1)[:15]


@entry("own parameters with F.linear", "torch", quick=True, structure="unstructured", scorer="magnitude")
def functional() -> Case:
    return Case(Functional(), rows())


class Experts(nn.Module):
    """A mixture whose experts are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(4, 32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        h = torch.einsum("bi,eih->beh", x, self.up).relu()
        return torch.einsum("beh,eho,be->bo", h, self.down, gates)


@entry(
    "3-D experts", "torch", quick=True, layouts={"up": "in_out", "down": "in_out"}, scorer="movement", structure="nm24"
)
def experts() -> Case:
    return Case(Experts(), rows())


def convs(norm: Any) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated
        return nn.Sequential(
            norm(nn.Conv1d(4, 16, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(16, 8, 4)), nn.ReLU(), nn.Conv1d(8, 4, 3)
        )


def signals() -> Tensor:
    return torch.randn(4, 4, 12)


@entry("weight_norm", "torch", quick=True, structure="unstructured")
def weight_norm() -> Case:
    return Case(convs(parametrizations.weight_norm), signals)


@entry("weight_norm, old", "torch", structure="unstructured", scorer="magnitude")
def old_weight_norm() -> Case:
    return Case(convs(nn.utils.weight_norm), signals)


@entry("spectral_norm", "torch", quick=True)
def spectral_norm() -> Case:
    return Case(convs(parametrizations.spectral_norm), signals)


@entry("spectral_norm, old", "torch")
def old_spectral_norm() -> Case:
    return Case(convs(nn.utils.spectral_norm), signals)


@entry("orthogonal", "torch", quick=True, left_out=["no zeros of the weight"])
def orthogonal() -> Case:
    return Case(mlp(parametrizations.orthogonal(nn.Linear(16, 32))), rows())


@entry("torch's own pruning", "torch", scorer="magnitude", structure="unstructured", sparsity=0.75)
def own_pruning() -> Case:
    layer = nn.Linear(16, 32)
    prune.identity(layer, "weight")
    return Case(mlp(layer), rows())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(32, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 32)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(x))[0])
        return out


@entry("tied embedding and LSTM", "torch", quick=True)
def tied() -> Case:
    return Case(Tied(), tokens())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = nn.ModuleList([self.first, nn.Linear(16, 16), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.again:
            x = layer(x).tanh()
        return x


@entry("shared layers", "torch", quick=True)
def shared() -> Case:
    return Case(Shared(), rows())


def run_once(module: nn.Module) -> None:
    if any(isinstance(weight, nn.UninitializedParameter) for weight in module.parameters()):
        module(torch.randn(2, 3, 12, 12))


@entry("lazily made", "torch", quick=True)
def lazy() -> Case:
    layers = [nn.LazyConv2d(16, 3), nn.ReLU(), nn.LazyConv2d(16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)]
    return Case(nn.Sequential(*layers), lambda: torch.randn(4, 3, 12, 12), made=run_once)


def give_values(module: nn.Module) -> None:
    if any(weight.is_meta for weight in module.parameters()):
        module.to_empty(device="cpu")
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()


@entry("meta device", "torch", quick=True)
def meta() -> Case:
    with torch.device("meta"):
        module = mlp(nn.Linear(16, 32), nn.BatchNorm1d(32))
    return Case(module, rows(), made=give_values)


@entry("frozen backbone", "torch", left_out=["frozen"])
def frozen() -> Case:
    return Case(mlp(nn.Linear(16, 32).requires_grad_(False)), rows())


@entry("quantized backbone", "torch", left_out=["int8"], scorer="magnitude", structure="unstructured")
def quantized() -> Case:
    class Int8(nn.Module):
        """A linear layer of whole numbers with a scale."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-127, 127, (32, 16), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.full((32, 1), 0.01))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.scale)

    return Case(mlp(Int8()), rows())


@entry("scripted part", "torch", left_out=["scripted"], structure="block4x4", sparsity=0.75)
def scripted() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        part = torch.jit.script(nn.Linear(16, 32))
    return Case(mlp(part), rows())


class Fourier(nn.Module):
    """A layer of a neural operator: weights of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.drop = nn.Linear(1, 8), nn.Linear(8, 1)
        self.mid = nn.Linear(8, 8)
        self.modes = nn.Parameter(torch.randn(8, 8, 5, dtype=torch.cfloat) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x[..., None])
        waves = torch.einsum("bki,iok->bko", torch.fft.rfft(h, dim=1)[:, :5], self.modes)
        h = torch.fft.irfft(waves, n=x.shape[1], dim=1) + self.mid(h)
        out: Tensor = self.drop(h.relu())[..., 0]
        return out


@entry("complex weights", "torch", left_out=["complex64"], scorer="magnitude", structure="unstructured")
def fourier() -> Case:
    return Case(Fourier(), rows())


@entry("traced to a graph", "torch")
def traced() -> Case:
    return Case(torch.fx.symbolic_trace(mlp(nn.Linear(16, 32), nn.LayerNorm(32))), rows())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True, add_bias_kv=True)
        self.pair = nn.Bilinear(16, 16, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.attend(x, memory, memory, need_weights=False)[0]
        out: Tensor = self.pair(h, x)
        return out


@entry("attention with other widths, Bilinear", "torch")
def attention() -> Case:
    return Case(Attention(), lambda: (torch.randn(4, 5, 16), torch.randn(4, 6, 8)))


@entry("nn.Transformer", "torch")
def transformer() -> Case:
    module = nn.Transformer(16, 4, 1, 1, 32, dropout=0.1, batch_first=True)
    return Case(module, lambda: (torch.randn(4, 5, 16), torch.randn(4, 6, 16)))


@entry("grouped and depthwise convolutions in double precision", "torch")
def grouped() -> Case:
    layers = [
        nn.Conv2d(4, 16, 3, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.PReLU(16),
        nn.ConvTranspose2d(16, 16, 2, groups=4),
        nn.Conv2d(16, 8, 1),
    ]
    return Case(nn.Sequential(*layers).double(), lambda: torch.randn(4, 4, 8, 8, dtype=torch.double))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(nn.Linear(16, 32), nn.Dropout(0.2)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.body, x, use_reentrant=False))
        return out


@entry("activation checkpointing", "torch")
def checkpointed() -> Case:
    return Case(Checkpointed(), rows())


class Hyper(nn.Module):
    """A network that makes the weights of another, and one that is called with weights that are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.net = nn.Linear(8, 16 * 4), nn.Linear(16, 16)
        self.code = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: 0.9 * value for name, value in self.net.named_parameters()}
        h = torch.func.functional_call(self.net, weights, (x,)).relu()
        return h @ self.maker(self.code).view(16, 4)


@entry("hypernetwork and functional_call", "torch", quick=True)
def hyper() -> Case:
    return Case(Hyper(), rows())
