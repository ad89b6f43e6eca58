"""Masks under which pruned weights rest: forgotten, or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pl_sparse.core.exposed import store_kept
from pl_sparse.core.registry import register
from pl_sparse.masking.base import Groups, Masking, Params, mask_gradients

__all__ = ["Frozen", "Hard"]


@register
@dataclass(frozen=True)
class Hard(Masking):
    """Pruned weights are zero and have no gradient: w <- mask * w after every step. Their values are lost.

    When masks change, the momentum of pruned weights is set to zero. Second moments are kept, except under
    `updater=dropgrow`, whose new weights start without optimizer state.
    """

    elementwise: ClassVar[bool] = True
    rests: ClassVar[bool] = True

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        mask_gradients(params)


@register
@dataclass(frozen=True)
class Frozen(Masking):
    """Pruned weights keep their value, without training and decay, and return with it when the mask keeps them again.

    The optimizer sees mask * w and mask * gradient, and keeps its state.

    Source: Sanh, Wolf, Rush, Movement pruning: adaptive sparsity by fine-tuning, 2020, arXiv:2005.07683, section 3.
    """

    remembers: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def shape_gradients(self, params: Params, groups: Groups) -> None:
        mask_gradients(params)

    def after_step(self, params: Params, groups: Groups) -> None:
        store_kept(params)
