"""Trained for integers: what is pruned is the integer 0, and the integers compute what was simulated."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse import Sparsity
from pl_sparse.app.artifacts import in_its_place
from pl_sparse.callbacks import Quantize, RandomState
from pl_sparse.export import (
    ONNXInt8,
    shrink,
)
from pl_sparse.network.graph import traced
from pl_sparse.quantize import Int4Weight, Int8, Quantization, integers, post_training
from pl_sparse.tasks.data import Batches
from pl_sparse.tasks.models import resnet20


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 6, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    return x + y[:, None, None, None], y


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.ranges: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def fit(
    folder: Path,
    module: LightningModule,
    quantization: Quantization,
    ckpt: str | None = None,
    precision: Any = "32-true",
    **options: Any,
) -> tuple[Sparsity, Quantize]:
    x, y = data()
    sparsity = Sparsity(sparsity=0.75, schedule="cubic", allocation="uniform", report=False)
    quantize = Quantize(quantization, **{"begin": 0.5, "freeze": 0.75, **options})
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    best = ModelCheckpoint(dirpath=folder, filename="best", monitor="val/acc", mode="max")
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        precision=precision,
        callbacks=[sparsity, quantize, RandomState(), best, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    validation = Batches(3 * x + 9, y, 32)  # of another range
    trainer.fit(module, Batches(x, y, 16, shuffle=True), validation, ckpt_path=ckpt, weights_only=True)
    return sparsity, quantize


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module, Sparsity, Quantize]:
    folder = tmp_path_factory.mktemp("int8")
    module = Module()
    return folder, module, *fit(folder, module, Int8())


Trained = tuple[Path, Module, Sparsity, Quantize]


def test_parameters_and_masks_are_what_they_were(trained: Trained) -> None:
    folder, module, sparsity, quantize = trained
    assert quantize.active and sparsity.pruner.sparsity == pytest.approx(0.75, abs=0.002)
    for param in sparsity.pruner.params:
        assert param.weight is dict(module.named_parameters())[param.name]
        assert not param.weight[~param.mask].any()
    saved = torch.load(folder / "epoch=7.ckpt", weights_only=True)["state_dict"]
    plain = Module()
    plain.load_state_dict(saved, strict=True)
    assert list(saved) == list(plain.state_dict())


def test_integers_compute_what_was_simulated(trained: Trained, tmp_path: Path) -> None:
    _, module, sparsity, quantize = trained
    module.eval()
    x, _ = data()
    converted = quantize.quantization.convert()
    with torch.no_grad():
        simulated, made = module.net(x), converted(x)
    assert float((simulated - made).abs().max()) < 1e-5 * float(simulated.abs().max())

    found = integers(converted, module.net)
    assert list(found) and set(found) == {"0.weight", "5.weight", "7.weight"}
    for param in sparsity.pruner.params:
        values = found[param.name.removeprefix("net.")]
        assert values.dtype == torch.int8 and not values[~param.mask].any()
        assert int(values.min()) >= -127 and int(values.abs().max()) == 127
    # symmetric with a scale for each output channel, from the equation
    weight = module.net[5].weight.detach()  # type: ignore[union-attr]
    for row, value in zip(weight, found["5.weight"], strict=True):
        scale = float(row.abs().max()) / 127
        for w, q in zip(row.tolist(), value.tolist(), strict=True):
            assert abs(w / scale - q) < 0.501 if scale else q == 0
    # and a BatchNorm folded into the convolution does not move its zeros
    conv, norm = module.net[0], module.net[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[union-attr,operator]
    folded = (conv.weight * factor[:, None, None, None]).detach()  # type: ignore[union-attr,operator]
    scales = folded.abs().amax((1, 2, 3), keepdim=True) / 127
    assert float((folded / scales - found["0.weight"]).abs().max()) < 0.51

    export = ONNXInt8()
    export.write(converted, x, tmp_path / export.file)
    run = export.open(tmp_path / export.file, module.net)
    with torch.no_grad():
        assert torch.equal(run(x[:5]).argmax(1), converted(x[:5]).argmax(1))


def test_the_best_is_a_rounded_one(trained: Trained) -> None:
    folder, *_ = trained
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] >= 4


def test_ranges_and_statistics_stay_at_the_end(trained: Trained) -> None:
    folder, *_ = trained
    saved = [torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True) for epoch in range(8)]
    ranges = [checkpoint["callbacks"]["Quantize"]["ranges"] for checkpoint in saved]
    means = [checkpoint["state_dict"]["net.1.running_mean"] for checkpoint in saved]
    assert not ranges[3] and ranges[4]
    activation = next(name for name, value in ranges[5].items() if name.endswith("max_val") and value.numel() == 1)
    assert ranges[4][activation] != ranges[5][activation] and not torch.equal(means[4], means[5])
    assert ranges[6][activation] == ranges[7][activation] and torch.equal(means[6], means[7])
    # validation has inputs of three times the size, which must not enter the range of the inputs
    x, _ = data()
    assert float(ranges[5]["activation_post_process_0.activation_post_process.max_val"]) <= float(x.max())


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(trained: Trained, at: int) -> None:
    folder, module, _, quantize = trained
    resumed = Module()
    _, again = fit(folder, resumed, Int8(), str(folder / f"epoch={at}.ckpt"))
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ours, theirs = again.quantization.state_dict(), quantize.quantization.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_quantized_after_training() -> None:
    net = network().eval()
    with torch.no_grad():
        net[5].weight[:, ::2] = 0  # type: ignore[index,operator]
    x, _ = data()
    converted = post_training(net, [x[:32], x[32:]])
    with torch.no_grad():
        wanted, found = net(x), converted(x)
    assert 0 < float((wanted - found).abs().max()) < 0.05 * float(wanted.abs().max())
    assert not integers(converted, net)["5.weight"][:, ::2].any()


def test_four_bits(tmp_path: Path) -> None:
    module = Module()
    sparsity, quantize = fit(tmp_path, module, Int4Weight(group=32))
    torch.load(tmp_path / "epoch=7.ckpt", weights_only=True)
    module.eval()
    x, _ = data()
    converted = quantize.quantization.convert()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), module.net(x), atol=1e-4, rtol=1e-4)
    found = integers(converted, module.net)
    assert set(found) == {"5.weight"}  # the last one has 8 inputs
    weight, values = module.net[5].weight.detach(), found["5.weight"]  # type: ignore[union-attr]
    mask = next(param.mask for param in sparsity.pruner.params if param.name == "net.5.weight")
    assert not values[~mask].any() and int(values.min()) >= -8 and int(values.max()) <= 7
    for i in range(8):
        for group in range(2):
            part = slice(32 * group, 32 * group + 32)
            # the smallest scale at which the group fits into [-8, 7]
            scale = max(float(weight[i, part].max()) / 7, -float(weight[i, part].min()) / 8, 1e-30)
            error = weight[i, part] / scale - values[i, part]
            assert float(error.abs().max()) < 1.1
    quantize.quantization.release()
    assert type(module.net[5]) is nn.Linear and sparsity.pruner.params[1].weight is module.net[5].weight


def test_what_cannot_be_quantized_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no linear layer has a multiple of group=48 inputs; there are 5 with 64"):
        fit(tmp_path, Module(), Int4Weight(group=48))
    with pytest.raises(ValueError, match="begin must be before the end of training"):
        fit(tmp_path, Module(), Int8(), begin=0.8, freeze=0.2)


def test_integers_compute_what_was_simulated_in_mixed_precision(tmp_path: Path) -> None:
    """The simulation is float32 there too: bfloat16 was refused by an operation of torch, in the middle of training."""
    module = Module()
    _, quantize = fit(tmp_path, module, Int8(), precision="bf16-mixed")
    x, _ = data()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            simulated = module.eval().net(x.bfloat16().float())
        made = quantize.quantization.convert()(x.bfloat16().float())
    assert simulated.dtype == torch.float32
    assert float((simulated - made).abs().max()) < 1e-5 * float(simulated.abs().max())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "float64")])
def test_weights_that_are_not_float32_are_refused(precision: str, dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"simulates integers in float32, and 0.weight is torch.{dtype}: train in"):
        fit(tmp_path, Module(), Int8(), precision=precision)


def test_a_norm_that_is_called_twice_is_folded_twice() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2)
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.Conv2d(2, 2, 1), norm), torch.randn(8, 1, 2, 2)
    quantization = Int8()
    quantization.prepare(net, x)
    net.train()(x)
    with torch.no_grad():
        simulated, converted = net.eval()(x), quantization.convert()
        assert float((converted(x) - simulated).abs().max()) < 1e-5 and "batch_norm" not in converted.code


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Conv2d(2, 4, 1, bias=False)]
)
def test_a_norm_keeps_its_eps_and_momentum(layer: nn.Module) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(layer, nn.BatchNorm2d(4, eps=0.1, momentum=0.6)), torch.randn(16, 2, 5, 5) / 3
    plain, quantization = copy.deepcopy(net), Int8()
    quantization.prepare(net, x)
    for each in (net, plain):
        each.train()(x)
    norms = net[1].state_dict(), plain[1].state_dict()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(norms[0][name], norms[1][name], atol=0.01, rtol=0.02)
    with torch.no_grad():
        wanted, simulated, made = (each(x) for each in (plain.eval(), net.eval(), quantization.convert()))
    assert float((simulated - wanted).abs().max()) < 0.03 * float(wanted.abs().max())
    error = (made - simulated).abs()  # a value between two integers may be rounded to the other one
    assert float(error.max()) < 0.02 and float(error.median()) < 1e-6


def test_a_recurrent_network_is_traced_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(nn.Sequential(nn.GRU(3, 4, batch_first=True)), torch.randn(2, 5, 3))


def test_a_network_that_takes_any_number_of_inputs_is_traced() -> None:
    class Net(nn.Linear):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(inputs[0])

    graph = traced(Net(3, 2), torch.randn(4, 3)).module()
    assert graph(torch.randn(7, 3)).shape == (7, 2)


def test_a_network_that_is_not_called_is_told(tmp_path: Path) -> None:
    class Other(Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.body(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"training_step did not call net.*Quantize\(network=\.\.\.\).*net, body"):
        fit(tmp_path, Other(), Int4Weight(group=32))


def test_a_channel_whose_scale_is_masked_stays_finite_and_is_folded() -> None:
    net = network()
    with torch.no_grad():
        for weight in (net[0].weight, net[1].weight, net[1].bias):
            weight[1] = 0
    x, y = data()
    quantization = Int8()
    quantization.prepare(net, x)
    net.train()
    F.cross_entropy(net(x), y).backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in net.parameters())
    assert float(net[0].weight.grad[0].abs().max()) > 0
    net.eval()
    simulated = net(x)
    converted = quantization.convert()
    assert "batch_norm" not in converted.code and "masked_fill" not in converted.code
    assert torch.allclose(converted(x), simulated, atol=0.05)


def test_ranges_fit_a_network_with_fewer_channels() -> None:
    net, x = network().eval(), data()[0]
    with torch.no_grad():
        for weight in (net[0].weight, net[1].weight, net[1].bias):
            weight[1] = 0
    whole = Int8()
    whole.prepare(net, x)
    net.train()(x)
    net.eval()
    state, wanted = whole.state_dict(), whole.convert()(x)
    whole.release()
    shrink(net, x[:2])
    assert net[0].out_channels == 3
    small = Int8()
    small.prepare(net, x)
    small.load_state_dict(state)
    with torch.no_grad():
        error = (small.convert()(x) - wanted).abs()  # a value between two integers may be rounded to the other one
    assert float(error.max()) < 0.02 and float(error.median()) < 1e-6


@pytest.mark.parametrize("trained", [True, False])
def test_every_layer_of_a_residual_network_has_integers_on_both_sides(trained: bool) -> None:
    net, x = resnet20(shape=(1, 8, 8), classes=3, width=4), data()[0]
    x = F.pad(x, (1, 1, 1, 1))
    if trained:
        quantization = Int8()
        quantization.prepare(net, x)
        net.train()(x)
        converted = quantization.convert()
    else:
        converted = post_training(net, [x])
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    layers = 0
    for node in converted.graph.nodes:  # type: ignore[union-attr]
        if node.target is torch.ops.aten.conv2d.default:
            (user,) = node.users
            if user.target is torch.ops.aten.relu.default:
                (user,) = user.users
            assert user.target is quantize, user
            layers += 1
    assert layers == 21
    # one rounding for each value: the input, layers (two of them projections), sums, and what is pooled
    assert sum(node.target is quantize for node in converted.graph.nodes) <= 33  # type: ignore[union-attr]


def test_a_convolution_of_signals_with_its_norm_is_quantized() -> None:
    torch.manual_seed(0)
    signal = (nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))
    net, x = nn.Sequential(*signal, nn.Flatten(), nn.Linear(8 * 14, 5)), torch.randn(8, 1, 16)
    quantization = Int8()
    quantization.prepare(net, x)
    net.train()
    net(x).square().sum().backward()
    with torch.no_grad():
        net[0].weight[:4] = 0
    simulated, converted = net.eval()(x), quantization.convert()
    found = integers(converted, net)
    assert set(found) == {"0.weight", "3.weight", "6.weight"} and not found["0.weight"][:4].any()
    with torch.no_grad():
        assert float((converted(x) - simulated).abs().max()) < 1e-5 * float(simulated.abs().max())


class Named(Module):
    """The network under another name, or layers in the module itself."""

    def __init__(self, inside: bool) -> None:
        LightningModule.__init__(self)
        layers = network()
        if inside:
            self.conv, self.norm, self.fc = layers[0], layers[1], nn.Linear(64, 3)
        else:
            self.model = layers
        self.net = self.forward  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if hasattr(self, "model") else self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("kind", ["net", "model", "itself"])
def test_a_network_under_any_name_is_converted_in_its_place(kind: str) -> None:
    module: Any = Module() if kind == "net" else Named(kind == "itself")
    if kind == "net":
        module.forward = lambda x: module.net(x)
    x, _ = data()
    quantize = Quantize(Int8())
    net = quantize.net(module)
    assert net is (module.net if kind == "net" else module)
    quantize.quantization.prepare(net, x[:8])
    with torch.no_grad():
        net.train()(x)
    converted = quantize.quantization.convert()
    quantize.quantization.release()
    names = {name for name, weight in net.named_parameters() if weight.dim() > 1}
    assert set(integers(converted, net)) == names
    whole = in_its_place(module, net, converted)
    with torch.no_grad():
        expected = module.eval()(x)
        assert float((whole(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert all(part is not other for part in whole.modules() for other in module.modules())


def test_simulating_and_converting_draw_no_random_numbers() -> None:
    pytest.importorskip("torchao")
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    quantization = Int4Weight()
    before = torch.get_rng_state()
    quantization.prepare(net, torch.zeros(2, 64))
    quantization.convert()
    quantization.release()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_is_killed_after_training_has_its_macs(tmp_path: Path) -> None:
    from test_app import config

    from pl_sparse.app.training import train

    asked = ["quantization=int8", "model=lenet5", "trainer.max_epochs=2", "data.limit=128"]
    whole = train(config(tmp_path, *asked))
    (tmp_path / "metrics.json").unlink()
    again = train(config(tmp_path, *asked, f"ckpt_path={tmp_path}/checkpoints/last.ckpt"))
    assert whole["macs_dense"] > 0 and {**again, "train_seconds": 0} == {**whole, "train_seconds": 0}
