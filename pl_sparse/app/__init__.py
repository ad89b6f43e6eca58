"""The application: settings in, a trained sparse model and its reports out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pl_sparse.app.command import main
    from pl_sparse.app.finished import load_run
    from pl_sparse.app.training import train

__all__ = ["load_run", "main", "train"]


def __getattr__(name: str) -> object:
    # Imported on first use: a look at a run's folder needs no Hydra and no training.
    if name == "load_run":
        from pl_sparse.app.finished import load_run

        return load_run
    if name == "main":
        from pl_sparse.app.cli import importing

        with importing():
            from pl_sparse.app.command import main

        return main
    if name == "train":
        from pl_sparse.app.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
