"""What every export is: a file format, how a model is written in it, and how the file runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from pl_sparse.structure import Structure

__all__ = ["Export", "Run", "forwarding", "missing"]

Run = Callable[[Tensor], Tensor]
"""A model that is ready to run: from inputs (batch, *shape) to outputs."""


class Export(ABC):
    """A format that a trained model is written in.

    Attributes:
        file: the name of the file in the folder of a run.
        runtime: what runs it.
        dtype: the type of its weights; "int8" is given the quantized model to write.
        advice: what makes it faster than a dense model.
        whole: whether the file holds the graph too, so that it runs without the model's class; channels and heads that
            are all zero are taken out before it is written.
    """

    file: ClassVar[str]
    advice: ClassVar[str] = (
        "a runtime that skips zeros, export=csr (CPU, from about 90 % on) or export=semi_structured (GPU, "
        "structure=nm24), or channels that are gone (structure=channel)"
    )
    runtime: ClassVar[str] = "torch"
    dtype: ClassVar[str] = "float32"
    whole: ClassVar[bool] = False

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        """Why such a model cannot be written so, as far as is known before it is trained; None if it can.

        Args:
            net: the model, untrained.
            example: inputs of two samples, where their shape is known.
            structure: what is pruned together.
            sparsity: of the prunable weights, when trained.
        """
        return None

    @abstractmethod
    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        """Write the model to `path`.

        Args:
            net: the model in eval mode; it is left as it is.
            example: inputs of some samples.

        Returns:
            What is worth telling: layers that it left as they were, and why.
        """

    @abstractmethod
    def open(self, path: Path, net: nn.Module) -> Run:
        """The written model, ready to run; `net` is one of the same class, and is left as it is."""

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Run:
        """A dense model in the same runtime, to measure against; `folder` is for files that it needs."""
        return net


def missing(extra: str, *packages: str) -> str | None:
    """What to install, if one of the packages is not there; None if all are."""
    if any(find_spec(package) is None for package in packages):
        return f"it needs {' and '.join(packages)}: pip install 'pl_sparse[{extra}]'"
    return None


@contextmanager
def forwarding(net: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of `net` are calls of `run`; its parameters and names are what they were."""
    earlier = vars(net).get("forward")
    vars(net)["forward"] = run
    try:
        yield
    finally:
        if earlier is None:
            del vars(net)["forward"]
        else:
            vars(net)["forward"] = earlier
