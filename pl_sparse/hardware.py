"""What a device can make of zeros: which structures it accelerates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pl_sparse.structure import NM, Channel, Head, Structure


@dataclass(frozen=True)
class Hardware(ABC):
    """A device that the trained model is to run on."""

    @abstractmethod
    def refusal(self, structure: Structure) -> str | None:
        """Why the device cannot use zeros of this structure, and what it could use; None if it can."""


@dataclass(frozen=True)
class Generic(Hardware):
    """No device in particular: every structure is allowed, no speed is promised."""

    def refusal(self, structure: Structure) -> str | None:
        return None


@dataclass(frozen=True)
class Ampere(Hardware):
    """NVIDIA GPUs with sparse tensor cores (compute capability 8.0 and up).

    They accelerate 2:4, and the smaller dense layers that are left when channels or heads are removed.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378.
    """

    def refusal(self, structure: Structure) -> str | None:
        if isinstance(structure, (Channel, Head)) or (
            isinstance(structure, NM) and (structure.n, structure.m) == (2, 4)
        ):
            return None
        return (
            f"hardware=ampere cannot use zeros of structure={structure.label}: its sparse tensor cores know 2:4 alone. "
            "What it accelerates: structure=nm24, channel, head"
        )
