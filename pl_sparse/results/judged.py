"""The metric by which models are compared, of whatever a module logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pl_sparse.results.direction import direction

__all__ = ["is_loss", "judged"]


def is_loss(name: str) -> bool:
    """Whether less of a metric is better, by its name.

    >>> [is_loss(name) for name in ("val/loss", "val_ppl", "valid_f1")]
    [True, True, False]
    """
    return direction(name) == "min" or "loss" in name.lower()


def judged(names: Iterable[str], mode: Literal["max", "min"] | None = None) -> str | None:
    """The metric of validation that models are judged by: an accuracy, else one that is not a loss, else a loss.

    Args:
        names: of all that is logged.
        mode: "max" leaves losses out, "min" takes a loss first.

    >>> judged(["train_acc", "val_loss", "val_f1"]), judged(["val_loss", "train_acc"]), judged(["val_loss"], "max")
    ('val_f1', 'val_loss', None)
    """
    of_validation = [name for name in names if name.lower().startswith("val") and not name.endswith("_step")]
    losses = [name for name in of_validation if is_loss(name)]
    others = [name for name in of_validation if name not in losses]
    others.sort(key=lambda name: "acc" not in name.lower())
    order = {"max": others, "min": losses + others, None: others + losses}[mode]
    return next(iter(order), None)
