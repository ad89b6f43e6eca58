"""Data sets of torchvision and of Hugging Face, in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pl_sparse.core.optional import beginning, library
from pl_sparse.core.registry import near_misses, suggestion
from pl_sparse.tasks.data.batches import InMemory, Split, hold_out, standardized
from pl_sparse.tasks.hugging_face import pretrained_from, transformers_library

__all__ = ["HuggingFace", "Torchvision"]


class _Images(InMemory):
    """Images of one size, scaled to the mean and deviation of the training set, or as the model's were in its training.

    `adapt` is called with the preprocessing of a model that has one.
    """

    def __init__(self, *args: Any, size: int | None = None, channels: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 3 (colour) or 1 (grey)")
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be 1 or more pixels")
        self.channels = channels
        self.shape = None if size is None else (channels, size, size)  # type: ignore[assignment]
        self._scale: tuple[Tensor, Tensor] | None = None

    def adapt(self, preprocessing: Any) -> None:
        """Take the size, where none was asked for, and mean and deviation of a model's preprocessing.

        Args:
            preprocessing: with `shape`, `mean` and `std`.
        """
        if self.shape is None:
            self.shape = tuple(preprocessing.shape)
        if len(preprocessing.mean) == self.channels:
            mean, std = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (preprocessing.mean, preprocessing.std))
            self._scale = mean, std

    def _tensor(self, images: Iterable[Any]) -> Tensor:
        """PIL images as (samples, channels, height, width) in [0, 1]."""
        assert self.shape is not None
        mode, size = "RGB" if self.channels == 3 else "L", (self.shape[2], self.shape[1])
        arrays = [np.asarray(_image(image).convert(mode).resize(size)) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).float() / 255
        return pixels.permute(0, 3, 1, 2).contiguous() if self.channels == 3 else pixels[:, None]


class Torchvision(_Images):
    """A data set of images of torchvision: its training part, of which some is held out, and its test part.

    Args:
        name: a class of torchvision.datasets that takes `train` or `split`, such as "CIFAR10" and "SVHN".
        root: the folder of the data.
        download: whether it may be downloaded into `root`.
        size: height and width in pixels; None for those of the model.
        channels: 3 for colour, 1 for grey.
        validation: the number of training samples that are held out.

    Raises:
        ImportError: the extra `torchvision` is missing.
        FileNotFoundError: the data are not in `root`.
        ValueError: there is no such data set, or it has no training and test part with classes.
    """

    def __init__(
        self,
        *args: Any,
        name: str,
        root: str | os.PathLike[str],
        download: bool = False,
        validation: int = 5000,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        kinds = library("torchvision.datasets", "data=torchvision", "torchvision")
        if not hasattr(kinds, name):
            known = [key for key in vars(kinds) if key[:1].isupper()]
            close = near_misses(name, known) or known
            raise ValueError(f"name={name} is not a data set of torchvision. {suggestion(name, close)}")
        self._parts = [_part(getattr(kinds, name), name, root, train, download) for train in (True, False)]
        self.validation = validation
        first = self._parts[0]
        names = getattr(first, "classes", None)
        if names is None:
            self.classes = max(_integers([first[index][1] for index in range(len(first))], first)) + 1
        else:
            self.classes = len(names)

    def load(self) -> tuple[Split, Split, Split]:
        (train_x, train_y), test = (self._read(part) for part in self._parts)
        train, val = hold_out(train_x, train_y, self.validation)
        return standardized((train, val, test), self._scale)

    def _read(self, part: Any) -> Split:
        labels: list[Any] = []

        def images() -> Iterator[Any]:
            for index in range(len(part)):
                image, label = part[index]
                labels.append(label)
                yield image

        x = self._tensor(images())
        return x, torch.tensor(_integers(labels, part))


def _integers(labels: list[Any], part: Any) -> list[int]:
    """The labels of a data set, which have to be classes."""
    if not all(isinstance(label, (int, np.integer)) for label in labels):
        raise ValueError(f"name={type(part).__name__} has targets that are not classes, such as {labels[0]!r:.60}")
    return [int(label) for label in labels]


def _part(kind: Any, name: str, root: str | os.PathLike[str], train: bool, download: bool) -> Any:
    """The training or test part of a data set of torchvision."""
    taken = signature(kind).parameters
    options: dict[str, Any] = {"download": download} if "download" in taken else {}
    if "train" in taken:
        options["train"] = train
    elif "split" in taken:
        options["split"] = "train" if train else "test"
    else:
        raise ValueError(f"name={name} takes neither `train` nor `split`, so that its parts are not known")
    try:
        return kind(str(Path(root).expanduser()), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"name={name} has no training and test part: {beginning(error)}") from error
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"root={root} does not hold {name} ({beginning(error)}): download=true fetches it"
        ) from error


class HuggingFace(_Images):
    """A data set of Hugging Face with images or texts, and labels.

    A missing validation part is split off the training part; a missing test part is the validation part.

    Args:
        name: a folder that `save_to_disk` wrote, one with train.csv, .json or .parquet (and validation, test), or a
            name on the hub (in the cache alone with HF_HUB_OFFLINE=1).
        subset: the configuration of a data set on the hub that has several.
        inputs: the column of images or texts; None for the first of such a kind.
        labels: the column of classes.
        tokenizer: for texts: the folder or name of the model whose tokenizer it is.
        max_length: tokens of a text.
        size: height and width of images in pixels; None for those of the model.
        channels: 3 for colour, 1 for grey.
        validation: the part of the training samples held out where there is no validation part.

    Raises:
        ImportError: the extra `datasets` is missing.
        FileNotFoundError: there is no such data set.
        ValueError: a column is missing.
    """

    def __init__(
        self,
        *args: Any,
        name: str,
        subset: str | None = None,
        inputs: str | None = None,
        labels: str = "label",
        tokenizer: str | None = None,
        max_length: int = 128,
        validation: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        parts = _read_parts(library("datasets", "data=huggingface", "datasets"), name, subset)
        names = {part.partition("[")[0]: part for part in parts}
        self._parts = {
            part: parts[names[key]] for part, keys in _PARTS.items() for key in reversed(keys) if key in names
        }
        if "train" not in self._parts:
            raise ValueError(f"name={name} has no part called train: it has {', '.join(parts)}")
        first = self._parts["train"][0]
        if labels not in first:
            raise ValueError(f"labels={labels}: {name} has no such column. It has {', '.join(first)}")
        kinds = [key for key, value in first.items() if key != labels and (isinstance(value, str) or _is_image(value))]
        self._inputs = inputs or (kinds[0] if kinds else "")
        if self._inputs not in first:
            raise ValueError(
                f"inputs={inputs}: {name} has no such column of images or texts. It has {', '.join(first)}"
            )
        self._labels = labels
        self.validation = validation
        self._classes = sorted(set(self._parts["train"][labels]))
        self.classes = len(self._classes)
        self._tokenizer: Any = None
        if not _is_image(first[self._inputs]):
            if tokenizer is None:
                raise ValueError(f"tokenizer: {self._inputs} of {name} is text, so give tokenizer=FOLDER or a name")
            self._tokenizer = pretrained_from(transformers_library().AutoTokenizer, tokenizer)
            self.max_length = max_length
            self.shape = (max_length,)

    def load(self) -> tuple[Split, Split, Split]:
        train = self._read(self._parts["train"])
        if "validation" in self._parts:
            val = self._read(self._parts["validation"])
        else:
            train, val = hold_out(*train, max(round(self.validation * len(train[0])), 1))
        test = self._read(self._parts["test"]) if "test" in self._parts else val
        return (train, val, test) if self._tokenizer is not None else standardized((train, val, test), self._scale)

    def _read(self, part: Any) -> Split:
        numbers = {value: number for number, value in enumerate(self._classes)}
        unknown = sorted({str(value) for value in part[self._labels] if value not in numbers})
        if unknown:
            raise ValueError(f"a part has classes that train lacks: {', '.join(unknown)}")
        y = torch.tensor([numbers[value] for value in part[self._labels]])
        if self._tokenizer is None:
            return self._tensor(part[self._inputs]), y
        options = {"truncation": True, "padding": "max_length", "max_length": self.max_length, "return_tensors": "pt"}
        tokens: Tensor = self._tokenizer(list(part[self._inputs]), **options)["input_ids"]
        return tokens, y


_PARTS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def _read_parts(library: Any, name: str, subset: str | None) -> dict[str, Any]:
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            return dict(library.load_from_disk(str(path)))
        if path.is_dir():
            for kind in ("parquet", "csv", "json"):
                found = {part: str(file) for keys in _PARTS.values() for part in keys
                         if (file := path / f"{part}.{kind}").is_file()}  # fmt: skip
                if "train" in found:
                    return dict(library.load_dataset(kind, data_files=found))
            raise FileNotFoundError("it is a folder without dataset_dict.json and without train.csv, .json or .parquet")
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError("there is no such folder")
        return dict(library.load_dataset(name, subset))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"name={name}: no data set can be read there, nor from the hub ({beginning(error)})"
        ) from error


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _image(value: Any) -> Any:
    """A PIL image; Hugging Face keeps those that it does not decode as bytes."""
    from PIL import Image

    return Image.open(BytesIO(value["bytes"])) if isinstance(value, dict) else value
