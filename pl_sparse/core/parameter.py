"""One prunable weight and its mask."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pl_sparse.core.cut import Cut
from pl_sparse.core.dtensor import total
from pl_sparse.core.layouts import Plain, Whole
from pl_sparse.core.topk import count_each, counted

__all__ = [
    "MaskedBuffer",
    "MaskedParameter",
    "checksum",
    "in_pieces",
    "kept_each",
    "numbers",
    "packed",
    "unpacked",
    "where_kept",
    "zero_pruned",
]

_LARGE = 1 << 18  # weights of a tensor, from which on its mask is turned into numbers piece by piece
_PIECE = 1 << 16  # scores that are told apart at once
_PLAIN = (Tensor, nn.Parameter)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


@dataclass(eq=False)
class MaskedParameter:
    """One prunable weight and its mask. What methods share about a weight lives here, never in the configuration.

    Attributes:
        name: the first name of the weight in `model.named_parameters()`.
        module: the layer that it is a weight of.
        weight: the parameter; between optimizer steps it *is* `mask * values`.
        mask: bool, the weight's shape, True = kept.
        latent: the values behind the mask, for methods that remember pruned weights, else None.
        state: what the scorer gathers, tensors by name.
        layout: how the weight is seen as (out, in, *kernel).
        pruned: whether the mask was ever set; until then it is all True and masking has nothing to do.
        cut: what shrinking took out of the weight, else None. Scores and masks are compared in the former shape, as
            if it were still there.
        norm_dim: the dimension of the weight whose slices are divided by their norms, so that each keeps a weight
            (weight_norm: 0 / 0 is not a number); -1: all of the weight is; None: none is.
        aside: the weight's own memory, while an optimizer steps the latent values in its place (`core.exposed`).
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    mask: Tensor
    latent: Tensor | None = None
    state: MutableMapping[str, Tensor] = field(default_factory=dict)
    layout: Whole = field(default_factory=Plain)
    pruned: bool = False
    cut: Cut | None = None
    norm_dim: int | None = None
    aside: Tensor | None = field(default=None, repr=False)
    _factor: Tensor | None = field(default=None, repr=False)
    _bits: Tensor | None = field(default=None, repr=False)

    @property
    def data(self) -> Tensor:
        """The numbers of the weight that this process holds, to be changed in place: all of them, as a rule."""
        return self.weight

    @property
    def values(self) -> Tensor:
        """The values a score is taken of: the latent ones where there are any, else the weight itself."""
        return self.data.detach() if self.latent is None else self.latent

    @property
    def grad(self) -> Tensor | None:
        """dL/d(masked weight), for pruned positions too; None when the weight took no part in the loss."""
        return self.weight.grad

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.mask.device

    @property
    def former(self) -> torch.Size:
        """The shape before anything was cut out of the weight."""
        return self.shape if self.cut is None else torch.Size(self.cut.shape)

    @property
    def numel(self) -> int:
        """How many weights there are, those that were cut out included."""
        return self.former.numel()

    @property
    def kept(self) -> int:
        """How many weights the mask keeps (reads the mask: a host synchronisation on a GPU).

        Inputs that were cut out because nothing fed them count as the mask had them: kept in a kept output.
        """
        return self._before_cut(int(counted(self.mask))) if self.pruned else self.numel

    def _before_cut(self, kept: int) -> int:
        """How many weights the mask keeps, by how many are kept of those that are left."""
        if self.cut is not None:
            removed = self.cut.removed
            for dim in set(removed) - {self.layout.output_dim}:
                kept = kept * self.cut.shape[dim] // (self.cut.shape[dim] - len(removed[dim]))
        return kept

    @property
    def normalized_slices(self) -> int:
        """How many slices are divided by their norms, each of which keeps a weight."""
        if self.norm_dim is None:
            return 0
        return 1 if self.norm_dim < 0 else self.former[self.norm_dim]

    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor of the weight's shape."""
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of what belongs to the weight, over all processes that hold a part of it."""
        return total(tensor, self.weight)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Give the weight other values."""
        self.weight.copy_(values)

    def checksum(self) -> Tensor:
        """A number that differs where masks do, but once in 2^64: an int64 on the mask's device."""
        return checksum(self.mask)

    def fill(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape in its former shape."""
        return tensor if self.cut is None else self.cut.fill(tensor)

    def take(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the weight's former shape."""
        return tensor if self.cut is None else self.cut.take(tensor)

    @property
    def is_flat(self) -> bool:
        """Whether some of the weights can be seen as a parameter of their own, by `among`: those of a plain tensor."""
        if type(self) is not MaskedParameter or self.cut is not None or not isinstance(self.layout, Plain):
            return False
        held = self.data, self.mask, *(() if self.latent is None else (self.latent,)), *self.state.values()
        return all(tensor.device == self.mask.device and tensor.is_contiguous() for tensor in held)

    def among(self, of: slice) -> MaskedParameter:
        """Some of the weights, flat, and what belongs to them, as a parameter of their own: views."""

        def seen(tensor: Tensor) -> Tensor:
            return tensor.view(-1)[of] if tensor.shape == self.shape else tensor

        weight: Any = seen(self.weight.detach())
        latent = None if self.latent is None else seen(self.latent)
        state = {key: seen(value) for key, value in self.state.items()}
        return MaskedParameter(self.name, self.module, weight, seen(self.mask), latent, state, pruned=self.pruned)

    @torch.no_grad()
    def shrink(self, cut: Cut) -> None:
        """Take the same out of all that belongs to the weight as was taken out of the weight itself."""
        self.mask = cut.take(self.mask)
        self._factor = self._bits = None
        if self.latent is not None:
            self.latent = cut.take(self.latent)
        self.state = {
            key: cut.take(value) if value.dim() == len(cut.shape) else value for key, value in self.state.items()
        }
        self.cut = cut if self.cut is None else self.cut.then(cut)

    @torch.no_grad()
    def unshrink(self) -> None:
        """Take `shrink` back: what was removed is pruned, and zero."""
        if self.cut is not None:
            self.mask = self.cut.fill(self.mask)
            self._factor = self._bits = None
            left = [n - len(self.cut.removed.get(dim, ())) for dim, n in enumerate(self.cut.shape)]
            self.state = {k: self.cut.fill(v) if list(v.shape) == left else v for k, v in self.state.items()}
            self.cut = None

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Write a new mask in place, so that nothing compiled against the old one is invalid."""
        self.mask.copy_(mask)
        self.pruned = True
        for numbers in (self._factor, self._bits):
            if numbers is not None:
                numbers.copy_(self.mask)

    @torch.no_grad()
    def unset_mask(self) -> None:
        """Take the first mask back, before it came into force."""
        if self.latent is not None:
            self.data.copy_(self.latent)
        self.mask.fill_(True)
        self.latent = self._factor = self._bits = None
        self.pruned = False

    @property
    def factor(self) -> Tensor:
        """The mask as numbers of the weight's type, to multiply with: a bool makes that five times slower on a CPU."""
        if self._factor is None or self._factor.dtype != self.weight.dtype:
            self._factor = self.mask.to(self.weight.dtype)
        return self._factor

    @property
    def bits(self) -> Tensor:
        """The mask as integers of as many bytes as the weight's numbers, for `zero_pruned`."""
        bits, size = self._bits, self.weight.element_size()
        if bits is None or bits.element_size() != size:
            bits = self._bits = self.mask.to(_INTEGERS[size])
        return bits

    @torch.no_grad()
    def to_weight(self) -> None:
        """Move all that belongs to the weight to its device."""
        device = self.weight.device
        if self.mask.device != device:
            self.mask = self.mask.to(device)
            self._factor = self._bits = None
        if self.latent is not None:
            self.latent = self.latent.to(device)
        self.state = {key: value.to(device) for key, value in self.state.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that must survive a checkpoint, by name; of the mask its bits, and none where nothing was ever pruned."""
        named = {"mask": packed(self.mask[: None if self.pruned else 0])}
        named |= {f"state.{key}": value for key, value in self.state.items()}
        if self.latent is not None:
            named["latent"] = self.latent
        return named

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of `tensors`, with whether the weight is `pruned`."""
        self.set_mask(unpacked(tensors["mask"], self.shape))
        self.pruned = bool(tensors["pruned"])
        latent = tensors.get("latent")
        self.latent = None if latent is None else latent.to(self.weight.dtype, copy=True)
        state = {key: value for key, value in tensors.items() if key.startswith("state.")}
        self.state = {key.removeprefix("state."): value.clone() for key, value in state.items()}
        self.to_weight()


class MaskedBuffer(MaskedParameter):
    """A buffer that is masked along with weights, such as the bias of a frozen norm. Its module may replace it."""

    @property
    def weight(self) -> Any:
        return self.module.get_buffer(self.name.rpartition(".")[2])

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        return  # the module holds it

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        if self.latent is not None:  # statistics are written to while they are kept
            self.latent.copy_(torch.where(self.mask, self.weight, self.latent))
        super().set_mask(mask)


def kept_each(params: Sequence[MaskedParameter]) -> list[int]:
    """`MaskedParameter.kept` of each. The host waits for a GPU once."""
    here = [param for param in params if type(param) is MaskedParameter and param.pruned]
    counts = dict(zip(here, count_each(param.mask for param in here), strict=True))
    return [param._before_cut(counts[param]) if param in counts else param.kept for param in params]


def checksum(mask: Tensor) -> Tensor:
    """A sum of a mask's words, each times an odd number of its own, modulo 2^64.

    >>> masks = torch.ones(3, 8, dtype=torch.bool), torch.eye(3, 8, dtype=torch.bool), torch.eye(3, 8).flip(0).bool()
    >>> len({int(checksum(mask)) for mask in masks})
    3
    """
    bits = nn.functional.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8))
    words = bits.view(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=mask.device)).sum()


def packed(mask: Tensor) -> Tensor:
    """The bits of a mask, eight to a byte of uint8.

    >>> packed(torch.tensor([[True, False], [True, True]])).tolist()
    [176]
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `packed`; no bits are a mask that keeps all. Masks of bools are left as they are."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.numel():
        return torch.ones(shape, dtype=torch.bool)
    return torch.from_numpy(np.unpackbits(mask.cpu().numpy(), count=shape.numel())).view(torch.bool).reshape(shape)


def zero_pruned(
    tensors: Sequence[Tensor], params: Sequence[MaskedParameter], values: Sequence[Tensor] | None = None
) -> None:
    """Set tensors to zero where weights are pruned, whatever is there. It is called without autograd.

    0 times infinity is NaN, but 0 times the integer with the same bits is 0, and 1 times it the same number: that is as
    fast as the product of floats, and masks are exact. The integers of large masks are made in pieces that stay in the
    cache, and not kept.

    Args:
        tensors: of the shapes of the weights: they themselves, or their gradients.
        params: the weights.
        values: what is written where weights are kept; None: what is in the tensors.
    """
    integers, masks = [], []
    for tensor, param, value in zip(tensors, params, tensors if values is None else values, strict=True):
        if not _is_plain(tensor, param):
            if value is not tensor:
                tensor.copy_(value)
            tensor.mul_(param.factor) if tensor.is_sparse else tensor.masked_fill_(~param.mask, 0)
        elif _is_large(tensor):
            _multiply(value, param.mask, tensor)
        elif tensor.numel() > _LARGE and tensor.device.type == "cuda":
            dtype = _INTEGERS[tensor.element_size()]  # there a bool costs no more than a number that is kept for it
            torch.mul(value.view(dtype), param.mask, out=tensor.view(dtype))
        else:
            bits = param.bits
            number = tensor.view(bits.dtype)
            if value is tensor:
                integers.append(number)
                masks.append(bits)
            else:
                torch.mul(value.view(bits.dtype), bits, out=number)
    if integers:
        torch._foreach_mul_(integers, masks)


def _is_plain(tensor: Tensor, param: MaskedParameter) -> bool:
    return type(tensor) in _PLAIN and tensor.dtype == param.weight.dtype and not tensor.is_sparse


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() > _LARGE and tensor.device.type == "cpu"


def in_pieces(tensor: Tensor, param: MaskedParameter) -> bool:
    """Whether the mask of a tensor is turned into numbers piece by piece."""
    return _is_plain(tensor, param) and _is_large(tensor)


def _multiply(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """out <- mask * values, as integers.

    NumPy casts the mask within its loop, in buffers that the first cache holds: of one thread in half the time of
    torch, which needs several to catch up.
    """
    if torch.get_num_threads() <= 2:
        dtype = _INTEGERS[values.element_size()]
        number, into = values.view(dtype).numpy(), out.view(dtype).numpy()
        np.multiply(number, mask.view(torch.int8).numpy(), out=into)
        return
    for into, number, kept in zip(*numbers(mask, out, values), strict=True):
        torch.mul(number, kept.to(number.dtype), out=into)


def numbers(mask: Tensor, *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Tensors of a weight's shape as integers with the same bits, in pieces, and the pieces of its mask."""
    rows = max(_LARGE * torch.get_num_threads() * len(mask) // mask.numel(), 1)
    dtype = _INTEGERS[tensors[0].element_size()]
    return *(tensor.view(dtype).split(rows) for tensor in tensors), mask.view(torch.int8).split(rows)


def where_kept(values: Tensor, kept: Tensor) -> Tensor:
    """The values where `kept` is, the lowest finite number elsewhere: `torch.where` by integers, which is faster."""
    lowest = torch.finfo(values.dtype).min
    if values.device.type != "cpu" or not (values.is_contiguous() and kept.is_contiguous()):
        return torch.where(kept, values, lowest)
    dtype = _INTEGERS[values.element_size()]
    bits = int(torch.tensor(lowest, dtype=values.dtype).view(dtype))
    out = torch.empty_like(values)
    pieces = (tensor.view(-1).split(_PIECE) for tensor in (values.view(dtype), kept.view(torch.int8), out.view(dtype)))
    for value, keep, into in zip(*pieces, strict=True):  # within the cache, where NumPy is faster
        number = into.numpy()
        np.bitwise_xor(value.numpy(), bits, out=number)
        np.multiply(number, keep.numpy(), out=number)
        np.bitwise_xor(number, bits, out=number)
    return out
