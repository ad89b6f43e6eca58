"""Which attention heads can go, alone or with those of other layers, and what else in the model is theirs alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import always_with_gradients
from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.channels import short
from pl_sparse.network.hooks import called, hooked
from pl_sparse.surgery.heads import head_indices
from pl_sparse.surgery.plan import Indices, RemovalPlan, named_tensors
from pl_sparse.surgery.trial import heads_hold, on_trial, randomized

__all__ = ["UNFOLLOWED", "Stack", "head_plan", "read_alone", "stacks", "stacks_hold", "together", "without"]

UNFOLLOWED = "without it the outputs would be others: its channels cannot be followed"

Heads = Mapping[str, Sequence[int]]
"""Heads that go, by the path of the attention layer."""


@dataclass(frozen=True)
class Stack:
    """Attention layers whose heads go together, and what goes with them.

    Attributes:
        heads: those that go, by layer.
        numbers: which numbers in the layers follow: "counts" of heads, "widths" of all heads together.
        read: whether what these heads read alone goes too: biases by relative position, temperatures, projections of
            positions.
        reason: why they cannot go, or None.
    """

    heads: Heads
    numbers: tuple[str, ...] = ()
    read: bool = False
    reason: str | None = None


def head_plan(model: nn.Module, example: Any, found: Sequence[Stack], read: Indices | None = None) -> RemovalPlan:
    """The plan that takes the heads of stacks out of a model.

    Args:
        read: what these heads read alone; None: it is looked for.
    """
    heads = {path: of for stack in found for path, of in stack.heads.items()}
    numbers = {path: stack.numbers for stack in found for path in stack.heads}
    readers = {path: of for stack in found if stack.read for path, of in stack.heads.items()}
    if readers and read is None:
        read = read_alone(model, example, readers)
    return RemovalPlan.of(model, [], heads, numbers, read if readers else None)


def stacks_hold(
    model: nn.Module, example: Any, found: Sequence[Stack], errors: list[Exception], read: Indices | None = None
) -> bool:
    """Whether the heads of stacks can be taken out of a model without a change of the outputs, as a trial shows.

    Args:
        errors: gets the error of a model that cannot be called without them.
        read: as in `head_plan`.
    """
    layers = _layers(model)
    heads = [(layers[path], list(of)) for stack in found for path, of in stack.heads.items()]
    return heads_hold(model, example, heads, head_plan(model, example, found, read), errors)


def stacks(model: nn.Module, example: Any, heads: Heads) -> list[Stack]:
    """Heads that go, in stacks: each layer alone where a trial shows that it can lose them, else with those like it.

    Layers are alike if their paths differ in numbers alone, and they have as many heads. Those that share a table of
    heads (the biases of T5) lose the same heads or none.

    Args:
        heads: those that are masked, by layer.
    """
    layers, alike = _layers(model), defaultdict(list)
    for path in heads:
        alike[_kind(layers[path])].append(path)
    return [stack for paths in alike.values() for stack in _stacks_of(model, example, {p: heads[p] for p in paths})]


def _stacks_of(model: nn.Module, example: Any, heads: Heads) -> list[Stack]:
    """The same of layers that are alike."""
    (first, gone), *others = heads.items()
    alone = [_fitted(model, example, {first: gone})]
    if alone[0].reason is not None and all(set(of) == set(gone) for _, of in others) and others:
        joint = _fitted(model, example, heads)
        if joint.reason is None:
            return [joint]
    alone += [_fitted(model, example, {path: of}) for path, of in others]
    found = [stack for stack in alone if stack.reason is None]
    failed = [stack for stack in alone if stack.reason is not None]
    left = {path: of for stack in failed for path, of in stack.heads.items()}
    common = set.intersection(*map(set, left.values())) if left else set()
    if len(failed) < 2 or not common:
        return [*found, *failed]
    joint = _fitted(model, example, dict.fromkeys(left, sorted(common)))
    if joint.reason is not None:
        return [*found, *failed]
    rest = {path: [head for head in of if head not in common] for path, of in left.items()}
    reason = (
        f"it and {len(left) - 1} layers like it lose the same heads or none, and these are not masked in all of them"
    )
    return [*found, joint, *(Stack({path: of}, reason=reason) for path, of in rest.items() if of)]


def together(model: nn.Module, example: Any) -> list[list[str]]:
    """The attention layers that lose heads only together, as trials show, by path; the model is left as it is.

    Of layers that are alike the first is tried alone, then all of them.

    Args:
        example: inputs, as the model is called with; if it cannot be called with them, nothing is known.
    """
    alike = defaultdict(list)
    for path, layer in _layers(model).items():
        if layer.heads > 1 and not isinstance(model.get_submodule(path), nn.MultiheadAttention):
            alike[_kind(layer)].append(path)
    several = [paths for paths in alike.values() if len(paths) > 1]
    if not several or not _is_called(model, example):
        return []
    return [
        paths
        for paths in several
        if _fitted(model, example, {paths[0]: [1]}).reason is not None
        and _fitted(model, example, {path: [1] for path in paths}).reason is None
    ]


def _is_called(model: nn.Module, example: Any) -> bool:
    """Whether the model can be called with the example."""
    try:
        with on_trial(model):
            called(model, example)
    except Exception:
        return False
    return True


def read_alone(model: nn.Module, example: Any, heads: Heads) -> Indices:
    """What some heads read and no others do, in tensors that are not the weights of their layers.

    The gradients of what comes out of heads say what each of them reads. The weights are random, and nothing passes
    the output layers of attention, so that no layer reads what another has made.

    Args:
        heads: by layer.

    Returns:
        The indices, by the name of a tensor and dimension; nothing if the model has no such gradients.
    """
    layers = {
        path: layer
        for path, layer in _layers(model).items()
        if not isinstance(model.get_submodule(path), nn.MultiheadAttention)
    }
    outputs = {layer.weights[-1][0]: path for path, layer in layers.items()}
    seen: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((outputs[module], args[0] if args else next(iter(kwargs.values()))))

    try:
        with on_trial(model):
            weights = randomized(model)
            for output in outputs:
                weight = output.get_parameter("weight")
                weights.silence(weight, 0, range(len(weight)))
            tensors = dict(_candidates(model, [layers[path] for path in heads]))
            for tensor in tensors.values():
                tensor.requires_grad_(True)
            with weights, torch.enable_grad(), always_with_gradients(), hooked(outputs, pre=note):
                called(model, example)
                mine, others = _signals(seen, layers, heads)
                touched = [_gradients(signal, tensors) for signal in (mine, others)]
    except Exception:  # whatever does not work with gradients
        return {}
    found: Indices = {}
    for name, mine, others in zip(tensors, *touched, strict=True):
        of = [path for path in heads if _is_inside(name, path)] or list(heads)
        runs = [(layers[path].heads, heads[path]) for path in of]
        for dim in range(mine.dim()):
            places = _places(_along(mine, dim), _along(others, dim), runs)
            if places:
                found.setdefault(name, {})[dim] = places
    return found


def _layers(model: nn.Module) -> dict[str, Attention]:
    """The attention layers whose heads are known, by path."""
    return {each.path: each for each in attentions(model) if isinstance(each, Attention)}


def _kind(layer: Attention) -> tuple[str, int]:
    return re.sub(r"\d+", "*", layer.path), layer.heads


def _fitted(model: nn.Module, example: Any, heads: Heads) -> Stack:
    """The stack of these heads with what a trial shows to go with them, or the reason why they stay.

    Some kinds of attention read their number of heads off the weights, others have it as an attribute, or in tables.
    """
    stack, errors = Stack(heads), list[Exception]()
    modules = [model.get_submodule(path) for path in heads]
    of_torch = all(isinstance(module, nn.MultiheadAttention) for module in modules)
    follow = (("counts",), (), ("counts", "widths"))
    read: Indices | None = None
    for reads, numbers in product((False, True), follow) if not of_torch else [(False, ())]:
        if reads and read is None:
            read = read_alone(model, example, heads)
        if reads and not read:
            break
        errors.clear()
        stack = replace(stack, numbers=numbers, read=reads)
        if stacks_hold(model, example, [stack], errors, read):
            return stack
    return replace(stack, reason=without(errors))


def without(errors: Sequence[Exception]) -> str:
    """Why heads stay without which a model cannot be called, or returns something else."""
    return f"without it the model cannot be called: {short(errors[0])}" if errors else UNFOLLOWED


def _candidates(model: nn.Module, layers: Sequence[Attention]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that heads may have a part of: within their layers, or with as many indices as heads."""
    weights = {id(layer.get_parameter(name)) for each in layers for layer, name, _ in each.weights}
    biases = {id(getattr(layer, "bias", None)) for each in layers for layer, _, _ in each.weights}
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point() and id(tensor) not in weights | biases:
            for each in layers:
                if any(
                    size % each.heads == 0 if _is_inside(name, each.path) else size == each.heads
                    for size in tensor.shape
                ):
                    yield name, tensor
                    break


def _signals(seen: Sequence[tuple[str, Tensor]], layers: Mapping[str, Attention], heads: Heads) -> list[Tensor]:
    """Numbers that depend on what comes out of some heads, and of all others."""
    mine, others = [], []
    for path, x in seen:
        *_, (_, _, places) = head_indices(layers[path], list(heads.get(path, ())))
        chosen = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        chosen[sorted(places)] = True
        noise = torch.randn_like(x) * x
        mine.append(noise[..., chosen].sum())
        others.append(noise[..., ~chosen].sum())
    return [torch.stack(each).sum() for each in (mine, others)]


def _gradients(signal: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Where the gradients by tensors are not zero."""
    grads = torch.autograd.grad(signal, list(tensors.values()), retain_graph=True, allow_unused=True)
    return [
        torch.zeros(tensor.shape, dtype=torch.bool) if grad is None else grad.cpu() != 0
        for tensor, grad in zip(tensors.values(), grads, strict=True)
    ]


def _is_inside(name: str, path: str) -> bool:
    """Whether a tensor is one of a layer, or within it."""
    return not path or name.startswith(f"{path}.")


def _along(touched: Tensor, dim: int) -> Tensor:
    """Which indices along a dimension are touched anywhere."""
    return touched.movedim(dim, 0).reshape(touched.shape[dim], -1).any(1)


def _places(mine: Tensor, others: Tensor, runs: Sequence[tuple[int, Sequence[int]]]) -> set[int]:
    """The indices that belong to some heads and to no others.

    A gradient may be zero that is none by right, as that of a bias of keys, which a softmax cancels. Where all indices
    that are touched lie in runs of one length, one after the other by head, they are completed to these.

    Args:
        mine: whether these heads touch an index.
        others: whether others do.
        runs: how many heads there may be, and which are these.
    """
    if not bool(mine.any()) or not bool(others.any()) or bool((mine & others).any()):
        return set()
    for heads, gone in runs:
        if len(mine) % heads == 0:
            run = torch.zeros(heads, dtype=torch.bool)
            run[list(gone)] = True
            run = run.repeat_interleave(len(mine) // heads)
            if not bool((mine & ~run).any()) and not bool((others & run).any()):
                mine = run
                break
    return set(mine.nonzero().flatten().tolist())
