"""From nodes of a configuration to the objects that they describe, the module to train above all."""

from __future__ import annotations

from inspect import Parameter, isclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_sparse.app.explanation import is_of_the_user
from pl_sparse.app.hydra_api import given, instantiate
from pl_sparse.app.namespaces import belongs_to_the_other
from pl_sparse.app.settings import ConfigError, parameters_of, target
from pl_sparse.core.optional import beginning
from pl_sparse.tasks.classifier import Classifier
from pl_sparse.tasks.lr import LRSchedule

__all__ = ["built", "each", "implements", "make_module", "network", "optional", "refuse_other_outputs"]

_OF_CLASSIFIER = ("optimizer", "lr_schedule", "label_smoothing")
"""Settings that the `Classifier` alone reads."""


def built(cfg: DictConfig, key: str, kind: type = object, where: str = "") -> Any:
    """The object that a node of the configuration describes.

    Args:
        key: the node's, below `cfg`.
        kind: what it has to be.
        where: the key from the top, for messages, if it is another.

    Raises:
        ConfigError: its class refuses the arguments, needs a package that is missing, or is another kind of thing.
    """
    try:
        made = instantiate(cfg[key])
    except Exception as error:
        cause = error.__cause__ or error
        if is_of_the_user(cause) and not isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, (ValueError, TypeError, ImportError, FileNotFoundError)):
            raise ConfigError(f"{where or key}: {cause}") from error
        settings = ", ".join(f"{name}={value}" for name, value in cfg[key].items() if not str(name).startswith("_"))
        reason = (str(cause).strip().splitlines() or [""])[0]
        raise ConfigError(f"{where or key}: {type(cause).__name__}: {reason} (of {settings})") from error
    if not isinstance(made, kind):
        name = cfg[key].get("_target_", "a dictionary without _target_")
        raise ConfigError(
            f"{where or key}={name} gives a {type(made).__name__}, which is not a {kind.__module__}.{kind.__name__}"
        )
    return made


def optional(cfg: DictConfig, key: str, kind: type = object) -> Any:
    """The object of a node, which has to be of a kind; None where the node is empty or missing."""
    return built(cfg, key, kind) if cfg.get(key) else None


def each(cfg: DictConfig, group: str, kind: type = object) -> dict[str, Any]:
    """The objects of all nodes of a group, by name, without those that are null."""
    nodes: Any = cfg.get(group) or {}
    return {str(name): built(nodes, name, kind, f"{group}.{name}") for name, node in nodes.items() if node is not None}


def make_module(cfg: DictConfig, data: LightningDataModule | None) -> tuple[LightningModule, str]:
    """Build the module to train.

    A LightningModule is taken as it is, and `optimizer`, `lr_schedule` and `label_smoothing`, which it does not read,
    leave the configuration. Any other model is given `shape` and `classes`, if it asks for them, and is wrapped into a
    `Classifier`. A model that has `preprocessing` gives it to data that has `adapt`.

    Args:
        cfg: with `model`, and for a classifier `optimizer`, `lr_schedule` and `label_smoothing`.
        data: what `shape` and `classes` are taken from.

    Returns:
        the module, and the prefix of its weights' names that files and reports leave out.

    Raises:
        ConfigError: the model is not a LightningModule, and the data has no classes; or it trains itself, and is the
            LightningModule of another package; or the command sets what nothing reads.
    """
    if not cfg.get("model"):
        raise ConfigError("model is missing: give model=... or model._target_=package.Class")
    facts = {key: getattr(data, key) for key in ("shape", "classes") if getattr(data, key, None) is not None}
    model = _built_with(cfg, "model", facts)
    adapt = getattr(data, "adapt", None)
    if hasattr(model, "preprocessing") and adapt is not None:
        adapt(model.preprocessing)
    if isinstance(model, LightningModule):
        _leave_out_what_it_does_not_read(cfg)
        return model, ""
    name = cfg.model._target_
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={name} gives a {type(model).__name__}, which is not a torch.nn.Module")
    _refuse_other_modules(model, name)
    if "classes" not in facts:
        missing = "there is no data with" if data is None else f"data={type(data).__name__} has no"
        raise ConfigError(
            f"model={name} is not a LightningModule, and {missing} `classes` to train it as a classifier: wrap it in a "
            "LightningModule with training_step and configure_optimizers, or give the data module `classes`"
        )
    for key in ("optimizer", "lr_schedule"):
        if not cfg.get(key):
            raise ConfigError(f"{key} is left out, and model={name} is trained as a classifier, which needs one")
    optimizer, lr_schedule = built(cfg, "optimizer"), built(cfg, "lr_schedule", LRSchedule)
    made = getattr(optimizer, "func", optimizer)
    if not callable(optimizer) or (isclass(made) and not issubclass(made, Optimizer)):
        kind = getattr(made, "__name__", type(made).__name__)
        raise ConfigError(f"optimizer={kind} is not a torch.optim.Optimizer with _partial_: true, as optimizer=sgd is")
    return Classifier(model, facts["classes"], optimizer, lr_schedule, cfg.label_smoothing), "net."


def _leave_out_what_it_does_not_read(cfg: DictConfig) -> None:
    """Take the settings of a `Classifier` out, and refuse those that were typed."""
    for setting in given():
        key = setting.partition("=")[0].lstrip("+")
        if key.partition(".")[0] in _OF_CLASSIFIER:
            raise ConfigError(
                f"nothing reads {setting}: model={cfg.model._target_} is a LightningModule, and has its own "
                "optimizer, schedule and loss. Its own settings are model.KEY=..."
            )
    struct = OmegaConf.is_struct(cfg)
    OmegaConf.set_struct(cfg, False)
    for key in _OF_CLASSIFIER:
        cfg.pop(key, None)
    OmegaConf.set_struct(cfg, struct)


def _refuse_other_modules(model: Any, name: str) -> None:
    """Refuse a model that has a training of its own which `lightning.pytorch` does not take."""
    if belongs_to_the_other(model):
        raise ConfigError(
            f"model={name} is a module of pytorch_lightning, and the Trainer is one of lightning.pytorch: import "
            "lightning.pytorch as pl, or call pl_sparse.app.namespaces.unify() before it is imported"
        )
    if callable(getattr(model, "training_step", None)):
        raise ConfigError(
            f"model={name} has a training_step, but is not a LightningModule of lightning.pytorch: derive it from that"
        )


@torch.no_grad()
def refuse_other_outputs(module: Classifier, data: LightningDataModule, name: str) -> None:
    """Classify a batch, before training, with a network that was not written for this package.

    Args:
        module: with the network; it stays as it is.
        data: where the batch comes from.
        name: of the network, for the message.

    Raises:
        ConfigError: the batch is not a pair of inputs and labels, or the network gives no logits (batch, classes).
    """
    wrap = "wrap the network in a LightningModule whose training_step computes its loss"
    training = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices=[]):
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(x, Tensor) for x in batch):
            raise ConfigError(
                f"model={name} is trained as a classifier, on pairs of inputs and labels, and a batch of "
                f"data={type(data).__name__} is {_described(batch)}: {wrap}"
            )
        try:
            out = module.eval()(batch[0][:2])
        except Exception as error:
            if is_of_the_user(error) and not isinstance(error, (RuntimeError, TypeError)):
                raise
            shape = tuple(batch[0].shape)
            raise ConfigError(
                f"model={name} does not take inputs of shape {shape} of the data: {beginning(error)}"
            ) from error
        finally:
            for part, mode in training.items():
                part.training = mode
    if not isinstance(out, Tensor) or out.shape != (len(batch[0][:2]), module.classes):
        raise ConfigError(
            f"model={name} gives {_described(out)}, and a classifier logits (batch, {module.classes}): {wrap}"
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    parts = f" of {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    return f"a {type(value).__name__}{parts}"


def _built_with(cfg: DictConfig, key: str, facts: dict[str, Any]) -> Any:
    """The object of a node, with the facts that its constructor takes and the node does not set."""
    parameters, _ = parameters_of(target(cfg[key], key))
    node: Any = OmegaConf.create(OmegaConf.to_container(cfg[key], resolve=True))  # what it takes from elsewhere, too
    for name, value in facts.items():
        if name in parameters and name not in node:
            node[name] = list(value) if isinstance(value, tuple) else value
    lacking = [name for name in ("shape", "classes") if name in parameters and name not in node]
    if lacking and parameters[lacking[0]].default is Parameter.empty:
        way = "data.size=..." if lacking == ["shape"] and "size" in (cfg.get("data") or {}) else "data=..."
        raise ConfigError(
            f"{key}={node._target_} takes {' and '.join(lacking)} of the data, which has none: give {way}"
        )
    return built(OmegaConf.create({key: node}), key)


def network(module: LightningModule) -> nn.Module:
    """What of a module is deployed: the network of a `Classifier`, else the module itself, by its `forward`."""
    return module.net if isinstance(module, Classifier) else module


def implements(module: LightningModule, hook: str) -> bool:
    """Whether a module has a hook of its own."""
    return getattr(type(module), hook) is not getattr(LightningModule, hook)
