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
from pl_sparse.app import CONF, train
from pl_sparse.tasks.models import lenet300

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
QUICK = ["trainer.max_epochs=8", "optimizer.lr=0.003"]


class Interrupt(Callback):
    """Ends training after the fifth epoch's checkpoint was written."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 5:
            raise RuntimeError("stopped here")


@pytest.mark.filterwarnings("ignore:.*kept no weight")  # global allocation, so early in training
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    def settings(folder: str, *more: str) -> Any:
        return config(tmp_path / folder, f"method={method}", *QUICK, *more)

    metrics = train(settings("whole"))
    assert metrics["method"] == method and metrics["at_target"]
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    net = lenet300(shape=(1, 8, 8), classes=10)
    net.load_state_dict(tensors, strict=True)
    zeros = sum(int((tensors[f"fc{i}.weight"] == 0).sum()) for i in (1, 2, 3))
    if method == "dense":
        assert zeros < 100
    elif metrics["structure"] == "2:4":
        assert zeros == 25_100
        for i in (1, 2, 3):
            assert int((tensors[f"fc{i}.weight"].reshape(-1, 4) != 0).sum(1).max()) == 2
    elif metrics["sparsity_requested"] is None:  # what a method learns is what the file has
        assert zeros == round(metrics["sparsity"] * 50_200)
    else:  # a kept weight may be zero too: what was grown last and has not been trained, or has no gradient
        assert 0 <= zeros - (50_200 - kept(0.9, 50_200)) <= 0.02 * kept(0.9, 50_200)

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
