"""Multiply-accumulates per sample, counted on one batch of a training or test; a failure never ends the training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from pl_sparse.core.optional import nice_to_have
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.sharded import whole
from pl_sparse.core.upstream import compiled
from pl_sparse.network.computed import ComputedWeights
from pl_sparse.network.macs import MacCounter, Macs, macs
from pl_sparse.pruner import Pruner

__all__ = ["MacCount", "sample_count"]


class MacCount:
    """Counts the uses of each weight in the first batch that it sees whole.

    Where the number of samples of that batch is not certain, or anything fails, there is no count.
    """

    def __init__(self) -> None:
        self._over = False
        self._counter: _Counter | None = None
        self._computed: ComputedWeights | None = None
        self._positions: dict[str, float] = {}
        self._other = 0.0
        self._restored: tuple[dict[str, float], float] = {}, 0.0

    @property
    def known(self) -> bool:
        """Whether there is a count, of this process or of an earlier one."""
        return bool(self._positions or self._restored[0])

    def start(self, module: nn.Module, params: Sequence[MaskedParameter] = ()) -> None:
        """Before a batch: watch the module's layers, if nothing has been counted yet.

        Args:
            module: the one that is trained.
            params: those that are pruned; what is computed of them is followed.
        """
        if self._over or self._counter is not None:
            return
        if compiled(module):
            self._over = True
            return
        self._computed = ComputedWeights.of(params, module)
        counter = _Counter(module, self._computed)
        self._over = True  # unless the counter starts
        with nice_to_have("the count of MACs"):
            counter.__enter__()
            self._counter, self._over = counter, False

    def refuse_lost(self) -> None:
        """Refuse weights that the batch does not multiply with, but what is computed of them, which has no zeros.

        Raises:
            ValueError: there are such weights.
        """
        if self._computed is not None:
            self._computed.refuse_lost()

    def finish(self, batch: Any, loader: Any, index: int) -> None:
        """After the batch: the uses per sample.

        Args:
            batch: what was computed with.
            loader: that the batch came from.
            index: how many batches came before it in this epoch.
        """
        if self._counter is None:
            return
        counter = self._counter
        self.release()
        self._over = True
        with nice_to_have("the count of MACs"):
            if counter.failure is not None:
                raise counter.failure
            samples = sample_count(batch, loader, index)
            if samples:
                self._positions = {name: uses / samples for name, uses in counter.positions.items()}
                self._other = counter.other / samples

    def aside(self) -> AbstractContextManager[None]:
        """Within the block what the model computes, as when a scorer is calibrated, is not of the batch."""
        return nullcontext() if self._counter is None else _uncounted(self._counter)

    def release(self) -> None:
        """Stop watching."""
        self._computed = None
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def macs(self, model: nn.Module, pruner: Pruner) -> Macs | None:
        """MACs of one sample under the pruner's masks; None without a count."""
        positions, other = (self._positions, self._other) if self._positions else self._restored
        if not positions:
            return None
        counter = MacCounter(model)
        counter.positions, counter.other = dict(positions), other
        with whole(pruner.params):
            masks = {param.name: param.mask for param in pruner.params if param.pruned}
        sizes = {name: math.prod(cut.shape) for name, cut in pruner.cuts.items()}
        with nice_to_have("the count of MACs"):
            return macs(model, counter, masks, sizes=sizes)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The count, as plain values."""
        positions, other = (self._positions, self._other) if self._positions else self._restored
        return {"positions": positions, "other": other}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a count, which stands where no batch is counted any more: training was over."""
        self._restored = dict(state["positions"]), float(state["other"])


@contextmanager
def _uncounted(counter: MacCounter) -> Iterator[None]:
    positions, other = dict(counter.positions), counter.other
    try:
        yield
    finally:
        counter.positions, counter.other = positions, other


class _Counter(MacCounter):
    """A counter that lets the forward pass go on where it cannot count; the first such failure is kept."""

    def __init__(self, model: nn.Module, watch: TorchFunctionMode | None = None) -> None:
        super().__init__(model, watch)
        self.failure: Exception | None = None

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            super()._count(module, args, kwargs, output)
        except Exception as error:
            self.failure = self.failure or error


def sample_count(batch: Any, loader: Any = None, index: int = 0) -> int | None:
    """How many samples a batch has; None where that is not certain.

    It is the batch size of a DataLoader; elsewhere the first dimension of all tensors, if they agree and if the batch
    cannot be a list of samples.

    Args:
        batch: of any kind.
        loader: that the batch came from.
        index: how many batches came before it in this epoch.

    >>> import torch
    >>> sample_count([torch.zeros(5, 3), torch.zeros(5)])
    5
    >>> sample_count([(torch.zeros(3, 9, 9), torch.zeros(3, 7, 7)), ({"labels": torch.zeros(3)},) * 2]) is None
    True
    """
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        if not isinstance(loader.dataset, IterableDataset):
            left = len(loader.sampler) - index * loader.batch_size  # type: ignore[arg-type]
            return min(loader.batch_size, left) if left > 0 else None
        inferred = _agreed(batch)
        return inferred if inferred is not None and inferred <= loader.batch_size else None
    return _agreed(batch)


def _agreed(batch: Any) -> int | None:
    """The first dimension that all tensors of a collated batch have, or None."""
    if isinstance(batch, (tuple, list)) and len(batch) > 3 and len({_dimensions(part) for part in batch}) == 1:
        return None  # a tensor per sample, or several inputs
    sizes = list(_first_dimensions(batch, collated=True))
    sure = [size for size, collated in sizes if collated]
    return sure[0] if sure and all(size == sure[0] for size, _ in sizes) else None


def _dimensions(value: Any) -> int | None:
    return value.dim() if isinstance(value, Tensor) else None


def _first_dimensions(value: Any, collated: bool, top: bool = True) -> Iterator[tuple[int, bool]]:
    """First dimensions of the tensors in a batch, and whether each is certainly one of samples.

    A list within the batch may have an element per sample; tensors without dimensions have none.
    """
    if isinstance(value, Tensor):
        if value.dim():
            yield value.shape[0], collated
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _first_dimensions(part, collated, top=False)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _first_dimensions(getattr(value, field.name), collated, top=False)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _first_dimensions(part, collated and top, top=False)
