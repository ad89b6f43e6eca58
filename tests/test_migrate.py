"""The pairs of docs/migrate: our code runs, theirs where its library is there and needs no other framework, and both
leave the same.

A pair is `<!-- theirs: module -->` and `<!-- ours: what is the same -->`, each before a block of Python: the same
masks, sparsity or number of parameters, or the sparsity that ours ends with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pages import Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner

PAGES = sorted((Path(__file__).parent.parent / "docs" / "migrate").glob("*.md"))
RUN = {"lightning", "torch", "torchao", "torch_pruning"}  # the others need Keras, fastai or an archived package
PAIR = re.compile(
    r"<!-- theirs: (?P<library>\w+) -->\n```python\n(?P<theirs>.*?)```\n"
    r"(?P<between>(?:(?!```).)*?)<!-- ours: (?P<same>[^>]+) -->\n```python\n(?P<ours>.*?)```",
    re.S,
)


@dataclass(frozen=True)
class Pair:
    page: str
    number: int
    library: str
    theirs: str
    ours: str
    same: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def pairs() -> list[Pair]:
    return [
        Pair(page.stem, number, m["library"], m["theirs"], m["ours"], m["same"])
        for page in PAGES
        for number, m in enumerate(PAIR.finditer(page.read_text()))
    ]


def given() -> dict[str, Any]:
    """What the code leaves to the reader, the same each time."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 20)
    data = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), 16)
    convnet = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return {"model": Net(), "convnet": convnet, "data": data}


def run(code: str) -> dict[str, Any]:
    names = given()
    exec(compile(code, "<docs/migrate>", "exec"), names)
    return names


def masks(names: dict[str, Any]) -> dict[str, Tensor]:
    return {name: weight != 0 for name, weight in names["model"].named_parameters() if weight.dim() > 1}


def sparsity(found: dict[str, Tensor]) -> float:
    """Of the weights of which any is zero."""
    pruned = [mask for mask in found.values() if not mask.all()]
    return 1 - sum(int(mask.sum()) for mask in pruned) / sum(mask.numel() for mask in pruned)


def parameters(names: dict[str, Any]) -> int:
    return sum(weight.numel() for weight in names["convnet"].parameters())


def test_each_page_has_a_pair() -> None:
    assert {pair.page for pair in pairs()} == {page.stem for page in PAGES} and len(PAGES) == 7
    for page in PAGES:
        mine = [pair for pair in pairs() if pair.page == page.stem]
        assert page.read_text().count("<!-- theirs") == len(mine)
        run = all(pair.library in RUN for pair in mine)
        assert run != ("no test runs it" in page.read_text()) and all(p.same.startswith("same") == run for p in mine)


@pytest.mark.filterwarnings("default")  # of the other libraries
@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_both_leave_the_same(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = run(pair.ours)
    what, _, figure = pair.same.partition(" ")
    if what == "sparsity":
        assert sparsity(masks(ours)) == pytest.approx(float(figure), abs=1e-3)
    if isinstance(ours.get("pruner"), Pruner) and pair.same != "same parameters":
        assert ours["pruner"].sparsity == pytest.approx(ours["pruner"].schedule.final, abs=1e-3)
    if pair.library not in RUN or find_spec(pair.library) is None:
        return
    theirs = run(pair.theirs)
    if pair.same == "same masks":
        assert sparsity(masks(ours)) > 0.4
        assert all(torch.equal(mask, masks(theirs)[name]) for name, mask in masks(ours).items())
    elif pair.same == "same sparsity":
        assert sparsity(masks(ours)) == pytest.approx(sparsity(masks(theirs)), abs=1e-3)
    elif pair.same == "same parameters":
        assert parameters(ours) == parameters(theirs) < parameters(given())
    else:
        assert what == "sparsity"


def test_the_cubic_schedule_is_tfmot_s_polynomial_decay() -> None:
    from pl_sparse.schedule import Cubic

    schedule = Cubic(initial=0.5, final=0.8, begin="4 steps", end="12 steps", every=2)
    for step in range(4, 13, 2):  # final + (initial - final) (1 - (step - begin) / (end - begin)) ** 3
        assert schedule.levels(step, 16) == pytest.approx((0.8 - 0.3 * (1 - (step - 4) / 8) ** 3,))
