"""Batches of any kind: what `training_step` calls the module with is what channels are followed through."""

import dataclasses
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_sparse import Sparsity
from pl_sparse.callbacks.calibration import example_of
from pl_sparse.schedule import OneShot


@dataclasses.dataclass
class Graph:
    nodes: Tensor
    weights: Tensor
    target: Tensor | None = None


class Steps(LightningModule):
    """Two layers, and a step that takes a batch apart in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class OfDataclass(Steps):
    def training_step(self, batch: Graph) -> Tensor:
        return (self(batch.nodes * batch.weights) - batch.target).square().mean()


class Whole(Steps):
    def forward(self, graph: Graph) -> Tensor:
        return super().forward(graph.nodes * graph.weights)

    def training_step(self, batch: Graph) -> Tensor:
        return (self(batch) - batch.target).square().mean()


class OfLengths(Steps):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(x.shape[1]) < lengths.unsqueeze(1)  # (batch, length)
        return self.last((self.first(x).relu() * there.unsqueeze(2)).sum(1))

    def training_step(self, batch: Any) -> Tensor:
        x, lengths, y = batch
        return (self(x, lengths=lengths) - y).square().mean()


class OfNested(Steps):
    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return (self(batch["inputs"]["features"]["x"]) - batch["y"]).square().mean()


def batch_of(kind: str) -> Any:
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    if kind in ("dataclass", "whole"):
        return Graph(x, torch.rand(4, 1), y)
    if kind == "lengths":
        return torch.randn(4, 5, 6), torch.tensor([5, 3, 1, 4]), y
    return {"inputs": {"features": {"x": x}, "ids": torch.arange(4)}, "y": y}


@pytest.mark.parametrize(
    ("kind", "module"),
    [("dataclass", OfDataclass), ("whole", Whole), ("lengths", OfLengths), ("nested", OfNested)],
)
def test_batches_as_the_training_step_uses_them(kind: str, module: type[Steps]) -> None:
    torch.manual_seed(0)
    net = module()
    callback = Sparsity(schedule=OneShot(final=0.5, begin=0.0), structure="coupled", allocation="uniform", report=False)
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader([batch_of(kind)] * 2, batch_size=None)
    trainer.fit(net, loader)
    assert callback.pruner.sparsity == 0.5 and "first.weight" in [param.name for param in callback.pruner.params]
    assert int(net.first.weight.any(1).sum()) == 4 and int(net.first.bias.count_nonzero()) <= 4
    example = example_of(trainer, net)
    if kind == "lengths":
        assert [tuple(part.shape) for part in example.values()] == [(2, 5, 6), (2,)]
    elif kind == "whole":
        assert example.nodes.shape == (2, 6) and example.target.shape == (2, 3)
