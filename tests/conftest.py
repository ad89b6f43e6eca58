"""Every test starts from the same seed, on one thread, and reaches no network."""

import os
from collections.abc import Generator, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings
from trainer_rows import rows

from pl_sparse import Pruner

LACKING = "pip install 'pl_sparse["

torch.set_num_threads(1)
settings.register_profile("same", derandomize=True)  # a change fails by what it did; test_fuzz.py draws others
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


PASSED = pytest.StashKey[bool]()
ROWS = {row.test: row for row in rows()}


@pytest.fixture(autouse=True)
def _trainer_table(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test counts that docs/trainers.md names is what the page says."""
    row = ROWS.get(f"{request.path.name}::{request.node.originalname}")
    if row is None:
        yield
        return
    attached: dict[Pruner, None] = {}
    attach = Pruner.attach

    def noted(pruner: Pruner, *args: Any, **kwargs: Any) -> None:
        attached[pruner] = None
        attach(pruner, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pruner, "attach", noted)
        yield
    if request.node.stash.get(PASSED, False):
        row.check(list(attached))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-extras", action="store_true", help="skip tests that end with the advice to install an extra"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    if report.failed and call.excinfo is not None and item.config.getoption("--without-extras"):
        error: BaseException | None = call.excinfo.value
        while error is not None and LACKING not in str(error):
            error = error.__cause__ or error.__context__
        if error is not None:
            extra = str(error).partition(LACKING)[2].partition("]")[0]
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.reportinfo()[1] or 0, f"needs {extra}")
    return report
