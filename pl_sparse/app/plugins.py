"""Options of groups for classes that other packages register, so that their names work on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pl_sparse.core.registry import Entry, registered

__all__ = ["AXES", "provide_options", "settings_of"]

AXES = ("scorer", "schedule", "structure", "allocation", "updater", "masking")
_FILLED = {"final": "${sparsity}"}  # what the options of this package take from the run's own settings


def provide_options() -> None:
    """Give Hydra an option for each registered class that has no YAML: `scorer=relative` beside `scorer=magnitude`.

    The classes are those that entry points of installed packages name, and those that were registered before the
    application began. An option has all settings of the class with their defaults.
    """
    store = ConfigStore.instance()
    for axis in AXES:
        for name, entry in registered(axis).items():
            if not entry.builtin:
                store.store(group=axis, name=name, node={"_target_": entry.path, **settings_of(entry)})


def settings_of(entry: Entry) -> dict[str, Any]:
    """The settings of a class with their defaults; those without one are asked for by name."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(entry.kind) if dataclasses.is_dataclass(entry.kind) else ():
        if not field.init:
            continue
        if field.name in entry.arguments:
            value: Any = entry.arguments[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = _FILLED.get(field.name, MISSING)
        if isinstance(value, (tuple, list)):
            value = list(value)
        if value is None or isinstance(value, (bool, int, float, str, list, dict)):
            settings[field.name] = value  # what YAML cannot write keeps its default
    return settings
