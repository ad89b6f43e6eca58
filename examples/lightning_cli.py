"""
LightningCLI
============

The settings of Sparsity as flags, or in YAML.

.. code-block:: text

    python examples/lightning_cli.py fit --trainer.callbacks+=pl_sparse.Sparsity --trainer.callbacks.sparsity=0.8
"""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
        self.lr = lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 16)


if __name__ == "__main__":
    LightningCLI(Net, save_config_kwargs={"overwrite": True})
