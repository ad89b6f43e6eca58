"""
A scorer of one's own, from a package of one's own
==================================================

The score here is a weight's magnitude divided by that of its row, so that each output keeps some inputs. The class is
registered under its name and works with every schedule, structure and allocation. An entry point makes the name known
wherever the package is installed, on the command line too.
"""

from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from pl_sparse import Sparsity, register
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.scorer import Scorer
from pl_sparse.structure import Block, Structure
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

# %%
# The scorer. ``param.values`` are the values behind the mask; higher means keep.


@register
@dataclass(frozen=True)
class RowRelative(Scorer):
    """|w_ij| / sum_k |w_ik|^power."""

    power: float = 1.0

    def score(self, param: MaskedParameter) -> Tensor:
        rows = param.values.abs().flatten(1)  # (out, inputs)
        return (rows / rows.pow(self.power).sum(1, keepdim=True).clamp_min(1e-12)).view_as(param.values)


# %%
# In the ``pyproject.toml`` of your package:
#
# .. code-block:: toml
#
#     [project.entry-points."pl_sparse.scorer"]
#     rowrelative = "my_package:RowRelative"
#
# Then ``pl-sparse train scorer=rowrelative scorer.power=0.5`` works, and ``Sparsity(scorer="rowrelative")``.

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = Digits(batch_size=64)


def train(
    scorer: str, structure: Structure | str = "unstructured", sparsity: float = 0.97
) -> tuple[float, torch.nn.Module]:
    seed_everything(0, verbose=False)
    module = Classifier(lenet300(shape=data.shape, classes=10), 10, partial(torch.optim.AdamW, lr=5e-3))
    options = {"structure": structure, "misfit": "dense", "allocation": "global", "sparsity": sparsity}
    callback = Sparsity(scorer=scorer, **options, report=False)
    trainer = Trainer(max_epochs=8, accelerator="cpu", limit_val_batches=0, callbacks=[callback], **quiet)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]["test/acc"], module.net


# %%
# Beside magnitude, ranked over all layers: how many rows have lost all of their weights.

results = {}
for name in ("magnitude", "rowrelative"):
    accuracy, net = train(name)
    empty = sum(int((layer.weight == 0).all(1).sum()) for layer in (net.fc1, net.fc2, net.fc3))
    results[name] = accuracy, empty
    print(f"{name:12} accuracy {accuracy:.3f}, rows without a weight {empty} of 410")
accuracy, _ = train("rowrelative", structure=Block(4, 4), sparsity=0.8)
print(f"in blocks of 4 x 4, at 80 %: accuracy {accuracy:.3f}")
