"""Shrunk models on disk: the plan as JSON, the weights as safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from pl_sparse.core.files import replacing, write_json
from pl_sparse.surgery.plan import RemovalPlan

__all__ = ["load_shrunk", "save_plan", "save_shrunk"]

_PLAN, _WEIGHTS = "shrunk.json", "model.safetensors"
_VERSION = 1


def save_shrunk(model: nn.Module, plan: RemovalPlan, folder: str | os.PathLike[str]) -> None:
    """Write a shrunk model to a folder: the removed parts as shrunk.json, the weights as model.safetensors.

    Args:
        model: the model from which the plan's parts were removed.
        plan: the removed parts, all removals together.
        folder: the folder, which is made if it does not exist.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary)
    save_plan(plan, model, folder)


def save_plan(plan: RemovalPlan, model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what was taken out of a model to a folder, beside its weights."""
    write_json(Path(folder) / _PLAN, {"version": _VERSION, "model": type(model).__name__, **plan.state_dict()})


def load_shrunk(model: nn.Module, folder: str | os.PathLike[str]) -> RemovalPlan:
    """Make a fresh instance of a model the shrunk one that was saved, in place: its shapes, then its weights.

    Args:
        model: the model as its constructor makes it, with the arguments that it was trained with.
        folder: what `save_shrunk` wrote.

    Returns:
        What was taken out.

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
        raise ValueError(
            f"{folder / _PLAN} has version {state.get('version')!r}, and this release reads version {_VERSION}"
        )
    plan = RemovalPlan.from_state_dict(state)
    weights = load_file(folder / _WEIGHTS)
    plan.apply(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        plan.undo(model)
        raise ValueError(f"{folder} holds the weights of another model: {error}") from error
    return plan
