"""Parameters, layers and hooks that are replaced or added after pruning was set up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.core.places import Places
from pl_sparse.schedule import Cubic, OneShot

BATCHES = 6


class Net(LightningModule):
    """Does something to itself in one of its hooks, before training or in its third epoch."""

    def __init__(self, hook: str = "", change: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.change = change
        if hook:
            setattr(self, hook, self.once)
        self.changed, self.early = False, hook in ("setup", "configure_model", "on_fit_start", "on_train_start")

    def once(self, *args: Any, **kwargs: Any) -> None:
        if not self.changed and (self.early or self.trainer.current_epoch == 2):
            self.changed = True
            self.change(self)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def fit(module: LightningModule, callback: Sparsity, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 4}
    trainer = Trainer(callbacks=[callback], **(quiet | options))
    x = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 4))
    return trainer


def zeros(module: nn.Module) -> float:
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def new_weight(module: Net) -> None:
    module.net[0].weight = nn.Parameter(torch.randn(16, 8))


def new_layer(module: Net) -> None:
    module.net[2] = nn.Linear(16, 4)


def added_layer(module: Net) -> None:
    module.net.append(nn.Linear(4, 4))


def again(module: Net) -> None:
    """Optimizers of what there is now."""
    module.trainer.strategy.optimizers = [module.configure_optimizers()]


def assigned(module: Net) -> None:
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()}, assign=True)
    again(module)


def materialised(module: Net) -> None:
    fresh = copy.deepcopy(module.net).to("meta").to_empty(device="cpu")
    for weight in fresh.parameters():
        nn.init.normal_(weight)
    module.net = fresh
    again(module)


CHANGES = [new_weight, new_layer, added_layer, assigned, materialised]


@pytest.mark.filterwarnings("ignore:.*replaced or added after the optimizers were made")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"]
)
def test_what_is_replaced_is_found_again(hook: str, change: Any) -> None:
    module = Net(hook, change)
    before = {id(weight) for weight in module.parameters()}
    callback = Sparsity(sparsity=0.75, report=False)
    fit(module, callback)
    assert module.changed and not {id(weight) for weight in module.parameters()} <= before
    assert {param.weight for param in callback.pruner.params} == {w for w in module.parameters() if w.dim() > 1}
    assert zeros(module) == callback.sparsity == callback.pruner.sparsity == pytest.approx(0.75, abs=1e-2)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_what_is_replaced_before_is_what_is_pruned(hook: str) -> None:
    module, callback = Net(hook, new_layer), Sparsity(sparsity=0.75, report=False)
    fit(module, callback, max_epochs=1)
    assert module.changed and zeros(module) == callback.sparsity == pytest.approx(0.75, abs=1e-2)


@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_masks_go_over_to_a_new_weight(masking: str) -> None:
    """With an optimizer that is made anew the new weight trains, and the pruned one has left no trace."""

    def change(module: Net) -> None:
        new_weight(module)
        again(module)

    module, callback = Net("on_train_epoch_start", change), Sparsity(schedule=OneShot(final=0.75), masking=masking)
    callback.report = False
    masks = []
    module.on_train_epoch_end = lambda: masks.append(callback.pruner.params[0].mask.clone())  # type: ignore[method-assign]
    fit(module, callback)
    assert zeros(module) == callback.sparsity == 0.75
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert callback.pruner.params[0].weight is module.net[0].weight


def test_a_new_weight_that_nothing_trains_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"net\.0\.weight: replaced or added after the optimizers were made: no optimizer"
    ):
        fit(Net("on_train_epoch_start", new_weight), Sparsity(sparsity=0.75, report=False))

    def all_of_them(module: Net) -> None:
        module.net = copy.deepcopy(module.net)

    with pytest.raises(RuntimeError, match=r"net\.0\.weight, net\.2\.weight: replaced after the optimizers were made"):
        fit(Net("on_train_epoch_start", all_of_them), Sparsity(sparsity=0.75, report=False))


def test_a_pruned_layer_that_is_gone_ends_training_with_its_name() -> None:
    def narrower(module: Net) -> None:
        module.net[0], module.net[2] = nn.Linear(8, 12), nn.Linear(12, 4)
        again(module)

    begins = OneShot(final=0.75, begin=0.1)
    with pytest.raises(
        RuntimeError, match=r"net\.0\.weight, net\.2\.weight: pruned weights that are gone .* have another shape"
    ):
        fit(Net("on_train_epoch_start", narrower), Sparsity(schedule=begins, report=False))
    late = Sparsity(schedule=OneShot(final=0.75, begin=0.7), report=False)  # nothing is pruned by then
    module = Net("on_train_epoch_start", narrower)
    fit(module, late)
    assert zeros(module) == late.sparsity == 0.75


def test_a_plain_loop_finds_it_too() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    pruner = Pruner(schedule=Cubic(final=0.75, every=1))
    pruner.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(12):
        if step == 6:
            net[0].weight = nn.Parameter(torch.randn(16, 8))
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
        optimizer.zero_grad()
        net(torch.ones(2, 8)).square().sum().backward()
        pruner.before_step(step, 12, optimizer)
        optimizer.step()
        pruner.after_step(optimizer)
    assert zeros(net) == pruner.sparsity == 0.75


def test_places_see_what_is_not_where_it_was() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    places = Places(net)
    assert places.hold and net[0].weight in places and nn.Parameter(torch.ones(1)) not in places
    net[0].weight.data = torch.ones(2, 2)
    assert places.hold
    for change in (
        lambda: setattr(net[0], "weight", nn.Parameter(torch.ones(2, 2))),
        lambda: net.append(nn.ReLU()),
        lambda: net.__delitem__(2),
        lambda: net[1].register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda: setattr(net[1], "bias", None),
        lambda: setattr(net, "_modules", dict(net._modules)),
    ):
        change()
        assert not places.hold
        places = Places(net)
        assert places.hold


# Hooks


class Hooked(Net):
    """Counts the steps at which its gradients were finite once its hook had cleaned them."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for weight in self.parameters():
            weight.grad = torch.nan_to_num(weight.grad)


@pytest.mark.parametrize("kind", [Net, Hooked])
@pytest.mark.parametrize("wraps", [True, False])
def test_a_hook_of_the_module_that_is_replaced(kind: type[Net], wraps: bool) -> None:
    calls = []

    def change(module: Net) -> None:
        own = module.on_before_optimizer_step

        def hook(optimizer: Any) -> None:
            calls.append(bool(module.net[0].weight.grad[callback.pruner.params[0].mask.logical_not()].any()))
            if wraps:
                own(optimizer)

        module.on_before_optimizer_step = hook  # type: ignore[method-assign]

    module, callback = kind("on_train_epoch_start", change), Sparsity(schedule=OneShot(final=0.75), report=False)
    fit(module, callback)
    assert callback.pruner.step == 4 * BATCHES and zeros(module) == callback.sparsity == 0.75
    assert len(calls) == 2 * BATCHES and all(calls)  # it sees the gradients before they are masked
    assert "on_before_optimizer_step" in vars(module)  # what another has set stays


@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_hooks_of_an_optimizer_that_are_removed(masking: str) -> None:
    def change(module: Net) -> None:
        optimizer = module.trainer.optimizers[0]
        optimizer._optimizer_step_post_hooks.clear()
        optimizer._optimizer_step_pre_hooks = type(optimizer._optimizer_step_pre_hooks)()

    ended = []
    for hook in ("", "on_train_epoch_start"):
        module, callback = Net(hook, change), Sparsity(sparsity=0.75, masking=masking, report=False)
        trainer = fit(module, callback)
        assert module.changed == bool(hook) and callback.pruner.step == 4 * BATCHES
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
        ended.append(module.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_a_step_of_an_optimizer_that_is_wrapped(tmp_path: Path) -> None:
    def change(module: Net) -> None:
        optimizer = module.trainer.optimizers[0]
        own = optimizer.step
        optimizer.step = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]

    module, callback = Net("on_train_epoch_start", change), Sparsity(sparsity=0.75, masking="ste", report=False)
    fit(module, callback)
    assert module.changed and callback.pruner.step == 4 * BATCHES and zeros(module) == callback.sparsity == 0.75
