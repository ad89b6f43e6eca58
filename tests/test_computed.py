"""Weights that are computed from other tensors: exact counts, and looks that change nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_targets import NORMS, attached, train, vocoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pl_sparse import Pruner
from pl_sparse.allocation import kept
from pl_sparse.core.layouts import Plain
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.network.probe import Probe
from pl_sparse.structure import living
from pl_sparse.structure import structure as named


def two() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = (parametrizations.weight_norm(nn.Linear(32, 32)) for _ in range(2))
    with torch.no_grad():
        second.parametrizations.weight.original1.mul_(1e-3)  # a threshold over both takes nearly all of it
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize("allocation", ["global", "erk", "uniform", "lamp"])
@pytest.mark.parametrize("options", [{}, {"structure": "row"}, {"updater": "dropgrow", "schedule": "constant"}])
def test_a_weight_norm_ends_exactly_as_sparse_as_asked(allocation: str, options: dict[str, Any]) -> None:
    model = two()
    pruner = attached(model, sparsity=0.965, allocation=allocation, **options)
    train(model, torch.randn(2, 32), pruner)
    assert pruner.kept == kept(0.965, 2048) == 72
    for param in pruner.params:
        assert param.mask.any(1).all() and not param.weight[~param.mask].any()
    assert model.eval()(torch.randn(2, 32)).isfinite().all()


def test_an_override_of_a_weight_norm_is_exact() -> None:
    pruner = attached(model := two(), sparsity=0.5, allocation="global", overrides={"2": 0.96})
    train(model, torch.randn(2, 32), pruner)
    assert [param.kept for param in pruner.params] == [512, 41]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_whose_inputs_are_dead_keeps_a_weight_when_reconstructed(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(NORMS[kind][0](nn.Linear(4, 4)))
    pruner = Pruner(schedule="oneshot", sparsity=0.5, updater="reconstruct", allocation="uniform")
    pruner.attach(model)
    pruner.prepare(4, probe=Probe(model, [torch.zeros(2, 4)], lambda x: model(x).square().sum()))
    assert pruner.kept == 8 and model.eval()(torch.randn(2, 4)).isfinite().all()


def test_frozen_weights_have_gradients_where_they_are_scored() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    pruner = Pruner("snip", "oneshot", sparsity=0.5, frozen="prune")
    pruner.attach(model)
    pruner.prepare(4, probe=Probe(model, [torch.randn(2, 4)], lambda x: model(x).square().sum()))
    assert pruner.kept == 16 and [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_what_weight_norm_must_keep_is_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"0.99 keeps 20 of 2048 .*original1.* must keep 64.* sparsity of 0.9687 or less"
    ):
        attached(two(), sparsity=0.99)
    with pytest.raises(ValueError, match=r"sparsity of 1 keeps 0 of 1024 .*must keep 32"):
        attached(two(), sparsity=0.5, overrides={"0": 1.0})
    assert attached(two(), sparsity=0.9687).attached


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("scorer", ["hardconcrete", "softthreshold"])
def test_masks_that_may_scale_all_of_a_normalized_weight_to_zero_are_refused(scorer: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"masking=\w+ may scale .* is divided by a norm"):
        attached(vocoder(NORMS[kind][0]), scorer=scorer)


def alive(values: Tensor, chosen: Tensor, dim: int, structure: str = "unstructured", among: Any = None) -> Tensor:
    """The mask after what `dim` cuts was kept alive, of units that were chosen."""
    mask = torch.ones_like(values, dtype=torch.bool)
    param = MaskedParameter("w", nn.Identity(), nn.Parameter(values), mask, norm_dim=dim)
    made = named(structure)
    return made.expand(living(made.alive(chosen), made, param, Plain(), among), values.shape)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_each_slice_keeps_its_largest_weight(dim: int) -> None:
    values = torch.arange(1.0, 13.0).reshape(4, 3)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    if dim == -1:
        values[3] = mask[3] = 0
        mask[3] = True
        assert alive(values, mask, dim).nonzero().tolist() == [[2, 2], [3, 0], [3, 1]]
        return
    mask[3] = mask[2] = True
    if dim == 1:
        mask = torch.zeros_like(mask)
        mask[1:, 2] = True
    kept = alive(values, mask, dim)
    assert kept.sum() == mask.sum() and kept.any(1 - dim).all()
    assert kept[3, 2] and (kept[0, 2] if dim == 0 else kept[3, 0] and kept[3, 1])


def test_a_slice_keeps_a_weight_that_is_not_zero() -> None:
    values = torch.tensor([[0.0, 0.0, 3.0], [4.0, 5.0, 6.0]])
    grown = torch.tensor([[True, False, False], [True, True, False]])
    assert alive(values, grown, 0).tolist() == [[False, False, True], [True, True, False]]


@pytest.mark.parametrize(
    ("structure", "dim"),
    [(s, d) for s in ("row", "nm24", "nm12t") for d in (0, -1)]
    + [(s, -1) for s in ("block2x2", "kernel", "channel", "feature")],
)
def test_a_structure_is_kept_where_a_slice_is_kept_alive(structure: str, dim: int) -> None:
    made = named(structure)
    torch.manual_seed(0)
    values = torch.rand(4, 8, 2) + 0.1
    units = made.pool(torch.rand(values.shape))
    chosen = made.expand(made.select(units, units.numel() // 2), values.shape).clone()
    values[chosen] = 0  # what is kept is zero everywhere
    mask = alive(values, chosen, dim, structure)
    assert mask.sum() == chosen.sum() and torch.equal(made.expand(made.alive(mask), mask.shape), mask)
    assert (values * mask).flatten(1).any(1).all() if dim == 0 else (values * mask).any()
    patterns = {"row": lambda m: m.flatten(1), "nm24": made.pool, "nm12t": lambda m: made.pool(m).unflatten(-1, (2, 2))}
    if structure in patterns:
        assert torch.equal(*(patterns[structure](m.float()).sum(-1) for m in (mask, chosen)))


def test_what_is_pruned_for_good_keeps_no_slice_alive() -> None:
    values, chosen = torch.tensor([[0.0, 0.0, 3.0, 2.0]]), torch.tensor([[True, True, False, False]])
    assert alive(values, chosen, 0, "nm24", among=chosen.reshape(1, 1, 4)).tolist() == chosen.tolist()
    among = torch.tensor([[[True, True, False, True]]])
    assert alive(values, chosen, 0, "nm24", among).tolist() == [[True, False, False, True]]


def test_a_norm_behind_a_recurrent_weight_leaves_the_reverse_direction_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lstm = nn.utils.weight_norm(nn.LSTM(4, 4, bidirectional=True), "weight_hh_l0")
    assert {param.name for param in attached(lstm).params} == {
        "weight_ih_l0", "weight_hh_l0_v", "weight_ih_l0_reverse", "weight_hh_l0_reverse",
    }  # fmt: skip


@pytest.mark.parametrize("kind", NORMS)
def test_a_sparse_weight_behind_a_norm_is_attached_again(kind: str) -> None:
    model = vocoder(NORMS[kind][0])
    train(model, torch.randn(2, 4, 8), attached(model, sparsity=0.9))
    again = attached(model, sparsity=0.9)
    assert [param.name for param in again.params][:2] == [f"{i}.{NORMS[kind][1]}" for i in (0, 2)]


class Joined(nn.Module):
    """Attention whose projections have computed weights."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj = (norm(nn.Linear(8, 8)) for _ in range(3))
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


@pytest.mark.parametrize("structure", ["head", "hybrid4x4", "coupled", "channel", "feature"])
@pytest.mark.parametrize("kind", NORMS)
def test_structures_look_at_computed_weights_without_computing_them(kind: str, structure: str) -> None:
    norm = NORMS[kind][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(Joined(norm), norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model(torch.randn(2, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruner = Pruner(sparsity=0.5, structure=structure, misfit="dense")
    if "weight_norm" in kind and structure == "head":
        with pytest.raises(ValueError, match=r"nothing to prune.*divided by the norms"):
            pruner.attach(model)
    else:
        pruner.attach(model, torch.randn(2, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    computed = [param.name for param in pruner.params if param.name.endswith(NORMS[kind][1])]
    assert bool(computed) is ("spectral" in kind and structure != "coupled")


@pytest.mark.parametrize("names", [("first", "second", "third"), ("a", "b")])
def test_matrices_of_one_shape_that_follow_one_another_are_told_apart(names: tuple[str, ...]) -> None:
    """Each in turn was compared with the one that is multiplied last, and left out for its zeros."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Parameter(torch.randn(8, 8)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in names:
                x = torch.tanh(x @ getattr(self, name))
            return x

    pruner = Pruner(sparsity=0.5)
    pruner.attach(Chain())
    assert [param.name for param in pruner.params] == list(names) and not pruner.skipped

    class Scaled(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in names:
                weight = getattr(self, name)
                x = x @ (weight - weight.mean())
            return x

    with pytest.raises(ValueError, match="its zeros are no zeros of the weight"):
        Pruner(sparsity=0.5).attach(Scaled())
