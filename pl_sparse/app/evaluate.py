"""`pl-sparse test RUN` and `pl-sparse predict RUN`: what the model of a finished run is worth, and what it says."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pl_sparse.app.finished import load_run
from pl_sparse.app.instantiate import implements
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.subcommand import guarded, parser_of
from pl_sparse.app.trainer import quiet_trainer
from pl_sparse.core.files import write_csv
from pl_sparse.core.optional import beginning

__all__ = ["predicted", "scored"]

_AT_ONCE = 256


def scored(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse test RUN`: test the model of a finished run on its test data."""
    guarded(_test, _parser("test", scored.__doc__).parse_args(arguments))


def predicted(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse predict RUN --data FILE`: what the model of a finished run says of inputs, as a table."""
    parser = _parser("predict", predicted.__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="inputs of the model, (samples, *shape), as .npy, .pt or .csv (default: the test data)",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="output: a .csv, .npy or .pt file (RUN/predictions.csv)"
    )
    guarded(_predict, parser.parse_args(arguments))


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = parser_of(name, description)
    help_ = f"samples at once: of a batch of the test data (as the run had it), or of inputs from a file ({_AT_ONCE})"
    parser.add_argument("--batch-size", type=int, metavar="N", help=help_)
    return parser


def _refuse_empty_batches(options: argparse.Namespace) -> None:
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size} must be 1 or more")


def _set_batch_size(source: LightningModule | LightningDataModule, options: argparse.Namespace) -> None:
    """Let the loaders of a run have batches of another size, where one is asked for."""
    if options.batch_size is None:
        return
    found = [name for name in ("eval_batch_size", "batch_size") if hasattr(source, name)]
    if found:
        setattr(source, found[0], options.batch_size)
    elif "batch_size" in source.hparams:
        source.hparams["batch_size"] = options.batch_size
    else:
        raise ConfigError(f"--batch-size: {type(source).__name__} of {options.run} has no batch_size that could be set")


def _check_batch_size(loaders: Any, options: argparse.Namespace) -> None:
    """Check that a size of batches that was asked for is the one that the loaders had."""
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        size = getattr(loader, "batch_size", None)
        if None not in (options.batch_size, size) and size != options.batch_size:
            raise ConfigError(
                f"--batch-size: the test data of {options.run} have batches of {size} that cannot be changed"
            )


def _test(options: argparse.Namespace) -> None:
    _refuse_empty_batches(options)
    module, data, _ = load_run(options.run, trust=options.trust)
    if not implements(module, "test_step") or (data is None and not implements(module, "test_dataloader")):
        raise ConfigError(f"{options.run}: its module has no test_step, or there are no test data")
    _set_batch_size(module if data is None else data, options)
    trainer = quiet_trainer()
    scores = trainer.test(module, datamodule=data, verbose=False)[0]
    _check_batch_size(trainer.test_dataloaders, options)
    table = Table("metric", "value", title=None)
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _predict(options: argparse.Namespace) -> None:
    _refuse_empty_batches(options)
    target = options.to or options.run / "predictions.csv"
    if target.suffix not in (".csv", ".npy", ".pt"):
        raise ConfigError(f"--to {target} must be a .csv, .npy or .pt file")
    module, data, _ = load_run(options.run, trust=options.trust)
    if options.data is None:
        _set_batch_size(module if data is None else data, options)
        out = torch.cat([_outputs(value) for value in _predicted(module, data, options.run)])
    else:
        x = _inputs(options.data, getattr(data, "shape", None))
        try:
            with torch.no_grad():
                out = torch.cat([_outputs(module(part)) for part in x.split(options.batch_size or _AT_ONCE)])
        except (RuntimeError, TypeError) as error:
            shape = tuple(x.shape)
            raise ConfigError(
                f"--data {options.data}: the model does not take inputs {shape}: {beginning(error)}"
            ) from error
    _write(out, target)
    print(f"{len(out)} predictions written to {target}")


def _predicted(module: LightningModule, data: LightningDataModule | None, run: Path) -> Iterator[Any]:
    """The outputs for the batches of the data: by `predict_step` and `predict_dataloader` where there are such."""
    source: Any = module if data is None else data
    base = LightningModule if data is None else LightningDataModule
    if type(source).predict_dataloader is not base.predict_dataloader:
        yield from quiet_trainer().predict(module, datamodule=data) or []
        return
    if type(source).test_dataloader is base.test_dataloader:
        raise ConfigError(f"{run}: its data has neither predict_dataloader nor test_dataloader: give --data FILE")
    if data is not None:
        data.prepare_data()
        data.setup("test")
    with torch.no_grad():
        for batch in source.test_dataloader():
            yield module(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _outputs(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ConfigError(f"the model gives a {type(value).__name__}, and predictions are tensors (samples, ...)")
    return value.detach().cpu()


def _inputs(path: Path, shape: Sequence[int] | None) -> Tensor:
    """The inputs of a file, (samples, *shape)."""
    if not path.is_file():
        raise ConfigError(f"--data {path} is not a file")
    try:
        if path.suffix == ".npy":
            x = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".pt":
            x = torch.load(path, weights_only=True)
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                x = torch.tensor([[float(cell) for cell in row] for row in csv.reader(file) if row])
        else:
            raise ConfigError(f"--data {path} must be a .npy, .pt or .csv file")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--data {path} cannot be read: {beginning(error)}") from error
    if not isinstance(x, Tensor) or x.dim() < 1 or not len(x):
        raise ConfigError(f"--data {path} holds no tensor of samples")
    x = x.float() if x.is_floating_point() or path.suffix == ".csv" else x
    flat = shape is not None and x.dim() == 2 and x.shape[1] == int(np.prod(shape))
    return x.reshape(-1, *shape) if flat and shape is not None else x


def _write(out: Tensor, path: Path) -> None:
    """Outputs as they are, or in a table: a row per sample, with the class of logits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, out.numpy())
    elif path.suffix == ".pt":
        torch.save(out, path)
    else:
        flat = out.reshape(len(out), -1)
        logits = out.dim() == 2 and out.shape[1] > 1
        rows = []
        for index, values in enumerate(flat.tolist()):
            row: dict[str, Any] = {"sample": index}
            if logits:
                row["class"] = max(range(len(values)), key=values.__getitem__)
            rows.append(row | {f"output_{number}": value for number, value in enumerate(values)})
        write_csv(path, rows)
