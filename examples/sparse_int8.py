"""
Sparse and in 8 bits: zeros of masks are zeros of integers
==========================================================

A network is pruned to 90 % and then trained with rounded weights and activations. The integer grid contains zero, so
that each pruned weight is the integer 0. The ONNX file is a quarter as large, and a compressed one smaller by the
zeros as well. Needs the extras ``export`` and ``quantize``.
"""

from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.callbacks import Quantize
from pl_sparse.export import Compressed, ONNXInt8
from pl_sparse.quantize import Int8, integers
from pl_sparse.schedule import Cubic
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = Digits(batch_size=64)
seed_everything(0, verbose=False)
folder = Path("outputs/sparse_int8")
folder.mkdir(parents=True, exist_ok=True)

# %%
# Prune over the first 60 %, round from 70 % on.

module = Classifier(lenet300(shape=data.shape, classes=10), 10)
quantization = Int8()
sparsity = Sparsity(schedule=Cubic(final=0.9, end=0.6), report=False)
trainer = Trainer(
    max_epochs=10,
    accelerator="cpu",
    limit_val_batches=0,
    callbacks=[sparsity, Quantize(quantization, begin=0.7, freeze=0.9)],
    **quiet,
)
trainer.fit(module, data)
simulated = trainer.test(module, data, verbose=False)[0]["test/acc"]

# %%
# The network with integers, its file, and how much of it is zero.

converted, example = quantization.convert(), torch.randn(2, *data.shape)
file, format = folder / "model_int8.onnx", ONNXInt8()
format.write(converted, example, file)
run = format.open(file, converted)
data.setup("test")
right = sum(int((run(x).argmax(1) == y).sum()) for x, y in data.test_dataloader()) / 360
whole = integers(converted, module.net)
zeros = {name: float((value == 0).float().mean()) for name, value in whole.items()}
quantization.release()
Compressed().write(module.net.eval(), example, folder / "model.safetensors.zst")
dense = sum(4 * weight.numel() for weight in module.net.parameters())
sizes = {"float32": dense, "int8": file.stat().st_size, "sparse": (folder / "model.safetensors.zst").stat().st_size}

print(f"accuracy {simulated:.3f} in training, {right:.3f} of the file in ONNX Runtime")
print("zeros of the integers: " + ", ".join(f"{name} {share:.1%}" for name, share in zeros.items()))
print("kB: " + ", ".join(f"{name} {size / 1e3:,.1f}" for name, size in sizes.items()))
