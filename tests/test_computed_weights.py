"""Weights that other code than their layer computes others from: their zeros have to be zeros of those."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.network.computed import ComputedWeights

Use = Callable[[nn.Module, Tensor], Tensor]


def standardised(weight: Tensor) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    return (weight - weight.mean(dims, keepdim=True)) / (weight.std(dims, keepdim=True) + 1e-5)


class Net(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self, use: Use, outputs: int = 6) -> None:
        super().__init__()
        self.use = use
        self.layer = nn.Linear(6, outputs)
        self.gain = nn.Parameter(torch.rand(outputs, 1) + 0.5)
        self.low = nn.ParameterList([nn.Parameter(torch.randn(outputs, 2)), nn.Parameter(torch.randn(2, 6))])
        self.register_buffer("noise", torch.randn(outputs, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def lost(use: Use, outputs: int = 6) -> list[str]:
    torch.manual_seed(0)
    net = Net(use, outputs)
    with ComputedWeights({"layer.weight": net.layer.weight}, net) as computed:
        net(torch.randn(4, 6))
    return computed.lost()


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    weight = net.layer.weight * net.gain
    weight.sub_(1)
    return F.linear(x, weight)


def written_later(net: nn.Module, x: Tensor) -> Tensor:
    weight = net.layer.weight.detach() * net.gain.detach()
    out = x @ weight.t()
    weight.fill_(1)
    return out


LOSING: dict[str, Use] = {
    "standardised": lambda net, x: F.linear(x, standardised(net.layer.weight)),
    "turned": lambda net, x: x @ standardised(net.layer.weight).t(),
    "centred in parts": lambda net, x: F.linear(x, torch.cat([p - p.mean() for p in net.layer.weight.chunk(2)])),
    "a softmax": lambda net, x: F.linear(x, net.layer.weight.softmax(1)),
    "merged": lambda net, x: F.linear(x, net.layer.weight + net.low[0] @ net.low[1]),
    "beside a sparse matrix": lambda net, x: F.linear(torch.eye(4).to_sparse() @ x, standardised(net.layer.weight)),
    "an einsum": lambda net, x: torch.einsum("bi,oi->bo", x, standardised(net.layer.weight)),
}
KEEPING: dict[str, Use] = {
    "called": lambda net, x: net.layer(x),
    "read": lambda net, x: F.linear(x, net.layer.weight),
    "scaled": lambda net, x: F.linear(x, net.layer.weight * net.gain),
    "scaled and turned": lambda net, x: x @ (net.layer.weight * net.gain).t(),
    "divided by norms": lambda net, x: F.linear(x, F.normalize(net.layer.weight, dim=1)),
    "cast": lambda net, x: F.linear(x.double(), net.layer.weight.double()).float(),
    "a view": lambda net, x: F.linear(x, net.layer.weight.view(-1).contiguous().view_as(net.layer.weight)),
    "squared": lambda net, x: F.linear(x, net.layer.weight.square().contiguous()),
    "both": lambda net, x: net.layer(x) + F.linear(x, standardised(net.layer.weight)),
    "of another shape": lambda net, x: F.linear(x, standardised(torch.cat([net.layer.weight] * 2))),
    "with noise": lambda net, x: F.linear(x, net.layer.weight + net.noise),  # which evaluation may leave out
    "random": lambda net, x: F.linear(x, net.layer.weight + torch.randn_like(net.layer.weight)),
    "by a sparse matrix": lambda net, x: (torch.eye(4).to_sparse() @ x) @ (net.layer.weight * net.gain).t(),
    "for each sample": lambda net, x: torch.vmap(lambda each: standardised(net.layer.weight) @ each)(x),
    "written to later": written_later,
    "written to": in_place,  # is not followed
    "regularized": lambda net, x: net.layer(x) + (net.layer.weight @ net.layer.weight.t() - 1).square().mean(),
}


@pytest.mark.parametrize("outputs", [6, 4])
@pytest.mark.parametrize("use", LOSING.values(), ids=LOSING)
def test_weights_whose_zeros_are_lost(use: Use, outputs: int) -> None:
    assert lost(use, outputs) == ["layer.weight"]


@pytest.mark.parametrize("use", KEEPING.values(), ids=KEEPING)
def test_weights_whose_zeros_stay(use: Use) -> None:
    assert lost(use) == []


def test_weights_that_share_their_memory_are_told_apart() -> None:
    net = Net(lambda net, x: F.linear(F.linear(x, standardised(net.layer.weight)), net.other))
    both = torch.randn(2, 6, 6)
    net.layer.weight, net.other = nn.Parameter(both[0]), nn.Parameter(both[1])
    with ComputedWeights({"layer.weight": net.layer.weight, "other": net.other}, net) as computed:
        net(torch.randn(4, 6))
    assert computed.lost() == ["layer.weight"]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, standardised(self.body.weight), self.body.bias)
        logits: Tensor = self.head(out.relu().mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_of(sparsity: Sparsity) -> Trainer:
    return Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[sparsity], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_they_are_refused_before_the_first_step() -> None:
    """Such a convolution was reported as pruned, while the model multiplied with no zeros."""
    data = DataLoader(TensorDataset(torch.randn(8, 3, 5, 5)), 4)
    module = Module()
    before = module.body.weight.detach().clone()
    trainer = trainer_of(Sparsity(sparsity=0.5, allocation="uniform", report=False))
    with pytest.raises(ValueError, match=r"body.weight: the model multiplies .* exclude=\['body.weight'\]"):
        trainer.fit(module, data)
    assert trainer.global_step == 0 and torch.equal(module.body.weight, before)
    sparsity = Sparsity(sparsity=0.5, allocation="uniform", report=False, exclude=["body.weight"])
    trainer_of(sparsity).fit(Module(), data)
    assert [param.name for param in sparsity.pruner.params] == ["head.weight"] and sparsity.pruner.at_target


REFUSED = r"body.weight: the model multiplies .* exclude=\['body.weight'\]"


def prepared(module: nn.Module, **options: object) -> Pruner:
    pruner = Pruner(sparsity=0.5, allocation="uniform", **options)  # type: ignore[arg-type]
    pruner.attach(module)
    pruner.prepare(4)
    return pruner


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_a_plain_loop_refuses_them_at_the_first_call() -> None:
    """It trained them, and reported a sparsity that what multiplies inputs did not have."""
    module, images = Module(), torch.randn(4, 3, 5, 5)
    prepared(module)
    with pytest.raises(ValueError, match=REFUSED):
        module(images)
    assert hooks(module) == 0
    other = Module()
    prepared(other, exclude=["body.weight"])
    other(images)
    assert hooks(other) == 0


def test_fabric_accelerate_and_others_wrap_the_model_that_is_watched() -> None:
    module = Module()
    prepared(module)
    with pytest.raises(ValueError, match=REFUSED):
        nn.Sequential(module)(torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("another", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_the_model_is_not_watched(another: Callable[[nn.Module], nn.Module]) -> None:
    module = Module()
    pruner = prepared(module)
    twin = another(module)
    twin(torch.randn(4, 3, 5, 5))
    pruner.prepare(4)
    with pytest.raises(ValueError, match=REFUSED):
        module(torch.randn(4, 3, 5, 5))


def test_after_a_call_that_fails_the_next_is_watched() -> None:
    module = Module()
    prepared(module)
    with pytest.raises(RuntimeError, match="channels"):
        module(torch.randn(4, 2, 5, 5))
    assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=REFUSED):
        module(torch.randn(4, 3, 5, 5))


def test_a_compiled_call_is_traced_as_one_graph() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    prepared(module)
    call = torch.compile(module, backend="eager", fullgraph=True)
    assert call(torch.randn(4, 6)).shape == (4, 2)
