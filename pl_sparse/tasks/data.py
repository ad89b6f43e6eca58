"""Real data in memory, batched without worker processes.

Every data module has `shape`, the shape of one input, and `classes`. The order of the training batches is a function of
the seed and the epoch alone, and a checkpoint in the middle of an epoch resumes there.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import random
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from pl_sparse.files import replacing

__all__ = ["MNIST", "MNIST1D", "Batches", "Digits", "FashionMNIST", "ImageFolder", "InMemory"]

Split = tuple[Tensor, Tensor]


class Batches:
    """Batches (x, y) of tensors in memory, as an iterable that a Trainer takes for a loader.

    Args:
        x: inputs, (samples, *shape).
        y: labels, (samples,).
        batch_size: samples of a batch.
        shuffle: a new order each epoch, a function of `seed` and the epoch.
        drop_last: leave out a last batch that is not full.
        rank: this process's share of the samples, one of ...
        world_size: ... so many.
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
        self._start = 0
        self._at = 0
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
            self._at = index + 1
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self.x[batch], self.y[batch]

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._at % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["batch"]


class InMemory(LightningDataModule):
    """Data that fits into memory.

    Args:
        batch_size: samples of a training batch, in each process.
        eval_batch_size: samples of a validation or test batch.
        seed: of the order of the training samples; the split into training and validation never changes.
        limit: use only so many training samples; None for all.
    """

    shape: tuple[int, ...]
    classes: int

    def __init__(
        self, batch_size: int = 64, eval_batch_size: int = 1000, seed: int = 0, limit: int | None = None
    ) -> None:
        super().__init__()
        for what, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size), ("limit", limit or 1)):
            if value < 1:
                raise ValueError(f"{what}={value} must be at least 1")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limit = limit
        self._splits: tuple[Split, Split, Split] | None = None

    @abstractmethod
    def load(self) -> tuple[Split, Split, Split]:
        """Inputs and labels of the training, validation and test samples."""

    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            (x, y), val, test = self.load()
            self._splits = (x[: self.limit], y[: self.limit]), val, test

    def _batches(self, split: int) -> Batches:
        self.setup()
        assert self._splits is not None
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        x, y = self._splits[split]
        train = split == 0
        return Batches(
            x,
            y,
            self.batch_size if train else self.eval_batch_size,
            shuffle=train,
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
    """Split `count` samples off, always the same ones."""
    if not 0 < count < len(x):
        raise ValueError(f"validation={count} must leave some of the {len(x)} training samples")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:count].sort().values, order[count:].sort().values
    return (x[rest], y[rest]), (x[held], y[held])


class Digits(InMemory):
    """Handwritten digits of 8 x 8 pixels that come with scikit-learn: 1,257 to train, 180 to validate, 360 to test.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI machine learning repository, 1998.
    """

    shape = (1, 8, 8)
    classes = 10

    def load(self) -> tuple[Split, Split, Split]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        rest_x, test_x, rest_y, test_y = train_test_split(
            pixels, labels, test_size=360, random_state=0, stratify=labels
        )
        train_x, val_x, train_y, val_y = train_test_split(
            rest_x, rest_y, test_size=180, random_state=0, stratify=rest_y
        )

        def split(x: Any, y: Any) -> Split:
            images = torch.from_numpy(x).float().reshape(-1, *self.shape) / 16
            return (images - 0.305) / 0.376, torch.from_numpy(y).long()

        return split(train_x, train_y), split(val_x, val_y), split(test_x, test_y)


class MNIST1D(InMemory):
    """MNIST-1D: digits as sequences of 40 numbers, generated: 3,600 to train, 400 to validate, 1,000 to test.

    Source: Greydanus and Kobak, Scaling down deep learning with MNIST-1D, 2020, arXiv:2011.14439.

    Args:
        validation: samples taken off the training set.

    Raises:
        ImportError: the package `mnist1d` is missing.
    """

    shape = (40,)
    classes = 10

    def __init__(self, *args: Any, validation: int = 400, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.validation = validation

    def load(self) -> tuple[Split, Split, Split]:
        try:
            from mnist1d.data import get_dataset_args, make_dataset
        except ImportError as error:
            raise ImportError("data=mnist1d needs its generator: pip install 'pl_sparse[mnist1d]'") from error
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            with contextlib.redirect_stdout(None):
                made = make_dataset(get_dataset_args())
        finally:  # it seeds the global generators
            np.random.set_state(numpy_state)
            random.setstate(python_state)

        def split(part: str) -> Split:
            x = torch.from_numpy(np.asarray(made["x" + part])).float()
            return x, torch.from_numpy(np.asarray(made["y" + part])).long()

        train, val = hold_out(*split(""), self.validation)
        return train, val, split("_test")


_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(data: bytes) -> Tensor:
    """The tensor in an idx file of unsigned bytes.

    Raises:
        ValueError: it is no such file, or not whole.

    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
    [7, 8, 9]
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    dims = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    start = 4 + 4 * dims
    if len(data) != start + int(np.prod(shape)):
        raise ValueError(f"an idx file of shape {shape} has {start + int(np.prod(shape))} bytes, this one {len(data)}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def _cache() -> Path:
    return Path(os.environ.get("PL_SPARSE_DATA") or Path.home() / ".cache" / "pl_sparse")


class _Idx(InMemory):
    """The four idx files of MNIST and its drop-in replacements.

    They are looked for in `root`, in `root`/raw, in /usr/share/datasets and in the cache folder ($PL_SPARSE_DATA, else
    ~/.cache/pl_sparse), packed or not; else they are downloaded into the cache, and kept if their checksum is right.

    Args:
        root: a folder with the files; with it nothing is downloaded.
        validation: samples taken off the training set.

    Raises:
        FileNotFoundError: the files are nowhere and cannot be downloaded; the message tells where they were looked for.
    """

    shape = (1, 28, 28)
    classes = 10
    name: str
    url: str
    md5: tuple[str, str, str, str]
    """Of the unpacked files."""
    mean: float
    std: float

    def __init__(
        self, *args: Any, root: str | os.PathLike[str] | None = None, validation: int = 5000, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.root = None if root is None else Path(root).expanduser()
        self.validation = validation

    @property
    def _folders(self) -> list[Path]:
        if self.root is not None:
            return [self.root, self.root / "raw"]
        return [Path("/usr/share/datasets") / self.name, _cache() / self.name]

    def _find(self, file: str) -> Path | None:
        paths = (folder / f"{file}{suffix}" for folder in self._folders for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def prepare_data(self) -> None:
        for file, md5 in zip(_FILES, self.md5, strict=True):
            if self._find(file) is None:
                self._download(file, md5)

    def _download(self, file: str, md5: str) -> None:
        looked = ", ".join(map(str, self._folders))
        if self.root is not None:
            raise FileNotFoundError(
                f"data.root={self.root} has no {file} or {file}.gz (looked in {looked}). Leave data.root out to "
                "download it"
            )
        address = f"{self.url}{file}.gz"
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                packed: bytes = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise FileNotFoundError(
                f"{file} is in none of {looked}, and {address} cannot be reached ({error}). Give the folder that has "
                "it: data.root=/path/to/folder"
            ) from error
        found = hashlib.md5(gzip.decompress(packed)).hexdigest()
        if found != md5:
            raise FileNotFoundError(f"{address} has checksum {found}, not {md5}: it is damaged, and was not kept")
        with replacing(_cache() / self.name / f"{file}.gz") as temporary:
            temporary.write_bytes(packed)

    def load(self) -> tuple[Split, Split, Split]:
        self.prepare_data()
        tensors = []
        for file in _FILES:
            path = self._find(file)
            assert path is not None
            data = path.read_bytes()
            try:
                tensors.append(read_idx(gzip.decompress(data) if path.suffix == ".gz" else data))
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        train_x, train_y, test_x, test_y = tensors

        def split(x: Tensor, y: Tensor) -> Split:
            return x.unsqueeze(1).float().div_(255).sub_(self.mean).div_(self.std), y.long()

        train, val = hold_out(train_x, train_y, self.validation)
        return split(*train), split(*val), split(test_x, test_y)


class MNIST(_Idx):
    """MNIST: 55,000 images of 28 x 28 pixels to train, 5,000 to validate, 10,000 to test.

    Source: LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998.
    """

    name = "mnist"
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    md5 = (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    )
    mean, std = 0.1307, 0.3081


class FashionMNIST(_Idx):
    """Fashion-MNIST: 55,000 images of 28 x 28 pixels to train, 5,000 to validate, 10,000 to test.

    Source: Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747.
    """

    name = "fashion-mnist"
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    md5 = (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    )
    mean, std = 0.2860, 0.3530


_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class ImageFolder(InMemory):
    """Images in folders: `root`/train/CLASS/*.png, and the same under val and test.

    A missing val is split off train; a missing test is val. Images are scaled to `size`, to [0, 1], then to mean 0 and
    deviation 1 over the training set.

    Args:
        root: the folder.
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey.
        validation: the part of train held out when there is no val.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """

    def __init__(
        self,
        *args: Any,
        root: str | os.PathLike[str],
        size: int = 32,
        channels: int = 3,
        validation: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 3 (colour) or 1 (grey)")
        self.root = Path(root).expanduser()
        self.size = size
        self.channels = channels
        self.validation = validation
        self.shape = (channels, size, size)
        train = self.root / "train"
        if not train.is_dir():
            raise FileNotFoundError(f"data.root={self.root} has no folder `train`: images are {train}/CLASS/*.png")
        self.labels = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
        if not self.labels:
            raise FileNotFoundError(f"{train} has no folder: each class is one, {train}/CLASS/*.png")
        self.classes = len(self.labels)

    def load(self) -> tuple[Split, Split, Split]:
        train_x, train_y = self._read("train")
        if (self.root / "val").is_dir():
            val_x, val_y = self._read("val")
        else:
            count = max(round(self.validation * len(train_x)), 1)
            (train_x, train_y), (val_x, val_y) = hold_out(train_x, train_y, count)
        test_x, test_y = self._read("test") if (self.root / "test").is_dir() else (val_x, val_y)
        mean = train_x.mean(dim=(0, 2, 3), keepdim=True)
        std = train_x.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
        return ((train_x - mean) / std, train_y), ((val_x - mean) / std, val_y), ((test_x - mean) / std, test_y)

    def _read(self, part: str) -> Split:
        from PIL import Image

        images, labels = [], []
        extra = sorted(f.name for f in (self.root / part).iterdir() if f.is_dir() and f.name not in self.labels)
        if extra:
            raise ValueError(f"{self.root / part} has classes that train lacks: {', '.join(extra)}")
        for label, name in enumerate(self.labels):
            folder = self.root / part / name
            for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
                if path.suffix.lower() not in _IMAGES:
                    continue
                with Image.open(path) as image:
                    grey = image.convert("L" if self.channels == 1 else "RGB").resize((self.size, self.size))
                    pixels = np.asarray(grey, dtype=np.float32).reshape(self.size, self.size, self.channels)
                images.append(torch.from_numpy(pixels.transpose(2, 0, 1) / 255))
                labels.append(label)
        if not images:
            raise FileNotFoundError(f"{self.root / part} holds no image: they are {self.root / part}/CLASS/*.png")
        return torch.stack(images), torch.tensor(labels)
