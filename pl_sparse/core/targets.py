"""Which weights of a model are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

import torch
from torch import nn

from pl_sparse.core.group import Group
from pl_sparse.core.layouts import InputsFirst, Plain, Whole
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import near_misses

__all__ = ["Patterns", "TargetOptions", "Targets", "find", "select"]

Patterns = Sequence["str | type"]
"""Types (`nn.Conv2d`), names of types ("Conv2d"), or globs on the name of a weight or of its module, in full or from
any dot on ("encoder.*", "fc1", "blocks.0.*.weight")."""

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Whole, bool]]:
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


def _weights(module: nn.Module) -> Iterator[tuple[str, Whole, bool]]:
    if isinstance(module, (nn.Linear, *_CONVS)):
        yield "weight", Plain(), True
    elif isinstance(module, _TRANSPOSED):
        yield "weight", InputsFirst(module.groups), True
    elif isinstance(module, nn.MultiheadAttention):
        for name in _ATTENTION:
            yield name, Plain(), True
    elif isinstance(module, nn.RNNBase):
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                yield name, Plain(), True
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield "weight", Plain(), False
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer keeps (in, out)
        yield "weight", InputsFirst(), True


def _matches(pattern: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    path = name.rpartition(".")[0]
    if any(pattern == cls.__name__ for cls in type(module).__mro__):
        return True
    return any(fnmatchcase(text, p) for text in (name, path) for p in (pattern, f"*.{pattern}", f"{pattern}.*"))


def _refuse_unmatched(what: str, pattern: str | type, weights: Sequence[tuple[str, nn.Module]]) -> None:
    if any(_matches(pattern, name, module) for name, module in weights):
        return
    text = pattern.__name__ if isinstance(pattern, type) else pattern
    names = {name for name, _ in weights} | {name.rpartition(".")[0] for name, _ in weights}
    tails = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in weights} | {type(m).__name__ for _, m in weights}
    close = near_misses(text, (names | tails) - {""})
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
    listed = ", ".join(name for name, _ in weights[:12]) + (", ..." if len(weights) > 12 else "")
    raise ValueError(f"{what} {text!r} matches no prunable weight. {hint} The prunable weights are: {listed}".strip())


def select(model: nn.Module, patterns: Patterns, what: str = "pattern") -> list[str]:
    """The names of the prunable weights that some pattern matches, in the model's order.

    Args:
        what: where the patterns were given, for messages.

    Raises:
        ValueError: a pattern matches nothing.
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

    Raises:
        ValueError: a pattern matches nothing, a weight is not materialised, or nothing is left to prune.
    """
    candidates = list(_candidates(model))
    named = [(name, module) for name, module, *_ in candidates]
    for what, patterns in (("include", include or ()), ("exclude", exclude)):
        if isinstance(patterns, (str, type)):
            raise ValueError(f"{what} must be a list of patterns, got {patterns!r} alone: write [{patterns!r}]")
        for pattern in patterns:
            _refuse_unmatched(what, pattern, named)
    spared = _spared([(name, module) for name, module, _, _, default in candidates if default], first, last)
    params = []
    for name, module, weight, layout, default in candidates:
        wanted = default if include is None else any(_matches(pattern, name, module) for pattern in include)
        if not wanted or name in spared or any(_matches(pattern, name, module) for pattern in exclude):
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


def _spared(weights: Sequence[tuple[str, nn.Module]], first: bool, last: bool) -> set[str]:
    """The names of the first convolution and of the last layer, where these are not to be pruned."""
    convolutions = [name for name, module in weights if isinstance(module, _CONVS + _TRANSPOSED)]
    spared = set() if first else set(convolutions[:1])
    return spared if last or not weights else spared | {weights[-1][0]}


@dataclass(frozen=True)
class Targets:
    """Which weights of a model are pruned, and how sparse single ones become.

    Args:
        include: patterns of the weights to prune; None for all that are pruned by default (see `find`).
        exclude: patterns of weights that stay dense.
        first: whether the first convolution is pruned.
        last: whether the last layer is pruned; None for yes, unless the structure removes whole outputs.
        overrides: sparsities of single weights by pattern. They are outside of the budget that the others share; the
            first pattern that matches counts. Before the schedule ends they are scaled as its level is.
        misfit: "error", or "dense" to leave weights dense whose shape the structure does not divide.

    Raises:
        ValueError: a value that makes no sense.
    """

    include: Patterns | None = None
    exclude: Patterns = ()
    first: bool = True
    last: bool | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    misfit: str = "error"

    def __post_init__(self) -> None:
        if self.misfit not in ("error", "dense"):
            raise ValueError(f"misfit={self.misfit!r} is neither 'error' nor 'dense'")
        for pattern, sparsity in self.overrides.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"overrides: {pattern}={sparsity!r} must be a sparsity in [0, 1]")

    def find(self, model: nn.Module, removes_outputs: bool = False) -> list[MaskedParameter]:
        """The weights to prune, in the model's order.

        Args:
            removes_outputs: whether whole outputs of a layer go, which the last one cannot spare by default.

        Raises:
            ValueError: as the function `find` does.
        """
        last = not removes_outputs if self.last is None else self.last
        return find(model, self.include, self.exclude, self.first, last)

    def overrides_of(self, model: nn.Module, groups: Sequence[Group]) -> tuple[float | None, ...]:
        """The sparsity of each group that has one of its own, else None.

        Raises:
            ValueError: a pattern matches no weight, or none of them is pruned.
        """
        sparsities: dict[str, float] = {}
        for pattern, sparsity in self.overrides.items():
            for name in select(model, [pattern], "overrides"):
                sparsities.setdefault(name, sparsity)
        pruned = {param.name for group in groups for param, _ in group.members}
        if sparsities and not pruned & set(sparsities):
            raise ValueError(f"overrides {list(self.overrides)} match no weight that is pruned: {', '.join(pruned)}")
        members = [[param.name for param, _ in group.members] for group in groups]
        return tuple(next((sparsities[name] for name in names if name in sparsities), None) for names in members)


class TargetOptions(TypedDict, total=False):
    """The arguments of `Targets`, where a function takes them by keyword."""

    include: Patterns | None
    exclude: Patterns
    first: bool
    last: bool | None
    overrides: Mapping[str, float]
    misfit: Literal["error", "dense"]
