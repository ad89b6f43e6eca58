"""Multiply-accumulates (MACs) of a model, dense and under masks, counted on a real forward pass.

Every weight element of a layer is used the same number of times in a forward pass, its *positions*. A layer then
costs positions x elements when dense and positions x kept elements when sparse. Biases, normalisation and
activations are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pl_sparse.core.parametrized import behind, is_computed
from pl_sparse.network.attention import keeps_inputs_first
from pl_sparse.network.hooks import called, evaluated

__all__ = ["MacCounter", "Macs", "counted", "macs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_COUNTED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED)


class MacCounter:
    """Counts how often each weight is used by the forward passes run inside a `with` block.

    Counted are Linear, Bilinear, (transposed) convolutions, recurrent layers and cells, MultiheadAttention and
    transformers' Conv1D, and matrix products of other modules: of attention, or with weights of their own. Embeddings
    look up and count as 0. A weight that is computed counts as the parameter of its size that it is computed from, or
    as none. Weights used otherwise outside such a module are not seen.
    Transposed convolutions count the products that padding crops away.

    Args:
        model: that is called within the block.
        watch: a mode that its calls are made in, too.

    Attributes:
        positions: uses of each weight element, by parameter name; several calls add up, and a tied parameter has
            its first name in `model.named_parameters()`.
        other: MACs that involve no weight (both products of attention).

    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> with MacCounter(model) as counter:
    ...     _ = model(torch.zeros(5, 3, 8))
    >>> counter.positions
    {'0.weight': 15.0}
    """

    _open: ClassVar[int] = 0
    _fastpath: ClassVar[bool] = True  # before the first was opened

    def __init__(self, model: nn.Module, watch: TorchFunctionMode | None = None) -> None:
        self.model = model
        self._watch: AbstractContextManager[Any] = watch or nullcontext()
        self.positions: dict[str, float] = {}
        self.other = 0.0
        self._names: dict[int, str] = {}
        self._paths: dict[nn.Module, str] = {}
        self._handles: list[RemovableHandle] = []
        self._depth = 0  # of modules within modules, in a call
        self._whole = 0  # of those that are counted whole, products within them included
        self._products = _Products(self._count_product)

    def __enter__(self) -> MacCounter:
        # The fused transformer path of eval mode calls no submodule, so no hook would fire.
        if not MacCounter._open:
            MacCounter._fastpath = torch.backends.mha.get_fastpath_enabled()
        MacCounter._open += 1  # several may be open at once, and close in any order
        torch.backends.mha.set_fastpath_enabled(False)
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._paths = {module: f"{path}." if path else "" for path, module in self.model.named_modules()}
        try:
            for module in self.model.modules():
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
                self._handles.append(module.register_forward_hook(self._count, with_kwargs=True))
        except BaseException:  # a scripted module takes no hook
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        MacCounter._open -= 1
        if not MacCounter._open:
            torch.backends.mha.set_fastpath_enabled(MacCounter._fastpath)

    def _enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: within a call of the model matrix products are seen."""
        if not self._depth:
            self._products.__enter__()  # type: ignore[no-untyped-call]
            self._watch.__enter__()
        self._depth += 1
        for name, parameter in module._parameters.items():  # FSDP has gathered ones there by now
            if parameter is not None:
                self._names.setdefault(id(parameter), f"{self._paths[module]}{name}")
        self._whole += isinstance(module, _COUNTED) or keeps_inputs_first(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, after errors too."""
        self._whole -= isinstance(module, _COUNTED) or keeps_inputs_first(module)
        self._depth -= 1
        if not self._depth:
            self._watch.__exit__(None, None, None)
            self._products.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _count_product(self, operands: tuple[Tensor, ...], products: float) -> None:
        """Add a matrix product: to the uses of the weight that has part in it, or to those that involve none."""
        if self._whole:
            return
        for tensor in operands:
            whole = tensor if tensor._base is None else tensor._base
            name = self._names.get(id(whole))
            if name is not None:
                self.positions[name] = self.positions.get(name, 0.0) + products / whole.numel()
                return
        self.other += products

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: add the uses of one call of `module`."""
        if isinstance(module, nn.MultiheadAttention):
            self._count_attention(module, **dict(zip(("query", "key", "value"), args, strict=False)) | kwargs)
            return
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            self._add(module, "weight", 0.0)
        elif isinstance(module, nn.RNNBase):
            sequence: Tensor = first.data if isinstance(first, PackedSequence) else first
            self._add_recurrent(module, sequence.numel() / module.input_size)
        elif isinstance(module, nn.RNNCellBase):
            self._add_recurrent(module, first.numel() / module.input_size)
        elif isinstance(module, _TRANSPOSED):
            self._add(module, "weight", first.numel() / module.in_channels)
        elif isinstance(module, _CONVOLUTIONS):
            self._add(module, "weight", output.numel() / module.out_channels)
        elif isinstance(module, (nn.Linear, nn.Bilinear)):
            self._add(module, "weight", output.numel() / module.out_features)
        elif keeps_inputs_first(module):
            self._add(module, "weight", output.numel() / output.shape[-1])

    def _count_attention(
        self, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **_: object
    ) -> None:
        """Add the projections and both products of one attention call; shapes (L, B, E), (B, L, E) or (L, E)."""
        queries = query.numel() / module.embed_dim
        keys, values = key.numel() / module.kdim, value.numel() / module.vdim
        if module.in_proj_weight is not None:
            self._add(module, "in_proj_weight", (queries + keys + values) / 3)
        else:
            self._add(module, "q_proj_weight", queries)
            self._add(module, "k_proj_weight", keys)
            self._add(module, "v_proj_weight", values)
        self._add(module.out_proj, "weight", queries)

        batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
        if batch:
            attended = keys / batch + (module.bias_k is not None) + bool(module.add_zero_attn)
            self.other += 2 * queries * attended * module.num_heads * module.head_dim

    def _add_recurrent(self, module: nn.Module, steps: float) -> None:
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                self._add(module, name, steps)

    def _add(self, module: nn.Module, weight: str, uses: float) -> None:
        parameter = behind(module, weight)  # reading a parametrized weight may change it
        name = self._names.get(id(parameter))
        whole = _elements(module) if is_computed(module, weight) else None
        if whole is not None and parameter is not None and parameter.numel() != whole:
            self.other += uses * whole
        elif name is not None:
            self.positions[name] = self.positions.get(name, 0.0) + uses


def _elements(module: nn.Module) -> int | None:
    """How many elements the weight of a layer has, by its attributes; None of a kind that has several."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return module.in_channels * module.out_channels // module.groups * math.prod(module.kernel_size)
    return None


class _Products(TorchFunctionMode):
    """Within the block sees products of matrices: matmul, bmm, einsum and attention, called as functions or methods."""

    _PLAIN: ClassVar[set[Any]] = {
        *(torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm),
    }

    def __init__(self, note: Callable[[tuple[Tensor, ...], float], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in self._PLAIN:
            a, b = [*args, *kwargs.values()][:2]
            self._note((a, b), out.numel() * a.shape[-1])
        elif func in (torch.baddbmm, Tensor.baddbmm):
            a, b = [*args, *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs)][1:3]
            self._note((a, b), out.numel() * a.shape[-1])
        elif func is F.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)][:3]
            self._note((), query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
        elif func is torch.einsum and len(args) == 3 and "." not in args[0]:
            sides = args[0].replace(" ", "").partition("->")[0].split(",")
            sizes = {i: n for side, x in zip(sides, args[1:], strict=True) for i, n in zip(side, x.shape, strict=True)}
            self._note(args[1:], math.prod(sizes.values()))
        return out


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one sample's forward pass.

    Attributes:
        dense: with every weight.
        sparse: with the kept weights only.
        layers: (dense, sparse) by parameter name, without the products that involve no weight.
    """

    dense: float
    sparse: float
    layers: dict[str, tuple[float, float]]


def macs(
    model: nn.Module,
    counter: MacCounter,
    masks: Mapping[str, Tensor] | None = None,
    batch_size: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> Macs:
    """MACs per sample, from the uses `counter` saw in a pass over `batch_size` samples.

    Args:
        model: the model that `counter` watched.
        counter: after the pass.
        masks: non-zero where a weight is kept, in the weight's shape, by parameter name (any name of a tied one);
            a parameter without a mask is dense.
        batch_size: samples of the pass.
        sizes: how many elements parameters had that channels were removed from since, by name.

    Raises:
        ValueError: a mask names no parameter or differs from it in shape, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept: dict[int, int] = {}
    for name, mask in (masks or {}).items():
        if name not in parameters:
            raise ValueError(f"mask {name!r} names no parameter of the model")
        if mask.shape != parameters[name].shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, not {tuple(parameters[name].shape)}")
        kept[id(parameters[name])] = int(torch.count_nonzero(mask))

    layers = {}
    for name, positions in counter.positions.items():
        size = parameters[name].numel()
        uses = positions / batch_size
        layers[name] = (uses * (sizes or {}).get(name, size), uses * kept.get(id(parameters[name]), size))
    other = counter.other / batch_size
    return Macs(
        dense=other + sum(dense for dense, _ in layers.values()),
        sparse=other + sum(sparse for _, sparse in layers.values()),
        layers=layers,
    )


@torch.no_grad()
def counted(model: nn.Module, example: Any, batch_size: int = 1) -> Macs:
    """MACs per sample of a call in evaluation mode, without masks.

    Args:
        example: inputs of `batch_size` samples: a tensor, a tuple of arguments or a dict of keywords.
    """
    with evaluated(model), MacCounter(model) as counter:
        called(model, example)
    return macs(model, counter, batch_size=batch_size)
