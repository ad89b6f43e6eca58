"""Scorers against loops written from the papers."""

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.targets import find
from pl_sparse.schedule import Linear
from pl_sparse.scorer import Gradient, Magnitude, Movement, Random, Scorer, Taylor


def watched(scorer: Scorer, gradients: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    (param,) = find(nn.Linear(3, 2))
    for gradient, weight in zip(gradients, weights, strict=True):
        with torch.no_grad():
            param.weight.copy_(weight)
        param.weight.grad = gradient.clone()
        scorer.observe(param)
    return scorer.score(param)


def data() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.randn(2, 3) for _ in range(5)], [torch.randn(2, 3) for _ in range(5)]


def test_magnitude() -> None:
    _, weights = data()
    assert torch.equal(watched(Magnitude(), weights, weights), weights[-1].abs())


def test_gradient_and_taylor_are_moving_averages() -> None:
    gradients, weights = data()
    for scorer, terms in (
        (Gradient(0.75), [g.abs() for g in gradients]),
        (Taylor(0.75), [(g * w).abs() for g, w in zip(gradients, weights, strict=True)]),
    ):
        expected = terms[0].clone()
        for term in terms[1:]:
            for i in range(2):
                for j in range(3):
                    expected[i, j] = 0.75 * float(expected[i, j]) + 0.25 * float(term[i, j])
        assert torch.allclose(watched(scorer, gradients, weights), expected)
    assert torch.equal(watched(Taylor(0.0), gradients, weights), (gradients[-1] * weights[-1]).abs())


def test_movement_sums_minus_gradient_times_weight() -> None:
    gradients, weights = data()
    expected = -0.5 * sum((g.double() * w.double() for g, w in zip(gradients, weights, strict=True)), torch.zeros(2, 3))
    assert torch.allclose(watched(Movement(0.5, "sum"), gradients, weights), expected.float(), atol=1e-6)


def test_movement_learns_about_pruned_weights() -> None:
    """dL/dS = G * W at all positions, the gradient by autograd at the masked weights, for 20 steps of SGD."""
    torch.manual_seed(1)
    model = nn.Linear(6, 4, bias=False)
    start = model.weight.detach().clone()
    pruner = Pruner(Movement(0.1, "sum"), Linear(final=0.5, every=3), allocation="uniform")
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    updates = 0
    inputs = [torch.randn(8, 6) for _ in range(20)]
    stored, scores, mask = start.clone(), torch.zeros_like(start), torch.ones_like(start)
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        masked = (stored * mask).requires_grad_()
        (x @ masked.t()).square().mean().backward()
        assert masked.grad is not None
        scores -= 0.1 * masked.grad * stored
        pruner.before_step(step, 20, optimizer)
        mask = pruner.params[0].mask.float()
        if pruner.num_updates > updates:
            updates, keep = pruner.num_updates, int(mask.sum())
            best = scores.reshape(-1).argsort(descending=True, stable=True)[:keep]
            assert torch.equal(mask.reshape(-1).nonzero()[:, 0], best.sort().values)
        stored = stored - 0.01 * masked.grad * mask
        optimizer.step()
        pruner.after_step()
        assert torch.allclose(model.weight, stored * mask, atol=1e-6)
    assert int(mask.sum()) == 12 and updates > 4


def test_random_scores_depend_on_seed_and_name_alone() -> None:
    def scores(seed: int, name: str) -> torch.Tensor:
        weight = nn.Parameter(torch.randn(4, 4))
        return Random(seed).score(MaskedParameter(name, nn.Linear(4, 4), weight, torch.ones(4, 4, dtype=torch.bool)))

    first = scores(0, "a")
    torch.manual_seed(99)
    assert torch.equal(first, scores(0, "a"))
    assert not torch.equal(first, scores(1, "a")) and not torch.equal(first, scores(0, "b"))


def test_weights_without_gradient_score_zero() -> None:
    (param,) = find(nn.Linear(3, 2))
    for scorer in (Gradient(), Taylor(), Movement(rule="sum")):
        scorer.observe(param)
        assert not scorer.score(param).any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        Taylor(1.0)
    with pytest.raises(ValueError, match="lr=0"):
        Movement(0)
