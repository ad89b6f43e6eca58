"""The schedule against the Trainer's clock: which optimizers step, how often, and where training ends."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.callbacks import Regularize
from pl_sparse.callbacks.clock import Timetable
from pl_sparse.regularizer import L1
from pl_sparse.schedule import Constant, Cubic, OneShot

BATCHES = 8


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Manual(Net):
    """It steps its optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def step(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def data() -> TensorDataset:
    x = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :4].argmax(1))


def fit(
    module: LightningModule, *callbacks: Callback, loader: Any = None, validate: bool = False, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(callbacks=list(callbacks), **settings)
    loaders = DataLoader(data(), 4) if loader is None else loader, DataLoader(data(), 4) if validate else None
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer


def zeros(module: nn.Module) -> float:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class EachBatch(Callback):
    """What is reported is true after every batch."""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        weights = [param.weight for param in self.sparsity.pruner.params]  # frozen ones are not counted
        share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert share == pytest.approx(self.sparsity.sparsity)


class Seen(Callback):
    """The sparsity after each batch, and the part of training behind when it first reached the end."""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity
        self.levels: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.levels.append(self.sparsity.sparsity)

    def reached(self, level: float) -> float:
        first = next(k for k, value in enumerate(self.levels) if value >= level - 1e-3)
        return first / len(self.levels)


class Stream(IterableDataset[Any]):
    """A data set whose length nobody knows."""

    def __init__(self, batches: int = BATCHES) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        yield from (data()[k] for k in range(4 * self.batches))


# What an optimizer owns


@pytest.mark.filterwarnings("ignore:coverage")
@pytest.mark.parametrize("schedule", [OneShot(final=0.75), Cubic(final=0.75, every=1)])
@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_weights_that_unfreeze_stay_masked(schedule: Any, masking: str) -> None:
    module = Net()
    sparsity = Sparsity(schedule=schedule, masking=masking, report=False)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
    fit(module, unfreeze, sparsity, EachBatch(sparsity))
    assert zeros(module) == pytest.approx(0.75)


def test_groups_that_grow_or_are_replaced_are_seen() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pruner = Pruner(sparsity=0.5)
    pruner.attach(net)
    optimizer = torch.optim.SGD(net[0].parameters(), 0.1)

    def names() -> list[str]:
        return [param.name for param in pruner.weights_of(optimizer)]

    assert names() == ["0.weight"]
    assert pruner.weights_of(optimizer) is pruner.weights_of(optimizer)  # looked up once
    optimizer.add_param_group({"params": net[1].bias})
    assert names() == ["0.weight"]
    optimizer.param_groups[1]["params"].append(net[1].weight)
    assert names() == ["0.weight", "1.weight"]
    optimizer.param_groups[0]["params"] = [net[0].bias]
    assert names() == ["1.weight"]


def test_an_optimizer_that_is_made_later() -> None:
    class Later(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)]

    module, sparsity = Later(), Sparsity(schedule=OneShot(final=0.75), report=False)
    fit(module, sparsity, EachBatch(sparsity))
    assert zeros(module) == pytest.approx(0.75)


def test_steps_that_lightning_does_not_see() -> None:
    class Direct(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.step(self.optimizers(use_pl_optimizer=False), batch)

    class Wrapped(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.step(self.optimizers(), batch)

    ended = []
    for kind in (Direct, Wrapped):
        torch.manual_seed(0)
        module, sparsity = kind(), Sparsity(sparsity=0.75, masking="srste", report=False)
        fit(module, sparsity, EachBatch(sparsity))
        assert sparsity.pruner.step == 4 * BATCHES and zeros(module) == pytest.approx(0.75)
        ended.append(module.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


@pytest.mark.parametrize("rare_first", [True, False])
def test_optimizers_that_step_at_different_rates(rare_first: bool) -> None:
    class Two(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            rare, often = self.optimizers()  # type: ignore[misc]
            if rare_first and batch_idx % 3 == 0:
                self.step(rare, batch)
            self.step(often, batch)
            if not rare_first and batch_idx % 3 == 0:
                self.step(rare, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.backbone.parameters(), 0.01), torch.optim.Adam(self.head.parameters(), 0.01)

    module, sparsity = Two(), Sparsity(sparsity=0.75, report=False)
    fit(module, sparsity, EachBatch(sparsity))
    assert sparsity.pruner.step == 4 * BATCHES and sparsity.pruner.at_target and zeros(module) == pytest.approx(0.75)


def test_closures_that_are_evaluated_often() -> None:
    class Lbfgs(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

    for masking in ("hard", "frozen"):
        module, sparsity = Lbfgs(), Sparsity(sparsity=0.75, masking=masking, report=False)
        fit(module, sparsity, EachBatch(sparsity))
        assert sparsity.pruner.step == 4 * BATCHES and zeros(module) == pytest.approx(0.75)


# How far training is


class EveryFourth(Manual):
    """Accumulation that the module does by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


class EverySecond(Net):
    """A hook that steps after every second batch."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Critic(Manual):
    """Three steps in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(3):
            self.step(self.optimizers(), batch)


@pytest.mark.parametrize("kind", [EveryFourth, EverySecond, Critic])
@pytest.mark.parametrize("epochs", [8, 20])
def test_fractions_are_of_training_whatever_a_batch_steps(kind: type[Net], epochs: int) -> None:
    module, sparsity = kind(), Sparsity(schedule=Cubic(final=0.75, end=0.5, every=1), report=False)
    seen = Seen(sparsity)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training ends after")
        fit(module, sparsity, seen, max_epochs=epochs)
    assert zeros(module) == pytest.approx(0.75) and 0.42 < seen.reached(0.75) < 0.6
    assert seen.levels == sorted(seen.levels)


def test_accumulation_that_changes() -> None:
    module, sparsity = Net(), Sparsity(schedule=OneShot(final=0.75, begin=0.5), report=False)
    seen = Seen(sparsity)
    fit(module, sparsity, seen, GradientAccumulationScheduler({0: 1, 4: 4}), max_epochs=16)
    assert zeros(module) == pytest.approx(0.75) and 0.4 < seen.reached(0.75) < 0.6


def test_the_last_level_comes_before_the_last_batch_ends() -> None:
    """The steps stop before the schedule does, and no estimate can tell."""

    class Stops(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch < 2:
                self.step(self.optimizers(), batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("zeros", zeros(self))

    module, sparsity = Stops(), Sparsity(sparsity=0.75, report=False)
    with pytest.warns(UserWarning, match=r"training ends after 16 optimizer steps.*raised from 0\.\d+ to 0\.7500"):
        trainer = fit(module, sparsity, validate=True)
    assert float(trainer.callback_metrics["zeros"]) == pytest.approx(0.75)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(0.75) and sparsity.pruner.at_target


def test_batches_that_are_skipped() -> None:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 5 else None

    module, sparsity = Skips(), Sparsity(sparsity=0.75, report=False)
    fit(module, sparsity)
    assert zeros(module) == pytest.approx(0.75)
    module, sparsity = Skips(), Sparsity(schedule=OneShot(final=0.75, begin=1.0), report=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*num_workers|.*logger|.*does not have many workers")
        fit(module, sparsity)
    assert zeros(module) == pytest.approx(0.75)


def test_steps_of_two_optimizers_share_max_steps() -> None:
    class Two(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                self.step(optimizer, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.backbone.parameters(), 0.01), torch.optim.Adam(self.head.parameters(), 0.01)

    module, sparsity = Two(), Sparsity(sparsity=0.75, report=False)
    seen = Seen(sparsity)
    fit(module, sparsity, seen, max_epochs=-1, max_steps=80)
    assert sparsity.pruner.step == 40 and zeros(module) == pytest.approx(0.75) and 0.6 < seen.reached(0.75) < 0.9


def test_seconds_are_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch takes a second of the time that the Trainer's timer sees."""
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: now[0])

    class Second(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            now[0] += 1

    module, sparsity = Net(), Sparsity(schedule=Cubic(final=0.75, end=0.5, every=1), report=False)
    seen = Seen(sparsity)
    fit(module, Second(), sparsity, seen, max_epochs=-1, max_time={"seconds": 60})
    assert len(seen.levels) == 60 and zeros(module) == pytest.approx(0.75) and 0.42 < seen.reached(0.75) < 0.58
    assert seen.levels == sorted(seen.levels)
    now[0] = 0.0
    module, sparsity = Net(), Sparsity(sparsity=0.75, report=False)
    with pytest.warns(UserWarning, match="training ends after"):  # 100 epochs are planned, and the time is over before
        fit(module, Second(), sparsity, max_epochs=2, max_time={"seconds": 1})
    assert zeros(module) == pytest.approx(0.75)


# A loader without a length


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (OneShot(final=0.75, begin="8 steps"), {}),
        (OneShot(final=0.75, begin="2 epochs"), {}),
        (Cubic(final=0.75, begin="1 epoch", end="2 epochs", every="4 steps"), {}),
        (Cubic(final=0.75, begin="4 steps", end="20 steps", every=4), {}),
        (Cubic(final=0.75, end=0.5, every=2), {"max_epochs": -1, "max_steps": 30}),
        (Cubic(final=0.75, begin="1 epoch", end=0.75), {"max_epochs": -1, "max_steps": 30}),
    ],
)
def test_streams(schedule: Any, options: dict[str, Any]) -> None:
    module, sparsity = Net(), Sparsity(schedule=schedule, report=False)
    fit(module, sparsity, loader=DataLoader(Stream(), 4), **options)
    assert zeros(module) == pytest.approx(0.75)


def test_epochs_of_a_stream_are_those_there_were() -> None:
    module, sparsity = Net(), Sparsity(schedule=OneShot(final=0.75, begin="2 epochs"), report=False)
    seen = Seen(sparsity)
    fit(module, sparsity, seen, loader=DataLoader(Stream(6), 4), max_epochs=3)
    assert [level > 0 for level in seen.levels] == [False] * 12 + [True] * 6


def test_fractions_of_a_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="fractions of training, whose length is not known: set max_epochs"):
        fit(Net(), Sparsity(sparsity=0.75, report=False), loader=DataLoader(Stream(), 4))


# Resume


def test_estimates_are_resumed(tmp_path: Path) -> None:
    def made(*callbacks: Callback) -> tuple[Net, list[Callback]]:
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        sparsity = Sparsity(schedule=Cubic(final=0.75, every=1), report=False)
        return EveryFourth(), [sparsity, checkpoint, *callbacks]

    whole, callbacks = made()
    fit(whole, *callbacks, max_epochs=8, enable_checkpointing=True)
    for epoch in (0, 2, 4):
        again, callbacks = made()
        path = tmp_path / f"epoch={epoch}.ckpt"
        fit(again, *callbacks, max_epochs=8, enable_checkpointing=True, ckpt_path=path)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_total_that_changes_in_a_plain_loop() -> None:
    net = nn.Linear(8, 8)
    pruner = Pruner(schedule=Cubic(final=0.75, begin=0.0, end=0.5, every=1))
    pruner.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    levels = []
    for step in range(20):
        net(torch.ones(1, 8)).sum().backward()
        pruner.before_step(step, 100 if step < 15 else 20, optimizer)
        optimizer.step()
        pruner.after_step(optimizer)
        levels.append(pruner.sparsity)
    assert levels[14] < 0.75 and levels[15:] == [0.75] * 5


# Gradient scalers


@pytest.mark.parametrize("masking", ["hard", "srste"])
def test_fused_optimizers_under_a_scaler(masking: str) -> None:
    """Scores, decay and penalty see the gradients themselves, and infinite ones are left out."""

    class Adam(Net):
        fused = False

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01, fused=self.fused)

    class Explode(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 5:
                pl_module.head.weight.grad[0, 0] = float("inf")

    ended = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Adam()
        module.fused = fused
        sparsity = Sparsity(scorer="taylor", sparsity=0.75, masking=masking, allocation="uniform", report=False)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        precision.autocast_context_manager = nullcontext  # type: ignore[method-assign,assignment]
        fit(
            module,
            Explode(),
            Regularize(L1(strength=1e-3, proximal=False)),
            sparsity,
            EachBatch(sparsity),
            plugins=[precision],
        )
        scores = [param.state["taylor"] for param in sparsity.pruner.params]
        assert all(bool(torch.isfinite(score).all()) for score in scores)
        ended.append([*scores, *module.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*ended, strict=True))


@pytest.mark.parametrize("updater", ["prune", "dropgrow"])
def test_weights_that_thaw_join_with_the_level_in_force(updater: str) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net[0].requires_grad_(False)
    frozen = net[0].weight.detach().clone()
    schedule = Constant(final=0.5, every=100) if updater == "dropgrow" else OneShot(final=0.5)
    pruner = Pruner(schedule=schedule, updater=updater, allocation="uniform")
    pruner.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(6):
        if step == 3:
            assert torch.equal(net[0].weight, frozen) and not pruner.thaws
            mask = pruner.params[0].mask.clone()
            net[0].requires_grad_(True)
            assert pruner.thaws and pruner.thaw() == ["0.weight"] and not pruner.thaws
            assert torch.equal(pruner.params[1].mask, mask) and pruner.sparsity == pytest.approx(32 / 192)
        optimizer.zero_grad()
        net(torch.randn(5, 8)).square().sum().backward()
        pruner.before_step(step, 6, optimizer)
        optimizer.step()
        pruner.after_step()
    assert pruner.sparsity == 0.5 and int((net[0].weight == 0).sum()) == 64 and int((net[2].weight == 0).sum()) == 32
    assert torch.equal(pruner.params[1].mask, mask) or updater == "prune"


# Callbacks with times of their own


class Half(Manual):
    """Accumulates two batches a step by hand, so that there are half of the steps that were estimated."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Told(Callback):
    """Asks a timetable at the start of each batch."""

    def __init__(self, **times: Any) -> None:
        self.table = Timetable("test", **times)
        self.passed: dict[str, list[bool]] = {name: [] for name in times}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.table.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.table.batch_starts(trainer)
        for name, passed in self.passed.items():
            passed.append(self.table.passed(name))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.table.batch_ended(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.table.release()

    def state_dict(self) -> dict[str, Any]:
        return self.table.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table.load_state_dict(state_dict)


@pytest.mark.parametrize("kind", [Net, Half, Critic])
def test_times_of_other_callbacks_follow_training_too(kind: type[Net]) -> None:
    told = Told(half="6 epochs", part=0.75, steps="6 steps", end=1.0)
    fit(kind(), told, max_epochs=12)
    total, steps = 12 * BATCHES, {Net: 1, Half: 0.5, Critic: 3}[kind]
    first = {name: passed.index(True) if any(passed) else total for name, passed in told.passed.items()}
    assert first["end"] == total and first["steps"] == 6 / steps
    assert abs(first["half"] - total / 2) <= 2 and abs(first["part"] - 0.75 * total) <= 2
    assert told.table.step == steps * total


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_times_of_other_callbacks_are_resumed(tmp_path: Path) -> None:
    whole, resumed = Told(part=0.75), Told(part=0.75)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Half(), whole, saving, enable_checkpointing=True)
    fit(Half(), resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert whole.passed["part"][2 * BATCHES :] == resumed.passed["part"] and whole.table.step == resumed.table.step
    assert any(resumed.passed["part"]) and not all(resumed.passed["part"])


def test_a_penalty_acts_for_the_part_of_training_it_was_given(tmp_path: Path) -> None:
    """Half of the estimated steps happen; the penalty still acts in the second quarter of training alone."""
    module, penalty = Half(), Regularize(L1(strength=1e-3), begin=0.25, until=0.5)
    acted = []
    module.on_train_batch_end = lambda *args: acted.append(penalty._active)  # type: ignore[method-assign]
    fit(module, penalty, Sparsity(sparsity=0.5, report=False), max_epochs=12)
    first, count = acted.index(True), sum(acted)
    assert abs(first - 3 * BATCHES) <= 3 and abs(count - 3 * BATCHES) <= 3


def test_a_penalty_of_a_layer_that_is_replaced_stops_with_its_name() -> None:
    class Replaces(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.head = nn.Linear(16, 4)

    with pytest.raises(RuntimeError, match=r"head\.weight: penalized weights that were replaced during training"):
        fit(Replaces(), Regularize(L1(strength=1e-3)))
