"""Masked channels and attention heads, taken out of the model: the same outputs from smaller dense layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.network.attention import Attention, Unknown, attentions
from pl_sparse.network.channels import Coupling
from pl_sparse.surgery.constants import _Fold, _folds, _inputs_of, _silent
from pl_sparse.surgery.optimizers import shrink_optimizers
from pl_sparse.surgery.plan import Plan
from pl_sparse.surgery.trial import couplings, difference

__all__ = ["Shrunk", "dead", "shrink"]

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shrunk:
    """What was taken out of a model.

    Attributes:
        plan: the indices, by tensor.
        left: layers that have masked channels or heads which could not be removed, each with the reason.
        before: how many parameters there were.
        after: how many there are.
    """

    plan: Plan
    left: dict[str, str]
    before: int
    after: int


def shrink(
    model: nn.Module,
    example: Any,
    masks: Mapping[str, Tensor] | None = None,
    optimizers: Sequence[Optimizer] = (),
    multiple: int = 1,
) -> Shrunk:
    """Take all channels and heads that are masked out of a model, in place.

    A channel goes if its weights are zero in all layers that it comes out of, through residual joins, concatenations,
    grouped and depthwise convolutions, norms of channels, and flattening. If it is not silent but emits a constant (a
    bias, the shift of a norm), the constant is added to the bias of the layers that read it, where that is exact:
    linear layers, and convolutions without padding. A head goes if it adds nothing to the output: of
    `nn.MultiheadAttention`, and of other attention layers whose heads are known (`structure.Head`). Each layer keeps
    at least one channel or head. The outputs are compared with those of the masked model, in evaluation mode, before
    anything is removed for good: what would change them by more than 1e-5 (relative to the largest output, if that is
    above 1) stays, and is named in the result.

    Parameters stay the same objects, with less in them, so that optimizers go on training them; a Pruner is told by
    `pruner.shrink(result.plan.tensors)`.

    Args:
        example: inputs, as the model is called with: a tensor, a tuple of arguments or a dict of keywords.
        masks: which weights are kept, by name; what has no mask is kept. None: what is not zero is kept.
        optimizers: those that train the model; their state is cut too.
        multiple: channels that are masked stay where a layer would not keep a multiple of so many.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model cannot be called with the example, or a state of an optimizer cannot be cut; nothing has
            changed then.
    """
    before = sum(parameter.numel() for parameter in model.parameters())
    found = couplings(model, example)
    gone = [(coupling, _rounded(coupling, units, multiple)) for coupling, units in dead(model, found, masks)]
    plan, folds, left = _found(model, example, found, gone, _dead_heads(model, masks))
    cut_states = shrink_optimizers(optimizers, model, plan)
    for fold in folds:
        fold.apply(model)
    plan.apply(model)
    cut_states()
    return Shrunk(plan, left, before, sum(parameter.numel() for parameter in model.parameters()))


def dead(
    model: nn.Module, found: Sequence[Coupling], masks: Mapping[str, Tensor] | None = None
) -> list[tuple[Coupling, list[int]]]:
    """The units of each coupling that no layer puts anything into, where there are any."""
    out = []
    for coupling in found:
        alive = torch.zeros(coupling.units, dtype=torch.bool)
        sources = coupling.sources(model)
        for port in sources:
            kept = _kept(model.get_submodule(port.path), f"{port.path}.weight", masks)
            alive |= kept[torch.tensor(port.places)].any(1)
        if sources and not bool(alive.all()):
            out.append((coupling, (~alive).nonzero().flatten().tolist()))
    return out


def _rounded(coupling: Coupling, units: list[int], multiple: int) -> list[int]:
    """Fewer units to remove, so that a multiple is left, if there are enough."""
    return units[-(coupling.units - len(units)) % multiple :]


def _kept(module: Any, name: str, masks: Mapping[str, Tensor] | None) -> Tensor:
    """Which outputs of a layer have a weight left."""
    weight = module.weight.detach() != 0 if masks is None else masks.get(name)
    if weight is None:
        weight = torch.ones_like(module.weight, dtype=torch.bool)
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return (weight.transpose(0, 1) if transposed else weight).flatten(1).any(1).cpu()


def _dead_heads(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, list[int]]:
    """The heads whose part of the output projection is zero, by attention layer."""
    found = {}
    paths = {module: path for path, module in model.named_modules()}
    for attention in attentions(model):
        if isinstance(attention, Unknown):
            continue
        output, name, layout = attention.weights[-1]
        full = f"{paths[output]}.{name}".lstrip(".")
        weight = output.get_parameter(name).detach() != 0 if masks is None else masks.get(full)
        if weight is None:
            continue
        alive = layout.view(weight).any(1)
        if not bool(alive.all()):
            found[attention.path] = (~alive).nonzero().flatten().tolist()
    return {path: units for path, units in found.items() if getattr(model.get_submodule(path), "bias_k", None) is None}


def _found(
    model: nn.Module,
    example: Any,
    found: Sequence[Coupling],
    gone: Sequence[tuple[Coupling, list[int]]],
    heads: Mapping[str, list[int]],
) -> tuple[Plan, list[_Fold], dict[str, str]]:
    """The plan, what must be folded first, and what is left with the reason."""
    left: dict[str, str] = {}

    def name(coupling: Coupling, reason: str) -> None:
        left.update((port.path, reason) for port in coupling.sources(model))

    candidates: list[tuple[Coupling, list[int], list[_Fold]]] = []
    inputs: dict[str, list[Tensor]] | None = None
    for coupling, units in gone:
        if coupling.reason is not None:
            name(coupling, coupling.reason)
            continue
        if len(units) == coupling.units:
            units = units[1:]  # a layer keeps one channel, if only a silent one
        loud = [unit for unit in units if not _silent(model, coupling, unit)]
        folds: list[_Fold] = []
        if loud:
            inputs = _inputs_of(model, example, found) if inputs is None else inputs
            folds = [fold for unit in loud for fold in _folds(model, coupling, unit, inputs)]
            failed = {fold.unit: fold.reason for fold in folds if fold.reason is not None}
            if failed:
                name(coupling, next(iter(failed.values())))
                units = [unit for unit in units if unit not in failed]
                folds = [fold for fold in folds if fold.unit not in failed]
        if units:
            candidates.append((coupling, units, folds))
    counts = {each.path: each.heads for each in attentions(model) if isinstance(each, Attention)} if heads else {}
    some = {path: dead[1:] if len(dead) == counts[path] else dead for path, dead in heads.items()}
    some = {path: dead for path, dead in some.items() if dead}
    counted: set[str] = set()

    def holds(parts: Sequence[tuple[Coupling, list[int], list[_Fold]]], heads: Mapping[str, list[int]]) -> bool:
        def change(model: nn.Module) -> None:
            for _, _, folds in parts:
                for fold in folds:
                    fold.apply(model)
            Plan.of(model, [(coupling, units) for coupling, units, _ in parts], heads, counted).apply(model)

        return difference(model, example, change) <= _TOLERANCE

    # some kinds of attention read their number of heads off the weights, others are told
    counted |= {path for path, dead in some.items() if not _torchs(model, path) and not holds([], {path: dead})}
    if not holds(candidates, some):  # find out which, one after the other
        why = "without it the outputs would be others: its channels cannot be followed"
        good: list[tuple[Coupling, list[int], list[_Fold]]] = []
        for candidate in candidates:
            if holds([*good, candidate], {}):
                good.append(candidate)
            else:
                name(candidate[0], why)
        fine: dict[str, list[int]] = {}
        for path, units in some.items():
            if holds(good, {**fine, path: units}):
                fine[path] = units
            else:
                left[path] = why
        candidates, some = good, fine
    plan = Plan.of(model, [(coupling, units) for coupling, units, _ in candidates], some, counted)
    return plan, [fold for _, _, folds in candidates for fold in folds], left


def _torchs(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.MultiheadAttention)
