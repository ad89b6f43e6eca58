"""What is used of other libraries beyond their documented interfaces is still there, and does what it is used for."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from pl_sparse.callbacks.clock import current_step, steps_per_epoch, total_steps
from pl_sparse.core import upstream
from pl_sparse.network.graph import traced
from pl_sparse.network.hooks import hooked, unfused


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(shuffle: bool = True) -> DataLoader[Any]:
    x = torch.randn(20, 4)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4, shuffle=shuffle)


class At(Callback):
    """Calls a function with the trainer at some of its hooks."""

    def __init__(self, **functions: Callable[[Trainer], object]) -> None:
        for name, function in functions.items():
            setattr(self, name, lambda trainer, *args, function=function: function(trainer))


def fit(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        **{"max_epochs": 2, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module or Module(), loader(), loader(shuffle=False))
    return trainer


def test_a_method_of_one_object_is_replaced_and_comes_back() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with upstream.overridden(module, "forward", lambda x: x):
        assert module(x) is x and other(x) is not x
        with upstream.overridden(module, "forward", lambda x: -x):
            assert torch.equal(module(x), -x)
        assert module(x) is x
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    upstream.override(module, "forward", lambda x: x)
    assert copy.deepcopy(module)(x) is x
    upstream.restore(module, "forward")
    assert module(x) is not x and "forward" not in vars(module)


def test_lightning_calls_what_replaces_a_hook_of_the_module(tmp_path: Path) -> None:
    module, called = Module(), []
    step = module.training_step
    upstream.override(module, "training_step", lambda *args: (called.append("step"), step(*args))[1])
    upstream.override(module, "on_load_checkpoint", lambda checkpoint: called.append("load"))
    trainer = fit(module=module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.validate(module, loader(shuffle=False), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert called == ["step"] * 5 + ["load"]


@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1)])
def test_averaged_models(make: Callable[[], Callback]) -> None:
    names: list[set[str]] = []

    def look(trainer: Trainer) -> None:
        names.extend({name for name, _ in m.named_parameters()} for m in upstream.averaged_models(trainer))

    fit(make(), At(on_train_batch_end=look), max_epochs=1)
    prefix = "module." if isinstance(make(), EMAWeightAveraging) else ""
    assert names and all({n.removeprefix(prefix) for n in each} == {"net.weight", "net.bias"} for each in names)
    assert not list(upstream.averaged_models(fit()))


def test_infinite_gradients_are_found() -> None:
    seen = []

    class Infinite(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

    def look(trainer: Trainer) -> None:
        seen.append(upstream.found_infinite_gradients(trainer, trainer.optimizers[0]))

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(At(on_before_optimizer_step=look), module=Infinite(), plugins=[plugin], max_epochs=1)
    assert seen == [False, True, False, False, False]
    fit(At(on_before_optimizer_step=look), module=Infinite(), max_epochs=1)  # without a scaler
    assert not any(seen[5:])


def test_the_training_loader_is_there_before_training_and_within() -> None:
    loaders = []
    fit(
        At(
            on_fit_start=lambda trainer: loaders.append(upstream.training_loader(trainer)),
            on_train_start=lambda trainer: loaders.append(upstream.training_loader(trainer)),
        )
    )
    assert all(isinstance(each, DataLoader) and len(each.dataset) == 20 for each in loaders) and len(loaders) == 2


def test_steps_that_are_logged() -> None:
    logged = []
    fit(At(on_train_batch_end=lambda trainer: logged.append(upstream.logs_this_step(trainer))), log_every_n_steps=3)
    assert 0 < sum(logged) < len(logged) == 10


def test_early_stopping_skips_its_checks() -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val_loss", patience=0, divergence_threshold=-1.0)  # stops at its first check

    skipping = stopping()
    undo = upstream.skipping_checks(skipping, lambda: True)
    assert fit(skipping, max_epochs=3).current_epoch == 3
    undo()
    assert fit(skipping, max_epochs=3).current_epoch == fit(stopping(), max_epochs=3).current_epoch == 1


def test_the_best_checkpoint_is_held_back_and_the_last_is_written(tmp_path: Path) -> None:
    saved = []
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)

    def save(saves: Callable[[], None], trainer: Trainer) -> None:
        saved.append(trainer.current_epoch)
        if trainer.current_epoch == 2:
            saves()
        elif trainer.current_epoch == 1:
            upstream.last_checkpoint_is_due(checkpoint, trainer)

    undo = upstream.saving_best(checkpoint, save)
    files = []
    look = At(on_validation_start=lambda trainer: files.append({path.name for path in tmp_path.iterdir()}))
    fit(checkpoint, look, max_epochs=3, num_sanity_val_steps=0)
    assert saved == [0, 1, 2]
    assert files == [set(), set(), {"last.ckpt"}]  # before epochs 0, 1 and 2 are saved
    assert Path(checkpoint.best_model_path).name.startswith("epoch=2")
    undo()
    assert checkpoint._save_topk_checkpoint.__func__ is ModelCheckpoint._save_topk_checkpoint  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*")
def test_compiled_modules_are_recognised() -> None:
    module = Module()
    assert not upstream.compiled(module)
    assert upstream.compiled(torch.compile(Module()))  # Lightning notes it on the module, too
    inner = Module()
    inner.net = torch.compile(inner.net)  # type: ignore[assignment]
    assert upstream.compiled(inner)
    assert [upstream.plain_name(name) for name, _ in inner.named_parameters()] == ["net.weight", "net.bias"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*")
def test_a_module_that_lightning_unwraps_is_compiled() -> None:
    from lightning.pytorch.utilities.compile import from_compiled

    assert upstream.compiled(from_compiled(torch.compile(Module())))  # type: ignore[arg-type]


def test_metrics_are_forgotten() -> None:
    metric = MulticlassAccuracy(2)
    module = nn.ModuleDict({"metric": metric})
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    before, count = float(metric.compute()), metric.update_count
    with upstream.forgets_metrics(module):
        metric.update(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0]))
        assert metric.update_count == count + 1
    metric._computed = None  # the value that was computed before
    assert float(metric.compute()) == before and metric.update_count == count == 1


def test_norms_of_channels() -> None:
    norms = (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2), nn.LazyBatchNorm2d())
    assert all(isinstance(norm, upstream.CHANNEL_NORMS) for norm in norms)
    assert not isinstance(nn.LayerNorm(2), upstream.CHANNEL_NORMS) and not isinstance(
        nn.GroupNorm(1, 2), upstream.CHANNEL_NORMS
    )
    assert all(hasattr(norm, "num_features") and hasattr(norm, "running_var") for norm in norms)


@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
def test_padding(padding: Any) -> None:
    conv = nn.Conv2d(1, 2, (3, 5), padding=padding)
    x = torch.randn(1, 1, 6, 7)
    padded = F.pad(x, upstream.padding_of(conv))
    assert torch.equal(F.conv2d(padded, conv.weight, conv.bias), conv(x))


def test_data_of_another_shape_while_a_graph_is_alive() -> None:
    parameter = nn.Parameter(torch.ones(3))
    alive = parameter.square().sum()  # remembers the shape (3,)
    upstream.replace_data(parameter, torch.ones(2))
    parameter.square().sum().backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [2.0, 2.0]
    assert alive.requires_grad


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()


def calls(layer: nn.TransformerEncoderLayer, name: str) -> int:
    """How often an encoder layer calls one of its own in evaluation mode; no hook counts, which would be called."""
    part, count = layer.get_submodule(name), []
    forward = part.forward
    with torch.no_grad(), upstream.overridden(part, "forward", lambda *a, **k: (count.append(1), forward(*a, **k))[1]):
        layer(torch.randn(2, 3, 8))
    return len(count)


def test_the_fused_path_of_encoder_layers_is_left() -> None:
    layer = encoder()
    assert calls(layer, "linear1") == 0  # otherwise nothing of this is needed
    upstream.without_fused_layer(layer)
    assert calls(layer, "linear1") == 1
    with unfused():
        assert calls(encoder(), "linear1") == 1


def test_an_attention_that_computes_otherwise_is_called() -> None:
    class Fewer(nn.MultiheadAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            return torch.zeros_like(query), None

    layer, x = encoder(), torch.randn(2, 3, 8)
    layer.self_attn.__class__ = Fewer
    with torch.no_grad():
        fused = layer(x)
        upstream.use_fused_attention(layer.self_attn, allowed=False)
        own = layer(x)
        upstream.use_fused_attention(layer.self_attn, allowed=True)
        assert torch.equal(layer(x), fused) and not torch.allclose(own, fused)


def test_the_projection_that_attention_reads() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert upstream.is_read_by_attention(attention.out_proj) and not upstream.is_read_by_attention(nn.Linear(2, 2))


def test_the_path_of_a_node() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    nodes = traced(net, torch.randn(2, 4)).module().graph.nodes
    paths = [upstream.path_of(node) for node in nodes if node.target is torch.ops.aten.linear.default]
    assert paths == ["0", "1.1"]


def test_calls_of_one_module_are_told_apart() -> None:
    from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            return self[1](x + 1)  # type: ignore[no-any-return]

    graph: Any = traced(Twice(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)).module()
    upstream.tell_calls_apart(graph)
    nodes = [node for node in graph.graph.nodes if node.target is torch.ops.aten.relu.default]
    assert len({upstream.path_of(node) for node in nodes}) == 1 and "@" not in str(upstream.path_of(nodes[1]))
    found = get_source_partitions(graph.graph, [nn.ReLU])
    apart = {nn.ReLU: [[node] for node in nodes]}
    assert {kind: [part.output_nodes for part in parts] for kind, parts in found.items()} == (
        apart if torch.__version__ >= (2, 12) else {}  # earlier ones join nothing: they look for no modules by path
    )


def test_integers_of_torchao() -> None:
    torchao = pytest.importorskip("torchao")
    assert torchao
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    from pl_sparse.quantize import Int8

    net = nn.Sequential(nn.Linear(32, 4), nn.ReLU())
    quantization = Int8()
    quantization.prepare(net, torch.randn(4, 32))
    quantizers = upstream.fake_quantizers(quantization._graph)  # type: ignore[arg-type]
    assert sorted(each.is_per_channel for each in quantizers.values()) == [False, True]  # the input, the weight
    activation = next(each for each in quantizers.values() if not each.is_per_channel)
    for enabled in (False, True):
        activation.enable_observer(enabled)
        before = activation.activation_post_process.max_val.clone()
        activation(torch.full((2, 32), 1e3))
        assert bool((activation.activation_post_process.max_val == before).all()) is not enabled
    annotation = upstream.integer_output("spec")
    assert annotation.output_qspec == "spec" and annotation._annotated is True
    annotation = upstream.integer_input({"x": "spec"})
    assert annotation.input_qspec_map == {"x": "spec"} and annotation._annotated is True

    quantize_(net, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))  # type: ignore[attr-defined]
    data = upstream.integer_data(net[0].weight)
    assert data is not None and data.dtype == torch.int8 and data.shape == (4, 32)
    assert upstream.integer_data(torch.ones(2)) is None


def test_operations_are_seen_whole_below_autograd_and_what_they_make_can_be_trained_with() -> None:
    seen = []

    class Look(upstream.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Flatten())
    with upstream.below_autograd(), Look():
        out = net(torch.randn(2, 4))
    aten = torch.ops.aten
    assert seen[1:] == [aten.linear.default, aten.dropout.default, aten.flatten.using_ints]  # the first is randn
    assert not out.requires_grad and not out.is_inference()
    assert net(out).requires_grad


def test_gradients_that_code_does_without() -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.enable_grad(), upstream.always_with_gradients(), torch.no_grad():
        (weight * 3).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]
    with torch.no_grad():
        assert not (weight * 3).requires_grad
    assert torch.is_grad_enabled()


def test_hooks_are_called_within_the_block_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    order: list[str] = []
    with (
        hooked([net[0]], pre=lambda *_: order.append("before")),
        hooked([net[0]], post=lambda *_: order.append("after")),
    ):
        net(torch.ones(1, 2))
    net(torch.ones(1, 2))
    assert order == ["before", "after"]
    with hooked(net, post=lambda module, args, kwargs, out: out + 1):
        assert bool((net(torch.ones(1, 2)) >= 1).all())
    try:
        with hooked(net, pre=lambda *_: order.append("before")):
            raise ValueError
    except ValueError:
        pass
    net(torch.ones(1, 2))
    assert len(order) == 2


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3)])
def test_the_clock(accumulate: int, steps: int) -> None:
    times = []
    fit(
        At(on_train_start=lambda trainer: times.append((steps_per_epoch(trainer), total_steps(trainer)))),
        At(on_train_end=lambda trainer: times.append((current_step(trainer), total_steps(trainer)))),
        accumulate_grad_batches=accumulate,
    )
    assert times == [(steps, 2 * steps), (2 * steps, 2 * steps)]


def test_an_empty_model_is_unwrapped_too() -> None:
    """A module without layers is false where it stands for a truth value."""
    wrapper = nn.Module()
    wrapper._forward_module = nn.Sequential()
    assert upstream.unwrapped(wrapper) is wrapper._forward_module
    wrapper._orig_mod = nn.Sequential()
    assert upstream.unwrapped(wrapper) is wrapper._orig_mod


def test_where_modules_keep_what_is_theirs() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    (_, parameters), (_, modules) = upstream.registries(layer[0])
    assert parameters["weight"] is layer[0].weight and not modules
    assert next(iter(dict(upstream.registries(layer))["_modules"].values())) is layer[0]


def test_memory_of_8_bits() -> None:
    mask = torch.tensor([True, False, True])
    state: dict[str, Any] = {"state1": torch.tensor([7, 8, 9], dtype=torch.uint8), "step": torch.tensor(1)}
    state["qmap1"] = torch.tensor([-1.0, 0.0, 1.0])
    state["exp_avg"] = torch.ones(3)
    for key in ("state1", "exp_avg"):
        upstream.zero_memory(state, key, mask)
    assert state["state1"].tolist() == [7, 1, 9] and state["exp_avg"].tolist() == [1, 0, 1]


def test_what_a_module_gets_in_place_of_an_optimizer() -> None:
    module, asked = Module(), []

    def ask(trainer: Trainer) -> None:
        wrapper: Any = module.optimizers()
        asked.append(upstream.wrappers_of(trainer, wrapper.optimizer) == [wrapper])

    fit(At(on_train_start=ask), module=module, max_epochs=1)
    assert asked == [True]
