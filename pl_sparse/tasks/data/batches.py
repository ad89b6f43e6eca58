"""Data in memory, in batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

__all__ = ["Batches", "InMemory", "Split", "hold_out", "shuffled", "standardized"]

Split = tuple[Tensor, Tensor]


class Batches:
    """Batches (x, y) of tensors in memory, as an iterable that a Trainer takes for a loader.

    Args:
        x: inputs, (samples, *shape).
        y: labels, (samples,).
        batch_size: samples of a batch.
        shuffle: a new order each epoch, a function of `seed` and the epoch.
        seed: the seed of the order.
        drop_last: whether a last batch that is not full is left out.
        rank: the index of this process, whose share of the samples is used.
        world_size: the number of processes.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._start = 0  # the batch that the next epoch begins with, after a resume
        self._next = 0  # the batch that comes next
        if shuffle:  # where Lightning looks for `set_epoch`
            self.sampler, self.batch_sampler = self, None

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch."""
        self.epoch = epoch

    @property
    def _share(self) -> int:
        """Samples of this process; all have as many, so that none waits for another."""
        return -(-len(self.x) // self.world_size)

    def __len__(self) -> int:
        full, rest = divmod(self._share, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Split]:
        start, self._start = self._start, 0
        order = torch.arange(len(self.x))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self.x), generator=generator)
        if self.world_size > 1:
            order = order.repeat(2)[: self._share * self.world_size][self.rank :: self.world_size]
        for index in range(start, len(self)):
            self._next = index + 1
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self.x[batch], self.y[batch]

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._next % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["batch"]


class InMemory(LightningDataModule):
    """Data that fits into memory.

    Args:
        batch_size: samples of a training batch, in each process.
        eval_batch_size: samples of a validation or test batch.
        seed: the seed of the order of the training samples; the split into training and validation never changes.
        limit: use only so many training samples; None for all.
    """

    shape: tuple[int, ...]
    classes: int

    def __init__(
        self, batch_size: int = 64, eval_batch_size: int = 1000, seed: int = 0, limit: int | None = None
    ) -> None:
        super().__init__()
        for what, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("limit", 1 if limit is None else limit),
        ):
            if value < 1:
                raise ValueError(f"{what}={value} must be at least 1")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limit = limit
        self._splits: tuple[Split, Split, Split] | None = None

    @abstractmethod
    def load(self) -> tuple[Split, Split, Split]:
        """Inputs (samples, *shape) and labels (samples,) of the training, validation and test samples."""

    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            (x, y), val, test = self.load()
            self._splits = (x[: self.limit], y[: self.limit]), val, test

    def _batches(self, split: int) -> Batches:
        """This process's batches of the training (0), validation (1) or test (2) samples."""
        self.setup()
        assert self._splits is not None
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        x, y = self._splits[split]
        train = split == 0
        same = bool(getattr(trainer, "overfit_batches", 0))  # Lightning can stop no other shuffling than its own
        return Batches(
            x,
            y,
            self.batch_size if train else self.eval_batch_size,
            shuffle=train and not same,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )

    def train_dataloader(self) -> Batches:
        return self._batches(0)

    def val_dataloader(self) -> Batches:
        return self._batches(1)

    def test_dataloader(self) -> Batches:
        return self._batches(2)


def hold_out(x: Tensor, y: Tensor, count: int) -> tuple[Split, Split]:
    """Split `count` samples off, always the same ones.

    Args:
        x: inputs, (samples, *shape).
        y: labels, (samples,).
        count: how many.

    Returns:
        The others, and those that were split off, both in their order.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    if not 0 < count < len(x):
        raise ValueError(f"validation={count} must leave some of the {len(x)} training samples")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:count].sort().values, order[count:].sort().values
    return (x[rest], y[rest]), (x[held], y[held])


def shuffled(split: Split) -> Split:
    """Training samples in an order that is always the same, so that `limit` takes a sample of them.

    Args:
        split: inputs (samples, *shape) and labels (samples,).
    """
    x, y = split
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def standardized(splits: Sequence[Split], scale: tuple[Tensor, Tensor] | None = None) -> tuple[Split, Split, Split]:
    """Images (samples, channels, height, width) less a mean, over a deviation, of each channel.

    Args:
        splits: training, validation and test samples.
        scale: the mean and the deviation, (1, channels, 1, 1); None for those of the training samples.
    """
    x = splits[0][0]
    if scale is None:
        scale = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
    mean, std = scale
    train, val, test = (((x - mean) / std, y) for x, y in splits)
    return train, val, test
