"""The callback in a Lightning Trainer, and the ten failures of Lightning's ModelPruning that were measured."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Sparsity
from pl_sparse.callbacks import History, RandomState
from pl_sparse.callbacks.mac_count import MacCount
from pl_sparse.schedule import Cubic, Cyclic, Linear, OneShot
from pl_sparse.structure import NM

EPOCHS, BATCHES = 6, 5


class Foreign(LightningModule):
    """Somebody else's module: dropout, a norm, a buffer with an unlucky name."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.2)
        self.l2 = nn.Linear(32, 4)
        self.register_buffer("causal_mask", torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l2(self.drop(F.relu(self.norm(self.l1(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
        self.log("sparse", float((self.l1.weight == 0).float().mean()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def loader(shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * 16, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16, shuffle=shuffle)


class StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | options
    return Trainer(callbacks=list(callbacks), **settings)


def sparsity(**options: Any) -> Sparsity:
    return Sparsity(**({"schedule": Cubic(final=0.8, every=2), "report": False} | options))


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(), loader(shuffle=False), ckpt_path=ckpt_path)
    return trainer


def zeros(module: nn.Module, names: tuple[str, ...] = ("l1", "l2")) -> float:
    weights = torch.cat([module.get_submodule(name).weight.reshape(-1) for name in names])  # type: ignore[union-attr,operator]
    return float((weights == 0).float().mean())


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_trains_somebody_elses_module(capsys: pytest.CaptureFixture[str]) -> None:
    module = Foreign()
    callback = Sparsity(sparsity=0.9)
    trainer = fit(module, callback)
    assert zeros(module) == pytest.approx(callback.sparsity) and callback.sparsity == 1 - 64 / 640
    assert Sparsity.of(trainer) is callback and callback.pruner.at_target
    table = capsys.readouterr().out
    for part in ("l1.weight", "32x16", "unstructured", "requested 90.00%, actual 90.00%", "MACs per sample", "size:"):
        assert part in table
    assert callback.summary is not None and callback.summary.macs_dense == 640 and callback.summary.macs_sparse == 64
    with pytest.raises(ValueError, match="has no Sparsity callback"):
        Sparsity.of(trainer_of())


def test_a_count_of_macs_that_was_restored_is_not_made_again_by_a_test() -> None:
    """Attention takes another path while it is counted, and a resumed run tests to the same bit."""
    module, callback = Foreign(), Sparsity(sparsity=0.9)
    trainer = fit(module, callback)
    again = Sparsity(sparsity=0.9)
    for restored in (False, True):
        again._macs = MacCount()
        if restored:
            again.load_state_dict(callback.state_dict())
        again.pruner.attach(module)
        again.on_test_batch_start(trainer, module, None, 0)
        assert torch.backends.mha.get_fastpath_enabled() is restored
        again._macs.release()
    assert torch.backends.mha.get_fastpath_enabled()


def test_calibration_within_a_batch_is_no_part_of_its_macs(tmp_path: Path) -> None:
    """A resumed training counts in its first batch, within which masks may be due."""
    save = ModelCheckpoint(tmp_path, filename="end")
    for epochs, path in ((1, None), (2, tmp_path / "end.ckpt")):
        callback = sparsity(scorer="wanda", schedule=Linear(final=0.5, begin=0, end=1.0, every=1))
        fit(Foreign(), callback, save, ckpt_path=path, max_epochs=epochs)
        assert callback.summary is not None and callback.summary.macs_dense == 640


def test_arguments_may_be_strings_or_objects() -> None:
    a = Sparsity(schedule="oneshot", structure="nm24", allocation="uniform", sparsity=0.5).pruner
    b = Sparsity(schedule=OneShot(final=0.5), structure=NM(2, 4), allocation="uniform").pruner
    assert (a.schedule, a.structure, a.allocation) == (b.schedule, b.structure, b.allocation)


# The ten failures (M1 to M10)


@pytest.mark.parametrize(("scorer", "masking"), [("magnitude", "hard"), ("magnitude", "ste"), ("movement", "frozen")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_m1_m2_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, scorer: str, masking: str, accumulate: int
) -> None:
    def made() -> tuple[Foreign, list[Callback]]:
        seed_everything(3, verbose=False)
        checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        return Foreign(), [sparsity(scorer=scorer, masking=masking), RandomState(), History(), checkpoint]

    whole, callbacks = made()
    fit(whole, *callbacks[:-1], accumulate_grad_batches=accumulate)
    part, callbacks_part = made()
    with pytest.warns(UserWarning, match="before the schedule reached a sparsity of 0.8"):
        fit(part, *callbacks_part, StopAfter(3), accumulate_grad_batches=accumulate)
    again, callbacks_again = made()
    torch.manual_seed(77)  # another process starts with other random numbers
    fit(again, *callbacks_again, ckpt_path=tmp_path / "last.ckpt", accumulate_grad_batches=accumulate)
    assert 0 < zeros(part) < zeros(again) == zeros(whole) == pytest.approx(0.8)
    assert equal(whole, again)
    rows, rows_again = (cs[2].rows for cs in (callbacks, callbacks_again))  # type: ignore[attr-defined]
    for row in (*rows, *rows_again):
        del row["seconds"]
    assert rows == rows_again and len(rows) == EPOCHS


def test_m3_checkpoints_load_strictly_into_the_plain_class(tmp_path: Path) -> None:
    module = Foreign()
    fit(module, sparsity(masking="ste"), ModelCheckpoint(tmp_path, save_last=True))
    plain = Foreign.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)
    assert equal(plain, module) and zeros(plain) == pytest.approx(0.8)
    tested = [trainer_of().validate(m, loader(shuffle=False), verbose=False)[0]["val_loss"] for m in (module, plain)]
    assert tested[0] == tested[1]


def test_m4_m7_random_masks_depend_on_nothing_but_their_seed() -> None:
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        callback = sparsity(scorer="random")
        fit(Foreign(), callback)
        masks.append([param.mask for param in callback.pruner.params])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_m5_buffers_may_be_called_anything(tmp_path: Path) -> None:
    module = Foreign()
    fit(module, sparsity(), ModelCheckpoint(tmp_path, save_last=True))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Foreign().state_dict().keys()


@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_m6_the_same_callback_fits_again(masking: str) -> None:
    module, callback = Foreign(), sparsity(masking=masking)
    fit(module, callback)
    fit(module, callback)
    assert zeros(module) == pytest.approx(0.8)
    other = Foreign()
    callback = sparsity(masking=masking)
    fit(other, callback)
    before = zeros(other)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            assert zeros(other) == pytest.approx(before)

    fit(other, callback, Watch())  # a second fit goes on from the sparsity reached


def test_m8_the_amount_is_of_the_whole() -> None:
    callback = Sparsity(schedule=Linear(final=0.5, every=1, end=1.0), report=False)
    module = Foreign()
    fit(module, callback)
    assert callback.pruner.num_updates == EPOCHS * BATCHES and zeros(module) == 0.5


def test_m9_no_momentum_is_left_at_pruned_weights() -> None:
    callback = sparsity()
    module = Foreign()
    trainer = fit(module, callback)
    for param in callback.pruner.params:
        state = trainer.optimizers[0].state[param.weight]
        assert not state["exp_avg"][~param.mask].any() and state["exp_avg"][param.mask].any()


def test_m10_a_compiled_model_is_one_graph_for_all_masks() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    class Compiled(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(
                nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), backend=backend, fullgraph=True
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    module = Compiled()
    callback = sparsity(include=["body"])
    fit(module, callback, limit_val_batches=0)
    assert len(graphs) == 1 and callback.sparsity == pytest.approx(0.8)
    assert [param.name for param in callback.pruner.params] == ["body.0.weight", "body.2.weight"]


# Best means best at the target


def test_checkpoints_judge_only_at_the_target(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="sparse", mode="min", save_last=True, save_top_k=1)
    fit(Foreign(), sparsity(), checkpoint)
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    weights = torch.cat([best["state_dict"][f"{name}.weight"].reshape(-1) for name in ("l1", "l2")])
    assert float((weights == 0).float().mean()) == pytest.approx(0.8)
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "last.ckpt" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_is_saved_before_the_target(tmp_path: Path, save_last: Any) -> None:
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            names = sorted(path.name for path in tmp_path.iterdir()) if tmp_path.exists() else []
            seen.append((names, torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] if names else None))

    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_last=save_last)
    fit(Foreign(), sparsity(), checkpoint, Look())
    assert seen[:4] == [([], None), (["last.ckpt"], 0), (["last.ckpt"], 1), (["last.ckpt"], 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_all_checkpoints_are_kept_but_not_judged(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="sparse", mode="min", save_top_k=-1)
    fit(Foreign(), sparsity(), checkpoint)
    assert len(list(tmp_path.iterdir())) == EPOCHS
    assert checkpoint.best_model_score is not None and float(checkpoint.best_model_score) > 0.7


def test_early_stopping_waits_for_the_target() -> None:
    stop = EarlyStopping("sparse", mode="min", patience=1)  # the first judged epoch is followed by no better one
    trainer = fit(Foreign(), sparsity(schedule=Linear(final=0.8, end=0.5, every=1)), stop, max_epochs=20)
    assert 10 <= trainer.current_epoch <= 13 and trainer.should_stop
    assert "_should_skip_check" not in vars(stop)


def test_a_training_that_ends_too_early_says_so() -> None:
    with pytest.warns(UserWarning, match=r"ended after 10 optimizer steps, before .* sparsity of 0.8.*judged the best"):
        fit(Foreign(), sparsity(), StopAfter(2), EarlyStopping("val_loss"))


# Averages


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaged_weights_are_as_sparse(kind: str) -> None:
    module = Foreign()
    average: Callback = EMAWeightAveraging(decay=0.9) if kind == "ema" else StochasticWeightAveraging(0.01, 1)
    fit(module, sparsity(), average)
    assert zeros(module) == pytest.approx(0.8)


# Kinds of training


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    callback = Sparsity(schedule=Linear(final=0.5, begin="0 steps", end="10 steps", every=5), report=False)
    fit(Foreign(), callback, accumulate_grad_batches=2)
    assert callback.pruner.step == EPOCHS * 3 and callback.pruner.num_updates == 3


def test_manual_optimization_with_two_optimizers() -> None:
    class Two(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(layer.parameters(), 0.01) for layer in (self.l1, self.l2)]

    for masking in ("hard", "ste"):
        module, callback = Two(), sparsity(masking=masking)
        fit(module, callback)
        assert callback.pruner.step == EPOCHS * BATCHES and zeros(module) == pytest.approx(0.8)


def test_modules_built_late() -> None:
    class Late(Foreign):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def configure_model(self) -> None:
            if not hasattr(self, "l1"):
                self.l1, self.norm = nn.Linear(16, 32), nn.BatchNorm1d(32)
                self.drop, self.l2 = nn.Dropout(0.1), nn.Linear(32, 4)

    module = Late()
    fit(module, sparsity())
    assert zeros(module) == pytest.approx(0.8)


def test_a_scaler_may_skip_steps() -> None:
    module, callback = Foreign(), sparsity(masking="ste", scorer="taylor", allocation="uniform")

    class Explode(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step in (2, 9):
                module.l1.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]

    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu")
    trainer = trainer_of(callback, Explode(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    trainer.fit(module, loader(), loader(shuffle=False))
    assert zeros(module) == pytest.approx(0.8)
    assert all(torch.isfinite(param.state["taylor"]).all() for param in callback.pruner.params)


def test_two_callbacks_prune_two_parts(tmp_path: Path) -> None:
    module = Foreign()
    first, second = sparsity(include=["l1"]), sparsity(include=["l2"], schedule=OneShot(final=0.25))
    fit(module, first, second, ModelCheckpoint(tmp_path, save_last=True))
    assert zeros(module, ("l1",)) == pytest.approx(0.8, abs=0.002) and zeros(module, ("l2",)) == 0.25
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if key.startswith("Sparsity")]) == 2


def test_sparsity_is_logged(tmp_path: Path) -> None:
    trainer = fit(Foreign(), sparsity(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(0.8)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",").count("sparsity") == 1


# Warnings and errors, before training starts


class Residual(Foreign):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l2(torch.cat([x, x], 1) + self.norm(self.l1(x)))


def test_a_dead_layer_is_named() -> None:
    module = Residual()
    with torch.no_grad():
        module.l1.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"l1.weight kept no weight .*allocation=erk"):
        fit(module, Sparsity(schedule=OneShot(final=0.9), allocation="global", report=False))


@pytest.mark.parametrize(("begin", "steps"), [(0.0, 0), (0.5, 16), (1.0, 30)])
@pytest.mark.parametrize("layer", ["l1", "l2"])
def test_a_network_through_which_nothing_passes_is_an_error(layer: str, begin: float, steps: int) -> None:
    module = Foreign()
    before = copy.deepcopy(module.state_dict())

    class Small(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            with torch.no_grad():
                module.get_submodule(layer).weight.mul_(1e-6)  # type: ignore[operator]

    Small().on_train_batch_start()
    callback = Sparsity(schedule=OneShot(final=0.9, begin=begin), allocation="global", report=False)
    with pytest.raises(
        RuntimeError, match=rf"nothing passes .* after {steps} .*{layer}.weight kept no .*allocation=erk"
    ):
        fit(module, Small(), callback)
    if not steps:  # at once: no step was taken
        assert torch.equal(module.norm.running_mean, before["norm.running_mean"])
        assert torch.equal(module.l2.bias, before["l2.bias"])


class Manual(Foreign):
    """Optimizes by itself, in a step of two losses with one optimizer that is toggled."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.skip = nn.Linear(16, 4) if skip else None
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.skip is None else out + self.skip(x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.toggle_optimizer(optimizer)
        for part in (0.5, 0.5):
            optimizer.zero_grad()
            self.manual_backward(part * super().training_step(batch, batch_idx))
            optimizer.step()
            self.steps += 1
        self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_nothing_passes_where_the_module_optimizes_by_itself(skip: bool, begin: float) -> None:
    module = Manual(skip)

    class Small(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            with torch.no_grad():
                module.l1.weight.mul_(1e-6)

    Small().on_train_batch_start()
    callback = Sparsity(
        schedule=OneShot(final=0.9, begin=begin), allocation="global", exclude=["skip"] if skip else [], report=False
    )
    if skip:
        with pytest.warns(UserWarning, match="l1.weight kept no weight"):
            fit(module, Small(), callback)
        assert module.steps == 2 * BATCHES * module.trainer.max_epochs and callback.pruner.step == module.steps
        assert all(p.requires_grad for p in module.parameters())
        return
    with pytest.raises(RuntimeError, match=r"nothing passes .* l1.weight kept no .*allocation=erk"):
        fit(module, Small(), callback)
    assert module.steps == callback.pruner.step < 2 * BATCHES * module.trainer.max_epochs


@pytest.mark.parametrize("back", [True, False])
def test_a_network_that_may_come_back_is_judged_by_its_last_masks(back: bool) -> None:
    module = Foreign()

    class Small(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            with torch.no_grad():
                module.l1.weight.mul_(1.0 if back and trainer.global_step > 16 else 1e-6)
                if back and trainer.global_step == 16:
                    module.l1.weight.normal_(std=0.1)

    schedule = Cyclic(final=0.9, begin=0.1, end=0.8, cycles=1)  # sparse at step 3, dense at step 14, sparse at step 24
    callback = Sparsity(schedule=schedule, allocation="global", report=False)
    expected = nullcontext() if back else pytest.raises(RuntimeError, match=r"nothing passes .* after 25 optimizer")
    with pytest.warns(UserWarning, match=r"l1.weight kept no weight"), expected:
        fit(module, Small(), callback)


def test_dead_layers_that_were_asked_for_are_no_error() -> None:
    fit(Foreign(), Sparsity(schedule=OneShot(final=1.0), report=False))
    module = Foreign()
    with torch.no_grad():
        module.l1.weight.mul_(1e6)
    with pytest.warns(UserWarning, match=r"l1.weight kept no weight"):
        fit(module, Sparsity(schedule=OneShot(final=0.9), allocation="global", ablation="invert", report=False))


def test_errors_come_before_training() -> None:
    class Never(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError("training has begun")

    for callback, message in (
        (sparsity(exclude=["l3"]), "Did you mean 'l2'"),
        (sparsity(schedule=Cubic(final=0.5, end="31 steps")), "only 30 optimizer steps"),
        (sparsity(schedule=Cubic(final=0.5, end="9 epochs")), "only 30 optimizer steps"),
        (sparsity(structure=NM(2, 5)), "not divisible by m=5"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Foreign(), callback, Never())

    class Norms(Foreign):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.norm.parameters(), 0.01)

    with pytest.raises(ValueError, match=r"no optimizer trains a weight .*l1.weight"):
        fit(Norms(), sparsity(), Never())
    with pytest.raises(ValueError, match="set max_epochs"):
        fit(Foreign(), sparsity(), Never(), max_epochs=-1)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(Foreign(), sparsity(), ModelCheckpoint(tmp_path, save_last=True))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    key = next(key for key in saved["callbacks"] if key.startswith("Sparsity"))
    params = saved["callbacks"][key]["params"]
    params["encoder.weight"] = params.pop("l1.weight")
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"another model.*lacks l1.weight; it has encoder.weight"):
        fit(Foreign(), sparsity(), ModelCheckpoint(tmp_path, save_last=True), ckpt_path=tmp_path / "other.ckpt")


def test_latent_values_never_leave_a_step() -> None:
    """An error in the middle of an optimizer step leaves the sparse weights behind."""

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            if self.count == 20:
                raise KeyError("lightning struck")
            self.count += 1
            return None

        count = 0

    class Struck(Foreign):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Fails(self.parameters(), 0.1)

    module, callback = Struck(), sparsity(masking="ste", schedule=OneShot(final=0.8), allocation="uniform")
    with pytest.raises(KeyError):
        fit(module, callback)
    assert zeros(module) == pytest.approx(0.8)
