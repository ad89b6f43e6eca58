"""A network through which nothing passes any more is an error, a layer that died beside others a warning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from pl_sparse.callbacks.calibration import Calibration, first_batches
from pl_sparse.network.hooks import hooked
from pl_sparse.pruner import Pruner

__all__ = ["Collapse"]

_REMEDY = (
    "What usually helps: allocation=erk, uniform or lamp instead of global, a lower sparsity, a later or slower "
    "schedule, or overrides or exclude for such layers"
)


class Collapse:
    """Watches for layers that keep no weight below a sparsity of 1.

    Where one died, the loss of a training batch is computed twice, the second time with other inputs of the network. A
    loss that is the same to the bit depends on the targets alone: a RuntimeError; where weights may return, once the
    last masks are set. What was asked for on purpose (`ablation`), and what cannot be tried (manual optimization, a
    `training_step` without a loss), is a warning.
    """

    def __init__(self) -> None:
        self._dead: list[str] = []
        self._named: set[str] = set()
        self._judged = True

    def look(self, pruner: Pruner, kept: Mapping[str, int]) -> None:
        """After masks changed: note the layers that are dead.

        Args:
            kept: how many weights of each are kept, by name.
        """
        self._dead = [name for name, count in kept.items() if count == 0] if pruner.level < 1 else []
        self._judged = not self._dead

    def judge(self, pruner: Pruner, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Between two optimizer steps: say what the layers that are dead mean.

        Args:
            batch: as `training_step` gets it.

        Raises:
            RuntimeError: nothing passes through the network.
        """
        if self._judged:
            return
        self._judged = True
        if set(self._dead) <= self._named and pruner.revives and not pruner.settled:
            return
        dead, where = ", ".join(self._dead), f"kept no weight at a sparsity of {pruner.sparsity:.4f}"
        final = pruner.ablation is None and (pruner.settled or not pruner.revives)
        if final and not _depends_on_inputs(trainer, module, batch):
            raise RuntimeError(
                f"nothing passes through the network after {pruner.step} optimizer steps: {dead} {where}, and the loss "
                f"no longer depends on the inputs. {_REMEDY}"
            )
        if not set(self._dead) <= self._named:
            self._named |= set(self._dead)
            rank_zero_warn(f"{dead} {where} and pass nothing on. {_REMEDY}")

    def at_end(self, pruner: Pruner, trainer: Trainer, module: LightningModule) -> None:
        """The same at the end of an epoch, on the first batch of the training data."""
        if not self._judged:
            with torch.random.fork_rng(devices=[]):
                batches = first_batches(trainer, 1)
            for batch in batches:
                self.judge(pruner, trainer, module, batch)


def _depends_on_inputs(trainer: Trainer, module: LightningModule, batch: Any) -> bool:
    """Whether the loss of a batch changes with the inputs of the network; True where that cannot be found out."""
    if not module.automatic_optimization:
        return True
    probe = Calibration(trainer, module, 1)
    try:
        loss = probe.loss(batch)
        with _other_inputs(module) as changed:
            other = probe.loss(batch)
    except Exception:  # of code that is not ours: other inputs need not make sense to it
        return True
    return not changed or not torch.equal(loss, other)


@contextmanager
def _other_inputs(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Within the block what `training_step` calls gets other inputs; yields the modules that did.

    To floats noise is added. Where there are none, integers change places.
    """
    depth = 0
    changed: list[nn.Module] = []
    generator = torch.Generator().manual_seed(0)

    def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal depth
        depth += 1
        if depth > 1:
            return None
        inputs = [*args, *kwargs.values()]
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)

        def other(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() != floats:
                return x
            changed.append(called)
            if floats:
                return x + torch.randn(x.shape, generator=generator).to(x) * (1 + x.abs())
            return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].reshape(x.shape)

        return tuple(other(x) for x in args), {key: other(x) for key, x in kwargs.items()}

    def leave(called: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal depth
        depth -= 1

    networks = [part for part in module.modules() if any(True for _ in part.parameters())]
    with hooked(networks, pre=enter, post=leave):
        yield changed
