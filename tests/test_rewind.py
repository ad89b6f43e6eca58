"""Lottery tickets against the same search by hand."""

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from test_app import config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.app.training import train
from pl_sparse.callbacks import Rewind
from pl_sparse.schedule import Cubic, Iterative, Tickets
from pl_sparse.scorer import Ticket
from pl_sparse.tasks.models import lenet300


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator))


def fit(module: LightningModule, epochs: int, folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **more,
    )
    loader = DataLoader(data(), batch_size=10)
    trainer.fit(module, loader, loader)
    return trainer


def by_hand(rounds: list[float], epochs: int, late: int, weights: str) -> list[dict[str, torch.Tensor]]:
    """Algorithm 1 of the paper: the trained weights of every round."""
    module = Net()
    masks = {name: torch.ones_like(p) for name, p in module.named_parameters() if p.dim() > 1}
    saved: Any = None
    found = []
    for level, sparsity in enumerate([0.0, *rounds]):
        if level:
            names = list(masks)
            scores = torch.cat(
                [
                    torch.where(masks[n].bool(), p.detach().abs(), -1.0).reshape(-1)
                    for n, p in module.named_parameters()
                    if n in masks
                ]
            )
            keep = math.floor((1 - sparsity) * len(scores) + 0.5)
            chosen = torch.zeros(len(scores)).index_fill(0, scores.argsort(descending=True, stable=True)[:keep], 1.0)
            parts = chosen.split([masks[n].numel() for n in names])
            masks = {n: part.view_as(masks[n]) for n, part in zip(names, parts, strict=True)}
        state = copy.deepcopy(saved) if saved is not None else None
        if state is not None and weights == "rewind":
            module.load_state_dict(state["module"])
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])

        def mask(module: Net = module, masks: dict[str, torch.Tensor] = masks) -> None:
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if name in masks:
                        p.mul_(masks[name])

        mask()
        for epoch in range(late if level else 0, epochs):
            if epoch == late and saved is None:
                parts_ = {"module": module, "optimizer": optimizer, "scheduler": scheduler}
                saved = {key: copy.deepcopy(part.state_dict()) for key, part in parts_.items()}
            for x, y in DataLoader(data(), batch_size=10):
                optimizer.zero_grad()
                F.cross_entropy(module.net(x), y).backward()
                for name, p in module.named_parameters():
                    if name in masks and p.grad is not None:
                        p.grad *= masks[name]
                        if "momentum_buffer" in optimizer.state[p]:
                            optimizer.state[p]["momentum_buffer"] *= masks[name]
                optimizer.step()
                mask()
            scheduler.step()
        found.append({name: p.detach().clone() for name, p in module.named_parameters()})
    return found


@pytest.mark.parametrize(("late", "weights"), [(0, "rewind"), (1, "rewind"), (0, "keep")])
def test_rounds_are_those_by_hand(late: int, weights: Any, tmp_path: Path) -> None:
    schedule = Tickets(final=0.5, rate=0.3, to=late / 4)
    assert len(schedule.rounds) == 2
    expected = by_hand(list(schedule.rounds), 4, late, weights)
    module = Net()
    epochs = 4 + 2 * (4 - late)
    fit(module, epochs, tmp_path, Sparsity(schedule=schedule, allocation="global", report=False), Rewind(weights))
    for level, reference in enumerate(expected):
        ticket = load_file(tmp_path / "levels" / f"level_{level:02d}" / "ticket.safetensors")
        for name, value in reference.items():
            assert torch.allclose(ticket[name], value, atol=1e-6), (level, name)
        for name in ("net.0.weight", "net.2.weight"):
            assert torch.equal(ticket[f"mask:{name}"], reference[name] != 0)
        row = json.loads((tmp_path / "levels" / f"level_{level:02d}" / "metrics.json").read_text())
        assert row["level"] == level and row["weights"] == [108, 76, 54][level]
        assert row["best/val/loss"] <= row["val/loss"]
    with open(tmp_path / "tickets.csv") as file:
        assert [int(row["weights"]) for row in csv.DictReader(file)] == [108, 76, 54]
    assert (tmp_path / "tickets.png").stat().st_size > 5_000
    assert all(torch.equal(p, expected[-1][n]) or p.allclose(expected[-1][n]) for n, p in module.named_parameters())


def test_right_after_rewinding_weights_are_the_initial_ones_under_the_masks(tmp_path: Path) -> None:
    """The guard against tickets that were never rewound."""
    initial = copy.deepcopy(Net().state_dict())
    seen: list[bool] = []

    class Look(Rewind):
        def _rewind(self, trainer: Trainer, module: LightningModule) -> None:
            super()._rewind(trainer, module)
            masks = self._masks(trainer)
            for name, value in module.state_dict().items():
                mask = masks.get(f"mask:{name}", torch.ones_like(value))
                seen.append(torch.equal(value, initial[name] * mask))
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
            assert not any(bool(v.any()) for s in trainer.optimizers[0].state.values() for v in s.values())

    fit(Net(), 6, tmp_path, Sparsity(schedule=Tickets(final=0.5, rate=0.3), report=False), Look())
    assert len(seen) == 8 and all(seen)


def test_the_control_starts_elsewhere(tmp_path: Path) -> None:
    for weights in ("rewind", "reinit"):
        sparsity = Sparsity(schedule=Tickets(final=0.5, rate=0.5), report=False)
        fit(Net(), 2, tmp_path / weights, sparsity, Rewind(weights))  # type: ignore[arg-type]
    a, b = (load_file(tmp_path / w / "levels" / "level_01" / "ticket.safetensors") for w in ("rewind", "reinit"))
    assert torch.equal(a["mask:net.0.weight"], b["mask:net.0.weight"])
    kept = a["mask:net.0.weight"]
    assert not (a["net.0.weight"] == b["net.0.weight"])[kept].any()


def test_the_sequence_of_the_paper() -> None:
    """LeNet-300-100: 20 % per round, the output layer 10 %, as the labels of the paper's figures have it."""
    rounds = 19
    schedule = Tickets(final=1 - 0.8**rounds, rate=0.2)
    pruner = Pruner("magnitude", schedule, allocation="uniform", overrides={"fc3": 1 - 0.9**rounds})
    pruner.attach(lenet300(shape=(1, 28, 28), classes=10))
    total = rounds + 1
    pruner.prepare(total)
    remaining = []
    for step in range(total):
        pruner.step = step
        pruner.advance()
        remaining.append(round(100 * pruner.kept / pruner.numel, 2))
    golden = {0: 100, 3: 51.28, 7: 21.07, 9: 13.52, 12: 6.95, 15: 3.58, 18: 1.85}
    assert all(abs(remaining[k] - value) <= 0.011 for k, value in golden.items()), remaining


def test_schedules_of_rounds() -> None:
    late = Tickets(final=0.5, rate=0.3, to=0.25)
    assert late.length(1000) == 400 and late.starts(1000) == [400, 700]
    assert late.levels(400, 1000) == (0.3,) and late.levels(700, 1000) == (0.5,) and late.levels(1, 1000) == ()
    assert Tickets(final=0.9, sparsities=(0.5, 0.9)).rounds == (0.5, 0.9)
    assert Iterative(final=0.75, rate=0.5).share(0.75, 0.5) == pytest.approx(0.5)
    assert Cubic(final=0.8).share(0.4, 0.2) == pytest.approx(0.1)
    for wrong, message in (
        ({"final": 0.9, "sparsities": (0.9, 0.5)}, "must rise"),
        ({"final": 0.9, "sparsities": (0.5, 0.8)}, "must rise"),
        ({"final": 0.9, "to": 1.0}, r"in \[0, 1\)"),
        ({"final": 1.0}, "below 1"),
        ({"final": 0.9, "rate": 0.0}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Tickets(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="12 rounds do not fit into 5"):
        Tickets(final=0.9).span(5)


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule=tickets"):
        fit(Net(), 1, tmp_path, Sparsity(sparsity=0.5), Rewind())
    with pytest.raises(ValueError, match="has no Sparsity callback"):
        fit(Net(), 1, tmp_path, Rewind())
    with pytest.raises(ValueError, match="comes after Sparsity"):
        fit(Net(), 4, tmp_path, Rewind(), Sparsity(schedule=Tickets(final=0.5, rate=0.5)))
    with pytest.raises(ValueError, match="must be one of rewind"):
        Rewind("back")  # type: ignore[arg-type]


def test_a_ticket_is_a_scorer(tmp_path: Path) -> None:
    quick = ["trainer.max_epochs=6", "schedule.rate=0.5", "sparsity=0.75"]
    train(config(tmp_path / "search", "method=lth", *quick))
    path = tmp_path / "search" / "levels" / "level_02" / "ticket.safetensors"
    options = ["scorer=ticket", f"scorer.path={path}", "schedule=oneshot", "allocation=global", "sparsity=0.75"]
    for name, more in (("same", []), ("shuffled", ["ablation=shuffle"])):
        metrics = train(config(tmp_path / name, *options, *more))
        assert metrics["sparsity"] == pytest.approx(0.75, abs=1e-4)
    ticket, same, shuffled = (
        load_file(path),
        *(load_file(tmp_path / n / "model.safetensors") for n in ("same", "shuffled")),
    )
    for layer in ("fc1.weight", "fc2.weight", "fc3.weight"):
        mask = ticket[f"mask:net.{layer}"]
        assert not same[layer][~mask].any() and shuffled[layer][~mask].any()
        assert int((shuffled[layer] != 0).sum()) == pytest.approx(int(mask.sum()), abs=3)
    with pytest.raises(FileNotFoundError, match="no file"):
        Ticket("nowhere")


def test_the_best_of_a_round_is_of_validations_alone() -> None:
    from types import SimpleNamespace

    rewind = Rewind()
    for loss in (2.0, 1.0, 3.0):  # a resumed training does not have what was logged in the training before
        metrics = {"train/loss": torch.tensor(loss), "val/loss": torch.tensor(loss), "val/acc": torch.tensor(loss)}
        trainer: Any = SimpleNamespace(sanity_checking=False, callback_metrics=metrics)
        rewind.on_validation_epoch_end(trainer, nn.Identity())  # type: ignore[arg-type]
    assert rewind.state_dict()["best"] == {"val/loss": 1.0, "val/acc": 3.0}
