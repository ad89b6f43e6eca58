"""Movement pruning by the recipe of its published numbers.

Source: Sanh, Wolf, Rush, Movement pruning, 2020, arXiv:2005.07683, and the authors' example: scores start at 0 and are
trained by AdamW without weight decay under the schedule of the weights, gradients are clipped, masks are the best of
each matrix at every step, dL/dS = G W, dL/dW = G M. Here M is the mask that the step sets, there that of its forward
pass, which here too has the norm that the scores are clipped by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Straight(torch.autograd.Function):
    """W M forward; G M to the weights and G W to the scores backward."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)  # type: ignore[attr-defined]
        return weight * mask

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * mask, grad * weight, None


def best(score: Tensor, density: float) -> Tensor:
    keep = round(density * score.numel())
    order = score.detach().flatten().argsort(descending=True, stable=True)[:keep]
    return torch.zeros(score.numel()).index_fill(0, order, 1.0).view(score.shape)


def shrunk(gradients: Weights, masks: Weights, clip: float) -> float:
    norm = torch.stack([(g * masks[n]).norm() for n, g in gradients.items()]).norm()
    return min(1.0, clip / (float(norm) + 1e-6))


def train(
    start: Weights,
    losses: Iterable[Callable[[Weights], Tensor]],
    densities: Iterable[float],
    rates: Iterable[float],
    score_lr: float,
    lr: float,
    clip: float,
) -> tuple[Weights, Weights]:
    """Scores and masks after plain SGD on the weights."""
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    scores = {name: torch.zeros_like(w).requires_grad_() for name, w in start.items()}
    masks = {name: torch.ones_like(w) for name, w in start.items()}
    inner = torch.optim.AdamW(scores.values(), score_lr, weight_decay=0.0)
    for loss, density, rate in zip(losses, densities, rates, strict=True):
        for tensor in (*weights.values(), *scores.values()):
            tensor.grad = None
        used = {n: Straight.apply(w, scores[n], masks[n]) for n, w in weights.items()}
        for tensor in used.values():
            tensor.retain_grad()
        loss(used).backward()
        dense = {n: tensor.grad for n, tensor in used.items()}
        for tensor in scores.values():
            assert tensor.grad is not None
            tensor.grad *= shrunk(dense, masks, clip)
        inner.param_groups[0]["lr"] = score_lr * rate
        inner.step()
        masks = {name: best(score, density) for name, score in scores.items()}
        with torch.no_grad():
            for name, w in weights.items():
                w -= lr * rate * shrunk(dense, masks, clip) * dense[name] * masks[name]
    return {n: s.detach() for n, s in scores.items()}, masks
