"""As sparse as validation allows: levels rise while it holds, and are taken back where it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse import Sparsity
from pl_sparse.callbacks import AccuracyBudget, RandomState
from pl_sparse.schedule import Paced
from pl_sparse.tasks.data import Batches


class Judged(LightningModule):
    """Its validation holds as long as it is no sparser than `limit`."""

    def __init__(self, limit: float = 0.7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.limit = limit
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        weights = torch.cat([p.detach().flatten() for p in self.net.parameters() if p.dim() > 1])
        sparsity = float((weights == 0).float().mean())
        self.seen.append(round(sparsity, 3))
        self.log("val/acc", 0.9 if sparsity <= self.limit else 0.8)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def loaders() -> tuple[Batches, Batches]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)
    return Batches(x, y, 16, shuffle=True), Batches(x[:16], y[:16], 16)


def fit(
    folder: Path, module: Judged, epochs: int = 20, ckpt: str | None = None, stop: int | None = None, **options: Any
) -> tuple[Sparsity, AccuracyBudget]:
    sparsity = Sparsity(schedule=Paced(final=options.pop("final", 0.99)), allocation="uniform", report=False)
    budget = AccuracyBudget(**{"drop": 0.05, "warmup": 0.1, "patience": 2, **options})
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[sparsity, budget, RandomState(), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, *loaders(), ckpt_path=ckpt, weights_only=True)
    return sparsity, budget


def test_levels_rise_and_fall_back(tmp_path: Path) -> None:
    module = Judged(0.7)
    sparsity, budget = fit(tmp_path, module)
    # 0.5 holds; 0.75 does not, twice; of 0.5 a quarter less: 0.625 holds; 0.7188 does not; an eighth less: 0.6719 holds
    expected = [0, 0, 0.5, 0.75, 0.75, 0.625, 0.719, 0.719, 0.672, 0.713, 0.713, 0.692, 0.712, 0.712, 0.702, 0.702]
    assert module.seen == pytest.approx(expected, abs=0.002)
    assert sparsity.pruner.sparsity == pytest.approx(0.692, abs=0.002) and sparsity.pruner.at_target
    assert sparsity.sparsity == pytest.approx(sparsity.pruner.sparsity, abs=1e-9)  # what is logged, and in status.json
    for param in sparsity.pruner.params:
        assert not param.weight[~param.mask].any()
    # it ends with the weights of the epoch that held last
    assert budget.epoch == 11
    saved = torch.load(tmp_path / "epoch=11.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


def test_no_sparser_than_the_schedule_allows(tmp_path: Path) -> None:
    module = Judged(1.0)
    sparsity, _ = fit(tmp_path, module, final=0.8)
    assert module.seen[-1] == pytest.approx(0.8, abs=0.002) and len(module.seen) < 20
    assert sparsity.pruner.sparsity == pytest.approx(0.8, abs=0.002)


def test_nothing_holds(tmp_path: Path) -> None:
    module = Judged(0.0)
    with pytest.warns(UserWarning, match="no sparse model was within drop=0.05"):
        sparsity, budget = fit(tmp_path, module, least=0.2)
    assert sparsity.pruner.sparsity == 0 and budget.epoch is not None and budget.epoch <= 1
    assert all(bool((p != 0).all()) for p in module.net.parameters() if p.dim() > 1)


def test_less_may_be_more(tmp_path: Path) -> None:
    class Error(Judged):
        def log(self, name: str, value: Any, **options: Any) -> None:  # type: ignore[override]
            super().log("error" if name == "val/acc" else name, 1 - value, **options)

    module = Error(0.6)
    sparsity, _ = fit(tmp_path, module, metric="error", mode="min", reference=0.1)
    assert 0.5 <= sparsity.pruner.sparsity <= 0.6


@pytest.mark.parametrize("at", [3, 5, 9])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, at: int) -> None:
    whole, resumed = Judged(0.7), Judged(0.7)
    first, _ = fit(tmp_path, whole)
    second, budget = fit(tmp_path, resumed, ckpt=str(tmp_path / f"epoch={at}.ckpt"))
    assert whole.seen[at + 1 :] == resumed.seen and budget.epoch == 11
    for a, b in zip(first.pruner.params, second.pruner.params, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.weight, b.weight)


def test_a_run_that_ended_early_does_not_go_on(tmp_path: Path) -> None:
    whole, resumed = Judged(0.7), Judged(0.7)
    first, _ = fit(tmp_path, whole, least=0.2)
    last = tmp_path / f"epoch={len(whole.seen) - 1}.ckpt"
    assert len(whole.seen) < 20
    second, _ = fit(tmp_path, resumed, ckpt=str(last), least=0.2)
    assert resumed.seen == []
    for a, b in zip(first.pruner.params, second.pruner.params, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.weight, b.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": -1.0}, "must not be negative"),
        ({"rate": 1.0}, "0 < least <= rate < 1"),
        ({"metric": "val/f1"}, "AccuracyBudget monitors 'val/f1', which the module does not log: .*val/acc"),
        ({"patience": 0}, "1 or more epochs"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Judged(), **options)


def test_a_schedule_that_decides_itself_is_refused(tmp_path: Path) -> None:
    for sparsity, message in (
        (Sparsity(sparsity=0.5), "use schedule=paced"),
        (Sparsity(schedule=Paced(final=0.9), structure="nm24"), "nothing to decide"),
    ):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[sparsity, AccuracyBudget()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            trainer.fit(Judged(), *loaders())


@pytest.mark.parametrize("name", ["val_acc", "valid/f1"])
def test_the_metric_is_the_one_that_is_logged(tmp_path: Path, name: str) -> None:
    class Named(Judged):
        def log(self, key: str, value: Any, **options: Any) -> None:  # type: ignore[override]
            super().log(name if key == "val/acc" else key, value, **options)

    first, budget = fit(tmp_path / "a", Named(0.7), epochs=8)
    second, known = fit(tmp_path / "b", Judged(0.7), epochs=8)
    assert budget.metric == name and known.metric == "val/acc"
    assert 0 < first.pruner.sparsity == second.pruner.sparsity <= 0.7
