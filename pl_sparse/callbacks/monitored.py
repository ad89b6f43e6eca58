"""A monitored metric has to be logged: said when it is first looked for, with the names that there are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pl_sparse.core.registry import near_misses

__all__ = ["MissingMetricError", "nearest", "require"]


class MissingMetricError(ValueError):
    """A metric is monitored that the module does not log."""


def require(metric: str, logged: Iterable[str], who: str) -> None:
    """Check that a metric is logged.

    Args:
        metric: what is monitored.
        logged: the names of the metrics that there are.
        who: monitors it.

    Raises:
        MissingMetricError: it is not.
    """
    names = list(logged)
    if metric in names:
        return
    likely = nearest(metric, names)
    meant = f"did you mean {likely!r}? " if likely else ""
    raise MissingMetricError(
        f"{who} monitors {metric!r}, which the module does not log: {meant}"
        + (f"There are {', '.join(sorted(names))}" if names else "It logs nothing")
    )


def nearest(metric: str, names: Iterable[str]) -> str | None:
    """The name that is the metric in another spelling: `val_acc` or `valid/accuracy` for `val/acc`.

    >>> nearest("val/acc", ["train_acc", "val_loss", "valid_accuracy"])
    'valid_accuracy'
    """
    candidates = sorted(names)
    alike = [name for name in candidates if _alike(_words(metric), _words(name))] or near_misses(metric, candidates)
    return alike[0] if alike else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _alike(wanted: list[str], other: list[str]) -> bool:
    """Whether the words are those wanted, or begin alike."""
    if len(wanted) != len(other):
        return "".join(wanted) == "".join(other)
    return all(a.startswith(b) or b.startswith(a) for a, b in zip(wanted, other, strict=True))
