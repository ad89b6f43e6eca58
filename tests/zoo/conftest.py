"""The table of the zoo, and a torchvision whose compiled operators do not load."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

HEAD = """# The zoo

Modules that this project did not write. Each is trained for two epochs under Lightning with a `Sparsity` callback, on
random batches. All are made from small configurations with random weights, and the axes rotate over the rows.
`make test-zoo` installs the packages into `.venv-zoo`, runs all rows and writes this table. `tests/zoo/` has the
modules and these tests:

- The saved checkpoint has the number of zeros that was asked for: exactly for single weights, rows and N:M, to one unit
  for other structures.
- The checkpoint loads with `strict=True` into the plain class, whose predictions are the same bit for bit.
- A training that resumes from the checkpoint of the first epoch ends with the same weights and masks, bit for bit.
- All pruned weights are zero when a validation starts and when an epoch ends.
- Each matrix is pruned, or left out by name with a reason. The coverage is at least 95 %, unless the structure lowers
  it or the test expects less.

*Pruned* is the share of all parameters, biases and tables included, that has a mask. *Coverage* is the share of the
weights of matrices and convolutions. [The zoo of removal](zoo_removal.md) has the channels that can be removed.

"""
COLUMNS = (
    *("module", "package", "scorer, structure, allocation, masking", "parameters", "pruned", "coverage", "left out"),
    *("asked", "counted", "strict load", "same predictions", "exact resume", "s"),
)

REMOVAL_HEAD = """# The zoo of removal

Half of the channels of each network are masked (`structure=coupled`, `allocation=uniform`), and half of the attention
heads in another copy (`structure=head`). Five steps are trained on random batches. Then `export.shrink`
([removal](shrink.md)) removes what is masked. Networks are made from small configurations with random weights.
`make test-zoo` runs all of them and writes this table; `make test` runs the quick ones. The tests:

- The outputs of the smaller network are those of the masked one, to 1e-4 of the largest.
- All masked channels are removed, and the network has fewer parameters and fewer MACs. Masked heads are removed, or
  stay with a reason.

*Removable* is the share of the outputs of all layers that can be removed. The last column counts those that stay, with
the reason from the log. MACs are those of torch's `FlopCounterMode` for one sample (for graph networks: for the whole
graph). It does not count the products of torch's fused recurrent layers. Milliseconds are medians of one thread for one
sample, before and after in turns. The runtime is ONNX Runtime if the network can be exported by tracing, else torch
(*torch*). The time of such small networks is mostly overhead, and other work shared the machine. *Error* is the largest
difference of the outputs, relative to the largest output.

"""
REMOVAL_COLUMNS = (
    *("module", "package", "structure", "parameters", "MACs", "ms", "runtime", "error", "removable"),
    "what stays, and why",
)

INT8_HEAD = """# The zoo in integers

Each network is trained under Lightning with `Sparsity(sparsity=0.5)` and `Quantize(Int8())`, four steps on random
batches, converted, and exported by `export.ONNXInt8`. Networks are made from small configurations with random weights;
those whose batch begins with a tensor are called with that one. `make test-zoo` runs all of them and writes this table;
a few run in `make test`. Of each is asserted:

- Each parameter of several dimensions is in integers (or part of a matrix that is), or was named before training with
  the operation that reads it. What cannot be quantized is refused by name before training.
- What is masked is zero in the integers, and the exported file holds as many zeros.
- The converted network computes what was simulated, and ONNX Runtime what the converted network does.

*simulated* is the largest difference of outputs from those in floating point, *converted* that of the converted network
from the simulated one, *ONNX Runtime* that of the file from the converted network, all relative to the largest output.
Random networks amplify a value that is rounded to the next integer: a millionth of noise in the inputs changes the
outputs of some by a quarter. *bytes* are 4 per number of the network, and of all that the file holds.
[Targets](targets.md) has small networks by their kinds of layers.

"""
INT8_COLUMNS = (
    *("module", "package", "matrices in integers", "in floating point, read by", "bytes"),
    *("simulated", "converted", "ONNX Runtime"),
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
    parser.addoption("--int8-table", type=Path, help="the file that the table of integers is written to")
    parser.addoption("--removal-table", type=Path, help="the file that the table of removals is written to")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    calls = [report for report in reports if getattr(report, "when", "") == "call" and "[" in report.nodeid]
    for option, kind, test, head, columns, cells in (
        ("--zoo-table", "zoo", "test_zoo.py", HEAD, COLUMNS, lambda row: [_cells(row)]),
        ("--int8-table", "int8", "test_int8.py", INT8_HEAD, INT8_COLUMNS, lambda row: [_int8_cells(row)]),
        ("--removal-table", "removal", "test_removal.py", REMOVAL_HEAD, REMOVAL_COLUMNS, _removal_cells),
    ):
        path = config.getoption(option, None)
        wanted = [report for report in calls if test in report.nodeid]
        if path is None or not wanted:
            continue
        rows, earlier = _kept(config.cache, kind, wanted)
        if not rows or len(rows) < rows[0]["of"]:
            terminalreporter.write_line(f"{path} is left as it is: {len(rows)} modules passed, in this run or before")
            continue
        rows.sort(key=lambda row: row["index"])
        lines = [columns, ["---"] * len(columns), *(line for row in rows for line in cells(row))]
        path.write_text(head + "".join("| " + " | ".join(line) + " |\n" for line in lines))
        terminalreporter.write_line(f"{path}: {len(rows)} modules, {earlier} of them in earlier runs")


def _kept(cache: Any, kind: str, reports: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """The rows of all that passed, with those of earlier runs, and how many these are; `--cache-clear` forgets them."""
    place = f"zoo/{kind}"
    kept = cache.get(place, {})
    rows = {report.nodeid: dict(report.user_properties).get(kind) for report in reports}
    kept = {name: row for name, row in (kept | rows).items() if row is not None}
    count = next((row["of"] for row in rows.values() if row is not None), None)
    kept = {name: row for name, row in kept.items() if count in (None, row["of"])}  # of the same list of modules
    cache.set(place, kept)
    return list(kept.values()), len(kept.keys() - rows.keys())


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


def _removal_cells(row: dict[str, Any]) -> list[list[str]]:
    """A line per structure, or one without figures where nothing can be removed."""
    names = [row["module"], row["package"]]
    stay = ", ".join(f"{count} x {reason}" for reason, count in row["stay"]) or "nothing"
    lines = []
    for one in row["rows"]:
        figures = [
            one["structure"],
            "{:,} → {:,}".format(*one["parameters"]),
            "{:.3g}M → {:.3g}M".format(*(count / 1e6 for count in one["macs"])),
            "{:.3g} → {:.3g}".format(*one["ms"]),
            one["runtime"],
            f"{one['error']:.0e}",
        ]
        left = ", ".join(f"{count} x {reason}" for reason, count in one["left"])
        known = [f"{row['removable']:.1%}", stay] if one["structure"] == "coupled" else ["", left or "nothing"]
        lines.append([*names, *figures, *known])
    if not lines or lines[0][2] != "coupled":
        lines.insert(0, [*names, "coupled", *["-"] * 5, f"{row['removable']:.1%}", stay])
    return lines


def _int8_cells(row: dict[str, Any]) -> list[str]:
    names = [row["module"], row["package"]]
    if "refused" in row:
        return [*names, "-", f"refused: {row['refused']}".replace("|", "/"), *["-"] * 4]
    counts = Counter(row["floats"].values()).most_common()
    return [
        *names,
        str(row["matrices"]),
        ", ".join(f"{count} x {operation}" for operation, count in counts) or "nothing",
        "{:,} → {:,}".format(*row["bytes"]) if "bytes" in row else "-",
        *(f"{error:.0e}" for error in reversed(row["error"])),
        row["note"],
    ]
