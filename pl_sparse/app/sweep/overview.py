"""The Hydra callback that compares the runs of a sweep at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from pl_sparse.integrations.wandb_report import hand_over_sweep
from pl_sparse.results.fronts import AXES
from pl_sparse.results.overview import overview
from pl_sparse.results.runs import gather

__all__ = ["Overview"]


class Overview(Callback):
    """Writes the overview of a multirun into its folder when its last run has ended, and hands it to wandb if that is a
    logger of the runs.

    Args:
        axis: what the picture and the hypervolume compare accuracies with: sparsity, size, macs, latency, exported.
        drop: how much accuracy the smallest model may lose against the dense one.
    """

    def __init__(self, axis: str = "sparsity", drop: float = 0.01) -> None:
        self.axis = axis
        self.drop = drop

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if not folder.is_dir() or not any(run.models for run in gather([folder])):
            return
        try:
            overview([folder], folder, AXES[self.axis], drop=self.drop)
        except ValueError as error:  # runs of a module that has no accuracy on test data
            print(f"no overview: {error}")
            return
        if "wandb" in (config.get("logger") or {}):
            hand_over_sweep(config.logger.wandb, folder)
