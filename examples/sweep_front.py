"""
Accuracy against sparsity from one training, and which model to take
====================================================================

A staircase rests on each level and saves the model there: one run gives the whole front. ``pl-sparse pareto`` draws it,
beside other runs, and names the sparsest model that loses no more than a point. On the command line:
``pl-sparse train front=true schedule=staircase levels=[0.5,0.8,0.9,0.95]``.
"""

import csv
import json
import sys
from pathlib import Path
from unittest.mock import patch

from pl_sparse.app.cli import main


def command(*arguments: str) -> None:
    """``pl-sparse`` in this process."""
    with patch.object(sys, "argv", ["pl-sparse", *arguments]):
        main()


# %%
# Two runs, each of them a curve: weights ranked by magnitude, and at random.

folder = Path("outputs/sweep_front").resolve()
levels = ["front=true", "schedule=staircase", "levels=[0.5,0.8,0.9,0.95]", "sparsity=0.95"]
for scorer in ("magnitude", "random"):
    more = [f"scorer={scorer}", f"output_dir={folder / scorer}", "overwrite=true", "trainer.max_epochs=16"]
    command("train", "data=digits", "model=lenet300", *levels, *more)

# %%
# The front: pareto.html, .png, .csv, .json.

command("pareto", str(folder))
fronts = {scorer: json.loads((folder / scorer / "front.json").read_text()) for scorer in ("magnitude", "random")}
for scorer, rows in fronts.items():
    print(f"{scorer:10}" + "  ".join(f"{row['sparsity']:.0%} {row['val/acc']:.3f}" for row in rows))
with (folder / "pareto.csv").open() as file:
    table = list(csv.DictReader(file))
print(f"{len(table)} models in {folder / 'pareto.csv'}")
