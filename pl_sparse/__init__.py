"""Networks that are trained to be sparse.

`Sparsity` is the callback for a Lightning Trainer, `Pruner` the same for a plain training loop. The axes that a method
is made of are the modules `scorer`, `schedule`, `structure`, `allocation`, `updater` and `masking`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pl_sparse.callbacks import Sparsity
    from pl_sparse.pruner import Pruner

__version__ = "0.1.0"
__all__ = ["Pruner", "Sparsity", "__version__"]


def __getattr__(name: str) -> object:
    # Imported on first use: a plain loop needs no Lightning, and a ground-floor module none of the upper ones.
    if name == "Pruner":
        from pl_sparse.pruner import Pruner

        return Pruner
    if name == "Sparsity":
        from pl_sparse.callbacks import Sparsity

        return Sparsity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
