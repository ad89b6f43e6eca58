"""Every parameter of a model that may be pruned, how it is seen, and why one is not pruned by default."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pl_sparse.core.layouts import InputsFirst, Matrices, Plain, Unoriented, Whole
from pl_sparse.core.parametrized import is_parametrization, underlying
from pl_sparse.core.upstream import CHANNEL_NORMS, plain_name
from pl_sparse.core.used import used

__all__ = ["CONVOLUTIONS", "LAYOUTS", "Candidate", "candidates"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (*CHANNEL_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_TABLES = (nn.Embedding, nn.EmbeddingBag)

CONVOLUTIONS = _CONVS + _TRANSPOSED

LAYOUTS: Mapping[str, Whole] = {
    "out_in": Matrices(),
    "in_out": Matrices(inputs_first=True),
    "out_in_kernel": Plain(),
    "in_out_kernel": InputsFirst(),
}
"""Layouts by the name that they are declared with. Dimensions before those named are batches, such as experts."""

_TABLE_WORDS = {
    *("anchor", "anchors", "cls", "codebook", "codevectors", "emb", "embed", "embedding", "embeddings", "embeds"),
    *("latent", "latents", "pe", "pos", "position", "positional", "positions", "prompt", "prompts", "table", "token"),
    *("tokens", "wpe", "wte"),
}
_SCALE_WORDS = {"gain", "gamma", "beta", "log", "norm", "scale", "scales", "slope", "slopes", "temperature"}


@dataclass
class Candidate:
    """A parameter with two or more dimensions.

    Attributes:
        name: the first name of the parameter in `model.named_parameters()`.
        module: the layer that it is a weight of.
        weight: the parameter.
        layout: how it is seen as (out, in, *kernel).
        role: what it is, if not a weight of a sum of products; else None. Such a parameter stays dense by default.
        refusal: why it cannot be pruned, or None.
        unmade: whether it has no values yet.
        norm_dim: as in `Underlying`.
        names: all names that it is found by, with the module of each: of tied weights, and of a parametrized weight.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    layout: Whole
    role: str | None = None
    refusal: str | None = None
    unmade: bool = False
    norm_dim: int | None = None
    names: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return 0 if isinstance(self.weight, nn.UninitializedParameter) else self.weight.numel()


def candidates(model: nn.Module) -> list[Candidate]:
    """Every parameter with two or more dimensions, in the model's order, tied ones once. The model is not called."""
    by_weight: dict[int, Candidate] = {}
    for path, module in _modules(model, "", ()):
        for candidate in _of_module(path, module):
            first = by_weight.setdefault(id(candidate.weight), candidate)
            if first is not candidate:
                first.names += candidate.names
    return list(by_weight.values())


def _modules(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    """All modules by each of their paths; one that holds itself ends there."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _modules(child, f"{path}.{name}" if path else name, (*above, module))


def _of_module(path: str, module: nn.Module) -> Iterator[Candidate]:
    """The candidates that a module holds itself, and those that its weights are computed from."""
    if is_parametrization(module):
        return
    prefix = f"{path}." if path else ""
    layouts = dict(_layouts(module))
    scripted = isinstance(module, torch.jit.ScriptModule)
    computed: set[str] = set()
    for tensor in () if scripted else underlying(module):
        computed.add(tensor.name)
        layout = layouts.get(tensor.weight) or _layout(module, tensor.parameter)
        if tensor.reason is not None and _is_scale(tensor.parameter.shape):
            role: str | None = "a scale"
        else:
            role = None if tensor.weight in layouts else _role(module, tensor.weight, tensor.parameter, path)
        candidate = _candidate(prefix + tensor.name, module, tensor.parameter, layout, role)
        candidate.refusal = candidate.refusal or tensor.reason
        candidate.norm_dim = tensor.norm_dim
        candidate.names.append((plain_name(prefix + tensor.weight), module))
        yield candidate
    for short, weight in module.named_parameters(recurse=False):
        unmade = isinstance(weight, nn.UninitializedParameter)
        if short in computed or not (unmade or weight.dim() > 1) or (unmade and short.startswith("bias")):
            continue
        known = short in layouts
        layout = layouts[short] if known else Plain() if unmade else _layout(module, weight)
        role = None if known else _role(module, short, weight, path)
        candidate = _candidate(prefix + short, module, weight, layout, role)
        if scripted:
            candidate.refusal = "it is part of a scripted module"
        elif role is None and candidate.refusal is None and not unmade:
            candidate.refusal, candidate.norm_dim = used(module, short)
        yield candidate


def _candidate(name: str, module: nn.Module, weight: nn.Parameter, layout: Whole, role: str | None) -> Candidate:
    name = plain_name(name)
    candidate = Candidate(name, module, weight, layout, role, names=[(name, module)])
    candidate.unmade = isinstance(weight, nn.UninitializedParameter) or weight.is_meta
    if not weight.is_floating_point():
        candidate.refusal = f"it is {weight.dtype}: only floating-point weights are pruned"
    elif weight.layout != torch.strided:
        candidate.refusal = f"it is {weight.layout}: what is stored of it alone are the weights that it has"
    elif not candidate.unmade and not weight.numel():
        candidate.refusal = "it has no elements"
    elif weight.dtype.itemsize < 2:
        candidate.refusal = f"it is {weight.dtype}, which is not computed with"
    elif not type(weight.data).__module__.startswith("torch.") and type(weight.data) is not Tensor:
        candidate.refusal = f"it is a {type(weight.data).__name__}, whose elements cannot be set to zero"
    return candidate


def _layouts(module: nn.Module) -> Iterator[tuple[str, Whole]]:
    """The weights of classes whose layout is known."""
    if isinstance(module, (nn.Linear, nn.Bilinear, *_CONVS)):
        yield "weight", Plain()
    elif isinstance(module, _TRANSPOSED):
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        yield "weight", Plain() if depthwise else InputsFirst(module.groups)
    elif isinstance(module, nn.MultiheadAttention):
        for name in _ATTENTION:
            yield name, Plain()
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        for name in [*module._parameters, *getattr(module, "parametrizations", ())]:
            if name.startswith("weight_"):
                yield name, Plain()
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer keeps (in, out)
        yield "weight", InputsFirst()


def _layout(module: nn.Module, weight: Tensor) -> Whole:
    """The layout of a weight of an unknown class, where the sizes that the module declares leave no doubt of it."""
    for kind in ("features", "channels", "dim"):
        sizes = getattr(module, f"out_{kind}", None), getattr(module, f"in_{kind}", None)
        if weight.dim() == 2 and all(isinstance(size, int) for size in sizes):
            if tuple(weight.shape) == sizes and (sizes[0] != sizes[1] or "Linear" in type(module).__name__):
                return Plain()
            if tuple(weight.shape) == sizes[::-1] and sizes[0] != sizes[1]:
                return InputsFirst()
    return Unoriented()


def _role(module: nn.Module, short: str, weight: Tensor, path: str) -> str | None:
    """What a parameter of no known class is, if it is not a weight of a sum of products.

    The class decides, else the shape, else the name.
    """
    kind = type(module).__name__
    if isinstance(module, _TABLES) or "Embedding" in kind:
        return "a look-up table"
    if isinstance(module, _NORMS) or "Norm" in kind:
        return "a scale of a norm"
    if isinstance(weight, nn.UninitializedParameter):
        return None
    if weight.shape[0] == 1:
        return "a token, a position or a scale: its first dimension is 1"
    if weight.dim() > 2 and _is_scale(weight.shape):
        return "a scale"
    name = path.rpartition(".")[2] if short.isdigit() else short  # a ParameterList numbers its parameters
    words = set(re.findall(r"[a-z]+", name.lower()))
    if words & {"bias", "biases"}:
        return "a bias"
    if words & _TABLE_WORDS:
        return "a look-up table, a position or a token"
    return "a scale" if words & _SCALE_WORDS and not words & {"weight", "weights"} else None


def _is_scale(shape: torch.Size) -> bool:
    """Whether a tensor has elements along one dimension alone, to be broadcast along the others."""
    return sum(size > 1 for size in shape) < 2
