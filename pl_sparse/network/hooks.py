"""A model called in order to be looked at: hooks for the time of a block, its outputs, and nothing of it changed."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "called", "evaluated", "hooked", "stand_ins", "tensors", "trained", "uncallable", "undisturbed", "unfused",
    "without_forward",
]  # fmt: skip

Pre = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""What sees a module, its arguments and its keywords before it is called."""

Post = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""What sees a module, its arguments, its keywords and its output; what it returns, unless None, is the output."""


@contextmanager
def hooked(modules: Iterable[nn.Module], pre: Pre | None = None, post: Post | None = None) -> Iterator[None]:
    """Within the block each call of a module calls `pre` before it and `post` after it.

    Args:
        modules: those that are watched.
        pre: gets (module, args, kwargs).
        post: gets (module, args, kwargs, output).
    """
    with ExitStack() as handles:
        for module in modules:
            if pre is not None:
                handles.enter_context(module.register_forward_pre_hook(pre, with_kwargs=True))
            if post is not None:
                handles.enter_context(module.register_forward_hook(post, with_kwargs=True))
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers (running statistics), training flags and random numbers are as before."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=_devices(model)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


def _devices(model: nn.Module) -> list[int]:
    """The GPUs that a model is on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block, with parameters and buffers that may be given other data.
    Afterwards each module has the very attributes that it had, and random numbers are as before.

    Parameters share the memory of those that they stand for, buffers are copies. The former keep their place in
    graphs of autograd, in optimizers and in what is wrapped around the model.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(vars(module))) for module in modules]
    others: dict[int, Tensor] = {}

    def other(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or nn.parameter.is_lazy(tensor):
            return tensor
        if id(tensor) not in others:
            data = tensor.detach()
            plain = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data.clone()
            others[id(tensor)] = plain
        return others[id(tensor)]

    try:
        for module, former in attributes:
            for key, value in former.items():
                if type(value) in (dict, OrderedDict):  # code may register hooks when it is called first
                    vars(module)[key] = copy.copy(value)
            for kind in ("_parameters", "_buffers"):
                vars(module)[kind] = {key: other(tensor) for key, tensor in vars(module)[kind].items()}
        with torch.random.fork_rng(devices=_devices(model)):
            model.eval()
            yield
    finally:
        for module, former in attributes:
            vars(module).clear()
            vars(module).update(former)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block, and undisturbed by it."""
    with undisturbed(model):
        model.eval()
        yield


@contextmanager
def trained(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within the block all of these have gradients, frozen ones too."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad and tensor.is_floating_point()]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextmanager
def unfused() -> Iterator[None]:
    """Without the fused path of torch's transformer layers in evaluation mode, which calls no submodule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that a model returns for an example of its inputs, in their order.

    Args:
        example: a tensor, a tuple of arguments or a dict of keywords.
    """
    if isinstance(example, Mapping):
        out = model(**example)
    elif isinstance(example, (tuple, list)):
        out = model(*example)
    else:
        out = model(example)
    return list(tensors(out))


def without_forward(model: nn.Module) -> ValueError:
    """What is raised where a model has no `forward`: it has what to write, with the model's largest part."""
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()}
    largest = max(sizes, key=lambda name: sizes[name], default="net")
    return ValueError(
        f"{type(model).__name__} has no forward, which its channels are followed through and which is exported: define "
        f"the network's, as in def forward(self, x): return self.{largest}(x)"
    )


def uncallable(model: nn.Module, error: Exception) -> ValueError:
    """What is raised where a model cannot be called with an example of its inputs."""
    name = type(model).__name__
    if isinstance(error, NotImplementedError) and f"[{name}] is missing the required" in str(error):
        return without_forward(model)
    return ValueError(
        f"{name} cannot be called with the example of its inputs: {error}. Give the inputs it is called with as "
        "example_input_array"
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors(vars(value))
