"""The examples run, and their results are what their pages say."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that an example shows
EXAMPLES = Path(__file__).parent.parent / "examples"
PAGES = sorted(path for path in EXAMPLES.glob("*.py") if "# %%" in path.read_text())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an example in a folder of its own, and gives what its names stand for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example"])

    def run(name: str) -> dict[str, Any]:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_is_a_page(path: Path) -> None:
    """A title underlined to its length, and what it shows, as sphinx-gallery wants them."""
    text = ast.get_docstring(ast.parse(path.read_text()), clean=True)
    assert text is not None
    title, line, empty, *rest = text.splitlines()
    assert line == "=" * len(title) and not empty and len(" ".join(rest)) > 80


@pytest.mark.slow
def test_own_scorer(ran: Any) -> None:
    names = ran("own_scorer")
    (magnitude, empty), (own, fewer) = names["results"].values()
    assert fewer < empty and min(own, magnitude) > 0.8 and names["accuracy"] > 0.9


def test_rigl_from_scratch(ran: Any) -> None:
    names = ran("rigl_from_scratch")
    assert names["rigl"] > names["static"] + 0.05 and names["rigl"] > 0.8
    rigl, static = names["watch_rigl"], names["watch_static"]
    assert rigl.levels == static.levels == {0.98}
    used, kept = (float(watch.seen.float().mean()) for watch in (rigl, static))
    assert kept == pytest.approx(0.02, abs=1e-3) and used > 1.5 * kept


@pytest.mark.slow
def test_lottery_ticket(ran: Any) -> None:
    names = ran("lottery_ticket")
    ticket, control = names["ticket"], names["control"]
    assert [1 - row["remaining"] for row in ticket] == pytest.approx([0, 0.7, 0.9, 0.97, 0.99], abs=1e-3)
    assert ticket[0]["val/acc"] == control[0]["val/acc"]  # the first round is the same
    assert ticket[2]["val/acc"] > 0.93 and ticket[4]["val/acc"] > control[4]["val/acc"] + 0.2


def test_two_four_tensorrt(ran: Any) -> None:
    names = ran("two_four_tensorrt")
    assert names["fit"] == ["fc1.weight", "fc2.weight"] and set(names["unfit"]) == {"fc3.weight"}
    assert names["accuracy"] > 0.93
    for layer in (names["module"].net.fc1, names["module"].net.fc2):
        assert ((layer.weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


@pytest.mark.slow
def test_lstm_forecaster(ran: Any) -> None:
    names = ran("lstm_forecaster")
    assert names["sizes"] == [(24, 1), (24, 24)] and names["net"].lstm.hidden_size == 24
    assert names["smaller"] == pytest.approx(names["masked"], rel=1e-3) and names["smaller"] < names["naive"] / 2
    assert names["result"].after < 0.3 * names["result"].before and not names["result"].left


def test_coreml_without_coremltools(ran: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ran("coreml")["notes"] == [] and "pl_sparse[coreml]" in capsys.readouterr().out


@pytest.mark.slow
def test_coreml(ran: Any) -> None:
    pytest.importorskip("coremltools")
    names = ran("coreml")
    assert names["accuracy"] > 0.9 and names["notes"][0].startswith("3 weights are sparse")


@pytest.mark.slow
def test_sparse_int8(ran: Any) -> None:
    pytest.importorskip("torchao")
    names = ran("sparse_int8")
    assert names["right"] == pytest.approx(names["simulated"], abs=0.01) and names["right"] > 0.9
    masked = {
        layer: float((getattr(names["module"].net, layer).weight == 0).float().mean())
        for layer in ("fc1", "fc2", "fc3")
    }
    assert sorted(names["zeros"].values()) >= [pytest.approx(share, abs=1e-6) for share in sorted(masked.values())]
    sizes = names["sizes"]
    assert sizes["float32"] > 3 * sizes["int8"] and sizes["sparse"] < sizes["int8"]


@pytest.mark.slow
def test_vit_heads(ran: Any) -> None:
    names = ran("vit_heads")
    assert sum(names["heads"]) == 12 and names["same"] and names["accuracy"] > 0.85
    assert names["result"].after < names["result"].before


@pytest.mark.slow
def test_yolo_detector(ran: Any) -> None:
    names = ran("yolo_detector")
    assert names["after"] == names["before"] > 0.4 and not names["result"].left
    assert names["result"].after < 0.35 * names["result"].before and names["macs"] < 0.35 * names["macs_before"]


@pytest.mark.slow
def test_llama_moe(ran: Any) -> None:
    pytest.importorskip("transformers")
    names = ran("llama_moe")
    assert names["right"] > 0.9 and names["others"] == 0
    weights = [weight for name, weight in names["model"].named_parameters() if ".experts." in name]
    assert len(weights) == 4
    for weight in weights:
        assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
def test_resnet_timm(ran: Any) -> None:
    pytest.importorskip("timm")
    names = ran("resnet_timm")
    assert names["error"] < 1e-3 and names["macs"] <= names["macs_dense"] / 3
    assert names["accuracy"] > names["accuracy_dense"] - 0.03 and names["result"].after < names["result"].before / 2


@pytest.mark.slow
def test_sweep_front(ran: Any) -> None:
    names = ran("sweep_front")
    for rows in names["fronts"].values():
        assert [row["sparsity"] for row in rows] == pytest.approx([0.5, 0.8, 0.9, 0.95], abs=1e-3)
    magnitude, random = ([row["val/acc"] for row in names["fronts"][key]] for key in ("magnitude", "random"))
    assert magnitude[2] > random[2] and magnitude[0] > 0.9 and len(names["table"]) >= 4


def test_bert_hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    names = runpy.run_path(str(EXAMPLES / "bert_hugging_face.py"))
    result = names["without_heads"](str(tmp_path), steps=8)
    # a head of each of two layers: 8 rows of three projections with their biases, 8 columns of the output
    assert result["before"] - result["after"] == 2 * (3 * 8 * 17 + 8 * 16) and result["error"] < 1e-5
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "| `bert.encoder.layer.0.attention.self.query.weight` | 16 x 16 | 8 x 16 |" in card
    assert not list((tmp_path / "pruned").glob("*.bin")) and torch.is_grad_enabled()
