"""The table of docs/trainers.md: each test that it names is there, and asks for the sparsity that it says."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "trainers.md"


def rows() -> list[list[str]]:
    """The cells of each row that names a test."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "::" in line]


@cache
def functions(file: str) -> dict[str, str]:
    """The functions of a file of tests, and its text where each of them begins."""
    text = (TESTS / file).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: text for node in nodes}


def test_the_table_is_long_enough() -> None:
    names = [row[-1] for row in rows()]
    assert len(names) >= 40 and len(set(names)) == len(names)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[-1].strip("`").partition("::")[2])
def test_each_row_names_a_test_that_is_there(row: list[str]) -> None:
    feature, done, asked, counted, name = row
    file, _, function = name.strip("`").partition("::")
    assert feature and done and function in functions(file)
    assert 0 < float(asked) < 1 and counted in (asked, "refused")
    assert ("refused" in done or "did you mean" in done or "stops" in done) or counted == asked
    text = functions(file)[function]
    assert asked in text or f"sparsity={asked}" in text or file in ("test_integrations.py", "test_methods.py")
