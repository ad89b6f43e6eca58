"""What a quantization is: how integers are simulated in training, and made afterwards."""

from __future__ import annotations

import contextlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.core.optional import library

__all__ = ["Quantization", "quiet_torchao", "same_random_numbers", "torchao_refusal"]


class Quantization(ABC):
    """How integers are simulated in training, and made afterwards.

    Attributes:
        dtype: the type of the resulting weights.
        learning: whether ranges of activations are learned from calls; None: while the network is in training mode.
    """

    dtype: ClassVar[str]
    learning: bool | None = None

    @abstractmethod
    def prepare(self, net: nn.Module, example: Tensor) -> None:
        """Let calls of `net` compute with weights (and activations) rounded to integers from now on.

        Gradients pass the rounding as if it were not there. The parameters of `net` are the same objects as before.

        Args:
            net: the network that is trained.
            example: inputs of some samples, for tracing, (samples, *shape).

        Raises:
            ValueError: the network cannot be quantized so.
            ImportError: torchao is missing.
        """

    @abstractmethod
    def release(self) -> None:
        """Let calls of the network compute in floating point again."""

    @abstractmethod
    def convert(self) -> nn.Module:
        """A copy of the network whose weights are integers.

        Raises:
            ValueError: nothing was prepared.
        """

    # What follows has a meaning where ranges of activations are learned.

    def freeze(self) -> None:  # noqa: B027
        """Fix ranges and BatchNorm's statistics from now on."""

    def state_dict(self) -> dict[str, Tensor]:
        """The ranges that were learned, as tensors by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state_dict` returned, after `prepare`.

        Raises:
            ValueError: it is of another model.
        """


@contextlib.contextmanager
def quiet_torchao() -> Iterator[None]:
    """Without what torchao and torch say of themselves.

    Raises:
        ImportError: torchao is missing, or made for another torch; the message names the extra.
    """
    names = ("torchao", "torch.utils._pytree")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library("torchao", "quantization", "quantize")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)


def torchao_refusal() -> str | None:
    """Why there are no integers here: torchao is missing, or made for another torch. None: there are."""
    try:
        with quiet_torchao():
            return None
    except ImportError as error:
        return str(error)


@contextlib.contextmanager
def same_random_numbers(net: nn.Module) -> Iterator[None]:
    """Afterwards the random generators are as they were: torchao initializes the layers that it makes.

    Args:
        net: on whose devices random numbers are drawn.
    """
    devices = sorted({weight.device.index for weight in net.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
