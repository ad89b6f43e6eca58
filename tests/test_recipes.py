"""Methods against independent versions of the recipes that they were published with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pl_sparse import Pruner
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.schedule import Constant, Cyclic
from pl_sparse.scorer import Scorer
from pl_sparse.updater import DropGrow

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}
SECOND = {"exp_avg_sq", "square_avg", "sum"}


@dataclass(frozen=True)
class Fickle(Scorer):
    """Other scores at each update, from torch's generator."""

    def score(self, param: MaskedParameter) -> Tensor:
        return torch.rand(param.shape)


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    first, second, third = sizes or (8, 16, 4)
    return nn.Sequential(nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third))


def batches(count: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(10, size, generator=generator) for _ in range(count)]


def loss(out: Tensor) -> Tensor:
    return (out**2).mean() + out.sin().mean()


# The optimizer's memory of weights that return


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_weights_keep_what_the_optimizer_remembers(kind: str) -> None:
    """Masks that change at each step, against a loop whose optimizer sees mask * weight and mask * gradient."""
    model, naive = net(), net()
    pruner = Pruner(Fickle(), Constant(final=0.5, every=1), masking="frozen")
    pruner.attach(model)
    optimizer, reference = (OPTIMIZERS[kind](m.parameters()) for m in (model, naive))
    pruner.prepare(12)
    for step, x in enumerate(batches(12)):
        latent = {i: naive[i].weight.detach().clone() for i in (0, 2)}
        optimizer.zero_grad()
        loss(model(x)).backward()
        gradients = [p.weight.grad.clone() for p in pruner.params if p.weight.grad is not None]
        pruner.before_step(step, 12, optimizer)
        optimizer.step()
        pruner.after_step()
        masks = {i: param.mask for i, param in zip((0, 2), pruner.params, strict=True)}
        for i, gradient in zip((0, 2), gradients, strict=True):
            naive[i].weight.data = latent[i] * masks[i]
            naive[i].weight.grad = gradient * masks[i]
            naive[i].bias.grad = model[i].bias.grad.clone()
        reference.step()
        for i, param in zip((0, 2), pruner.params, strict=True):
            naive[i].weight.data = torch.where(masks[i], naive[i].weight.data, latent[i])
            assert torch.allclose(param.values, naive[i].weight.data, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hard_masks_clear_the_first_moment_alone(kind: str) -> None:
    """Weights that come back begin at zero and without a direction; their rate is what it was."""
    model = net()
    pruner = Pruner(Fickle(), Cyclic(final=0.5, begin=0.25, end=1.0, cycles=2), masking="hard")
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step, x in enumerate(batches(16)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        before = pruner.num_updates
        pruner.before_step(step, 16, optimizer)
        if pruner.num_updates > before and not pruner.params[0].mask.all():
            for param in pruner.params:
                for name, value in optimizer.state[param.weight].items():
                    if value.shape == param.shape:
                        assert bool(value[~param.mask].any()) is (name in SECOND), name
                        assert value[param.mask].all(), name
        optimizer.step()
        pruner.after_step()
    assert pruner.num_updates >= 3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grown_weights_start_with_nothing_remembered(kind: str) -> None:
    """RigL's slots of new connections are zero, all of them."""
    model = net()
    pruner = Pruner("magnitude", Constant(final=0.5, every=5), updater=DropGrow(skip_step=False))
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner.prepare(16)
    for step, x in enumerate(batches(16)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        masks = [param.mask.clone() for param in pruner.params]
        pruner.before_step(step, 16, optimizer)
        for param, mask in zip(pruner.params, masks, strict=True):
            for value in optimizer.state[param.weight].values():
                if value.shape == param.shape:
                    assert not value[param.mask & ~mask].any() and not value[~param.mask].any()
        optimizer.step()
        pruner.after_step()
