"""Constants that masked channels emit, folded into the biases of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.upstream import padding_of
from pl_sparse.network.hooks import called, evaluated, hooked
from pl_sparse.network.layers import CONVS, TRANSPOSED, held, is_weighted, own_tensors
from pl_sparse.network.units import Coupling

__all__ = ["Fold", "folds_of", "is_silent", "read_inputs"]


def is_silent(model: nn.Module, coupling: Coupling, unit: int) -> bool:
    """Whether a unit without weights emits zeros: its biases, and the shifts and scaled means of its norms are zero."""
    for port in coupling.ports:
        module: Any = model.get_submodule(port.path)
        if port.side not in ("out", "shift") or isinstance(module, nn.PReLU):
            continue
        places, tensors = list(port.places[unit]), own_tensors(module)
        for each in held(module, port.end):
            shifts = port.side == "shift" or each.name.startswith("bias")
            index = torch.tensor(each.indices(places), device=tensors[each.name].device)
            if shifts and bool(tensors[each.name].index_select(each.dim, index).any()):
                return False
        if port.tensor:
            continue
        mean = getattr(module, "running_mean", None)  # a norm subtracts it from the zeros, and scales that
        if mean is not None and bool(mean[places].any()) and (module.weight is None or module.weight[places].any()):
            return False
    return True


@dataclass
class Fold:
    """A constant that a layer reads from some inputs, to be added to its bias instead.

    Attributes:
        path: the layer that reads it.
        unit: the one that emits it.
        values: the constant by input.
        reason: why it cannot be folded, or None.
    """

    path: str
    unit: int
    values: dict[int, float] = field(default_factory=dict)
    reason: str | None = None

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Add what the layer makes of the constant to its bias."""
        module: Any = model.get_submodule(self.path)
        columns = torch.tensor(list(self.values), device=module.weight.device)
        constant = torch.tensor(list(self.values.values()), device=module.weight.device, dtype=module.weight.dtype)
        weight = module.weight[:, columns]  # (out, inputs, *kernel)
        if weight.dim() > 2:
            weight = weight.flatten(2).sum(2)  # (out, inputs)
        module.bias.data = module.bias + weight @ constant


def folds_of(model: nn.Module, coupling: Coupling, unit: int, inputs: Mapping[str, list[Tensor]]) -> list[Fold]:
    """What must be folded before a unit goes that has no weights, but is not silent.

    Args:
        inputs: what layers read, by path (`read_inputs`).

    Returns:
        A fold per layer that reads the unit, but for those that read zeros; one with a reason cannot be done.
    """
    folds = []
    for port in coupling.targets():
        module: Any = model.get_submodule(port.path)
        fold = Fold(port.path, unit)
        if port.tensor or not is_weighted(module):
            fold.reason = f"what its masked channels emit goes into {port.path}, which cannot take it up"
            folds.append(fold)
            continue
        dim = 1 if isinstance(module, (*CONVS, *TRANSPOSED)) else -1
        for place in port.places[unit]:
            values = torch.cat([x.select(dim, place).flatten() for x in inputs.get(port.path, [])] or [torch.ones(0)])
            if not len(values) or bool((values != values[0]).any()):
                fold.reason = f"what its masked channels emit is not the same everywhere in {port.path}"
                break
            fold.values[place] = float(values[0])
        if any(fold.values.values()) and fold.reason is None:
            fold.reason = _unfoldable(port.path, module)
        if fold.reason is not None or any(fold.values.values()):
            folds.append(fold)
    return folds


def _unfoldable(path: str, module: Any) -> str | None:
    """Why a layer cannot take a constant up in its bias; None if it can."""
    emit = "its masked channels emit a constant (a bias or the shift of a norm)"
    if module.bias is None:
        return f"{emit}, and {path} has no bias that could take it up: use coupled channels"
    if isinstance(module, nn.Linear):
        return None
    ungrouped = isinstance(module, CONVS) and module.groups == 1
    if ungrouped and (module.padding_mode != "zeros" or not any(padding_of(module))):
        return None
    return f"{emit}, which the padding of {path} makes another one at the borders: use coupled channels"


@torch.no_grad()
def read_inputs(model: nn.Module, example: Any, couplings: Sequence[Coupling]) -> dict[str, list[Tensor]]:
    """What the layers that read units get for the example, in evaluation mode.

    Args:
        example: inputs, as the model is called with.
        couplings: those with a reason why they stay are left out.

    Returns:
        A tensor per call, by the path of the layer.
    """
    inputs: dict[str, list[Tensor]] = {}
    readers = {
        port.path for coupling in couplings if coupling.reason is None for port in coupling.targets() if not port.tensor
    }
    paths: dict[nn.Module, str] = {model.get_submodule(path): path for path in sorted(readers)}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        inputs.setdefault(paths[module], []).append(x.detach())

    with hooked(paths, pre=note), evaluated(model):
        called(model, example)
    return inputs
