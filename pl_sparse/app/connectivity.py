"""`pl-sparse connectivity RUN RUN`: loss and accuracy on the straight line between the weights of two runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_sparse.app.finished import load_run
from pl_sparse.app.sensitivity import is_validated, metric_of, validated, validator
from pl_sparse.app.settings import ConfigError
from pl_sparse.app.subcommand import guarded, parser_of
from pl_sparse.app.trainer import quiet_trainer
from pl_sparse.core.files import write_csv
from pl_sparse.network.probe import NORMS
from pl_sparse.results.direction import direction, lost
from pl_sparse.results.style import BLUE, GREY, remove_frame, save

__all__ = ["barrier", "connectivity", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse connectivity RUN RUN`: validation on the straight line between the weights of two runs, and how high
    the barrier between them is: connectivity.csv and connectivity.png in the folder of the first.
    """
    parser = parser_of("connectivity", main.__doc__)
    parser.add_argument("other", type=Path, help="the folder of another finished run of the same network")
    parser.add_argument("--points", type=int, default=11, help="number of points on the line, both ends included (11)")
    parser.add_argument("--batches", type=int, help="validation batches at each point (default: all)")
    parser.add_argument(
        "--norm-batches",
        type=int,
        default=50,
        help="training batches from which the statistics of batch norms are taken at each point (50)",
    )
    parser.add_argument("--folder", type=Path, help="folder of the results (default: that of the first run)")
    guarded(_connectivity, parser.parse_args(arguments))


def _connectivity(options: argparse.Namespace) -> None:
    for name, least in (("points", 3), ("batches", 1), ("norm_batches", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be {least} or more")
    module, data, cfg = load_run(options.run, options.trust)
    other, _, other_cfg = load_run(options.other, options.trust)
    if not is_validated(module, data):
        raise ConfigError(f"{options.run}: its module has no validation_step, or there are no validation data")
    sources = [c.data.get("_target_") if c.get("data") is not None else None for c in (cfg, other_cfg)]
    if sources[0] != sources[1]:
        raise ConfigError(f"the runs have different data: {sources[0]} and {sources[1]}")
    rows = connectivity(module, other.state_dict(), data, options.points, options.batches, options.norm_batches)
    logged = {name: value for name, value in rows[0].items() if name not in ("alpha", "nonzero")}
    key = metric_of(logged, str(cfg.objective))
    names = list(dict.fromkeys([*(name for name in logged if name.endswith("loss")), key]))
    table = Table("alpha", *names, "nonzero")
    for row in rows:
        table.add_row(f"{row['alpha']:.2f}", *(f"{row[name]:.4f}" for name in names), f"{row['nonzero']:.2%}")
    console = Console()
    console.print(table)
    for name in names:
        height, place = barrier(rows, name)
        console.print(f"barrier of {name}: {height:.4f}, at {place:.2f}", highlight=False)
    folder = options.folder or options.run
    write_csv(folder / "connectivity.csv", rows)
    _plot(rows, folder / "connectivity.png", names)
    print(f"written: {folder / 'connectivity.csv'}, connectivity.png")


@torch.no_grad()
def connectivity(
    module: LightningModule,
    other: Mapping[str, Tensor],
    data: LightningDataModule | None,
    points: int = 11,
    batches: int | None = None,
    norm_batches: int = 50,
) -> list[dict[str, float]]:
    """Validate (1 - alpha) w + alpha w' at points alpha of [0, 1]; the module is left as it was.

    Numbers that are not floats are those of the module. Statistics of batch norms that differ between the two are
    taken anew at each point, the ends included, as means over training batches without dropout: those of the ends are
    of activations that no network on the line has.

    Source: Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, 2020, arXiv:1912.05671.

    Args:
        module: with a `validation_step`, and w its weights.
        other: w', a state dict with the same names and shapes.
        data: where training and validation data come from; None if the module brings its own.
        points: how many, ends included.
        batches: of the validation data at each; None for all.
        norm_batches: training batches for the statistics.

    Returns:
        a row for each point: alpha, what validation logs, and `nonzero`, the share of parameters that are not zero.

    Raises:
        ConfigError: the two are of different networks, or there are no training data for the statistics.
    """
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _refuse_others(first, other)
    norms = [
        norm
        for name, norm in module.named_modules()
        if isinstance(norm, NORMS)
        and norm.track_running_stats
        and any(not torch.equal(first[key], other[key]) for key in (f"{name}.running_mean", f"{name}.running_var"))
    ]
    training = _batches(module, data, norm_batches) if norms else []
    measure = partial(validated, validator(batches), module, data)
    rows = []
    try:
        for i in range(points):
            alpha = i / (points - 1)
            module.load_state_dict(
                {
                    name: torch.lerp(mine, other[name].to(mine), alpha) if mine.is_floating_point() else mine
                    for name, mine in first.items()
                }
            )
            if norms:
                _take_statistics(module, norms, training)
            nonzero = torch.stack([p.count_nonzero() for p in module.parameters()]).sum()
            share = int(nonzero) / sum(p.numel() for p in module.parameters())
            rows.append({"alpha": alpha, **measure(), "nonzero": share})
    finally:
        module.load_state_dict(first)
    return rows


def barrier(rows: Sequence[Mapping[str, float]], key: str) -> tuple[float, float]:
    """How much worse a metric gets on the line than the mean of its ends, at most, and where (alpha).

    Source: Frankle et al., 2020, section 2: below 2 points of error they call a network stable.

    >>> barrier([{"alpha": a, "val/acc": acc} for a, acc in ((0, 0.9), (0.25, 0.85), (0.5, 0.5), (1, 0.8))], "val/acc")
    (0.35, 0.5)
    """
    mean = (rows[0][key] + rows[-1][key]) / 2
    height, place = max((lost(key, mean, row[key]), row["alpha"]) for row in rows)
    return round(height, 12), place


def _refuse_others(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Refuse a state dict of another network."""
    for name in [*first, *other]:
        shapes = ["no such tensor" if name not in s else "x".join(map(str, s[name].shape)) for s in (first, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"the runs have different networks, and no line connects them: {name} is {shapes[0]} in the first, "
                f"{shapes[1]} in the second"
            )


def _batches(module: LightningModule, data: LightningDataModule | None, count: int) -> list[Any]:
    """The first training batches: the same at each point."""
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    source = module if data is None else data
    if type(source).train_dataloader in (LightningModule.train_dataloader, LightningDataModule.train_dataloader):
        raise ConfigError("the network has batch norms, and there are no training data to take their statistics from")
    return list(islice(source.train_dataloader(), count))


class _Statistics(Callback):
    """Batch norms in training mode within a validation, so that they gather means over its batches."""

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        self.norms = norms

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for norm in self.norms:
            norm.train()


def _take_statistics(module: LightningModule, norms: Sequence[Any], batches: list[Any]) -> None:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
        trainer = quiet_trainer(callbacks=[_Statistics(norms)])
        dataset: Any = batches  # a list is one
        trainer.validate(module, DataLoader(dataset, batch_size=None, collate_fn=_as_it_is), verbose=False)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _as_it_is(batch: Any) -> Any:
    return batch


def _plot(rows: Sequence[Mapping[str, float]], path: Path, names: Sequence[str]) -> None:
    figure = Figure(figsize=(7, 1 + 2.6 * len(names)), layout="constrained")
    alphas = [row["alpha"] for row in rows]
    for axis, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        axis.axhline((rows[0][name] + rows[-1][name]) / 2, color=GREY, linestyle="--", linewidth=1)
        axis.plot(alphas, [row[name] for row in rows], color=BLUE, marker="o", markersize=3.5)
        better = direction(name)
        axis.set_ylabel(name if better is None else f"{name}, {'more' if better == 'max' else 'less'} is better")
        remove_frame(axis)
    axis.set_xlabel("from the first run (0) to the second (1)")
    save(figure, path)
