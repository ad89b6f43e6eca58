"""Exact top-k against sorting."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pl_sparse.allocation.units import LazyScores
from pl_sparse.core import topk
from pl_sparse.core.topk import threshold, top_k


def naive(scores: list[torch.Tensor], keep: int) -> list[torch.Tensor]:
    flat = [(-float(value), i) for i, value in enumerate(torch.cat([s.reshape(-1).double() for s in scores]))]
    chosen = {i for _, i in sorted(flat)[:keep]}
    masks, start = [], 0
    for score in scores:
        mask = [start + i in chosen for i in range(score.numel())]
        masks.append(torch.tensor(mask).reshape(score.shape))
        start += score.numel()
    return masks


floats = st.floats(width=32, allow_nan=False, allow_infinity=True)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, float("inf")])


@given(st.lists(st.lists(floats | few, min_size=1, max_size=12), min_size=1, max_size=4), st.floats(0, 1))
def test_threshold_keeps_what_sorting_keeps(values: list[list[float]], part: float) -> None:
    for dtype in (torch.float32, torch.float64):
        scores = [torch.tensor(row, dtype=dtype) for row in values]
        keep = round(part * sum(s.numel() for s in scores))
        masks = list(threshold(scores, keep).masks(scores))
        assert all(torch.equal(a, b) for a, b in zip(masks, naive(scores, keep), strict=True))
        if keep:  # the search that looks at no number, which is that of a GPU
            there = topk._on_device(scores, keep, lambda histogram: histogram, dtype, torch.device("cpu"))
            assert there == threshold(scores, keep)


def test_the_search_of_a_gpu_refuses_what_the_other_does() -> None:
    def search(keep: int, *scores: list[float]) -> object:
        tensors = [torch.tensor(score) for score in scores]
        return topk._on_device(tensors, keep, lambda histogram: histogram, torch.float32, torch.device("cpu"))

    with pytest.raises(ValueError, match="the scores of tensor 1 hold NaN"):
        search(1, [1.0], [2.0, float("nan")])
    with pytest.raises(ValueError, match="keep=4 is more than the 3 scores"):
        search(4, [1.0], [2.0, float("inf")])


@given(st.lists(st.booleans(), min_size=1), st.integers(0, 9), st.integers(1, 5))
def test_the_first_of_equal_scores_in_pieces(among: list[bool], count: int, size: int) -> None:
    left: torch.Tensor | int = count
    first = []
    for piece in torch.tensor(among).split(size):
        chosen, left = topk._first(piece, left)
        first += chosen.tolist()
    assert first == [true and sum(among[:place]) < count for place, true in enumerate(among)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(700_000, 3), (300_000, 300_000)])
def test_large_tensors(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    scores = [torch.randn(size).to(dtype) for size in sizes]
    total = sum(sizes)
    for keep in (0, 1, total // 10, total - 1, total):
        masks = list(threshold(scores, keep).masks(scores))
        assert sum(int(m.sum()) for m in masks) == keep
        kept = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)])
        removed = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
        assert not kept.numel() or not removed.numel() or kept.min() >= removed.max()


@pytest.mark.parametrize("kind", ["normal", "tied", "infinite", "constant", "drifting", "bfloat16", "float64"])
def test_many_scores(kind: str) -> None:
    """So many that bounds from a sample come first, with scores that a sample misjudges among them."""
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(size, generator=generator) for size in (1_500_000, 5, 1_200_000)]
    if kind == "tied":
        scores = [s.mul(50).round() for s in scores]
    elif kind == "infinite":
        scores[0][::7], scores[2][3] = float("-inf"), float("inf")
    elif kind == "constant":
        scores = [torch.ones_like(s) for s in scores]
    elif kind == "drifting":  # what the sample's stride meets is unlike all else
        scores[0][:: topk._STRIDE] = 9.0
    elif kind in ("bfloat16", "float64"):
        scores = [s.to(getattr(torch, kind)) for s in scores]
    flat = torch.cat(scores)
    order = flat.sort(descending=True, stable=True).indices
    for keep in (1, 2_500, 270_000, 2_699_000, len(flat)):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:keep]] = True
        assert torch.equal(torch.cat(list(threshold(scores, keep).masks(scores))), expected)
    scores[1][2] = float("nan")
    with pytest.raises(ValueError, match="tensor 1 hold NaN"):
        threshold(scores, 10)


@pytest.mark.parametrize("kept", [0.02, 0.099, 0.1])
def test_dead_units_are_not_searched(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are pruned already score the lowest number there is, and must cost no exact search of all scores."""
    searched: list[int] = []

    def spy(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        searched.append(sum(topk.sizes(tensors)))
        return chunks(tensors, dtype)

    chunks = topk._chunks
    monkeypatch.setattr(topk, "_chunks", spy)
    scores = [torch.rand(size) for size in (1_500_000, 700_000)]
    for score in scores:
        score[torch.rand(len(score)) < 0.9] = torch.finfo(torch.float32).min
    alive = sum(int((score >= 0).sum()) for score in scores)
    for keep in (round(10 * kept * alive), alive + 7):
        flat = torch.cat(scores)
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[flat.sort(descending=True, stable=True).indices[:keep]] = True
        assert torch.equal(torch.cat(list(topk.threshold(scores, keep).masks(scores))), expected)
    assert sum(searched) < 0.2 * len(flat)


@pytest.mark.parametrize("unlike", ["rows", "columns"])
@pytest.mark.parametrize("part", [0.0001, 0.1, 0.5, 0.9])
def test_a_sample_is_like_matrices_whose_rows_or_columns_are_unlike(unlike: str, part: float) -> None:
    scale = torch.logspace(-2, 2, 1024) if unlike == "columns" else torch.logspace(-2, 2, 1024)[:, None]
    scores = [torch.rand(1024, 1024, generator=torch.Generator().manual_seed(seed)) * scale for seed in range(2)]
    found = topk._bracketed(scores, round(part * 2 * 1024**2))
    assert found is not None
    assert found == threshold(scores, round(part * 2 * 1024**2), lambda histogram: histogram)  # by the digits of all


def test_scores_are_made_twice_where_a_sample_bounds_the_threshold() -> None:
    """Once for the sample and once for what lies between the bounds; one of them once more, for its type."""

    class Made(LazyScores):
        def __init__(self, scores: list[torch.Tensor]) -> None:
            self.scores, self.made = scores, 0
            self.sizes, self.devices = topk.sizes(scores), topk.devices(scores)

        def at(self, index: int) -> torch.Tensor:
            self.made += 1
            return self.scores[index]

    scores = Made([torch.randn(200_000) for _ in range(4)])
    assert threshold(scores, 300_000) == threshold(scores.scores, 300_000)
    assert scores.made == 2 * 4 + 1


def test_all_equal_keeps_the_first() -> None:
    assert top_k(torch.ones(2, 5), 3).reshape(-1).tolist() == [True] * 3 + [False] * 7
    assert top_k(torch.ones(4), 9).all() and not top_k(torch.ones(4), -1).any()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="tensor 1 hold NaN"):
        threshold([torch.ones(3), torch.tensor([1.0, float("nan")])], 2)
    with pytest.raises(ValueError, match="keep=7 is more than the 3 scores"):
        threshold([torch.ones(3)], 7)
    with pytest.raises(ValueError, match="0 or more"):
        threshold([torch.ones(3)], -1)
