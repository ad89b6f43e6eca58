"""Tensors that processes share, each of which holds a part (`torch.distributed.tensor.DTensor`)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "full",
    "gathered",
    "is_counted_here",
    "is_held_by_all",
    "is_sharded",
    "local",
    "of_fsdp",
    "part_of",
    "reshard",
    "total",
    "total_of_parts",
]


def _dtensor() -> Any:
    """The class, where something has imported it; a tensor of a class that was never imported is none of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(tensor: object) -> bool:
    """Whether processes share a tensor."""
    dtensor = _dtensor()
    return dtensor is not None and isinstance(tensor, dtensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, with its storage; all of it where it is not shared."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def full(tensor: Tensor) -> Tensor:
    """All of a tensor; where processes share it, a copy, for which all of them call it."""
    return gathered(local(tensor), tensor)


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part, a copy. All processes call it.

    Args:
        part: what this process holds.
        like: a shared tensor of the same shape, which says who holds what.
    """
    if not is_sharded(like):
        return part
    spec: Any = like
    numbers = part.view(torch.uint8) if part.dtype == torch.bool else part
    shared = _dtensor().from_local(
        numbers.detach(), spec.device_mesh, spec.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    whole: Tensor = shared.full_tensor()
    return whole.view(torch.bool) if part.dtype == torch.bool else whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that all processes have, a copy. Nothing is sent.

    Args:
        whole: the same in all processes.
        like: a shared tensor of the same shape, which says who holds what.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import Replicate

    spec: Any = like
    everywhere = [Replicate()] * spec.device_mesh.ndim
    shared = _dtensor().from_local(whole.contiguous(), spec.device_mesh, everywhere, run_check=False)
    part: Tensor = shared.redistribute(placements=spec.placements).to_local()
    return part.clone()


def of_fsdp(weight: Tensor, model: nn.Module) -> bool:
    """Whether FSDP2 alone shares a parameter of a model, so that its layer sees whole inputs, and gathers it itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not is_sharded(weight):
        return False
    managed = any(
        weight is parameter
        for module in model.modules()
        if isinstance(module, fsdp.FSDPModule)
        for parameter in module.parameters()
    )
    return managed and sum(not place.is_replicate() for place in weight.placements) == 1  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Let the parameters of a model be parts again that FSDP left gathered after a forward pass without a backward one.

    The next forward pass gathers them anew, so that it sees what was written into the parts meanwhile.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def is_held_by_all(tensor: Tensor) -> bool:
    """Whether all processes hold parts or copies of a shared tensor, and none a summand."""
    from torch.distributed import get_world_size

    spec: Any = tensor
    return bool(spec.device_mesh.size() == get_world_size()) and not any(p.is_partial() for p in spec.placements)


def is_counted_here(tensor: Tensor) -> bool:
    """Whether this process is the one, of those that hold copies of its part of a tensor, that counts it."""
    from torch.distributed import get_rank

    if not is_sharded(tensor):
        return get_rank() == 0
    spec: Any = tensor
    where = zip(spec.device_mesh.get_coordinate(), spec.placements, strict=True)
    return all(place == 0 for place, held in where if held.is_replicate())


def total_of_parts(number: Tensor, like: Tensor) -> Tensor:
    """The sum of what each process has found of its part of a shared tensor: over those that hold one copy of all of
    it. All processes call it.

    Args:
        number: of any shape, the same in all processes.
        like: the shared tensor.
    """
    from torch.distributed.tensor import Partial, Replicate

    spec: Any = like
    placements = [Replicate() if place.is_replicate() else Partial() for place in spec.placements]
    found: Tensor = _dtensor().from_local(number, spec.device_mesh, placements, run_check=False).full_tensor()
    return found


def total(part: Tensor, like: Tensor) -> Tensor:
    """The sum over all of a tensor of which each process holds a part. All processes call it.

    Args:
        part: what this process holds.
        like: a shared tensor of the same shape, which says who holds what.
    """
    number = torch.count_nonzero(part) if part.dtype == torch.bool else part.sum()
    return total_of_parts(number, like) if is_sharded(like) else number
