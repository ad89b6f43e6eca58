"""Masks of one layer at 90 % sparsity under each structure: python docs/figures/masks.py

64 outputs, 64 inputs; the scores are the same everywhere: magnitudes of a seeded random matrix, whose rows and columns
differ in scale.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from themes import Theme, draw
from torch import nn

from pl_sparse import Pruner

STRUCTURES = {
    "unstructured": "unstructured",
    "row": "row: as many in each output",
    "nm24": "nm24: 2 of 4 (50 %)",
    "nm14": "nm14: 1 of 4 (75 %)",
    "block4x4": "block4x4",
    "channel": "channel: whole outputs",
    "feature": "feature: whole inputs",
    "nm24t": "nm24t: 2 of 4, both ways",
}


def mask(structure: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    scale = torch.rand(64, 1) + 0.5
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64) * scale * (torch.rand(1, 64) + 0.5))
    sparsity = {} if structure.startswith("nm") else {"sparsity": 0.9}
    pruner = Pruner(structure=structure, allocation="uniform", schedule="oneshot", last=True, **sparsity)
    pruner.attach(model)
    pruner.prepare(1)
    pruner.before_step(0)
    return model[0].weight != 0


def picture(theme: Theme) -> plt.Figure:
    figure, rows = plt.subplots(2, 4, figsize=(10.4, 5.8), layout="constrained")
    for axes, (structure, title) in zip(rows.flat, STRUCTURES.items(), strict=True):
        axes.imshow(
            mask(structure), cmap=ListedColormap([theme.box, theme.main]), interpolation="nearest", vmin=0, vmax=1
        )
        axes.set_title(title, size=10.5)
        axes.set(xticks=[], yticks=[])
    rows[0, 0].set_ylabel("outputs")
    rows[1, 0].set_ylabel("outputs")
    for axes in rows[1]:
        axes.set_xlabel("inputs")
    return figure


if __name__ == "__main__":
    draw("masks", picture)
