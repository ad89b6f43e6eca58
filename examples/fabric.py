"""
Lightning Fabric
================

The pruner is attached to the model, and its state is saved beside it by ``fabric.save``.
"""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from pl_sparse import Pruner


def main(folder: Path, total: int = 20) -> Pruner:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 1e-2))
    pruner = Pruner(sparsity=0.8)
    pruner.attach(model)  # names are those of `net`
    pruner.prepare(total)
    for step in range(total):
        x = torch.randn(32, 16, device=fabric.device)
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
        pruner.before_step(step, optimizer=optimizer)  # before fabric.clip_gradients
        optimizer.step()
        pruner.after_step()
    fabric.save(folder / "state.ckpt", {"model": model, "optimizer": optimizer, "pruner": pruner.state_dict()})
    return pruner


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/fabric")
    target.mkdir(parents=True, exist_ok=True)
    print(f"sparsity {main(target).sparsity:.4f}")
