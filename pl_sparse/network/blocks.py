"""Residual blocks: modules of a list without which a network is left, as they add to what they take in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.network.channels import short
from pl_sparse.network.hooks import called, hooked, stand_ins, tensors, uncallable, unfused

__all__ = ["Block", "listed", "pass_by_masked", "residual_blocks"]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_CACHES = {"past_key_values", "past_key_value", "cache_params", "layer_past"}


@dataclass(frozen=True)
class Block:
    """A module of a list.

    Attributes:
        path: its name in the model.
        module: the block.
        exact: whether it returns its input where all of its parameters are zero; else a norm changes that on the way.
        reason: why the network cannot do without it, or None.
    """

    path: str
    module: nn.Module
    exact: bool = True
    reason: str | None = None


def listed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with weights in ModuleLists, ModuleDicts and Sequentials, by name, those around others first."""
    for path, holder in model.named_modules():
        if isinstance(holder, _LISTS):
            for name, part in holder.named_children():
                if not isinstance(part, _LISTS) and any(p.dim() > 1 for p in part.parameters()):
                    yield f"{path}.{name}".lstrip("."), part


def residual_blocks(model: nn.Module, example: Any) -> list[Block]:
    """The residual blocks of a model, and why other modules of lists are none.

    The model is called once, and each of them again with what it got, with all of its parameters zero: a residual block
    returns its input then, or what its norms make of it. Of blocks within each other the outermost counts.

    Args:
        model: it is left as it is.
        example: inputs, as the model is called with.

    Raises:
        ValueError: the model cannot be called with the example.
    """
    calls: dict[nn.Module, list[tuple[Any, Any, Any]]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls.setdefault(module, []).append((args, kwargs, out))

    parts = dict(listed(model))
    with stand_ins(model), unfused(), torch.no_grad(), hooked(set(parts.values()), post=note):
        try:
            called(model, example)
        except Exception as error:
            raise uncallable(model, error) from error
    uses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name)
    found: list[Block] = []
    for path, part in parts.items():
        if any(block.reason is None and path.startswith(f"{block.path}.") for block in found):
            continue
        shared = {name for p in part.parameters() for name in uses[id(p)] if not name.startswith(f"{path}.")}
        if shared:
            found.append(Block(path, part, reason=f"it shares its weights with {min(shared)}"))
        elif len(calls.get(part, [])) != 1:
            found.append(Block(path, part, reason=f"it is called {len(calls.get(part, []))} times, not once"))
        else:
            found.append(_judged(path, part, *calls[part][0]))
    return found


def _judged(path: str, part: nn.Module, args: Any, kwargs: Any, out: Any) -> Block:
    """Whether a module returns its input where its weights are zero."""
    x, y = next(tensors((args, kwargs)), None), next(tensors(out), None)
    if x is None or y is None or not x.is_floating_point():
        return Block(path, part, reason="it takes or returns no tensor of floats")
    if x.shape != y.shape:
        return Block(path, part, reason=f"its output is {_size(y)}, its input {_size(x)}")
    kwargs = {key: None if key in _CACHES else value for key, value in kwargs.items()}

    def returned(of: Tensor) -> Tensor:
        new = [of if value is x else value for value in args], {k: of if v is x else v for k, v in kwargs.items()}
        return next(tensors(part(*new[0], **new[1])))

    with stand_ins(part), unfused(), torch.no_grad():
        try:
            for parameter in part.parameters():
                parameter.data = torch.zeros_like(parameter)
            if torch.allclose(returned(x), x, rtol=1e-4, atol=1e-6):
                return Block(path, part)
            for module in part.modules():
                scale: Any = getattr(module, "weight", None)
                if "norm" in type(module).__name__.lower() and isinstance(scale, Tensor):
                    scale.data = torch.ones_like(scale)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            if torch.allclose(returned(x + noise), returned(x)):
                return Block(path, part, reason="it has no residual connection: without its weights no input passes")
        except Exception as error:
            return Block(path, part, reason=f"it cannot be called alone ({short(error)})")
    return Block(path, part, exact=False)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _passed(block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    weights = [p for p in block.parameters() if p.dim() > 1]
    alive = torch.stack([(weight.detach() != 0).any() for weight in weights]).any()
    x = next(tensors((args, kwargs)))
    if isinstance(out, Tensor):
        return torch.where(alive, out, x)
    return type(out)([torch.where(alive, out[0], x), *out[1:]])


def pass_by_masked(block: nn.Module) -> None:
    """Let a block return its input where all of its weights are zero, from now on.

    It is a hook that knows nothing but the weights, so that a copy of the model has it too. A plain model that the
    weights are loaded into has not: there norms after the join go on.
    """
    if _passed not in block._forward_hooks.values():
        block.register_forward_hook(_passed, with_kwargs=True)
