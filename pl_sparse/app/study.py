"""`pl-sparse study methods=... seeds=... levels=...`: methods against each other, with equal budgets."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from pl_sparse.app.hydra_api import quoted
from pl_sparse.app.settings import options_of
from pl_sparse.core.registry import suggestion
from pl_sparse.results.runs import key_of
from pl_sparse.results.study import report

__all__ = ["main"]

_LISTS = {"methods": "method", "seeds": "seed", "levels": "sparsity"}
_DESCRIPTION = """Train methods with several seeds at several sparsities, all with the same settings, and say which
differences are noise: pl-sparse study methods=gmp,rigl,dense seeds=0,1,2 levels=0.8,0.9 [trainer.max_epochs=30 ...].
With a folder instead of settings, the runs that are there are compared."""


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse study methods=A,B seeds=0,1,2 levels=0.8,0.9 [key=value ...]`, or `pl-sparse study FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="pl-sparse study", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", metavar="methods=A,B seeds=0,1,2 levels=0.8,0.9 [key=value] | FOLDER")
    parser.add_argument("--metric", help="metric to compare (default: the accuracy that most runs have)")
    options = parser.parse_args(arguments)
    try:
        code = 0
        if any("=" in argument for argument in options.settings):
            folder, code = _trained(options.settings)
        else:
            (folder,) = map(Path, options.settings[:1])
            if len(options.settings) > 1:
                raise ValueError(f"give one folder that contains all runs, not {len(options.settings)}")
        report(folder, Console(), options.metric)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if code:
        sys.exit(code)


def _trained(settings: Sequence[str]) -> tuple[Path, int]:
    """Train all of a study; its folder, and the exit code of what did not go well.

    Raises:
        ValueError: what is studied is not said, or is set twice.
    """
    given = {key_of(setting): setting.partition("=")[2] for setting in settings}
    for plural, key in _LISTS.items():
        if key in given:
            raise ValueError(f"{key}={given[key]}: a study compares several, {plural}={given[key]},...")
        if plural not in given and plural != "levels":
            raise ValueError(f"{plural}=... is missing: pl-sparse study methods=gmp,rigl seeds=0,1,2 levels=0.8,0.9")
    methods = given["methods"].split(",")
    known = options_of("method")
    for method in methods:
        if method not in known:
            raise ValueError(f"methods={method}: there is no such method. {suggestion(method, known)}")
    now = datetime.now()
    folder = Path(given.get("hydra.sweep.dir", f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S}"))
    others = [s for s in settings if key_of(s) not in (*_LISTS, "hydra.sweep.dir")]
    code = 0
    sparse = [method for method in methods if method != "dense"]
    # dense first: the overview at the end of the sparse ones has it as the baseline
    for names, levels, below in ((["dense"], None, folder / "dense"), (sparse, given.get("levels"), folder)):
        if any(name in methods for name in names):
            command = [sys.executable, "-m", "pl_sparse", "sweep", f"method={','.join(names)}", *others]
            command += [f"seed={given['seeds']}", f"hydra.sweep.dir={quoted(below)}"]
            command += [f"sparsity={levels}"] * (levels is not None)
            command += ["~hydra.callbacks.overview"] * (below != folder and bool(sparse))
            code = subprocess.run(command, check=False).returncode or code
    return folder, code
