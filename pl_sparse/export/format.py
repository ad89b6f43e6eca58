"""Exports: file formats, how a model is written in one, and how the file runs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_sparse.core.optional import missing
from pl_sparse.core.upstream import overridden
from pl_sparse.network.graph import traceable
from pl_sparse.structure import Structure

__all__ = ["Executable", "Export", "Traced", "compared", "forwarding", "require"]

Executable = Callable[[Tensor], Tensor]
"""A loaded model that can be called: from inputs (batch, *shape) to outputs."""


class Export(ABC):
    """A file format of a trained model.

    Attributes:
        file: the name of the file in the folder of a run.
        runtime: what runs it.
        dtype: the type of its weights; for "int8" the quantized model is written.
        advice: what makes it faster than a dense model.
        whole: whether the file holds the graph too, so that it runs without the model's class; channels and heads that
            are all zero are removed before it is written.
        weights_alone: whether the file is loaded into a model of the class, which knows nothing of masks.
    """

    file: ClassVar[str]
    advice: ClassVar[str] = (
        "a runtime that skips zeros, export=csr (CPU, from about 90 % on) or export=semi_structured (GPU, "
        "structure=nm24), or channels that are gone (structure=channel)"
    )
    runtime: ClassVar[str] = "torch"
    dtype: ClassVar[str] = "float32"
    whole: ClassVar[bool] = False
    weights_alone: ClassVar[bool] = False

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        """Why such a model cannot be written so, as far as is known before it is trained; None if it can.

        Args:
            net: the model, untrained.
            example: inputs of two samples, where their shape is known.
            structure: what is pruned together.
            sparsity: of the prunable weights, when trained.

        Returns:
            The reason, and what would help.
        """
        return None

    @abstractmethod
    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        """Write the model to `path`.

        Args:
            net: the model in eval mode; it is left as it is.
            example: inputs of some samples.
            path: the file; what was there is replaced.

        Returns:
            Notes: the layers that were left unchanged, with the reason.

        Raises:
            ValueError: the model has no such form.
            ImportError: a package is missing.
        """

    @abstractmethod
    def open(self, path: Path, net: nn.Module) -> Executable:
        """The written model, loaded.

        Args:
            path: what `write` wrote.
            net: a model of the same class, which is left as it is.
        """

    def size(self, path: Path) -> int:
        """Bytes of what `write` wrote."""
        return path.stat().st_size

    def unmeasurable(self) -> str | None:
        """Why the file cannot run on this machine, and where it can be measured; None if it can."""
        return None

    def conclude(self, path: Path, verdict: str) -> None:  # noqa: B027  # most have no page
        """Add what was measured to the page of the file, if it has one."""

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Executable:
        """A dense model in the same runtime, to measure against.

        Args:
            net: the dense model.
            example: inputs of some samples.
            folder: for files that it needs.
        """
        return net


class Traced(Export):
    """A format that is made of the graph that torch.export traces.

    Attributes:
        extra: of pl_sparse, that brings what it needs.
        packages: that it needs.
    """

    whole = True
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def largest(self) -> int | None:
        """The most samples of a call; None: any number."""
        return None

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        advice = missing(self.extra, *self.packages)
        if advice is not None or example is None:
            return advice
        return traceable(copy.deepcopy(net).eval(), example, self.largest)


def require(format: str, extra: str, *packages: str) -> None:
    """Raise an ImportError, with what to install, if a format lacks one of the packages that it needs."""
    advice = missing(extra, *packages)
    if advice is not None:
        raise ImportError(f"export={format}: {advice}")


@contextmanager
def forwarding(net: nn.Module, executable: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of `net` are calls of `executable`; its parameters and names are what they were."""
    with overridden(net, "forward", executable):
        yield


@torch.no_grad()
def compared(run: Executable, net: nn.Module, example: Tensor, tolerance: float, where: str) -> str:
    """A note that a file computes what the model does.

    Args:
        run: the file, opened.
        net: the model.
        example: inputs of some samples.
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
        where: which file it is, and what runs it.

    Raises:
        ValueError: it computes something else.
    """
    expected = net(example)
    error = float((expected - run(example)).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= tolerance:
        raise ValueError(
            f"the outputs of {where} differ from torch's by {error:.1e} of the largest, more than "
            f"tolerance={tolerance:g}"
        )
    return f"outputs of {where} differ from torch's by at most {error:.1e} of the largest"
