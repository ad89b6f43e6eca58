"""The schedule against the Trainer's clock: which optimizers step, how often, and where training ends."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.schedule import Cubic, OneShot

BATCHES = 8


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Manual(Net):
    """It steps its optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def step(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def data() -> TensorDataset:
    x = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :4].argmax(1))


def fit(module: LightningModule, *callbacks: Callback, loader: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, DataLoader(data(), 4) if loader is None else loader)
    return trainer


def zeros(module: nn.Module) -> float:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class EachBatch(Callback):
    """What is reported is true after every batch."""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert zeros(pl_module) == pytest.approx(self.sparsity.sparsity)


# What an optimizer owns


@pytest.mark.parametrize("schedule", [OneShot(final=0.75), Cubic(final=0.75, every=1)])
@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_weights_that_unfreeze_stay_masked(schedule: Any, masking: str) -> None:
    module = Net()
    sparsity = Sparsity(schedule=schedule, masking=masking, report=False)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
    fit(module, unfreeze, sparsity, EachBatch(sparsity))
    assert zeros(module) == pytest.approx(0.75)


def test_groups_that_grow_or_are_replaced_are_seen() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pruner = Pruner(sparsity=0.5)
    pruner.attach(net)
    optimizer = torch.optim.SGD(net[0].parameters(), 0.1)

    def names() -> list[str]:
        return [param.name for param in pruner.weights_of(optimizer)]

    assert names() == ["0.weight"]
    assert pruner.weights_of(optimizer) is pruner.weights_of(optimizer)  # looked up once
    optimizer.add_param_group({"params": net[1].bias})
    assert names() == ["0.weight"]
    optimizer.param_groups[1]["params"].append(net[1].weight)
    assert names() == ["0.weight", "1.weight"]
    optimizer.param_groups[0]["params"] = [net[0].bias]
    assert names() == ["1.weight"]


def test_an_optimizer_that_is_made_later() -> None:
    class Later(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)]

    module, sparsity = Later(), Sparsity(schedule=OneShot(final=0.75), report=False)
    fit(module, sparsity, EachBatch(sparsity))
    assert zeros(module) == pytest.approx(0.75)


def test_steps_that_lightning_does_not_see() -> None:
    class Direct(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.step(self.optimizers(use_pl_optimizer=False), batch)

    class Wrapped(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.step(self.optimizers(), batch)

    ended = []
    for kind in (Direct, Wrapped):
        torch.manual_seed(0)
        module, sparsity = kind(), Sparsity(sparsity=0.75, masking="srste", report=False)
        fit(module, sparsity, EachBatch(sparsity))
        assert sparsity.pruner.step == 4 * BATCHES and zeros(module) == pytest.approx(0.75)
        ended.append(module.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


@pytest.mark.parametrize("rare_first", [True, False])
def test_optimizers_that_step_at_different_rates(rare_first: bool) -> None:
    class Two(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            rare, often = self.optimizers()  # type: ignore[misc]
            if rare_first and batch_idx % 3 == 0:
                self.step(rare, batch)
            self.step(often, batch)
            if not rare_first and batch_idx % 3 == 0:
                self.step(rare, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.backbone.parameters(), 0.01), torch.optim.Adam(self.head.parameters(), 0.01)

    module, sparsity = Two(), Sparsity(sparsity=0.75, report=False)
    fit(module, sparsity, EachBatch(sparsity))
    assert sparsity.pruner.step == 4 * BATCHES and sparsity.pruner.at_target and zeros(module) == pytest.approx(0.75)


def test_closures_that_are_evaluated_often() -> None:
    class Lbfgs(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

    for masking in ("hard", "ste"):
        module, sparsity = Lbfgs(), Sparsity(sparsity=0.75, masking=masking, report=False)
        fit(module, sparsity, EachBatch(sparsity))
        assert sparsity.pruner.step == 4 * BATCHES and zeros(module) == pytest.approx(0.75)
