"""
2:4 weights for TensorRT, checked in the file
=============================================

Two of every four neighbouring inputs are zero: the pattern of NVIDIA's sparse tensor cores. SR-STE (Zhou et al., 2021)
trains it from the start. TensorRT uses its sparse tactics only where the weights in the file have the pattern along
the axis of the product. So the ONNX file is read back and each weight is checked. Needs the extra ``export``.
"""

from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.export import TensorRT, two_four
from pl_sparse.masking import SRSTE
from pl_sparse.schedule import Constant
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = Digits(batch_size=64)
seed_everything(0, verbose=False)

# %%
# Train. The last layer keeps all weights: it has only ten outputs, and pruning costs most accuracy there.

module = Classifier(lenet300(shape=data.shape, classes=10), 10)
schedule = Constant(final=0.5, every=1)
sparsity = Sparsity(
    schedule=schedule, structure="nm24", allocation="uniform", masking=SRSTE(), exclude=["net.fc3"], report=False
)
trainer = Trainer(max_epochs=8, accelerator="cpu", limit_val_batches=0, callbacks=[sparsity], **quiet)
trainer.fit(module, data)
accuracy = trainer.test(module, data, verbose=False)[0]["test/acc"]

# %%
# Write the file and check it. On a machine with TensorRT:
# ``trtexec --onnx=outputs/two_four.onnx --fp16 --sparsity=enable``.

path, example = Path("outputs/two_four.onnx"), torch.randn(2, *data.shape)
path.parent.mkdir(exist_ok=True)
for note in TensorRT().write(module.net.eval(), example, path):
    print(note)
fit, unfit = two_four(path)
print(f"accuracy {accuracy:.3f}; 2:4 in the file: {', '.join(fit)}")
for name, reason in unfit.items():
    print(f"{name} is not: {reason}")
