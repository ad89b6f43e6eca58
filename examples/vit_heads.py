"""
Half of the heads of a vision transformer
=========================================

The score of a head is the change of the loss without it (Michel, Levy, Neubig, 2019). Heads are ranked over all layers,
pruned step by step during training, and removed. The attention layers that are left are smaller, not masked.
"""

from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything

from pl_sparse import Sparsity
from pl_sparse.export import load_shrunk, save_shrunk, shrink
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Digits
from pl_sparse.tasks.lr import CosineLR
from pl_sparse.tasks.models import vit_tiny

seed_everything(0, verbose=False)
data = Digits(batch_size=32)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def network():
    return vit_tiny(shape=data.shape, classes=10, dim=64, depth=3, heads=8)


# %%
# Train, and prune half of the 24 heads over the middle of training. ``allocation="global"`` ranks the heads of all
# layers together, so that a layer keeps as many as it needs.

module = Classifier(network(), 10, partial(torch.optim.AdamW, lr=1e-3), CosineLR(warmup=0.1))
sparsity = Sparsity(structure="head", scorer="taylor", allocation="global", sparsity=0.5, report=False)
trainer = Trainer(max_epochs=12, accelerator="cpu", limit_val_batches=0, callbacks=[sparsity], **quiet)
trainer.fit(module, data)

# %%
# Remove them, save the smaller network without pickle, and load it into a new one.

net, example = module.net.eval(), torch.randn(2, *data.shape)
masked = net(example)
result = shrink(net, example)
save_shrunk(net, result.plan, "outputs/vit_heads")
loaded = network()
load_shrunk(loaded, "outputs/vit_heads")

heads = [layer.self_attn.num_heads for layer in net.modules() if hasattr(layer, "self_attn")]
accuracy = trainer.test(module, data, verbose=False)[0]["test/acc"]
same = torch.allclose(loaded.eval()(example), masked, atol=1e-5)
print(f"heads by layer: {heads}, {sum(heads)} of 24; parameters {result.before:,} -> {result.after:,}")
print(f"accuracy {accuracy:.3f}; loaded anew, the outputs are those of the masked network: {same}")
