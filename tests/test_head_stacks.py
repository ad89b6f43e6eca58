"""Heads of layers that share biases by head, or have tensors of heads of their own, against attention in loops."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_sparse import Pruner, Sparsity
from pl_sparse.export import shrink
from pl_sparse.schedule import Constant
from pl_sparse.scorer import HardConcrete
from pl_sparse.structure import Head
from pl_sparse.surgery.stacks import read_alone
from pl_sparse.updater import Threshold

HEADS, SIZE, WIDTH, LENGTH, DEPTH = 4, 3, 10, 5, 2


class Layer(nn.Module):
    """Attention that adds to its scores what it is given, or has itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH)
        self.head_dim = SIZE

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)  # (batch, heads, length, size)

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        scores = self.scores(x, q, k)
        attention = (scores if bias is None else scores + bias).softmax(-1)
        return x + self.o((attention @ v).transpose(1, 2).flatten(2))


class First(Layer):
    """It has the table that all layers add, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(2 * LENGTH - 1, HEADS)


class Tempered(Layer):
    """A temperature, a bias and a projection of positions by head of its own, and a number of heads that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.all_heads = HEADS, HEADS * SIZE
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.query_bias = nn.Parameter(torch.randn(HEADS * SIZE))
        self.register_buffer("slopes", torch.rand(HEADS))
        self.positions = nn.Linear(WIDTH, HEADS * SIZE)

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + self.query_bias.view(1, self.num_heads, 1, SIZE)
        by_position = q @ self.split(self.positions(torch.eye(x.shape[1], WIDTH)[None])).mT
        assert q.transpose(1, 2).reshape(*x.shape[:2], self.all_heads).shape[2] == self.o.in_features
        return (q @ k.mT) * self.temperature + by_position - self.slopes.view(-1, 1, 1) * distances().abs()


def distances() -> Tensor:
    return torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]


class Net(nn.Module):
    """Layers of attention, with a bias by relative position from the first one, from beside them, or of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        makes: dict[str, Callable[[int], Layer]] = {
            "first": lambda index: First() if index == 0 else Layer(),
            "own": lambda index: Tempered(),
        }
        self.layers = nn.ModuleList(makes.get(kind, lambda index: Layer())(index) for index in range(DEPTH))
        self.kind = kind
        if kind == "beside":
            self.relative = nn.Linear(2 * LENGTH - 1, HEADS, bias=False)
        if kind == "buffer":
            self.register_buffer("slopes", torch.rand(HEADS, 1, 1))
        self.head = nn.Linear(WIDTH, HEADS)  # as many outputs as heads

    def bias(self) -> Tensor | None:
        if self.kind == "first":
            return self.layers[0].relative(distances() + LENGTH - 1).permute(2, 0, 1)[None]  # type: ignore[operator]
        if self.kind == "beside":
            with torch.no_grad():  # as LayoutLMv3 reads its own
                return self.relative.weight.t()[distances() + LENGTH - 1].permute(2, 0, 1)[None]
        return self.slopes * distances() if self.kind == "buffer" else None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x)


@torch.no_grad()
def in_loops(net: Net, x: Tensor, kept: list[list[int]]) -> Tensor:
    """What a net computes with some heads of each layer alone."""
    bias, distance = net.bias(), distances()
    for layer, heads in zip(net.layers, kept, strict=True):
        added = layer.o.bias.repeat(*x.shape[:2], 1)
        for h in heads:
            run = slice(h * SIZE, (h + 1) * SIZE)
            q, k, v = (x @ one.weight[run].t() + one.bias[run] for one in (layer.q, layer.k, layer.v))
            scores = q @ k.mT
            if isinstance(layer, Tempered):
                q = q + layer.query_bias[run]
                scores = q @ k.mT * layer.temperature[h] - layer.slopes[h] * distance.abs()
                scores = scores + q @ (layer.positions.weight[run, :LENGTH].t() + layer.positions.bias[run]).t()
            elif bias is not None:
                scores = scores + bias.reshape(HEADS, LENGTH, LENGTH)[h]
            added = added + scores.softmax(-1) @ v @ layer.o.weight[:, run].t()
        x = x + added
    return net.head(x)


def pruned(kind: str, example: bool, sparsity: float = 0.5, allocation: str = "uniform") -> tuple[Net, Pruner, Tensor]:
    torch.manual_seed(3)
    net, x = Net(kind).eval(), torch.randn(2, LENGTH, WIDTH)
    pruner = Pruner("magnitude", "oneshot", Head(), allocation, sparsity=sparsity)
    pruner.attach(net, x if example else None)
    pruner.prepare(1)
    pruner.before_step(0, 1)
    return net, pruner, x


def heads_kept(net: Net) -> list[list[int]]:
    return [
        [h for h in range(HEADS) if bool(layer.o.weight[:, h * SIZE : (h + 1) * SIZE].any())] for layer in net.layers
    ]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shared"), [("first", 9), ("beside", 9), ("buffer", 1), ("own", 0), ("none", 0)])
def test_layers_that_share_a_table_lose_the_same_heads_and_others_their_own(kind: str, shared: int) -> None:
    net, pruner, x = pruned(kind, example=True)
    assert len(pruner.groups) == (1 if shared else DEPTH)
    kept = heads_kept(net)
    assert all(len(heads) == 2 for heads in kept) and (len({*map(tuple, kept)}) == 1) == bool(shared)
    expected = in_loops(net, x, kept)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    plain = sum(p.numel() for p in net.parameters())
    result = shrink(net, x)
    assert not result.left
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    each = 2 * SIZE * (4 * WIDTH + 3) + (2 + 2 * SIZE * (1 + WIDTH + 1)) * (kind == "own")
    assert plain - result.after == DEPTH * each + 2 * shared * (kind != "buffer")
    if kind == "first":
        assert (table := net.layers[0].relative).embedding_dim == 2 and table.weight.shape == (9, 2)  # type: ignore[union-attr]
    if kind == "buffer":
        assert net.slopes.shape == (2, 1, 1)  # type: ignore[union-attr]
    again = copy.deepcopy(net)
    result.plan.undo(again)
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_an_example_only_what_layers_lose_together_is_removed_and_the_rest_named() -> None:
    net, pruner, x = pruned("first", example=False, sparsity=0.75)
    assert len(pruner.groups) == DEPTH
    kept = heads_kept(net)
    common = set(range(HEADS)).difference(*kept)
    assert 0 < len(common) < 3
    expected = in_loops(net, x, kept)
    result = shrink(net, x)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert net.layers[0].o.in_features == SIZE * (HEADS - len(common))  # type: ignore[union-attr]
    assert set(result.left) == {f"layers.{i}" for i in range(DEPTH)}
    assert all("lose the same heads or none" in reason for reason in result.left.values())


@pytest.mark.parametrize("learned", [False, True])
def test_a_stack_is_found_when_the_example_comes_later_and_masks_survive_a_checkpoint(learned: bool) -> None:
    def made() -> Pruner:
        if learned:
            return Pruner(HardConcrete(keep=0.5), Constant(final=1.0, every=1), Head(), updater=Threshold())
        return Pruner("magnitude", "oneshot", Head(), "uniform", sparsity=0.5)

    torch.manual_seed(0)
    net, x = Net("first"), torch.randn(2, LENGTH, WIDTH)
    pruner, other = made(), made()
    pruner.attach(net)
    assert len(pruner.groups) == DEPTH
    pruner.attach(net, x)
    assert len(pruner.groups) == 1
    pruner.prepare(1)
    pruner.before_forward()
    net(x).sum().backward()
    pruner.before_step(0, 1)
    pruner.after_step()
    other.attach(net)
    other.load_state_dict(pruner.state_dict())
    other.attach(net, x)
    assert len(other.groups) == 1
    for a, b in zip(pruner.params, other.params, strict=True):
        assert a.name == b.name and torch.equal(a.mask, b.mask)
    gates = [each.groups[0].gate for each in (pruner, other)]
    if learned:
        assert torch.equal(*(gate.value for gate in gates if gate is not None))


class Trained(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net("first")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_s_callback_finds_a_stack_in_a_training_batch() -> None:
    sparsity = Sparsity(scorer="magnitude", schedule="oneshot", structure="head", allocation="uniform", sparsity=0.5)
    module, batches = Trained(), DataLoader(torch.randn(8, LENGTH, WIDTH), 4)
    sparsity.pruner.attach(module)  # as the application does before training
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[sparsity], enable_model_summary=False, **quiet).fit(
        module, batches
    )
    assert len(sparsity.pruner.groups) == 1 and len({*map(tuple, heads_kept(module.net))}) == 1
    assert [len(heads) for heads in heads_kept(module.net)] == [2] * DEPTH


class Talking(Layer):
    """Scores of all heads are mixed before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HEADS, HEADS)

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.mix((q @ k.mT).movedim(1, -1)).movedim(-1, 1)


class Sloped(Layer):
    """Slopes that are computed of the number of heads (ALiBi) are those of other heads if some are gone."""

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
        return q @ k.mT - slopes.view(-1, 1, 1) * distances().abs()


@torch.no_grad()
@pytest.mark.parametrize("kind", [Talking, Sloped])
def test_heads_that_depend_on_each_other_stay_with_a_reason(kind: type[Layer]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(kind(), kind()).eval(), torch.randn(2, LENGTH, WIDTH)
    for layer in net:
        layer.o.weight[:, :SIZE] = 0
    before = net(x)
    result = shrink(net, x)
    assert torch.equal(net(x), before) and result.before == result.after
    assert set(result.left) == {"0", "1"} and all("without it" in reason for reason in result.left.values())


def test_what_heads_read_alone_is_found_by_gradients_and_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    net, x = Net("own"), torch.randn(2, LENGTH, WIDTH)
    before, frozen = copy.deepcopy(net.state_dict()), {n: p.requires_grad_(False) for n, p in net.named_parameters()}
    run = {*range(SIZE, 2 * SIZE)}
    expected: dict[str, Any] = {"temperature": {0: {1}}, "slopes": {0: {1}}, "query_bias": {0: run}}
    expected |= {"positions.weight": {0: run}, "positions.bias": {0: run}}
    assert read_alone(net, x, {"layers.1": [1]}) == {f"layers.1.{name}": found for name, found in expected.items()}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(dict(net.named_parameters())[name] is value and value.grad is None for name, value in frozen.items())
    assert not any(value.requires_grad for value in frozen.values())
