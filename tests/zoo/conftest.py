"""The table of the zoo, and a torchvision whose compiled operators do not load."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

HEAD = """# The zoo

Modules that this project did not write, each trained for two epochs under Lightning with a `Sparsity` callback, on
random batches. All are made from small configurations with random weights; axes rotate over the rows. `make test-zoo`
installs the packages into `.venv-zoo`, runs all rows and writes this table; `tests/zoo/` has each module and what is
asserted of it:

- The zeros counted in the saved checkpoint are those asked for: exactly for single weights, rows and N:M, else to one
  unit.
- The checkpoint loads with `strict=True` into the plain class, which predicts the same bit for bit.
- A training resumed from the first epoch's checkpoint ends with the same weights and masks bit for bit.
- No pruned weight is nonzero when a validation starts, nor at the end of an epoch.
- Each matrix is pruned, or left out by name with a reason. The coverage is 95 %, or what lowers it is the structure, or
  expected.

*Pruned* is the share of all parameters, biases and tables included, that is under a mask; *coverage* that of the
weights in matrices and convolutions.

"""
COLUMNS = (
    *("module", "package", "scorer, structure, allocation, masking", "parameters", "pruned", "coverage", "left out"),
    *("asked", "counted", "strict load", "same predictions", "exact resume", "s"),
)

_LIBRARY: list[torch.library.Library] = []


def _complete_torchvision() -> None:
    """Declare the operators that torchvision describes when it is imported: a build for another torch lacks them."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_complete_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-table", type=Path, help="the file that the table of the zoo is written to")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("--zoo-table", None)
    if path is None:
        return
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    wanted = [report for report in reports if getattr(report, "when", "") == "call" and "[" in report.nodeid]
    rows = [dict(report.user_properties)["zoo"] for report in wanted if "zoo" in dict(report.user_properties)]
    if len(rows) < len(wanted) or not rows:
        terminalreporter.write_line(
            f"{path} is left as it is: {len(wanted) - len(rows)} modules failed or were skipped"
        )
        return
    rows.sort(key=lambda row: row["index"])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows)]
    path.write_text(HEAD + "".join("| " + " | ".join(line) + " |\n" for line in lines))
    terminalreporter.write_line(f"{path}: {len(rows)} modules")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["module"],
        row["package"],
        row["axes"],
        f"{row['parameters']:,}",
        f"{row['pruned']:.1%}",
        f"{row['coverage']:.1%}",
        ", ".join(row["left_out"]) or "nothing",
        f"{row['asked']:.2%}",
        f"{row['counted']:.2%}",
        *["yes"] * 2,
        row["resume"],
        f"{row['seconds']:.1f}",
    ]
