"""Networks that are trained to be sparse.

`Sparsity` is the callback for a Lightning Trainer, `Pruner` the same for a plain training loop, `slim` makes a trained
network faster. The axes that a method
is made of are the packages `scorer`, `schedule`, `structure`, `allocation`, `updater`, `masking` and `regularizer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pl_sparse.app.slim import slim
    from pl_sparse.callbacks import Sparsity
    from pl_sparse.core.registry import register
    from pl_sparse.core.targets import Targets
    from pl_sparse.pruner import Pruner

__version__ = "0.2.0"
__all__ = ["Pruner", "Sparsity", "Targets", "__version__", "register", "slim"]

_HOMES = {
    "Pruner": "pl_sparse.pruner",
    "Sparsity": "pl_sparse.callbacks",
    "Targets": "pl_sparse.core.targets",
    "register": "pl_sparse.core.registry",
    "slim": "pl_sparse.app.slim",
}


def __getattr__(name: str) -> object:
    # Imported on first use: a plain loop needs no Lightning, and the core none of the rooms above it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
