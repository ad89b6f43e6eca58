"""`pytorch_lightning` and `lightning.pytorch` are two name spaces of one thing: on the command line they are one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["belongs_to_the_other", "unify"]

_OTHER, _OWN = "pytorch_lightning", "lightning.pytorch"


class _Alias(MetaPathFinder, Loader):
    """Finds `lightning.pytorch.x` where `pytorch_lightning.x` is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] == _OTHER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_OWN + spec.name.removeprefix(_OTHER))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # importing has set it to the one of the alias


def unify() -> bool:
    """From here on `import pytorch_lightning` gives `lightning.pytorch`, also where the former is not installed.

    Returns:
        Whether it does; where `pytorch_lightning` has been imported before, its classes stay others.
    """
    if any(isinstance(finder, _Alias) for finder in sys.meta_path):
        return True
    if _OTHER in sys.modules:
        return False
    sys.meta_path.insert(0, _Alias())
    return True


def belongs_to_the_other(value: Any) -> bool:
    """Whether an object is of a class that `pytorch_lightning` itself has made or is the base of."""
    return any(kind.__module__.partition(".")[0] == _OTHER for kind in type(value).__mro__)
