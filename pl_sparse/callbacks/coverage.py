"""Which part of a model's weights is pruned, said once at the start of training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pl_sparse.core.masked_model import MaskedModel

__all__ = ["report_coverage"]

_ENOUGH = 0.95
_NAMED = 8


def report_coverage(model: MaskedModel) -> None:
    """Report the coverage, and what is left out with its reason; as a warning where that is more than 5 %.

    What the user excludes, or the structure does not fit, lowers the coverage, but is not a reason for a warning.
    """
    sizes = model.choice.sizes
    total = sum(sizes.values())
    rank_zero_info(
        f"coverage: {model.coverage:.2%} of the {total:,} weights in matrices and convolutions are pruned (frozen and "
        "excluded weights count as not pruned)"
    )
    for reason, names in _by_reason(model.choice.left_out).items():
        rank_zero_info(f"{names}: left out, {reason}")
    uncovered = model.uncovered
    if sum(sizes[name] for name in uncovered if name not in model.misfits) > (1 - _ENOUGH) * total:
        parts = "; ".join(f"{names}: {reason}" for reason, names in _by_reason(uncovered).items())
        rank_zero_warn(
            f"coverage: only {model.coverage:.2%} of the weights are pruned, and sparsity is that of these alone. "
            f"Left out are {parts}"
        )


def _by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """The names that share a reason, in one line."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return {
        reason: ", ".join(listed[:_NAMED]) + (f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")
        for reason, listed in names.items()
    }
