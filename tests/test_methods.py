"""Every method preset: it trains, resumes bit for bit, keeps its counts, and leaves a plain model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from test_app import config

from pl_sparse.allocation import kept
from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.settings import CONF
from pl_sparse.app.training import train
from pl_sparse.core.targets import find
from pl_sparse.structure import NM, Row, Unstructured

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
QUICK = ["trainer.max_epochs=8", "optimizer.lr=0.003"]
UNIFORM = ["allocation=uniform"]  # one threshold over all leaves a layer of so young a network nothing
SMALL = {"slimming": ["model.width=4"], "acdc": UNIFORM, "lth": UNIFORM}


class Interrupt(Callback):
    """Ends training after the fifth epoch's checkpoint was written."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 5:
            raise RuntimeError("stopped here")


@pytest.mark.filterwarnings("ignore:.*kept no weight")  # global allocation, so early in training
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    def settings(folder: str, *more: str) -> Any:
        return config(tmp_path / folder, f"method={method}", *QUICK, *SMALL.get(method, []), *more)

    metrics = train(settings("whole"))
    assert metrics["method"] == method and metrics["at_target"]
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    check_masks(settings("whole"), tensors, metrics)

    with pytest.raises(RuntimeError, match="stopped here"):
        train(settings("cut", "+callbacks.stop._target_=test_methods.Interrupt"))
    assert not (tmp_path / "cut" / "metrics.json").exists()
    train(settings("cut", f"ckpt_path={tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}"))
    again = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    ends = [
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in ("whole", "cut")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    a, b = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "cut"))
    assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}


def check_masks(cfg: Any, tensors: dict[str, torch.Tensor], metrics: Any) -> None:
    """In the saved file: the pattern, and as many units with a weight left as the sparsity asks for."""
    net = instantiate(cfg.model, shape=(1, 8, 8), classes=10)
    net.load_state_dict(tensors, strict=True)
    structure = instantiate(cfg.structure)
    sparsity = instantiate(cfg.schedule).final if structure.fixed is None else structure.fixed
    groups = structure.groups(find(net, last=not structure.removes_outputs), net)
    total = sum(group.numel for group in groups)
    alive, coarsest = 0, 1
    for group in groups:
        units = torch.zeros(())
        for param, layout in group.members:
            units = units + structure.pool((layout.view(param.weight.detach()) != 0).double())
        size = group.numel // units.numel()
        coarsest = max(coarsest, size)
        alive += int((units > 0).sum()) * size
        if isinstance(structure, NM):
            assert int(units.sum(-1).max()) <= structure.n
    if metrics["sparsity_requested"] is None:  # what a method learns is what the file has
        assert total - alive == round(metrics["sparsity"] * total)
    elif sparsity == 0:
        assert alive > 0.998 * total
    elif isinstance(structure, (NM, Row, Unstructured)):
        # a kept weight may be zero too: what was grown last and has not been trained, or has no gradient
        assert 0 <= kept(sparsity, total) - alive <= 0.02 * kept(sparsity, total)
    else:
        assert abs(alive - kept(sparsity, total)) <= coarsest / 2
