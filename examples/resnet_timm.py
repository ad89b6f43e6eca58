"""
A ResNet of timm, a third of its multiplications, as an ONNX file
=================================================================

Channels are pruned through all layers that they pass: residual joins, norms, the classifier. Masked channels are
removed, so that ONNX Runtime is faster without sparse kernels and without this package. Needs the extras ``timm`` and
``export``. With pictures of your own ``pl-sparse slim resnet18 --data image_folder root=pictures`` does all of it.
"""

from pathlib import Path

import timm
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn.functional import interpolate

from pl_sparse import Sparsity
from pl_sparse.callbacks import CostTarget, Distill
from pl_sparse.export import shrink
from pl_sparse.export.measure import latencies, ratio
from pl_sparse.export.onnx import open_onnx, save_onnx
from pl_sparse.network.macs import counted
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits

# %%
# The data: handwritten digits of scikit-learn, 32 x 32 pixels. Any LightningDataModule does.


class Enlarged(Digits):
    shape = (1, 32, 32)

    def load(self):
        pictures = Digits.load(Digits())
        return tuple((interpolate(x, self.shape[1:], mode="bilinear"), y) for x, y in pictures)


seed_everything(0, verbose=False)
folder = Path("outputs/resnet_timm")
folder.mkdir(parents=True, exist_ok=True)
data = Enlarged(batch_size=32)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %%
# The dense network. Yours may be trained already.

dense = timm.create_model("resnet10t", num_classes=10, in_chans=1)
module = Classifier(dense, 10)
trainer = Trainer(max_epochs=4, accelerator="cpu", limit_val_batches=0, **quiet)
trainer.fit(module, data)
accuracy_dense = trainer.test(module, data, verbose=False)[0]["test/acc"]
teacher, example = module.net.eval(), torch.randn(2, *data.shape)
teacher.requires_grad_(False)

# %%
# A copy is fine-tuned while it imitates the dense network. In the first half of this training channels are pruned, by
# their cost and their magnitude, until a third of the multiply-accumulates is left.

smaller = timm.create_model("resnet10t", num_classes=10, in_chans=1)
smaller.load_state_dict(teacher.state_dict())
module = Classifier(smaller, 10)
sparsity = Sparsity(structure="coupled", sparsity=0.9, report=False)
callbacks = [sparsity, Distill(teacher), CostTarget(macs=1 / 3)]
trainer = Trainer(max_epochs=4, accelerator="cpu", limit_val_batches=0, callbacks=callbacks, **quiet)
trainer.fit(module, data)

# %%
# The masked channels are removed. The outputs do not change; the accuracy is that of the smaller network.

masked = smaller.eval()(example)
result = shrink(smaller, example)
accuracy = trainer.test(module, data, verbose=False)[0]["test/acc"]
smaller.eval()
macs_dense, macs = counted(teacher, example).dense, counted(smaller, example).dense
error = float((smaller(example) - masked).abs().max())

# %%
# Both files in ONNX Runtime, in turns: batch 1, one thread.

runs = {}
for name, net in (("dense", teacher), ("smaller", smaller)):
    save_onnx(net, example, folder / f"{name}.onnx")
    runs[name] = open_onnx(folder / f"{name}.onnx", threads=1)
times = latencies(runs, example[:1], seconds=1.0)
speedup = ratio(times["dense"], times["smaller"])[0]

print(f"parameters  {result.before:>10,} -> {result.after:,}")
print(f"MACs        {macs_dense:>10,} -> {macs:,}")
print(f"accuracy    {accuracy_dense:>10.3f} -> {accuracy:.3f}")
print(f"{speedup:.2f}x faster; outputs differ from the masked network's by {error:.0e}")
