"""Sentences to classify, and pretrained transformers that classify them. Needs the extra `transformers`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.tasks.data import InMemory, Split, hold_out, shuffled
from pl_sparse.tasks.hugging_face import pretrained_from, transformers_library

__all__ = ["MovieReviews", "freeze_embeddings_of", "sentences", "transformer"]


class MovieReviews(InMemory):
    """Sentences of film reviews, 5,331 positive and 5,331 negative: 8,530 to train, 1,066 to validate, 1,066 to test.

    `root` has one sentence per line in rt-polarity.pos and rt-polarity.neg. They are tokenized once, cut or padded to
    `max_length` tokens: inputs are token numbers (batch, max_length). The split is always the same, with as many of
    each class in every part.

    Source: Pang, Lee, Seeing stars: exploiting class relationships for sentiment categorization with respect to rating
    scales, 2005, arXiv:cs/0506075.

    Args:
        root: the folder with the two files.
        tokenizer: folder or name of the pretrained model whose tokenizer is used; it must be that of the model.
        max_length: tokens of a sentence.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: a file or the tokenizer is missing.
    """

    classes = 2

    def __init__(
        self, *args: Any, root: str | os.PathLike[str], tokenizer: str, max_length: int = 48, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if max_length < 3:
            raise ValueError(f"max_length={max_length} must be at least 3: a sentence and its two marks")
        self.root = Path(root).expanduser()
        self.files = [self.root / name for name in ("rt-polarity.neg", "rt-polarity.pos")]
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"data.root={self.root} has no {file.name}: it is in the sentence polarity dataset v1.0 of "
                    "https://www.cs.cornell.edu/people/pabo/movie-review-data/"
                )
        self.max_length = max_length
        self.shape = (max_length,)
        self.tokenizer = pretrained_from(transformers_library().AutoTokenizer, tokenizer)

    def load(self) -> tuple[Split, Split, Split]:
        parts: list[list[Split]] = [[], [], []]
        for label, file in enumerate(self.files):
            lines = [line.strip() for line in file.read_text(encoding="latin-1").splitlines() if line.strip()]
            if len(lines) < 3:
                raise ValueError(f"{file} has {len(lines)} sentences: it needs one per line, at least 3")
            x = self.encode(lines)
            y = torch.full((len(x),), label)
            tenth = max(len(x) // 10, 1)
            rest, test = hold_out(x, y, tenth)
            train, val = hold_out(*rest, tenth)
            for part, split in zip(parts, (train, val, test), strict=True):
                part.append(split)
        train, val, test = ((torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) for part in parts)
        return shuffled(train), val, test

    def encode(self, sentences: list[str]) -> Tensor:
        """The tokens of sentences, (sentences, max_length)."""
        encoded = self.tokenizer(
            sentences, truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt"
        )
        tokens: Tensor = encoded["input_ids"]
        return tokens


class _Sentences(nn.Module):
    """From token numbers, padded, to logits."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=(tokens != self.padding).long()).logits
        return logits


def transformer(*, path: str, classes: int, freeze_embeddings: bool = True) -> nn.Module:
    """A pretrained transformer with a head that classifies sentences: AutoModelForSequenceClassification.

    Args:
        path: a folder, or a name on the Hugging Face hub (in the cache alone with HF_HUB_OFFLINE=1).
        freeze_embeddings: whether embeddings are not trained, as in movement pruning; they are not pruned anyway.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: there is no such model.
        ValueError: the model's configuration has no padding token.
    """
    auto = transformers_library().AutoModelForSequenceClassification
    model = pretrained_from(auto, path, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32)
    if freeze_embeddings:
        freeze_embeddings_of(model)
    return sentences(model, path)


def freeze_embeddings_of(model: nn.Module) -> None:
    """Leave the embeddings of a model as they are in training."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def sentences(model: Any, path: str) -> nn.Module:
    """A model that takes token numbers, padded, in training mode; from_pretrained gives it in evaluation mode.

    Args:
        model: for sequence classification.
        path: where it is from, for the message.

    Raises:
        ValueError: its configuration has no padding token.
    """
    if model.config.pad_token_id is None:
        raise ValueError(f"path={path}: its config has no pad_token_id, by which sentences of a batch are padded")
    return _Sentences(model, model.config.pad_token_id).train()
