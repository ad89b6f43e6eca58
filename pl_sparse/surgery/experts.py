"""Experts taken out of mixtures, with their rows of the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.cut import Cut
from pl_sparse.network.channels import short
from pl_sparse.network.experts import Experts, close_masked, expert_layers
from pl_sparse.network.hooks import stand_ins
from pl_sparse.surgery.plan import RemovalPlan, changed_attributes
from pl_sparse.surgery.trial import changed_by

__all__ = ["dead_experts", "expert_plan", "refusal_of"]

_TOLERANCE = 1e-4
_CONFIG = ("num_experts", "num_local_experts", "n_routed_experts")


def dead_experts(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> dict[str, list[int]]:
    """The experts that are masked, by the name of what holds them; each layer keeps as many as its router chooses.

    Args:
        masks: which weights are kept, by name; what has no mask is kept. None: what is not zero is kept.
    """
    found = {}
    for layer in expert_layers(model):
        alive = torch.zeros(layer.count, dtype=torch.bool)
        if layer.reason is not None:
            continue
        for name, _, _, parameter, unit in layer.tensors(model):
            if not layer.is_weight(parameter):
                continue
            kept = parameter.detach() != 0 if masks is None else masks.get(name)
            if kept is None:
                alive[slice(None) if unit is None else unit] = True
            elif unit is None:
                alive |= kept.flatten(1).any(1).cpu()
            else:
                alive[unit] |= bool(kept.any())
        gone: list[int] = (~alive).nonzero().flatten().tolist()
        if gone := gone[max(len(gone) - (layer.count - layer.chosen), 0) :]:
            found[layer.name] = gone
    return found


def expert_plan(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> RemovalPlan:
    """The plan that takes experts out of a model.

    Where every layer loses as many, the model and its config count fewer too.

    Args:
        gone: the experts, by the name of what holds them (`Experts.name`).
    """
    plan, layers = RemovalPlan(), list(expert_layers(model))
    for layer in layers:
        if experts := tuple(gone.get(layer.name, ())):
            plan = plan.beside(_of_layer(model, layer, experts))
    counts = {layer.count for layer in layers} if layers else set()
    lost = {len(gone.get(layer.name, ())) for layer in layers}
    if plan and len(counts) == len(lost) == 1:
        (count,), (less,) = counts, lost
        for path, module in model.named_modules():
            config = getattr(module, "config", None)
            outer = not any(path == each.path or path.startswith(f"{each.path}.") for each in layers)
            changes = {k: (count, count - less) for k in _CONFIG if outer and vars(module).get(k) == count}
            if config is not None and id(config) not in _seen(plan, model):
                changes |= {f"config.{k}": (count, count - less) for k in _CONFIG if vars(config).get(k) == count}
            if changes:
                plan.layers[path] = {**plan.layers.get(path, {}), **changes}
    return plan


def _seen(plan: RemovalPlan, model: nn.Module) -> set[int]:
    """The configs, by identity, that a plan changes."""
    paths = [path for path, changes in plan.layers.items() if any(key.startswith("config.") for key in changes)]
    return {id(model.get_submodule(path).config) for path in paths}


def _of_layer(model: nn.Module, layer: Experts, gone: tuple[int, ...]) -> RemovalPlan:
    tensors = {name: Cut(tuple(p.shape), {0: gone}) for name, _, _, p in layer.rows(model)}
    lists = {layer.name: gone} if layer.parts else {}
    if not layer.parts:
        tensors |= {name: Cut(tuple(p.shape), {0: gone}) for name, _, _, p, _ in layer.tensors(model)}
    numbers = layer.numbers(model, layer.count - len(gone))
    plan = RemovalPlan(tensors, changed_attributes(model, tensors), lists)
    return plan.beside(RemovalPlan({}, numbers))


def refusal_of(model: nn.Module, layer: Experts) -> str | None:
    """Why experts of a layer cannot be masked and removed with the same outputs, as a trial on noise shows, or None.

    The layer alone is called, with all but as many experts masked as its router chooses.
    """
    gone = tuple(range(layer.count - max(layer.chosen, 1)))
    if not gone:
        return f"its router chooses all {layer.count} of them"
    part = model.get_submodule(layer.path)
    prefix = f"{layer.path}." if layer.path else ""
    plan = _of_layer(model, layer, gone).below(prefix)
    weight = next(p for _, _, _, p in layer.rows(model) if p.dim() == 2)
    noise = torch.randn(2, 8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    router: Any = model.get_submodule(layer.router)
    errors: list[Exception] = []
    with stand_ins(part), torch.no_grad():
        close_masked(router)
        for parameter in router.parameters(recurse=False):
            rows = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
            rows[list(gone)] = 0
            parameter.data = rows
        gap = changed_by(part, noise, plan.apply, errors)
    if errors:
        return f"the layer cannot be called with hidden states alone, or not with fewer experts ({short(errors[0])})"
    return None if gap <= _TOLERANCE else "the layer without them has other outputs than with them masked"
