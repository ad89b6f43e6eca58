"""What is pruned: the weights of a model, each with its mask, and which weights those are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    head)), "blocks" (of shape `block`: (blocks, weights of a block)), or "rows" (coupled channels: `rows[u]` are the
    outputs, as `below` sees them, that belong to unit u; other outputs may belong to other groups).

    A head is a run of rows; with `columns`, of columns of the tensor as it is kept. `parts` are the shares of query,
    key and value where they are stacked in one tensor: (1, 1, 1), or (4, 1, 1) if four queries share a key.
    """

    kind: str = "plain"
    groups: int = 1
    heads: int = 1
    parts: tuple[int, ...] = (1,)
    columns: bool = False
    block: tuple[int, int] = (1, 1)
    rows: tuple[tuple[int, ...], ...] = ()
    below: Layout | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as (out, in, *kernel), or as (units, rest) for heads and blocks."""
        if self.kind == "plain":
            return tensor
        if self.kind == "rows":
            picked = self._below.view(tensor)[torch.tensor(self.rows, device=tensor.device)]
            return picked.flatten(1, 2) if picked.dim() > 2 else picked
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

    @property
    def _below(self) -> Layout:
        return self.below or Layout()

    def write(self, tensor: Tensor, viewed: Tensor) -> Tensor:
        """The tensor with what this layout sees of it replaced by `viewed`."""
        if self.kind != "rows":
            return self.restore(viewed, tensor.shape)
        seen = self._below.view(tensor).clone()
        index = torch.tensor(self.rows, device=tensor.device)
        seen[index] = viewed.reshape(*index.shape, *seen.shape[1:])
        return self._below.restore(seen, tensor.shape)

    def restore(self, viewed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `view`, for a tensor of the weight's shape; not for "rows", which see a part (`write`)."""
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


@dataclass(frozen=True)
class Cut:
    """What was taken out of a tensor.

    Attributes:
        shape: what its shape was.
        removed: the indices that were removed, ascending, by dimension.

    >>> cut = Cut((2, 3), {1: (0,)})
    >>> cut.take(torch.arange(6).reshape(2, 3)).tolist()
    [[1, 2], [4, 5]]
    >>> cut.fill(torch.tensor([[1, 2], [4, 5]])).tolist()
    [[0, 1, 2], [0, 4, 5]]
    """

    shape: tuple[int, ...]
    removed: Mapping[int, tuple[int, ...]]

    def kept(self, dim: int) -> list[int]:
        """The indices along a dimension that are left."""
        gone = set(self.removed.get(dim, ()))
        return [i for i in range(self.shape[dim]) if i not in gone]

    def take(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor; dimensions of size 1, where that of the cut one was more, are left alone."""
        for dim, gone in self.removed.items():
            if gone and tensor.shape[dim] == self.shape[dim]:
                index = torch.tensor(self.kept(dim), device=tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor

    def fill(self, tensor: Tensor) -> Tensor:
        """A tensor of the former shape, zero (False) where something was removed."""
        for dim, gone in self.removed.items():
            if gone and tensor.shape[dim] == self.shape[dim] - len(gone):
                shape = (*tensor.shape[:dim], self.shape[dim], *tensor.shape[dim + 1 :])
                index = torch.tensor(self.kept(dim), device=tensor.device)
                tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    def then(self, later: Cut) -> Cut:
        """This cut, and a later one of what it left, as one.

        >>> Cut((4,), {0: (1,)}).then(Cut((3,), {0: (0, 1)})).removed
        {0: (0, 1, 2)}
        """
        both = {dim: set(gone) for dim, gone in self.removed.items()}
        for dim, gone in later.removed.items():
            left = self.kept(dim)
            both[dim] = both.get(dim, set()) | {left[i] for i in gone}
        return Cut(self.shape, {dim: tuple(sorted(gone)) for dim, gone in sorted(both.items())})


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
        cut: what shrinking took out of the weight, else None. Scores and masks are compared in the former shape, as
            if it were still there.
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
    cut: Cut | None = None
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
        if not self.pruned:
            return self.numel
        kept = int(torch.count_nonzero(self.mask))
        if self.cut is not None:
            removed = self.cut.removed
            for dim in set(removed) - {0 if self.layout.kind != "transposed" else 1}:
                kept = kept * self.cut.shape[dim] // (self.cut.shape[dim] - len(removed[dim]))
        return kept

    def fill(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape in its former shape."""
        return tensor if self.cut is None else self.cut.fill(tensor)

    def take(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the weight's former shape."""
        return tensor if self.cut is None else self.cut.take(tensor)

    @torch.no_grad()
    def shrink(self, cut: Cut) -> None:
        """Take the same out of all that belongs to the weight as was taken out of the weight itself."""
        self.mask = cut.take(self.mask)
        self._factor = None
        if self.dense is not None:
            self.dense = cut.take(self.dense)
        self.state = {
            key: cut.take(value) if value.dim() == len(cut.shape) else value for key, value in self.state.items()
        }
        self.cut = cut if self.cut is None else self.cut.then(cut)

    @torch.no_grad()
    def unshrink(self) -> None:
        """Take `shrink` back: what was removed is pruned, and zero."""
        if self.cut is not None:
            self.mask = self.cut.fill(self.mask)
            self._factor = None
            left = [n - len(self.cut.removed.get(dim, ())) for dim, n in enumerate(self.cut.shape)]
            self.state = {k: self.cut.fill(v) if list(v.shape) == left else v for k, v in self.state.items()}
            self.cut = None

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
    """Weights whose units are pruned together: one weight, or e.g. all the projections of an attention layer.

    Attributes:
        name: what it is called in messages.
        members: the weights, each with how its units are seen in it.
        followers: what goes with the units without being scored or counted: biases, the scales and shifts of norms.
        feeds: the weights that take the units' outputs; column j of one takes that of unit `units[j]` (-1: of none
            here). What a pruned unit fed has no say in scores.
        reason: why none of the units can be pruned, or None.
    """

    name: str
    members: tuple[tuple[MaskedParameter, Layout], ...]
    followers: tuple[tuple[MaskedParameter, Layout], ...] = ()
    feeds: tuple[tuple[MaskedParameter, Tensor], ...] = ()
    reason: str | None = None

    @property
    def numel(self) -> int:
        return sum(size_of(param, layout).numel() for param, layout in self.members)

    @property
    def shape(self) -> torch.Size:
        """The shape of the first member as (out, in, *kernel)."""
        return size_of(*self.members[0])


def size_of(param: MaskedParameter, layout: Layout) -> torch.Size:
    """The (former) shape of a weight as a layout sees it."""
    return layout.view(torch.empty(param.former, device="meta")).shape


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
