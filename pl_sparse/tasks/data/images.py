"""Images in folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pl_sparse.tasks.data.batches import InMemory, Split, hold_out, standardized

__all__ = ["ImageFolder"]

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
        self.labels = classes_of(self.root)
        self.classes = len(self.labels)

    def load(self) -> tuple[Split, Split, Split]:
        train_x, train_y = self._read("train")
        if (self.root / "val").is_dir():
            val_x, val_y = self._read("val")
        else:
            count = max(round(self.validation * len(train_x)), 1)
            (train_x, train_y), (val_x, val_y) = hold_out(train_x, train_y, count)
        test_x, test_y = self._read("test") if (self.root / "test").is_dir() else (val_x, val_y)
        return standardized(((train_x, train_y), (val_x, val_y), (test_x, test_y)))

    def _read(self, part: str) -> Split:
        """Images (samples, channels, size, size) in [0, 1] and labels of a part: train, val or test."""
        from PIL import Image

        images, labels = [], []
        for path, label in images_of(self.root / part, self.labels):
            with Image.open(path) as image:
                scaled = image.convert("L" if self.channels == 1 else "RGB").resize((self.size, self.size))
                pixels = np.asarray(scaled, dtype=np.float32).reshape(self.size, self.size, self.channels)
            images.append(torch.from_numpy(pixels.transpose(2, 0, 1) / 255))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)


def classes_of(root: Path) -> list[str]:
    """The classes of a folder of images: the names of the folders in `root`/train.

    Raises:
        FileNotFoundError: there is none.
    """
    train = root / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"data.root={root} has no folder `train`: images are {train}/CLASS/*.png")
    labels = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    if not labels:
        raise FileNotFoundError(f"{train} has no folder: each class is one, {train}/CLASS/*.png")
    return labels


def images_of(folder: Path, labels: list[str]) -> list[tuple[Path, int]]:
    """The images of a part, `folder`/CLASS/*, with the numbers of their classes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are other classes than `labels`.
    """
    extra = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name not in labels)
    if extra:
        raise ValueError(f"{folder} has classes that train lacks: {', '.join(extra)}")
    found = [
        (path, label)
        for label, name in enumerate(labels)
        for path in (sorted((folder / name).rglob("*")) if (folder / name).is_dir() else [])
        if path.suffix.lower() in _IMAGES
    ]
    if not found:
        raise FileNotFoundError(f"{folder} holds no image: they are {folder}/CLASS/*.png")
    return found
