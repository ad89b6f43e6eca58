"""The calls that versions of Hydra and OmegaConf spell differently, and what `_target_` may name.

Hydra 1.3 asks for `version_base`; 1.4 deprecates it. From 1.5 on Hydra instantiates nothing without a white list of
targets, which 1.4 takes already. The list has two parts. `PACKAGES` holds the libraries that configurations are made
of: it covers what Hydra itself instantiates, such as its callbacks. Below a node that is instantiated here, the targets
which that node names are on the list one by one: a configuration comes from the user's own files and command line, and
is trusted as the user's code is; `app.trust` has looked at one that comes from the folder of a run. What Hydra never
calls for a configuration, such as `os.system`, stays refused.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import hydra
import hydra.utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pl_sparse.app.nodes import targets
from pl_sparse.app.settings import CONF
from pl_sparse.results.direction import direction

__all__ = ["PACKAGES", "as_typed", "composition", "entry", "given", "instantiate", "quoted", "register_resolver"]

PACKAGES = ("pl_sparse.*", "torch.*", "lightning.*", "pytorch_lightning.*", "torchmetrics.*")
"""The libraries that `_target_` may always name."""

_WHITE_LIST = hasattr(hydra.utils, "execution_whitelist")  # since Hydra 1.4


def entry(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """`hydra.main` for train.yaml."""
    version: dict[str, Any] = {"execution_whitelist": PACKAGES} if _WHITE_LIST else {"version_base": "1.3"}
    decorated: Callable[[], Any] = hydra.main(config_path=str(CONF), config_name="train", **version)(task)
    return decorated


def composition(folder: str | os.PathLike[str] = CONF) -> AbstractContextManager[None]:
    """The context in which `hydra.compose` finds the configuration of this package.

    Args:
        folder: the configuration, where it is another one.
    """
    version: dict[str, Any] = {} if _WHITE_LIST else {"version_base": "1.3"}
    context: AbstractContextManager[None] = hydra.initialize_config_dir(str(folder), **version)
    return context


def given() -> list[str]:
    """The settings that this run was given, as they were typed; none where Hydra runs nothing."""
    return as_typed(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def as_typed(settings: Any) -> list[str]:
    """Settings of a list of Hydra's, in which `key=${other}` stays what it is."""
    plain: Any = OmegaConf.to_container(settings, resolve=False) if OmegaConf.is_config(settings) else settings
    return [str(setting) for setting in plain]


def quoted(value: object) -> str:
    """A value as a string in Hydra's grammar, whatever is in it.

    >>> quoted("it's")
    "'it\\\\'s'"
    """
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", str(value))
    ending = len(text) - len(text.rstrip("\\"))
    return f"'{text}{chr(92) * ending}'"


def instantiate(node: DictConfig, **arguments: Any) -> Any:
    """`hydra.utils.instantiate`, with the targets that the node names on the white list."""
    if _WHITE_LIST:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
        arguments["_execution_whitelist_"] = [*PACKAGES, *dict.fromkeys(targets(values))]
    return hydra.utils.instantiate(node, **arguments)


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register a resolver of interpolations, in the place of one that has its name.

    OmegaConf 2.4 calls `register_resolver` what 2.3 calls `register_new_resolver`; 2.3 has an older one by that name.
    """
    renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


register_resolver("mode_of", direction)
