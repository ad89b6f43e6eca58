"""Whether more of a metric is better, by its name."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["direction", "is_accuracy", "lost"]

_ACCURACIES = frozenset(("acc", "accuracy", "top1", "top5", "acc1", "acc5"))
_MORE = _ACCURACIES | {
    "f1", "auroc", "auc", "ap", "map", "map50", "iou", "miou", "dice", "bleu", "rouge", "meteor", "precision",
    "recall", "r2", "psnr", "ssim", "kappa", "mcc", "sparsity",
}  # fmt: skip
_LESS = frozenset((
    "loss", "err", "error", "errors", "ce", "bce", "nll", "mse", "rmse", "mae", "mape", "perplexity", "ppl", "wer",
    "cer", "fid", "kl", "bpc", "bpd", "density", "size", "latency", "macs", "bytes",
))  # fmt: skip


def direction(metric: str) -> Literal["max", "min"] | None:
    """ "max" if more is better, "min" if less is, None if the name does not say it. The last word that says it counts.

    >>> [direction(name) for name in ("val/loss", "val_acc", "valid.topErrorRate", "val/score")]
    ['min', 'max', 'min', None]
    """
    for word in reversed(_words(str(metric))):  # of a setting, which may be anything
        if word in _MORE or word in _LESS:
            return "max" if word in _MORE else "min"
    return None


def lost(metric: str, before: float, after: float) -> float:
    """How much worse a metric has become, more being better where its name does not say it.

    >>> lost("val/acc", 0.75, 0.5), lost("val/loss", 0.75, 0.5)
    (0.25, -0.25)
    """
    return after - before if direction(metric) == "min" else before - after


def is_accuracy(metric: str) -> bool:
    """Whether a metric is the fraction of what was right, by its name."""
    return bool(set(_words(metric)) & _ACCURACIES)


def _words(metric: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", metric)
    return [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
