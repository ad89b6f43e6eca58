"""The weight that a layer with a `forward` of its own computes with: found by trial, on copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pl_sparse.core.parametrized import tried, twin_of

__all__ = ["PRODUCTS", "memory", "used"]

PRODUCTS = frozenset(
    (
        *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
        *(f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)),
    )
)
_LARGEST = 1 << 24  # weights of a layer of no known class, which are copied to be tried


@torch.no_grad()
def used(module: nn.Module, short: str) -> tuple[str | None, int | None]:
    """Why zeros of a weight are none of what its layer multiplies inputs with, or None; and what norms divide.

    Layers are called whose inputs are known from their sizes, or guessed from those of the weight. Where that fails,
    nothing is known against the weight.

    Args:
        module: the layer; nothing of it changes.
        short: how it names the weight.

    Returns:
        The reason, and the dimension as in `Underlying.norm_dim`.
    """
    if type(module).forward.__module__.startswith("torch.nn."):
        return None, None
    weight = module._parameters[short]
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None, None
    known = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and short == "weight"
    if not known and (module._modules or weight.numel() > _LARGEST):
        return None, None
    devices = [weight.device] if weight.is_cuda else []
    for inputs in _inputs(module, weight, known):
        try:
            with torch.random.fork_rng(devices=devices):
                _, compute = _trial(module, short, inputs)
                compute()
        except Exception:  # of code that is not ours, that wants other inputs
            continue
        return tried(weight, lambda inputs=inputs: _trial(module, short, inputs))  # type: ignore[misc]
    if known and _rescaled(module):
        return "its zeros are no zeros of the weight that the layer makes of it", None
    return None, None


def _inputs(module: nn.Module, weight: Tensor, known: bool) -> Iterator[tuple[Tensor, ...]]:
    """Arguments that the layer may be called with, the likelier first."""
    if weight.dim() == 2:
        sizes = [(weight.shape[1],)] if known else [(weight.shape[1],), (weight.shape[0],)]
    else:
        transposed = bool(getattr(module, "transposed", False))
        groups = getattr(module, "groups", 1)
        channels = weight.shape[0] if transposed else weight.shape[1] * (groups if isinstance(groups, int) else 1)
        kernel: Any = getattr(module, "kernel_size", None)
        if not isinstance(kernel, tuple):
            kernel = tuple(weight.shape[2:])
        gaps: Any = getattr(module, "dilation", 1)
        gaps = gaps if isinstance(gaps, tuple) else (gaps,) * len(kernel)
        sizes = [(channels, *(2 * (size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True)))]
    for size in sizes:
        batch = next(n for n in (2, 3, 5, 7, 11, 13) if n not in weight.shape)  # no product of inputs looks like it
        x = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0)).to(weight)
        yield (x,)
        if not known:
            yield x, torch.zeros(batch, dtype=torch.long, device=weight.device)  # what the classes of a margin loss are


def _drawn(module: nn.Module, generator: torch.Generator, least: float = 0.0) -> Any:
    """A copy of a layer with random numbers for parameters: a gain that is zero yet would hide what it scales.

    Args:
        generator: not the one that training draws from.
        least: of the numbers, which are in a range of 1.
    """
    twin: Any = twin_of(module)
    twin._modules = copy.deepcopy(module._modules)
    for parameter in twin.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + least)
    return twin


def _trial(module: nn.Module, short: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Callable[[], Any]]:
    """A copy of the weight, and what gives what is multiplied with inputs in its place."""
    twin = _drawn(module, torch.Generator().manual_seed(0), 0.5)
    tensor = twin._parameters[short].data
    others = [other for name, other in (*twin.named_parameters(), *twin.named_buffers()) if name != short]

    def compute() -> Tensor:
        with _Products(tensor, inputs, others) as products:
            type(module).forward(twin, *inputs)
        if products.found is None:
            raise ValueError("its layer multiplies nothing of its size with inputs")
        return products.found

    return tensor, compute


class _Products(TorchFunctionMode):
    """Keeps a factor of a product that has a weight's size, in the shape of the weight: of several the one with most of
    its zeros, and of equal ones the last.

    Args:
        weight: of a matrix with as many rows as columns its zeros tell which way it was turned.
        inputs: what is not such a factor.
        others: what else the layer has: it may multiply with matrices of the same shape, one after the other.
    """

    def __init__(self, weight: Tensor, inputs: tuple[Tensor, ...], others: Sequence[Tensor]) -> None:
        super().__init__()
        self.zeros = weight == 0
        self.inputs = inputs
        self.others = {memory(other) for other in others} - {None}
        self.found: Tensor | None = None
        self.most = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in PRODUCTS:
            for factor in (*args, *kwargs.values()):
                if not isinstance(factor, Tensor) or any(factor is x for x in self.inputs):
                    continue
                if memory(factor) in self.others:
                    continue
                turned = (factor, factor.mT) if factor.dim() == 2 else (factor,)
                fitting = [value.detach().clone() for value in turned if value.shape == self.zeros.shape]
                zeros = [int((value[self.zeros] == 0).sum()) for value in fitting]
                if fitting and max(zeros) >= self.most:
                    self.found, self.most = fitting[zeros.index(max(zeros))], max(zeros)
        return func(*args, **kwargs)


@torch.no_grad()
def _rescaled(module: nn.Module) -> bool:
    """Whether a layer with a `forward` of its own computes with nonzero values where its weight is zero.

    A weight that is standardised is such. An input whose weights are all zero must have the same effect whatever the
    other weights are: none, or that of what the layer adds.
    """
    weight: Any = module._parameters.get("weight")
    transposed = bool(getattr(module, "transposed", False))
    if weight is None or weight.is_meta or not weight.is_floating_point() or weight.shape[0 if transposed else 1] < 2:
        return False
    devices = [weight.device] if weight.is_cuda else []
    generator = torch.Generator().manual_seed(0)  # not the one that training draws from

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(weight)

    try:
        twin = _drawn(module, generator)
        kernel = zip(getattr(module, "kernel_size", ()), getattr(module, "dilation", ()), strict=True)
        groups = getattr(module, "groups", 1)
        channels = weight.shape[0] if transposed else weight.shape[1] * groups
        inputs = drawn(2, channels, *(2 * (size - 1) * gap + 1 for size, gap in kernel))
        others = inputs.clone()
        others[:, :: channels if transposed else weight.shape[1]] += 1
        effects = []
        for _ in range(2):
            twin.weight.copy_(drawn(*weight.shape)).select(0 if transposed else 1, 0).zero_()
            outputs = []
            for x in (inputs, others):
                with torch.random.fork_rng(devices=devices):
                    outputs.append(type(module).forward(twin, x))
            effects.append(outputs[1] - outputs[0])
        scale = float(outputs[0].abs().max())
        return not torch.allclose(effects[0], effects[1], rtol=1e-3, atol=1e-4 * scale)
    except Exception:  # of code that is not ours, that wants other inputs
        return False


def memory(tensor: Tensor) -> int | None:
    """Where the numbers of a tensor, and of its views, are; None for a class of its own, and a sparse layout."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else None
