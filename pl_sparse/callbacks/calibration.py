"""The loss of any LightningModule on some training batches, for scorers that look at the whole model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pl_sparse.core.upstream import forgets_metrics, overridden, passed_on, training_loader
from pl_sparse.network.hooks import called, hooked, stand_ins, tensors, undisturbed, without_forward
from pl_sparse.network.probe import Probe

__all__ = ["Calibration", "example_at_hand", "example_of", "first_batches", "network_of", "refuse_without_forward"]


_TRIES = 20


def network_of(module: LightningModule) -> nn.Module:
    """The network of a module: its `net` where there is one, else the module itself."""
    net = getattr(module, "net", None)
    return net if isinstance(net, nn.Module) else module


def refuse_without_forward(module: LightningModule) -> None:
    """Raise a ValueError if a module has no `forward` to follow its channels through, and say what to write."""
    if type(module).forward is not LightningModule.forward or "forward" in vars(module):
        return
    raise without_forward(module)


def first_batches(trainer: Trainer, count: int) -> list[Any]:
    """The first training batches, as `training_step` gets them.

    Args:
        trainer: of a training that has started.
        count: how many, if there are so many.
    """
    return list(islice(_batches(trainer), count))


def _batches(trainer: Trainer) -> Iterator[Any]:
    """The training batches from the first on, as `training_step` gets them."""
    loader: Any = trainer.train_dataloader
    if isinstance(loader, Mapping | list | tuple):
        source = (batch for batch, *_ in CombinedLoader(loader))
    else:
        source = iter(copy.copy(loader))  # a loader that counts its batches must not count these
    for batch in source:
        yield passed_on(trainer, batch)


class Calibration:
    """Losses by the module's own `training_step`, on the first batches of its training data for which it returns one.

    What `training_step` logs is dropped, and the metrics that it updates are set back.

    Args:
        trainer: of a training that has started.
        module: the one that is trained.
        batches: how many.

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
        self._source: Iterator[Any] = iter(())

    def probe(self) -> Probe:
        """What the Pruner calibrates with."""

        def mean(value: Tensor) -> Tensor:
            return self.trainer.strategy.reduce(value, reduce_op="mean")

        reduce = mean if self.trainer.world_size > 1 else None
        return Probe(self.module, self._first, self._loss, reduce, self._following)

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch; the module is left as it is.

        Raises:
            ValueError: `training_step` returns none.
        """
        with undisturbed(self.module), torch.enable_grad():
            return self._loss(batch).detach()

    def _first(self) -> list[Any]:
        """The first batches of the training data."""
        self._source = _batches(self.trainer)
        batches = self._take()
        if not batches:
            raise ValueError("training_step returned no loss for any calibration batch")
        return batches

    def _following(self) -> list[Any]:
        """The batches after those taken last; from the first on again where the data ends."""
        batches = self._take()
        return batches if len(batches) == self.count else self._first()

    def _take(self) -> list[Any]:
        """The next batches with a loss, fewer where the data ends."""
        batches: list[Any] = []
        for batch in islice(self._source, self.count * _TRIES):
            with undisturbed(self.module), torch.enable_grad():
                if self.step(batch) is not None:
                    batches.append(batch)
            if len(batches) == self.count:
                break
        return batches

    def _loss(self, batch: Any) -> Tensor:
        loss = self.step(batch)
        if loss is None:
            raise ValueError("training_step returned a loss for a calibration batch at first, and then none")
        return loss

    def step(self, batch: Any) -> Tensor | None:
        """What `training_step` returns as loss for a batch, None if it returns none."""
        arguments = inspect.signature(self.module.training_step).parameters
        if "dataloader_iter" in arguments:
            raise ValueError("a training_step(dataloader_iter) cannot be called for calibration: take a batch instead")
        silent = overridden(self.module, "log", lambda *args, **kwargs: None)
        with forgets_metrics(self.module), silent, self.trainer.precision_plugin.train_step_context():
            out = self.module.training_step(batch, 0) if len(arguments) > 1 else self.module.training_step(batch)
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if loss is None:
            return None
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(out).__name__} and no loss for a calibration batch")
        return loss


def example_of(trainer: Trainer, module: LightningModule) -> Any:
    """Inputs that the module can be called with: its `example_input_array`, else the inputs of a training batch.

    Of a batch (inputs, targets) these are the first part, of a dict the entries that `forward` names. Where the module
    cannot be called with them, they are what its `training_step` calls it with. Nothing random is drawn from.

    Args:
        trainer: of a training that may not have started yet.
        module: the one that is trained.

    Returns:
        The inputs of two samples, on the module's device: a tensor, a tuple of arguments or a dict of keywords.

    Raises:
        ValueError: there are none, or the module cannot be called.
    """
    refuse_without_forward(module)
    example: Any = module.example_input_array
    if example is None:
        loader = training_loader(trainer)
        generator = getattr(loader, "generator", None)
        state = generator.get_state() if isinstance(generator, torch.Generator) else None
        with torch.random.fork_rng(devices=[]):
            if isinstance(loader, Mapping | list | tuple):
                batch = next(iter(CombinedLoader(loader)))[0]
            else:
                batch = next(iter(copy.copy(loader)), None)
            batch = None if batch is None else passed_on(trainer, batch)
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
        if isinstance(batch, Mapping):
            arguments = inspect.signature(module.forward).parameters
            example = {key: value for key, value in batch.items() if key in arguments}
        else:
            example = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if batch is not None and not _takes(module, _two(example, module.device)):
            used = _used(trainer, module, batch)
            example = example if used is None else used
    if example is None or (isinstance(example, Mapping) and not example):
        raise ValueError("no inputs to call the module with were found: give it an example_input_array")
    return _two(example, module.device)


def example_at_hand(trainer: Trainer, module: LightningModule) -> Any:
    """The same, or None: where there are none, and where reading a batch might lose it for training."""
    dataset = getattr(training_loader(trainer), "dataset", None)
    if module.example_input_array is None and (dataset is None or isinstance(dataset, IterableDataset)):
        return None
    try:
        return example_of(trainer, module)
    except Exception:
        return None


def _takes(module: LightningModule, example: Any) -> bool:
    """Whether a module can be called with an example."""
    try:
        with stand_ins(module), torch.no_grad():
            called(module, example)
    except Exception:
        return False
    return not isinstance(example, Mapping) or bool(example)


class _SeenError(Exception):
    """What a module is called with is known: the step need not go on."""


def _used(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """What `training_step` calls the module with for a batch, or None if it does not call it, or trains it itself."""
    if not module.automatic_optimization:
        return None
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _SeenError

    with hooked([module], pre=see), undisturbed(module), suppress(_SeenError):
        Calibration(trainer, module, 1).step(batch)
    if not seen:
        return None
    args, kwargs = seen[0]
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments if kwargs else args


def _two(value: Any, device: torch.device) -> Any:
    """The first two samples of all tensors, on a device; all of them, where tensors are of different lengths."""
    sizes = {len(tensor) for tensor in tensors(value) if tensor.dim()}
    return _first(value, 2 if len(sizes) == 1 else None, device)


def _first(value: Any, count: int | None, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return (value[:count] if value.dim() else value).to(device)
    if isinstance(value, Mapping):
        return {key: _first(part, count, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_first(part, count, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _first(part, count, device) for name, part in parts.items()})
    return value
