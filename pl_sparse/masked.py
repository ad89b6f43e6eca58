"""What is pruned: the weights of a model, each with its mask, and which weights those are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pl_sparse.naming import near_misses

if TYPE_CHECKING:
    from pl_sparse.gate import Gate

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layout:
    """How a weight is seen as (out, in, *kernel), and back.

    `kind` is "plain" (Linear, Conv, LSTM: already so), "transposed" (ConvTranspose: (in, out / groups, *kernel) per
    group; and layers that keep (in, out), such as the Conv1D of GPT-2), "heads" (attention: (heads, weights of a
    head)), or "blocks" (of shape `block`: (blocks, weights of a block)).

    A head is a run of rows; with `columns`, of columns of the tensor as it is kept. `parts` are the shares of query,
    key and value where they are stacked in one tensor: (1, 1, 1), or (4, 1, 1) if four queries share a key.
    """

    kind: str = "plain"
    groups: int = 1
    heads: int = 1
    parts: tuple[int, ...] = (1,)
    columns: bool = False
    block: tuple[int, int] = (1, 1)

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as (out, in, *kernel), or as (units, rest) for heads and blocks."""
        if self.kind == "plain":
            return tensor
        if self.kind == "transposed":
            split = tensor.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return split.flatten(0, 1)
        if self.kind == "blocks":
            h, w = self.block
            return tensor.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2).flatten(2).flatten(0, 1)
        rows = tensor.t() if self.columns else tensor
        if self.parts == (1,):
            return rows.unflatten(0, (self.heads, -1)).flatten(1)
        runs = rows.split([len(rows) // sum(self.parts) * part for part in self.parts])
        return torch.cat([run.unflatten(0, (self.heads, -1)) for run in runs], dim=1).flatten(1)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `view`, for a tensor of the weight's shape."""
        if self.kind == "plain":
            return viewed.reshape(shape)
        if self.kind == "transposed":
            split = viewed.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return split.reshape(shape)
        if self.kind == "blocks":
            h, w = self.block
            return viewed.reshape(shape[0] // h, shape[1] // w, h, w).transpose(1, 2).reshape(shape)
        total, inner = (shape[1], shape[0]) if self.columns else (shape[0], shape[1])
        runs = viewed.reshape(self.heads, -1, inner)
        if self.parts != (1,):
            each = total // self.heads // sum(self.parts)
            rows = torch.cat([run.flatten(0, 1) for run in runs.split([each * part for part in self.parts], dim=1)])
        else:
            rows = runs.flatten(0, 1)
        return rows.t() if self.columns else rows


@dataclass(eq=False)
class MaskedParameter:
    """One prunable weight and its mask. What methods share about a weight lives here, never in the configuration.

    Attributes:
        name: the first name of the weight in `model.named_parameters()`.
        module: the module that holds it.
        weight: the parameter; between optimizer steps it *is* `mask * values`.
        mask: bool, the weight's shape, True = kept.
        dense: the values behind the mask, for methods that remember pruned weights (latent weights), else None.
        gate: what is learned of its units, shared with the other weights of its group, else None.
        state: what the scorer gathers, tensors by name.
        layout: how the weight is seen as (out, in, *kernel).
        pruned: whether the mask was ever set; until then it is all True and masking has nothing to do.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    mask: Tensor
    dense: Tensor | None = None
    gate: Gate | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    pruned: bool = False
    _factor: Tensor | None = field(default=None, repr=False)

    @property
    def values(self) -> Tensor:
        """The values a score is taken of: the latent ones where there are any, else the weight itself."""
        return self.weight.detach() if self.dense is None else self.dense

    @property
    def grad(self) -> Tensor | None:
        """dL/d(masked weight), for pruned positions too; None when the weight took no part in the loss."""
        return self.weight.grad

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def kept(self) -> int:
        """How many weights the mask keeps (reads the mask: a host synchronisation on a GPU)."""
        return int(torch.count_nonzero(self.mask)) if self.pruned else self.numel

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Write a new mask in place, so that nothing compiled against the old one is invalid."""
        self.mask.copy_(mask)
        self.pruned = True
        if self._factor is not None:
            self._factor.copy_(self.mask)

    @property
    def factor(self) -> Tensor:
        """The mask as numbers of the weight's type, to multiply with: a bool makes that five times slower on a CPU."""
        if self._factor is None or self._factor.dtype != self.weight.dtype:
            self._factor = self.mask.to(self.weight.dtype)
        return self._factor

    @torch.no_grad()
    def to_weight(self) -> None:
        """Move all that belongs to the weight to its device."""
        device = self.weight.device
        if self.mask.device != device:
            self.mask = self.mask.to(device)
            self._factor = None
        if self.dense is not None:
            self.dense = self.dense.to(device)
        if self.gate is not None:
            self.gate.to(device)
        self.state = {key: value.to(device) for key, value in self.state.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that must survive a checkpoint, by name."""
        named = {"mask": self.mask, **{f"state.{key}": value for key, value in self.state.items()}}
        if self.dense is not None:
            named["dense"] = self.dense
        if self.gate is not None and self.gate.last(self):
            named |= {f"gate.{key}": value for key, value in self.gate.tensors().items()}
        return named


@dataclass(frozen=True, eq=False)
class Group:
    """Weights whose units are pruned together: one weight, or e.g. all the projections of an attention layer."""

    name: str
    members: tuple[tuple[MaskedParameter, Layout], ...]

    @property
    def numel(self) -> int:
        return sum(param.numel for param, _ in self.members)

    @property
    def shape(self) -> torch.Size:
        """The shape of the first member as (out, in, *kernel)."""
        param, layout = self.members[0]
        return layout.view(torch.empty(param.shape, device="meta")).shape


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Layout, bool]]:
    """Every weight that could be pruned: name, module, parameter, layout, and whether it is pruned by default."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for short, layout, default in _weights(module):
            weight = getattr(module, short, None)
            if not isinstance(weight, nn.Parameter) or id(weight) in seen:
                continue
            seen.add(id(weight))
            name = f"{path}.{short}" if path else short
            yield name.replace("_orig_mod.", ""), module, weight, layout, default  # torch.compile adds a level


def _weights(module: nn.Module) -> Iterator[tuple[str, Layout, bool]]:
    if isinstance(module, (nn.Linear, *_CONVS)):
        yield "weight", Layout(), True
    elif isinstance(module, _TRANSPOSED):
        yield "weight", Layout("transposed", groups=module.groups), True
    elif isinstance(module, nn.MultiheadAttention):
        for name in _ATTENTION:
            yield name, Layout(), True
    elif isinstance(module, nn.RNNBase):
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                yield name, Layout(), True
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield "weight", Layout(), False
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer keeps (in, out)
        yield "weight", Layout("transposed"), True


def _matches(pattern: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    path = name.rpartition(".")[0]
    if any(pattern == cls.__name__ for cls in type(module).__mro__):
        return True
    return any(fnmatchcase(text, p) for text in (name, path) for p in (pattern, f"*.{pattern}", f"{pattern}.*"))


def _refuse_unmatched(what: str, pattern: str | type, found: Sequence[tuple[str, nn.Module]]) -> None:
    if any(_matches(pattern, name, module) for name, module in found):
        return
    text = pattern.__name__ if isinstance(pattern, type) else pattern
    known = {name for name, _ in found} | {name.rpartition(".")[0] for name, _ in found}
    tails = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in found} | {type(m).__name__ for _, m in found}
    close = near_misses(text, (known | tails) - {""})
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
    names = ", ".join(name for name, _ in found[:12]) + (", ..." if len(found) > 12 else "")
    raise ValueError(f"{what} {text!r} matches no prunable weight. {hint} The prunable weights are: {names}".strip())


Patterns = Sequence["str | type"]


def select(model: nn.Module, patterns: Patterns, what: str = "pattern") -> list[str]:
    """The names of the prunable weights that some pattern matches, in the model's order.

    Raises:
        ValueError: a pattern matches nothing; `what` says in the message where it was given.
    """
    named = [(name, module) for name, module, *_ in _candidates(model)]
    for pattern in patterns:
        _refuse_unmatched(what, pattern, named)
    return [name for name, module in named if any(_matches(pattern, name, module) for pattern in patterns)]


def find(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns = (),
    first: bool = True,
    last: bool = True,
) -> list[MaskedParameter]:
    """The weights to prune, in the model's order, tied weights once, each with a mask of ones.

    Linear, Conv and ConvTranspose weights, attention projections and recurrent weights are pruned; biases and norms
    never; embeddings only when `include` names them.

    Args:
        include: patterns; only what one of them matches is pruned. None: all weights that are pruned by default.
        exclude: patterns; what one of them matches stays dense.
        first: whether the first convolution (of a model that has any) is pruned.
        last: whether the last prunable layer (the classifier, as a rule) is pruned.

    A pattern is a type (`nn.Conv2d`), the name of a type ("Conv2d"), or a glob on the name of the weight or of its
    module, in full or from any dot on ("encoder.*", "fc1", "blocks.0.*.weight").

    Raises:
        ValueError: a pattern matches nothing, a weight is not materialised, or nothing is left to prune.
    """
    found = list(_candidates(model))
    named = [(name, module) for name, module, *_ in found]
    for what, patterns in (("include", include or ()), ("exclude", exclude)):
        if isinstance(patterns, (str, type)):
            raise ValueError(f"{what} must be a list of patterns, got {patterns!r} alone: write [{patterns!r}]")
        for pattern in patterns:
            _refuse_unmatched(what, pattern, named)
    chosen = []
    for name, module, weight, layout, default in found:
        wanted = default if include is None else any(_matches(pattern, name, module) for pattern in include)
        if wanted and not any(_matches(pattern, name, module) for pattern in exclude):
            chosen.append((name, module, weight, layout))
    ordinary = [(name, module) for name, module, _, _, default in found if default]
    spared = set()
    if not first:
        spared |= {name for name, module in ordinary if isinstance(module, _CONVS + _TRANSPOSED)} and {
            next(name for name, module in ordinary if isinstance(module, _CONVS + _TRANSPOSED))
        }
    if not last and ordinary:
        spared.add(ordinary[-1][0])
    params = []
    for name, module, weight, layout in chosen:
        if name in spared:
            continue
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(f"{name} is a lazy parameter without a shape yet: run one batch through the model first")
        if not weight.is_floating_point():
            raise ValueError(f"{name} is {weight.dtype}: only floating-point weights are pruned. Add it to `exclude`")
        mask = torch.ones_like(weight, dtype=torch.bool, requires_grad=False)
        params.append(MaskedParameter(name, module, weight, mask, layout=layout))
    if not params:
        raise ValueError(
            "nothing to prune: "
            + (
                "include, exclude, first and last leave none of " + ", ".join(name for name, _ in named)
                if named
                else f"{type(model).__name__} has no Linear, convolution, attention or recurrent weight"
            )
        )
    return params
