"""Experts and blocks that are masked as a whole: which of them leave a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pl_sparse.core.upstream import plain_name
from pl_sparse.network.blocks import listed
from pl_sparse.network.channels import short
from pl_sparse.network.experts import expert_layers
from pl_sparse.surgery.experts import dead_experts, expert_plan
from pl_sparse.surgery.plan import RemovalPlan
from pl_sparse.surgery.trial import difference

__all__ = ["is_within", "whole"]

_TOLERANCE = 1e-5
_OTHER = "without it the outputs would be others"


def whole(
    model: nn.Module, example: Any, masks: Mapping[str, Tensor] | None = None
) -> tuple[RemovalPlan, dict[str, str]]:
    """The plan that takes masked experts and blocks out of a model, as trials show that it holds, and why others stay.

    Args:
        model: it is left as it is.
        example: inputs, as the model is called with.
        masks: which weights are kept, by name; what has no mask is kept. None: what is not zero is kept.
    """
    plan, left = RemovalPlan(), dict[str, str]()
    errors: list[Exception] = []

    def holds(candidate: RemovalPlan) -> bool:
        errors.clear()
        return difference(model, example, candidate.apply, errors) <= _TOLERANCE

    def why() -> str:
        return f"without it the model cannot be called: {short(errors[0])}" if errors else _OTHER

    if experts := dead_experts(model, masks):
        together = expert_plan(model, experts)
        if holds(together):
            plan = together
        else:
            for name, gone in experts.items():
                alone = plan.beside(expert_plan(model, {name: gone}))
                plan, left = (alone, left) if holds(alone) else (plan, {**left, name: why()})
    blocks = _dead_blocks(model, masks)
    together = plan.beside(RemovalPlan(lists=_by_list(model, blocks)))
    if not blocks or holds(together):
        return (together if blocks else plan), left
    for path in blocks:  # one after the other, and in its place one that does nothing where its list must stay
        lists = _by_list(model, [path])
        (holder,) = lists
        left_so_far = RemovalPlan(lists={holder: tuple(sorted({*plan.lists.get(holder, ()), *lists[holder]}))})
        for candidate in (plan.beside(left_so_far), plan.beside(RemovalPlan(skipped=(path,)))):
            if holds(candidate):
                plan = candidate
                break
        else:
            left[path] = why()
    return plan, left


def _dead_blocks(model: nn.Module, masks: Mapping[str, Tensor] | None) -> list[str]:
    """The modules of lists all weights of which are masked, but experts, by name; the outermost ones."""
    experts = {module for layer in expert_layers(model) for module in layer.parts}
    found: list[str] = []
    for path, part in listed(model):
        if part in experts or not part._modules or any(path.startswith(f"{each}.") for each in found):
            continue
        weights = {plain_name(f"{path}.{name}"): p for name, p in part.named_parameters() if p.dim() > 1}
        if masks is None:
            kept = any(bool(weight.detach().any()) for weight in weights.values())
        else:
            kept = any(bool(masks[name].any()) if name in masks else bool(w.any()) for name, w in weights.items())
        if not kept:
            found.append(path)
    return found


def _by_list(model: nn.Module, blocks: list[str]) -> dict[str, tuple[int, ...]]:
    """Their places by the list that they are in."""
    lists: dict[str, tuple[int, ...]] = {}
    for path in blocks:
        holder, _, name = path.rpartition(".")
        place = list(model.get_submodule(holder)._modules).index(name)
        lists[holder] = (*lists.get(holder, ()), place)
    return lists


def is_within(path: str, plan: RemovalPlan, model: nn.Module) -> bool:
    """Whether a module leaves the model, or loses rows, as a plan says."""
    names = {holder: list(model.get_submodule(holder)._modules) for holder in plan.lists}
    gone = [f"{holder}.{names[holder][i]}".lstrip(".") for holder, places in plan.lists.items() for i in places]
    cut = any(name.rpartition(".")[0] == path for name in plan.tensors)
    return cut or any(path == each or path.startswith(f"{each}.") for each in (*gone, *plan.skipped))
