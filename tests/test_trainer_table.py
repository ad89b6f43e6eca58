"""The table of docs/trainers.md: each test that it names is there, and counts in the weights what it says."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_rows import EACH, Row, rows

from pl_sparse import Pruner

TESTS = Path(__file__).parent


@cache
def functions(file: str) -> dict[str, str]:
    """The functions of a file of tests, and its text where each of them begins."""
    text = (TESTS / file).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: text for node in nodes}


def test_the_table_is_long_enough() -> None:
    names = [row.test for row in rows()]
    assert len(names) >= 40 and len(set(names)) == len(names)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.test.partition("::")[2])
def test_each_row_names_a_test_that_is_there(row: Row) -> None:
    """Its figures are compared where that test runs (`conftest.py`)."""
    file, _, function = row.test.partition("::")
    assert row.feature and row.done and function in functions(file)
    assert row.asked == EACH or 0 < float(row.asked) < 1
    if row.counted == "refused":
        assert any(word in row.done for word in ("refused", "did you mean", "stops"))
        assert row.asked in functions(file)[function]
    else:
        assert row.counted == row.asked or ("as sparse as" in row.done and float(row.counted) < float(row.asked))


def test_a_figure_that_was_not_counted_is_refused() -> None:
    model = nn.Linear(10, 10)
    pruner = Pruner(sparsity=0.75, schedule="oneshot")
    pruner.attach(model)
    pruner.prepare(1)
    pruner.step = 1
    Row("", "", "0.75", "0.75", "a.py::a").check([pruner])
    with torch.no_grad():
        for row, column in pruner.params[0].mask.nonzero()[:2].tolist():
            model.weight[row, column] = 0
    with pytest.raises(AssertionError, match=r"counted \['0.77'\], not 0.75"):
        Row("", "", "0.75", "0.75", "a.py::a").check([pruner])
    with pytest.raises(AssertionError, match=r"asks for \[0.75\], not 0.5"):
        Row("", "", "0.5", "0.5", "a.py::a").check([pruner])
