"""The norms of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import register
from pl_sparse.network.probe import NORMS, Probe
from pl_sparse.regularizer.base import Regularizer, members, penalized_groups, step_sizes
from pl_sparse.structure import NM, Channel, Row, Structure, Transposable, Unstructured

__all__ = ["GroupLasso"]


@register
@dataclass(frozen=True, kw_only=True)
class GroupLasso(Regularizer):
    """strength * sum over groups sqrt(size) |w_group|_2, by its proximal step: groups become zero as a whole.

    With c = strength sqrt(size) and one step size eta for the group, w <- w max(1 - eta c / |w|, 0). With a step size
    eta_i for each weight (Adam), w is 0 if sum (w_i / (eta_i c))^2 <= 1, else w_i <- w_i t / (t + eta_i c), where t,
    the norm of the result, solves sum (w_i / (t + eta_i c))^2 = 1.

    Groups are the units of a structure: output channels, attention heads, blocks, kernels. The bias of an output
    channel that is zero becomes zero, and so do scale and shift of the batch norm after the layer (as seen in a forward
    pass); otherwise it would still emit a constant. Once the penalty has ended, bias and shift are trained again.

    Sources: Yuan, Lin, Model selection and estimation in regression with grouped variables, 2006; Wen et al., Learning
    structured sparsity in deep neural networks, 2016, arXiv:1608.03665; for a step size of each weight Deleu, Bengio,
    Structured sparsity inducing adaptive optimizers for deep learning, 2021, arXiv:2102.03869, section 4.

    Args:
        structure: the structure whose units are the groups.

    Raises:
        ValueError: the structure has no groups, or does not divide a weight.
    """

    strength: float = 1e-3
    structure: Structure = field(default_factory=Channel)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.structure, (NM, Row, Transposable, Unstructured)):
            raise ValueError(
                f"structure={self.structure.label} has no groups that could be zero as a whole: use channel, head, "
                "kernel or block4x4"
            )

    @property
    def removes_outputs(self) -> bool:
        return self.structure.removes_outputs

    def groups(self, params: Sequence[MaskedParameter], model: nn.Module, example: Any = None) -> list[Group]:
        return penalized_groups(self.structure, params, model, example)

    def prepare(self, groups: Sequence[Group], model: nn.Module, probe: Probe | None) -> None:
        if not self.structure.removes_outputs:
            return
        following: dict[nn.Module, nn.Module] = {}
        if any(isinstance(module, NORMS) for module in model.modules()):
            if probe is None:
                raise ValueError(
                    "group lasso on channels looks for the batch norm after each layer by calling training_step, which "
                    "with manual optimization would train the module: use structure=kernel or block4x4"
                )
            following = probe.following_norms([param.module for param in members(groups)])
        for param in members(groups):
            norm = following.get(param.module)
            companions = [
                getattr(param.module, "bias", None),
                getattr(norm, "weight", None),
                getattr(norm, "bias", None),
            ]
            outputs = param.layout.shape_of(param.shape)[0]
            param.state = {
                str(i): each for i, each in enumerate(companions) if isinstance(each, Tensor) and len(each) == outputs
            }

    def _sum(self, group: Group, values: Sequence[Tensor]) -> Tensor:
        """The sum over each unit of tensors that have the shapes of the group's weights."""
        total = torch.zeros(())
        for (param, layout), value in zip(group.members, values, strict=True):
            mean = self.structure.pool(layout.view(value))
            total = total.to(mean.device) + mean * (layout.shape_of(param.former).numel() / mean.numel())
        return total

    def _spread(self, group: Group, units: Tensor) -> list[Tensor]:
        """For each weight of the group a tensor of its shape with the values of its units."""
        return [
            layout.write(units.new_zeros(param.shape), self.structure.expand(units, layout.shape_of(param.former)))
            for param, layout in group.members
        ]

    def _norms(self, group: Group) -> tuple[Tensor, float]:
        """The norm of each unit of a group, and the root of its size."""
        norms = self._sum(group, [param.weight.detach().square() for param, _ in group.members]).sqrt()
        return norms, (group.numel / norms.numel()) ** 0.5

    def prox(self, groups: Sequence[Group], optimizer: Optimizer) -> None:
        for group in groups:
            weights = [param.weight for param, _ in group.members]
            etas = step_sizes(optimizer, weights)
            norms, root = self._norms(group)
            c = self.strength * root
            if c == 0 or not any(isinstance(eta, Tensor) or eta for eta in etas):
                continue
            if all(eta == etas[0] for eta in etas if not isinstance(eta, Tensor)) and not isinstance(etas[0], Tensor):
                norm = (norms - float(etas[0]) * c).clamp_min_(0)
            else:
                norm = self._solve(group, weights, etas, c)
            for weight, eta, each in zip(weights, etas, self._spread(group, norm), strict=True):
                weight.mul_(torch.where(each > 0, each / (each + eta * c), 0))
            for param, _ in group.members:
                for companion in param.state.values():
                    companion.mul_(norm > 0)

    def _solve(self, group: Group, weights: Sequence[Tensor], etas: Sequence[Tensor | float], c: float) -> Tensor:
        """The norm of each unit after the step: the root t of sum (w_i / (t + eta_i c))^2 = 1, or 0.

        Newton's method on 1 / sqrt(sum), which is nearly linear in t and concave, so that it comes from below.
        """
        t = torch.zeros(())
        for _ in range(12):
            at = self._spread(group, t) if t.dim() else [t] * len(weights)
            below = [a + eta * c for a, eta in zip(at, etas, strict=True)]
            ratios = [(w / b.clamp_min(1e-30)).square() for w, b in zip(weights, below, strict=True)]
            total = self._sum(group, ratios)
            slope = self._sum(group, [r / b.clamp_min(1e-30) for r, b in zip(ratios, below, strict=True)])
            t = torch.where(total > 1, t + (total.sqrt() - 1) * total / slope.clamp_min(1e-30), t)
        return t

    def penalty(self, groups: Sequence[Group], step: int) -> Tensor:
        norms_and_roots = [self._norms(group) for group in groups]
        return self.strength * torch.stack([norms.sum() * root for norms, root in norms_and_roots]).sum()
