"""Sentences, and a tiny transformer that is pruned on them."""

import sys
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn

from pl_sparse.app.finished import load_run
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.export import TokenMap, load_shrunk
from pl_sparse.tasks.text import MovieReviews, transformer

transformers = pytest.importorskip("transformers")

# transformers imports torchao where it is installed, which has such strings in its source.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")

WORDS = ["a", "the", "film", "is", "was", "good", "bad", "fine", "dull", "and", "plot", "actors"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    generator = torch.Generator().manual_seed(0)
    for name, tone in (("neg", ("bad", "dull")), ("pos", ("good", "fine"))):
        lines = []
        for _ in range(60):
            words = [WORDS[i] for i in torch.randint(0, 5, (6,), generator=generator)]
            lines.append(" ".join([*words, tone[int(torch.randint(0, 2, (), generator=generator))]]))
        (folder / f"rt-polarity.{name}").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder


def test_sentences_are_tokens_cut_and_padded(reviews: Path, pretrained: Path) -> None:
    data = MovieReviews(root=reviews, tokenizer=str(pretrained), max_length=6)
    assert data.encode(["the film is good", "bad", "the plot was dull and the actors"]).tolist() == [
        [2, 6, 7, 8, 10, 3],
        [2, 11, 3, 0, 0, 0],
        [2, 6, 15, 9, 13, 3],
    ]
    splits = data.load()
    assert [x.shape for x, _ in splits] == [(96, 6), (12, 6), (12, 6)]
    assert [int(y.sum()) for _, y in splits] == [48, 6, 6] and len(set(splits[0][1][:12].tolist())) == 2
    again = MovieReviews(root=reviews, tokenizer=str(pretrained), max_length=6, seed=5).load()
    assert all(torch.equal(a, b) for one, two in zip(splits, again, strict=True) for a, b in zip(one, two, strict=True))


def test_padding_changes_nothing(pretrained: Path) -> None:
    model = transformer(path=str(pretrained), classes=2).eval()
    tokens = torch.tensor([[2, 6, 7, 3]])
    torch.testing.assert_close(model(nn.functional.pad(tokens, (0, 5))), model(tokens))
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and all("embeddings.weight" in name for name in frozen) and "model.classifier.weight" not in frozen
    free = transformer(path=str(pretrained), classes=3, freeze_embeddings=False)
    assert all(value.requires_grad for value in free.parameters()) and free(tokens).shape == (1, 3)


def config(folder: Path, reviews: Path, pretrained: Path, *overrides: str) -> DictConfig:
    given = [f"data.root={reviews}", f"model.path={pretrained}", f"output_dir={folder}", "data.max_length=12"]
    short = ["trainer.enable_progress_bar=false", "trainer.max_epochs=8", "optimizer.lr=0.003", "data.batch_size=8"]
    with composition():
        return hydra.compose("train", ["experiment=movie_reviews_movement", *given, *short, *overrides])


@pytest.mark.parametrize(
    ("overrides", "sparsity"),
    [
        (["sparsity=0.8"], 0.8),
        (["sparsity=0.5", "structure=block4x4"], 0.5),
        (["sparsity=0.5", "structure=hybrid", "structure.h=8", "structure.w=4", "include=null"], 0.5),
        (["sparsity=0.5", "structure=head", "include=null"], 0.5),
    ],
)
def test_a_transformer_is_pruned_while_it_learns(
    tmp_path: Path, reviews: Path, pretrained: Path, overrides: list[str], sparsity: float
) -> None:
    metrics = train(config(tmp_path, reviews, pretrained, *overrides))
    assert metrics["sparsity"] == pytest.approx(sparsity, abs=1e-3) and metrics["scorer"] == "movement"
    assert metrics["test/acc"] > 0.9
    saved = load_file(tmp_path / "model.safetensors")
    start = load_file(pretrained / "model.safetensors")
    assert torch.equal(
        saved["model.bert.embeddings.word_embeddings.weight"], start["bert.embeddings.word_embeddings.weight"]
    )
    zeros = {name for name, value in saved.items() if value.dim() == 2 and bool((value == 0).any())}
    zeros -= {"model.bert.embeddings.word_embeddings.weight"}  # padding is zero
    assert zeros and all(".encoder." in name for name in zeros)
    transformer(path=str(pretrained), classes=2).load_state_dict(saved)


def test_a_dense_run_teaches_a_sparse_one(tmp_path: Path, reviews: Path, pretrained: Path) -> None:
    train(config(tmp_path / "dense", reviews, pretrained, "method=dense"))
    teacher = ["distill=teacher", f"distill.teacher={tmp_path / 'dense'}", "sparsity=0.7"]
    metrics = train(config(tmp_path / "sparse", reviews, pretrained, *teacher))
    assert (
        metrics["test/acc"] > 0.9
        and metrics["sparsity"] == pytest.approx(0.7, abs=1e-3)
        and metrics["train/distillation"] < 1
    )


def test_what_is_missing_is_told(
    tmp_path: Path, reviews: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no rt-polarity.neg: it is in the sentence polarity dataset"):
        train(config(tmp_path, tmp_path, pretrained))
    with pytest.raises(ConfigError, match="not a folder of a pretrained model"):
        train(config(tmp_path, reviews, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no pretrained model can be read"):
        train(config(tmp_path, reviews, reviews))
    cfg = config(tmp_path, reviews, pretrained)
    OmegaConf.update(cfg, "include", ["*.decoder.*"])
    with pytest.raises(ConfigError, match=r"matches no prunable weight"):
        train(cfg)
    with pytest.raises(ConfigError, match="max_length=2"):
        train(config(tmp_path, reviews, pretrained, "data.max_length=2"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'pl_sparse\[transformers\]'"):
        transformer(path=str(pretrained), classes=2)


def test_whole_layers_go_by_the_command(tmp_path: Path, reviews: Path, pretrained: Path) -> None:
    """Half of the layers are masked in training; the export for the hub has one layer, and the same answers."""
    chosen = ["method=gmp", "structure=layer", "allocation=global", "sparsity=0.5", "export=[hugging_face]"]
    metrics = train(config(tmp_path, reviews, pretrained, *chosen, "trainer.max_epochs=4", "export_measure=false"))
    assert metrics["sparsity"] == pytest.approx(0.5, abs=1e-3) and metrics["structure"] == "layer"
    masked, data, _ = load_run(tmp_path)
    smaller = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "hugging_face").eval()
    assert smaller.config.num_hidden_layers == len(smaller.bert.encoder.layer) == 1
    data.setup("test")
    x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        logits = masked.net(x)
        torch.testing.assert_close(
            smaller(input_ids=x, attention_mask=(x != 0).long()).logits, logits, rtol=1e-4, atol=1e-4
        )
    assert float((logits.argmax(1) == y).float().mean()) == pytest.approx(metrics["test/acc"])


def test_tokens_that_never_occur_go_by_the_command(tmp_path: Path, reviews: Path, pretrained: Path) -> None:
    once = ["scorer=occurrence", "schedule=oneshot", "schedule.begin=1.0", "schedule.final=1.0", "sparsity=1.0"]
    chosen = [
        "method=gmp",
        "structure=vocabulary",
        "include=null",
        *once,
        "trainer.max_epochs=2",
        "model.freeze_embeddings=false",
    ]
    metrics = train(config(tmp_path, reviews, pretrained, *chosen))
    masked, data, _ = load_run(tmp_path)
    data.setup("fit")
    tokens, seen = TokenMap.load(tmp_path / "shrunk"), {int(i) for x, _ in data.train_dataloader() for i in x.unique()}
    assert set(tokens.kept) >= seen and tokens.size == 17 > len(tokens.kept)
    smaller = transformer(path=str(pretrained), classes=2)
    load_shrunk(smaller, tmp_path / "shrunk")
    assert smaller.model.bert.embeddings.word_embeddings.num_embeddings == len(tokens.kept)
    x = next(iter(data.train_dataloader()))[0]
    with torch.no_grad():
        torch.testing.assert_close(smaller.eval()(tokens(x)), masked.net(x), rtol=1e-4, atol=1e-4)
    assert metrics["sparsity"] == pytest.approx(1 - (len(tokens.kept) - 1) / tokens.size)  # padding is zero, and stays
