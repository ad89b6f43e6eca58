"""Every parameter is asked what it is: frozen, computed, tied, a table, a batch of matrices, or a weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from loops import loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity, Targets
from pl_sparse.core.candidates import candidates
from pl_sparse.core.layouts import Matrices
from pl_sparse.core.targets import find, select
from pl_sparse.results.summary import summarize, summary_table


def names(model: nn.Module, **options: Any) -> list[str]:
    return [param.name for param in find(model, **options)]


def attached(model: nn.Module, **options: Any) -> Pruner:
    pruner = Pruner(**{"schedule": "oneshot", "sparsity": 0.5, **options})
    pruner.attach(model)
    return pruner


def train(model: nn.Module, x: Tensor, pruner: Pruner, steps: int = 4) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    loop(pruner, optimizer, lambda: model(x).square().mean(), steps)


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


# Frozen weights


def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    return model


def test_frozen_weights_are_left_as_they_are_and_named() -> None:
    model = half_frozen()
    before = model[0].weight.clone()
    pruner = attached(model)
    train(model, torch.randn(4, 8), pruner)
    assert torch.equal(model[0].weight, before) and zeros(model[2].weight) == pruner.sparsity == 0.5
    assert pruner.numel == 64 and pruner.coverage == 0.5
    assert "frozen" in pruner.skipped["0.weight"] and pruner.skipped == pruner.dense == pruner.uncovered


def test_frozen_weights_are_pruned_or_refused_where_that_is_asked_for() -> None:
    model = half_frozen()
    assert names(model) == ["2.weight"] and names(model, frozen="prune") == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match=r"0.weight is frozen \(requires_grad=False\)"):
        find(model, frozen="error")
    assert names(model, frozen="error", exclude=["0"]) == ["2.weight"]
    with pytest.raises(ValueError, match=r"include names 0.weight, which cannot be pruned: it is frozen"):
        find(model, include=["0.weight"])
    assert names(model, include=["Linear"]) == ["2.weight"]
    with pytest.raises(ValueError, match=r"nothing to prune: 0.weight: it is frozen.*frozen='prune'"):
        find(model.requires_grad_(False))
    with pytest.raises(ValueError, match="frozen='maybe' must be one of"):
        Targets(frozen="maybe")


def test_what_unfreezes_is_found_by_the_next_search() -> None:
    model, targets = half_frozen(), Targets()
    assert len(targets.choose(model).params) == 1
    model.requires_grad_(True)
    assert len(targets.choose(model).params) == 2


@pytest.mark.parametrize("scorer", ["gradient", "movement", "taylor"])
def test_gradient_scorers_do_not_meet_frozen_weights(scorer: str) -> None:
    model = half_frozen()
    pruner = Pruner(scorer, "oneshot", sparsity=0.5)
    pruner.attach(model)
    train(model, torch.randn(4, 8), pruner)
    assert zeros(model[2].weight) == 0.5 and zeros(model[0].weight) == 0


def test_masks_go_over_to_a_frozen_copy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pruner = attached(model)
    pruner.prepare(1)
    twin = copy.deepcopy(model).requires_grad_(False)
    pruner.attach(twin)
    assert len(pruner.params) == 2 and pruner.params[0].weight is twin[0].weight


# Modules that are not known


class Own(nn.Module):
    """Weights of its own, of which only some are weights of sums of products."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))
        self.mix = nn.Parameter(torch.randn(6, 5))
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.stack = nn.ParameterList([nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))])
        self.cls_token = nn.Parameter(torch.randn(2, 4))
        self.positions = nn.Parameter(torch.randn(1, 7, 4))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.layer_scale = nn.Parameter(torch.randn(4, 1, 1))
        self.A_log = nn.Parameter(torch.randn(4, 2))
        self.embed = nn.Embedding(5, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w) @ self.mix
        h = torch.einsum("bi,eio->beo", h, self.experts).mean(1)
        return h @ self.stack[0] @ self.stack[1] + self.shift


WEIGHTS = ["w", "mix", "experts", "stack.0", "stack.1"]
TABLES = ["cls_token", "positions", "relative_position_bias_table", "layer_scale", "A_log", "embed.weight"]


def test_parameters_of_unknown_modules_are_weights_unless_they_are_tables_or_scales() -> None:
    model = Own()
    pruner = attached(model, allocation="uniform")
    assert {param.name for param in pruner.params} == set(WEIGHTS)
    assert set(pruner.skipped) == set(TABLES) and pruner.coverage == 1 and not pruner.uncovered
    train(model, torch.randn(4, 8), pruner)
    assert all(zeros(model.get_parameter(name)) == 0.5 for name in WEIGHTS)
    assert not any(zeros(model.get_parameter(name)) for name in TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_include_takes_in_what_it_names(name: str) -> None:
    assert names(Own(), include=[name]) == [name]
    pruner = attached(Own(), include=[name, "w"])
    assert pruner.numel == 48 + Own().get_parameter(name).numel()


def test_a_broad_pattern_means_weights() -> None:
    model = nn.ModuleDict({"body": Own()})
    assert set(names(model, include=["body.*"])) == {f"body.{name}" for name in [*WEIGHTS, "embed.weight"]}


def test_structures_that_need_outputs_ask_for_the_layout() -> None:
    with pytest.raises(ValueError, match=r"w of shape 6x8 cannot be pruned by structure=channel: which of its dimen"):
        attached(Own(), structure="channel")
    layouts = {"w": "out_in", "mix": "in_out", "experts": "in_out", "stack": "in_out"}
    pruner = attached(Own(), structure="channel", layouts=layouts, last=True, allocation="uniform")
    pruner.prepare(1)
    params = {param.name: param for param in pruner.params}
    assert params["w"].mask.all(1).sum() == 3 and params["w"].mask.any(1).sum() == 3
    assert params["mix"].mask.any(0).sum() in (2, 3)
    outputs = params["experts"].mask.any(1)  # (experts, out)
    assert outputs.sum() in (5, 6) and torch.equal(params["experts"].mask, outputs.unsqueeze(1).expand(3, 5, 4))
    with pytest.raises(ValueError, match="layouts: w='rows' must be one of 'out_in'"):
        Targets(layouts={"w": "rows"})
    with pytest.raises(ValueError, match="layouts 'v' matches no prunable weight"):
        find(Own(), include=["w"], frozen="skip") and Targets(layouts={"v": "out_in"}).choose(Own())


@pytest.mark.parametrize("label", ["nm24", "row", "block2x2", "kernel", "feature"])
def test_every_structure_with_outputs_asks(label: str) -> None:
    with pytest.raises(ValueError, match="layouts="):
        attached(Own(), structure=label, sparsity=None if label == "nm24" else 0.5)
    with pytest.raises(ValueError, match=r"nothing to prune|cannot be pruned"):
        attached(Own(), structure=label, sparsity=None if label == "nm24" else 0.5, misfit="dense")


def test_sizes_that_a_module_declares_are_its_layout() -> None:
    class Linear(nn.Module):
        def __init__(self, inputs: int, outputs: int, turned: bool) -> None:
            super().__init__()
            self.in_channels, self.out_channels = inputs, outputs
            self.weight = nn.Parameter(torch.randn(inputs, outputs) if turned else torch.randn(outputs, inputs))

    model = nn.ModuleList([Linear(4, 8, False), Linear(4, 8, True), Linear(4, 4, False)])
    assert [tuple(c.layout.shape_of(c.weight.shape)) for c in candidates(model)] == [(8, 4), (8, 4), (4, 4)]
    assert len(attached(model, structure="row").params) == 3


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (4, 5)])
def test_batches_of_matrices_are_seen_and_restored(shape: tuple[int, ...], turned: bool) -> None:
    tensor, layout = torch.randn(shape), Matrices(turned)
    seen = layout.view(tensor)
    outputs, inputs = (5, 4) if turned else (4, 5)
    assert seen.shape == layout.shape_of(torch.Size(shape)) == (tensor.numel() // inputs, inputs)
    first = tensor.reshape(-1, *shape[-2:])[0]
    assert torch.equal(seen[:outputs], first.t() if turned else first)
    assert torch.equal(layout.restore(seen, tensor.shape), tensor)


def test_nm_along_the_inputs_of_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 6))

    pruner = attached(Experts(), structure="nm24", sparsity=None, layouts={"up": "in_out"})
    pruner.prepare(1)
    assert (pruner.params[0].mask.unflatten(1, (2, 4)).sum(2) == 2).all()


def test_recurrent_cells_and_bilinear_layers() -> None:
    model = nn.ModuleDict({"cell": nn.GRUCell(4, 4), "pair": nn.Bilinear(2, 3, 4)})
    assert names(model) == ["cell.weight_ih", "cell.weight_hh", "pair.weight"]


# Weights that are computed


def vocoder(norm: Any) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones say that they are
        return nn.Sequential(
            norm(nn.Conv1d(4, 32, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(32, 16, 4)), nn.Conv1d(16, 2, 3)
        )


NORMS = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "old weight_norm": (nn.utils.weight_norm, "weight_v"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("kind", NORMS)
def test_zeros_behind_a_norm_are_zeros_of_the_weight(kind: str, sparsity: float) -> None:
    norm, tensor = NORMS[kind]
    model = vocoder(norm)
    pruner = attached(model, sparsity=sparsity)
    assert [param.name for param in pruner.params] == [f"0.{tensor}", f"2.{tensor}", "3.weight"]
    assert pruner.coverage == 1 and pruner.numel == 4 * 32 * 3 + 32 * 16 * 4 + 16 * 2 * 3
    train(model, torch.randn(2, 4, 8), pruner)
    model.eval()
    out = model(torch.randn(2, 4, 8))
    count = sum(int(torch.count_nonzero(model[i].weight)) for i in (0, 2, 3))
    assert out.isfinite().all() and count == pruner.kept
    assert pruner.sparsity == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("kind", NORMS)
def test_attaching_changes_nothing(kind: str) -> None:
    model = vocoder(NORMS[kind][0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    attached(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training


def test_a_weight_norm_and_whole_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0.parametrizations.weight.original1 .*0 / 0 is not a number"):
        attached(vocoder(parametrizations.weight_norm), structure="channel")
    assert len(attached(vocoder(parametrizations.spectral_norm), structure="channel").params) == 2


def test_what_zeros_do_not_survive_is_left_out_by_name() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).mT

    symmetric = nn.Linear(4, 4)
    parametrize.register_parametrization(symmetric, "weight", Symmetric())
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 4)), symmetric, nn.Linear(4, 4))
    pruner = attached(model)
    assert [param.name for param in pruner.params] == ["2.weight"]
    left = {f"{i}.parametrizations.weight.original" for i in (0, 1)}
    assert set(pruner.uncovered) == left and all("no zeros of the weight" in why for why in pruner.uncovered.values())
    assert pruner.coverage == 16 / 64
    with pytest.raises(ValueError, match=r"include names 0.param.*which cannot be pruned: its zeros are no zeros"):
        find(model, include=["0.weight"])


class Standardized(nn.Conv2d):
    """The weight is standardised in each forward pass, as in BiT and NFNets, and the gain begins at zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self.gain * F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Linear):
    """What is computed with is zero where the weight is; what is added is not a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight, self.bias) + x.mean(1, keepdim=True)


def test_weights_that_a_forward_of_its_own_standardises_are_left_out_by_name() -> None:
    model = nn.Sequential(
        Standardized(4, 8, 3), Standardized(8, 8, (1, 3), groups=2, dilation=2), nn.Conv2d(8, 4, 1), Scaled(4, 4)
    )
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pruner = attached(model)
    assert [param.name for param in pruner.params] == ["2.weight", "3.weight"]
    assert list(pruner.uncovered) == ["0.weight", "1.weight"]
    assert all("no zeros of the weight" in reason for reason in pruner.uncovered.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class Mine(nn.Module):
    """A weight of a class that is not known, and what is made of it."""

    def __init__(self, make: Callable[[Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.make, self.weight = make, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(self.weight)
        return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight)


class Convolution(nn.Conv2d):
    def __init__(self, make: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.make(self.weight), self.bias)


class Margin(nn.Module):
    """The cosine classifier of ArcFace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 30 * (F.linear(F.normalize(x), F.normalize(self.weight)) - 0.1 * F.one_hot(labels, 5))


MASK = torch.ones(4, 4, 3, 3).tril()
MADE: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "depthwise, standardized": (lambda: Standardized(8, 8, 3, groups=8), False),
    "standardized over outputs": (lambda: Convolution(lambda w: w - w.mean(0), 4, 4, 3), False),
    "standardized, of a class of its own": (lambda: Mine(lambda w: w - w.mean(1, keepdim=True), 4, 4), False),
    "cosine classifier": (lambda: Mine(lambda w: F.normalize(w, dim=1), 5, 4), True),
    "cosine classifier with margins": (Margin, True),
    "equalised rate": (lambda: Mine(lambda w: w * 0.3, 5, 4), True),
    "equalised rate, convolution": (lambda: Mine(lambda w: w * 0.3, 4, 4, 3, 3), True),
    "turned": (lambda: Mine(lambda w: w.mT, 4, 4), True),
    "demodulated": (lambda: Mine(lambda w: w * (w.square().sum((1, 2, 3), True) + 1e-8).rsqrt(), 4, 4, 3, 3), True),
    "masked": (lambda: Convolution(lambda w: w * MASK, 4, 4, 3), True),
    "fake quantized": (
        lambda: Convolution(lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127), 4, 4, 3), True,
    ),
    "shifted by fake quantization": (
        lambda: Convolution(lambda w: torch.fake_quantize_per_tensor_affine(w + 0.2, 0.1, 0, -128, 127), 4, 4, 3),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_what_is_pruned_is_zero_in_the_weight_that_a_forward_makes(kind: str) -> None:
    make, prunable = MADE[kind]
    torch.manual_seed(0)
    layer = make()
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(8, 8)})
    state = torch.get_rng_state()
    pruner = attached(model, sparsity=0.75)
    assert torch.equal(state, torch.get_rng_state())
    assert [param.name for param in pruner.params] == ["layer.weight"] * prunable + ["other.weight"]
    assert list(pruner.uncovered) == ["layer.weight"] * (not prunable)
    if not prunable:
        assert "no zeros of the weight" in pruner.uncovered["layer.weight"]
        return
    pruner.prepare(4)
    mask, weight = pruner.params[0].mask, layer.get_parameter("weight")
    used = layer.make(weight) if hasattr(layer, "make") else F.normalize(weight)
    used = used.mT if kind == "turned" else used
    assert not used[~mask].any() and used.any()


def test_a_slice_that_a_forward_divides_by_its_norm_keeps_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mine(lambda w: w / w.norm(dim=1, keepdim=True), 8, 8))
    with torch.no_grad():
        model[0].weight[3] *= 1e-3
    pruner = Pruner(schedule="oneshot", sparsity=0.875, allocation="global")
    pruner.attach(model)
    pruner.prepare(4)
    assert pruner.params[0].norm_dim == 0 and pruner.kept == 8
    assert model(torch.randn(2, 8)).isfinite().all()


def test_parametrized_weights_are_named_like_the_layer_s() -> None:
    model = vocoder(parametrizations.weight_norm)
    first = "0.parametrizations.weight.original1"
    assert names(model, include=["0.weight"]) == names(model, include=["0"]) == [first]
    assert names(model, include=["*.weight"])[0] == first and select(model, ["Conv1d"]) == [first, "3.weight"]
    assert first not in names(model, exclude=["0.weight"])


def test_a_recurrent_weight_behind_a_norm() -> None:
    lstm = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    assert set(names(lstm)) == {"weight_ih_l0", "parametrizations.weight_hh_l0.original1"}


def test_a_parametrization_with_layers_of_its_own() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up.weight @ self.down.weight

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", LowRank())
    assert names(layer) == ["parametrizations.weight.0.down.weight", "parametrizations.weight.0.up.weight"]


# Tied, lazy, integer, scripted


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_weight_is_found_by_each_of_its_names() -> None:
    for pattern in ("head.weight", "embed.weight", "head"):
        assert names(Tied(), include=[pattern]) == ["embed.weight"]
    assert names(Tied(), include=["Linear"]) == ["body.weight"]
    assert names(Tied(), include=["head.weight"] * 2 + ["embed"]) == ["embed.weight"]
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert names(model, include=["b.weight"]) == ["a.weight"]
    assert names(nn.ModuleList([model, Tied()]), exclude=["b"]) == ["1.body.weight"]


def test_include_says_why_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1.weight is a parameter with 1 dimensions"):
        find(model, include=["1.weight"])
    with pytest.raises(ValueError, match=r"1.running_mean is a buffer"):
        find(model, include=["1.running_mean"])


def test_types_that_cannot_be_pruned_are_named() -> None:
    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.whole = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
            self.complex = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
            self.tiny = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn))

    pruner = attached(Numbers())
    assert [param.name for param in pruner.params] == ["w"] and pruner.coverage == 0.25
    assert "torch.int8" in pruner.skipped["whole"] and "complex64" in pruner.skipped["complex"]
    with pytest.raises(ValueError, match=r"include names tiny, which cannot be pruned: it is torch.float8"):
        find(Numbers(), include=["tiny"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_named() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    pruner = attached(model)
    assert [param.name for param in pruner.params] == ["1.weight"] and "scripted" in pruner.skipped["0.weight"]


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        find(nn.Sequential(nn.Linear(4, 4, device="meta")))
    assert names(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)), exclude=["0"]) == ["1.weight"]


# Coverage under Lightning


class Module(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit(net: nn.Module, **options: Any) -> Sparsity:
    sparsity = Sparsity(**{"schedule": "oneshot", "sparsity": 0.5, "report": False, **options})
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[sparsity],
    )  # fmt: skip
    trainer.fit(Module(net), DataLoader(TensorDataset(torch.randn(8, 8)), 4))
    return sparsity


def test_low_coverage_is_one_warning_with_names_and_reasons() -> None:
    with pytest.warns(UserWarning, match=r"coverage: only 50.00% .*Left out are net.0.weight: it is frozen") as caught:
        sparsity = fit(half_frozen())
    assert sum("coverage" in str(warning.message) for warning in caught) == 1
    assert sparsity.summary is not None and sparsity.summary.coverage == 0.5
    assert sparsity.summary.left_out == ("net.0.weight",) and sparsity.summary.sparsity == 0.5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attend(x, x, x)[0])
        return out


@pytest.mark.parametrize("structure", ["head", "channel"])
def test_what_a_structure_takes_no_part_of_is_named(structure: str) -> None:
    pruner = attached(Attention(), structure=structure)
    assert list(pruner.skipped) == list(pruner.uncovered) == ["out.weight"] and pruner.coverage == 0.8
    reason = {"head": "structure=head has no unit in it", "channel": "it is the last layer"}[structure]
    assert reason in pruner.misfits["out.weight"]


def test_the_last_layer_is_named_only_where_a_default_spares_it() -> None:
    assert not attached(Attention(), structure="channel", last=False).skipped
    assert not attached(Attention(), structure="channel", last=True).skipped
    assert not attached(Attention(), structure="channel", include=["attend"]).skipped


def test_what_the_user_excludes_is_no_warning() -> None:
    sparsity = fit(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), exclude=["net.0"])
    assert sparsity.pruner.coverage == 0.5 and not sparsity.pruner.uncovered


def test_the_power_iterations_of_a_spectral_norm_are_those_of_training_alone() -> None:
    def trained(pruned: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
        x = torch.randn(8, 8)
        if pruned:
            options: dict[str, Any] = {"callbacks": [Sparsity(schedule="oneshot", sparsity=0.0, report=False)]}
        else:
            options = {}
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(Module(net), DataLoader(TensorDataset(x), 4))
        return net.state_dict()

    plain, pruned = trained(False), trained(True)
    assert all(torch.equal(plain[key], pruned[key]) for key in plain)


class Uncounted(Tensor):
    """As another library makes them: it implements no comparison."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.ne, Tensor.__ne__, torch.count_nonzero):
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("values", "nonzero"),
    [
        (torch.eye(8).to(torch.float8_e4m3fn), 8),
        (torch.eye(8).to(torch.uint16), 8),
        (torch.eye(8).to_sparse(), 64),
        (torch.eye(8).as_subclass(Uncounted), 64),
    ],
)
def test_a_weight_whose_zeros_cannot_be_counted_is_counted_whole(values: Tensor, nonzero: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(values, requires_grad=False)
    pruner = attached(model)
    pruner.prepare(1)
    assert summarize(pruner, model).params_nonzero == nonzero + 32


def test_the_table_names_the_coverage() -> None:
    model = half_frozen()
    pruner = attached(model)
    summary = summarize(pruner, model)
    assert [layer.name for layer in summary.layers] == ["2.weight"] and summary.coverage == 0.5
    assert "coverage: 50.00% of the weights, without 0.weight" in str(summary_table(summary).caption)


def test_what_has_no_elements_or_is_stored_sparsely_stays_with_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.csr = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.eye(4).to_sparse())
            self.fc = nn.Linear(4, 4)

    pruner = Pruner(sparsity=0.5, schedule="oneshot")
    pruner.attach(Odd())
    pruner.prepare(10)
    assert pruner.sparsity == 0.5 and [param.name for param in pruner.params] == ["fc.weight"]
    assert pruner.skipped["empty"] == "it has no elements" and "torch.sparse_coo" in pruner.skipped["csr"]


@pytest.mark.parametrize("sparsity", ["0.9", True, 1.5])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="must be a fraction of the weights removed"):
        Pruner(sparsity=sparsity)
