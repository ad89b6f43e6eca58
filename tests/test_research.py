"""What looks at two runs, or at a run over time: linear mode connectivity, overlap of masks."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from test_app import config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Sparsity
from pl_sparse.app import cli
from pl_sparse.app.connectivity import barrier, connectivity
from pl_sparse.app.connectivity import main as connect
from pl_sparse.app.finished import load_run
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.training import train
from pl_sparse.callbacks import MaskHistory
from pl_sparse.core.parameter import packed
from pl_sparse.results.overlap import overlaps, read_masks
from pl_sparse.schedule import Constant
from pl_sparse.updater import DropGrow


class Points(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = 3 + 2 * torch.randn(96, 4, generator=generator)
        self.data = TensorDataset(self.x, self.x.sum(1, keepdim=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=32)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=48)


class Normed(LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_point_of_the_line_has_its_own_batch_statistics() -> None:
    """Against a loop; both networks have statistics of batch norms that fit neither."""
    one, two = Normed(0), Normed(1)
    one.net[1].running_mean.fill_(7.0)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    data = Points()
    rows = connectivity(one, two.state_dict(), data, points=3)
    for row, alpha in zip(rows, (0.0, 0.5, 1.0), strict=True):
        w = [(1 - alpha) * a + alpha * b for a, b in zip(one.parameters(), two.parameters(), strict=True)]
        hidden = [F.linear(x, w[0], w[1]) for x in data.x.split(32)]
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        var = torch.stack([h.var(0) for h in hidden]).mean(0)
        x = F.relu((F.linear(data.x, w[0], w[1]) - mean) / (var + 1e-5).sqrt() * w[2] + w[3])
        expected = F.mse_loss(F.linear(x, w[4], w[5]), data.x.sum(1, keepdim=True)).item()
        assert row["val/loss"] == pytest.approx(expected, rel=1e-4) and row["alpha"] == alpha
    assert barrier(rows, "val/loss")[0] == pytest.approx(
        max(row["val/loss"] for row in rows) - (rows[0]["val/loss"] + rows[2]["val/loss"]) / 2
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())
    assert one.net[1].momentum == 0.1


def test_statistics_that_both_share_stay() -> None:
    """A norm that was frozen in both is not a norm of the line."""
    one, two = Normed(0).eval(), Normed(0).eval()
    one.net[1].running_mean.fill_(3.0)
    two.net[1].running_mean.fill_(3.0)
    with torch.no_grad():
        expected = float(F.mse_loss(one.net(Points().x), Points().data.tensors[1]))
    rows = connectivity(one, two.state_dict(), Points(), points=3)
    assert [row["val/loss"] for row in rows] == pytest.approx([expected] * 3, rel=1e-5)


def test_the_line_between_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("a", "seed=0"), ("b", "seed=1"), ("narrow", "model=lenet5")):
        train(config(tmp_path / name, more, "sparsity=0.5", "trainer.max_epochs=1"))
    connect([str(tmp_path / "a"), str(tmp_path / "b"), "--points", "5"])
    with (tmp_path / "a" / "connectivity.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["alpha"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    for row, name in ((rows[0], "a"), (rows[-1], "b")):
        module, data, _ = load_run(tmp_path / name)
        data.setup("fit")
        with torch.no_grad():
            hits = torch.cat([(module(x).argmax(1) == y).float() for x, y in data.val_dataloader()])
        assert row["val/acc"] == pytest.approx(float(hits.mean()), abs=1e-6)
    assert rows[0]["nonzero"] < rows[2]["nonzero"]  # the union of two masks
    assert (tmp_path / "a" / "connectivity.png").stat().st_size > 5000
    assert "barrier of val/acc" in capsys.readouterr().out
    for arguments, words in (
        (["a", "b", "--points", "2"], "--points 2 must be 3 or more"),
        (["a", "narrow"], "the runs have different networks, and no line connects them: net.fc1.weight is 300x64"),
    ):
        with pytest.raises(SystemExit) as end:
            connect([*(str(tmp_path / word) if word.isalpha() else word for word in arguments)])
        assert end.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no training data"):
        connectivity(Normed(0), {**Normed(0).state_dict(), "net.1.running_mean": torch.ones(8)}, Validation(), 3)


class Validation(LightningDataModule):
    def val_dataloader(self) -> DataLoader:
        return Points().val_dataloader()


class Recorder(Callback):
    """The masks after every step; half way a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        self.on_train_batch_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "half.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        masks = {param.name: param.mask.clone() for param in Sparsity.of(trainer).pruner.params}
        self.after[trainer.global_step] = masks


def grown(folder: Path, seed: int, most: int = 64, ckpt_path: Path | None = None) -> Recorder:
    """RigL for 3 steps per epoch, an update in each."""
    recorder, module = Recorder(folder), Normed(seed)
    module.net[3].p = 0.0
    schedule = Constant(final=0.5, end=0.9, every=1)
    rigl = Sparsity(updater=DropGrow(fraction=0.4, skip_step=False), schedule=schedule, report=False)
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[rigl, MaskHistory(folder / "masks", most), recorder], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, Points(), ckpt_path=ckpt_path)
    return recorder


def jaccard(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], *names: str) -> float:
    a, b = (torch.cat([masks[name].flatten() for name in names or masks]) for masks in (one, two))
    return float((a & b).sum()) / float((a | b).sum())


def test_the_overlap_of_masks_over_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, other = grown(tmp_path / "a", 0).after, grown(tmp_path / "b", 1).after
    rows = overlaps(tmp_path / "a", tmp_path / "b")
    steps = sorted(read_masks(tmp_path / "a"))
    assert len(steps) > 4 and steps[0] == 0 and steps[-1] == max(seen)
    previous = steps[0]
    for step in steps:
        for row in (row for row in rows if row["step"] == step):
            names = [] if row["layer"] == "all" else [row["layer"]]
            then = {"first": seen[steps[0]], "previous": seen[previous], "last": seen[steps[-1]]}
            found = {key: jaccard(seen[step], masks, *names) for key, masks in then.items()}
            beside = other[max(s for s in read_masks(tmp_path / "b") if s <= step)]
            assert {key: row[key] for key in found} == pytest.approx(found)
            assert row["other"] == pytest.approx(jaccard(seen[step], beside, *names))
            assert row["density"] == pytest.approx(
                float(torch.cat([seen[step][name].flatten() for name in names or seen[step]]).float().mean())
            )
        previous = step
    assert min(row["first"] for row in rows) < 1
    monkeypatch.setattr("sys.argv", ["pl-sparse", "overlap", str(tmp_path / "a"), str(tmp_path / "b")])
    cli.main()
    assert f"2 weights, {len(steps)} steps" in capsys.readouterr().out
    with (tmp_path / "a" / "overlap.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "a" / "overlap.png").stat().st_size > 5000


def test_chance_is_what_random_masks_have(tmp_path: Path) -> None:
    """A tenth and a half of 100,000 weights: 0.05 / 0.55 = 0.0909."""
    for name, density in (("a", 0.1), ("b", 0.5)):
        mask = torch.rand(100_000, generator=torch.Generator().manual_seed(int(10 * density))) < density
        (tmp_path / name / "masks").mkdir(parents=True)
        save_file({"w": packed(mask)}, tmp_path / name / "masks" / "step_1.safetensors", {"shapes": '{"w": [100000]}'})
    (row, _) = overlaps(tmp_path / "a", tmp_path / "b")
    assert row["chance"] == pytest.approx(1 / 11, abs=2e-3) and row["other"] == pytest.approx(row["chance"], abs=5e-3)


def test_few_files_are_kept_and_a_resumed_run_has_those_of_one_that_was_not(tmp_path: Path) -> None:
    grown(tmp_path / "whole", 0, most=4)
    assert 2 <= len(read_masks(tmp_path / "whole")) <= 4
    shutil.copytree(tmp_path / "whole" / "masks", tmp_path / "half" / "masks")
    (tmp_path / "half" / "masks" / "step_00000011.safetensors").write_bytes(b"of a step that will come")
    grown(tmp_path / "half", 0, 4, tmp_path / "whole" / "half.ckpt")
    for one, two in zip(*(read_masks(tmp_path / name).items() for name in ("whole", "half")), strict=True):
        assert one[0] == two[0] and one[1].read_bytes() == two[1].read_bytes()


def test_masks_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train it with callbacks=masks"):
        overlaps(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        overlaps(tmp_path / "nowhere")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "step_00000001.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"step_00000001\.safetensors is damaged"):
        overlaps(tmp_path)
