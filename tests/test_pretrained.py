"""Pruned models of Hugging Face load from a folder without pickle, by transformers alone where a configuration can say
what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pl_sparse import Pruner
from pl_sparse.export import HuggingFace, from_pretrained, save_pretrained, shrink
from pl_sparse.export.card import CARD, Card
from pl_sparse.schedule import OneShot
from pl_sparse.structure import Channel, Head, Structure, Unstructured
from pl_sparse.surgery.plan import RemovalPlan

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
TEXT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = {"input_ids": torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))}


WIDTH = Channel(coupled=True, through_norms=True)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, max_position_embeddings=16))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForTokenClassification(transformers.T5Config(vocab_size=TEXT["vocab_size"], **sizes))


def shrunk(model: Any, structure: Structure, allocation: str = "uniform", sparsity: float = 0.5) -> RemovalPlan:
    """A model without half of its heads or channels."""
    dense = ["*pooler*"] if hasattr(model, "bert") else []
    pruner = Pruner("magnitude", OneShot(final=sparsity), structure=structure, allocation=allocation, exclude=dense)
    pruner.attach(model.eval(), example=IDS)
    pruner.prepare(1)
    pruner.before_step(0)
    plan = shrink(model, IDS).plan
    assert plan
    return plan


@pytest.mark.parametrize(
    ("make", "structure", "sizes"),
    [
        (llama, Head(), {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 8}),
        (t5, Head(), {"num_heads": 2, "d_kv": 8, "d_model": 32}),
        (llama, Channel(coupled=True), {"intermediate_size": 32, "hidden_size": 32}),
        (bert, Channel(coupled=True), {"intermediate_size": 32, "num_attention_heads": 4}),
        (llama, WIDTH, {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}),
    ],
)
def test_a_configuration_says_what_is_left(make: Any, structure: Structure, sizes: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    plan = shrunk(model, structure)
    assert save_pretrained(model, plan, tmp_path, IDS, Card(command="the command", verdict=["Half as slow."]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in sizes} == sizes and not (tmp_path / "shrunk.json").exists()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(**IDS).logits, model(**IDS).logits, atol=1e-5)
    assert loaded.num_parameters() == model.num_parameters() < make().num_parameters()
    card = (tmp_path / CARD).read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- pruned")
    assert f"| parameters | {make().num_parameters():,} | {model.num_parameters():,} |" in card
    assert "the command" in card and "Half as slow." in card and f"{type(model).__name__}.from_pretrained(" in card


@pytest.mark.parametrize(("allocation", "structure"), [("uniform", Head()), ("global", Channel(coupled=True))])
def test_what_no_configuration_says_is_loaded_by_its_plan(
    allocation: str, structure: Structure, tmp_path: Path
) -> None:
    """Heads of BERT, whose width is the hidden size over their number; layers that keep unlike numbers."""
    torch.manual_seed(0)
    model = bert()
    with torch.no_grad():  # the layers differ
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1.3)
    plan = shrunk(model, structure, allocation)
    assert not save_pretrained(model, plan, tmp_path, IDS)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 64
    loaded = from_pretrained(tmp_path)
    assert torch.allclose(loaded(**IDS).logits, model(**IDS).logits, atol=1e-5) and not loaded.training
    with pytest.raises(RuntimeError, match="size"):  # never new weights in silence
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert "from pl_sparse.export import from_pretrained" in (tmp_path / CARD).read_text()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_width_of_bert_is_in_its_configuration_where_heads_go_along(tmp_path: Path) -> None:
    """As its heads are as wide as the hidden size over their number; else a plan has the sizes."""
    torch.manual_seed(0)
    model = bert()
    plan = shrunk(model, WIDTH)
    assert plan.tensors["bert.pooler.dense.weight"].left == (32, 16)  # it is left dense, and reads the width
    assert not save_pretrained(model, plan, tmp_path, IDS)
    assert torch.allclose(from_pretrained(tmp_path)(**IDS).logits, model(**IDS).logits, atol=1e-5)

    model = bert()
    for structure, include in ((Head(), ["*.attention.*"]), (WIDTH, ["*.output.*", "*pooler*"])):
        pruner = Pruner("magnitude", OneShot(final=0.5), structure, "uniform", include=include)
        pruner.attach(model.eval(), example=IDS)
        pruner.prepare(1)
        pruner.before_step(0)
    assert save_pretrained(model, shrink(model, IDS).plan, tmp_path, IDS) and not (tmp_path / "shrunk.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]) == (16, 2, 64)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(**IDS).logits, model(**IDS).logits, atol=1e-5)


def test_a_folder_written_anew_has_no_plan_of_before(tmp_path: Path) -> None:
    model = bert()
    save_pretrained(model, shrunk(model, Head()), tmp_path, IDS)
    model = bert()
    assert save_pretrained(model, RemovalPlan(), tmp_path, IDS)
    assert torch.allclose(from_pretrained(tmp_path)(**IDS).logits, model.eval()(**IDS).logits, atol=1e-5)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=x, attention_mask=(x != 0).long()).logits
        return out


def test_a_format_of_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, format = Wrapped(bert()).eval(), HuggingFace()
    with torch.no_grad():  # half of the neurons of one layer
        layer = net.model.bert.encoder.layer[1]  # type: ignore[union-attr, index]
        layer.intermediate.dense.weight[:32], layer.intermediate.dense.bias[:32] = 0, 0  # type: ignore[union-attr, operator]
    path = tmp_path / format.file
    notes = format.write(net, IDS["input_ids"], path)
    assert notes[0] == "loaded by pl_sparse.export.from_pretrained"
    opened = format.open(path, net)
    assert torch.allclose(opened(IDS["input_ids"]), net(IDS["input_ids"]), atol=1e-5)
    assert format.size(path) < sum(p.numel() * 4 for p in net.parameters())
    for verdict in ("1.1x faster", "1.2x faster"):
        format.conclude(path, verdict)
    page = (path / CARD).read_text()
    assert page.count("## Measured") == 1 and page.endswith("1.2x faster\n") and "tests" not in page.split("Made by")[0]
    assert format.refusal(net, None, Unstructured(), 0.5) is None
    assert "in Linear there is none" in str(format.refusal(nn.Linear(2, 2), None, Unstructured(), 0.5))


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Linear is not a PreTrainedModel of transformers: use save_shrunk"):
        save_pretrained(nn.Linear(2, 2), RemovalPlan(), tmp_path, torch.zeros(1, 2))
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a model"):
        from_pretrained(tmp_path / "none" / "here")
