"""The page of a pruned network that stands beside its weights: README.md, as hubs of models show it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from pl_sparse.core.files import write_text
from pl_sparse.surgery.plan import RemovalPlan

__all__ = ["CARD", "Card", "typed"]

CARD = "README.md"
_LAYERS = 200
"""More are not listed."""


@dataclass(frozen=True)
class Card:
    """The contents of a pruned network's page.

    Args:
        load: lines of Python that load the network from the folder.
        command: the command that made it.
        base: the name on a hub of the network that was pruned.
        library: the hub's name of the library of its class.
        figures: measurements before and after, by name.
        verdict: lines.
    """

    load: str = ""
    command: str = ""
    base: str = ""
    library: str = ""
    figures: Mapping[str, tuple[float, float]] | None = None
    verdict: Sequence[str] = ()

    def write(self, model: nn.Module, plan: RemovalPlan, folder: Path) -> None:
        """Write it to a folder.

        Args:
            model: without what was taken out.
            plan: what was.
            folder: where the weights are.
        """
        write_text(folder / CARD, self.text(model, plan))

    @torch.no_grad()
    def text(self, model: nn.Module, plan: RemovalPlan) -> str:
        """The page in Markdown, with its data for the hub at the top."""
        weights = dict(model.named_parameters())
        after = sum(weight.numel() for weight in weights.values())
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        gone = [prod(cut.shape) - prod(cut.left) for name, cut in plan.tensors.items() if name in weights]
        before = after + sum(gone)
        head = ["---", *([f"library_name: {self.library}"] if self.library else [])]
        head += [f"base_model: {self.base}"] if self.base else []
        head += ["tags:", "- pruned", "- pl_sparse", "---", "", f"# {type(model).__name__}, pruned", ""]
        rows = [("parameters", f"{before:,}", f"{after:,}"), ("of these zero", "", f"{zeros / max(after, 1):.1%}")]
        rows += [(name, f"{old:,.4g}", f"{new:,.4g}") for name, (old, new) in (self.figures or {}).items()]
        lines = [*head, *_table(("", "before", "after"), rows), ""]
        lines += [line for verdict in self.verdict for line in (verdict, "")]
        lines += ["```python", self.load, "```", ""]
        if self.command:
            lines += ["Made by", "", "```bash", self.command, "```", ""]
        sizes = [(f"`{name}`", _shape(cut.shape), _shape(cut.left)) for name, cut in plan.tensors.items()]
        zero = [
            (f"`{name}`", f"{float((weight == 0).float().mean()):.1%}")
            for name, weight in weights.items()
            if weight.dim() > 1 and bool((weight == 0).any())
        ]
        if sizes:
            lines += ["## Layers that are smaller", "", *_table(("tensor", "before", "after"), sizes), ""]
        if zero:
            lines += ["## Layers with zeros", "", *_table(("tensor", "zeros"), zero), ""]
        return "\n".join(lines)


def typed() -> str:
    """The command line of this process, as it was typed: `sys.argv` has lost its subcommand."""
    script, *more = sys.orig_argv[1:] or [""]
    if script.endswith(".py") or script.startswith("-"):
        return f"python {shlex.join([script, *more])}"
    return f"{Path(script).name} {shlex.join(more)}".strip()


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows[:_LAYERS])]
    more = [f"and {len(rows) - _LAYERS} more" + " |" * (len(head) - 1)] if len(rows) > _LAYERS else []
    return [f"| {line} |" for line in (*lines, *more)]
