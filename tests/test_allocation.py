"""Allocations against published numbers and loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pl_sparse.allocation import ERK, LAMP, Allocation, Global, Uniform, Units, choose, kept, lamp, ranked
from pl_sparse.allocation.count import _move
from pl_sparse.core import topk
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import build
from pl_sparse.core.targets import find
from pl_sparse.core.topk import threshold
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import NM, Block, Channel, Row, Structure, Unstructured


def lenet300() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))


def lenet5() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5), nn.Linear(800, 500), nn.Linear(500, 10))


def groups(model: nn.Module, structure: Structure | None = None) -> list[Group]:
    return (structure or Unstructured()).groups(find(model), model)


def params(found: list[Group]) -> list[MaskedParameter]:
    return [param for group in found for param, _ in group.members]


def prune(
    found: list[Group], allocation: Allocation, level: float, structure: Structure | None = None, monotone: bool = False
) -> list[int]:
    choose(Units(found, structure or Unstructured(), Magnitude().score, monotone), allocation, level)
    return [param.kept for param in params(found)]


@pytest.mark.parametrize(
    ("model", "sparsity", "densities"),
    [
        (lenet300, 0.8, [0.16224, 0.46936, 1.0]),
        (lenet300, 0.9, [0.07957, 0.23019, 1.0]),
        (lenet300, 0.95, [0.03848, 0.11133, 0.91851]),
        (lenet300, 0.98, [0.01539, 0.04453, 0.36740]),
        (lenet300, 0.99, [0.00770, 0.02227, 0.18370]),
        (lenet5, 0.9, [1.0, 0.08707, 0.08843, 1.0]),
        (lenet5, 0.95, [0.72612, 0.03748, 0.03806, 1.0]),
        (lenet5, 0.99, [0.13894, 0.00717, 0.00728, 0.22858]),
    ],
)
def test_erk_meets_the_reference_densities(model: object, sparsity: float, densities: list[float]) -> None:
    found = groups(model())  # type: ignore[operator]
    assert ERK().densities(found, sparsity) == pytest.approx(densities, abs=6e-6)
    assert sum(prune(found, ERK(), sparsity)) == kept(sparsity, sum(group.numel for group in found))


def test_erk_at_the_ends() -> None:
    found = groups(lenet300())
    assert prune(found, ERK(), 0.0) == [group.numel for group in found]
    skewed = groups(nn.Sequential(nn.Linear(1000, 1), nn.Linear(10, 10)))
    assert sum(prune(skewed, ERK(), 0.999)) == 2  # at least one in each tensor


def test_lamp_meets_the_reference_scores() -> None:
    # w^2 = .25, 1, 4, 9: each over the sum of those no smaller
    assert lamp(torch.tensor([2.0, 0.5, 3.0, 1.0])).tolist() == pytest.approx([4 / 13, 0.25 / 14.25, 1.0, 1 / 14])
    scores = torch.rand(50, 7)
    flat = scores.reshape(-1).tolist()
    naive = [value**2 / sum(other**2 for other in flat if other >= value) for value in flat]
    assert lamp(scores).reshape(-1).tolist() == pytest.approx(naive)
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_leaves_every_layer_alive() -> None:
    model = lenet300()
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    assert prune(groups(model), Global(), 0.95)[1] == 0
    counts = prune(groups(model), LAMP(), 0.95)
    assert min(counts) > 0 and sum(counts) == kept(0.95, 266_200)


def test_global_is_one_threshold() -> None:
    model = lenet300()
    found = groups(model)
    prune(found, Global(), 0.9)
    magnitudes = torch.cat([layer.weight.abs().reshape(-1) for layer in model])
    threshold = magnitudes.sort(descending=True).values[26_619]
    for param in params(found):
        assert torch.equal(param.mask, param.weight.abs() >= threshold)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["uniform", "global", "erk", "lamp"]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.floats(0, 0.97),
    st.booleans(),
)
def test_counts_are_exact_also_under_ties(
    name: str, shapes: list[tuple[int, int]], sparsity: float, ties: bool
) -> None:
    model = nn.ModuleList(nn.Linear(i, o) for o, i in shapes)
    if ties:
        for layer in model:
            nn.init.constant_(layer.weight, 0.5)
    found = groups(model)
    total = sum(group.numel for group in found)
    least = len(shapes) if name in ("uniform", "erk") else 0
    counts = prune(found, build(Allocation, name), sparsity)
    assert sum(counts) == max(kept(sparsity, total), least)
    assert min(counts) >= (1 if least else 0)
    before = [param.mask.clone() for param in params(found)]
    prune(found, build(Allocation, name), min(sparsity * 1.1, 1.0), monotone=True)
    assert all(not (param.mask & ~old).any() for param, old in zip(params(found), before, strict=True))


def test_uniform_prunes_all_alike() -> None:
    assert prune(groups(lenet300()), Uniform(), 0.9) == [23_520, 3_000, 100]


@pytest.mark.parametrize("name", ["uniform", "global", "erk", "lamp"])
def test_units_of_several_sizes_come_nearest(name: str) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20), nn.Linear(20, 16))
    found = groups(model, Channel())
    counts = prune(found, build(Allocation, name), 0.6, Channel())
    assert all(count % param.shape[1] == 0 for count, param in zip(counts, params(found), strict=True))
    assert abs(sum(counts) - 0.4 * sum(group.numel for group in found)) <= 20  # half of the largest unit


def test_blocks_share_a_budget() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    counts = prune(groups(model), Global(), 0.75, Block(4, 4))
    assert sum(counts) == 192 and all(count % 16 == 0 for count in counts)


def test_nm_ignores_the_allocation() -> None:
    for name in ("uniform", "global", "erk", "lamp"):
        assert prune(groups(lenet300()), build(Allocation, name), 0.5, NM(2, 4)) == [117_600, 15_000, 500]


def test_overrides_stand_outside_of_the_budget() -> None:
    found = groups(lenet300())
    choose(Units(found, Unstructured(), Magnitude().score), Global(), 0.9, [None, None, 0.25])
    counts = [param.kept for param in params(found)]
    assert counts[2] == 750 and sum(counts[:2]) == kept(0.9, 265_200)


def test_nan_is_named() -> None:
    model = lenet300()
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    for allocation in (Global(), Uniform()):
        with pytest.raises(ValueError, match=r"scores of 1.weight hold NaN"):
            prune(groups(model), allocation, 0.5)


def test_units_of_unlike_size_keep_their_rounded_down_share_over_many_updates() -> None:
    """What one tensor is given too much by rounding is not taken from another, update after update."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16), nn.Linear(16, 64), nn.Linear(64, 8))
    params = [Group(param.name, ((param, param.layout),)) for param in find(net)]
    for level in (0.1, 0.2, 0.26, 0.3, 0.34, 0.4, 0.43, 0.46, 0.47, 0.49, 0.5):
        units = Units(params, Channel(), lambda param: param.weight.detach().abs(), monotone=True)
        choose(units, Uniform(), level)
        for size, alive in zip(units.sizes, (units.alive(i) for i in range(len(units))), strict=True):
            assert int(alive.sum()) >= int((1 - level) * size + 1e-6)


def one_by_one(
    counts: list[int], ideal: list[float], weights: list[int], floors: list[int], limits: list[int], left: int
) -> None:
    """`apportion`'s rule, a unit at a time."""
    while left:
        sign = 1 if left > 0 else -1
        movable = [i for i in range(len(counts)) if floors[i] <= counts[i] + sign <= limits[i]]
        fitting = [i for i in movable if weights[i] <= abs(left)]
        nearer = [i for i in movable if 2 * abs(left) >= weights[i] + (sign < 0)]
        if not (fitting or nearer):
            break
        i = max(fitting or nearer, key=lambda i: (sign * (ideal[i] - counts[i]), -i))
        counts[i] += sign
        left -= sign * weights[i]
        if not fitting:
            break


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_shares_are_those_of_moving_one_unit_at_a_time(data: st.DataObject) -> None:
    def tensors(values: st.SearchStrategy[Any]) -> Any:
        return data.draw(st.lists(values, min_size=size, max_size=size))

    size = data.draw(st.integers(1, 6))
    limits = tensors(st.integers(0, 60))
    floors = [min(floor, limit) for floor, limit in zip(tensors(st.integers(0, 9)), limits, strict=True)]
    ideal = tensors(st.floats(0, 70) | st.integers(0, 70) | st.sampled_from([0.5, 1 / 3, 10.1]))
    weights = tensors(st.sampled_from(data.draw(st.sampled_from([[1], [16], [1, 3], [2, 9, 64], [7, 11]]))))
    counts = [min(max(int(share), floor), limit) for share, floor, limit in zip(ideal, floors, limits, strict=True)]
    left = data.draw(st.integers(-2000, 2000))
    found, expected = list(counts), list(counts)
    _move(found, ideal, weights, floors, limits, left)
    one_by_one(expected, ideal, weights, floors, limits, left)
    assert found == expected


def test_millions_of_units_are_shared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, passes = [0, 0], []
    monkeypatch.setattr(math, "ceil", lambda value, ceil=math.ceil: passes.append(value) or ceil(value))
    _move(counts, [3e6, 10.0], [1, 1], [0, 0], [2_000_000, 4_000_000], 3_000_000)
    assert counts == [2_000_000, 1_000_000] and len(passes) < 1000


@pytest.mark.parametrize("kind", ["normal", "equal", "rounded", "zeros", "pruned", "infinite", "copies", "double"])
def test_lamp_counts_are_those_of_one_threshold_over_its_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is sorted once, and what its curve leaves open is looked at again."""
    scores = [torch.randn(size).abs() * scale for size, scale in ((700, 1.0), (3, 9.0), (2000, 0.1), (1, 1.0))]
    if kind == "equal":
        scores = [torch.full_like(score, 0.1) for score in scores]
    elif kind == "rounded":
        scores = [score.mul(20).round() / 20 for score in scores]
    elif kind == "zeros":
        scores = [score.masked_fill(torch.rand(len(score)) < 0.8, 0) for score in scores]
    elif kind == "pruned":
        scores = [score.masked_fill(torch.rand(len(score)) < 0.8, torch.finfo(score.dtype).min) for score in scores]
    elif kind == "infinite":
        scores[0][::50] = float("inf")
    elif kind == "copies":
        scores = [scores[0], scores[0].flip(0), scores[0] * 2]
    elif kind == "double":
        scores = [score.double() for score in scores]
    total = sum(map(len, scores))
    for every in (1, 7, 256):
        monkeypatch.setattr(ranked, "_EVERY", every)
        for keep in {0, 1, 2, 30, total // 10, total // 2, total - 1, total}:
            cutoff = threshold([lamp(score) for score in scores], keep)
            expected = [int(mask.sum()) for mask in cutoff.masks([lamp(score) for score in scores])]
            assert ranked._lamp_counts(LazyList(scores), keep) == expected


class LazyList(list[torch.Tensor]):
    @property
    def sizes(self) -> list[int]:
        return [score.numel() for score in self]


def test_lamp_sorts_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sorted_ = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100)), []
    monkeypatch.setattr(ranked, "descending", lambda x, of=ranked.descending: sorted_.append(x.numel()) or of(x))
    counts = prune(groups(model), LAMP(), 0.9)
    assert sum(counts) == 8000 and sum(size > 10_000 for size in sorted_) == 2


@pytest.mark.parametrize("name", ["global", "lamp"])
def test_rows_keep_as_many_each_whatever_the_allocation(name: str) -> None:
    found = groups(lenet300(), Row())
    assert sum(prune(found, build(Allocation, name), 0.9, Row())) == 26_620
    for param in params(found):
        each = param.mask.sum(1)
        assert int(each.max() - each.min()) <= 1


@pytest.mark.parametrize("allocation", [Global(), Uniform(), ERK(), LAMP()])
@pytest.mark.parametrize("kind", ["normal", "tied", "zero"])
def test_scores_made_in_pieces_choose_the_same_masks(
    kind: str, allocation: Allocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, by the bounds of a sample and by the search of all scores; and no tensor of scores is ever whole."""
    monkeypatch.setattr(topk, "RUN", 97)
    sizes: set[int] = set()

    def score(param: MaskedParameter) -> torch.Tensor:
        sizes.add(param.numel)
        return Magnitude().score(param)

    def masks(pointwise: bool, large: int) -> list[torch.Tensor]:
        monkeypatch.setattr(topk, "_LARGE", large)
        torch.manual_seed(0)
        found = groups(nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 10)))
        weights = [param.weight.detach() for param in params(found)]
        for weight in weights:
            if kind != "normal":
                weight.copy_(weight.mul(30).round() if kind == "tied" else weight * (torch.rand_like(weight) < 0.2))
        seen = []
        for level in (0.3, 0.6, 0.9, 0.9, 0.97, 1.0):
            choose(Units(found, Unstructured(), score, True, pointwise=pointwise), allocation, level)
            seen += [param.mask.clone() for param in params(found)]
            for weight, param in zip(weights, params(found), strict=True):
                weight.mul_(param.mask)
        return seen

    expected = masks(False, 1 << 18)
    sizes.clear()
    for large in (1 << 18, 100):
        assert all(map(torch.equal, masks(True, large), expected))
    assert max(sizes) == 97


def test_nan_is_refused_by_name_where_scores_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for large in (1 << 18, 100):
        monkeypatch.setattr(topk, "_LARGE", large)
        found = groups(nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40)))
        params(found)[1].weight.data[3, 4] = float("nan")
        for allocation in (Global(), LAMP()):
            with pytest.raises(ValueError, match=r"scores of 1\.weight hold NaN"):
                choose(Units(found, Unstructured(), Magnitude().score, pointwise=True), allocation, 0.5)
