"""Multiply-accumulates (MACs) of a model, dense and under masks, counted on a real forward pass.

Every weight element of a layer is used the same number of times in a forward pass, its *positions*. A layer then
costs positions x elements when dense and positions x kept elements when sparse. Biases, normalisation and
activations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from pl_sparse.network.attention import keeps_inputs_first

__all__ = ["MacCounter", "Macs", "macs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MacCounter:
    """Counts how often each weight is used by the forward passes run inside a `with` block.

    Counted are Linear, Bilinear, (transposed) convolutions, recurrent layers and cells, MultiheadAttention and
    transformers' Conv1D; embeddings look up and count as 0. Weights used outside such a module, or that are
    parametrized, are not seen. Transposed convolutions count the products that padding crops away.

    Attributes:
        positions: uses of each weight element, by parameter name; several calls add up, and a tied parameter has
            its first name in `model.named_parameters()`.
        other: MACs that involve no weight (both attention products of MultiheadAttention).

    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> with MacCounter(model) as counter:
    ...     _ = model(torch.zeros(5, 3, 8))
    >>> counter.positions
    {'0.weight': 15.0}
    """

    _open: ClassVar[int] = 0
    _fastpath: ClassVar[bool] = True  # before the first was opened

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.positions: dict[str, float] = {}
        self.other = 0.0
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> MacCounter:
        # The fused transformer path of eval mode calls no submodule, so no hook would fire.
        if not MacCounter._open:
            MacCounter._fastpath = torch.backends.mha.get_fastpath_enabled()
        MacCounter._open += 1  # several may be open at once, and close in any order
        torch.backends.mha.set_fastpath_enabled(False)
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        try:
            for module in self.model.modules():
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
        name = self._names.get(id(module._parameters.get(weight)))  # reading a parametrized weight may change it
        if name is not None:
            self.positions[name] = self.positions.get(name, 0.0) + uses


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
