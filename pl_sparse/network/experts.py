"""Mixtures of experts: which weights belong to an expert, and which rows of the router choose it.

Layers are recognised by what they consist of, not by their class: experts in one module of parameters (E, ...), or in a
list, under a name with "expert"; beside them a router with a row per expert; and how many of them it chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_sparse.core.upstream import plain_name

__all__ = ["LOOKED_FOR", "Experts", "close_masked", "expert_layers"]

_CHOSEN = ("top_k", "topk", "num_experts_per_tok", "moe_top_k", "num_selected_experts", "experts_per_token", "k")
LOOKED_FOR = (
    "modules named like experts that hold parameters (experts, ...) or a ModuleList of equal modules, beside a router "
    f"with a weight (experts, features), of which it or its config says how many it chooses ({', '.join(_CHOSEN)})"
)
_MODE = "_closing"


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        name: the path of the module that holds them.
        path: the path of the layer: it holds experts and router, and takes hidden states.
        count: how many there are.
        chosen: how many of them the router chooses for a token; 0 where that is not known.
        parts: their modules, where they are in a list; else empty.
        router: path of the router in the model, or "".
        reason: why none of them can be pruned, or None.
    """

    name: str
    path: str
    count: int
    chosen: int = 0
    parts: tuple[nn.Module, ...] = ()
    router: str = ""
    reason: str | None = None

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter, int | None]]:
        """The parameters of the experts: name in the model, module and name there, parameter, and whose it is.

        Whose: the number of the expert, or None where each index of the first dimension is one.
        """
        holders: list[tuple[str, int | None, nn.Module]]
        holders = [(f"{self.name}.{i}", i, part) for i, part in enumerate(self.parts)]
        for path, unit, part in holders or [(self.name, None, model.get_submodule(self.name))]:
            for sub, module in part.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    full = ".".join(filter(None, (path, sub, name)))
                    yield plain_name(full), module, name, parameter, unit

    def is_weight(self, parameter: Tensor) -> bool:
        """Whether a parameter of an expert is a weight, and no bias, of it."""
        return parameter.dim() > (1 if self.parts else 2)

    def rows(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
        """The parameters of the router, with an entry per expert: name in the model, module, name there, parameter."""
        router = model.get_submodule(self.router)
        for name, parameter in router.named_parameters(recurse=False):
            yield plain_name(f"{self.router}.{name}"), router, name, parameter

    def numbers(self, model: nn.Module, left: int) -> dict[str, dict[str, tuple[int, int]]]:
        """The attributes in the layer that say how many experts there are, before and after, by module."""
        inside = {module for part in self.parts for module in part.modules()}
        changes: dict[str, dict[str, tuple[int, int]]] = {}
        for path, module in model.get_submodule(self.path).named_modules():
            for key, value in vars(module).items() if module not in inside else ():
                counts = "expert" in key and not {"per", "shared", "selected"} & set(key.split("_"))
                if counts and type(value) is int and value == self.count:
                    changes.setdefault(f"{self.path}.{path}".strip("."), {})[key] = (value, left)
        return changes


def expert_layers(model: nn.Module) -> Iterator[Experts]:
    """The layers of experts of a model, in its order."""
    for path, module in model.named_modules():
        for short, child in module.named_children():
            name = f"{path}.{short}".strip(".")
            if "expert" not in (short + type(child).__name__).lower() or "shared" in short.lower():
                continue
            if isinstance(child, nn.ModuleList):
                if len(child) > 1:
                    yield _read(model, path, module, name, child, len(child), tuple(child))
            elif stacks := [p for p in child.parameters(recurse=False) if p.dim() > 2]:
                yield _read(model, path, module, name, child, len(stacks[0]), ())


def _read(
    model: nn.Module, path: str, layer: nn.Module, name: str, child: nn.Module, count: int, parts: tuple[nn.Module, ...]
) -> Experts:
    """A layer of experts, with the reason if they cannot be pruned."""

    def refused(reason: str) -> Experts:
        return Experts(name, path, count, parts=parts, reason=reason)

    if len({tuple((n, p.shape) for n, p in part.named_parameters()) for part in parts}) > 1:
        return refused("its experts are not of one shape")
    if not parts and any(p.dim() < 2 or len(p) != count for p in child.parameters()):
        return refused(f"not all of its parameters have {count} experts as their first dimension")
    inside = set(child.modules())
    routers = [
        (sub, module)
        for sub, module in layer.named_modules()
        if module not in inside
        and any(p.dim() == 2 and len(p) == count for p in module.parameters(recurse=False))
        and all(len(p) == count for p in module.parameters(recurse=False))
    ]
    if len(routers) != 1:
        found = "more than one module" if routers else "no module"
        return refused(f"{found} beside its experts has a weight of {count} rows, as a router has")
    sub, router = routers[0]
    tables = [n for n, b in layer.named_buffers() if b.dim() == 1 and len(b) == count]
    if tables:
        return refused(f"{tables[0]} says something of each expert beside the router's weight")
    owners = [owner for m in (router, layer, child) for owner in (m, getattr(m, "config", None))]
    owners.append(getattr(model, "config", None))
    chosen = next((v for o in owners for key in _CHOSEN if isinstance(v := getattr(o, key, None), int) and v > 0), 0)
    if not chosen:
        return refused(f"how many experts its router chooses is not known: neither it nor its config has {_CHOSEN}")
    return Experts(name, path, count, chosen, parts, f"{path}.{sub}".strip("."))


class _Closing(TorchFunctionMode):
    """Within it the logits of experts whose row of the router is zero are the lowest number there is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and len(args) > 1 and args[1].shape == self.weight.shape:
            closed = ~(self.weight.detach() != 0).any(1)  # (experts,)
            return out.masked_fill(closed, torch.finfo(out.dtype).min)
        return out


def _enter(router: nn.Module, args: Any) -> None:
    weight: Any = next(p for p in router.parameters(recurse=False) if p.dim() == 2)
    mode = _Closing(weight)
    vars(router)[_MODE] = mode
    mode.__enter__()  # type: ignore[no-untyped-call]


def _leave(router: nn.Module, args: Any, out: Any) -> None:
    mode = vars(router).pop(_MODE, None)
    if mode is not None:
        mode.__exit__(None, None, None)


def close_masked(router: nn.Module) -> None:
    """Let a router choose no expert whose row of its weight is zero, from now on.

    It is done by hooks that know nothing but the weight, so that a copy of the model has them too. A plain model that
    the weights are loaded into has not: there a masked expert has the logit zero, and takes the place of another.
    """
    if _enter not in router._forward_pre_hooks.values():
        router.register_forward_pre_hook(_enter)
        router.register_forward_hook(_leave, always_call=True)
