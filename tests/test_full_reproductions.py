"""The experiments for machines that we do not have, on stand-in data: composed, and started for ten steps."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from pl_sparse.app.hydra_api import composition, instantiate
from pl_sparse.app.settings import CONF, ConfigError
from pl_sparse.app.sweep.identity import settings
from pl_sparse.app.training import train
from pl_sparse.tasks.data import MNIST, ImageNet
from pl_sparse.tasks.data.streamed import center_crop, random_crop
from pl_sparse.tasks.language import CausalText, Perplexity, Spans, Squad, causal_lm, question_answering
from pl_sparse.tasks.models import lenet5, lenet300

pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence", "ignore:.*num_workers")

WORDS = ["the", "film", "was", "good", "and", "dull", "plot", "actors", "who", "made", "it"]
TEN = [
    "trainer.max_epochs=-1",
    "trainer.max_steps=10",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.devices=1",
    "trainer.accelerator=cpu",
]
IMAGENET = sorted(path.stem for path in CONF.glob("experiment/imagenet_*.yaml"))
SQUAD = sorted(path.stem for path in CONF.glob("experiment/squad_*.yaml"))
LLAMA = sorted(path.stem for path in CONF.glob("experiment/llama_*.yaml"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 20), ("val", 3)):
        for label, shade in (("n01", 60), ("n02", 190)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((40, 48, 3), shade + number, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    return root


def pretrained(folder: Path, config: str, model: str, layers: int) -> Path:
    """A model of random weights with a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    made = getattr(transformers, config)(vocab_size=5 + len(WORDS), max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    getattr(transformers, model)(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a tokenizer of a few words."""
    return pretrained(tmp_path_factory.mktemp("bert"), "BertConfig", "BertForQuestionAnswering", layers=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("llama"), "LlamaConfig", "LlamaForCausalLM", layers=2)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("squad")
    text = "the film was good and the plot was dull"
    entries = [
        {"question": "who was dull", "answers": [{"text": "the plot", "answer_start": text.index("the plot")}]},
        {"question": "the film", "answers": [{"text": "good", "answer_start": text.index("good")}]},
        {"question": "who made it", "answers": []},
    ]
    content = {"data": [{"paragraphs": [{"context": text, "qas": entries}] * 8}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (root / name).write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for part, count in (("train", 200), ("test", 30)):
        (root / f"{part}.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(count)))
    return root


@pytest.mark.parametrize("name", [*IMAGENET, *SQUAD, *LLAMA])
def test_each_has_its_number_source_and_command(name: str) -> None:
    head = (CONF / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    assert f"# python train.py experiment={name} " in head
    assert "arXiv:" in head and "Published" in head and "Not run here" in head


def composed(name: str, *overrides: str) -> DictConfig:
    with composition():
        return hydra.compose("train", [f"experiment={name}", *overrides])


def started(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    return train(composed(name, f"output_dir={folder}", *TEN, *overrides))


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet(tmp_path: Path, images: Path, name: str) -> None:
    vit = "vit" in name
    try:
        importlib.import_module("timm")
        model = [f"model.name={'vit_tiny_patch16_224' if vit else 'resnet10t'}"]
    except Exception:
        own = ["model=vit_tiny", "model.dim=32", "model.depth=1", "~model.options"]
        model = ["~model.name", *(own if vit else ["model=resnet20", "model.width=4"])]
    small = [f"data.root={images}", "data.size=32", "data.workers=0", "data.batch_size=4"]
    times = {
        "imagenet_resnet50_rigl": ["schedule.end=8", "schedule.every=2"],
        "imagenet_resnet50_gmp": ["schedule.begin=2", "schedule.end=8", "schedule.every=2"],
        "imagenet_vit_b16_rigl": ["schedule.begin=2", "schedule.end=8", "schedule.every=2"],
    }.get(name, [])
    metrics = started(tmp_path, name, *model, *small, *times)
    assert metrics["steps"] == 10 and math.isfinite(metrics["test/loss"])
    asked = {"imagenet_resnet50_str": 0.0, "imagenet_resnet50_srste": 0.5}.get(name, 0.8)
    assert metrics["sparsity"] == pytest.approx(asked, abs=0.02)


@pytest.mark.parametrize("name", SQUAD)
def test_squad(tmp_path: Path, questions: Path, bert: Path, name: str) -> None:
    small = [f"data.root={questions}", f"model.name={bert}", "data.max_length=16", "data.stride=2", "data.batch_size=4"]
    if "obert" in name:
        started(tmp_path / "teacher", "squad_bert_movement", *small, "method=dense")
        small += [f"distill.teacher={tmp_path / 'teacher'}", "calibration_batches=4"]
        small += ["schedule.begin=2", "schedule.end=8", "schedule.every=2"]
    metrics = started(tmp_path / "run", name, *small)
    assert metrics["steps"] == 10 and 0 <= metrics["test/exact"] <= metrics["test/f1"] <= 1
    assert metrics["sparsity"] == pytest.approx({"squad_bert_obert": 0.97}.get(name, 0.85), abs=2e-3)


@pytest.mark.parametrize(("name", "more"), [*((name, []) for name in LLAMA), ("llama_wanda", ["structure=nm24"])])
def test_llama(tmp_path: Path, text: Path, llama: Path, name: str, more: list[str]) -> None:
    small = [f"data.root={text}", f"model.name={llama}", "data.length=16", "calibration_batches=4"]
    metrics = started(tmp_path, name, *small, *more)
    assert metrics["sparsity"] == pytest.approx(0.7 if name == "llama_owl" else 0.5, abs=0.01)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    zeros = {key for key, value in after.items() if bool((value == 0).any())}
    assert zeros == {key for key in after if "layers" in key and key.endswith("proj.weight")}
    if name != "llama_sparsegpt":  # nothing is trained, what stays is what it was
        for key in zeros:
            kept = after[key] != 0
            assert torch.equal(after[key][kept], before[key.removeprefix("model.")][kept])


def test_windows_have_the_answer_s_tokens(questions: Path, bert: Path) -> None:
    whole = Squad(root=questions, tokenizer=str(bert), max_length=16, stride=2)
    x, y = whole.load()[2]
    assert x.shape == (16, 2, 16) and y[:2].tolist() == [[10, 11], [7, 7]]
    tokens = [["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS][i] for i in x[0, 0].tolist()]
    assert tokens[10:12] == ["the", "plot"] and x[0, 1].tolist() == [0] * 5 + [1] * 10 + [0]
    split = Squad(root=questions, tokenizer=str(bert), max_length=12, stride=2, limit=3)
    x, y = split.load()[2]
    assert y[:2].tolist() == [[0, 0], [6, 7]] and len(x) > 16
    split.setup()
    assert len(next(iter(split.train_dataloader()))[0]) == 3


def test_padding_and_token_types_count(bert: Path) -> None:
    net = question_answering(name=str(bert), freeze_embeddings=True).eval()
    x = torch.tensor([[[2, 5, 3, 6, 7, 3], [0, 0, 0, 1, 1, 1]]])
    padded = torch.nn.functional.pad(x, (0, 3))
    torch.testing.assert_close(net(padded)[:, :, :6], net(x))
    assert not torch.allclose(net(x), net(torch.stack([x[:, 0], torch.zeros(1, 6, dtype=torch.long)], 1)))


def test_blocks_of_text(text: Path, llama: Path) -> None:
    data = CausalText(root=text, tokenizer=str(llama), length=8)
    train_part, val, test = data.load()
    assert test[0].shape == (4, 8) and torch.equal(val[0], test[0]) and torch.equal(test[1], test[0][:, 1:])
    assert len(train_part[0]) == 202 // 8
    net = causal_lm(name=str(llama)).eval()
    logits = net(test[0]).detach()
    assert logits.shape == (4, 7, data.classes)
    metric = Perplexity()
    for i in range(4):
        metric.update(logits[i : i + 1], test[1][i : i + 1])
    picked = logits.detach().double().log_softmax(-1).gather(2, test[1][..., None])
    assert float(metric.compute()) == pytest.approx(float(picked.mean().neg().exp()), rel=1e-5)


def test_spans_against_loops() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 2, 12), torch.randint(0, 12, (20, 2)).sort(1).values
    exact, f1 = Spans(exact=True), Spans()
    expected = [0.0, 0.0]
    for row, (first, last) in zip(logits, labels.tolist(), strict=True):
        pairs = [(float(row[0, a] + row[1, b]), a, b) for a in range(12) for b in range(a, 12)]
        _, a, b = max(pairs)
        common = len(set(range(a, b + 1)) & set(range(first, last + 1)))
        expected[0] += (a, b) == (first, last)
        expected[1] += 2 * common / (b - a + 1 + last - first + 1)
    for metric in (exact, f1):
        metric.update(logits, labels)
    assert [float(exact.compute()), float(f1.compute())] == pytest.approx([value / 20 for value in expected])


def test_crops() -> None:
    from PIL import Image

    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    middle = np.asarray(center_crop(ramp, 28))[:, :, 0]
    assert middle.shape == (28, 28) and (middle[0] == np.arange(18, 46)).all()
    torch.manual_seed(0)
    crops = [np.asarray(random_crop(ramp, 16))[8, :, 0].astype(int) for _ in range(40)]
    assert {bool(crop[0] < crop[-1]) for crop in crops} == {True, False}
    spans = [abs(crop[-1] - crop[0]) for crop in crops]
    assert min(spans) < 20 and max(spans) > 30 and max(max(crop) for crop in crops) <= 63


def test_what_is_missing_is_said(tmp_path: Path, images: Path, text: Path, questions: Path, bert: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folder `val`"):
        ImageNet(tmp_path)
    with pytest.raises(ValueError, match="workers=-1 must be 0 or more"):
        ImageNet(images, workers=-1)
    with pytest.raises(FileNotFoundError, match=r"no test\.txt|no train\.txt"):
        CausalText(root=tmp_path, tokenizer=str(bert))
    with pytest.raises(ValueError, match="less than a block of length=500"):
        CausalText(root=text, tokenizer=str(bert), length=500).load()
    with pytest.raises(FileNotFoundError, match=r"no other\.json"):
        Squad(root=questions, tokenizer=str(bert), dev="other.json")
    with pytest.raises(ValueError, match="stride=16 must be less than max_length=16"):
        Squad(root=questions, tokenizer=str(bert), max_length=16, stride=16)
    (tmp_path / "train-v1.1.json").write_text('{"data": [{"paragraph": []}]}')
    (tmp_path / "dev-v1.1.json").write_text("{}")
    with pytest.raises(ValueError, match="is not in the format of SQuAD: KeyError"):
        Squad(root=tmp_path, tokenizer=str(bert)).load()
    with pytest.raises(ConfigError, match="no folder `val`"):
        started(
            tmp_path / "run", "imagenet_resnet50_gmp", f"data.root={tmp_path}", "schedule.end=8", "schedule.begin=2"
        )


def test_the_protocol_of_rigl_s_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "prepare_data", lambda self: None)
    for name, count in (("train", 30), ("t10k", 20)):
        pixels = np.arange(count * 784, dtype=np.int64).astype(np.uint8).tobytes()
        header = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + pixels)
        header = np.array([2049, count], dtype=">i4").tobytes()
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(
            header + (np.arange(count) % 10).astype(np.uint8).tobytes()
        )
    train_part, val, test = MNIST(root=tmp_path, validation=0, scale="unit").load()
    assert len(train_part[0]) == 30 and val is test and (float(test[0].min()), float(test[0].max())) == (0.0, 1.0)
    assert float(MNIST(root=tmp_path, validation=2).load()[2][0].min()) == pytest.approx(-0.1307 / 0.3081)
    with pytest.raises(ValueError, match="scale='none' must be 'standard' or 'unit'"):
        MNIST(root=tmp_path, scale="none")  # type: ignore[arg-type]
    options = [f"data.root={tmp_path}", "data.batch_size=10", "schedule.end=8", "schedule.every=2"]
    started(tmp_path / "run", "mnist_rigl_lenet300", *options)
    kept = {key: int((value != 0).sum()) for key, value in load_file(tmp_path / "run" / "model.safetensors").items()}
    assert kept["fc1.weight"] <= 2352 and kept["fc2.weight"] <= 3270 and kept["fc3.weight"] == 1000
    rates = composed("mnist_rigl_lenet300").lr_schedule
    schedule = instantiate(rates)
    factors = [schedule.factor(600 * epoch, 120_000) for epoch in (0, 74, 75, 94, 95, 199)]
    assert factors == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 9, 1 / 9], rel=1e-6)


@pytest.mark.parametrize("build", [lenet300, lenet5])
def test_glorot_s_initialization(build: Any) -> None:
    torch.manual_seed(0)
    for layer in build(shape=(1, 28, 28), classes=10, init="glorot"):
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            spread = layer.weight[0, 0].numel() if layer.weight.dim() == 4 else 1
            bound = math.sqrt(6 / ((layer.weight.shape[0] + layer.weight.shape[1]) * spread))
            assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound and not layer.bias.any()
    with pytest.raises(ValueError, match="init='he' must be null"):
        build(shape=(1, 28, 28), classes=10, init="he")


def test_new_settings_leave_the_hash_of_a_run() -> None:
    plain = settings(composed("mnist_lenet300"))
    assert "init" not in plain["model"] and "scale" not in plain["data"]
    changed = settings(composed("mnist_rigl_lenet300"))
    assert changed["model"]["init"] == "glorot" and changed["data"]["scale"] == "unit"
