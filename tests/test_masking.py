"""Maskings against autograd and against loops."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pl_sparse import Pruner
from pl_sparse.core import parameter
from pl_sparse.masking import SRSTE, Masking, TopKAST
from pl_sparse.schedule import Constant, Cyclic, OneShot

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(10, 8, generator=generator) for _ in range(count)]


def loss(out: torch.Tensor) -> torch.Tensor:
    return (out**2).mean() + out.sin().mean()


def fit(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: int, after: object = None) -> None:
    for step, x in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, steps, optimizer)
        optimizer.step()
        pruner.after_step()
        if callable(after):
            after()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ste_is_autograds_ste(kind: str) -> None:
    """v -> mask * v forward, identity backward, the mask by magnitude of v at every step: equal to the bit."""
    model, latent = net(), net()
    pruner = Pruner("magnitude", Constant(final=0.5, every=1), "nm24", masking="ste")
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    reference = OPTIMIZERS[kind](latent.parameters())

    def mask_of(v: torch.Tensor) -> torch.Tensor:
        groups = v.detach().abs().reshape(-1, 4)
        top = groups.topk(2).indices
        return torch.zeros_like(groups).scatter_(1, top, 1.0).reshape(v.shape)

    masks = {0: mask_of(latent[0].weight), 2: mask_of(latent[2].weight)}
    pruner.prepare(40)  # the level due at step 0 is met before the first batch
    for step, x in enumerate(batches(40)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, 40, optimizer)
        optimizer.step()
        pruner.after_step()

        reference.zero_grad()
        h = torch.tanh(F.linear(x, _Straight.apply(latent[0].weight, masks[0]), latent[0].bias))
        loss(F.linear(h, _Straight.apply(latent[2].weight, masks[2]), latent[2].bias)).backward()
        if step:
            masks = {i: mask_of(latent[i].weight) for i in (0, 2)}
        reference.step()
        for i in (0, 2):
            dense = pruner.params[i // 2].latent
            assert dense is not None
            assert torch.equal(dense, latent[i].weight)
            assert torch.equal(model[i].weight, latent[i].weight * masks[i])


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return v * mask

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hard_stays_zero_under_momentum_and_decay(kind: str) -> None:
    model = net()
    pruner = Pruner("magnitude", OneShot(final=0.7, begin=0.25))
    pruner.attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())

    def check() -> None:
        for param in pruner.params:
            assert not param.weight[~param.mask].any()
            if param.pruned:
                for name, value in optimizer.state[param.weight].items():
                    assert name == "exp_avg_sq" or value.shape != param.shape or not value[~param.mask].any()

    fit(model, pruner, optimizer, 40, check)
    assert pruner.sparsity == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hard_is_training_the_small_network(kind: str) -> None:
    """After pruning, the kept weights move as if the others did not exist."""
    model = net()
    pruner = Pruner("magnitude", OneShot(final=0.7))
    pruner.attach(model)
    pruner.prepare(30)
    reference = net()
    masks = [param.mask.clone() for param in pruner.params]
    live = [nn.Parameter(reference[i].weight.detach()[mask]) for i, mask in zip((0, 2), masks, strict=True)]
    biases = [reference[0].bias, reference[2].bias]
    optimizer, small = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind]([*live, *biases])
    for step, x in enumerate(batches(30)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, 30, optimizer)
        optimizer.step()
        pruner.after_step()
        small.zero_grad()
        weights = [torch.zeros(mask.shape).masked_scatter(mask, w) for mask, w in zip(masks, live, strict=True)]
        loss(F.linear(torch.tanh(F.linear(x, weights[0], biases[0])), weights[1], biases[1])).backward()
        small.step()
    for param, mask, values in zip(pruner.params, masks, live, strict=True):
        assert torch.allclose(param.weight[mask], values, atol=1e-6)


def test_frozen_weights_come_back_with_their_value() -> None:
    model = net()
    pruner = Pruner("random", Cyclic(final=0.8, begin=0.0, end=0.75, cycles=1), masking="frozen")
    pruner.attach(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    seen: list[tuple[float, list[torch.Tensor], list[torch.Tensor]]] = []

    def look() -> None:
        seen.append(
            (
                pruner.sparsity,
                [param.mask.clone() for param in pruner.params],
                [param.values.clone() for param in pruner.params],
            )
        )

    before = [param.weight.detach().clone() for param in pruner.params]
    fit(model, pruner, optimizer, 16, look)
    assert [round(s, 2) for s, *_ in seen] == [0.8] * 6 + [0.0] * 6 + [0.8] * 4
    for index, start in enumerate(before):
        frozen = ~seen[0][1][index]
        for _, mask, values in seen[:6]:
            assert torch.equal(values[index][frozen], start[frozen])
            assert not mask[index][frozen].any()
        assert not torch.equal(seen[6][2][index][frozen], start[frozen])  # trained again once it is back
        assert (seen[6][2][index][frozen] - start[frozen]).abs().max() < 0.05


def test_gradients_are_masked_before_clipping_for_hard_only() -> None:
    for masking, zero in (("hard", True), ("frozen", True), ("ste", False)):
        model = net()
        pruner = Pruner("random", OneShot(final=0.5), masking=masking)
        pruner.attach(model)
        pruner.prepare(2)
        loss(model(batches(1)[0])).backward()
        pruner.before_step(0)
        grads = torch.cat([param.weight.grad[~param.mask] for param in pruner.params])  # type: ignore[index]
        assert bool((grads == 0).all()) is zero
        pruner.after_step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_srste_adds_a_decay_of_what_is_masked(kind: str) -> None:
    """The gradient of v is dL/d(mask v) + decay (1 - mask) v, and goes through momentum and moments."""
    model, latent = net().double(), net().double()
    pruner = Pruner("magnitude", OneShot(final=0.5), "nm24", masking=SRSTE(0.05))
    pruner.attach(model)
    pruner.prepare(20)
    masks = {i: model[i].weight != 0 for i in (0, 2)}
    optimizer, reference = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](latent.parameters())
    for step, x in enumerate(x.double() for x in batches(20)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        pruner.before_step(step, 20, optimizer)
        optimizer.step()
        pruner.after_step()

        sparse = {i: (latent[i].weight.detach() * masks[i]).requires_grad_() for i in (0, 2)}
        biases = [latent[0].bias, latent[2].bias]
        out = F.linear(torch.tanh(F.linear(x, sparse[0], biases[0])), sparse[2], biases[1])
        grads = torch.autograd.grad(loss(out), [sparse[0], sparse[2], *biases])
        for i, grad in zip((0, 2), grads, strict=False):
            latent[i].weight.grad = grad + 0.05 * torch.where(masks[i], 0.0, latent[i].weight.detach())
        biases[0].grad, biases[1].grad = grads[2:]
        reference.step()
        for param, i in zip(pruner.params, (0, 2), strict=True):
            assert param.latent is not None
            assert torch.allclose(param.latent, latent[i].weight, rtol=1e-5, atol=1e-7)
            assert torch.equal(model[i].weight, param.latent * masks[i])


def test_topkast_trains_more_than_it_uses() -> None:
    model = net()
    masking = TopKAST(exploration=0.25, reg=0.02)
    pruner = Pruner("magnitude", Constant(final=0.75, every=4), allocation="uniform", masking=masking)
    pruner.attach(model)
    pruner.prepare(21)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    moved = False
    for step, x in enumerate(batches(21)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        weight, dense = model[0].weight, pruner.params[0].latent
        assert weight.grad is not None and dense is not None
        old, grad, before = dense.clone(), weight.grad.clone(), pruner.params[0].mask.clone()
        pruner.before_step(step, 21, optimizer)
        optimizer.step()
        pruner.after_step()
        # the paper with sorting: A the 32 largest of 128 when masks were last made, B the 64 largest
        if step % 4 == 0:
            order = old.abs().reshape(-1).argsort(descending=True)
            a, b = (torch.zeros(128).index_fill(0, order[:n], 1.0).view(16, 8) for n in (32, 64))
        moved |= not torch.equal(before, pruner.params[0].mask)
        expected = old - (b * grad + 0.02 * (a * old + (b - a) * old / 0.25))
        assert torch.allclose(dense, expected, atol=1e-6)
        assert torch.equal(weight, dense * a)
    assert moved


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_large_masks_are_applied_without_a_copy_in_numbers(
    masking: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what small masks come to, infinite and NaN gradients too, and a byte a weight is all that stays."""

    def trained() -> tuple[torch.Tensor, Pruner]:
        model = net()
        pruner = Pruner(schedule=Constant(final=0.5, every=3), masking=masking)
        pruner.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step, x in enumerate(batches(5)):
            optimizer.zero_grad()
            loss(model(x)).backward()
            if step == 4:
                for param in pruner.params:
                    param.weight.grad[~param.mask] = float("nan")
            pruner.before_step(step, 5, optimizer)
            optimizer.step()
            pruner.after_step()
        return torch.cat([param.weight.detach().flatten() for param in pruner.params]), pruner

    small, pruner = trained()
    assert all(param._bits is not None for param in pruner.params)
    monkeypatch.setattr(parameter, "_LARGE", 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    large, pruner = trained()
    assert torch.equal(small.view(torch.int32), large.view(torch.int32)) and (large == 0).sum() == 96
    assert all(param._bits is None and param._factor is None for param in pruner.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_mask_is_applied_to_the_bit(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter, "_LARGE", 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(dtype).to(memory_format=torch.channels_last))
    param = parameter.MaskedParameter("w", torch.nn.Module(), weight, torch.rand(4, 3, 5, 5) < 0.5)
    values = torch.randn(4, 3, 5, 5).to(dtype)
    values.view(-1)[:4] = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan")])
    expected = torch.where(param.mask, values, 0)
    for found in (values.clone(), values.clone(memory_format=torch.channels_last)):
        parameter.zero_pruned([found], [param])
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))
    parameter.zero_pruned([weight], [param], [values])
    assert torch.equal(weight.detach().contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_lowest_number_stands_where_nothing_is_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter, "_PIECE", 7)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([torch.randn(43), special]).to(dtype).reshape(6, 8)
    for kept in (torch.rand(6, 8) < 0.5, torch.ones(6, 8).bool(), (torch.rand(8, 6) < 0.5).t()):
        expected = torch.where(kept, values, torch.finfo(dtype).min).contiguous()
        found = parameter.where_kept(values, kept).contiguous()
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


class Reallocating(torch.optim.SGD):
    """Gives weights other memory, as some optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = weight.data.clone()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Reallocating])
@pytest.mark.parametrize("large", [30, 1 << 18])
@pytest.mark.parametrize("masking", ["ste", SRSTE(decay=0.1)])
def test_stepping_latent_values_in_their_place_is_copying_them(
    masking: Any, large: int, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter, "_LARGE", large)
    options = {"momentum": 0.9, "weight_decay": 0.01} if issubclass(optimizer, torch.optim.SGD) else {"lr": 0.01}

    def trained(copies: bool) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            if copies:
                patch.setattr(Masking, "_in_place", False)
            model = net()
            pruner = Pruner(schedule=Constant(final=0.5, every=2), masking=masking)
            pruner.attach(model)
            inner = optimizer(model.parameters(), **{"lr": 0.1, **options})
            places = [weight.data_ptr() for weight in model.parameters()]
            for step, x in enumerate(batches(5)):
                inner.zero_grad()
                loss(model(x)).backward()
                pruner.before_step(step, 5, inner)
                exposed = [param.weight.data_ptr() == param.latent.data_ptr() for param in pruner.params]
                assert exposed == [not copies] * len(exposed)
                inner.step()
                pruner.after_step()
                assert all(param.weight.data_ptr() != param.latent.data_ptr() for param in pruner.params)
            if optimizer is not Reallocating:
                assert places == [weight.data_ptr() for weight in model.parameters()]
            return [tensor for param in pruner.params for tensor in (param.weight.detach(), param.latent)]

    for exchanged, copied in zip(trained(False), trained(True), strict=True):
        assert torch.equal(exchanged.view(torch.int32), copied.view(torch.int32))


def test_a_step_that_never_ends_leaves_no_latent_values_behind() -> None:
    model = net()
    pruner = Pruner(schedule=Constant(final=0.5), masking="ste")
    pruner.attach(model)
    place = model[0].weight.data_ptr()
    loss(model(batches(1)[0])).backward()
    pruner.before_step(0, 5)
    pruner.apply()
    for param in pruner.params:
        assert torch.equal(param.weight, param.latent * param.mask) and int((param.latent[~param.mask] != 0).sum())
    assert model[0].weight.data_ptr() == place


def test_a_masking_that_stores_otherwise_has_the_values_in_the_weights() -> None:
    """What is not trained stays: values that the optimizer wrote must not be the latent ones yet."""
    model = net()
    pruner = Pruner(schedule=Constant(final=0.5), masking=TopKAST(exploration=0.1))
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    loss(model(batches(1)[0])).backward()
    pruner.before_step(0, 5, optimizer)
    before = [param.latent.clone() for param in pruner.params]
    optimizer.step()
    pruner.after_step()
    for param, old in zip(pruner.params, before, strict=True):
        rest = param.state["trained"] == 0
        assert rest.any() and torch.equal(param.latent[rest], old[rest])
