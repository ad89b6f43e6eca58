"""What is used of other libraries beyond their documented interfaces: one function per piece, and tests of each piece.

Lightning, torchmetrics, torch and torchao promise nothing of this. Where one of them moves a piece,
tests/test_upstream.py fails, and this module alone changes. Libraries other than torch are not imported before they are
needed; Lightning's objects are taken as they come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils.hooks import RemovableHandle

from pl_sparse.core.dtensor import local

__all__ = [
    "CHANNEL_NORMS",
    "DispatchMode",
    "always_with_gradients",
    "averaged_models",
    "below_autograd",
    "compiled",
    "fake_quantizers",
    "forgets_metrics",
    "found_infinite_gradients",
    "has_hooks_beside",
    "integer_data",
    "integer_input",
    "integer_output",
    "is_read_by_attention",
    "last_checkpoint_is_due",
    "logs_this_step",
    "observer_of",
    "of_kind",
    "overridden",
    "override",
    "padding_of",
    "passed_on",
    "path_of",
    "place_in_training",
    "plain_name",
    "registries",
    "replace_data",
    "restart_average",
    "restore",
    "saving_best",
    "skipping_checks",
    "starts_from_here",
    "steps_directly",
    "tell_calls_apart",
    "training_loader",
    "unscale_gradients",
    "unwrapped",
    "use_fused_attention",
    "validation_has_run",
    "without_fused_layer",
    "wrappers_of",
    "zero_memory",
]

# Methods of single objects


def override(obj: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `obj.name(...)` call `function`, for this object alone: an attribute comes before the method of the class."""
    vars(obj)[name] = function


def restore(obj: Any, name: str) -> None:
    """Let `obj.name(...)` call the method of the class again."""
    vars(obj).pop(name, None)


@contextmanager
def overridden(obj: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block `obj.name(...)` calls `function`; afterwards what it called before."""
    earlier = vars(obj).get(name)
    override(obj, name, function)
    try:
        yield
    finally:
        if earlier is None:
            restore(obj, name)
        else:
            override(obj, name, earlier)


# Lightning


def of_kind(obj: Any, kind: type) -> bool:
    """`isinstance`, where `pytorch_lightning` and `lightning.pytorch` are two name spaces of one thing.

    Args:
        kind: a class of `lightning.pytorch`.
    """
    if isinstance(obj, kind):
        return True
    other = kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1), kind.__qualname__
    return any((base.__module__, base.__qualname__) == other for base in type(obj).__mro__)


def has_hooks_beside(optimizer: Optimizer, handles: Sequence[RemovableHandle]) -> bool:
    """Whether hooks other than these, which are in place, are called around an optimizer's steps, or those of all."""
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return hooks + len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks) > len(handles)


def starts_from_here(strategy: Any) -> bool:
    """Whether a strategy trains in processes that it starts from this one and that end before it (spawn, fork)."""
    return getattr(strategy, "_start_method", "popen") in ("spawn", "fork", "forkserver")


def averaged_models(trainer: Any) -> Iterator[nn.Module]:
    """The copies of the model with averaged weights that a trainer's callbacks keep (EMA, SWA)."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average


@torch.no_grad()
def restart_average(average: nn.Module, module: nn.Module) -> None:
    """Let averaged weights start from a module's, as if nothing had been averaged yet."""
    inner = average.module if isinstance(average, AveragedModel) else average
    inner.load_state_dict(module.state_dict())
    if isinstance(average, AveragedModel):
        average.n_averaged.zero_()


def found_infinite_gradients(trainer: Any, optimizer: Optimizer) -> bool:
    """Whether the gradient scaler of mixed precision leaves an optimizer's step out; to be asked before the step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return False
    per_device: dict[Any, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(value) for value in per_device.values())


def steps_directly(trainer: Any) -> bool:
    """Whether a step that begins is one of an optimizer that a module calls past Lightning, which sees nothing of it;
    to be asked at the beginning of the step."""
    if trainer.lightning_module is None or trainer.lightning_module.automatic_optimization:
        return False
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    return bool(progress.ready == progress.completed)


def wrappers_of(trainer: Any, optimizer: Optimizer) -> list[Any]:
    """What Lightning gives a module in place of an optimizer: another object of the class, with the same state."""
    return [wrapper for wrapper in trainer.strategy._lightning_optimizers if wrapper.optimizer is optimizer]


def unscale_gradients(trainer: Any, optimizer: Optimizer) -> None:
    """Unscale the gradients of an optimizer that would do so within its step (fused ones, in mixed precision); to be
    asked before the step, which then leaves them as they are.

    Lightning unscales those of all others before.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    unscaled = scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY
    if not unscaled and any(w.grad is not None for group in optimizer.param_groups for w in group["params"]):
        scaler.unscale_(optimizer)


def place_in_training(trainer: Any) -> tuple[int, int, bool]:
    """Epochs that are over, batches that began in the one that goes on, and whether the newest is its last."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return trainer.fit_loop.epoch_progress.current.processed, batches.current.ready, batches.is_last_batch


def training_loader(trainer: Any) -> Any:
    """The loader of the training data, before training begins too, when the trainer has not set it up.

    Having it set up would draw the order of the first epoch, which a checkpoint may yet give.
    """
    loader = trainer.train_dataloader
    return trainer.fit_loop._data_source.dataloader() if loader is None else loader


def passed_on(trainer: Any, batch: Any) -> Any:
    """A batch of the training's loader as `training_step` gets it, through Lightning's own path of a batch.

    It is converted to the precision's type and goes through `on_before_batch_transfer`, the transfer to the device and
    `on_after_batch_transfer`, of the module or its data module.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def logs_this_step(trainer: Any) -> bool:
    """Whether the step in progress is one of those that are logged, by `log_every_n_steps`."""
    return bool(trainer._logger_connector.should_update_logs)


def skipping_checks(early_stopping: Any, skips: Callable[[], bool]) -> Callable[[], None]:
    """Let an `EarlyStopping` leave its checks out while `skips()`, in addition to those that it leaves out itself.

    Returns:
        What undoes it.
    """
    check = early_stopping._should_skip_check
    override(early_stopping, "_should_skip_check", lambda trainer: skips() or check(trainer))
    return lambda: restore(early_stopping, "_should_skip_check")


def saving_best(checkpoint: Any, save: Callable[[Callable[[], None], Any], None]) -> Callable[[], None]:
    """Let a `ModelCheckpoint` call `save(saves, trainer)` where it would save its best checkpoints by `saves()`.

    Returns:
        What undoes it.
    """
    saves = checkpoint._save_topk_checkpoint
    override(
        checkpoint,
        "_save_topk_checkpoint",
        lambda trainer, candidates: save(lambda: saves(trainer, candidates), trainer),
    )
    return lambda: restore(checkpoint, "_save_topk_checkpoint")


def validation_has_run(trainer: Any) -> bool:
    """Whether this training has come to a validation, the sanity check apart."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._has_run)


def last_checkpoint_is_due(checkpoint: Any, trainer: Any) -> None:
    """Let a `ModelCheckpoint` write its last checkpoint at this step, which it does only after another one."""
    checkpoint._last_global_step_saved = trainer.global_step
    checkpoint._last_checkpoint_saved = ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what torch.compile, Fabric and data parallelism put around it, whose names are the user's."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
            continue
        held = (getattr(model, name, None) for name in ("_orig_mod", "_forward_module"))
        inner = next((module for module in held if isinstance(module, nn.Module)), None)
        if inner is None:
            return model
        model = inner


def compiled(module: nn.Module) -> bool:
    """Whether torch.compile made a module or a part of it, so that hooks of its layers need not be called."""
    if any(hasattr(part, "_orig_mod") for part in module.modules()):
        return True
    return getattr(module, "_compiler_ctx", None) is not None  # Lightning's from_compiled


# torchmetrics


@contextmanager
def forgets_metrics(module: nn.Module) -> Iterator[None]:
    """Afterwards the metrics within a module are as they were, their number of updates included."""
    from torchmetrics import Metric

    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = [(metric, copy.deepcopy(metric.metric_state), metric._update_count) for metric in metrics]
    try:
        yield
    finally:
        for metric, state, count in states:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count = count


# torch

CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Norms of channels: batch and instance norms of any number of dimensions, with running statistics or without."""


def padding_of(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """The padding of a convolution in numbers, in the order that `F.pad` takes: last dimension first, both sides."""
    return conv._reversed_padding_repeated_twice


def plain_name(name: str) -> str:
    """The name of a parameter without the level that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def registries(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a module keeps its own parameters and its submodules, by name; scripted ones keep them elsewhere."""
    for name in ("_parameters", "_modules"):
        if isinstance(held := vars(module).get(name), dict):
            yield name, held


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer data of another shape, where a graph of its former self may still be alive.

    Autograd remembers a parameter's shape as long as any graph that used it lives. It forgets it at a change of type.
    """
    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def use_fused_attention(attention: nn.MultiheadAttention, allowed: bool) -> None:
    """Whether torch's encoder layers may compute this attention in their fused path, which the attention's own
    `forward` has no part in."""
    attention._qkv_same_embed_dim = allowed and attention.in_proj_weight is not None


def without_fused_layer(module: nn.Module) -> None:
    """Let a `TransformerEncoderLayer` call its layers in evaluation mode too: its fused path reads their weights."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0


def below_autograd() -> AbstractContextManager[None]:
    """Within the block operations go past autograd, so that a dispatch mode sees them before they are taken apart:
    a linear layer as one operation. Unlike in `torch.inference_mode`, tensors that are made can be trained with."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


class always_with_gradients(TorchFunctionMode):  # noqa: N801  it is used as a function
    """Within the block gradients stay on, or off, where code turns them off or on: `torch.no_grad` does nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled:
            return None
        return function(*args, **(kwargs or {}))


def is_read_by_attention(layer: nn.Module) -> bool:
    """Whether a linear layer is the output projection of `nn.MultiheadAttention`, which reads its weight and does not
    call it."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def path_of(node: torch.fx.Node) -> str | None:
    """The path of the module that a node of a graph by torch.export was traced in; None where none is noted."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path: str = list(stack.values())[-1][0]
    return path.partition("@")[0].removeprefix("L['self']").lstrip(".")


def tell_calls_apart(graph: torch.fx.GraphModule) -> None:
    """Let each call of a module that is called several times count as one of a module of its own: torchao joins what
    comes from one path, and fails where that has several outputs. `path_of` is the same as before."""
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and "@" in (key := list(stack)[-1]):
            path, kind = stack[key]
            node.meta["nn_module_stack"] = {**stack, key: (f"{path.partition('@')[0]}@{key}", kind)}


# torchao

_FAKE_QUANTIZERS = "activation_post_process"


def fake_quantizers(graph: nn.Module) -> dict[str, Any]:
    """What simulates integers in a graph that `prepare_pt2e` or `prepare_qat_pt2e` made, by name.

    Each has `is_per_channel`, which is so for weights, and `enable_observer(enabled)`.
    """
    return {name: module for name, module in graph.named_children() if name.startswith(_FAKE_QUANTIZERS)}


def observer_of(quantizer: Any) -> Any:
    """What holds the range, `min_val` and `max_val`, of one of the `fake_quantizers`."""
    return getattr(quantizer, "activation_post_process", quantizer)


def integer_output(spec: Any) -> Any:
    """The annotation of a node whose output is integers."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    return QuantizationAnnotation(output_qspec=spec, _annotated=True)


def integer_input(specs: dict[Any, Any]) -> Any:
    """The annotation of a node whose inputs are integers, by the node that each comes from."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    return QuantizationAnnotation(input_qspec_map=specs, _annotated=True)


def integer_data(weight: Tensor) -> Tensor | None:
    """The integers of a weight that torchao quantized; None if it has none."""
    return getattr(weight, "qdata", None)


# Optimizers


def zero_memory(state: dict[str, Any], key: str, mask: Tensor) -> None:
    """Zero what an optimizer remembers where a mask is False: numbers, or 8-bit codes by torchao or bitsandbytes.

    Args:
        state: of one weight.
        key: of a tensor in it, of the weight's shape.
        mask: bool, True = kept.
    """
    value = local(state[key])
    codes = state.get(key.replace("state", "qmap")) if value.dtype == torch.uint8 else None
    if isinstance(codes, Tensor):  # bitsandbytes: state1 has the codes, qmap1 the number of each
        value.masked_fill_(~mask, int(codes.abs().argmin()))
    elif not value.is_floating_point():
        return
    elif hasattr(value, "codes"):  # torchao: a tensor of codes that passes for one of numbers
        value.copy_(value.dequantize().masked_fill_(~mask, 0))
    else:
        value.masked_fill_(~mask, 0)
