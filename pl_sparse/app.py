"""The application: a configuration in, a trained sparse model and its reports out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime
from inspect import isclass, signature
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from pl_sparse.callbacks import Front, History, RandomState, Shrink, Sparsity, Status
from pl_sparse.callbacks.lines import Lines
from pl_sparse.callbacks.prefix import Prefix
from pl_sparse.callbacks.track import Track, closing, publish
from pl_sparse.callbacks.whole import WholeCheckpoints
from pl_sparse.export.shrink import save_plan
from pl_sparse.files import replacing, write_csv, write_json, write_text
from pl_sparse.naming import suggestion
from pl_sparse.report import Summary, layer_rows, plot_layers, plot_training, summary_table
from pl_sparse.schedule import Iterative, Staircase, Tickets
from pl_sparse.settings import ConfigError, check, target
from pl_sparse.sweep.identity import fingerprint
from pl_sparse.sweep.launch import arguments
from pl_sparse.sweep.prefix import prefix
from pl_sparse.sweep.runs import run
from pl_sparse.tasks.classifier import Classifier

__all__ = ["main", "train"]

T = TypeVar("T")

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The configuration: inside an installed package, beside it in a checkout."""

_AXES = ("scorer", "schedule", "structure", "allocation", "updater", "masking")


@closing()
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
    identity = fingerprint(cfg)
    if cfg.levels:
        cfg.sparsity = cfg.levels[-1]
    folder = Path(cfg.output_dir)
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path} is no file: checkpoints are in <run>/checkpoints/last.ckpt")
    seed_everything(cfg.seed, workers=True, verbose=False)

    sparsity = _sparsity(cfg)
    schedule = sparsity.pruner.schedule
    if isinstance(schedule, Tickets) and schedule.epochs is not None:
        cfg.trainer.max_epochs = schedule.training_epochs
    data: LightningDataModule | None = _built(cfg, "data") if cfg.get("data") else None
    module, cut = _module(cfg, data)
    history = History(folder / "history.csv")
    front = _front(cfg, folder, sparsity)
    status = Status(folder, cfg.objective, identity)
    before = [_built(cfg, "regularizer")] if cfg.get("regularizer") else []
    after = [_built(cfg, key) for key in ("rewind", "distill") if cfg.get(key)]
    if cfg.shrink_every is not None:
        after.append(_shrink(cfg.shrink_every))
    own = [*front, *before, sparsity, *after, history, status, RandomState()]
    try:
        if not sparsity.pruner.structure.needs_example:  # else a batch is needed
            sparsity.pruner.attach(module)
    except ValueError as error:
        if "nothing to prune" not in str(error):  # a module may build its layers later
            raise ConfigError(str(error)) from error
    shared = prefix(cfg, sparsity, cfg.trainer.max_epochs)
    trainer = _trainer(cfg, [*own, *([shared] if shared else [])])
    with status:
        try:
            _fit(cfg, trainer, module, data, own, shared)
            metrics = _finish(cfg, folder, trainer, module, data, cut, own)
        finally:
            if shared:
                shared.release()
    return metrics


def _fit(
    cfg: DictConfig,
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    own: list[Any],
    shared: Prefix | None,
) -> None:
    """Train, from the run's own checkpoint, from the start it shares with others, or from the beginning."""
    history = _one(own, History)
    start: str | None = cfg.ckpt_path
    if shared and trainer.world_size == 1:
        start, steps = shared.fork(_one(own, Sparsity), start, cfg.trainer.max_epochs)
        if steps:
            _one(own, Status).share(steps)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except (ValueError, MisconfigurationException, RuntimeError) as error:
        foreign = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
        if history.started or (isinstance(error, RuntimeError) and not foreign):
            raise
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path} is of another model: {error}" if foreign else str(error)
        ) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not history.started and trainer.global_step:
        # the checkpoint was of the end of training, and Lightning left out what comes then
        for callback in own:
            callback.on_train_start(trainer, module)
        for callback in own:
            callback.on_train_end(trainer, module)


def _finish(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    cut: str,
    own: list[Any],
) -> dict[str, Any]:
    """Test, and write what a run leaves behind."""
    sparsity = _one(own, Sparsity)
    tests = cfg.test and (data is not None or _has(module, "test_dataloader")) and _has(module, "test_step")
    rows: list[dict[str, Any]] = []
    for path in [path for callback in own if isinstance(callback, Front) for path in callback.paths]:
        saved = _load(path, trainer, module, sparsity)
        _remove(trainer, module)
        scores: dict[str, float] = {}
        loggers, trainer.loggers = trainer.loggers, []
        if _has(module, "validation_step"):
            scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
        if tests:
            scores |= trainer.test(module, datamodule=data, verbose=False)[0]
        trainer.loggers = loggers
        if trainer.is_global_zero:
            row = _metrics(cfg, path.parent, trainer, module, cut, own, scores)
            rows.append({**row, "epochs": saved["epoch"], "steps": saved["global_step"], "level": len(rows)})
    best = _load_best(trainer, module, sparsity)
    _remove(trainer, module)
    tested: Mapping[str, float] = {}
    if tests:
        tested = trainer.test(module, datamodule=data, verbose=False)[0]
    if not trainer.is_global_zero:
        return {}
    if rows:
        write_json(folder / "front.json", rows)
    metrics = _write(cfg, folder, trainer, module, cut, own, best, tested, rows)
    publish(trainer.loggers, folder, metrics, trainer.global_step)
    return metrics


def _one(own: list[Any], kind: type[T]) -> T:
    return next(callback for callback in own if isinstance(callback, kind))


def _front(cfg: DictConfig, folder: Path, sparsity: Sparsity) -> list[Front]:
    schedule = sparsity.pruner.schedule
    if cfg.levels and not isinstance(schedule, Staircase):
        raise ConfigError("levels=... are those of schedule=staircase (of schedule=tickets: schedule.sparsities=...)")
    if not cfg.front:
        return []
    if not isinstance(schedule, (Staircase, Iterative, Tickets)):
        raise ConfigError(
            f"front=true needs a schedule that rests on its levels, or the models there would not have been trained at "
            f"their sparsity, and {type(schedule).__name__.lower()} does not: use schedule=staircase "
            "levels=[0.5,0.8,0.9], schedule=iterative or schedule=tickets"
        )
    return [Front(folder)]


def _built(cfg: DictConfig, key: str) -> Any:
    """The object that a node of the configuration describes."""
    try:
        return instantiate(cfg[key])
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, TypeError, ImportError, FileNotFoundError)):
            raise ConfigError(f"{key}: {cause}") from error
        raise


def _sparsity(cfg: DictConfig) -> Sparsity:
    """The callback, its axes checked against each other and the hardware."""
    for what in ("sparsity", "label_smoothing"):
        if cfg[what] is not None and not 0 <= cfg[what] <= 1:
            raise ConfigError(f"{what}={cfg[what]} must be in [0, 1]")
    axes = {axis: _built(cfg, axis) for axis in _AXES}
    refusal = _built(cfg, "hardware").refusal(axes["structure"])
    if refusal is not None and axes["schedule"].final > 0:
        raise ConfigError(refusal)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {key: plain[key] for key in ("include", "exclude", "first", "last", "overrides", "misfit")}
    options |= {key: plain[key] for key in ("ablation", "calibration_batches")}
    try:
        return Sparsity(**axes, **options, report=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _shrink(every: int) -> Shrink:
    try:
        return Shrink(every)
    except ValueError as error:
        raise ConfigError(f"shrink_{error}") from error


def _module(cfg: DictConfig, data: LightningDataModule | None) -> tuple[LightningModule, str]:
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
    module = Classifier(
        net, facts["classes"], _built(cfg, "optimizer"), _built(cfg, "lr_schedule"), cfg.label_smoothing
    )
    return module, "net."


def _given(cfg: DictConfig, key: str, called: Any, facts: dict[str, Any]) -> Any:
    wanted = signature(called).parameters
    node = cfg[key].copy()
    for name, value in facts.items():
        if name in wanted and name not in node:
            node[name] = list(value) if isinstance(value, tuple) else value
    return _built(OmegaConf.create({key: node}), key)


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
    sharded = str(node.get("strategy")).startswith(("fsdp", "deepspeed", "model_"))  # these write their own way
    whole = {} if sharded or node.get("plugins") else {"plugins": [WholeCheckpoints()]}
    loggers = _loggers(cfg)
    callbacks += [Track()] * bool(loggers)
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    try:
        trainer: Trainer = instantiate(
            node,
            **whole,
            callbacks=callbacks,
            logger=loggers or False,
            enable_checkpointing=checkpoints,
            default_root_dir=cfg.output_dir,
            _convert_="object",
        )
    except Exception as error:
        raise ConfigError(f"trainer: {error.__cause__ or error}") from error
    return trainer


def _loggers(cfg: DictConfig) -> list[Any]:
    """All loggers, each told the settings: one that cannot reach its server says so now."""
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    loggers = _each(cfg, "logger")
    for logger in loggers:
        try:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        except Exception as error:
            hint = ". Without an account: logger.wandb.mode=offline" if "wandb" in type(error).__module__ else ""
            raise ConfigError(f"logger: {str(error).rstrip('.')}{hint}") from error
    return loggers


def _each(cfg: DictConfig, group: str) -> list[Any]:
    nodes: Any = cfg.get(group) or {}
    return [_built(nodes, name) for name, node in nodes.items() if node is not None]


def _has(module: LightningModule, hook: str) -> bool:
    return getattr(type(module), hook) is not getattr(LightningModule, hook)


def _load_best(trainer: Trainer, module: LightningModule, sparsity: Sparsity) -> int | None:
    """Take up the weights and masks of the best checkpoint at the target; the epoch it is of, or None for the last."""
    for checkpoint in trainer.checkpoint_callbacks:
        path = getattr(checkpoint, "best_model_path", "")
        if path and getattr(checkpoint, "monitor", None) and Path(path).is_file():
            return int(_load(path, trainer, module, sparsity)["epoch"])
    return None


def _load(path: str | Path, trainer: Trainer, module: LightningModule, sparsity: Sparsity) -> Mapping[str, Any]:
    saved: Mapping[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.load(trainer, module, saved)
    module.load_state_dict(saved["state_dict"])
    if sparsity.state_key in saved["callbacks"]:
        sparsity.pruner.load_state_dict(saved["callbacks"][sparsity.state_key])
    return saved


def _remove(trainer: Trainer, module: LightningModule) -> None:
    """With shrink_every, take out what was masked since the last removal; there is no more training."""
    if (shrink := Shrink.of(trainer)) is not None:
        shrink.shrink(trainer, module)


def _metrics(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    cut: str,
    own: list[Any],
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """Save the weights that the module has to `folder`/model.safetensors, and count them there."""
    weights = folder / "model.safetensors"
    tensors = {
        name.replace("_orig_mod.", "").removeprefix(cut): tensor.detach().cpu().contiguous()
        for name, tensor in module.state_dict().items()
    }
    shared: dict[int, str] = {}
    for name in list(tensors):  # safetensors refuses tensors that share memory
        if shared.setdefault(tensors[name].data_ptr(), name) != name:
            tensors[name] = tensors[name].clone()
    with replacing(weights) as temporary:
        save_file(tensors, temporary)
    if (shrink := Shrink.of(trainer)) is not None:
        save_plan(shrink.plan.below(cut), module, folder)

    history, sparsity = _one(own, History), _one(own, Sparsity)
    pruner = sparsity.pruner
    summary = sparsity.summarize(module, cut)
    prunable = [param.name.removeprefix(cut) for param in pruner.params]
    nonzero, count = _nonzeros(weights, prunable), pruner.numel
    # inputs that left the model because nothing feeds them any more were not pruned
    unread = pruner.kept - sum(int(torch.count_nonzero(param.mask)) for param in pruner.params)
    return {
        "method": cfg.method or type(pruner.scorer).__name__.lower(),
        "scorer": type(pruner.scorer).__name__.lower(),
        "schedule": type(pruner.schedule).__name__.lower(),
        "structure": pruner.structure.label,
        "allocation": type(pruner.allocation).__name__.lower(),
        "masking": type(pruner.masking).__name__.lower(),
        "seed": cfg.seed,
        "sparsity_requested": pruner.target if pruner.at_target else pruner.level,
        "sparsity": 1 - (nonzero + unread) / count,
        "sparsity_model": summary.sparsity_model,
        "at_target": pruner.at_target,
        **pruner.scorer.facts(pruner.groups),
        "params_total": summary.params_total,
        "params_left": summary.params_left,
        "params_prunable": count,
        "params_nonzero": summary.params_nonzero,
        "macs_dense": summary.macs_dense,
        "macs_sparse": summary.macs_sparse,
        **{name: float(value) for name, value in scores.items()},
        "size_bytes": {"dense": summary.bytes_dense, "compressed": summary.bytes_compressed},
        "train_seconds": round(history.seconds, 3),
        "epochs": len(history.rows),
        "steps": trainer.global_step,
        "epoch_best": None,
        "device": str(trainer.strategy.root_device),
    }


def _write(
    cfg: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    cut: str,
    own: list[Any],
    best: int | None,
    tested: Mapping[str, float],
    levels: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write what a run leaves behind, its metrics last, and tell where."""
    sparsity = _one(own, Sparsity)
    rows = _one(own, History).rows
    at_best = next((row for row in rows if best is not None and int(row["epoch"]) == best), rows[-1] if rows else {})
    scores = {name: value for name, value in at_best.items() if name.startswith(("val", "train"))}
    metrics = _metrics(cfg, folder, trainer, module, cut, own, {**scores, **tested})
    metrics |= {"sparsity_requested": sparsity.pruner.target, "epoch_best": best}
    summary = sparsity.summarize(module, cut)
    title = f"{metrics['method']}, {metrics['structure']}, sparsity {metrics['sparsity']:.4f}"
    write_csv(folder / "layers.csv", layer_rows(summary))
    if rows:
        plot_training(rows, folder / "training.png", title)
    plot_layers(summary, folder / "layers.png", title)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "metrics.json", metrics)
    _tell(folder, summary, metrics, levels)
    return metrics


def _nonzeros(path: Path, names: list[str]) -> int:
    """The weights of some tensors that are not zero, counted in the saved file."""
    with safe_open(path, framework="pt") as file:
        return sum(int(torch.count_nonzero(file.get_tensor(name))) for name in names)


_WRITTEN = {
    "metrics.json": "the figures of the run",
    "front.json": "the figures of each level",
    "training.png": "loss, accuracy and sparsity over the epochs",
    "layers.png": "density of each layer",
    "history.csv": "a row an epoch",
    "layers.csv": "a row a layer",
    "model.safetensors": "the sparse weights",
    "shrunk.json": "what was removed from the model, for export.load_shrunk",
    "tickets.png": "accuracy of each round over the remaining weights",
    "tickets.csv": "a row a round",
    "levels": "mask and weights of each round",
    "checkpoints": "best at the target sparsity, and last",
}


def _tell(folder: Path, summary: Summary, metrics: Mapping[str, Any], levels: list[dict[str, Any]]) -> None:
    console = Console()
    console.print()
    console.print(summary_table(summary))
    if levels:
        names = [
            name for name in ("sparsity", "val/acc", "test/acc", "macs_sparse", "params_nonzero") if name in levels[0]
        ]
        table = Table(*names, title="the front, each level at the end of its training")
        for row in levels:
            table.add_row(*(f"{row[name]:.4f}" if row[name] <= 1 else f"{row[name]:,.0f}" for name in names))
        console.print(table)
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
def _entry(cfg: DictConfig) -> float | tuple[float, ...] | None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data in memory needs none
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning uses a name that torch renamed
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run
    if cfg.output_dir is None:
        OmegaConf.set_struct(cfg, False)
        cfg.output_dir = HydraConfig.get().runtime.output_dir
    board = (cfg.get("logger") or {}).get("wandb")
    if board is not None and board.get("group") is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        board.group = Path(HydraConfig.get().sweep.dir).name
    return run(cfg, train)


def main() -> float | None:
    """`python train.py ...` and `pl-sparse ...`: one run, or a sweep with -m; the objective is what it returns."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, to be told in a few lines
    try:
        sys.argv[1:] = arguments(_resumed(sys.argv[1:]))
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
        sweep = {"-m", "--multirun"} & set(sys.argv)
        message = f"interrupted. It goes on with {'resume=true' if sweep else 'ckpt_path=<run>/checkpoints/last.ckpt'}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def sweep() -> float | None:
    """`pl-sparse sweep ...`: `pl-sparse train -m ...`."""
    if not {"-m", "--multirun"} & set(sys.argv):
        sys.argv.insert(1, "-m")
    return main()


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
