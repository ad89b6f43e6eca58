"""`pl-sparse sensitivity RUN`: what each layer of a finished run loses if it is pruned alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pl_sparse.allocation import Uniform, Units, choose
from pl_sparse.app.finished import load_run
from pl_sparse.app.instantiate import built, implements, network
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.subcommand import guarded, parser_of
from pl_sparse.app.trainer import quiet_trainer
from pl_sparse.core.files import write_csv
from pl_sparse.core.group import Group
from pl_sparse.core.targets import Targets
from pl_sparse.network.outputs import output_weights
from pl_sparse.results.direction import lost
from pl_sparse.results.judged import judged
from pl_sparse.results.style import PALETTE, remove_frame, save
from pl_sparse.scorer import Magnitude
from pl_sparse.structure import Structure

__all__ = ["is_validated", "main", "metric_of", "sensitivity", "validated", "validator"]

_LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse sensitivity RUN`: the metric of validation with each layer pruned alone, by magnitude, at several
    levels: RUN/sensitivity.csv and sensitivity.png. `allocation=sensitivity allocation.path=...` shares weights by it.
    """
    parser = parser_of("sensitivity", main.__doc__)
    parser.add_argument(
        "--levels", nargs="+", type=float, default=list(_LEVELS), help=f"sparsities ({' '.join(map(str, _LEVELS))})"
    )
    parser.add_argument("--batches", type=int, help="validation batches at each level (default: all)")
    guarded(_sensitivity, parser.parse_args(arguments))


def _sensitivity(options: argparse.Namespace) -> None:
    for level in options.levels:
        if not 0 < level <= 1:
            raise ConfigError(f"--levels {level:g} must be above 0, and 1 at most")
    if options.batches is not None and options.batches < 1:
        raise ConfigError(f"--batches {options.batches} must be 1 or more")
    module, data, cfg = load_run(options.run, options.trust)
    if not is_validated(module, data):
        raise ConfigError(f"{options.run}: its module has no validation_step, or there are no validation data")
    structure: Structure = built(cfg, "structure")
    rows, key = sensitivity(
        module, data, structure, sorted(set(options.levels)), options.batches, str(cfg.objective), options.run
    )
    table = Table("layer", "weights", *[f"{level:g}" for level in sorted(set(options.levels))], title=f"loss of {key}")
    for name in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == name and row["sparsity"] > 0]
        table.add_row(str(name), f"{of_layer[0]['weights']:,}", *[f"{row['drop']:+.4f}" for row in of_layer])
    Console().print(table)
    print(f"written: {options.run / 'sensitivity.csv'}, sensitivity.png")


def is_validated(module: LightningModule, data: LightningDataModule | None) -> bool:
    """Whether a module has a validation, and data for it."""
    return implements(module, "validation_step") and (data is not None or implements(module, "val_dataloader"))


def validator(batches: int | None = None) -> Trainer:
    """A Trainer that validates.

    Args:
        batches: of the validation data; None for all.
    """
    return quiet_trainer(limit_val_batches=1.0 if batches is None else batches)


def validated(trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> dict[str, float]:
    """What the validation of a module logs."""
    return {str(name): float(value) for name, value in trainer.validate(module, data, verbose=False)[0].items()}


def metric_of(logged: Mapping[str, float], objective: str | None = None) -> str:
    """The metric that models are judged by.

    Args:
        logged: what validation logs.
        objective: the metric, if it is among it.

    Raises:
        ConfigError: nothing that is logged says how good a model is.
    """
    name = objective if objective in logged else judged(logged)
    if name is None:
        raise ConfigError(
            f"validation logs {', '.join(logged) or 'nothing'}, and none of these measures how good the model is"
        )
    return name


@torch.no_grad()
def sensitivity(
    module: LightningModule,
    data: LightningDataModule | None,
    structure: Structure,
    levels: Sequence[float],
    batches: int | None,
    objective: str,
    folder: Path,
) -> tuple[list[dict[str, Any]], str]:
    """Prune each layer of a module alone, by magnitude; the module is left as it was.

    Args:
        module: with a `validation_step`.
        data: where validation data come from; None if the module brings its own.
        structure: what is pruned together, within a layer.
        levels: sparsities.
        batches: of the validation data; None for all.
        objective: the metric, if it is logged.
        folder: where sensitivity.csv and sensitivity.png go.

    Returns:
        a row for each layer and level, and the metric they have.

    Raises:
        ConfigError: nothing that is logged says how good the model is, or the structure joins layers.
    """
    measure = partial(validated, validator(batches), module, data)
    net, inputs = network(module), list[Any]()
    watch = net.register_forward_pre_hook(lambda _, args: inputs.append(args) if not inputs and args else None)
    try:
        whole = measure()
    finally:
        watch.remove()
    key = metric_of(whole, objective)
    if structure.needs_example:
        raise ConfigError(
            "the structure of the run joins layers, and sensitivity prunes one layer at a time: train with "
            "structure=channel or unstructured"
        )
    outputs: Collection[str] = ()
    if inputs and structure.removes_outputs:  # copies are no tensors of inference mode, which have no graph
        outputs = output_weights(net, tree_map_only(Tensor, torch.clone, inputs[0]))
    params = Targets().choose(net, structure.removes_outputs, outputs=outputs).params
    groups, _ = structure.bind(params, net, misfit="dense")
    rows = []
    for group in groups:
        row = {"layer": group.name, "weights": group.numel}
        rows.append({**row, "sparsity": 0.0, key: whole[key], "drop": 0.0})
        for level in levels if structure.fixed is None else (structure.fixed,):
            value = _pruned(group, structure, level, measure)[key]
            rows.append({**row, "sparsity": level, key: value, "drop": lost(key, whole[key], value)})
    write_csv(folder / "sensitivity.csv", rows)
    _plot(rows, folder / "sensitivity.png", key)
    return rows, key


def _pruned(group: Group, structure: Structure, level: float, measure: Any) -> dict[str, float]:
    """The metrics with one group pruned."""
    params = [param for param, _ in (*group.members, *group.companions)]
    before = [param.weight.detach().clone() for param in params]
    try:
        choose(Units([group], structure, Magnitude().score), Uniform(), level)
        for param in params:
            param.weight.mul_(param.mask)
        metrics: dict[str, float] = measure()
        return metrics
    finally:
        for param, weight in zip(params, before, strict=True):
            param.weight.copy_(weight)
            param.unset_mask()


def _plot(rows: Sequence[dict[str, Any]], path: Path, key: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["layer"] for row in rows)):
        of_layer = [row for row in rows if row["layer"] == name]
        style: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": ("-", "--", ":")[i // len(PALETTE) % 3],
        }
        axis.plot([row["sparsity"] for row in of_layer], [row[key] for row in of_layer], label=str(name), **style)
    axis.set(xlabel="sparsity of one layer alone", ylabel=key)
    remove_frame(axis)
    columns = math.ceil(len({row["layer"] for row in rows}) / 20)
    axis.legend(frameon=False, fontsize="small", ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
