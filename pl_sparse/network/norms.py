"""LayerNorms and RMSNorms that take their statistics over the channels that are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pl_sparse.network.layers import BARE

__all__ = ["is_over_left", "kept_channels", "last_norms", "norm_over_all", "norm_over_left"]


def last_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms of a model over their last dimension, by name: single layers that are named so, with a scale."""
    for path, module in model.named_modules():
        sizes = {tuple(p.shape) for p in module.parameters(recurse=False)}
        single = not module._modules and not isinstance(module, BARE) and len(sizes) == 1
        if single and "norm" in type(module).__name__.lower() and len(shape := sizes.pop()) == 1 and shape[0] > 1:
            yield path, module


def kept_channels(norm: nn.Module) -> Tensor:
    """Which channels of a norm are not masked, (channels,): its scale or its shift is not zero there."""
    return torch.stack([parameter.detach() != 0 for parameter in norm.parameters(recurse=False)]).any(0)


def _stretch(kept: Tensor) -> Tensor:
    """sqrt(n / left), by which inputs grow so that the mean over n squares is that over those left."""
    return (len(kept) / kept.sum()).sqrt()


def _before(norm: nn.Module, args: Any) -> Any:
    kept = kept_channels(norm)
    return (args[0] * _stretch(kept).to(args[0].dtype), *args[1:])


def _before_centring(norm: nn.Module, args: Any) -> Any:
    kept, x = kept_channels(norm), args[0]
    mean = torch.where(kept, x, 0).float().sum(-1, keepdim=True) / kept.sum()  # of those left
    return (torch.where(kept, x, mean.to(x.dtype)) * _stretch(kept).to(x.dtype), *args[1:])


def _after(norm: nn.Module, args: Any, out: Tensor) -> Tensor:
    shift = getattr(norm, "bias", None)
    scaled = out if shift is None else out - shift
    return out + scaled * (1 / _stretch(kept_channels(norm)) - 1).to(out.dtype)  # where all are left, out to the bit


def norm_over_left(norm: nn.Module) -> None:
    """Let a norm take its statistics over the channels that are not masked, from now on.

    A LayerNorm gets the mean of the channels left in the place of the others, and any norm gets its inputs times
    c = sqrt(n / left): variance and mean square over all n are then c^2 times those over the channels left. Its outputs
    are divided by c. So it computes what a norm of the channels left alone does, eps included.

    It is done by hooks that know nothing but scale and shift, so that a copy of the model has them too. A plain model
    that the weights are loaded into has not: there statistics are those of all channels, masked ones too.
    """
    if not is_over_left(norm):
        norm.register_forward_pre_hook(_before_centring if _centres(norm) else _before)
        norm.register_forward_hook(_after)


def is_over_left(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics over the channels that are left."""
    return _after in norm._forward_hooks.values()


def norm_over_all(norm: nn.Module) -> None:
    """Let a norm take its statistics over all channels again."""
    for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before, _before_centring, _after)]:
            del hooks[key]


@torch.no_grad()
def _centres(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean: with scales of one, a number that is added to all inputs is not seen."""
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return isinstance(norm, nn.LayerNorm)
    tensors = {name: torch.ones_like(p, device="cpu") for name, p in norm.named_parameters(recurse=False)}
    first = next(iter(tensors.values()))
    x = torch.randn(1, len(first), generator=torch.Generator().manual_seed(0)).to(first.dtype)
    try:
        a, b = (functional_call(norm, tensors, (each,)) for each in (x, x + 1))
    except Exception:  # it takes something else than activations; a trial shows what it makes of the channels
        return False
    return bool(torch.allclose(a, b, rtol=0.05, atol=0.05))
