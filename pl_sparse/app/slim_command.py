"""`pl-sparse slim MODEL --speedup 2`: a trained network of the user's, made so many times faster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from pl_sparse.app.finished import load_run
from pl_sparse.app.instantiate import make_module, network, optional
from pl_sparse.app.settings import CONF, ConfigError, options_of, target
from pl_sparse.app.slim import Slimmed, slim
from pl_sparse.app.subcommand import guarded
from pl_sparse.core.compact import expand_weights
from pl_sparse.core.optional import beginning, library
from pl_sparse.core.registry import near_misses, suggestion
from pl_sparse.tasks.classifier import Classifier

__all__ = ["main"]

_LIBRARY = "pl_sparse.tasks.pretrained"


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse slim MODEL --data DATA --speedup 2`: prune the channels of a trained network in a short fine-tuning in
    which it imitates itself, until it is so many times faster in ONNX Runtime; remove, export, measure.
    """
    guarded(_slim, _parser(main.__doc__).parse_args(arguments))


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pl-sparse slim", description=description)
    parser.add_argument(
        "model", help="the folder of a run, a checkpoint in it, module:function, a name of timm or Hugging Face"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar=("DATA", "KEY=VALUE"),
        help="an option of data=... or module:Class, and its settings (default: the data of the run)",
    )
    parser.add_argument("--weights", metavar="FILE", help="weights of a model of timm (default: those of the hub)")
    parser.add_argument("--speedup", type=float, default=2.0, help="how many times faster: batch 1, one thread (2)")
    parser.add_argument("--drop", type=float, help="largest loss of the validation metric, compared at the end")
    parser.add_argument("--int8", action="store_true", help="export with 8-bit integers as well")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of fine-tuning (10)")
    parser.add_argument("--lr", type=float, default=1e-3, help="the first learning rate of a classifier (0.001)")
    parser.add_argument("--to", type=Path, default=Path("slim"), metavar="FOLDER", help="folder of the files (slim)")
    parser.add_argument(
        "--skip-sensitivity",
        dest="sensitive",
        action="store_false",
        help="do not measure the sensitivity of each layer first",
    )
    parser.add_argument(
        "--student", metavar="NAME", help="the submodule of a LightningModule whose logits are imitated"
    )
    parser.add_argument(
        "--through-norms",
        action="store_true",
        help="prune channels that a LayerNorm or RMSNorm reads too, such as the width of a transformer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust", action="store_true", help="build whatever the run's config.yaml names")
    return parser


def _slim(options: argparse.Namespace) -> None:
    seed_everything(options.seed, workers=True, verbose=False)
    model, data = _found(options)
    keys = ("speedup", "drop", "int8", "epochs", "lr", "sensitive", "student", "through_norms")
    _, result = slim(model, data, **{key: getattr(options, key) for key in keys}, folder=options.to)
    _tell(result)
    if result.misses:
        for line in result.misses:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(3)


# What is given


def _found(options: argparse.Namespace) -> tuple[nn.Module, LightningDataModule | None]:
    """The trained model, and its data."""
    path = Path(options.model)
    run = path.parent.parent if path.suffix == ".ckpt" else path
    if options.weights is not None and (path.exists() or ":" in options.model):
        raise ConfigError(f"--weights {options.weights}: {options.model} has weights of its own")
    if path.suffix == ".ckpt" and not path.is_file():
        raise ConfigError(f"{path} is not a file: give a checkpoint, RUN/checkpoints/best.ckpt")
    if path.suffix == ".ckpt" and not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is in no folder of a run, so that its class is not known: give module:function, a function that "
            "loads and returns the model"
        )
    if (run / "config.yaml").is_file():
        module, data, _ = load_run(run, options.trust)
        if path.suffix == ".ckpt":
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
                expand_weights(tensors)
                module.load_state_dict(tensors)
            except (RuntimeError, KeyError, UnpicklingError) as error:
                raise ConfigError(f"{path} cannot be loaded into the model of {run}: {beginning(error)}") from error
        return module, _configured(options, None)[1] if options.data else data
    return _configured(options, _node(options))


def _node(options: argparse.Namespace) -> dict[str, Any]:
    """The node of a configuration that builds the model."""
    name = options.model
    if ":" in name and not Path(name).exists():
        return {"_target_": name.replace(":", ".")}
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"{name} is neither a finished run (config.yaml) nor a model of Hugging Face (config.json)")
    if Path(name).is_dir() or name.count("/") == 1:
        return {"_target_": f"{_LIBRARY}.huggingface", "name": name}
    if "/" in name or Path(name).exists():
        raise ConfigError(
            f"{name} is not a folder, checkpoint (.ckpt) or name: give RUN, module:function or a name of timm"
        )
    known = library("timm", f"{name} is not a folder, and as a name of timm", "timm").list_models()
    if name.partition(".")[0] not in known:
        close = near_misses(name, known)
        hint = suggestion(name, close) if close else "A function of yours is module:function."
        raise ConfigError(f"{name} is neither a folder of a run nor a model of timm. {hint}")
    return {"_target_": f"{_LIBRARY}.timm_model", "name": name, "pretrained": options.weights or True}


def _configured(
    options: argparse.Namespace, model: dict[str, Any] | None
) -> tuple[nn.Module, LightningDataModule | None]:
    """Build the data, and with them the model, as a run does."""
    cfg: Any = OmegaConf.create({"seed": options.seed, "label_smoothing": 0.0, "model": model or {}})
    for group, name in (("optimizer", "adamw"), ("lr_schedule", "cosine")):
        cfg[group] = OmegaConf.load(CONF / group / f"{name}.yaml")
    if options.data:
        cfg.data = _data(*options.data)
        if missing := OmegaConf.missing_keys(cfg):
            key = min(missing).removeprefix("data.")
            raise ConfigError(f"--data {options.data[0]} needs {key}: give --data {options.data[0]} {key}=...")
    data: LightningDataModule | None = optional(cfg, "data", LightningDataModule)
    if model is None:
        return nn.Identity(), data
    module, _ = make_module(cfg, data)
    return (network(module) if isinstance(module, Classifier) else module), data


def _data(name: str, *settings: str) -> Any:
    """The node of the data."""
    if ":" in name:
        node: Any = OmegaConf.create({"_target_": name.replace(":", ".")})
        target(node, "data")
    else:
        known = options_of("data")
        if name not in known:
            raise ConfigError(f"--data {name}: there is no such data. {suggestion(name, known)}")
        node = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"--data {name} {setting}: its settings are KEY=VALUE")
    return OmegaConf.merge(node, OmegaConf.from_dotlist(list(settings)))


# What came of it


def _tell(result: Slimmed) -> None:
    table = Table("", "before", "after", "", title=f"{result.folder}")
    for name, before in result.before.items():
        after = result.after[name]
        if name == result.metric:
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        else:
            fewer = "smaller" if name == "bytes" else "fewer"
            table.add_row(name, f"{before:,.0f}", f"{after:,.0f}", f"{before / max(after, 1):.2f}x {fewer}")
    for name, cost in result.exports.items():
        table.add_row(f"ms, {name}", f"{cost['dense_ms']:.3f}", f"{cost['ms']:.3f}", f"{cost['speedup']:.2f}x faster")
    console = Console()
    console.print(table)
    change = result.after[result.metric] - result.before[result.metric]
    console.print(
        f"{result.speedup:.2f}x faster (batch 1, one thread, ONNX Runtime), {result.metric} {change:+.4f}",
        highlight=False,
    )
    console.print(f"written to {result.folder}: slim.json, slim.png, model.onnx, shrunk, bench.json", highlight=False)
