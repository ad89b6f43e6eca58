"""Whether the loss of a LightningModule depends on its inputs still."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pl_sparse.callbacks.calibration import Calibration, first_batches
from pl_sparse.core.upstream import forgets_metrics, overridden
from pl_sparse.network.collapse import depends_on_inputs
from pl_sparse.network.hooks import undisturbed
from pl_sparse.pruner import Pruner

__all__ = ["judge", "judge_at_end"]


def judge(pruner: Pruner, trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Between two optimizer steps: say what layers that died mean.

    Args:
        batch: as `training_step` gets it.

    Raises:
        RuntimeError: nothing passes through the network.
    """
    if pruner.collapse.judged:
        return

    def depends() -> bool:
        networks = [part for part in module.modules() if any(True for _ in part.parameters())]
        if module.automatic_optimization:
            return depends_on_inputs(lambda: Calibration(trainer, module, 1).loss(batch), networks)
        with _left_alone(module):
            return depends_on_inputs(lambda: _first_loss(trainer, module, batch), networks)

    pruner.judge(depends, rank_zero_warn)


def judge_at_end(pruner: Pruner, trainer: Trainer, module: LightningModule) -> None:
    """The same at the end of an epoch, on the first batch of the training data."""
    if not pruner.collapse.judged:
        with torch.random.fork_rng(devices=[]):
            batches = first_batches(trainer, 1)
        for batch in batches:
            judge(pruner, trainer, module, batch)


class _Loss(Exception):  # noqa: N818
    """Ends a `training_step` that optimizes by itself at its first backward pass."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss.detach().clone()


def _first_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """The first loss that a `training_step` goes back from, where it ends: it trains nothing.

    Raises:
        ValueError: it goes back from none.
    """

    def stop(loss: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        raise _Loss(loss if isinstance(loss, Tensor) else loss[0])

    arguments = inspect.signature(module.training_step).parameters
    with ExitStack() as block:
        block.enter_context(undisturbed(module))
        block.enter_context(torch.enable_grad())
        block.enter_context(forgets_metrics(module))
        block.enter_context(overridden(module, "log", lambda *args, **kwargs: None))
        block.enter_context(overridden(module, "manual_backward", stop))
        block.enter_context(overridden(torch.autograd, "backward", stop))
        block.enter_context(trainer.precision_plugin.train_step_context())
        try:
            module.training_step(batch, 0) if len(arguments) > 1 else module.training_step(batch)
        except _Loss as seen:
            return seen.loss
    raise ValueError("training_step calls backward on no loss")


@contextmanager
def _left_alone(module: LightningModule) -> Iterator[None]:
    """Afterwards gradients, and what has some, are as before: a `training_step` zeroes and toggles them."""
    before = [(p, p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
