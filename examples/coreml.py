"""
A sparse network for Core ML
============================

Core ML stores one bit per weight and the nonzero values in float16. coremltools converts on Linux. Predictions need an
Apple device, so the package is read back and compared with the network weight by weight. Needs the extra
``coreml``; without it the example ends with a line that names the extra.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.export import CoreML
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.models import lenet300

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %%
# Train to 90 % zeros. Above 75 % the sparse form is the smaller one.

notes: list[str] = []
if find_spec("coremltools") is None:
    print("coremltools is not installed: pip install 'pl_sparse[coreml]'")
else:
    seed_everything(0, verbose=False)
    data = Digits(batch_size=64)
    module = Classifier(lenet300(shape=data.shape, classes=10), 10)
    callbacks = [Sparsity(sparsity=0.9, report=False)]
    trainer = Trainer(max_epochs=8, accelerator="cpu", limit_val_batches=0, callbacks=callbacks, **quiet)
    trainer.fit(module, data)
    accuracy = trainer.test(module, data, verbose=False)[0]["test/acc"]

    # %%
    # Convert, and read back.

    path = Path("outputs/coreml.mlpackage.zip")
    path.parent.mkdir(exist_ok=True)
    notes = CoreML().write(module.net.eval(), torch.randn(1, *data.shape), path)
    print(f"accuracy {accuracy:.3f}, {path.stat().st_size / 1e3:,.1f} kB")
    print("\n".join(notes))
