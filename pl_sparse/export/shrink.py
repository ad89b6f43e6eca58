"""Masked channels and attention heads, taken out of the model: the same outputs from smaller dense layers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.attention import Attention, Unknown, attentions
from pl_sparse.coupling import Coupling, Plan, called, couplings, difference
from pl_sparse.files import replacing, write_json
from pl_sparse.masked import Cut
from pl_sparse.probe import undisturbed

__all__ = ["Shrunk", "dead", "load_shrunk", "save_shrunk", "shrink"]

_TOLERANCE = 1e-5
_PLAN, _WEIGHTS = "shrunk.json", "model.safetensors"
_VERSION = 1


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


def shrink_optimizers(optimizers: Sequence[Optimizer], model: nn.Module, plan: Plan) -> Callable[[], None]:
    """What cuts the optimizers' state of parameters that a plan makes smaller, to be called after the plan is applied.

    Tensors of a state are cut along the dimensions in which they have the parameter's size: momentum and the like
    (the parameter's shape), row and column factors (size 1 in one dimension). Counters are left alone.

    Raises:
        ValueError: a state has a tensor of another shape; nothing has changed.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    work: list[tuple[dict[str, Any], str, Cut]] = []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            cut = plan.tensors.get(names.get(id(parameter), ""))
            if cut is None:
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.numel() <= 1:
                    continue
                fits = value.dim() == len(cut.shape) and all(
                    a in (1, b) for a, b in zip(value.shape, cut.shape, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for "
                        f"{names[id(parameter)]} of shape {cut.shape}: how to shrink it is not known"
                    )
                work.append((state, key, cut))

    @torch.no_grad()
    def cut_all() -> None:
        for state, key, cut in work:
            state[key] = cut.take(state[key])

    return cut_all


# Constants that masked channels emit


def _silent(model: nn.Module, coupling: Coupling, unit: int) -> bool:
    """Whether the biases, and the scales and shifts of norms, of a unit without weights are zero."""
    for port in coupling.ports:
        module: Any = model.get_submodule(port.path)
        if port.side != "out" or isinstance(module, nn.PReLU):
            continue
        at = list(port.places[unit])
        norm = hasattr(module, "num_features")
        if isinstance(module.bias, Tensor) and bool(module.bias[at].any()):
            return False
        if norm and module.weight is None and bool(getattr(module, "running_mean", torch.zeros(1)).any()):
            return False
        if norm and module.weight is not None and bool(module.weight[at].any()):
            mean = module.running_mean
            if mean is not None and bool(mean[at].any()):
                return False
    return True


@dataclass
class _Fold:
    """A constant that a layer reads from some inputs, to be added to its bias instead."""

    path: str
    unit: int
    values: dict[int, float] = field(default_factory=dict)
    reason: str | None = None

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        module: Any = model.get_submodule(self.path)
        columns = torch.tensor(list(self.values), device=module.weight.device)
        constant = torch.tensor(list(self.values.values()), device=module.weight.device, dtype=module.weight.dtype)
        weight = module.weight[:, columns].flatten(2).sum(2) if module.weight.dim() > 2 else module.weight[:, columns]
        module.bias.data = module.bias + weight @ constant


def _folds(model: nn.Module, coupling: Coupling, unit: int, inputs: Mapping[str, list[Tensor]]) -> list[_Fold]:
    folds = []
    for port in coupling.targets():
        module: Any = model.get_submodule(port.path)
        fold = _Fold(port.path, unit)
        dim = -1 if isinstance(module, nn.Linear) else 1
        for place in port.places[unit]:
            seen = torch.cat([x.select(dim, place).flatten() for x in inputs.get(port.path, [])] or [torch.ones(0)])
            if not len(seen) or bool((seen != seen[0]).any()):
                fold.reason = f"what its masked channels emit is not the same everywhere in {port.path}"
                break
            fold.values[place] = float(seen[0])
        if any(fold.values.values()) and fold.reason is None:
            fold.reason = _unfoldable(port.path, module)
        if fold.reason is not None or any(fold.values.values()):
            folds.append(fold)
    return folds


def _unfoldable(path: str, module: Any) -> str | None:
    emit = "its masked channels emit a constant (a bias or the shift of a norm)"
    if module.bias is None:
        return f"{emit}, and {path} has no bias that could take it up: use coupled channels"
    if isinstance(module, nn.Linear):
        return None
    plain = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    if plain and (module.padding_mode != "zeros" or not any(module._reversed_padding_repeated_twice)):
        return None
    return f"{emit}, which the padding of {path} makes another one at the borders: use coupled channels"


@torch.no_grad()
def _inputs_of(model: nn.Module, example: Any, found: Sequence[Coupling]) -> dict[str, list[Tensor]]:
    """What the layers that read units get for the example, in evaluation mode."""
    inputs: dict[str, list[Tensor]] = {}
    paths = {port.path for coupling in found if coupling.reason is None for port in coupling.targets()}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].detach())
        )
        for path in paths
    ]
    try:
        with undisturbed(model):
            model.eval()
            called(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


# Files


def save_shrunk(model: nn.Module, plan: Plan, folder: str | os.PathLike[str]) -> None:
    """Write a shrunk model to a folder: shrunk.json, what was removed, and model.safetensors, what is left.

    Args:
        plan: what was taken out of it, all shrinkings together.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary)
    save_plan(plan, model, folder)


def save_plan(plan: Plan, model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what was taken out of a model beside its weights."""
    write_json(Path(folder) / _PLAN, {"version": _VERSION, "model": type(model).__name__, **plan.state_dict()})


def load_shrunk(model: nn.Module, folder: str | os.PathLike[str]) -> Plan:
    """Make a fresh instance of a model the shrunk one that was saved, in place: its shapes, then its weights.

    Args:
        model: the model as its constructor makes it, with the arguments that it was trained with.

    Raises:
        FileNotFoundError: the folder holds no shrunk model.
        ValueError: it is one of another model, or of another version; the model is as it was.
    """
    folder = Path(folder)
    for name in (_PLAN, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no shrunk model: there is no {name}")
    state = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    if state.get("version") != _VERSION:
        raise ValueError(f"{folder / _PLAN} has version {state.get('version')!r}, this is version {_VERSION}")
    plan = Plan.from_state_dict(state)
    weights = load_file(folder / _WEIGHTS)
    plan.apply(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        plan.undo(model)
        raise ValueError(f"{folder} holds the weights of another model: {error}") from error
    return plan
