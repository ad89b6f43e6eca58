"""What loggers get when a run has ended: its figures and files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

__all__ = ["closing", "publish"]

_FILES = ("metrics.json", "config.yaml", "history.csv", "layers.csv", "tickets.csv", "bench.csv")
_WEIGHTS = (
    "model.safetensors",
    "shrunk.json",
    "model.safetensors.zst",
    "model_csr.safetensors",
    "model.onnx",
    "model_int8.onnx",
)
_PICTURES = ("training.png", "layers.png", "tickets.png", "bench.png")


def publish(loggers: Iterable[Logger], folder: Path, metrics: Mapping[str, Any], step: int) -> None:
    """Hand over what a run came to: its figures as "final/...", its files and pictures where a logger keeps those.

    Weights & Biases gets the weights, too: an artifact of type model, `best` and `sparse`, which the run has made.

    Args:
        folder: where the run's files are.
        metrics: as in metrics.json.
        step: optimizer steps taken.
    """
    final = {f"final/{name}": value for name, value in _numbers(metrics)}
    files = [folder / name for name in (*_FILES, *_PICTURES) if (folder / name).is_file()]
    pictures = [path for path in files if path.name in _PICTURES]
    for logger in loggers:
        logger.log_metrics(final, step=step)
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            for path in pictures:
                logger.log_image(path.stem, [str(path)])
            artifact = wandb.Artifact(f"run-{run.id}", type="run", metadata=dict(metrics))
            for path in files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            model = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(metrics))
            for name in _WEIGHTS:
                if (folder / name).is_file():
                    model.add_file(str(folder / name))
            run.log_artifact(model, aliases=["latest", "best", "sparse" if metrics.get("sparsity") else "dense"])
        elif isinstance(logger, MLFlowLogger):
            for path in files:
                logger.experiment.log_artifact(logger.run_id, str(path))
        elif isinstance(logger, TensorBoardLogger):
            for path in pictures:
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                logger.experiment.add_image(path.stem, pixels, step, dataformats="HWC")
        logger.finalize("success")


def _numbers(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


@contextmanager
def closing() -> Iterator[None]:
    """End the Weights & Biases run that starts within, so that the next training in this process has its own."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:  # somebody else's
        yield
        return
    code = 1
    try:
        yield
        code = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=code)
