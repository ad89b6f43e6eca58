"""`pl-sparse export RUN` and `pl-sparse bench RUN`: the model of a finished run in other formats, and what it costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pl_sparse.app.deploy import RANGES, UnmetError, deploy, integers_in_ranges, merged, training_inputs
from pl_sparse.app.finished import load_run
from pl_sparse.app.formats import refuse
from pl_sparse.app.instantiate import built, network
from pl_sparse.app.settings import CONF, ConfigError, options_of
from pl_sparse.app.subcommand import guarded, parser_of
from pl_sparse.core.files import write_json
from pl_sparse.core.registry import suggestion
from pl_sparse.export.hardware import Hardware
from pl_sparse.structure import Structure
from pl_sparse.surgery.plan import RemovalPlan

__all__ = ["bench", "export"]


def export(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse export RUN --to onnx csr`: write the model of a finished run in other formats."""
    _command("export", arguments)


def bench(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse bench RUN`: measure the model of a finished run, dense and exported side by side."""
    _command("bench", arguments)


def _command(name: str, arguments: Sequence[str] | None) -> None:
    formats = options_of("export")
    measure = name == "bench"
    parser = parser_of(name, (bench if measure else export).__doc__)
    parser.add_argument(
        "--to",
        nargs="+",
        metavar="FORMAT",
        help=f"{', '.join(formats)}; default: the formats of the run, else those of its hardware",
    )
    parser.add_argument("--threads", type=int, help="threads of torch and ONNX Runtime")
    if measure:
        parser.add_argument(
            "--seconds", type=float, default=2.0, help="seconds of measuring per format and batch size (2)"
        )

    def run(options: argparse.Namespace) -> None:
        if options.threads is not None:
            if options.threads < 1:
                raise ConfigError(f"--threads {options.threads} must be 1 or more")
            torch.set_num_threads(options.threads)
        if measure and not 0 < options.seconds < float("inf"):
            raise ConfigError(f"--seconds {options.seconds:g} must be above 0: the time that is measured for")
        for format in options.to or ():
            if format not in formats:
                raise ConfigError(f"--to {format}: there is no such format. {suggestion(format, formats)}")
        _export_run(options.run, options.to, measure, options.seconds if measure else 0.0, options.trust)

    try:
        guarded(run, parser.parse_args(arguments))
    except UnmetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)


def _export_run(folder: Path, names: Sequence[str] | None, measure: bool, seconds: float, trust: bool) -> None:
    """Export a finished run, and bring its metrics.json up to date."""
    module, data, cfg = load_run(folder, trust)
    hardware: Hardware = built(cfg, "hardware")
    structure: Structure = built(cfg, "structure")
    metrics = json.loads((folder / "metrics.json").read_text())
    if names is None:
        names = [str(name) for name in cfg.get("export") or ()] or list(hardware.exports)
    paths = [path for path in (CONF / "export").glob("*.yaml") if path.stem in names]  # a name is not a path
    nodes: Any = OmegaConf.merge(*map(OmegaConf.load, paths), cfg.get("export") or {})
    for name in names:
        if "_target_" not in (nodes.get(name) or {}):
            raise ConfigError(f"export={name}: there is no such format. {suggestion(name, [*nodes])}")
    formats = {name: built(nodes, name) for name in names}
    refuse(formats, module, data, structure, metrics["sparsity"])
    wanted = any(format.dtype == "int8" for format in formats.values())
    integers = _trained_integers(folder, cfg, module, data) if wanted else None
    plan = folder / "shrunk.json"
    removed = RemovalPlan.from_state_dict(json.loads(plan.read_text())) if plan.is_file() else None
    costs = deploy(module, data, formats, folder, hardware, integers, removed, measure, seconds)
    write_json(folder / "metrics.json", merged(metrics, costs))
    if "exports_failed" in costs:
        raise UnmetError({f"export={name}": reason for name, reason in costs["exports_failed"].items()}, folder)


def _trained_integers(
    folder: Path, cfg: DictConfig, module: LightningModule, data: LightningDataModule | None
) -> nn.Module | None:
    """The network of a run with the 8-bit integers that it was trained for; None if it was not."""
    if not (folder / RANGES).is_file():
        return None
    example = next(iter(training_inputs(module, data, 1)))
    return integers_in_ranges(built(cfg, "quantization").quantization, network(module), example, folder / RANGES)
