"""Data that comes with packages: digits, MNIST-1D."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch

from pl_sparse.tasks.data.batches import InMemory, Split, hold_out

__all__ = ["MNIST1D", "Digits"]


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
        validation: the number of training samples that are held out.

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
            raise ImportError("data=mnist1d needs the library mnist1d: pip install 'pl_sparse[mnist1d]'") from error
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            with contextlib.redirect_stdout(None):
                dataset = make_dataset(get_dataset_args())
        finally:  # it seeds the global generators
            np.random.set_state(numpy_state)
            random.setstate(python_state)

        def split(part: str) -> Split:
            x = torch.from_numpy(np.asarray(dataset["x" + part])).float()
            return x, torch.from_numpy(np.asarray(dataset["y" + part])).long()

        train, val = hold_out(*split(""), self.validation)
        return train, val, split("_test")
