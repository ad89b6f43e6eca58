"""
Hugging Face accelerate
=======================

The pruner is attached to the prepared model, and registered for its checkpoints.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from pl_sparse import Pruner


def main(folder: Path, start: int = 0, stop: int = 20, total: int = 20) -> tuple[nn.Module, Pruner]:
    """Train from step `start` to step `stop`. If `start` is not 0, the checkpoint in the folder is loaded first."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), 1e-2))
    pruner = Pruner(scorer="movement", sparsity=0.8)
    pruner.attach(model)
    accelerator.register_for_checkpointing(pruner)
    if start:
        accelerator.load_state(str(folder))
        pruner.apply()
    pruner.prepare(total)
    for step in range(start, stop):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
        pruner.before_step(step, optimizer=optimizer)  # before accelerator.clip_grad_norm_
        optimizer.step()
        pruner.after_step()
    accelerator.save_state(str(folder))
    return net, pruner


if __name__ == "__main__":
    _, pruner = main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/accelerate"))
    print(f"sparsity {pruner.sparsity:.4f}")
