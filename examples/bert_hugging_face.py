"""
BERT with Hugging Face's Trainer: sparse, or with fewer heads in a folder for the hub
=====================================================================================

A small BERT from a configuration, so that nothing is downloaded. ``SparsityCallback`` is added to the Trainer that you
have. Its checkpoints resume, and ``save_model`` writes the sparse weights. Pruned heads are removed from the model,
which is saved as a folder: weights as safetensors, the removed heads as JSON, and a page. Needs the extra
``transformers``.
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pl_sparse import Pruner
from pl_sparse.export import from_pretrained, save_pretrained, shrink
from pl_sparse.integrations.hugging_face import SparsityCallback


def examples(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Sequences whose class is whether token 1 is in them."""
    tokens = torch.randint(1, 20, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row == 1).any().long()} for row in tokens]


# %%
# Movement pruning to 80 % zeros. Leave ``pruner`` out for that, give another Pruner for another method.


def make_trainer(
    folder: str, steps: int = 16, pruner: Pruner | None = None, **options: object
) -> tuple[Trainer, SparsityCallback]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **sizes))
    sparsity = SparsityCallback(pruner or Pruner(sparsity=0.8, scorer="movement", exclude=["*embeddings*"]))
    arguments = TrainingArguments(folder, max_steps=steps, save_steps=8, report_to=[], use_cpu=True, **options)
    return Trainer(model, arguments, train_dataset=examples(), callbacks=[sparsity]), sparsity


# %%
# Half of the heads. BERT's configuration has no place for a number of heads that do not fill the hidden size, so
# shrunk.json stands beside it and ``pl_sparse.export.from_pretrained`` reads it. With heads of Llama, or as many
# neurons in each layer, transformers alone loads the folder.


def without_heads(folder: str, steps: int = 16) -> dict[str, float]:
    pruner = Pruner(structure="head", scorer="taylor", allocation="uniform", sparsity=0.5)
    trainer, _ = make_trainer(folder, steps, pruner)
    trainer.train()
    model, inputs = trainer.model.eval(), {"input_ids": examples()[0]["input_ids"][None]}
    before = model(**inputs).logits.detach()
    result = shrink(model, inputs)
    plain = save_pretrained(model, result.plan, Path(folder) / "pruned", inputs)
    loaded = from_pretrained(Path(folder) / "pruned")
    error = float((loaded(**inputs).logits.detach() - before).abs().max())
    return {"before": result.before, "after": result.after, "plain": plain, "error": error}


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else "outputs/bert_hugging_face"
    trainer, sparsity = make_trainer(target)
    trainer.train()
    trainer.save_model()
    print(f"sparsity {sparsity.pruner.sparsity:.4f}")
    print(without_heads(f"{target}/heads"))
