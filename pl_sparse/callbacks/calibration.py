"""The loss of any LightningModule on some training batches, for scorers that look at the whole model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from pl_sparse.probe import Probe


def first_batches(trainer: Trainer, count: int) -> list[Any]:
    """So many training batches, on the device of training."""
    loader: Any = trainer.train_dataloader
    if isinstance(loader, Mapping | list | tuple):
        source = (batch for batch, *_ in CombinedLoader(loader))
    else:
        source = iter(copy.copy(loader))  # a loader that counts its batches must not count these
    return [trainer.strategy.batch_to_device(batch) for batch in islice(source, count)]


class Calibration:
    """Losses by the module's own `training_step`, on the first batches of its training data.

    What `training_step` logs is dropped, and the metrics that it updates are set back.

    Raises:
        ValueError: the module optimizes manually, so that its `training_step` would train it.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batches: int) -> None:
        if not module.automatic_optimization:
            raise ValueError(
                "scorers that are calibrated (snip, grasp, synflow) call training_step for its loss, and with manual "
                "optimization that trains the module: use scorer=magnitude, taylor or movement"
            )
        self.trainer = trainer
        self.module = module
        self.count = batches

    def probe(self) -> Probe:
        """What the Pruner calibrates with."""

        def mean(value: Tensor) -> Tensor:
            return self.trainer.strategy.reduce(value, reduce_op="mean")

        return Probe(self.module, self._batches, self._loss, mean if self.trainer.world_size > 1 else None)

    def _batches(self) -> list[Any]:
        return first_batches(self.trainer, self.count)

    def _loss(self, batch: Any) -> Tensor:
        arguments = inspect.signature(self.module.training_step).parameters
        if "dataloader_iter" in arguments:
            raise ValueError("a training_step(dataloader_iter) cannot be called for calibration: take a batch instead")
        with self._silent(), self.trainer.precision_plugin.train_step_context():
            out = self.module.training_step(batch, 0) if len(arguments) > 1 else self.module.training_step(batch)
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(out).__name__} and no loss for a calibration batch")
        return loss

    @contextmanager
    def _silent(self) -> Iterator[None]:
        metrics = [m for m in self.module.modules() if isinstance(m, Metric)]
        saved = [(m, copy.deepcopy(m.metric_state), m._update_count) for m in metrics]
        vars(self.module)["log"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del vars(self.module)["log"]
            for metric, state, count in saved:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count = count
