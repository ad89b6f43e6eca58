"""Whether zeros of a parameter are zeros of the weight that a layer computes with: found by trial, on copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["WHOLE", "Underlying", "behind", "is_computed", "is_parametrization", "tried", "twin_of", "underlying"]

WHOLE = -1
"""As a dimension of `Underlying.norm_dim`: the whole tensor is divided by one norm."""

_SUFFIXES = ("_g", "_v", "_orig")  # of weight_norm and spectral_norm of old, pruning of torch


@dataclass(frozen=True)
class Underlying:
    """A tensor that a weight is computed from.

    Attributes:
        weight: the attribute of the layer that is computed.
        name: the parameter, as the layer names it: "parametrizations.weight.original1", "weight_v".
        parameter: the parameter.
        reason: why its zeros are no zeros of the weight, or None.
        norm_dim: the dimension whose slices must not be all zero, since each is divided by its norm; `WHOLE` for all of
            the tensor; None if none is.
    """

    weight: str
    name: str
    parameter: nn.Parameter
    reason: str | None
    norm_dim: int | None = None


def is_parametrization(module: nn.Module) -> bool:
    """Whether the parameters of a module are those that `underlying` gives for the layer above it."""
    return isinstance(module, ParametrizationList)


def behind(module: nn.Module, weight: str) -> nn.Parameter | None:
    """The parameter that a weight of a layer is, or that it is computed from: of several the one of its size.

    Nothing is computed. None if there is no such parameter.
    """
    own = module._parameters.get(weight)
    if own is not None:
        return own
    parametrizations = getattr(module, "parametrizations", None)
    tensors: list[nn.Parameter | None] = []
    if isinstance(parametrizations, nn.ModuleDict) and weight in parametrizations:
        tensors += parametrizations[weight]._parameters.values()
    tensors += [module._parameters.get(weight + suffix) for suffix in _SUFFIXES]
    found = [tensor for tensor in tensors if tensor is not None]
    return max(reversed(found), key=Tensor.numel) if found else None  # weight_norm has its scales first


def is_computed(module: nn.Module, weight: str = "weight") -> bool:
    """Whether a weight of a layer is computed from parameters, and no parameter itself."""
    return module._parameters.get(weight) is None and behind(module, weight) is not None


def underlying(module: nn.Module) -> Iterator[Underlying]:
    """The parameters with two or more dimensions that weights of a layer are computed from.

    Nothing of the layer changes and none of its weights is read: that would run a power iteration of a spectral norm.
    """
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        for weight, behind in parametrizations.items():
            if isinstance(behind, ParametrizationList):
                for short, parameter in behind.named_parameters(recurse=False):
                    if parameter.dim() > 1:
                        reason, norm_dim = tried(parameter, lambda b=behind, s=short: _copied(b, s))  # type: ignore[misc]
                        name = f"parametrizations.{weight}.{short}"
                        yield Underlying(weight, name, parameter, reason, norm_dim)
    for hook in module._forward_pre_hooks.values():  # weight_norm and spectral_norm of old, pruning of torch
        attribute = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if not type(hook).__module__.startswith("torch.nn.utils.") or not isinstance(attribute, str):
            continue
        for short, tensor in module._parameters.items():
            if tensor is not None and short.removeprefix(attribute) in _SUFFIXES and tensor.dim() > 1:
                reason, norm_dim = tried(tensor, lambda h=hook, s=short, w=attribute: _hooked(module, h, s, w))  # type: ignore[misc]
                yield Underlying(attribute, short, tensor, reason, norm_dim)


def _copied(behind: ParametrizationList, short: str) -> tuple[Tensor, Callable[[], Any]]:
    """A copy of a tensor, and what computes the weight from it."""
    twin = copy.deepcopy(behind).eval()
    return twin._parameters[short].data, twin.forward  # type: ignore[union-attr]


def _hooked(module: nn.Module, hook: Any, short: str, weight: str) -> tuple[Tensor, Callable[[], Any]]:
    """The same for a hook that sets the weight before each forward pass."""
    twin = twin_of(module)
    twin.__dict__.pop(weight, None)

    def compute() -> Any:
        hook(twin, ())
        return getattr(twin, weight)

    return twin._parameters[short].data, compute


def twin_of(module: nn.Module) -> Any:
    """A copy of a layer with tensors of its own, that is not in training."""
    twin = copy.copy(module)
    object.__setattr__(twin, "training", False)
    for kind in ("_parameters", "_buffers"):
        tensors = {key: None if value is None else value.detach().clone() for key, value in vars(module)[kind].items()}
        object.__setattr__(twin, kind, tensors)
    for key, value in twin._parameters.items():
        if value is not None:
            twin._parameters[key] = nn.Parameter(value)
    return twin


@torch.no_grad()
def tried(
    parameter: nn.Parameter, make: Callable[[], tuple[Tensor, Callable[[], Any]]]
) -> tuple[str | None, int | None]:
    """Why zeros of the parameter are none of the weight, or None; and the dimension that is divided by norms."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta or not parameter.is_floating_point():
        return None, None  # it is refused for that
    devices = [parameter.device] if parameter.is_cuda else []
    generator = torch.Generator().manual_seed(0)  # not the one that training draws from
    try:
        with torch.random.fork_rng(devices=devices):
            tensor, compute = make()
            random = (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor)
            zeros = _zeros(tensor.shape, generator).to(tensor.device)
            lives = False
            filled = torch.where(tensor == 0, random, tensor)  # zeros that are there might fill a slice with the others
            for values in (filled, random):  # a parametrization may want values of its own kind
                tensor.copy_(values.masked_fill(zeros, 0))
                weight = compute()
                if not isinstance(weight, Tensor) or weight.shape != tensor.shape:
                    return "the weight is computed from it in another shape", None
                if not bool((weight[zeros] == 0).all()):
                    return "its zeros are no zeros of the weight that is computed from it", None
                lives = lives or bool((weight != 0).any())
            if not lives:
                return "the weight that is computed from it is zero", None
            for dim in range(tensor.dim()):
                tensor.copy_(random)
                tensor.select(dim, 0).zero_()
                if not bool(torch.isfinite(compute()).all()):
                    return None, dim
            tensor.zero_()
            return None, None if bool(torch.isfinite(compute()).all()) else WHOLE
    except Exception as error:  # of code that is not ours
        return f"how the weight is computed from it could not be tried: {type(error).__name__}", None


def _zeros(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random places, half of all, that fill no slice along any dimension."""
    zeros = torch.rand(shape, generator=generator) < 0.5
    for index in range(max(shape)):
        zeros[tuple(index % size for size in shape)] = False
    return zeros
