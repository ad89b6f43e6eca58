"""Prune, and exchange weights by what each output loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation
from pl_sparse.core.group import Group
from pl_sparse.core.registry import register
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Row, Structure, Unstructured
from pl_sparse.updater.base import Update
from pl_sparse.updater.prune import Prune

__all__ = ["DSnoT"]


@register
@dataclass(frozen=True)
class DSnoT(Prune):
    """Keep the best scores, then exchange weights within each output, so that its mean changes least.

    With e_i = sum of w_ij mean(x_j) over the pruned weights of output i, which is what it loses on average, a cycle

        grows the pruned j with the largest sign(e_i) w_ij mean(x_j) / var(x_j)^power, and
        prunes the kept j with w_ij mean(x_j) of the other sign than e_i and the smallest |w_ij| |x_j|_2,

    both of which bring e_i nearer to 0. An output is done once |e_i| is `threshold` or less, the exchange would turn
    the sign of e_i, or there is nothing more to grow or prune; what was exchanged once stays. Weights keep their
    values. Any scorer and allocation choose the first masks; the count of each output stays. Means are those of the
    unpruned model, over all calibration batches; tensors whose inputs are not seen (see `Probe.activations`) keep their
    first masks, as do those that a norm divides along their inputs. Weights pruned in an earlier update are zero and do
    not return.

    Source: Zhang et al., Dynamic sparse no training: training-free fine-tuning for sparse LLMs, 2023, arXiv:2310.08915,
    equations 2 and 3. There a transformer block sees the outputs of the pruned blocks before it.

    Args:
        cycles: exchanges of an output, at most.
        threshold: the error of an output that is left alone.
        power: the exponent of the inputs' variance.
    """

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    calibrates: ClassVar[bool] = True
    sees_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles={self.cycles!r} must be 1 or more")
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r} must not be negative")

    def structure_refusal(self, structure: Structure) -> str | None:
        if isinstance(structure, (Unstructured, Row)):
            return None
        return (
            f"updater=dsnot exchanges single weights of an output, which structure={structure.label} does not allow: "
            "use structure=row or unstructured"
        )

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        assert due.probe is not None
        super().update(groups, scorer, structure, allocation, due)
        params = list(dict.fromkeys(param for group in groups for param, _ in group.members))
        sums = due.probe.sums(params, _moments, lambda size: (3, *size))
        for param, moments in zip(params, sums, strict=True):
            if moments is None or (param.norm_dim or 0) > 0:
                continue
            weight = param.layout.view(param.values).to(moments.dtype)  # (out, in / groups, *kernel)
            kept = param.layout.view(param.mask)
            count, total, squares = (m.repeat_interleave(len(weight) // len(m), 0).flatten(1) for m in moments)
            mean = total / count
            variance = (squares - total * mean).clamp_min(0) / (count - 1).clamp_min(1)
            flat = weight.flatten(1)
            product = flat * mean
            growth = product / variance.pow(self.power).clamp_min(torch.finfo(product.dtype).tiny)
            chosen = self._exchanged(product, growth, flat.abs() * squares.sqrt(), kept.flatten(1))
            param.set_mask(param.layout.restore(chosen.reshape(weight.shape), param.shape))

    def _exchanged(self, product: Tensor, growth: Tensor, importance: Tensor, kept: Tensor) -> Tensor:
        """The masks after all cycles; everything is (outputs, columns)."""
        kept = kept.clone()
        error = (product * ~kept).sum(1)
        sign = error.sign()
        side = sign.unsqueeze(1) * product  # above 0: growing it helps, below: pruning it does
        grows = torch.where(~kept & (side > 0), sign.unsqueeze(1) * growth, -torch.inf)
        prunes = torch.where(kept & (side < 0), importance, torch.inf)
        active = torch.ones_like(sign, dtype=torch.bool)
        for _ in range(self.cycles):
            (best, grown), (least, pruned) = grows.max(1), prunes.min(1)
            change = product.gather(1, pruned.unsqueeze(1)) - product.gather(1, grown.unsqueeze(1))
            after = error + change.squeeze(1)
            active &= (error.abs() > self.threshold) & best.isfinite() & least.isfinite() & (after.sign() == sign)
            rows = active.nonzero().squeeze(1)
            if not len(rows):
                break
            kept[rows, grown[rows]], kept[rows, pruned[rows]] = True, False
            grows[rows, grown[rows]], prunes[rows, pruned[rows]] = -torch.inf, torch.inf
            error = torch.where(active, after, error)
        return kept


def _moments(x: Tensor) -> Tensor:
    """Count, sum and sum of squares of (groups, positions, in / groups, *kernel) over positions, (3, groups, ...)."""
    total = x.sum(1)
    return torch.stack([torch.full_like(total, x.shape[1]), total, x.square().sum(1)])
