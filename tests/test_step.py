"""A step through the callback is the one that its definition says, to the bit, and looks at nothing twice."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.core import parameter
from pl_sparse.core.places import Places
from pl_sparse.schedule import OneShot

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.01, weight_decay=0.1),
    "asgd": lambda weights: torch.optim.ASGD(weights, 0.01),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "autocast": {"precision": "bf16-mixed"},
}


class Net(LightningModule):
    def __init__(self, optimizer: str = "momentum") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizer = optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def data() -> DataLoader[Any]:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 4)


def trained(masking: str, optimizer: str, way: dict[str, Any]) -> tuple[Net, Pruner]:
    pruner = Pruner("magnitude", OneShot(final=0.75), masking=masking)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    net = Net(optimizer)
    callbacks = [Sparsity(pruner, report=False)]
    Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **way).fit(net, data())
    return net, pruner


def by_definition(masks: dict[str, Tensor], masking: str, optimizer: str, way: dict[str, Any]) -> Net:
    """w <- mask v, and v <- optimizer(v, g), in which hard masks have lost v, and frozen ones leave it."""
    net = Net(optimizer)
    steps = net.configure_optimizers()
    weights = {name: weight for name, weight in net.named_parameters() if name in masks}
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    micro = way.get("accumulate_grad_batches", 1)
    lower = way.get("precision") == "bf16-mixed"
    for index, batch in enumerate(data()):
        for name, weight in weights.items():
            weight.data.copy_(torch.where(masks[name], values[name], 0))
        with torch.autocast("cpu", torch.bfloat16) if lower else nullcontext():
            loss = net.training_step(batch, index)
        (loss / micro).backward()
        if (index + 1) % micro:
            continue
        for name, weight in weights.items():
            if masking == "ste":
                weight.data.copy_(values[name])
            else:
                weight.grad = torch.where(masks[name], weight.grad, 0)  # type: ignore[arg-type]
        if way.get("gradient_clip_val"):
            nn.utils.clip_grad_norm_(net.parameters(), way["gradient_clip_val"])
        steps.step()
        steps.zero_grad()
        for name, weight in weights.items():
            stepped = weight.detach()
            values[name] = torch.where(masks[name], stepped, values[name]) if masking == "frozen" else stepped.clone()
    for name, weight in weights.items():
        weight.data.copy_(torch.where(masks[name], values[name], 0))
    return net


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_a_step_is_its_definition_to_the_bit(masking: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter, "_LARGE", 100)  # one of the two weights is
    for name, way in WAYS.items():
        net, pruner = trained(masking, optimizer, way)
        masks = {param.name: param.mask for param in pruner.params}
        assert pruner.step == len(data()) // way.get("accumulate_grad_batches", 1) and pruner.sparsity == 0.75
        reference = by_definition(masks, masking, optimizer, way)
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_the_model_is_looked_at_once_per_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    hold = Places.hold.fget  # type: ignore[attr-defined]

    def counted(places: Places) -> bool:
        nonlocal looks
        looks += 1
        return bool(hold(places))

    pruner, net = Pruner("magnitude", OneShot(final=0.75)), Net()
    pruner.attach(net)
    optimizer = net.configure_optimizers()
    pruner.prepare(10)
    monkeypatch.setattr(Places, "hold", property(counted))
    for step in range(3):
        net.training_step(next(iter(data())), step).backward()
        pruner.before_step(step, optimizer=optimizer)
        optimizer.step()
        pruner.after_step()
    assert looks == 3
