"""The rows of docs/trainers.md, and what their tests have counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pl_sparse import Pruner
from pl_sparse.allocation import Units

PAGE = Path(__file__).parent.parent / "docs" / "trainers.md"
EACH = "its own"
ELSEWHERE = frozenset(  # these train in processes of their own, and count there
    (
        "test_zero_shards_the_state_among_two_processes",
        "test_a_layer_that_one_process_does_not_call",
    )
)


@dataclass(frozen=True)
class Row:
    """A feature of training, and the test that shows it."""

    feature: str
    done: str
    asked: str
    counted: str
    test: str  # file::function

    def check(self, trained: Sequence[Pruner]) -> None:
        """Compare the figures of the page with what was counted in the weights.

        Args:
            trained: all that the test has attached.
        """
        if self.counted == "refused" or self.test.partition("::")[2] in ELSEWHERE:
            return
        if self.asked == EACH:
            for pruner in trained:
                zeros, unit = counted(pruner)
                part, target = pruner.sparsity, pruner.target
                assert zeros >= part - 1e-9, f"{self.test}: {zeros} of the weights are zero, {part} are pruned"
                assert target is None or abs(part - target) <= unit, f"{self.test}: {part} are pruned, not {target}"
            return
        asked = [p for p in trained if p.schedule.final == float(self.asked)]
        assert asked, f"{PAGE.name}: {self.test} asks for {[p.schedule.final for p in trained]}, not {self.asked}"
        figures = {figure(pruner, len(self.counted.partition(".")[2])) for pruner in asked if pruner.step}
        assert self.counted in figures, f"{PAGE.name}: {self.test} counted {sorted(figures)}, not {self.counted}"


def counted(pruner: Pruner) -> tuple[float, float]:
    """The part of the prunable weights that is zero, and that of the largest unit."""
    zeros = sum(int(torch.count_nonzero(param.weight == 0)) for param in pruner.params)
    unit = max(Units(pruner.groups, pruner.structure, pruner.scorer.score).weights)
    return zeros / pruner.numel, unit / pruner.numel


def figure(pruner: Pruner, digits: int) -> str:
    """The part that is zero, as the page writes it; in full where it is no such number."""
    part, unit = counted(pruner)
    return f"{part:.{digits}f}" if abs(part - round(part, digits)) <= unit else f"{part:.6f}"


def rows() -> list[Row]:
    """Those of the page that name a test."""
    # a copy of the tests may stand alone
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "::" in line]
    return [Row(*row[:-1], row[-1].strip("`")) for row in cells]
