"""What survives a checkpoint: masks, latent values, what scorers gather, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter, packed, unpacked
from pl_sparse.core.registry import Axes, name_of, suggestion

__all__ = ["Masks", "load_state", "refuse_other_settings", "settings_of", "state_of"]

_RENAMED = {"dense": "latent"}  # keys of version 1


class Masks:
    """A copy of the masks, to return to where an update fails on its way.

    Args:
        params: whose masks they are.
        groups: whose gates have a level.
        weights: whether to copy the weights too, which an update writes before it may fail.
    """

    def __init__(self, params: Sequence[MaskedParameter], groups: Sequence[Group], weights: bool = False) -> None:
        self._weights = [(param.weight, param.weight.detach().clone()) for param in params] if weights else []
        self._masks = [(param, _copy(param.mask) if param.pruned else None) for param in params]
        self._levels = [(group.gate, group.gate.level) for group in groups if group.gate is not None]

    def restore(self) -> None:
        """Give the weights the masks they had, and the values; those that had none are dense again."""
        for param, mask in self._masks:
            if mask is not None:
                param.set_mask(unpacked(mask, param.mask.shape))
            elif param.pruned:
                param.unset_mask()
        for weight, values in self._weights:
            weight.copy_(values)
        for gate, level in self._levels:
            gate.level = level


def _copy(mask: Tensor) -> Tensor:
    """A mask's bits where they need not be copied from a device, else the mask."""
    return packed(mask) if mask.device.type == "cpu" else mask.clone()


def state_of(params: Sequence[MaskedParameter], groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """By the name of each weight its tensors, on the CPU; a group's gate stands with its last member."""
    state: dict[str, dict[str, Any]] = {
        param.name: {"pruned": param.pruned, "shape": list(param.shape)}
        | {key: value.cpu() for key, value in param.tensors().items()}
        for param in params
    }
    for group in groups:
        if group.gate is not None:
            tensors = {f"gate.{key}": value.cpu() for key, value in group.gate.tensors().items()}
            state[group.members[-1][0].name] |= tensors
    return state


def load_state(
    params: Sequence[MaskedParameter], groups: Sequence[Group], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give weights and groups the state that `state_of` had.

    Raises:
        ValueError: it is of another model; nothing has changed then.
    """
    names = [param.name for param in params]
    missing, extra = [n for n in names if n not in state], [n for n in state if n not in set(names)]
    if missing or extra:
        parts = [f"it lacks {', '.join(missing[:5])}"] * bool(missing)
        if extra:
            parts.append(f"it has {', '.join(extra[:5])}. {suggestion(extra[0], missing or names)}")
        raise ValueError(f"the pruning state belongs to another model or other include/exclude: {'; '.join(parts)}")
    saved = {name: {_RENAMED.get(key, key): value for key, value in state[name].items()} for name in names}
    for param in params:
        tensors = saved[param.name]
        shape = tuple(tensors.get("shape", tensors["mask"].shape))  # masks of earlier versions are not packed
        if shape != tuple(param.shape):
            raise ValueError(
                f"the pruning state belongs to another model: the mask of {param.name} has shape {shape}, the weight "
                f"{tuple(param.shape)}"
            )
    for group in groups:
        tensors = saved[group.members[-1][0].name]
        gate = {key.removeprefix("gate."): tensors.pop(key) for key in list(tensors) if key.startswith("gate.")}
        if group.gate is not None and gate:
            group.gate.load(gate)
            group.gate.to(group.members[0][0].weight.device)
    for param in params:  # one that was the last of its group need not be
        param.load({key: value for key, value in saved[param.name].items() if not key.startswith("gate.")})


def settings_of(axes: Axes) -> dict[str, str]:
    """What the meaning of masks and latent values rests on, by axis."""
    named = {axis: name_of(getattr(axes, axis)) for axis in ("scorer", "updater", "masking")}
    return {**named, "structure": repr(axes.structure)}


def refuse_other_settings(state: Mapping[str, Any], axes: Axes) -> None:
    """Raise a ValueError if a state was made by other axes, whose masks and latent values mean something else.

    A state in which nothing was pruned fits all of them, and so does one of a release that did not keep its settings.
    """
    saved = state.get("settings")
    if not saved or not state["num_updates"]:
        return
    differ = [f"{k}={saved[k]} there, {v} here" for k, v in settings_of(axes).items() if saved.get(k, v) != v]
    if state["level"] > 0 and not axes.schedule.final:
        differ.append(f"a sparsity of {state['level']:g} there, none here")
    if differ:
        raise ValueError(
            f"the pruning state was made with other settings: {'; '.join(differ)}. Train with the same ones, start "
            "from the weights alone, or delete the state's entry 'settings' to load it nevertheless"
        )
