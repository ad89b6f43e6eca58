"""Prune and move what is left, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_sparse.allocation import Allocation, Units, kept
from pl_sparse.allocation.units import refuse_nan
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import Probe
from pl_sparse.scorer import Scorer
from pl_sparse.structure import NM, Structure, Unstructured
from pl_sparse.updater.base import Update, Updater

__all__ = ["Reconstruct"]


@register
@dataclass(frozen=True)
class Reconstruct(Updater):
    """SparseGPT: remove weights and update the others, so that each layer's outputs change least.

    A layer with weight W and inputs X minimizes |W X - W' X|^2 over W' that are sparse. With H = 2 X X^T / n, n the
    positions in X, damped by `damping` times the mean of its diagonal, and U the upper Cholesky factor of H^-1, columns
    are passed from left to right: column i of a removed weight adds -w_i / U_ii U_i,: to its row, which is the optimal
    brain surgeon's step for the columns from i on. The weights to remove are chosen for `block` columns at once (for an
    n:m pattern for m), by the smallest w^2 / U_ii^2 of the columns as updated so far. Inputs that are always zero have
    w = 0 and no part in the mean, in which the authors' code counts each as 1; so neither the scale nor the number of
    the inputs matters.

    Layers are pruned in the order in which the model calls them, each on the outputs of those already pruned: one pass
    over the calibration batches for each. A convolution is a linear layer of its unfolded inputs, channels last.
    Weights whose inputs are not seen (see `Probe.activations`) have H = 1, which is magnitude. Only allocations that
    rank weights use the scorer; use `allocation=uniform`. Masking must be hard.

    Source: Frantar, Alistarh, SparseGPT: massive language models can be accurately pruned in one-shot, 2023,
    arXiv:2301.00774, Algorithm 1; convolutions as in Frantar, Singh, Alistarh, Optimal brain compression, 2022,
    arXiv:2208.11580. A block keeps a share of the tensor's count, so that it is met to the unit.

    Args:
        block: columns whose weights are chosen at once.
        damping: the number added to the diagonal of H, as a fraction of its mean.
    """

    block: int = 128
    damping: float = 0.01
    needs_zeros: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    sees_inputs: ClassVar[bool] = True
    writes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block!r} must be 1 or more columns")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping!r} must be positive, or H may have no inverse")

    def structure_refusal(self, structure: Structure) -> str | None:
        if isinstance(structure, (Unstructured, NM)):
            return None
        return (
            f"updater=reconstruct chooses weights column by column, which structure={structure.label} does not allow: "
            "use structure=unstructured or nm24"
        )

    def update(
        self, groups: Sequence[Group], scorer: Scorer, structure: Structure, allocation: Allocation, due: Update
    ) -> None:
        assert due.probe is not None
        units = due.units(groups, scorer, structure)
        levels = [due.level if override is None else override for override in due.overrides]
        counts = [
            max(kept(s, size), units.least(i, s)) for i, (s, size) in enumerate(zip(levels, units.sizes, strict=True))
        ]
        free = [i for i, override in enumerate(due.overrides) if override is None]
        if free and structure.fixed is None:
            shares = allocation.keep([groups[i] for i in free], units.among(free), due.level)
            counts = [dict(zip(free, shares, strict=True)).get(i, count) for i, count in enumerate(counts)]
        params = [group.members[0][0] for group in groups]
        order_of_calls: dict[str, int] = {}

        def see(param: MaskedParameter, x: Tensor) -> None:
            order_of_calls.setdefault(param.name, len(order_of_calls))

        due.probe.activations(params, see)
        places = [order_of_calls.get(param.name, len(order_of_calls)) for param in params]
        here = torch.tensor(places, dtype=torch.float32, device=params[0].weight.device)
        mean = due.probe.reduced([here])[0].tolist()
        for i in sorted(range(len(params)), key=mean.__getitem__):  # the same in all processes
            self._reconstruct(units, i, counts[i], due)

    def _reconstruct(self, units: Units, index: int, count: int, due: Update) -> None:
        """Give one weight its mask and its new values."""
        assert due.probe is not None
        structure, param = units.structure, units.groups[index].members[0][0]
        last = param.layout.view(param.data.detach()).movedim(1, -1)  # (out, *kernel, in)
        alive = param.layout.view(param.mask).movedim(1, -1).flatten(1)  # (out, columns)
        weight = last.flatten(1).to(torch.float64, copy=True)  # (out, columns)
        hessian = _hessian(param, weight.shape[1], due.probe)  # (groups, columns, columns)
        for tensor in (weight, hessian):
            refuse_nan(param.name, tensor * 0)  # NaN where the tensor is not finite
        width = structure.m if isinstance(structure, NM) else self.block
        rows = len(weight) // len(hessian)  # outputs of each group of a convolution
        chosen = torch.ones_like(alive)
        done = 0  # weights looked at so far; the tensor's count is shared out so that it is met to the unit
        for i, inputs in enumerate(hessian):
            outputs = slice(i * rows, (i + 1) * rows)
            factor = _inverse_factor(inputs, weight[outputs], self.damping)
            for start in range(0, weight.shape[1], width):
                block = slice(start, start + width)
                score = weight[outputs, block].square() / factor.diagonal()[block].square()
                score = -score if due.invert else score
                if due.monotone and param.pruned:
                    score = score.masked_fill(~alive[outputs, block], torch.finfo(score.dtype).min)
                share = _share(count, done + score.numel(), alive.numel()) - _share(count, done, alive.numel())
                done += score.numel()
                chosen[outputs, block] = structure.expand(structure.select(structure.pool(score), share), score.shape)
                _eliminate(weight[outputs], chosen[outputs, block], factor, start)

        def seen(columns: Tensor) -> Tensor:
            return columns.reshape(last.shape).movedim(-1, 1)  # (out, in, *kernel)

        units.assign(index, structure.alive(seen(chosen)))
        values = param.layout.restore(seen(weight), param.shape)
        if param.norm_dim is not None:  # a slice that is divided by its norm keeps its values where none would be left
            others = tuple(dim for dim in range(values.dim()) if dim != param.norm_dim)
            left = (values * param.mask).ne(0).any(others, keepdim=True)
            values = torch.where(left, values, param.data)
        param.write(values)


def _hessian(param: MaskedParameter, columns: int, probe: Probe) -> Tensor:
    """2 X X^T / n of each group of a layer's n inputs, (groups, columns, columns); ones if unseen."""

    def product(x: Tensor) -> Tensor:
        flat = x.movedim(2, -1).flatten(2)
        product = 2 * (flat.mT @ flat)
        count = product.new_full((*product.shape[:-2], 1, product.shape[-1]), flat.shape[1])
        return torch.cat([product, count], -2)  # (groups, columns + 1, columns)

    (total,) = probe.sums([param], product, lambda size: (size[0], size[1:].numel() + 1, size[1:].numel()))
    if total is None:
        return torch.eye(columns, dtype=torch.float64, device=param.weight.device).unsqueeze(0)
    total = total.double()
    return total[..., :-1, :] / total[..., -1:, :]


def _inverse_factor(hessian: Tensor, weight: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of H, damped; weights of dead inputs become zero."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    mean = hessian.diagonal().sum() / (~dead).sum().clamp_min(1)
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _eliminate(weight: Tensor, chosen: Tensor, factor: Tensor, start: int) -> None:
    """Set the weights of a block of columns to zero that are not chosen, and move all that are right of each."""
    end = start + chosen.shape[1]
    errors = torch.zeros_like(weight[:, start:end])  # (out, columns of the block)
    for i in range(start, end):  # within the block at once, beyond it by one product below: lazy batch updates
        errors[:, i - start] = weight[:, i] * ~chosen[:, i - start] / factor[i, i]
        weight[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
    weight[:, end:] -= errors @ factor[start:end, end:]
    weight[:, start:end] *= chosen  # to the bit


def _share(count: int, done: int, total: int) -> int:
    """How many of `count` weights are kept among the first `done` of `total`."""
    return (2 * count * done + total) // (2 * total)
