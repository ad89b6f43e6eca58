"""Channels that a LayerNorm or RMSNorm takes its statistics over: the masked model is the one without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from loops import loop
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.app.finished import load_run
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.training import train
from pl_sparse.callbacks.several import overlap
from pl_sparse.export import load_shrunk, save_shrunk, shrink
from pl_sparse.network.hooks import called
from pl_sparse.network.norms import is_over_left, norm_over_all, norm_over_left
from pl_sparse.schedule import OneShot
from pl_sparse.structure import Channel, Head, Structure
from pl_sparse.surgery.trial import couplings

WIDTH = Channel(coupled=True, through_norms=True)


class ShiftedNorm(nn.Module):
    """An RMSNorm as Gemma has it, whose scale is 1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (1 + self.weight)


class OwnLayerNorm(nn.Module):
    """A LayerNorm written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * self.weight + self.bias


def naive(norm: nn.Module, x: Tensor, kept: list[int]) -> Tensor:
    """The norm of some channels alone, by loops over rows; the others are zero."""
    out = torch.zeros_like(x)
    scale = norm.weight + 1 if isinstance(norm, ShiftedNorm) else norm.weight
    for row in range(len(x)):
        values = [float(x[row, i]) for i in kept]
        centres = isinstance(norm, (nn.LayerNorm, OwnLayerNorm))
        mean = sum(values) / len(values) if centres else 0.0
        deviation = (sum((v - mean) ** 2 for v in values) / len(values) + 1e-3) ** 0.5
        for i, value in zip(kept, values, strict=True):
            out[row, i] = (value - mean) / deviation * scale[i] + (norm.bias[i] if centres else 0)  # type: ignore[index]
    return out


@pytest.mark.parametrize(
    "make", [lambda n: nn.LayerNorm(n, 1e-3), lambda n: nn.RMSNorm(n, 1e-3), ShiftedNorm, OwnLayerNorm]
)
def test_statistics_over_the_channels_left_against_loops(make: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    norm, x, gone = make(7), torch.randn(4, 7) * 0.1 + 1, [1, 2, 6]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    plain, kept = norm(x), [0, 3, 4, 5]
    norm_over_left(norm)
    assert torch.equal(norm(x), plain)  # to the bit, while nothing is masked
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter[gone] = 0
        x[:, gone] = 0
    assert torch.allclose(norm(x)[:, kept], naive(norm, x, kept)[:, kept], atol=1e-5)
    assert torch.allclose(copy.deepcopy(norm)(x), norm(x))  # a copy has it too
    assert not torch.allclose(norm(x)[:, kept], plain[:, kept], atol=1e-2)
    norm_over_all(norm)
    assert not is_over_left(norm) and not torch.allclose(norm(x)[:, kept], naive(norm, x, kept)[:, kept], atol=1e-2)


class Encoder(nn.Module):
    """torch's own transformer, with positions and a class token beside the patches."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 16, 2, 2), nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, norm_first=first, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.encoder(x + self.positions)[:, 0])


class SharedTable(nn.Module):
    """Two tables and a head with the weight of a third table, which only holds it, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.source, self.target = (nn.Embedding(20, 16) for _ in range(3))
        self.head = nn.Linear(16, 20, bias=False)
        self.source.weight = self.target.weight = self.head.weight = self.shared.weight
        self.first_norm, self.last_norm = nn.RMSNorm(16), nn.RMSNorm(16)
        self.wi, self.wo = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.source(ids).mean(1, keepdim=True) + self.target(ids)
        return self.head(self.last_norm(x + self.wo(self.wi(self.first_norm(x)).relu())))


def _of_hugging_face(model: str, config: str, **settings: Any) -> tuple[nn.Module, Any]:
    library = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = getattr(library, model)(getattr(library, config)(**{**sizes, "intermediate_size": 24, **settings}))
    return made, {"input_ids": torch.randint(3, 40, (2, 6))}


_LLAMA = {"num_key_value_heads": 1, "use_cache": False, "max_position_embeddings": 16}
MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torch": lambda: (Encoder(first=False), torch.randn(2, 1, 4, 4)),
    "torch, norm first": lambda: (Encoder(first=True), torch.randn(2, 1, 4, 4)),
    "a table of three modules": lambda: (SharedTable(), torch.randint(0, 20, (2, 6))),
    "bert": lambda: _of_hugging_face("BertForSequenceClassification", "BertConfig", max_position_embeddings=8),
    "bert, tied": lambda: _of_hugging_face("BertForMaskedLM", "BertConfig", max_position_embeddings=8),
    "llama": lambda: _of_hugging_face("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "llama, tied": lambda: _of_hugging_face("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **_LLAMA),
}


def halved(net: nn.Module, x: Any, structure: Channel = WIDTH) -> Pruner:
    """Prune in training, a few steps."""
    pruner = Pruner("magnitude", "linear", structure, "uniform", sparsity=0.5)
    pruner.attach(net, x)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    loop(pruner, optimizer, lambda: next(iter(called(net.train(), x))).square().mean(), 6)
    net.eval()
    return pruner


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_width_goes_and_outputs_are_those_of_the_masked_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = MODELS[name]()
    fresh, before = copy.deepcopy(net), sum(p.numel() for p in net.parameters())
    pruner = halved(net, x)
    masked = [out.detach() for out in called(net, x)]
    plain = copy.deepcopy(net)
    for module in plain.modules():
        norm_over_all(module)
    assert not torch.allclose(called(plain, x)[0], masked[0], atol=1e-3)  # the hooks are what makes the difference
    result = shrink(net, x, {p.name: p.mask for p in pruner.masked if p.pruned})
    assert not result.left and result.after < 0.5 * before
    for out, expected in zip(called(net, x), masked, strict=True):
        assert torch.allclose(out, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert not any(is_over_left(module) for module in net.modules())
    assert {len(p) for name, p in net.named_parameters() if "norm" in name.lower()} == {8}
    save_shrunk(net, result.plan, tmp_path)
    load_shrunk(fresh.eval(), tmp_path)
    assert torch.equal(called(fresh, x)[0], called(net, x)[0])


def test_without_the_option_all_is_as_before() -> None:
    net, x = MODELS["torch"]()
    reasons = {port.path: c.reason for c in couplings(net, x) for port in c.sources(net)}
    assert "self_attn (MultiheadAttention), which needs all of them" in str(reasons["patches"])
    pruner = Pruner(structure=Channel(coupled=True), sparsity=0.5)
    pruner.attach(net, x)
    assert [group.name for group in pruner.groups] == [f"encoder.layers.{i}.linear1.weight" for i in (0, 1)]
    assert not any(is_over_left(module) for module in net.modules())


class Narrow(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 8), norm, nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x))).relu())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(8, elementwise_affine=False), "norm (LayerNorm), which needs all of them"),
        (ShiftedNorm(8), "the scale of norm is zero for 8 of its channels"),
        (nn.GroupNorm(1, 8), "norm (GroupNorm), which needs all of them"),
    ],
)
def test_norms_that_do_not_tell_what_is_left_keep_their_channels(norm: nn.Module, reason: str) -> None:
    net = Narrow(norm)
    pruner = Pruner(structure=WIDTH, sparsity=0.5)
    pruner.attach(net, torch.randn(2, 4))
    assert reason in pruner.skipped["a.weight"] and [group.name for group in pruner.groups] == ["b.weight"]
    assert not is_over_left(norm)


def test_the_option_is_of_coupled_channels() -> None:
    with pytest.raises(ValueError, match="structure=coupled"):
        Channel(through_norms=True)


def settings(folder: Path, *overrides: str) -> Any:
    short = ["trainer.enable_progress_bar=false", "trainer.max_epochs=2", "data.limit=128", f"output_dir={folder}"]
    width = ["structure=coupled", "structure.through_norms=true", "allocation=uniform", "sparsity=0.5"]
    with composition():
        return hydra.compose("train", ["model=vit_tiny", *width, *short, *overrides])


def test_the_command_removes_the_width_while_it_trains_and_knows_a_masked_run(tmp_path: Path) -> None:
    masked = train(settings(tmp_path / "masked"))
    shrunk = train(settings(tmp_path / "shrunk", "shrink_every=1"))
    assert shrunk["sparsity"] == masked["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert shrunk["params_left"] < 0.5 * masked["params_left"]
    assert shrunk["test/acc"] == pytest.approx(masked["test/acc"], abs=0.02)
    runs = [load_run(tmp_path / name)[0].net for name in ("masked", "shrunk")]
    x = torch.randn(4, *load_run(tmp_path / "masked")[1].shape)  # type: ignore[union-attr]
    assert any(is_over_left(module) for module in runs[0].modules())
    assert not any(is_over_left(module) for module in runs[1].modules())
    assert torch.allclose(runs[0](x), runs[1](x), atol=1e-4)


def _half(model: nn.Module, structure: Structure, x: Tensor) -> Pruner:
    pruner = Pruner("magnitude", OneShot(final=0.5, begin=0.0), structure, "uniform", misfit="dense")
    pruner.attach(model, (x,))
    pruner.prepare(1)
    pruner.before_step(0)
    pruner.after_step()
    return pruner


def test_heads_and_width_are_refused_at_once_and_go_one_after_the_other() -> None:
    torch.manual_seed(0)
    model, x = Encoder(True).eval(), torch.randn(3, 1, 4, 4)
    pruners = [Pruner(structure=structure, sparsity=0.5) for structure in (Head(), WIDTH)]
    for pruner in pruners:
        pruner.attach(model, (x,))
    for pruner, other in (pruners, pruners[::-1]):
        reason = overlap(pruner, [other])
        assert reason is not None and reason.startswith("structure=head and through_norms=true both prune encoder.")
    assert overlap(pruners[0], []) is None

    model = Encoder(True).eval()
    with torch.no_grad():
        for structure in (Head(), WIDTH):
            before = sum(weight.numel() for weight in model.parameters())
            _half(model, structure, x)
            masked = model(x)
            assert not shrink(model, (x,)).left
            assert sum(weight.numel() for weight in model.parameters()) < before
            assert torch.allclose(model(x), masked, atol=1e-5)
