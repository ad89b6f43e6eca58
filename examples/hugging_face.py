"""
BERT with the Trainer of Hugging Face
=====================================

A small BERT from a configuration, trained to 80 % sparsity by Hugging Face's Trainer: no download is needed.
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pl_sparse.integrations.hugging_face import SparsityCallback


def examples(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Sequences whose class is whether token 1 is in them."""
    tokens = torch.randint(1, 20, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row == 1).any().long()} for row in tokens]


def make_trainer(folder: str, steps: int = 16, **options: object) -> tuple[Trainer, SparsityCallback]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **sizes))
    sparsity = SparsityCallback(sparsity=0.8, scorer="movement", exclude=["*embeddings*"])
    arguments = TrainingArguments(folder, max_steps=steps, save_steps=8, report_to=[], use_cpu=True, **options)
    return Trainer(model, arguments, train_dataset=examples(), callbacks=[sparsity]), sparsity


if __name__ == "__main__":
    trainer, sparsity = make_trainer(sys.argv[1] if len(sys.argv) > 1 else "outputs/hugging_face")
    trainer.train()
    trainer.save_model()
    print(f"sparsity {sparsity.pruner.sparsity:.4f}")
