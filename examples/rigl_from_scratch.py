"""
Sparse from the first step: RigL beside a mask that never changes
=================================================================

Both networks keep 2 % of the weights at every step. Every ten steps RigL (Evci et al., 2020) drops the smallest weights
and grows those with the largest gradients, so that weights move to where they are useful. A static mask stays.
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.schedule import Constant
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300
from pl_sparse.updater import DropGrow, Prune

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = Digits(batch_size=64)


class Watch(Callback):
    """The sparsity in every step, and which weights were ever in use."""

    def __init__(self) -> None:
        self.levels: set[float] = set()
        self.seen: torch.Tensor | None = None
        self.last: torch.Tensor | None = None

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        mask = torch.cat([param.mask.flatten() for param in Sparsity.of(trainer).pruner.params])
        self.levels.add(round(1 - float(mask.float().mean()), 3))
        self.last, self.seen = mask, mask if self.seen is None else self.seen | mask


def train(updater) -> tuple[float, Watch]:
    seed_everything(0, verbose=False)
    schedule = Constant(final=0.98, end=0.75, every="10 steps")
    scorer = "magnitude" if isinstance(updater, DropGrow) else "random"
    sparsity, watch = Sparsity(scorer=scorer, schedule=schedule, updater=updater, report=False), Watch()
    module = Classifier(lenet300(shape=data.shape, classes=10), 10)
    trainer = Trainer(max_epochs=20, accelerator="cpu", limit_val_batches=0, callbacks=[sparsity, watch], **quiet)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]["test/acc"], watch


# %%
# The same number of weights at each step, but RigL tried more of them.

rigl, watch_rigl = train(DropGrow())
static, watch_static = train(Prune())
for name, accuracy, watch in (("RigL", rigl, watch_rigl), ("static", static, watch_static)):
    used = float(watch.seen.float().mean())
    print(
        f"{name:6}  accuracy {accuracy:.3f}, sparsity {sorted(watch.levels)}, weights that were ever in use {used:.1%}"
    )

# %%
# How many weights of the first layer each pixel of a digit keeps. RigL moves them from the left and right
# borders, which are mostly empty, towards the middle.

figure, pictures = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
for axes, name, watch in zip(pictures, ("RigL", "static"), (watch_rigl, watch_static), strict=True):
    pixels = watch.last[: 300 * 64].view(300, 8, 8).sum(0)
    drawn = axes.imshow(pixels, vmin=0, vmax=24)
    axes.set(title=name, xticks=[], yticks=[])
figure.colorbar(drawn, ax=pictures, label="weights of a pixel")
figure.suptitle("Weights that each pixel keeps", size="medium")
