"""Checkpoints without what optimizers remember of pruned weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from benchmarks.training import quiet_trainer
from pl_sparse import Sparsity
from pl_sparse.callbacks import Compact, Shrink, expand_weights
from pl_sparse.schedule import Cubic, OneShot
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.data import Batches

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


def trained(
    optimizer: str, path: Path, compact: Compact | None, resumed: bool = False, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    schedule = Cubic(final=0.9, begin=0.0, end=0.8, every=2)
    callbacks: list[Callback] = [Sparsity(schedule=schedule, report=False, **options)]
    callbacks += [] if compact is None else [compact]
    callbacks += [ModelCheckpoint(path, "{epoch}", save_top_k=-1, enable_version_counter=False)]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    generator = torch.Generator().manual_seed(1)
    data = Batches(torch.randn(80, 1, 8, 8, generator=generator), torch.randint(10, (80,), generator=generator), 8)
    trainer.fit(
        Classifier(net, 10, OPTIMIZERS[optimizer]), data, data, ckpt_path=path / "epoch=0.ckpt" if resumed else None
    )
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_training_is_the_uninterrupted_one(optimizer: str, weights: bool, tmp_path: Path) -> None:
    whole = trained(optimizer, tmp_path / "whole", None)
    small = trained(optimizer, tmp_path / "small", Compact(weights))
    resumed = trained(optimizer, tmp_path / "small", None, resumed=True)  # what is small is read without the callback
    assert all(torch.equal(whole[name], small[name]) and torch.equal(whole[name], resumed[name]) for name in whole)
    plain, saved = (torch.load(tmp_path / name / "epoch=0.ckpt", weights_only=True) for name in ("whole", "small"))
    state = saved["optimizer_states"][0]["state"][0]
    sparsity = 1 - state[next(key for key in state if state[key].dim() == 1 and key != "step")].numel() / (64 * 200)
    assert 0.7 < sparsity < 0.9
    sizes = [(tmp_path / name / "epoch=0.ckpt").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.8 * sizes[1]
    assert (saved["state_dict"]["net.1.weight"].dim() == 1) is weights
    expand_weights(saved["state_dict"])
    assert saved["state_dict"].keys() == plain["state_dict"].keys()
    for name, tensor in plain["state_dict"].items():
        assert tensor.numpy().tobytes() == saved["state_dict"][name].numpy().tobytes(), name


def test_a_checkpoint_of_kept_weights_takes_less_than_2_5_bytes_per_weight(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 256, bias=False), nn.ReLU(), nn.Linear(256, 10))
    sparsity = Sparsity(schedule=OneShot(final=0.9, begin=0.0), allocation="uniform", report=False)
    trainer = quiet_trainer(max_epochs=1, callbacks=[sparsity, Compact(weights=True)])
    data = Batches(torch.randn(8, 1, 32, 32), torch.zeros(8).long(), 4)
    trainer.fit(Classifier(net, 10, OPTIMIZERS["adam"]), data, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 2.5 * 256 * 1024


def test_kept_weights_alone_are_refused_beside_what_reads_weights() -> None:
    compact = Compact(weights=True)
    trainer = quiet_trainer(max_epochs=1, callbacks=[Sparsity(sparsity=0.5), compact, Shrink()])
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, OPTIMIZERS["adam"])
    with pytest.raises(ValueError, match=r"Compact\(weights=True\) and Shrink cannot go together"):
        compact.on_fit_start(trainer, module)


def test_what_may_return_is_saved_whole(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Compact saves checkpoints whole"):
        trained("adam", tmp_path / "x", Compact(), masking="ste")
    saved = torch.load(tmp_path / "x" / "epoch=0.ckpt", weights_only=True)["optimizer_states"][0]["state"][0]
    assert saved["exp_avg"].shape == saved["exp_avg_sq"].shape == (200, 64)
