"""The plain loop of many tests."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from pl_sparse import Pruner


def loop(pruner: Pruner, optimizer: Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    """Train for some steps, with the pruner's calls around each of the optimizer's."""
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        pruner.before_step(step, steps, optimizer)
        optimizer.step()
        pruner.after_step()
