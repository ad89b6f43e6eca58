"""Structures against loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pl_sparse.core.layouts import Blocks, Heads, InputsFirst, Layout, Plain
from pl_sparse.core.targets import find
from pl_sparse.structure import (
    NM,
    Block,
    Channel,
    Head,
    Kernel,
    Row,
    Structure,
    Transposable,
    Unstructured,
    pattern,
    structure,
)


def masked(structure: Structure, scores: torch.Tensor, keep: int) -> torch.Tensor:
    units = structure.pool(scores)
    return structure.expand(structure.select(units, keep), scores.shape)


def test_nm_against_all_patterns() -> None:
    for n, m in ((1, 4), (2, 4), (4, 8), (3, 5), (7, 16)):
        scores = torch.randn(3, 2 * m, 2, 2)
        mask = masked(NM(n, m), scores, 0)
        for out, group, row, column in itertools.product(range(3), range(2), range(2), range(2)):
            values = scores[out, group * m : (group + 1) * m, row, column].tolist()
            best = set(sorted(range(m), key=lambda i: -values[i])[:n])
            chosen = mask[out, group * m : (group + 1) * m, row, column].tolist()
            assert {i for i, kept in enumerate(chosen) if kept} == best


@given(st.integers(1, 4), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_nm_ties_go_to_the_first(n: int, values: list[int]) -> None:
    scores = torch.tensor([values], dtype=torch.float32)
    mask = masked(NM(n, 4), scores, 0)[0].tolist()
    for start in (0, 4):
        group = values[start : start + 4]
        best = set(sorted(range(4), key=lambda i: (-group[i], i))[:n])
        assert {i for i in range(4) if mask[start + i]} == best


def test_nm_becomes_sparser_by_the_level() -> None:
    scores = torch.randn(4, 16)
    assert [int(masked(NM(2, 4), scores, keep).sum()) for keep in (64, 50, 48, 33, 32, 1)] == [64, 64, 48, 48, 32, 32]


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3)])
def test_numpy_ranks_a_group_as_torch_does(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties and infinite scores too; of half precision torch ranks."""
    monkeypatch.setattr(pattern, "_GROUPS", 7)
    scores = torch.randint(-3, 4, shape).float()
    scores.view(-1)[:3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    for m in (2, 4):
        for n in range(1, m):
            units = NM(n, m).pool(scores)
            chosen = NM(n, m).select(units, 1)
            assert torch.equal(chosen, NM(n, m).select(units.half(), 1))
            assert bool((chosen.sum(-1) == n).all())


def test_blocks_kernels_channels_against_loops() -> None:
    scores = torch.rand(4, 6, 3, 3)
    for struct, units in (
        (Block(2, 3), {(i, j, a, b) for i in range(2) for j in range(2) for a in range(3) for b in range(3)}),
        (Kernel(), {(i, j) for i in range(4) for j in range(6)}),
        (Channel(), {(i,) for i in range(4)}),
        (Unstructured(), set(itertools.product(range(4), range(6), range(3), range(3)))),
    ):

        def of(index: tuple[int, ...], struct: Structure = struct) -> tuple[int, ...]:
            if isinstance(struct, Block):
                return (index[0] // 2, index[1] // 3, *index[2:])
            return index[: {Kernel: 2, Channel: 1, Unstructured: 4}[type(struct)]]

        score: dict[tuple[int, ...], list[float]] = {unit: [] for unit in units}
        for index in itertools.product(*map(range, scores.shape)):
            score[of(index)].append(float(scores[index]))
        keep = max(len(units) // 3, 1)
        best = sorted(units, key=lambda u: -sum(score[u]) / len(score[u]))[:keep]
        mask = masked(struct, scores, keep)
        for index in itertools.product(*map(range, scores.shape)):
            assert bool(mask[index]) == (of(index) in best), struct


def test_heads_are_rows_of_three_projections_and_columns_of_the_output() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 4)})
    params = find(model)
    (group,) = Head().groups(params, model)
    assert group.name == "attention" and [p.name for p, _ in group.members] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    chosen = torch.tensor([True, False, True, False])
    masks = []
    for param, layout in group.members:
        shape = layout.view(torch.empty(param.shape)).shape
        masks.append(layout.restore(Head().expand(chosen, shape), param.shape))
    for projection in range(3):
        rows = masks[0][projection * 8 : (projection + 1) * 8].all(1).tolist()
        assert rows == [True, True, False, False] * 2
    assert masks[1].all(0).tolist() == [True, True, False, False] * 2


def test_separate_projections_of_attention() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    names = [p.name for p, _ in Head().groups(find(model), model)[0].members]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Plain(), (4, 6)),
        (InputsFirst(2), (4, 3, 2, 2)),
        (InputsFirst(), (5, 7)),
        (Heads(4, parts=(1, 1, 1)), (24, 5)),
        (Heads(2, parts=(3, 1, 1)), (20, 5)),
        (Heads(2, parts=(3, 1, 1), columns=True), (5, 20)),
        (Heads(4, columns=True), (5, 8)),
        (Blocks(2, 3), (4, 9)),
    ],
)
def test_layouts_go_there_and_back(layout: Layout, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(layout.restore(layout.view(tensor), tensor.shape), tensor)


def test_a_transposed_convolution_has_its_outputs_first() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    view = layer_view = InputsFirst(2).view(layer.weight)
    assert view.shape == (6, 2, 3, 3)
    assert torch.equal(layer_view[4, 1], layer.weight[3, 1])  # group 1: inputs 2, 3 and outputs 3..5


def test_names_and_bad_arguments() -> None:
    assert structure("nm24") == NM(2, 4) and structure("block4x4") == Block(4, 4) and structure("channel") == Channel()
    assert structure("2:4").label == "2:4" and structure("1:16") == NM(1, 16)
    for n, m in ((5, 4), (0, 4)):
        with pytest.raises(ValueError, match="0 < n <= m"):
            NM(n, m)
    with pytest.raises(ValueError, match="at least one row"):
        Block(0, 4)
    with pytest.raises(ValueError, match="Did you mean 'kernel'"):
        structure("kernels")
    assert "divisible by m=4" in (NM().misfit(torch.Size((8, 6))) or "")
    assert "output dimension 6" in (Block().misfit(torch.Size((6, 8))) or "")


def test_transposable_is_the_best_of_all_masks() -> None:
    pattern = Transposable(2, 4)
    scores = torch.rand(8, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = pattern.expand(pattern.select(pattern.pool(scores), 0), scores.shape)
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    for block in range(2):
        for position in range(2):
            part = scores[4 * block : 4 * block + 4, :, position]
            found = mask[4 * block : 4 * block + 4, :, position]
            assert found.sum(0).tolist() == found.sum(1).tolist() == [2] * 4
            best = max(
                float((part * torch.tensor(candidate)).sum())
                for candidate in itertools.product(rows, repeat=4)
                if torch.tensor(candidate).sum(0).tolist() == [2] * 4
            )
            assert float(part[found].sum()) == pytest.approx(best)
    assert structure("nm24t") == pattern
    assert "output dimension 6" in str(pattern.misfit(torch.Size((6, 4)))) and pattern.fixed == 0.5
    with pytest.raises(ValueError, match="m <= 4"):
        Transposable(2, 8)


def test_rows_keep_as_many_each() -> None:
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    for keep in (0, 5, 12, 34, 35):
        mask = Row().select(scores, keep)
        assert int(mask.sum()) == keep
        each = mask.sum(1)
        assert int(each.max() - each.min()) <= 1
        for row, kept in zip(scores, mask, strict=True):
            assert not kept.any() or not (~kept).any() or row[kept].min() > row[~kept].max()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.data())
def test_rows_are_those_of_sorting_also_under_ties(outputs: int, inputs: int, part: float, data: st.DataObject) -> None:
    few = st.lists(st.sampled_from([-3e38, 0.0, 0.5, 1.0]), min_size=outputs * inputs, max_size=outputs * inputs)
    scores = torch.tensor(data.draw(few)).reshape(outputs, inputs)
    keep = round(part * scores.numel())
    each, more = divmod(keep, outputs)
    orders = [sorted(range(inputs), key=lambda j, row=row: (-row[j], j)) for row in scores.tolist()]
    last = [float(scores[i, order[each]]) if each < inputs else 0.0 for i, order in enumerate(orders)]
    lucky = sorted(range(outputs), key=lambda i: (-last[i], i))[:more]
    for dtype in (torch.float32, torch.bfloat16):
        mask = Row().select(scores.to(dtype), keep)
        for i, order in enumerate(orders):
            assert {j for j in range(inputs) if mask[i, j]} == set(order[: each + (i in lucky)])


@pytest.mark.parametrize(
    "name", ["unstructured", "row", "nm24", "nm24t", "block2x4", "kernel", "channel", "feature", "head"]
)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_alive_are_the_units_with_a_weight_left(name: str, kernel: tuple[int, ...]) -> None:
    struct = structure(name)
    if name == "head" and kernel:
        pytest.skip("attention has no kernels")
    mask = torch.rand(8, 4, *kernel) < 0.1
    for order in (mask, mask.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(struct.alive(order), struct.pool(mask.float()) > 0)
