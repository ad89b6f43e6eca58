"""Masked channels and attention heads, taken out of the model: the same outputs from smaller dense layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.network.attention import Unknown, attentions
from pl_sparse.network.layers import held
from pl_sparse.network.norms import is_over_left, kept_channels, norm_over_all
from pl_sparse.network.units import Coupling, Port
from pl_sparse.surgery.constants import Fold, folds_of, is_silent, read_inputs
from pl_sparse.surgery.optimizers import shrink_optimizers
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.stacks import UNFOLLOWED, Stack, head_plan, stacks, stacks_hold, without
from pl_sparse.surgery.trial import couplings, difference
from pl_sparse.surgery.whole import is_within, whole

__all__ = ["Removal", "dead", "shrink"]

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Removal:
    """What was taken out of a model.

    Attributes:
        plan: the indices, by tensor.
        left: layers that have masked channels or heads which could not be removed, each with the reason.
        before: how many parameters there were.
        after: how many there are.
    """

    plan: RemovalPlan
    left: dict[str, str]
    before: int
    after: int


def shrink(
    model: nn.Module,
    example: Any,
    masks: Mapping[str, Tensor] | None = None,
    optimizers: Sequence[Optimizer] = (),
    multiple: int = 1,
) -> Removal:
    """Take all channels, heads, experts and blocks that are masked out of a model, in place.

    A channel goes if its weights are zero in all layers that it comes out of, through residual joins, concatenations,
    grouped and depthwise convolutions, norms of channels, and flattening. If it is not silent but emits a constant (a
    bias, the shift of a norm), the constant is added to the bias of the layers that read it, where that is exact:
    linear layers, and convolutions without padding. A head goes if it adds nothing to the output: of
    `nn.MultiheadAttention`, and of other attention layers whose heads are known (`structure.Head`). Each layer keeps
    at least one channel or head. An expert goes with its row of the router if all of its weights are masked
    (`structure.Expert`), a module of a ModuleList or Sequential if it hands its input on (`structure.Layer`). The
    outputs are compared with those of the masked model, in evaluation mode, before anything is removed for good: what
    would change them by more than 1e-5 (relative to the largest output, if that is above 1) stays, and is named in the
    result.

    Parameters stay the same objects, with less in them, so that optimizers go on training them; a Pruner follows by
    `pruner.shrink(result.plan.tensors)`. Norms that took their statistics over the channels that are left (coupled
    channels with `through_norms`) have no others then, and are plain again.

    Args:
        model: any model; it is changed in place.
        example: inputs, as the model is called with: a tensor, a tuple of arguments or a dict of keywords.
        masks: which weights are kept, by name; what has no mask is kept. None: what is not zero is kept.
        optimizers: those that train the model; their state is cut too.
        multiple: channels that are masked stay where a layer would not keep a multiple of so many.

    Returns:
        What was taken out, and what had to stay.

    Raises:
        ValueError: the model cannot be called with the example, or a state of an optimizer cannot be cut; nothing has
            changed then.
    """
    before = sum(parameter.numel() for parameter in model.parameters())
    parts, stays = whole(model, example, masks)
    coupled = couplings(model, example, lambda coupling: bool(dead(model, [coupling], masks)))
    masked = [
        (coupling, _rounded(coupling, units, multiple))
        for coupling, units in dead(model, coupled, masks)
        if not any(is_within(port.path, parts, model) for port in coupling.sources(model))
    ]
    candidates, left = _candidates(model, example, coupled, masked)
    heads = {p: units for p, units in _removable_heads(model, masks).items() if not is_within(p, parts, model)}
    plan, folds, refused = _tried(model, example, candidates, heads, parts)
    cut_states = shrink_optimizers(optimizers, model, plan)
    for fold in folds:
        fold.apply(model)
    plan.apply(model)
    cut_states()
    for norm in model.modules():
        if is_over_left(norm) and bool(kept_channels(norm).all()):
            norm_over_all(norm)
    return Removal(
        plan, {**stays, **left, **refused}, before, sum(parameter.numel() for parameter in model.parameters())
    )


def dead(
    model: nn.Module, coupled: Sequence[Coupling], masks: Mapping[str, Tensor] | None = None
) -> list[tuple[Coupling, list[int]]]:
    """The units of each coupling that no layer puts anything into, where there are any.

    Args:
        coupled: couplings of the model.
        masks: as in `shrink`.
    """
    out = []
    for coupling in coupled:
        alive = torch.zeros(coupling.units, dtype=torch.bool)
        sources = coupling.sources(model)
        for port in sources:
            alive |= _alive(model.get_submodule(port.path), port, masks)
        if sources and not bool(alive.all()):
            out.append((coupling, (~alive).nonzero().flatten().tolist()))
    return out


def _rounded(coupling: Coupling, units: list[int], multiple: int) -> list[int]:
    """Fewer units to remove, so that a multiple is left, if there are enough."""
    return units[-(coupling.units - len(units)) % multiple :]


def _alive(module: nn.Module, port: Port, masks: Mapping[str, Tensor] | None) -> Tensor:
    """Which units have a weight left in a layer that they come out of, (units,)."""
    alive = torch.zeros(len(port.places), dtype=torch.bool)
    for each in held(module, port.end):
        tensor: Tensor = getattr(module, each.name)
        if tensor.dim() < 2:
            continue
        weight = tensor.detach() != 0 if masks is None else masks.get(f"{port.path}.{each.name}".lstrip("."))
        if weight is None:
            weight = torch.ones_like(tensor, dtype=torch.bool)
        kept = weight.movedim(each.dim, 0).flatten(1).any(1).cpu()  # (out,)
        alive |= kept[torch.tensor([each.indices(places) for places in port.places])].any(1)  # (units, indices)
    return alive


@dataclass(frozen=True)
class _Candidate:
    """Units of a coupling that may go, and the constants that are folded first."""

    coupling: Coupling
    units: list[int]
    folds: list[Fold]


def _for_sources(model: nn.Module, coupling: Coupling, reason: str) -> dict[str, str]:
    """A reason by the path of each layer that the units of a coupling come out of."""
    return {port.path: reason for port in coupling.sources(model)}


def _candidates(
    model: nn.Module, example: Any, coupled: Sequence[Coupling], masked: Sequence[tuple[Coupling, list[int]]]
) -> tuple[list[_Candidate], dict[str, str]]:
    """The units that may go if a trial shows that they can, and by layer why others stay.

    Args:
        coupled: all couplings of the model.
        masked: those with masked units, and these.
    """
    candidates: list[_Candidate] = []
    left: dict[str, str] = {}
    inputs: dict[str, list[Tensor]] | None = None
    for coupling, units in masked:
        if coupling.reason is not None:
            left |= _for_sources(model, coupling, coupling.reason)
            continue
        if len(units) == coupling.units:
            units = units[1:]  # a layer keeps one channel, if only a silent one
        loud = [unit for unit in units if not is_silent(model, coupling, unit)]
        folds: list[Fold] = []
        if loud:
            inputs = read_inputs(model, example, coupled) if inputs is None else inputs
            folds = [fold for unit in loud for fold in folds_of(model, coupling, unit, inputs)]
            failed = {fold.unit: fold.reason for fold in folds if fold.reason is not None}
            if failed:
                left |= _for_sources(model, coupling, next(iter(failed.values())))
                units = [unit for unit in units if unit not in failed]
                folds = [fold for fold in folds if fold.unit not in failed]
        if units:
            candidates.append(_Candidate(coupling, units, folds))
    return candidates, left


def _removable_heads(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, list[int]]:
    """The heads whose part of the output projection is zero, by attention layer; each layer keeps one head."""
    paths = {module: path for path, module in model.named_modules()}
    removable = {}
    for attention in attentions(model):
        if isinstance(attention, Unknown) or getattr(model.get_submodule(attention.path), "bias_k", None) is not None:
            continue
        output, name, layout = attention.weights[-1]
        weight = (
            output.get_parameter(name).detach() != 0
            if masks is None
            else masks.get(f"{paths[output]}.{name}".lstrip("."))
        )
        if weight is None:
            continue
        alive = layout.view(weight).any(1)  # (heads, weights of a head) -> (heads,)
        heads: list[int] = (~alive).nonzero().flatten().tolist()
        if len(heads) == attention.heads:
            heads = heads[1:]
        if heads:
            removable[attention.path] = heads
    return removable


def _tried(
    model: nn.Module,
    example: Any,
    candidates: Sequence[_Candidate],
    heads: Mapping[str, list[int]],
    parts: RemovalPlan,
) -> tuple[RemovalPlan, list[Fold], dict[str, str]]:
    """The plan of what can go, as trials on the model show, the constants to fold, and by layer why others stay."""
    errors: list[Exception] = []

    def planned(candidates: Sequence[_Candidate], found: Sequence[Stack]) -> RemovalPlan:
        units = [(each.coupling, each.units) for each in candidates]
        return RemovalPlan.of(model, units).beside(head_plan(model, example, found)).beside(parts)

    def passes(candidates: Sequence[_Candidate], found: Sequence[Stack]) -> bool:
        plan = planned(candidates, found)

        def remove(model: nn.Module) -> None:
            for candidate in candidates:
                for fold in candidate.folds:
                    fold.apply(model)
            plan.apply(model)

        errors.clear()
        return difference(model, example, remove, errors) <= _TOLERANCE

    def hold(found: Sequence[Stack]) -> bool:
        errors.clear()
        return len(found) < 2 or stacks_hold(model, example, found, errors)  # each alone has passed

    tried = stacks(model, example, heads) if heads else []
    left = {path: stack.reason for stack in tried if stack.reason is not None for path in stack.heads}
    found = [stack for stack in tried if stack.reason is None]
    if not hold(found) or not passes(candidates, found):  # then one after the other, to see which
        good: list[_Candidate] = []
        for candidate in candidates:
            if passes([*good, candidate], []):
                good.append(candidate)
            else:
                left |= _for_sources(model, candidate.coupling, UNFOLLOWED)
        good_stacks: list[Stack] = []
        for stack in found:
            if hold([*good_stacks, stack]) and passes(good, [*good_stacks, stack]):
                good_stacks.append(stack)
            else:
                left |= dict.fromkeys(stack.heads, without(errors))
        candidates, found = good, good_stacks
    return planned(candidates, found), [fold for each in candidates for fold in each.folds], left
