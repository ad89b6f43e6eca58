"""Every kind of optimizer: the sparsity asked for is counted in the weights; a resumed training is the whole one."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.core.optimizers import clear_state

EPOCHS, BATCHES = 4, 6


class Sam(Optimizer):
    """Sharpness-aware minimization: gradients are those at the weights that are worst nearby."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        scale = 0.05 / (torch.stack([weight.grad.norm() for weight in weights]).norm() + 1e-12)
        self.moved = [(weight, weight.clone()) for weight in weights]
        for weight in weights:
            weight.add_(weight.grad * scale)
            weight.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for weight, earlier in self.moved:
            weight.copy_(earlier)
        self.moved = []
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.base_optimizer.load_state_dict(state)
        self.param_groups = self.base_optimizer.param_groups


class Net(LightningModule):
    """Its second layer is large enough for states of 8 bits."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.make = make
        self.zeros: list[float] = []
        self.denser = 0.0  # the most by which weights in use were denser than their masks

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Any:
        callback = Sparsity.of(self.trainer)
        assert callback is not None
        self.denser = max(self.denser, round(callback.pruner.sparsity - zeros(self), 9))
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.zeros.append(zeros(self))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Averaged(Net):
    """Evaluates and saves the averaged weights, as schedule-free optimizers ask for."""

    def mode(self, name: str) -> None:
        getattr(self.optimizers(), name)()

    def on_train_epoch_start(self) -> None:
        self.mode("train")

    def on_validation_epoch_start(self) -> None:
        self.mode("eval")


class SamByHand(Net):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.first_step()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()


class Pickled(TorchCheckpointIO):
    """Loads states of 8 bits by torchao, which Lightning's own way of loading them to the CPU does not."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, weights_only=False)


class Save(Callback):
    """Saves in the middle of training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == EPOCHS // 2:
            trainer.save_checkpoint(self.path)


def data() -> DataLoader[Any]:
    x = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 4)


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": EPOCHS}
    trainer = Trainer(callbacks=list(callbacks), **(quiet | options))
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return trainer


def zeros(module: nn.Module) -> float:
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def exact(tmp_path: Path, kind: type[Net], make: Callable[[Any], Any], masking: str) -> Net:
    """Train, and again from the middle: the target is met to the unit, validation sees it, and both are equal."""

    def sparsity() -> Sparsity:
        return Sparsity(sparsity=0.75, masking=masking, report=False)

    whole, callback = kind(make), sparsity()
    fit(whole, callback, Save(tmp_path / "half.ckpt"), plugins=[Pickled()])
    assert callback.pruner.step == EPOCHS * BATCHES
    assert zeros(whole) == callback.sparsity == whole.zeros[-1] == pytest.approx(0.75, abs=1e-4)
    resumed = kind(make)
    fit(resumed, sparsity(), ckpt_path=tmp_path / "half.ckpt", plugins=[Pickled()])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert whole.denser <= 0 and resumed.denser <= 0
    return whole


# Closures that are evaluated more than once


def lbfgs(params: Any) -> Optimizer:
    return torch.optim.LBFGS(params, 0.1, max_iter=3)


def sam(params: Any) -> Optimizer:
    return Sam(params, torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize("masking", ["hard", "frozen"])
@pytest.mark.parametrize(
    ("kind", "make"), [(Net, lbfgs), (Net, sam), (SamByHand, sam)], ids=["lbfgs", "sam", "by hand"]
)
def test_closures_that_are_evaluated_often(tmp_path: Path, kind: type[Net], make: Any, masking: str) -> None:
    exact(tmp_path, kind, make, masking)


def test_closures_see_no_latent_values() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates the loss again within its step, where masking=ste has"):
        fit(Net(lbfgs), Sparsity(sparsity=0.75, masking="ste", report=False))
    module = Net(sam)
    with pytest.raises(RuntimeError, match="Sam evaluates the loss again within its step, where masking=ste has"):
        fit(module, Sparsity(sparsity=0.75, masking="ste", report=False))
    assert module.trainer.global_step == 0


def test_the_memory_of_an_inner_optimizer_is_cleared() -> None:
    net = nn.Linear(8, 8)
    pruner, optimizer = Pruner(sparsity=0.5), Sam(net.parameters(), torch.optim.Adam, lr=0.1)
    pruner.attach(net)

    def closure() -> torch.Tensor:
        loss = net(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    (param,) = pruner.params
    param.set_mask(torch.arange(64).view(8, 8) % 2 == 0)
    clear_state(optimizer, param)
    momentum = optimizer.base_optimizer.state[net.weight]["exp_avg"]
    assert not momentum[~param.mask].any() and momentum[param.mask].all()


# Weights that are averaged


class ScheduleFree(torch.optim.SGD):
    """The averages x beside the weights y of training, as the package schedulefree has them."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {"train_mode": False, "k": 0}

    @torch.no_grad()
    def _swap(self, to: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to:
                for param in group["params"]:
                    if "z" in self.state[param]:
                        param.lerp_(self.state[param]["z"], weight)
                group["train_mode"] = to

    def train(self) -> None:
        self._swap(True, 1 - 0.9)

    def eval(self) -> None:
        self._swap(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            assert group["train_mode"]
            part = 1 / (group["k"] + 1)
            for param in group["params"]:
                z = self.state[param].setdefault("z", param.clone())
                param.lerp_(z, part).add_(param.grad, alpha=group["lr"] * (0.9 * (1 - part) - 1))
                z.sub_(param.grad, alpha=group["lr"])
            group["k"] += 1
        return loss


def own_schedule_free(params: Any) -> Optimizer:
    return ScheduleFree(params, 0.1)


def schedule_free(params: Any) -> Optimizer:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.01)


@pytest.mark.parametrize("masking", ["hard", "frozen", "ste"])
@pytest.mark.parametrize("make", [own_schedule_free, schedule_free])
def test_averaged_weights_are_sparse_wherever_they_are_used(tmp_path: Path, make: Any, masking: str) -> None:
    module = exact(tmp_path, Averaged, make, masking)
    optimizer: Any = module.optimizers()
    before = copy.deepcopy(module.state_dict())
    optimizer.train()
    assert zeros(module) == pytest.approx(0.75, abs=1e-4)
    optimizer.eval()
    assert zeros(module) == pytest.approx(0.75, abs=1e-4)
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in module.state_dict().items())


def test_what_cannot_be_followed_is_refused() -> None:
    class Wrapper:
        def __init__(self, params: Any) -> None:
            self.base = torch.optim.SGD(params, 0.1)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

        param_groups = property(lambda self: self.base.param_groups)
        defaults = property(lambda self: self.base.defaults)
        state = property(lambda self: self.base.state)

        def state_dict(self) -> Any: ...
        def load_state_dict(self, state: Any) -> None: ...
        def step(self, closure: Any = None) -> Any: ...

    with pytest.raises(ValueError, match=r"Wrapper is not a torch\.optim\.Optimizer"):
        fit(Net(Wrapper), Sparsity(sparsity=0.75, report=False))
    with pytest.raises(ValueError, match="ScheduleFree averages the values behind the masks"):
        fit(
            Averaged(own_schedule_free),
            Sparsity(scorer="softthreshold", updater="threshold", sparsity=1.0, report=False),
        )


# States of 8 bits


def torchao(params: Any) -> Optimizer:
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=0.01)


def bitsandbytes(params: Any) -> Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=0.01)


@pytest.fixture
def _eager() -> Iterator[None]:
    """torchao compiles its step, which takes long."""
    stance = torch.compiler.set_stance("force_eager")
    with stance:
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("make", [torchao, bitsandbytes])
def test_states_of_8_bits(tmp_path: Path, make: Any) -> None:
    module = exact(tmp_path, Net, make, "hard")
    optimizer, weight = module.trainer.optimizers[0], module.net[2].weight
    state = optimizer.state[weight]
    codes = state["exp_avg"].codes if "exp_avg" in state else state["state1"]
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape
    qmap = state["exp_avg"].qmap if "exp_avg" in state else state["qmap1"]
    momentum = qmap[codes.long()].abs()  # of 1; bitsandbytes rounds 0 to 2e-5
    assert momentum[weight == 0].max() < 1e-4 and momentum[weight != 0].max() > 0.5


# Several processes


ZERO = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_optimizers import *
from torch.distributed.optim import ZeroRedundancyOptimizer

def zero(params):
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=0.01)

if __name__ == "__main__":
    folder = Path({folder!r})
    def run(make, path=None, *callbacks):
        module, callback = Net(make), Sparsity(sparsity=0.75, report=False)
        fit(module, callback, *callbacks, ckpt_path=path, devices=2, strategy="ddp")
        assert callback.pruner.step == EPOCHS * BATCHES // 2
        assert zeros(module) == callback.sparsity == module.zeros[-1] and abs(zeros(module) - 0.75) < 1e-4
        assert module.denser <= 0
        return module
    whole = run(zero, None, Save(folder / "half.ckpt"))
    for other in (run(zero, folder / "half.ckpt"), run(lambda params: torch.optim.AdamW(params, lr=0.01))):
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
    print("zero works")
"""


def test_zero_shards_the_state_among_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "zero.py"
    script.write_text(ZERO.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("zero works") == 2


# Optimizers and groups that come later


class Later(Net):
    """Trains the last two layers from the second epoch on, by an optimizer that is made then."""

    grown = False

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.grown = True

    def groups(self) -> Any:
        return [{"params": self.parameters()}] if self.grown else [{"params": self.net[:2].parameters()}]

    def configure_optimizers(self) -> Any:
        return self.make(self.groups())

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.grow()

    def grow(self) -> None:
        self.grown = True
        self.trainer.strategy.optimizers = [self.configure_optimizers()]


class Grows(Later):
    """The same, by a group that is added."""

    def groups(self) -> Any:
        groups = [{"params": self.net[:2].parameters()}, {"params": self.net[2:].parameters()}]
        return groups if self.grown else groups[:1]

    def grow(self) -> None:
        self.grown = True
        self.trainer.optimizers[0].add_param_group(self.groups()[1])


@pytest.mark.parametrize("kind", [Later, Grows])
@pytest.mark.parametrize("masking", ["hard", "ste"])
def test_weights_that_are_trained_later(tmp_path: Path, kind: type[Net], masking: str) -> None:
    exact(tmp_path, kind, lambda groups: torch.optim.AdamW(groups, 0.01), masking)
