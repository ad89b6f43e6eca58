"""The formats that a configuration exports to, checked before the time for training is spent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig
from torch import Tensor

from pl_sparse.app.instantiate import each, network
from pl_sparse.app.settings import ConfigError
from pl_sparse.export.format import Export
from pl_sparse.structure import Structure

__all__ = ["make_formats", "refuse"]


def make_formats(cfg: DictConfig) -> dict[str, Export]:
    """The formats of a configuration, by name."""
    return each(cfg, "export")


def refuse(
    formats: Mapping[str, Export],
    module: LightningModule,
    data: LightningDataModule | None,
    structure: Structure,
    sparsity: float,
) -> None:
    """Find out what cannot be exported.

    Args:
        formats: by name.
        module: what is exported, trained or not.
        data: its `shape` is that of a sample; without one the module's `example_input_array` is looked at.
        structure: what is pruned together.
        sparsity: what the model has in the end.

    Raises:
        ConfigError: a format cannot represent this model.
    """
    shape = getattr(data, "shape", None)
    example = module.example_input_array if shape is None else torch.zeros(2, *shape)
    for name, format in formats.items():
        if format.weights_alone and structure.adapts:
            raise ConfigError(
                f"export={name} writes weights alone. A model of the class that loads them computes something else "
                f"than the trained one, whose units of structure={structure.label} are masked: use a format that holds "
                "the network without these units, such as export=[onnx] or export=[torch_export]"
            )
        reason = format.refusal(network(module), example if isinstance(example, Tensor) else None, structure, sparsity)
        if reason is not None:
            raise ConfigError(f"export={name}: {reason}")
