"""MNIST and Fashion-MNIST from their idx files."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pl_sparse.core.files import replacing
from pl_sparse.tasks.data.batches import InMemory, Split, hold_out

__all__ = ["MNIST", "FashionMNIST", "read_idx"]

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(data: bytes) -> Tensor:
    """The tensor in an idx file of unsigned bytes.

    Args:
        data: the contents of the file.

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
        validation: samples taken off the training set; 0: it is whole, and the test part validates too, so that the
            best epoch is the best on test, as in papers that report it.
        scale: "standard" for the mean and deviation of the training set, "unit" for pixels in [0, 1].

    Raises:
        FileNotFoundError: the files are nowhere and cannot be downloaded; the message says where they were looked for.
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
        self,
        *args: Any,
        root: str | os.PathLike[str] | None = None,
        validation: int = 5000,
        scale: Literal["standard", "unit"] = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if scale not in ("standard", "unit"):
            raise ValueError(f"scale={scale!r} must be 'standard' or 'unit'")
        self.scale = scale
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
        checksum = hashlib.md5(gzip.decompress(packed)).hexdigest()
        if checksum != md5:
            raise FileNotFoundError(f"{address} has checksum {checksum}, not {md5}: it is damaged, and was not kept")
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
            pixels = x.unsqueeze(1).float().div_(255)
            return (pixels if self.scale == "unit" else pixels.sub_(self.mean).div_(self.std)), y.long()

        test = split(test_x, test_y)
        if self.validation == 0:
            return split(train_x, train_y), test, test
        train, val = hold_out(train_x, train_y, self.validation)
        return split(*train), split(*val), test


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
