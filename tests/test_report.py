from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from torch import nn

from pl_sparse import Pruner
from pl_sparse.core.files import replacing, write_csv, write_json, write_text
from pl_sparse.results.figures import plot_layers, plot_tickets, plot_training
from pl_sparse.results.summary import LayerRow, Summary, dead_layers, layer_rows, summarize, summary_table


@pytest.fixture
def summary() -> Summary:
    layers = (
        LayerRow("conv1.weight", (64, 3, 3, 3), "unstructured", 1728, 864, 100.0, 50.0),
        LayerRow("fc[1].weight", (300, 64), "2:4", 19200, 0, 200.0, 0.0, note="nothing kept"),
    )
    return Summary(layers, 0.95, 25000, 5000, 1.5e6, 2e5, 100 * 1024, 20 * 1024)


def rendered(summary: Summary, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get()


def test_properties(summary: Summary) -> None:
    assert (summary.weights, summary.kept) == (20928, 864)
    assert summary.sparsity == pytest.approx(1 - 864 / 20928)
    assert summary.sparsity_model == pytest.approx(0.8)
    assert summary.layers[0].density == summary.layers[0].sparsity == 0.5
    assert dead_layers(summary) == ["fc[1].weight"]
    nothing = Summary((), 0.5, 0, 0)
    assert (nothing.sparsity, nothing.sparsity_model, dead_layers(nothing)) == (0, 0, [])


def test_what_does_not_fit_is_in_the_table_and_counts_in_no_sparsity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    pruner = Pruner(schedule="oneshot", structure="nm24", misfit="dense")
    pruner.attach(model)
    pruner.prepare(2)
    summary = summarize(pruner, model)
    assert summary.sparsity == pruner.sparsity == summary.requested == 0.5
    assert (summary.weights, summary.kept) == (216 + 576, 216 + 288)
    text = " ".join(rendered(summary, 120).split())
    assert "requested 50.00%, actual 50.00% of the weights that fit, 36.36% of all in the table" in text
    assert "63.64%" in text  # the density of all


@pytest.mark.parametrize("width", [80, 120])
def test_table(summary: Summary, width: int) -> None:
    text = rendered(summary, width)
    assert max(map(len, text.splitlines())) <= width
    for part in (
        "conv1.weight",
        "fc[1].weight",
        "64x3x3x3",
        "19,200",
        "50.00%",
        "nothing kept",
        "requested 95.00%, actual 95.87%",
        "80.00% zero",
        "1.50 M -> 200.00 k",
        "100.00 KiB -> 20.00 KiB",
        "dead layers: 1",
    ):
        assert part in text


def test_table_without_extras() -> None:
    text = rendered(Summary((), 0.5, 10, 10), 80)
    assert "MACs" not in text and "size" not in text and "note" not in text and "dead" not in text


def test_dead_layer_is_red(summary: Summary) -> None:
    assert [row.style for row in summary_table(summary).rows] == [None, "bold red"]


def test_layer_rows(summary: Summary, tmp_path: Path) -> None:
    write_csv(tmp_path / "layers.csv", layer_rows(summary))
    with open(tmp_path / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "name", "shape", "structure", "weights", "kept", "density", "sparsity", "macs_dense", "macs_sparse", "note",
    ]  # fmt: skip
    assert rows[1]["shape"] == "300x64"
    assert (rows[0]["kept"], rows[0]["density"], rows[1]["note"]) == ("864", "0.5", "nothing kept")


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.verify()
        assert picture.format == "PNG" and min(picture.size) > 200
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


FULL: dict[str, float | None] = {
    "epoch": 0, "step": 9, "sparsity": 0.5, "lr": 0.1, "train/loss": 1.0, "val/loss": 1.1, "train/acc": 0.3,
    "val/acc": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "history",
    [
        [FULL],
        [{**FULL, "epoch": epoch} for epoch in range(30)],
        [{"epoch": 0, "train/loss": 1.0}, {"epoch": 1, "train/loss": None}, {"epoch": 2, "train/loss": float("nan")}],
        [{"val/loss": 1.0}, {"val/loss": 0.5}],
        [{"epoch": 0, "sparsity": 0.1}, {"epoch": 1, "sparsity": 0.2}],
    ],
)
def test_plot_training(history: list[Mapping[str, float | None]], tmp_path: Path) -> None:
    plot_training(history, tmp_path / "training.png", "run")
    check_picture(tmp_path / "training.png")


@pytest.mark.parametrize("history", [[], [{"epoch": 0}], [{"epoch": 0, "train/loss": None, "lr": 0.1}]])
def test_plot_training_of_nothing(history: list[Mapping[str, float | None]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        plot_training(history, tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "label"), [("val/acc", "validation accuracy"), ("valid_f1", "valid_f1")])
def test_plot_tickets(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("pl_sparse.results.figures.save", lambda figure, path, title: drawn.append(figure.axes[0]))
    rows = [{"remaining": 0.8**k, name: 0.9 - 0.1 * k, f"best/{name}": 0.95, "val_loss": 1.0 + k} for k in range(3)]
    plot_tickets(rows, "tickets.png")
    (axis,) = drawn
    ends, _, best = axis.lines
    assert axis.get_ylabel() == label and list(best.get_ydata()) == [0.95] * 3
    assert list(ends.get_ydata()) == [row[name] for row in rows]


def test_plot_layers(summary: Summary, tmp_path: Path) -> None:
    plot_layers(summary, tmp_path / "layers.png", "run")
    check_picture(tmp_path / "layers.png")


def test_plot_layers_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layers"):
        plot_layers(Summary((), 0.5, 0, 0), tmp_path / "layers.png")


def test_replacing_keeps_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old\r\n")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        assert temporary.name == "a.txt" and temporary.parent.parent == path.parent
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"old\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_wants_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, float("nan"), (float("inf"), 0.5)], "b": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None, [None, 0.5]], "b": "ü"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == "ü"


def test_csv_joins_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": None}, {"a": 2, "c": "x,y"}])
    assert (tmp_path / "a.csv").read_text() == 'a,b,c\n1,,\n2,,"x,y"\n'
    write_csv(tmp_path / "b.csv", [])
    assert (tmp_path / "b.csv").read_text() == ""
