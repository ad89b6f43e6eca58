"""The loss of any LightningModule on some training batches, for scorers that look at the whole model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from pl_sparse.network.probe import Probe


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


def example_of(trainer: Trainer, module: LightningModule) -> Any:
    """Inputs that the module can be called with: its `example_input_array`, else the inputs of a training batch.

    Of a batch (inputs, targets) these are the first part, of a dict the entries that `forward` names. Two samples are
    enough. Nothing random is drawn from.
    """
    example = module.example_input_array
    if example is None:
        loader: Any = trainer.train_dataloader
        if loader is None:  # setting it up would draw the order of the first epoch, which a checkpoint may yet give
            loader = trainer.fit_loop._data_source.dataloader()
        generator = getattr(loader, "generator", None)
        state = generator.get_state() if isinstance(generator, torch.Generator) else None
        with torch.random.fork_rng(devices=[]):
            if isinstance(loader, Mapping | list | tuple):
                batch = next(iter(CombinedLoader(loader)))[0]
            else:
                batch = next(iter(copy.copy(loader)), None)
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
        if isinstance(batch, Mapping):
            known = inspect.signature(module.forward).parameters
            example = {key: value for key, value in batch.items() if key in known}
        else:
            example = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if example is None or (isinstance(example, Mapping) and not example):
        raise ValueError("no inputs to call the module with were found: give it an example_input_array")
    return _two(example, module.device)


def _two(value: Any, device: torch.device) -> Any:
    """The first two samples of all tensors, on a device."""
    if isinstance(value, Tensor):
        return value[:2].to(device)
    if isinstance(value, Mapping):
        return {key: _two(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_two(part, device) for part in value)
    return value
