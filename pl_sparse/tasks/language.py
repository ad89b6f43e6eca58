"""Questions answered by a part of a text, and the next word of a text. Needs the extra `transformers`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from pl_sparse.tasks.data import InMemory, Split, shuffled
from pl_sparse.tasks.hugging_face import pretrained_from, transformers_library
from pl_sparse.tasks.text import freeze_embeddings_of

__all__ = ["CausalText", "Perplexity", "Spans", "Squad", "causal_lm", "question_answering"]


class CausalText(InMemory):
    """Text in blocks of tokens, of which each is predicted from those before it.

    `root` has train.txt and test.txt, and valid.txt if it exists, else the test part stands for it. A file is tokenized
    as one text and cut into blocks; what is left at its end is dropped. Inputs are tokens (blocks, length), labels the
    tokens that follow, (blocks, length - 1). The order of the training blocks is shuffled once, always the same way, so
    that `limit` takes a sample of them.

    Args:
        root: the folder.
        tokenizer: folder or name of the pretrained model whose tokenizer is used.
        length: tokens of a block.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: a file or the tokenizer is missing.
        ValueError: a file is shorter than a block.
    """

    def __init__(
        self, *args: Any, root: str | os.PathLike[str], tokenizer: str, length: int = 2048, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if length < 2:
            raise ValueError(f"length={length} must be 2 or more tokens")
        self.root = Path(root).expanduser()
        self.length = length
        self.shape = (length,)
        for name in ("train.txt", "test.txt"):
            if not (self.root / name).is_file():
                raise FileNotFoundError(f"data.root={self.root} has no {name}: it needs train.txt and test.txt")
        self.tokenizer = pretrained_from(transformers_library().AutoTokenizer, tokenizer)
        self.classes = len(self.tokenizer)

    def load(self) -> tuple[Split, Split, Split]:
        train, test = self._read("train.txt"), self._read("test.txt")
        val = self._read("valid.txt") if (self.root / "valid.txt").is_file() else test
        return shuffled(train), val, test

    def _read(self, name: str) -> Split:
        text = (self.root / name).read_text(encoding="utf-8")
        tokens = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        count = len(tokens) // self.length
        if not count:
            raise ValueError(f"{self.root / name} has {len(tokens)} tokens, less than a block of length={self.length}")
        x = tokens[: count * self.length].reshape(count, self.length)
        return x, x[:, 1:].clone()


class Squad(InMemory):
    """Questions with a text that holds the answer, in the format of SQuAD.

    `root` has the two JSON files; validation and test part are both `dev`. A text longer than `max_length` tokens goes
    into windows that overlap by `stride`. Inputs are tokens and token types (windows, 2, max_length), labels the first
    and last token of the first answer, (windows, 2), or 0 and 0 where the window does not have it.

    Source: Rajpurkar et al., SQuAD: 100,000+ questions for machine comprehension of text, 2016, arXiv:1606.05250.

    Args:
        root: the folder.
        tokenizer: folder or name of the pretrained model whose tokenizer is used.
        max_length: tokens of question and text together.
        stride: tokens that two windows have in common.
        train: the name of the file to train on.
        dev: the name of the other file.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: a file or the tokenizer is missing.
        ValueError: a file is of another format.
    """

    def __init__(
        self,
        *args: Any,
        root: str | os.PathLike[str],
        tokenizer: str,
        max_length: int = 384,
        stride: int = 128,
        train: str = "train-v1.1.json",
        dev: str = "dev-v1.1.json",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= stride < max_length:
            raise ValueError(f"stride={stride} must be less than max_length={max_length}, and not negative")
        self.files = [Path(root).expanduser() / name for name in (train, dev)]
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(f"data.root={root} has no {file.name}: the files are those of SQuAD")
        self.max_length, self.stride = max_length, stride
        self.classes, self.shape = max_length, (2, max_length)
        self.tokenizer = pretrained_from(transformers_library().AutoTokenizer, tokenizer)

    def load(self) -> tuple[Split, Split, Split]:
        train, dev = (self._read(file) for file in self.files)
        return shuffled(train), dev, dev

    def _read(self, file: Path) -> Split:
        try:
            rows = list(_questions(json.loads(file.read_text(encoding="utf-8"))))
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not in the format of SQuAD: {type(error).__name__}: {error}") from error
        if not rows:
            raise ValueError(f"{file} has no question with an answer")
        encoded = self.tokenizer(
            [question for question, *_ in rows],
            [text for _, text, *_ in rows],
            truncation="only_second",
            padding="max_length",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        places = [
            _place(encoded["offset_mapping"][window], encoded.sequence_ids(window), *rows[row][2:])
            for window, row in enumerate(encoded["overflow_to_sample_mapping"])
        ]
        x = torch.stack([torch.tensor(encoded["input_ids"]), torch.tensor(encoded["token_type_ids"])], dim=1)
        return x, torch.tensor(places)


def _questions(content: Any) -> Iterator[tuple[str, str, int, int]]:
    """Question, text, and the first answer's first and last character (exclusive)."""
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                if entry["answers"]:
                    answer = entry["answers"][0]
                    start = int(answer["answer_start"])
                    yield entry["question"].strip(), paragraph["context"], start, start + len(answer["text"])


def _place(offsets: list[tuple[int, int]], parts: list[int | None], start: int, end: int) -> tuple[int, int]:
    """The tokens of a window that begin and end a range of characters; 0 and 0 where it is not all there."""
    tokens = [i for i, part in enumerate(parts) if part == 1]
    if not tokens or offsets[tokens[0]][0] > start or offsets[tokens[-1]][1] < end:
        return 0, 0
    return max(i for i in tokens if offsets[i][0] <= start), min(i for i in tokens if offsets[i][1] >= end)


class Spans(Metric):
    """How well the best span, no longer than 30 tokens, agrees with the labelled one, as a mean over windows.

    In tokens, and against the first answer: the official script compares words with all answers, over all windows of a
    question.

    Args:
        exact: whether both ends have to agree; False for F1.
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count windows: logits (windows, 2, tokens), labels (windows, 2)."""
        start, end = best_spans(logits)
        first, last = labels.unbind(1)
        if self.exact:
            score = ((start == first) & (end == last)).float()
        else:
            common = (torch.minimum(end, last) - torch.maximum(start, first) + 1).clamp_min(0)
            score = 2 * common / ((end - start + 1) + (last - first + 1))
        self.total += score.sum()
        self.count += len(score)

    def compute(self) -> Tensor:
        return self.total / self.count


def best_spans(logits: Tensor, longest: int = 30) -> tuple[Tensor, Tensor]:
    """The first and last token of the span of at most `longest` tokens whose two logits have the largest sum.

    >>> best_spans(torch.tensor([[[0.0, 1.0, 3.0], [2.0, 1.5, 0.0]]]))  # the end is not before the start
    (tensor([2]), tensor([2]))
    """
    start, end = logits.float().unbind(1)
    sums = start[:, :, None] + end[:, None, :]
    allowed = torch.ones_like(sums[0], dtype=torch.bool).triu().tril(longest - 1)
    best = sums.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
    return best // logits.shape[2], best % logits.shape[2]


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of all tokens."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count tokens: logits (blocks, tokens, vocabulary), labels (blocks, tokens)."""
        flat = logits.flatten(0, 1).float()
        self.total += nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum")
        self.count += labels.numel()

    def compute(self) -> Tensor:
        return (self.total / self.count).exp()


class _Causal(nn.Module):
    """From tokens (batch, tokens) to the logits of the tokens that follow, (batch, tokens - 1, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[:, :-1]

    def reported_metrics(self) -> dict[str, Metric]:
        return {"perplexity": Perplexity()}


class _Answers(nn.Module):
    """From tokens and token types (batch, 2, tokens) to the logits of an answer's ends, (batch, 2, tokens)."""

    def __init__(self, model: nn.Module, padding: int, types: bool) -> None:
        super().__init__()
        self.model = model
        self.padding, self.types = padding, types

    def forward(self, x: Tensor) -> Tensor:
        tokens, types = x.unbind(1)
        more = {"token_type_ids": types} if self.types else {}
        out = self.model(input_ids=tokens, attention_mask=(tokens != self.padding).long(), **more)
        return torch.stack([out.start_logits, out.end_logits], dim=1)

    def reported_metrics(self) -> dict[str, Metric]:
        return {"exact": Spans(exact=True), "f1": Spans()}


def causal_lm(*, name: str, pretrained: bool = True) -> nn.Module:
    """A language model of Hugging Face, AutoModelForCausalLM, for `data=causal_text`; it reports the perplexity.

    Args:
        name: a folder, or a name on the hub (in the cache alone with HF_HUB_OFFLINE=1).
        pretrained: whether its weights are loaded; False makes new ones of the same configuration.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: there is no such model.
    """
    return _Causal(_made("AutoModelForCausalLM", name, pretrained)).train()


def question_answering(*, name: str, pretrained: bool = True, freeze_embeddings: bool = False) -> nn.Module:
    """A model of Hugging Face that finds an answer in a text, AutoModelForQuestionAnswering, for `data=squad`.

    It reports the share of exact answers and F1, as `Spans` counts them.

    Args:
        name: a folder, or a name on the hub (in the cache alone with HF_HUB_OFFLINE=1).
        pretrained: whether its weights are loaded; False makes new ones of the same configuration.
        freeze_embeddings: whether embeddings of tokens are not trained.

    Raises:
        ImportError: the extra `transformers` is missing.
        FileNotFoundError: there is no such model.
        ValueError: the model's configuration has no padding token.
    """
    model = _made("AutoModelForQuestionAnswering", name, pretrained)
    if model.config.pad_token_id is None:
        raise ValueError(f"name={name}: its config has no pad_token_id, by which texts of a batch are padded")
    if freeze_embeddings:
        freeze_embeddings_of(model)
    types = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return _Answers(model, model.config.pad_token_id, types).train()


def _made(auto: str, name: str, pretrained: bool) -> Any:
    library = transformers_library()
    kind = getattr(library, auto)
    if pretrained:
        return pretrained_from(kind, name, dtype=torch.float32)
    return kind.from_config(pretrained_from(library.AutoConfig, name))
