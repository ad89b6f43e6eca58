"""Which parameters and buffers a tensor is made of, and where their indices are in it: `gamma.reshape(1, -1, 1, 1)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Origins", "varies"]


class _Step(NamedTuple):
    """How a tensor was made.

    Attributes:
        sources: of these.
        move: the elements of the tensor, of those of its sources by their identity.
    """

    sources: tuple[Tensor, ...]
    move: Callable[[dict[int, Tensor]], Tensor]


class Origins:
    """What is known of tensors that are made of a model's own.

    Args:
        model: its parameters and buffers are where tensors come from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, tuple[str, nn.Module, str]] = {}
        for path, module in model.named_modules():
            for kind in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                for name, tensor in kind:
                    self._owners.setdefault(id(tensor), (path, module, name))
        self._steps: Any = WeakTensorKeyDictionary()

    def owner(self, tensor: Tensor) -> tuple[str, nn.Module, str] | None:
        """The path and the module that a parameter or buffer is of, and its name there."""
        return self._owners.get(id(tensor))

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer, or made of some alone."""
        return id(tensor) in self._owners or tensor in self._steps

    def note(self, out: Tensor, sources: tuple[Tensor, ...], move: Callable[[dict[int, Tensor]], Tensor]) -> None:
        """Note how a tensor was made."""
        if not self.known(out):
            self._steps[out] = _Step(sources, move)

    def note_filled(self, out: Tensor) -> None:
        """Note that all elements of a tensor are one number, as those of a state that begins as zeros."""
        self._steps[out] = _Step((), lambda places: next(iter(places.values())))  # which is never called: of nothing

    def forget_written(self, tensor: Tensor) -> None:
        """Forget what is known of tensors in the memory of one that was written to."""
        memory = tensor.untyped_storage().data_ptr()
        for other in [each for each in self._steps if each.untyped_storage().data_ptr() == memory]:
            del self._steps[other]

    def whole(self, view: Tensor, dim: int) -> tuple[Tensor, int] | None:
        """The filled tensor that a tensor is a view of, and which dimension of it lies whole along one of the view."""
        base = view
        while (step := self._steps.get(base)) is not None and len(step.sources) == 1:
            base = step.sources[0]
        if base is view or step is None or step.sources:
            return None
        for axis, size in enumerate(base.shape):
            places = self._places(view, base, axis)
            if places is not None and places.shape[dim] == size > 1 and varies(places, dim):
                line = places.movedim(dim, -1)
                return (base, axis) if bool((line == torch.arange(size)).all()) else None
        return None

    def same(self, tensor: Tensor, dim: int) -> bool:
        """Whether a tensor is known, and does not differ along a dimension."""
        if not self.known(tensor):
            return False
        for root in self.roots(tensor):
            for axis, size in enumerate(root.shape):
                places = self._places(tensor, root, axis) if size > 1 else None
                if size > 1 and (places is None or varies(places, dim)):
                    return False
        return True

    def roots(self, tensor: Tensor) -> list[Tensor]:
        """The parameters and buffers that a tensor is made of."""
        if id(tensor) in self._owners:
            return [tensor]
        step = self._steps.get(tensor)
        found = [root for source in step.sources for root in self.roots(source)] if step is not None else []
        return list({id(root): root for root in found}.values())

    def along(self, tensor: Tensor, dim: int) -> list[tuple[Tensor, int, list[int]]] | None:
        """Where the indices along a dimension of a tensor come from.

        Returns:
            For each parameter or buffer that it is made of and that differs along that dimension: the dimension of it,
            and its index there by the index in the tensor. None where they are not known.
        """
        found = []
        for root in self.roots(tensor):
            dims = []
            for axis, size in enumerate(root.shape):
                places = self._places(tensor, root, axis) if size > 1 else None
                if places is None or not varies(places, dim):
                    continue
                if any(varies(places, other) for other in range(tensor.dim()) if other != dim):
                    return None
                line = places[tuple(slice(None) if at == dim else 0 for at in range(tensor.dim()))]
                dims.append((root, axis, line.tolist()))
            if len(dims) > 1:
                return None
            found += dims
        return found or None

    def _places(self, tensor: Tensor, root: Tensor, axis: int) -> Tensor | None:
        """For each element of a tensor the index along a dimension of what it is made of; None if it is not."""
        if tensor is root or id(tensor) == id(root):
            shape = [1] * root.dim()
            shape[axis] = -1
            return torch.arange(root.shape[axis]).view(shape).expand(root.shape)
        step = self._steps.get(tensor)
        if step is None:
            return None
        inner = {id(source): self._places(source, root, axis) for source in step.sources}
        known = {key: places for key, places in inner.items() if places is not None}
        if not known:
            return None
        return step.move(known)


def varies(places: Tensor, dim: int) -> bool:
    """Whether the elements of a tensor differ along a dimension."""
    if places.shape[dim] < 2 or not places.stride(dim):
        return False
    return bool((places != places.narrow(dim, 0, 1)).any())
