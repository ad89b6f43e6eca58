"""Masks that were found before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.scorer.base import Scorer
from pl_sparse.structure import Structure

__all__ = ["Ticket"]


@register
@dataclass(frozen=True)
class Ticket(Scorer):
    """1 where a mask on disk keeps a weight, 0 where it removes it: to train with a mask that was found before.

    With `ablation` it is the control of a lottery ticket: the same mask shuffled, or on other weights.

    Args:
        path: a file of masks, `ticket.safetensors` of a `Rewind` callback.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no mask for a weight, or one of another shape.
    """

    path: str

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"scorer=ticket: there is no file {self.path}")

    def start(self, groups: Sequence[Group], structure: Structure) -> None:
        """Check that the file has a mask for each weight."""
        for group in groups:
            for param, _ in group.members:
                self.score(param)

    def score(self, param: MaskedParameter) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            names = list(file.keys())
            if f"mask:{param.name}" not in names:
                raise ValueError(f"{self.path} has no mask of {param.name}: it belongs to another model")
            mask: Tensor = file.get_tensor(f"mask:{param.name}")
        if mask.shape != param.shape:
            raise ValueError(
                f"{self.path}: the mask of {param.name} has shape {tuple(mask.shape)}, the weight {tuple(param.shape)}"
            )
        return mask.to(param.weight.device).float()
