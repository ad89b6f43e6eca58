"""Frozen norms and other buffers that channels are multiplied with or that are added to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Pruner, Sparsity
from pl_sparse.callbacks import RandomState, Shrink
from pl_sparse.core.upstream import averaged_models
from pl_sparse.export import load_shrunk, save_shrunk, shrink
from pl_sparse.schedule import Linear
from pl_sparse.structure import Channel
from pl_sparse.surgery.timed import narrowed
from pl_sparse.surgery.trial import couplings

EPS = 1e-5


class Frozen(nn.Module):
    """A norm of buffers, and how it is written.

    Args:
        normalize: of the norm and the input.
        shape: of the buffers, with -1 for the channels.
        saved: whether checkpoints have the buffers.
    """

    def __init__(
        self,
        normalize: Callable[[Any, Tensor], Tensor],
        channels: int,
        shape: tuple[int, ...] = (-1,),
        saved: bool = True,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        drawn = torch.Generator().manual_seed(channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = torch.rand(channels, generator=drawn) + 0.5
            self.register_buffer(name, values.view(shape), persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(self, x)


def folded(norm: Any, x: Tensor) -> Tensor:
    """torchvision's, and that of DETR."""
    weight, bias = norm.weight.reshape(1, -1, 1, 1), norm.bias.reshape(1, -1, 1, 1)
    variance, mean = norm.running_var.reshape(1, -1, 1, 1), norm.running_mean.reshape(1, -1, 1, 1)
    scale = weight * (variance + EPS).rsqrt()
    return x * scale + (bias - mean * scale)


def unfolded(norm: Any, x: Tensor) -> Tensor:
    x = (x - norm.running_mean[None, :, None, None]) / torch.sqrt(norm.running_var[None, :, None, None] + EPS)
    return x * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]


def in_place(norm: Any, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + EPS).sqrt()
    x = x.mul(scale.view(-1, 1, 1))
    return x.sub_((norm.running_mean * scale - norm.bias).view(-1, 1, 1))


def at_once(norm: Any, x: Tensor) -> Tensor:
    scale = norm.weight * (norm.running_var + EPS).pow(-0.5)
    shift = norm.bias - norm.running_mean * scale
    return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))


def broadcast(norm: Any, x: Tensor) -> Tensor:
    return (x - norm.running_mean) * torch.rsqrt(norm.running_var + EPS) * norm.weight + norm.bias


def functional(norm: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, EPS)


def running(norm: Any, x: Tensor) -> Tensor:
    """Statistics of one's own, which are written to in training: some in place, others replaced."""
    if not norm.training:
        return unfolded(norm, x)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    norm.running_mean = 0.9 * norm.running_mean + 0.1 * mean.detach()
    norm.running_var.mul_(0.9).add_(0.1 * variance.detach())
    x = (x - mean[None, :, None, None]) / torch.sqrt(variance[None, :, None, None] + EPS)
    return x * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]


SPELLINGS: dict[Callable[[Any, Tensor], Tensor], tuple[int, ...]] = {
    folded: (-1,),
    unfolded: (-1,),
    in_place: (-1,),
    at_once: (-1,),
    broadcast: (1, -1, 1, 1),
    functional: (-1,),
    running: (-1,),
}


class Net(nn.Module):
    """A residual network of convolutions and norms."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 1)
        self.norm_stem, self.norm_a, self.norm_b = norm(8), norm(12), norm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_stem(self.stem(x)).relu()
        y = self.norm_b(self.b(self.norm_a(self.a(x)).relu()))
        return self.fc((x[..., 1:-1, 1:-1] + y).relu().mean((2, 3)))


def made(spelling: Callable[[Any, Tensor], Tensor], **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(lambda channels: Frozen(spelling, channels, SPELLINGS[spelling], **options))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 10, 10, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, x: Tensor, steps: int = 3, **options: Any) -> Pruner:
    """Half of the channels masked, and a few steps."""
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5, **options)
    pruner.attach(net, x)
    pruner.prepare(steps)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        pruner.before_step(step, optimizer=optimizer)
        optimizer.step()
        pruner.after_step(optimizer)
    net.eval()
    return pruner


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_channels_leave_with_the_buffers_of_their_norms(
    spelling: Callable[[Any, Tensor], Tensor], tmp_path: Path
) -> None:
    net, x = made(spelling), images()
    pruner = trained(net, x)
    assert pruner.skipped.keys() == {"fc.weight"} and pruner.coverage > 0.9
    plain = made(spelling).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        before, silent = net(x), (net.stem.weight == 0).flatten(1).all(1)
        stream = net.norm_stem(net.stem(x))
        assert int(silent.sum()) == 4 and not stream[:, silent].any() and stream[:, ~silent].any()
        assert torch.equal(plain(x), before)  # a checkpoint alone has the masked buffers
        result = shrink(net, x)
        assert not result.left and result.after < result.before / 2
        assert far(net(x), before) < 1e-4
        assert {net.get_buffer(f"norm_a.{n}").numel() for n in ("weight", "bias", "running_mean", "running_var")} == {6}
        save_shrunk(net, result.plan, tmp_path)
        again = made(spelling).eval()
        load_shrunk(again, tmp_path)
        assert torch.equal(again(x), net(x))
    trained_on = torch.optim.SGD(net.parameters(), 0.05)
    net.train()
    net(x).square().mean().backward()
    trained_on.step()


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("torchvision.ops", "FrozenBatchNorm2d"),
        ("transformers.models.detr.modeling_detr", "DetrFrozenBatchNorm2d"),
        ("transformers.models.rt_detr.modeling_rt_detr", "RTDetrFrozenBatchNorm2d"),
    ],
)
def test_norms_of_others(package: str, name: str) -> None:
    norm = getattr(pytest.importorskip(package, exc_type=ImportError), name)
    torch.manual_seed(0)
    net, x = Net(norm), images()
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.uniform_(0.5, 1.5)
    assert trained(net, x).skipped.keys() == {"fc.weight"}
    with torch.no_grad():
        before = net(x)
        result = shrink(net, x)
        assert not result.left and result.after < result.before / 2 and far(net(x), before) < 1e-4


def test_variance_and_scale_of_a_frozen_norm_stay_as_they_are() -> None:
    net, before = made(folded), made(folded)
    trained(net, images())
    for name, buffer in net.norm_a.named_buffers():
        zeros = int((buffer == 0).sum())
        assert zeros == (6 if name in ("bias", "running_mean") else 0)
        assert torch.equal(buffer[buffer != 0], before.norm_a.get_buffer(name)[buffer != 0])


class Shared(nn.Module):
    """Two layers, and what is done with a buffer between them."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], persistent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc, self.use = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), use
        self.register_buffer("shift", torch.rand(8) + 0.5, persistent=persistent)
        self.other = nn.Module()
        self.other.register_buffer("shift", self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.use(self, self.a(x)).relu()).relu())


def written(net: Any, x: Tensor) -> Tensor:
    net.shift.mul_(0.5).add_(x.detach().mean(0) + 0.1)  # not zero where x is
    return x + net.shift


@pytest.mark.parametrize(
    ("use", "persistent", "reason"),
    [
        (lambda net, x: x + net.shift, True, r"shift and other.shift, one buffer, are added"),
        (lambda net, x: x + net.shift, False, r"shift, a buffer that checkpoints do not have, is added"),
        (lambda net, x: x * net.shift + net.shift.mean(), False, "a trial showed"),
        (written, True, "no channels of a layer|a trial showed"),
    ],
)
def test_buffers_that_cannot_go_keep_their_channels_by_name(
    use: Callable[[Any, Tensor], Tensor], persistent: bool, reason: str
) -> None:
    net = Shared(use, persistent)
    if "one buffer" not in reason:
        del net.other
    kept = {port.path: coupling.reason for coupling in couplings(net, torch.randn(5, 4)) for port in coupling.ports}
    assert re.search(reason, kept["a"] or "")


def test_a_buffer_that_multiplies_need_not_be_saved() -> None:
    net, x = Shared(lambda net, x: x * net.shift, persistent=False), torch.randn(5, 4)
    del net.other
    trained(net, x)
    with torch.no_grad():
        before = net(x)
        assert not shrink(net, x).left and net.shift.shape == (4,) and far(net(x), before) < 1e-4


def test_values_behind_masks_come_back_and_statistics_are_not_those_of_before() -> None:
    net, x = made(running), images()
    dense = net.norm_a.running_mean.clone()
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5, masking="frozen")
    pruner.attach(net, x)
    pruner.prepare(2)
    net.train()(x)
    (mean,) = (each for each in pruner.companions if each.name == "norm_a.running_mean")
    kept, written = mean.mask.clone(), net.norm_a.running_mean.clone()
    assert mean.pruned and torch.equal(written != 0, kept) and not torch.equal(written[kept], dense[kept])
    for param in pruner.masked:
        param.set_mask(torch.ones_like(param.mask))
    with torch.no_grad():
        pruner.masking.changed(pruner.masked, pruner.groups)
    assert torch.equal(net.norm_a.running_mean, torch.where(kept, written, dense))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = made(folded).double()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Stop(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def fit(*callbacks: Callback, checkpoint: Path | None = None) -> Module:
    torch.manual_seed(0)
    module = Module()
    schedule = Linear(final=0.5, begin=0.0, end=0.8, every=1)
    sparsity = Sparsity(schedule=schedule, structure=Channel(coupled=True), allocation="uniform", report=False)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sparsity, *callbacks],
    )
    data = TensorDataset(images(16), torch.arange(16) % 3)
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), ckpt_path=checkpoint, weights_only=True)
    return module


def test_shrinking_while_training_and_resuming_bit_for_bit(tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[Callback]:
        last = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True)
        return [Shrink(), RandomState(), EMAWeightAveraging(decay=0.9), last]

    masked = fit()
    whole = fit(*callbacks("whole"))
    assert whole.losses == pytest.approx(masked.losses, rel=1e-9)
    assert masked.net.norm_a.bias.shape == (12,) and whole.net.norm_a.bias.shape == (6,)
    with pytest.warns(UserWarning, match="before the schedule reached"):
        part = fit(*callbacks("part"), Stop())
    assert 6 < len(part.net.norm_a.bias) < 12
    resumed = fit(*callbacks("part"), checkpoint=tmp_path / "part" / "last.ckpt")
    assert whole.losses[4:] == resumed.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_averaged_weights_are_masked_with_their_buffers() -> None:
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (average,) = averaged_models(trainer)
            seen.append((average.module.net.norm_a.bias == 0).equal(pl_module.net.norm_a.bias == 0))

    fit(EMAWeightAveraging(decay=0.9), Look())
    assert seen == [True] * 4


def test_a_narrower_copy_has_narrower_buffers() -> None:
    net, x = made(folded).eval(), images()
    pruner = Pruner("magnitude", "oneshot", Channel(coupled=True), "uniform", sparsity=0.5)
    pruner.attach(net, x)
    smaller = narrowed(net, pruner.groups, [3] * len(pruner.groups), x)
    assert smaller.norm_a.running_mean.shape == (3,) and net.norm_a.running_mean.shape == (12,)


def test_masks_follow_buffers_that_are_replaced_and_a_layer_that_is() -> None:
    net, x = made(folded), images()
    pruner = trained(net, x)
    net.double()  # gives each module other buffers
    net.fc = nn.Linear(8, 2).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    with torch.no_grad():
        net.norm_a.bias += 1
    net(x.double()).square().mean().backward()
    pruner.find_again(x.double())
    pruner.before_step(3, 6, optimizer)
    optimizer.step()
    pruner.after_step(optimizer)
    pruner.apply()
    assert int((net.norm_a.bias == 0).sum()) == 6 and net.norm_a.bias.dtype == torch.float64


class Bare(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x)


def test_channels_go_through_a_norm_without_tensors() -> None:
    torch.manual_seed(0)
    net, x = Net(Bare), images()
    assert trained(net, x).skipped.keys() == {"fc.weight"}
    with torch.no_grad():
        before = net(x)
        assert not shrink(net, x).left and far(net(x), before) < 1e-4
