"""
A plain training loop
=====================

A plain training loop to 80 % sparsity, with a checkpoint half way, from which it resumes exactly.
"""

import io

import torch
from torch import nn

from pl_sparse import Pruner


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: range, total: int) -> None:
    pruner.attach(model)
    pruner.prepare(total)
    for step in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        pruner.before_step(step, optimizer=optimizer)
        optimizer.step()
        pruner.after_step()


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    return model, torch.optim.Adam(model.parameters(), 1e-2), Pruner(scorer="movement", sparsity=0.8)


def main(total: int = 40) -> tuple[nn.Module, nn.Module, Pruner]:
    """Train once without interruption, and once with."""
    whole, optimizer, pruner = parts()
    train(whole, optimizer, pruner, range(total), total)

    interrupted = parts()
    train(*interrupted, range(total // 2), total)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in interrupted], file)

    model, optimizer, pruner = resumed = parts()
    file.seek(0)
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(model, optimizer, pruner, range(total // 2, total), total)
    return whole, model, pruner


if __name__ == "__main__":
    whole, resumed, pruner = main()
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"sparsity {pruner.sparsity:.4f}, resumed exactly: {same}")
