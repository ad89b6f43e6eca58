"""The model, data and configuration of a finished run, from its folder."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from pl_sparse.app.aliases import current_targets
from pl_sparse.app.instantiate import make_module, network, optional
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.trust import read_settings
from pl_sparse.structure import Structure
from pl_sparse.surgery.saved import load_shrunk

__all__ = ["load_run"]


def load_run(
    folder: str | os.PathLike[str], trust: bool = False
) -> tuple[LightningModule, LightningDataModule | None, DictConfig]:
    """Load the trained module of a finished run, its data and its configuration.

    A module that was shrunk in training has the shapes that it ended with.

    Args:
        folder: the run's `output_dir`, with config.yaml and model.safetensors.
        trust: whether to build whatever its config.yaml names. Otherwise names are limited to parts of a run, of
            pl_sparse, torch, lightning, torchmetrics and the modules of the current folder
            ([security.md](docs/security.md)).

    Returns:
        the module in evaluation mode, its data (None if it brings its own), and the configuration with the current
        names of classes.

    Raises:
        ConfigError: it is not the folder of a finished run, names something that is not trusted, or its weights belong
            to another model.
    """
    folder = Path(folder)
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is not a folder of a finished run: it has no {name}")
    way = "add --trust, in Python load_run(..., trust=True)"
    cfg = current_targets(read_settings(folder / "config.yaml", folder, way, trust))
    data: LightningDataModule | None = optional(cfg, "data")
    module, prefix = make_module(cfg, data)
    try:
        if (folder / "shrunk.json").is_file():
            load_shrunk(network(module), folder)
        else:
            tensors = load_file(folder / "model.safetensors")
            module.load_state_dict({prefix + name: value for name, value in tensors.items()})
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the weights in {folder} belong to another model than its config.yaml: {error}") from error
    structure: Structure | None = optional(cfg, "structure", Structure)
    if structure is not None:
        structure.adapt(module)
    return module.eval(), data, cfg
