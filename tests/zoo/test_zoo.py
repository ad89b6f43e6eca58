"""Each module of the zoo trains under Lightning, and what is said of its sparsity holds."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_sparse import Sparsity
from pl_sparse.callbacks.random_state import RandomState
from pl_sparse.pruner import Pruner
from pl_sparse.schedule import Linear
from zoo import awkward, hugging_face, others, packages  # noqa: F401  each adds its rows
from zoo.entry import ENTRIES, Case, Entry, loss_of, params, tensor_of

EPOCHS, BATCHES = 2, 4


class Lit(LightningModule):
    """Trains a plain module."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net = case.module
        self.__dict__["case"] = case  # beside the modules

    def configure_model(self) -> None:
        if self.case.made is not None:
            self.case.made(self.net)

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.case.loss is not None:
            return self.case.loss(self.net, batch)
        return loss_of(self.case.call(self.net, batch))

    def validation_step(self, batch: Any, index: int) -> None:
        self.case.call(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], 1e-3)


class Watch(Callback):
    """Counts what is not zero of the pruned weights before validations and at ends of epochs, before the audit."""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity, self.nonzero = sparsity, list[int]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(pl_module.named_parameters())
        pruned = self.sparsity.pruner.params
        self.nonzero.append(sum(int(torch.count_nonzero(weights[param.name][~param.mask])) for param in pruned))

    on_validation_start = on_train_epoch_end


@dataclass
class Trained:
    case: Case
    module: LightningModule
    pruner: Pruner
    watch: Watch
    told: list[str]

    @property
    def prefix(self) -> str:
        return "" if self.module is self.case.module else "net."

    def predict(self, module: nn.Module, batch: Any) -> Tensor:
        torch.manual_seed(2)
        module.eval()
        with torch.no_grad():
            return tensor_of(self.case.call(module, batch))


def same(batch: Any) -> Any:
    return batch


def fit(entry: Entry, folder: Path, seed: int, resume: Path | None = None) -> Trained:
    """Train a new module, on the same batches whatever the seed."""
    torch.manual_seed(seed)
    case = entry.make()
    torch.manual_seed(1)
    batches = [case.draw() for _ in range(BATCHES)]
    torch.manual_seed(seed)
    module = case.module if isinstance(case.module, LightningModule) else Lit(case)
    options = dict(entry.options)
    schedule = Linear(final=options.pop("sparsity"), begin=0.0, end=0.75, every=1)
    sparsity = Sparsity(schedule=schedule, misfit="dense", report=False, **options)
    watch = Watch(sparsity)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[watch, RandomState(), sparsity, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
    )
    loaders = [DataLoader(batches, batch_size=None, collate_fn=same) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, *loaders, ckpt_path=resume, weights_only=case.plain if resume else None)
    return Trained(case, module, sparsity.pruner, watch, [str(warning.message) for warning in caught])


def weights_of(folder: Path, epoch: int) -> dict[str, Tensor]:
    """The weights in a checkpoint."""
    weights: dict[str, Tensor] = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"]
    return weights


def coarsest(pruner: Pruner, structure: str) -> int:
    """How many weights the count may be off by: one, or the largest unit."""
    if structure in ("unstructured", "row", "nm24"):
        return 1
    return max(group.numel // max(group.shape[0], 1) for group in pruner.groups)


def left_out(module: nn.Module, pruner: Pruner) -> Counter[str]:
    """The reasons for which matrices stay dense, with how many; all are pruned or named."""
    reasons: Counter[str] = Counter()
    pruned = {id(param.weight) for param in pruner.params}
    for name, weight in module.named_parameters():
        if weight.dim() > 1 and id(weight) not in pruned:
            assert name in pruner.skipped, f"{name} is neither pruned nor named"
            reasons[re.sub(r"(, no weight of|\s*[(;:]).*", "", pruner.skipped[name])] += 1
    return reasons


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", params())
def test_a_module_of_another(entry: Entry, tmp_path: Path, record_property: Any) -> None:
    pytest.importorskip(entry.imported, exc_type=ImportError)
    start = time.perf_counter()
    asked, structure = entry.options["sparsity"], entry.options["structure"]
    trained = fit(entry, tmp_path / "whole", seed=0)
    pruner, module = trained.pruner, trained.module

    saved = weights_of(tmp_path / "whole", EPOCHS - 1)
    zeros = sum(int((saved[param.name] == 0).sum()) for param in pruner.params)
    assert abs(zeros - asked * pruner.numel) <= coarsest(pruner, structure)
    assert len(trained.watch.nonzero) in (EPOCHS, 2 * EPOCHS) and not any(trained.watch.nonzero)
    assert not [told for told in trained.told if "were not zero" in told]

    reasons = left_out(module, pruner)
    if entry.left_out:
        uncovered = pruner.uncovered.values()
        assert pruner.coverage < 0.95 and all(any(re.search(p, why) for p in entry.left_out) for why in uncovered)
    else:
        assert pruner.coverage >= 0.95 or set(pruner.uncovered) <= set(pruner.misfits)

    torch.manual_seed(3)
    plain = entry.make()
    if plain.made is not None and any(weight.is_meta for weight in plain.module.parameters()):
        plain.made(plain.module)
    plain.module.load_state_dict({key.removeprefix(trained.prefix): value for key, value in saved.items()}, strict=True)
    torch.manual_seed(4)
    batch = trained.case.draw()
    expected = trained.predict(trained.case.module, batch)
    assert bool(expected.isfinite().all()) and torch.equal(expected, trained.predict(plain.module, batch))

    if trained.case.unresumed is None:
        resumed = fit(entry, tmp_path / "resumed", seed=5, resume=tmp_path / "whole" / "epoch=0.ckpt")
        again = weights_of(tmp_path / "resumed", EPOCHS - 1)
        assert saved.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in saved.items())
        assert resumed.pruner.step == pruner.step
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(pruner.params, resumed.pruner.params, strict=True))

    sizes = {id(weight): weight.numel() for weight in module.parameters()}
    record_property(
        "zoo",
        {
            "index": ENTRIES.index(entry),
            "of": len(ENTRIES),
            "module": entry.name,
            "package": f"{entry.package} {version(entry.package)}",
            "axes": f"{entry.options['scorer']}, {structure}, {entry.options['allocation']}, "
            f"{type(pruner.masking).__name__.lower()}",
            "parameters": sum(sizes.values()),
            "pruned": pruner.numel / sum(sizes.values()),
            "coverage": pruner.coverage,
            "left_out": [f"{count} x {reason}" for reason, count in reasons.items()],
            "asked": asked,
            "counted": zeros / pruner.numel,
            "resume": trained.case.unresumed or "yes",
            "seconds": time.perf_counter() - start,
        },
    )


def test_the_zoo_is_large_and_varied() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) >= 40
    for axis in ("scorer", "structure", "allocation", "masking"):
        counts = Counter(entry.options[axis] for entry in ENTRIES)
        assert len(counts) >= 3 and min(counts.values()) >= 2
