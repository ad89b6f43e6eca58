"""
A lottery ticket, and the control that shows what it is
=======================================================

Iterative magnitude pruning (Frankle, Carbin, 2018): train, remove a part of the smallest weights, go back to the first
weights, again and again. The weights that are left train as well as the dense network. The control has the same masks
and new random weights. If it did as well, the initial weights would not matter.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.callbacks import Rewind
from pl_sparse.schedule import Tickets
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = Digits(batch_size=64)

# %%
# Five rounds: dense, then 70 %, 90 %, 97 % and 99 % of the weights gone. ``weights="reinit"`` is the control.


def rounds(weights: str) -> list[dict[str, float]]:
    seed_everything(0, verbose=False)
    schedule = Tickets(final=0.99, sparsities=(0.7, 0.9, 0.97, 0.99), epochs=4)
    rewind = Rewind(weights, dirpath=f"outputs/lottery_ticket/{weights}")
    sparsity = Sparsity(scorer="magnitude", schedule=schedule, allocation="global", report=False)
    length = schedule.training_epochs
    trainer = Trainer(max_epochs=length, accelerator="cpu", callbacks=[sparsity, rewind], **quiet)
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    trainer.fit(Classifier(lenet300(shape=data.shape, classes=10), 10, optimizer), data)
    return rewind.rows


# %%
# The best validation accuracy of each round. tickets.csv and tickets.png are in the folder.

ticket, control = rounds("rewind"), rounds("reinit")
print("sparsity  ticket  new weights")
for ours, theirs in zip(ticket, control, strict=True):
    print(f"{1 - ours['remaining']:8.1%}  {ours['val/acc']:6.3f}  {theirs['val/acc']:11.3f}")

# %%
# At 99 % the ticket still trains, and new weights under the same masks do not.

figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for name, rows in (("ticket", ticket), ("new weights", control)):
    axes.plot([100 * row["remaining"] for row in rows], [row["val/acc"] for row in rows], marker="o", label=name)
axes.set(xscale="log", xlabel="weights left %", ylabel="validation accuracy")
axes.invert_xaxis()
axes.legend()
figure.suptitle("A lottery ticket, and new weights under its masks", size="medium")
