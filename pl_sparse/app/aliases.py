"""The names of version 0.1.0 that stay valid for one release: of classes in `_target_`, of options of groups."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import partial
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from pl_sparse.app.settings import CONF

__all__ = [
    "ADDED",
    "ADDED_WITHIN",
    "OPTIONS",
    "TARGETS",
    "current_options",
    "current_targets",
    "former_targets",
    "provide_hydra_callbacks",
]

TARGETS = {
    "pl_sparse.hardware.Hardware": "pl_sparse.export.hardware.Hardware",
    "pl_sparse.budget.Budget": "pl_sparse.allocation.Budget",
    "pl_sparse.masking.Shrunk": "pl_sparse.masking.SoftThresholded",
    "pl_sparse.pruner.auto": "pl_sparse.masking.auto",
    "pl_sparse.callbacks.history.History": "pl_sparse.callbacks.History",
    "pl_sparse.callbacks.status.Status": "pl_sparse.callbacks.Status",
    "pl_sparse.callbacks.track.Track": "pl_sparse.callbacks.Track",
    "pl_sparse.hooks.Overview": "pl_sparse.app.sweep.overview.Overview",
    "pl_sparse.sweep.monitor.Sweep": "pl_sparse.app.sweep.monitor.Sweep",
}
"""Classes that a configuration of 0.1.0 may name, and where they are."""
OPTIONS = {"masking=shrunk": "masking=softthresholded"}
"""Options of groups, and what they are called."""
ADDED: dict[str, Any] = {
    "frozen": "skip", "layouts": {}, "print_config": False, "resume_with": "same", "overwrite": False,
    "trust": None,
}  # fmt: skip
"""Settings that a configuration of 0.1.0 does not have, with their defaults."""
ADDED_WITHIN: dict[str, dict[str, Any]] = {
    "data": {"scale": "standard"},
    "structure": {"through_norms": False},
    "allocation": {"runtime": None, "device": None, "sensitivity": None},
    "regularizer.regularizer": {"runtime": None, "device": None},
    "export.onnx_int8": {"weights": "auto"},
}
"""Settings of groups that a configuration of 0.1.0 does not have, with their defaults."""
_HYDRA = ("pl_sparse.hooks.Overview", "pl_sparse.sweep.monitor.Sweep")
_announced: set[str] = set()


def current_targets(cfg: DictConfig) -> DictConfig:
    """A copy of a configuration in which each `_target_` has its current name, with the settings added since 0.1.0.

    A line on stderr says each new name, once per process. A name stays as it is where the new one does not exist.
    """
    cfg = cfg.copy()
    _rename(cfg)
    if "misfit" in cfg:  # it is composed from train.yaml
        OmegaConf.set_struct(cfg, False)
        scorer = cfg.get("scorer")
        if "frozen" not in cfg and scorer is not None and scorer.get("_target_") == "pl_sparse.scorer.Movement":
            scorer.setdefault("rule", "sum")  # in 0.1.0 movement was equation 3
        for key, default in ADDED.items():
            cfg.setdefault(key, default)
    return cfg


def _rename(node: Any) -> None:
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    keys: Iterable[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue  # an interpolation takes its value from a node that is renamed itself
        value = node[key]
        if key == "_target_" and value in TARGETS:
            node[key] = _current_target(value)
        else:
            _rename(value)


def _current_target(name: str) -> str:
    new = TARGETS[name]
    try:
        resolve_name(new)
    except (ImportError, AttributeError):
        return name
    _announce(name, new)
    return new


def former_targets(settings: Any) -> Any:
    """Plain settings with the names that classes had in 0.1.0, so that their hash is that of a run of then."""
    former = {new: old for old, new in TARGETS.items()}
    if isinstance(settings, dict):
        return {
            key: former.get(value, value) if key == "_target_" and isinstance(value, str) else former_targets(value)
            for key, value in settings.items()
            if key != "_convert_"  # no YAML had it then
        }
    return [former_targets(value) for value in settings] if isinstance(settings, list) else settings


def current_options(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command with the current names of options, in lists and choices of a sweep as well.

    A name stays as it is where the configuration has no option of the new name.
    """
    return [_current_option(argument) for argument in arguments]


def _current_option(argument: str) -> str:
    key, _, value = argument.partition("=")
    for old, new in OPTIONS.items():
        group, _, name = old.partition("=")
        new_name = new.partition("=")[2]
        if key.lstrip("+~") != group or not (CONF / group / f"{new_name}.yaml").is_file():
            continue
        value, count = re.subn(rf"(?<![\w./-]){name}(?![\w./-])", new_name, value)
        if count:
            _announce(old, new)
            argument = f"{key}={value}"
    return argument


def provide_hydra_callbacks() -> None:
    """Make Hydra's callbacks importable by the names of 0.1.0.

    Hydra instantiates them before it hands over the settings, so that they are not renamed in time.
    """
    for target in _HYDRA:
        *packages, module, _ = target.split(".")
        for depth in range(2, len(packages) + 2):
            name = ".".join([*packages, module][:depth])
            if name not in sys.modules:
                stand_in = ModuleType(name)
                vars(stand_in)["__getattr__"] = partial(_former_attribute, name)
                sys.modules[name] = stand_in


def _former_attribute(module: str, name: str) -> Any:
    target = f"{module}.{name}"
    if target not in TARGETS:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return resolve_name(_current_target(target))


@rank_zero_only
def _announce(old: str, new: str) -> None:
    if old not in _announced:
        _announced.add(old)
        print(f"{old} is called {new} now; the old name is accepted until the next release", file=sys.stderr)
