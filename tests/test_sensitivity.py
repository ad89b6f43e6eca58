"""The sensitivity of layers, and the allocation that shares weights by it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from test_app import config
from test_regularizer import Reversed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner
from pl_sparse.allocation import Sensitivity, kept
from pl_sparse.app.finished import load_run
from pl_sparse.app.instantiate import network
from pl_sparse.app.sensitivity import main, sensitivity
from pl_sparse.app.training import train
from pl_sparse.structure import Channel, Layer, Structure


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dense"
    train(config(folder, "method=dense", "trainer.max_epochs=4", "optimizer.lr=0.003"))
    return folder


def test_each_layer_is_pruned_alone(dense: Path) -> None:
    main([str(dense), "--levels", "0.9", "0.5"])
    with (dense / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], float(row["sparsity"])) for row in rows] == [
        (f"fc{i}.weight", level) for i in (1, 2, 3) for level in (0.0, 0.5, 0.9)
    ]
    assert (dense / "sensitivity.png").stat().st_size > 5000
    module, data, _ = load_run(dense)
    assert data is not None
    data.setup("fit")
    for row in rows:  # against a loop on the validation data
        net = network(module)
        net.load_state_dict(load_file(dense / "model.safetensors"))
        weight = net.get_parameter(row["layer"])
        with torch.no_grad():
            count = kept(float(row["sparsity"]), weight.numel())
            order = sorted(range(weight.numel()), key=lambda j: -abs(weight.view(-1)[j].item()))
            weight.view(-1)[order[count:]] = 0
            hits = [(net(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
        assert float(row["val/acc"]) == pytest.approx(float(torch.cat(hits).mean()), abs=1e-6)


def test_channels_of_the_outputs_stay_in_whatever_order_layers_are_declared(tmp_path: Path) -> None:
    class Validated(Reversed):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.mse_loss(self(batch[0]), batch[1]))

    class Data(LightningDataModule):
        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.randn(4, 8), torch.randn(4, 4)))

    rows, key = sensitivity(Validated(), Data(), Channel(), [0.5], None, "val/loss", tmp_path)
    assert key == "val/loss"
    assert [(row["layer"], row["sparsity"]) for row in rows] == [("net.body.weight", 0.0), ("net.body.weight", 0.5)]


def test_an_allocation_loses_the_same_everywhere(tmp_path: Path) -> None:
    """drop = slope * sparsity in each tensor: all lose as much where sparsity is in inverse proportion to slopes."""
    path = tmp_path / "sensitivity.csv"
    slopes = {"0.weight": 0.1, "2.weight": 0.2, "4.weight": 0.4}
    lines = [f"{name},{s},{slope * s}" for name, slope in slopes.items() for s in (0.0, 0.5, 1.0)]
    path.write_text("\n".join(["layer,sparsity,drop", *lines]))
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    pruner = Pruner(allocation=Sensitivity(str(path)), schedule="oneshot", sparsity=0.35)
    pruner.attach(model)
    pruner.prepare(2)
    assert pruner.sparsity == pytest.approx(0.35, abs=1 / 1200)
    sparsities = [1 - param.kept / param.numel for param in pruner.params]
    assert sparsities == pytest.approx([0.6, 0.3, 0.15], abs=0.005)


@pytest.mark.parametrize("structure", [Channel(coupled=True), Layer()])
def test_a_structure_that_joins_layers_is_refused(structure: Structure, dense: Path, tmp_path: Path) -> None:
    module, data, _ = load_run(dense)
    with pytest.raises(ValueError, match=r"^the structure of the run joins layers, .*: train with structure=channel"):
        sensitivity(module, data, structure, (0.5,), 1, "val/acc", tmp_path)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"allocation=sensitivity needs allocation\.path=RUN"):
        Pruner(allocation="sensitivity", sparsity=0.5)
    with pytest.raises(ValueError, match=r"nowhere\.csv is not a file"):
        Pruner(allocation=Sensitivity("nowhere.csv"), sparsity=0.5).attach(nn.Linear(4, 4))
    (tmp_path / "a.csv").write_text("layer,sparsity,drop\nfc1.weight,0.5,0.1\n")
    with pytest.raises(ValueError, match=r"no row for weight: it belongs to another model"):
        Pruner(allocation=Sensitivity(str(tmp_path / "a.csv")), sparsity=0.5).attach(nn.Linear(4, 4))
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--levels", "1.5"])
    assert end.value.code == 2 and "--levels 1.5 must be above 0" in capsys.readouterr().err
