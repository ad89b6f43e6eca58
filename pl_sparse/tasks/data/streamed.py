"""Images read from disk as they are needed, for data sets that memory does not hold."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pl_sparse.tasks.data.images import classes_of, images_of

__all__ = ["ImageNet"]


def random_crop(image: Any, size: int) -> Any:
    """A part of 8 to 100 % of an image, of a ratio between 3/4 and 4/3, scaled to `size`, and half the time mirrored.

    Source: Szegedy et al., Going deeper with convolutions, 2014, arXiv:1409.4842, section 6.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * (0.08 + 0.92 * _uniform())
        ratio = math.exp(math.log(3 / 4) + _uniform() * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(_uniform() * (width - w + 1)), int(_uniform() * (height - h + 1))
    crop = image.resize((size, size), _BILINEAR, box=(left, top, left + w, top + h))
    return crop.transpose(_MIRROR) if _uniform() < 0.5 else crop


def center_crop(image: Any, size: int) -> Any:
    """The middle 7/8 of an image's shorter side, scaled to `size`."""
    width, height = image.size
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), _BILINEAR, box=(left, top, left + side, top + side))


_BILINEAR, _MIRROR = 2, 0  # of PIL.Image: Resampling.BILINEAR, Transpose.FLIP_LEFT_RIGHT


def _uniform() -> float:
    return float(torch.rand(()))  # torch's, which a worker seeds


class _Files(Dataset[tuple[Tensor, int]]):
    def __init__(self, data: ImageNet, part: str, crop: Callable[[Any, int], Any], limit: int | None) -> None:
        files = images_of(data.root / part, data.labels)
        if limit is not None:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:limit]
            files = [files[i] for i in order.tolist()]
        self.files, self.crop, self.data = files, crop, data

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = np.asarray(self.crop(image.convert("RGB"), self.data.size), dtype=np.float32)
        x = torch.from_numpy(pixels.transpose(2, 0, 1) / 255)
        mean, std = self.data.scale
        return (x - mean) / std, label


class ImageNet(LightningDataModule):
    """ImageNet, or any images in folders: `root`/train/CLASS/* and `root`/val/CLASS/*, read as they are needed.

    Training images are cropped at random and mirrored, others cropped in the middle. Mean and deviation are those of
    ImageNet, or of the model where it has `preprocessing`. The test part is val, as in the published tables.

    Source: Russakovsky et al., ImageNet large scale visual recognition challenge, 2014, arXiv:1409.0575.

    Args:
        root: the folder.
        size: height and width in pixels.
        batch_size: images of a training batch, in each process.
        eval_batch_size: images of a validation batch.
        workers: processes that read images.
        limit: use only so many training images; None for all.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 224,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        workers: int = 8,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("size", size, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
            ("limit", 1 if limit is None else limit, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        self.root = Path(root).expanduser()
        self.labels = classes_of(self.root)
        if not (self.root / "val").is_dir():
            raise FileNotFoundError(f"data.root={self.root} has no folder `val`: images are {self.root}/val/CLASS/*")
        self.classes, self.shape, self.size = len(self.labels), (3, size, size), size
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.limit = workers, limit
        self.scale = _scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def adapt(self, preprocessing: Any) -> None:
        """Take mean and deviation of a model's preprocessing."""
        self.scale = _scale(preprocessing.mean, preprocessing.std)

    def _loader(self, part: str, train: bool) -> DataLoader[tuple[Tensor, int]]:
        crop = random_crop if train else center_crop
        return DataLoader(
            _Files(self, part, crop, self.limit if train else None),
            batch_size=self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader("val", False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader("val", False)


def _scale(mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)
