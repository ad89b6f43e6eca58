"""A monitored metric has to be logged: said as soon as it is known, with the names that there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import CodeType

from lightning.pytorch import Trainer

from pl_sparse.core.registry import near_misses

__all__ = ["MissingMetricError", "nearest", "require", "require_of_sanity_check"]

_VALIDATION = ("val", "valid", "validation")
_LIBRARIES = ("builtins", "lightning", "pytorch_lightning", "pl_sparse", "torch")


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


def require_of_sanity_check(metric: str, trainer: Trainer, who: str) -> None:
    """Check before training that the sanity check has logged a metric of validation.

    A metric of another name may be one of training. One that code of the user's names, or that may be left out while
    `trainer.sanity_checking`, may come later: the first validation tells.

    Args:
        metric: what is monitored.
        trainer: at the end of its sanity check.
        who: monitors it.

    Raises:
        MissingMetricError: it has not.
    """
    logged = list(trainer.callback_metrics)
    if not _of_validation(metric) or not any(map(_of_validation, logged)):
        return
    for owner in (trainer.lightning_module, *trainer.callbacks):  # type: ignore[attr-defined]
        if any("sanity_checking" in code.co_names or metric in code.co_consts for code in _codes(type(owner))):
            return
    require(metric, logged, who)


def _of_validation(metric: str) -> bool:
    return _words(metric)[:1] in ([word] for word in _VALIDATION)


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of a class's functions, but for those of libraries."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in _LIBRARIES:
            left = [function.__code__ for function in vars(base).values() if hasattr(function, "__code__")]
            while left:
                code = left.pop()
                yield code
                left += [inner for inner in code.co_consts if isinstance(inner, CodeType)]


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
