"""What is reported is true of the model: scores, masks, counters and weights agree, whatever happens."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.allocation import Allocation, Units, choose
from pl_sparse.callbacks import Rewind
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import build
from pl_sparse.core.targets import find
from pl_sparse.masking import Hard
from pl_sparse.network.probe import Probe
from pl_sparse.results.summary import summarize
from pl_sparse.schedule import Constant, Cubic, Cyclic, Iterative, Linear, OneShot, Tickets
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import structure
from pl_sparse.updater import DropGrow, Reconstruct, Update


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, index: int, total: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(10, 8, generator=torch.Generator().manual_seed(index))).square().mean().backward()
    pruner.before_step(index, total, optimizer)
    optimizer.step()
    pruner.after_step()


# Scores


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", "lamp"])
@pytest.mark.parametrize("name", ["unstructured", "row", "nm24", "nm24t", "block4x4", "kernel", "channel", "feature"])
def test_one_nan_is_refused_with_the_name_of_its_weight(name: str, allocation: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = float("nan")
    kind = structure(name)
    try:
        groups, _ = kind.bind(find(model), model)
    except ValueError:
        pytest.skip("no such unit in this model")
    with pytest.raises(ValueError, match=r"scores of 2.weight hold NaN.*Lower the learning rate"):
        choose(Units(groups, kind, Magnitude().score), build(Allocation, allocation), 0.5)


def test_infinite_scores_have_a_rank() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = float("inf")
    groups, _ = structure("unstructured").bind(find(model), model)
    choose(Units(groups, structure("unstructured"), Magnitude().score), build(Allocation, "lamp"), 0.5)
    assert groups[1].members[0][0].mask[3, 3] and sum(g.members[0][0].kept for g in groups) == 160


def test_growth_of_a_diverged_gradient_is_refused() -> None:
    model = net()
    pruner = Pruner(schedule="constant", updater=DropGrow(), sparsity=0.5)
    pruner.attach(model)
    pruner.prepare(10)
    due = Update(0.5, (None,) * 3, monotone=False, progress=0.1)
    for param in pruner.params:
        param.weight.grad = torch.full_like(param.weight, float("nan"))
    arguments = (pruner.groups, pruner.scorer, pruner.structure, pruner.allocation)
    with pytest.raises(ValueError, match=r"scores of 0.weight hold NaN"):
        pruner.updater.update(*arguments, due)
    # where a gradient scaler leaves the step out, nothing is learned from its gradients
    pruner.updater.update(*arguments, Update(0.5, (None,) * 3, monotone=False, progress=0.1, gradients=False))
    assert pruner.kept == 128 + 32 + 0


def test_reconstruction_of_a_diverged_weight_is_refused() -> None:
    model = net()
    pruner = Pruner(schedule="oneshot", updater=Reconstruct(), allocation="uniform", sparsity=0.5)
    pruner.attach(model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    probe = Probe(model, [torch.randn(4, 8)], lambda batch: model(batch).square().mean())
    with pytest.raises(ValueError, match=r"scores of 0.weight hold NaN"):
        pruner.prepare(10, probe=probe)


def test_a_diverged_training_ends_with_an_error() -> None:
    model = net()
    pruner = Pruner(schedule="linear", structure="nm24", sparsity=0.5)
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e20)
    with pytest.raises(ValueError, match="hold NaN"):
        for index in range(10):
            step(model, optimizer, pruner, index, 10)
    assert pruner.sparsity < 0.5 and not pruner.at_target


# Shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_tied_scores_of_weights_that_are_not_contiguous(dtype: torch.dtype, masking: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3)).to(dtype)
    for layer in model:
        nn.init.constant_(layer.weight, 0.5)
    model = model.to(memory_format=torch.channels_last)
    for allocation in ("uniform", "global"):
        pruner = Pruner(schedule="oneshot", allocation=allocation, masking=masking, sparsity=0.7)
        pruner.attach(model)
        pruner.prepare(10)
        assert pruner.kept == 130 == sum(int((layer.weight != 0).sum()) for layer in model)
        for layer in model:
            nn.init.constant_(layer.weight, 0.5)
    # the first in the order of the tensor's shape, not of its memory
    assert pruner.params[0].mask.reshape(-1)[:130].all()


@pytest.mark.parametrize("name", ["kernel", "channel", "feature", "block1x1"])
def test_units_of_one_weight(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 12, 1), nn.Conv2d(12, 1, 1), nn.Flatten(), nn.Linear(1, 10))
    pruner = Pruner(schedule="linear", structure=name, sparsity=0.5)
    pruner.attach(model)
    pruner.prepare(10)
    for index in range(10):
        pruner.before_step(index)
        pruner.after_step()
    assert pruner.num_updates > 2 and pruner.at_target
    assert pruner.kept == pytest.approx(pruner.numel / 2, abs=6)


@pytest.mark.parametrize("sparsity", [0.0, 1e-300, 1e-17, 1e-16, 1e-12])
def test_erk_at_next_to_no_sparsity(sparsity: float) -> None:
    groups, _ = structure("unstructured").bind(find(net()), net())
    choose(Units(groups, structure("unstructured"), Magnitude().score), build(Allocation, "erk"), sparsity)
    assert sum(group.members[0][0].kept for group in groups) == 320


def shared_channels() -> nn.Sequential:
    """The channels of the middle layer score far lower than all others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)
    )
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    return model


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.99, 0.9999])
def test_the_last_output_of_a_layer_stays(allocation: str, sparsity: float) -> None:
    model = shared_channels()
    pruner = Pruner(schedule="linear", structure="channel", allocation=allocation, sparsity=sparsity)
    pruner.attach(model)
    pruner.prepare(20)
    for index in range(20):
        pruner.before_step(index)
        pruner.after_step()
    assert all(param.mask.any(dim=1).any() for param in pruner.params)


def test_the_last_output_stays_under_overrides_and_thresholds() -> None:
    pruner = Pruner(schedule="oneshot", structure="channel", sparsity=0.5, overrides={"2": 0.999})
    pruner.attach(shared_channels())
    pruner.prepare(20)
    assert pruner.params[1].kept == 16
    pruner = Pruner(schedule="oneshot", structure="channel", sparsity=1.0)
    pruner.attach(shared_channels())
    pruner.prepare(20)
    assert pruner.kept == 0  # what was asked for


# Updates that fail


def failing_at(call: int) -> Any:
    """`Units.assign`, which raises at its nth call, once."""
    original, calls = Units.assign, 0

    def assign(self: Units, index: int, chosen: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("out of memory")
        original(self, index, chosen)

    return assign


@pytest.mark.parametrize("updater", ["prune", "dropgrow"])
@pytest.mark.parametrize("masking", ["hard", "frozen", "ste"])
@pytest.mark.parametrize("failing", range(1, 5))
def test_a_mask_update_that_fails_is_due_again(
    monkeypatch: pytest.MonkeyPatch, failing: int, masking: str, updater: str
) -> None:
    """It fails at the first masks or later ones, within the updater, after none, one or two tensors."""
    if updater == "dropgrow" and masking != "hard":
        pytest.skip("needs zeros")
    model = net()
    schedule = Constant(final=0.5, every=3) if updater == "dropgrow" else Linear(final=0.5, every=3)
    pruner = Pruner(schedule=schedule, updater=updater, masking=masking, allocation="uniform")
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    failed = 0
    for index in range(20):
        if index == (6 if failing < 4 else 3):
            monkeypatch.setattr(Units, "assign", failing_at(min(failing, 3)))
        before = copy.deepcopy(pruner.state_dict())
        zeros = [param.weight == 0 for param in pruner.params]
        try:
            step(model, optimizer, pruner, index, 20)
        except RuntimeError:
            failed += 1
            after = pruner.state_dict()
            for key in ("updated", "level", "num_updates"):
                assert after[key] == before[key]
            for name, tensors in before["params"].items():
                assert after["params"][name]["pruned"] == tensors["pruned"]
                assert torch.equal(after["params"][name]["mask"], tensors["mask"])
                assert ("latent" in after["params"][name]) == ("latent" in tensors)
            assert all(torch.equal(param.weight == 0, z) for param, z in zip(pruner.params, zeros, strict=True))
            assert pruner.due and not pruner.at_target
    assert failed == 1
    assert pruner.at_target and pruner.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("axes", [{"updater": "reconstruct"}, {"rounds": 3}])
def test_weights_that_a_failed_update_moved_are_put_back(monkeypatch: pytest.MonkeyPatch, axes: dict[str, Any]) -> None:
    """Reconstruction fails at its second layer, rounds at the second of three."""
    model, updater = net(), axes.get("updater", "prune")
    schedule = OneShot(final=0.5, begin=0.5, rounds=axes.get("rounds", 1))
    pruner = Pruner(schedule=schedule, allocation="uniform", masking="hard", updater=updater)
    pruner.attach(model)
    probe = Probe(model, [torch.randn(8, model[0].in_features)], lambda batch: model(batch).sum())
    pruner.prepare(8, probe=probe)
    before = copy.deepcopy(model.state_dict())
    original, calls = MaskedParameter.set_mask, 0

    def failing(self: MaskedParameter, mask: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if updater == "reconstruct" else len(pruner.params) + 2):
            raise RuntimeError("out of memory")
        original(self, mask)

    pruner.step = 4
    monkeypatch.setattr(MaskedParameter, "set_mask", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pruner.advance()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruner.sparsity == 0 and pruner.due and pruner.num_updates == 0
    monkeypatch.undo()
    assert pruner.advance() and pruner.sparsity == zeros(model) == 0.5


def test_a_last_update_that_fails_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    pruner = Pruner(schedule=Linear(final=0.5, begin=0.0, end=0.5, every=5))
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner.prepare(20)
    for index in range(12):
        with monkeypatch.context() as patch:
            if index == 10:
                patch.setattr(Units, "assign", lambda *args: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    step(model, optimizer, pruner, index, 20)
                assert not pruner.at_target and pruner.sparsity < 0.5
                again = Pruner(schedule=Linear(final=0.5, begin=0.0, end=0.5, every=5))
                again.load_state_dict(copy.deepcopy(pruner.state_dict()))  # saved on the exception
                again.attach(model)
                again.prepare(20)
                assert not again.at_target and again.due
                continue
        step(model, optimizer, pruner, index, 20)
    assert pruner.at_target and pruner.sparsity == 0.5


# Gradients that are not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("masking", ["hard", "frozen"])
def test_pruned_weights_stay_zero_whatever_their_gradient(
    masking: str, optimizer: str, value: str, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3)).to(dtype, memory_format=torch.channels_last)
    pruner = Pruner(schedule=OneShot(final=0.7), masking=masking)
    pruner.attach(model)
    pruner.prepare(20)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    stepper = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    latent = [None if param.latent is None else param.latent.clone() for param in pruner.params]
    for index in range(4):
        for param in pruner.params:
            gradient = torch.full_like(param.weight, 0.1)
            param.weight.grad = gradient.masked_fill_(~param.mask, float(value)) if index == 1 else gradient
        pruner.before_step(index, optimizer=stepper)
        if index == 2:  # what clips by a norm that is not finite makes every gradient NaN
            for param in pruner.params:
                param.weight.grad.fill_(float("nan"))
        stepper.step()
        pruner.after_step()
        for param, values in zip(pruner.params, latent, strict=True):
            assert (param.weight[~param.mask] == 0).all() and bool(param.weight[param.mask].isfinite().all()) == (
                index < 2
            )
            if values is not None and param.latent is not None:
                assert torch.equal(param.latent[~param.mask], values[~param.mask])


# In a Trainer


class Module(LightningModule):
    """A network, and a target network that follows it outside of any optimizer."""

    def __init__(self, follows: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        self.target = copy.deepcopy(self.net) if follows else None
        self.zeros: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        if self.target is not None:
            with torch.no_grad():
                for mine, theirs in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    mine.lerp_(theirs + 0.1, 0.5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.zeros.append(zeros(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 0.01)


def zeros(model: nn.Module) -> float:
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def loader() -> DataLoader[Any]:
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 10)


def fit(
    module: LightningModule, *callbacks: Callback, epochs: int = 2, ckpt_path: Any = None, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **(settings | options))
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("masking", ["hard", "ste", "frozen"])
def test_weights_written_outside_of_their_optimizer_are_put_right(masking: str) -> None:
    module, callback = Module(follows=True), Sparsity(schedule=OneShot(final=0.5), masking=masking, report=False)
    with pytest.warns(
        UserWarning,
        match=r"of target.0.weight \(\d+\), target.2.weight \(\d+\) were not zero: no optimizer trains them",
    ):
        fit(module, callback, val_check_interval=3)
    assert len(module.zeros) == 4 * 8 and min(module.zeros) == callback.sparsity == zeros(module) == 0.5


def test_an_audit_names_each_weight_once_and_its_cause() -> None:
    class Writes(Module):
        def on_validation_epoch_start(self) -> None:
            with torch.no_grad():
                self.net[0].weight.add_(0.1)

    module, callback = Writes(), Sparsity(schedule=OneShot(final=0.5), report=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callback, epochs=3)
    messages = [str(w.message) for w in caught if "were not zero" in str(w.message)]
    assert len(messages) == 1 and "net.0.weight" in messages[0] and "outside of the steps" in messages[0]
    assert set(module.zeros) == {0.5}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda w: torch.optim.SGD(w, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda w: torch.optim.Adam(w, 0.01, amsgrad=True, weight_decay=1e-2),
    "adamw": lambda w: torch.optim.AdamW(w, 0.01, fused=True),
    "adamax": lambda w: torch.optim.Adamax(w, 0.01),
    "nadam": lambda w: torch.optim.NAdam(w, 0.01),
    "radam": lambda w: torch.optim.RAdam(w, 0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "rmsprop": lambda w: torch.optim.RMSprop(w, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda w: torch.optim.Adagrad(w, 0.05, initial_accumulator_value=0.1),
    "adadelta": lambda w: torch.optim.Adadelta(w, 1.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_that_an_optimizer_leaves_at_zero_need_no_mask(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of the weights is left out after a step that moves none of the pruned, and nothing is different."""
    masked: list[int] = []
    write = Hard.write

    def counted(masking: Hard, params: Any, groups: Any) -> None:
        masked[-1] += 1
        write(masking, params, groups)

    monkeypatch.setattr(Hard, "write", counted)

    def train(trusts: bool, **options: Any) -> list[torch.Tensor]:
        masked.append(0)
        monkeypatch.setattr(Sparsity, "_sees_last", lambda *args: trusts)
        module, callback = Module(), Sparsity(sparsity=0.75, schedule="linear", report=False, **options)
        module.configure_optimizers = lambda: OPTIMIZERS[optimizer](module.parameters())  # type: ignore[method-assign]
        fit(module, callback, epochs=4, gradient_clip_val=0.5)
        assert zeros(module) == callback.sparsity == 0.75
        return [weight.detach() for weight in module.parameters()]

    for options in ({}, {"updater": "granet", "allocation": "uniform"}):
        assert all(torch.equal(a, b) for a, b in zip(train(True, **options), train(False, **options), strict=True))
        assert masked[-2] < masked[-1] - 5, masked


@pytest.mark.parametrize("kind", ["clipping", "step", "callback", "hook", "later hook", "heir"])
def test_weights_are_masked_after_steps_that_may_move_any(kind: str) -> None:
    def disturb(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad.add_(1.0)

    class Disturbed(Module):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            disturb(optimizer)

    class Stepping(Module):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    class Heir(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            disturb(self)
            super().step()
            return loss

    class Hooked(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers() if kind == "hook" else Heir(self.net.parameters(), 0.01)
            if kind == "hook":
                optimizer.register_step_post_hook(
                    lambda *args: torch._foreach_add_([w.data for w in self.net.parameters()], 0.1)
                )
            return optimizer

    class Late(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            disturb(optimizer)

    class Hooks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            def move(*args: Any) -> None:
                torch._foreach_add_([weight.data for weight in pl_module.parameters()], 0.1)

            trainer.optimizers[0].register_step_pre_hook(move)

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            counts.append(zeros(pl_module))

    counts: list[float] = []
    module = {"clipping": Disturbed, "step": Stepping, "hook": Hooked, "heir": Hooked}.get(kind, Module)()
    callbacks = [
        Sparsity(schedule=OneShot(final=0.5), report=False),
        *([Late()] if kind == "callback" else [Hooks()] if kind == "later hook" else []),
    ]
    fit(module, *callbacks, Counts())
    assert min(counts[1:]) == 0.5, counts


def test_nothing_is_said_where_weights_and_masks_agree() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(), Sparsity(sparsity=0.5, report=False))
    assert not [w for w in caught if "were not zero" in str(w.message)]


@pytest.mark.parametrize("manual", [False, True])
def test_scores_see_the_gradients_that_the_module_has_cleaned(manual: bool) -> None:
    class Cleans(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.dense = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1.0)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(loss)
                optimizer.step()  # type: ignore[union-attr]
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradient = self.net[0].weight.grad
            assert gradient is not None
            self.dense += int((gradient[self.net[0].weight == 0] != 0).sum())
            for weight in self.parameters():
                if weight.grad is not None and not weight.grad.isfinite().all():
                    weight.grad.zero_()

    module = Cleans()
    callback = Sparsity(schedule=OneShot(final=0.5, begin=0.5), scorer="taylor", masking="hard", report=False)
    fit(module, callback, **({} if manual else {"gradient_clip_val": 1e-3}))
    assert callback.sparsity == zeros(module) == 0.5 and module.dense > 0
    assert all(bool(param.state["taylor"].isfinite().all()) for param in callback.pruner.params)
    assert "on_before_optimizer_step" not in vars(module)


# Other models


def reset(module: Module, seed: int) -> None:
    torch.manual_seed(seed)
    for layer in (module.net[0], module.net[2]):
        layer.reset_parameters()


def flat_masks(callback: Sparsity) -> torch.Tensor:
    return torch.cat([param.mask.reshape(-1) for param in callback.pruner.params])


def test_a_callback_that_is_used_again_starts_anew_on_another_model() -> None:
    callback, masks = Sparsity(schedule=Cubic(final=0.5, every=2), report=False), []
    for seed in range(2):
        module = Module()
        reset(module, seed)
        fit(module, callback)
        assert callback.sparsity == zeros(module) == 0.5 and callback.pruner.step == 16
        masks.append(flat_masks(callback))
        reference = Sparsity(schedule=Cubic(final=0.5, every=2), report=False)
        again = Module()
        reset(again, seed)
        fit(again, reference)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert not torch.equal(*masks)


def test_a_copy_or_a_state_that_is_loaded_goes_on() -> None:
    callback, module = Sparsity(schedule=OneShot(final=0.5), report=False), Module()
    fit(module, callback)
    masks = [param.mask.clone() for param in callback.pruner.params]
    fit(copy.deepcopy(module), callback)  # zero where the masks are
    assert all(torch.equal(p.mask, mask) for p, mask in zip(callback.pruner.params, masks, strict=True))
    other = Module()
    with torch.no_grad():
        other.net[0].weight.copy_(torch.randn(12, 6))
    callback.load_state_dict(callback.state_dict())
    fit(other, callback)
    assert all(torch.equal(p.mask, mask) for p, mask in zip(callback.pruner.params, masks, strict=True))
    assert zeros(other) == 0.5


def test_a_model_whose_weights_were_reset_starts_anew() -> None:
    callback, module, masks = Sparsity(schedule=OneShot(final=0.5), report=False), Module(), []
    fit(module, callback)
    for seed in range(2):
        reset(module, seed)
        fit(module, callback)
        assert callback.sparsity == zeros(module) == 0.5 and callback.pruner.step == 16
        masks.append(flat_masks(callback))
    assert not torch.equal(*masks)
    fit(module, callback)  # and one that was not goes on
    assert torch.equal(flat_masks(callback), masks[1])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_sparsity_of_a_checkpoint_is_known_without_training(tmp_path: Path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(Module(), Sparsity(sparsity=0.5, report=False), saving, enable_checkpointing=True)
    for what in ("validate", "fit"):  # which is over already
        callback, module = Sparsity(sparsity=0.5, report=False), Module()
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], enable_model_summary=False, **quiet)
        loaders = {"fit": (loader(), loader())}.get(what, (loader(),))
        getattr(trainer, what)(module, *loaders, ckpt_path=tmp_path / "last.ckpt")
        assert callback.sparsity == zeros(module) == 0.5


@pytest.mark.parametrize("name", ["unstructured", "row", "nm24", "channel"])
@pytest.mark.parametrize("allocation", ["erk", "global"])
def test_a_model_that_is_sparse_already_starts_from_its_zeros(name: str, allocation: str) -> None:
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[torch.rand_like(layer.weight) < (0.4 if name == "nm24" else 0.8)] = 0.0
            layer.weight[:3] = 0.0
    dead = [layer.weight == 0 for layer in (model[0], model[2], model[4])]
    start = sum(int(mask.sum()) for mask in dead) / 320
    final = None if name == "nm24" else 0.9
    pruner = Pruner(schedule="cubic", structure=name, sparsity=final, allocation=allocation)
    pruner.attach(model)
    assert name == "channel" or pruner.sparsity == pruner.level == pytest.approx(start)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for index in range(20):
        step(model, optimizer, pruner, index, 20)
        for param, mask in zip(pruner.params, dead, strict=False):
            kept = mask[:3] if name == "channel" else mask
            assert not (param.weight[:3] if name == "channel" else param.weight)[kept].any()
    assert pruner.at_target and (pruner.sparsity >= start or name == "channel")
    assert name != "unstructured" or pruner.sparsity == 0.9


def test_tensors_that_are_initialised_to_zero_are_no_pruned_ones() -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    pruner = Pruner(sparsity=0.5)
    pruner.attach(model)
    assert not any(param.pruned for param in pruner.params) and pruner.level == 0


# Settings of a state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "frozen"}, "masking=hard there, frozen here"),
        ({"masking": "ste"}, "masking=hard there, ste here"),
        ({"scorer": "random"}, "scorer=magnitude there, random here"),
        ({"structure": "nm24"}, "structure=Unstructured.* there, NM.n=2, m=4. here"),
        ({"updater": "dropgrow", "schedule": "constant"}, "updater=prune there, dropgrow here"),
        ({"schedule": Constant(final=0.0), "sparsity": None}, "a sparsity of 0.5 there, none here"),
    ],
)
def test_a_state_of_other_settings_is_refused(options: dict[str, Any], message: str) -> None:
    pruner = Pruner(schedule="oneshot", sparsity=0.5)
    pruner.attach(net())
    early = pruner.state_dict()
    pruner.prepare(10)
    state = pruner.state_dict()
    other = Pruner(**({"schedule": "oneshot", "sparsity": 0.5} | options))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    other.load_state_dict(early)  # nothing was pruned yet
    other.load_state_dict({key: value for key, value in state.items() if key != "settings"})
    Pruner(schedule="cubic", sparsity=0.9, allocation="global").load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_checkpoint_of_another_exclude_is_refused(tmp_path: Path) -> None:
    fit(
        Module(),
        Sparsity(schedule=OneShot(final=0.5), exclude=["net.2"], report=False),
        ModelCheckpoint(tmp_path, save_last=True),
        enable_checkpointing=True,
    )
    with pytest.raises(ValueError, match=r"other include or exclude: .*net.2"):
        fit(Module(), Sparsity(schedule=OneShot(final=0.5), report=False), epochs=3, ckpt_path=tmp_path / "last.ckpt")


# Rules that a small change would break in silence


def test_the_extra_unit_of_a_row_goes_to_the_best_one() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5], [6.0, 5.0, 4.0], [3.0, 2.5, 2.0]])
    assert structure("row").select(scores, 4).sum(1).tolist() == [1, 2, 1]
    assert structure("row").select(scores, 5).sum(1).tolist() == [1, 2, 2]


def test_momentum_is_forgotten_also_if_training_is_resumed_before_the_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(schedule=OneShot(final=0.5, begin=0.5))
    pruner.attach(model)
    for index in range(5):
        step(model, optimizer, pruner, index, 10)
    assert pruner.advance()
    resumed = Pruner(schedule=OneShot(final=0.5, begin=0.5))
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    resumed.attach(model)
    step(model, optimizer, resumed, 5, 10)
    for param in resumed.params:
        assert not param.weight[~param.mask].any()
        assert not optimizer.state[param.weight]["momentum_buffer"][~param.mask].any()


def test_pruned_weights_return_where_the_level_falls() -> None:
    pruner = Pruner(schedule=Cyclic(final=0.8, begin=0.0, end="8 steps", cycles=1), masking="hard")
    pruner.attach(net())
    pruner.prepare(20)
    levels = []
    for index in range(10):
        pruner.before_step(index)
        pruner.after_step()
        levels.append(round(pruner.sparsity, 2))
    assert levels == [0.8] * 4 + [0.0] * 4 + [0.8] * 2


def test_phases_that_fall_on_one_step_end_with_the_last() -> None:
    schedule = Cyclic(final=0.9, begin=0.0, end="2 steps", cycles=3)
    assert [schedule.levels(index, 10) for index in range(4)] == [(0.0,), (0.9,), (0.9,), ()]


def test_rounds_come_at_the_nearest_step_and_not_before_their_time() -> None:
    schedule = Iterative(final=0.488, rate=0.2, begin=0.0, end="11 steps")
    assert [index for index in range(20) if schedule.levels(index, 20)] == [0, 6, 11]
    assert [round(schedule.curve(x), 3) for x in (0.0, 0.4, 0.5, 0.9, 1.0)] == [0.2, 0.2, 0.36, 0.36, 0.488]


@pytest.mark.parametrize(
    "decay",
    [
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),  # of the rate there is
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),  # of its own count
    ],
)
def test_a_ticket_rewinds_the_learning_rate(decay: Any, tmp_path: Path) -> None:
    class Decays(Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates: list[float] = []

        def on_train_batch_end(self, *args: Any) -> None:
            if args[2] == 0:
                self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [decay(optimizer)]

    module = Decays()
    schedule = Tickets(final=0.5, rate=0.3, to=0.0)
    fit(module, Sparsity(schedule=schedule, report=False), Rewind("rewind"), epochs=9, default_root_dir=tmp_path)
    assert module.rates == pytest.approx([0.1, 0.05, 0.025] * 3)


def test_a_summary_of_another_model_counts_what_that_has() -> None:
    """A copy with the values before the masks, and one that carries them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    before = copy.deepcopy(net)
    pruner = Pruner(sparsity=0.75, schedule="constant", allocation="uniform")
    pruner.attach(net)
    pruner.prepare(10)
    pruner.advance()
    for model, left in ((net, 0.25), (copy.deepcopy(net), 0.25), (before, 1.0)):
        summary = summarize(pruner, model)
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        assert summary.kept == sum(int(torch.count_nonzero(weight)) for weight in weights)
        assert summary.kept == left * sum(weight.numel() for weight in weights)
    assert summary.layers[0].note == "96 pruned weights are not zero"
