"""Constants that masked channels emit, folded into the biases of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.network.channels import Coupling, called
from pl_sparse.network.probe import undisturbed

__all__ = []


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
