"""A configuration's data and model, and those of a run that is finished."""

from __future__ import annotations

import os
from inspect import isclass, signature
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn

from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.settings import ConfigError, target
from pl_sparse.surgery.saved import load_shrunk
from pl_sparse.tasks.classifier import Classifier

__all__ = ["built", "load_run", "make_module", "network"]


def built(cfg: DictConfig, key: str) -> Any:
    """The object that a node of the configuration describes.

    Raises:
        ConfigError: its class refuses the arguments, or needs a package that is missing.
    """
    try:
        return instantiate(cfg[key])
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, TypeError, ImportError, FileNotFoundError)):
            raise ConfigError(f"{key}: {cause}") from error
        raise


def make_module(cfg: DictConfig, data: LightningDataModule | None) -> tuple[LightningModule, str]:
    """The module to train, and the prefix of its weights' names that reports leave out.

    A LightningModule is taken as it is; any other model is given `shape` and `classes`, if it asks for them, and is
    wrapped into a `Classifier`.
    """
    called = target(cfg.model, "model")
    facts = {key: getattr(data, key) for key in ("shape", "classes") if hasattr(data, key)}
    if isclass(called) and issubclass(called, LightningModule):
        module: LightningModule = _given(cfg, "model", called, facts)
        return module, ""
    net = _given(cfg, "model", called, facts)
    if isinstance(net, LightningModule):
        return net, ""
    if "classes" not in facts:
        raise ConfigError(
            f"model={cfg.model._target_} is no LightningModule, and data has no `classes` to train it as a classifier"
        )
    module = Classifier(net, facts["classes"], built(cfg, "optimizer"), built(cfg, "lr_schedule"), cfg.label_smoothing)
    return module, "net."


def _given(cfg: DictConfig, key: str, called: Any, facts: dict[str, Any]) -> Any:
    wanted = signature(called).parameters
    node = cfg[key].copy()
    for name, value in facts.items():
        if name in wanted and name not in node:
            node[name] = list(value) if isinstance(value, tuple) else value
    return built(OmegaConf.create({key: node}), key)


def network(module: LightningModule) -> nn.Module:
    """What of a module is deployed: the network of a `Classifier`, else the module itself, by its `forward`."""
    return module.net if isinstance(module, Classifier) else module


def load_run(folder: str | os.PathLike[str]) -> tuple[LightningModule, LightningDataModule | None, DictConfig]:
    """The trained module of a finished run, its data and its configuration.

    A module that was shrunk in training has the shapes that it ended with.

    Args:
        folder: what `output_dir` was, with config.yaml and model.safetensors.

    Raises:
        ConfigError: it is no folder of a finished run, or its model is not the one whose weights are there.
    """
    folder = Path(folder)
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no folder of a finished run: it has no {name}")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    data = built(cfg, "data") if cfg.get("data") else None
    module, prefix = make_module(cfg, data)
    try:
        if (folder / "shrunk.json").is_file():
            load_shrunk(network(module), folder)
        else:
            tensors = load_file(folder / "model.safetensors")
            module.load_state_dict({prefix + name: value for name, value in tensors.items()})
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the weights in {folder} are of another model than its config.yaml: {error}") from error
    return module.eval(), data, cfg
