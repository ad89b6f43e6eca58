"""From nodes of a configuration to the objects that they describe, the module to train above all."""

from __future__ import annotations

from inspect import signature
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pl_sparse.app.hydra_api import instantiate
from pl_sparse.app.namespaces import belongs_to_the_other
from pl_sparse.app.settings import ConfigError, target
from pl_sparse.tasks.classifier import Classifier

__all__ = ["built", "each", "make_module", "network", "optional"]


def built(cfg: DictConfig, key: str) -> Any:
    """The object that a node of the configuration describes.

    Args:
        key: the node's, below `cfg`.

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


def optional(cfg: DictConfig, key: str) -> Any:
    """The object of a node; None where the node is empty or missing."""
    return built(cfg, key) if cfg.get(key) else None


def each(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The objects of all nodes of a group, by name, without those that are null."""
    nodes: Any = cfg.get(group) or {}
    return {str(name): built(nodes, name) for name, node in nodes.items() if node is not None}


def make_module(cfg: DictConfig, data: LightningDataModule | None) -> tuple[LightningModule, str]:
    """Build the module to train.

    A LightningModule is taken as it is; any other model is given `shape` and `classes`, if it asks for them, and is
    wrapped into a `Classifier`.

    Args:
        cfg: with `model`, and for a classifier `optimizer`, `lr_schedule` and `label_smoothing`.
        data: what `shape` and `classes` are taken from.

    Returns:
        the module, and the prefix of its weights' names that files and reports leave out.

    Raises:
        ConfigError: the model is no LightningModule, and the data has no classes; or it trains itself, and is the
            LightningModule of another package.
    """
    facts = {key: getattr(data, key) for key in ("shape", "classes") if hasattr(data, key)}
    model = _built_with(cfg, "model", facts)
    if isinstance(model, LightningModule):
        return model, ""
    _refuse_other_modules(model, cfg.model._target_)
    if "classes" not in facts:
        raise ConfigError(
            f"model={cfg.model._target_} is no LightningModule, and data has no `classes` to train it as a classifier"
        )
    optimizer, lr_schedule = built(cfg, "optimizer"), built(cfg, "lr_schedule")
    return Classifier(model, facts["classes"], optimizer, lr_schedule, cfg.label_smoothing), "net."


def _refuse_other_modules(model: Any, name: str) -> None:
    """Refuse a model that has a training of its own which `lightning.pytorch` does not take."""
    if belongs_to_the_other(model):
        raise ConfigError(
            f"model={name} is a module of pytorch_lightning, and the Trainer is one of lightning.pytorch: import "
            "lightning.pytorch as pl, or call pl_sparse.app.namespaces.unify() before it is imported"
        )
    if callable(getattr(model, "training_step", None)):
        raise ConfigError(
            f"model={name} has a training_step, but is no LightningModule of lightning.pytorch: derive it from that"
        )


def _built_with(cfg: DictConfig, key: str, facts: dict[str, Any]) -> Any:
    """The object of a node, with the facts that its constructor takes and the node does not set."""
    parameters = signature(target(cfg[key], key)).parameters
    node = cfg[key].copy()
    for name, value in facts.items():
        if name in parameters and name not in node:
            node[name] = list(value) if isinstance(value, tuple) else value
    return built(OmegaConf.create({key: node}), key)


def network(module: LightningModule) -> nn.Module:
    """What of a module is deployed: the network of a `Classifier`, else the module itself, by its `forward`."""
    return module.net if isinstance(module, Classifier) else module
