"""The application: a configuration in, a trained sparse model and its reports out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pl_sparse.callbacks import AccuracyBudget, History, Quantize, RandomState, Sparsity
from pl_sparse.callbacks.lines import Lines
from pl_sparse.deploy import deploy, exports, merged, refuse
from pl_sparse.files import replacing, write_csv, write_json, write_text
from pl_sparse.hardware import Hardware
from pl_sparse.naming import suggestion
from pl_sparse.quantize import integers
from pl_sparse.report import Summary, layer_rows, plot_layers, plot_training, summary_table
from pl_sparse.runs import built, make_module, network
from pl_sparse.settings import CONF, ConfigError, check

__all__ = ["main", "train"]

log = logging.getLogger(__name__)

_AXES = ("scorer", "schedule", "structure", "allocation", "updater", "masking")


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train one model as configured, test it, and write its reports to `cfg.output_dir`.

    Returns:
        the metrics, as they are in metrics.json.

    Raises:
        ConfigError: the configuration cannot be run; raised before training.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if cfg.get("output_dir") is None:
        cfg.output_dir = datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    check(cfg)
    folder = Path(cfg.output_dir)
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path} is no file: checkpoints are in <run>/checkpoints/last.ckpt")
    seed_everything(cfg.seed, workers=True, verbose=False)

    hardware: Hardware = built(cfg, "hardware")
    sparsity = _sparsity(cfg, hardware)
    data: LightningDataModule | None = built(cfg, "data") if cfg.get("data") else None
    module, prefix = make_module(cfg, data)
    quantize: Quantize | None = built(cfg, "quantization") if cfg.get("quantization") else None
    formats = exports(cfg)
    _check_types(hardware, quantize, {format.dtype for format in formats.values()})
    refuse(formats, hardware, module, data, sparsity.pruner.structure, sparsity.pruner.target or 0.0)
    history = History(folder / "history.csv")
    before = [built(cfg, "regularizer")] if cfg.get("regularizer") else []
    after = [built(cfg, key) for key in ("rewind", "distill") if cfg.get(key)]
    after += [quantize] if quantize is not None else []
    budget: list[AccuracyBudget] = [built(cfg, "target")] if cfg.get("target") else []
    trainer = _trainer(cfg, [*before, sparsity, *after, history, *budget, RandomState()])
    try:
        sparsity.pruner.attach(module)
    except ValueError as error:
        if "nothing to prune" not in str(error):  # a module may build its layers later
            raise ConfigError(str(error)) from error

    try:
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except (ValueError, MisconfigurationException, RuntimeError) as error:
        foreign = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
        if history.started or (isinstance(error, RuntimeError) and not foreign):
            raise
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path} is of another model: {error}" if foreign else str(error)
        ) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    best = budget[0].epoch if budget else _load_best(trainer, module, sparsity, quantize)
    tested: Mapping[str, float] = {}
    if cfg.test and (data is not None or _has(module, "test_dataloader")) and _has(module, "test_step"):
        tested = trainer.test(module, datamodule=data, verbose=False)[0]

    if not trainer.is_global_zero:
        return {}
    converted, zeros = (None, {}) if quantize is None else _integers(quantize, module, sparsity, folder)
    metrics = _write(cfg, folder, trainer, module, prefix, sparsity, history, best, {**tested, **zeros})
    if formats:
        found = deploy(module, data, formats, folder, hardware, converted, cfg.export_measure)
        metrics = merged(metrics, found)
        write_json(folder / "metrics.json", metrics)
    return metrics


def _sparsity(cfg: DictConfig, hardware: Hardware) -> Sparsity:
    """The callback, its axes checked against each other and the hardware."""
    for what in ("sparsity", "label_smoothing"):
        if cfg[what] is not None and not 0 <= cfg[what] <= 1:
            raise ConfigError(f"{what}={cfg[what]} must be in [0, 1]")
    axes = {axis: built(cfg, axis) for axis in _AXES}
    objection = hardware.objection(axes["structure"], axes["schedule"].final)
    if objection is not None and axes["schedule"].final > 0:
        if hardware.strict:
            raise ConfigError(objection)
        rank_zero_warn(objection)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {key: plain[key] for key in ("include", "exclude", "first", "last", "overrides", "misfit")}
    options |= {key: plain[key] for key in ("ablation", "calibration_batches")}
    try:
        return Sparsity(**axes, **options, report=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _check_types(hardware: Hardware, quantize: Quantize | None, written: set[str]) -> None:
    """The type of the weights is one that the hardware computes with, and that the exports can have."""
    trained = "float32" if quantize is None else quantize.quantization.dtype
    if "int8" in written and trained == "int4":
        raise ConfigError("export=onnx_int8 has 8-bit weights, and quantization=int4_weight trains 4-bit ones")
    refusal = hardware.refusal("int8" if "int8" in written else trained)
    if refusal is not None:
        raise ConfigError(refusal + (", or export=onnx_int8" if "int8" in hardware.dtypes else ""))


def _trainer(cfg: DictConfig, callbacks: list[Any]) -> Trainer:
    node = cfg.trainer.copy()
    if node.get("deterministic") is None:
        node.deterministic = node.get("accelerator") == "cpu" or (
            node.get("accelerator") == "auto" and not torch.accelerator.is_available()
        )
    if node.get("enable_progress_bar") is None:
        node.enable_progress_bar = sys.stderr.isatty()
    if not node.enable_progress_bar:
        callbacks.append(Lines())
    callbacks += [built for built in _each(cfg, "callbacks") if built is not None]
    loggers = list(_each(cfg, "logger"))
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    try:
        trainer: Trainer = instantiate(
            node,
            callbacks=callbacks,
            logger=loggers or False,
            enable_checkpointing=checkpoints,
            default_root_dir=cfg.output_dir,
            _convert_="object",
        )
    except Exception as error:
        raise ConfigError(f"trainer: {error.__cause__ or error}") from error
    return trainer


def _each(cfg: DictConfig, group: str) -> list[Any]:
    nodes: Any = cfg.get(group) or {}
    return [built(nodes, name) for name, node in nodes.items() if node is not None]


def _has(module: LightningModule, hook: str) -> bool:
    return getattr(type(module), hook) is not getattr(LightningModule, hook)


def _load_best(trainer: Trainer, module: LightningModule, sparsity: Sparsity, quantize: Quantize | None) -> int | None:
    """Take up the weights and masks of the best checkpoint at the target; the epoch it is of, or None for the last."""
    for checkpoint in trainer.checkpoint_callbacks:
        path = getattr(checkpoint, "best_model_path", "")
        if path and getattr(checkpoint, "monitor", None) and Path(path).is_file():
            saved = trainer.strategy.load_checkpoint(path, weights_only=True)
            module.load_state_dict(saved["state_dict"])
            if sparsity.state_key in saved["callbacks"]:
                sparsity.pruner.load_state_dict(saved["callbacks"][sparsity.state_key])
            if quantize is not None:
                quantize.quantization.load_state_dict(saved["callbacks"][quantize.state_key]["ranges"])
            return int(saved["epoch"])
    return None


def _integers(
    quantize: Quantize, module: LightningModule, sparsity: Sparsity, folder: Path
) -> tuple[nn.Module, dict[str, float]]:
    """The network with integers, and the fraction of zeros among them; the module is in floating point again."""
    quantization, net = quantize.quantization, network(module)
    ranges = quantization.state_dict()
    if ranges:
        with replacing(folder / "ranges.safetensors") as temporary:
            save_file(ranges, temporary)
    module.cpu()
    converted = quantization.convert()
    quantization.release()
    found = integers(converted, net)
    with torch.no_grad():  # where a weight of the plain class can have the rounded values, it has them
        for name, weight in converted.named_parameters():
            if hasattr(weight, "dequantize") and hasattr(weight, "qdata"):
                net.get_parameter(name).copy_(weight.dequantize())
    names = {id(weight): name for name, weight in net.named_parameters()}
    pruned = [names[id(param.weight)] for param in sparsity.pruner.params if id(param.weight) in names]
    kept = [found[name] for name in pruned if name in found]
    left = [name for name in pruned if name not in found]
    if left:
        rank_zero_warn(f"{', '.join(left)} stay in floating point: quantization={quantization.dtype} does not fit them")
    count = sum(value.numel() for value in kept)
    if not count:
        return converted, {}
    return converted, {"sparsity_quantized": 1 - sum(int(torch.count_nonzero(value)) for value in kept) / count}


def _write(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    prefix: str,
    sparsity: Sparsity,
    history: History,
    best: int | None,
    tested: Mapping[str, float],
) -> dict[str, Any]:
    """Write what a run leaves behind, and tell where."""
    weights = folder / "model.safetensors"
    tensors = {
        name.replace("_orig_mod.", "").removeprefix(prefix): tensor.detach().cpu().contiguous()
        for name, tensor in module.state_dict().items()
    }
    shared: dict[int, str] = {}
    for name in list(tensors):  # safetensors refuses tensors that share memory
        if shared.setdefault(tensors[name].data_ptr(), name) != name:
            tensors[name] = tensors[name].clone()
    with replacing(weights) as temporary:
        save_file(tensors, temporary)

    summary = sparsity.summarize(module, prefix)
    prunable = [param.name.removeprefix(prefix) for param in sparsity.pruner.params]
    nonzero, count = _nonzeros(weights, prunable)
    pruner = sparsity.pruner
    rows = history.rows
    at_best = next((row for row in rows if best is not None and int(row["epoch"]) == best), rows[-1] if rows else {})
    metrics: dict[str, Any] = {
        "method": cfg.method or type(pruner.scorer).__name__.lower(),
        "scorer": type(pruner.scorer).__name__.lower(),
        "schedule": type(pruner.schedule).__name__.lower(),
        "structure": pruner.structure.label,
        "allocation": type(pruner.allocation).__name__.lower(),
        "masking": type(pruner.masking).__name__.lower(),
        "seed": cfg.seed,
        "sparsity_requested": pruner.target,
        "sparsity": 1 - nonzero / count,
        "sparsity_model": summary.sparsity_model,
        "at_target": pruner.at_target,
        **pruner.scorer.facts(pruner.groups),
        "params_total": summary.params_total,
        "params_prunable": count,
        "params_nonzero": summary.params_nonzero,
        "macs_dense": summary.macs_dense,
        "macs_sparse": summary.macs_sparse,
        **{name: value for name, value in at_best.items() if name.startswith(("val", "train"))},
        **{name: float(value) for name, value in tested.items()},
        "size_bytes": {"dense": summary.bytes_dense, "compressed": summary.bytes_compressed},
        "train_seconds": round(history.seconds, 3),
        "epochs": len(rows),
        "steps": trainer.global_step,
        "epoch_best": best,
        "device": str(trainer.strategy.root_device),
    }
    title = f"{metrics['method']}, {metrics['structure']}, sparsity {metrics['sparsity']:.4f}"
    write_csv(folder / "layers.csv", layer_rows(summary))
    if rows:
        plot_training(rows, folder / "training.png", title)
    plot_layers(summary, folder / "layers.png", title)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "metrics.json", metrics)
    _tell(folder, summary, metrics, prefix)
    return metrics


def _nonzeros(path: Path, names: list[str]) -> tuple[int, int]:
    """Non-zero and all weights of some tensors, counted in the saved file."""
    nonzero = count = 0
    with safe_open(path, framework="pt") as file:
        for name in names:
            tensor = file.get_tensor(name)
            nonzero += int(torch.count_nonzero(tensor))
            count += tensor.numel()
    return nonzero, count


_WRITTEN = {
    "metrics.json": "the figures of the run",
    "training.png": "loss, accuracy and sparsity over the epochs",
    "layers.png": "density of each layer",
    "history.csv": "a row an epoch",
    "layers.csv": "a row a layer",
    "model.safetensors": "the sparse weights",
    "tickets.png": "accuracy of each round over the remaining weights",
    "tickets.csv": "a row a round",
    "levels": "mask and weights of each round",
    "ranges.safetensors": "ranges of the activations",
    "checkpoints": "best at the target sparsity, and last",
}


def _tell(folder: Path, summary: Summary, metrics: Mapping[str, Any], prefix: str) -> None:
    console = Console()
    console.print()
    console.print(summary_table(summary))
    scores = [(name, metrics[name]) for name in ("val/acc", "test/acc", "test/loss") if name in metrics]
    line = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    epoch = metrics["epoch_best"]
    which = f"best at the target: epoch {epoch + 1}" if epoch is not None else "last epoch"
    console.print(f"{line} ({which} of {metrics['epochs']}, {metrics['train_seconds']:.1f} s of training)".lstrip())
    console.print(f"\nwritten to {folder}:", highlight=False, soft_wrap=True)
    for name, what in _WRITTEN.items():
        if (folder / name).exists():
            console.print(f"  {name:<18} {what}", highlight=False)


# The command


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _entry(cfg: DictConfig) -> float | None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data in memory needs none
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning uses a name that torch renamed
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run
    if cfg.output_dir is None:
        OmegaConf.set_struct(cfg, False)
        cfg.output_dir = HydraConfig.get().runtime.output_dir
    metrics = train(cfg)
    value = metrics.get(cfg.objective)
    return None if value is None else float(value)


def main() -> float | None:
    """`python train.py ...` and `pl-sparse ...`: one run, or a sweep with -m; the objective is what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, to be told in a few lines
    sys.argv[1:] = _resumed(sys.argv[1:])
    try:
        result: float | None = _entry()
        return result
    except ConfigError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = _explained(error, sys.argv[1:])
    except (FileNotFoundError, ImportError) as error:
        if not str(error):
            raise
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted. It goes on with ckpt_path=<run>/checkpoints/last.ckpt"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _resumed(arguments: list[str]) -> list[str]:
    """With `ckpt_path` of a run, that run's own settings and folder, before those given."""
    given = {argument.partition("=")[0].lstrip("+~"): argument.partition("=")[2] for argument in arguments}
    path = given.get("ckpt_path", "null").strip("'\"")
    run = Path(path).parent.parent
    saved = run / ".hydra" / "overrides.yaml"
    if path == "null" or not saved.is_file():
        return arguments
    earlier = [
        override
        for override in OmegaConf.load(saved)
        if str(override).partition("=")[0].lstrip("+~") not in {*given, "ckpt_path", "output_dir"}
    ]
    placed = [] if "hydra.run.dir" in given else [f"hydra.run.dir='{run}'"]
    return [*map(str, earlier), *placed, *arguments]


def _explained(error: BaseException, arguments: list[str]) -> str:
    """The message of a composition error with what was probably meant."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = str(error).strip().splitlines()[0]
    for found in chain:
        options = getattr(found, "options", None)
        missing = getattr(found, "missing_cfg_file", None)
        if options and missing:
            group, _, name = str(missing).rpartition("/")
            return f"{group}={name}: there is no such {group}. {suggestion(name, options)}"
        if missing and (CONF / str(missing)).parent.is_dir():  # one of a list: export=[onnx,csv]
            group, _, name = str(missing).rpartition("/")
            names = [path.stem for path in (CONF / group).glob("*.yaml")]
            return f"{group}={name}: there is no such {group}. {suggestion(name, names)}"
    keys = [argument.partition("=")[0].lstrip("+~") for argument in arguments if "=" in argument]
    known = _keys(arguments)
    wrong = [key for key in keys if key not in known and not key.startswith("hydra")]
    if wrong:
        return f"{wrong[0]} is no setting. {suggestion(wrong[0], known) if _near(wrong[0], known) else ''}".strip()
    return text


def _near(word: str, known: set[str]) -> bool:
    return suggestion(word, known).startswith("Did")


def _keys(arguments: list[str]) -> set[str]:
    """Every setting that the chosen groups have."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [argument for argument in arguments if argument.partition("=")[0] in groups and "," not in argument]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            cfg = hydra.compose("train", chosen)
        except Exception:
            cfg = hydra.compose("train")
    keys = set(groups)

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                name = f"{path}.{key}" if path else str(key)
                keys.add(name)
                walk(value, name)

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys


if __name__ == "__main__":
    main()
