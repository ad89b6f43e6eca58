"""One prunable weight of which each process holds a part (FSDP2, tensor parallelism), and its mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.dtensor import gathered, is_sharded, local, of_fsdp, part_of, total, total_of_parts
from pl_sparse.core.parameter import MaskedParameter, checksum
from pl_sparse.core.registry import Axes, name_of

__all__ = ["ShardedParameter", "masked", "refuse_shared", "whole"]


class ShardedParameter(MaskedParameter):
    """A weight that processes share.

    The mask, the values behind it and what a scorer gathers are shared as the weight is. A step of the optimizer works
    on the part of this process. Where each weight is a unit with a score of its own, an update of masks works on parts
    too (`allocation.parts`). Otherwise the weight is seen, within `whole`, as if it were here, gathered anew at each
    access and held by nobody, so that masks are those that one process would choose, and each process keeps its part of
    them. FSDP itself gathers each weight once or twice per step; such an update does so about three times.
    """

    _whole = False
    _kept: int | Tensor | None = None
    _checksum: Tensor | None = None

    # The fields of a weight, as parts or whole

    @property
    def mask(self) -> Tensor:
        return self._seen(self._mask)

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask = self._held(mask)

    @property
    def latent(self) -> Tensor | None:
        return None if self._latent is None else self._seen(self._latent)

    @latent.setter
    def latent(self, values: Tensor | None) -> None:
        self._latent = None if values is None else self._held(values)

    @property
    def state(self) -> MutableMapping[str, Tensor]:
        return _Whole(self) if self._whole else self._state

    @state.setter
    def state(self, tensors: Mapping[str, Tensor]) -> None:
        self._state: dict[str, Tensor] = {}
        for key, value in tensors.items():
            self.state[key] = value

    @property
    def device(self) -> torch.device:
        return self._mask.device

    @property
    def data(self) -> Tensor:
        return self._seen(local(self.weight))

    @property
    def grad(self) -> Tensor | None:
        grad = self.weight.grad
        return None if grad is None else self._seen(local(grad))

    @property
    def factor(self) -> Tensor:
        return self.mask.to(self.weight.dtype) if self._whole else super().factor

    @property
    def kept(self) -> int:
        if not self.pruned:
            return self.numel
        if self._kept is None:
            with whole([self]):
                self._kept = int(torch.count_nonzero(self.mask))
        return int(self._kept)

    def checksum(self) -> Tensor:
        """That of the whole mask as this process chose it, or of its parts; 0 where it was never chosen."""
        none = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        return none if self._checksum is None else self._checksum

    def part(self, tensor: Tensor) -> Tensor:
        return part_of(tensor, self.weight)

    def total(self, tensor: Tensor) -> Tensor:
        return total(tensor, tensor if self._whole else self.weight)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        local(self.weight).copy_(self._held(values))

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        self._kept = int(torch.count_nonzero(mask)) if self._whole else None
        self._checksum = checksum(mask) if self._whole else None
        held = self._held(mask)
        with whole([self], False):
            super().set_mask(held)

    @torch.no_grad()
    def set_part(self, mask: Tensor) -> None:
        """Write what this process holds of a new mask. All processes call it."""
        with whole([self], False):
            super().set_mask(mask)
        none = torch.zeros((), dtype=torch.int64, device=mask.device)
        numbers = torch.stack([torch.count_nonzero(mask), checksum(mask) if mask.numel() else none])
        self._kept, self._checksum = total_of_parts(numbers, self.weight).unbind()

    def here(self) -> MaskedParameter:
        """What this process holds of the weight, as a parameter of its own."""
        latent = None if self._latent is None else self._latent.contiguous()
        state = {key: value.contiguous() for key, value in self._state.items()}
        weight: Any = local(self.weight.detach()).contiguous()
        return MaskedParameter(
            self.name, self.module, weight, self._mask.contiguous(), latent, state, pruned=self.pruned
        )

    @torch.no_grad()
    def unset_mask(self) -> None:
        with whole([self], False):
            super().unset_mask()

    @torch.no_grad()
    def to_weight(self) -> None:
        with whole([self], False):
            super().to_weight()

    def tensors(self) -> dict[str, Tensor]:
        """All that must survive a checkpoint, by name, as one process would have it. All processes call it."""
        with whole([self]):
            return super().tensors()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any]) -> None:
        with whole([self]):
            super().load(tensors)

    def _seen(self, part: Tensor) -> Tensor:
        return gathered(part, self.weight) if self._whole else part

    def _held(self, tensor: Tensor) -> Tensor:
        return part_of(tensor, self.weight) if self._whole else tensor


def masked(name: str, module: nn.Module, weight: nn.Parameter, **seen: Any) -> MaskedParameter:
    """A weight with a mask of ones.

    Args:
        name: of the weight.
        module: the layer that it is a weight of.
        weight: the parameter; processes may share it.
        seen: further attributes of `MaskedParameter`.
    """
    kind = ShardedParameter if is_sharded(weight) else MaskedParameter
    return kind(name, module, weight, torch.ones_like(local(weight), dtype=torch.bool, requires_grad=False), **seen)


def refuse_shared(params: Sequence[MaskedParameter], axes: Axes, model: nn.Module) -> None:
    """Raise a ValueError if processes share a weight, and an axis does not work on parts of weights."""
    shared = next((param.name for param in params if isinstance(param, ShardedParameter)), None)
    if shared is None:
        return
    for axis in (axes.scorer, axes.updater, axes.structure, axes.masking):
        if (reason := axis.needs_whole) is not None:
            raise ValueError(
                f"processes share {shared} (FSDP2, tensor parallelism), and {axis.axis}="
                f"{name_of(axis)} {reason}: use "
                "another one, or strategy=ddp"
            )
    tensor_parallel = next(
        (p.name for p in params if isinstance(p, ShardedParameter) and not of_fsdp(p.weight, model)), None
    )
    for axis in (axes.scorer, axes.updater):
        if axis.sees_inputs and tensor_parallel is not None:
            raise ValueError(
                f"processes share {tensor_parallel} by tensor parallelism, and {axis.axis}={name_of(axis)} looks at "
                "the inputs of layers, which none of them has whole: use another one, or FSDP2 alone"
            )
    if axes.ablation in ("shuffle", "reinit"):
        raise ValueError(
            f"processes share {shared} (FSDP2, tensor parallelism), and ablation={axes.ablation} draws for whole "
            "weights: use strategy=ddp"
        )


class _Whole(MutableMapping[str, Tensor]):
    """What a scorer gathered of a weight, whole. Tensors of another shape than the part's are the same everywhere."""

    def __init__(self, param: ShardedParameter) -> None:
        self._param = param

    def __getitem__(self, key: str) -> Tensor:
        value = self._param._state[key]
        return self._param._seen(value) if value.shape == local(self._param.weight).shape else value

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._param._state[key] = self._param._held(value) if value.shape == self._param.shape else value

    def __delitem__(self, key: str) -> None:
        del self._param._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._param._state)

    def __len__(self) -> int:
        return len(self._param._state)


@contextmanager
def whole(params: Iterable[MaskedParameter], value: bool = True) -> Iterator[None]:
    """Within the block the weights that processes share are seen whole. All processes enter it and do the same there.

    Args:
        value: False to see the parts again, within a block that sees the whole.
    """
    shared = [(param, param._whole) for param in params if isinstance(param, ShardedParameter)]
    for param, _ in shared:
        param._whole = value
    try:
        yield
    finally:
        for param, earlier in shared:
            param._whole = earlier
