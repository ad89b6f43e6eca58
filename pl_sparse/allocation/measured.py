"""A sparsity for each tensor by the measured loss of accuracy."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from pl_sparse.allocation.base import Allocation
from pl_sparse.allocation.count import apportion
from pl_sparse.allocation.units import Units
from pl_sparse.core.group import Group
from pl_sparse.core.registry import Axes, register, suggestion

__all__ = ["Sensitivity", "losses"]

Curve = Sequence[tuple[float, float]]


@register
@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Each tensor as sparse as it can be for the same loss of accuracy, by a table of `pl-sparse sensitivity`.

    With drop_l(s) the loss when tensor l alone has the sparsity s, made to rise and interpolated between the measured
    levels, tensor l has the largest s with drop_l(s) <= d, d such that the total is met. Beyond the largest measured
    loss of a tensor its density goes to zero with 1 / d.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626,
    section 4.2, where thresholds of layers are found by their sensitivity.

    Args:
        path: sensitivity.csv of a run of the same model.
    """

    path: str | None = None
    _curves: dict[str, Curve] = field(default_factory=dict, init=False, repr=False, compare=False)

    def refusal(self, axes: Axes) -> str | None:
        if self.path is None:
            return (
                "allocation=sensitivity needs allocation.path=RUN/sensitivity.csv, which pl-sparse sensitivity RUN "
                "writes"
            )
        return None

    def start(self, groups: Sequence[Group], model: nn.Module, example: Any) -> None:
        self._curves.clear()
        self._curves.update(losses(str(self.path)))
        if missing := [group.name for group in groups if group.name not in self._curves]:
            raise ValueError(
                f"{self.path} has no row for {missing[0]}: it belongs to another model or structure. "
                f"{suggestion(missing[0], self._curves)}"
            )

    def keep(self, groups: Sequence[Group], units: Units, sparsity: float) -> list[int]:
        sizes = [group.numel for group in groups]
        curves = [self._curves[group.name] for group in groups]
        wanted = (1 - sparsity) * sum(sizes)
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            total = sum(_density(curve, middle) * size for curve, size in zip(curves, sizes, strict=True))
            low, high = (middle, high) if total > wanted else (low, middle)
        return apportion(units, [_density(curve, high) for curve in curves], sparsity)


def _density(curve: Curve, drop: float) -> float:
    """The least density that loses no more than `drop`.

    >>> curve = [(0.0, 0.0), (0.5, 0.1), (0.9, 0.1), (0.95, 0.3)]
    >>> [round(_density(curve, d), 4) for d in (0.0, 0.05, 0.1, 0.2, 0.3, 0.6)]
    [1.0, 0.75, 0.1, 0.075, 0.05, 0.025]
    """
    last, largest = curve[-1][0], max(curve[-1][1], 1e-9)
    if drop >= largest:
        return (1 - last) * largest / drop
    sparsity = 0.0
    for (s, d), (t, e) in pairwise(curve):
        if e <= drop:
            sparsity = t
        else:
            sparsity = max(sparsity, s + (t - s) * max(drop - d, 0) / (e - d))
            break
    return 1 - sparsity


def losses(path: str) -> dict[str, Curve]:
    """By layer, its sparsities and the losses there, which rise.

    Args:
        path: a table of `pl-sparse sensitivity`.

    Raises:
        ValueError: it is none.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: pl-sparse sensitivity RUN writes RUN/sensitivity.csv")
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["layer"], []).append((float(row["sparsity"]), float(row["drop"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of pl-sparse sensitivity: it lacks the columns layer, sparsity and drop"
        ) from error
    rising: dict[str, Curve] = {}
    for name, points in curves.items():
        largest, made = 0.0, [(0.0, 0.0)]
        for sparsity, drop in sorted(points):
            largest = max(largest, drop)
            if sparsity > 0:
                made.append((sparsity, largest))
        rising[name] = made
    return rising
