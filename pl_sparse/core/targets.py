"""Which weights of a model are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from pl_sparse.core.layouts import Layout
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import near_misses

__all__ = ["Patterns", "find", "select"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


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
