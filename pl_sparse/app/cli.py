"""The `pl-sparse` command: a subcommand, or the settings of one run as `python train.py` takes them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType
from typing import Any

from pl_sparse import __version__
from pl_sparse.core.registry import suggestion

__all__ = ["COMMANDS", "importing", "main", "short_warnings", "version"]

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("pl_sparse.app.command:main", "train one model, or several with -m, by the settings of train.py"),
    "sweep": ("pl_sparse.app.command:sweep", "train several models: the same as train -m"),
    "explain": (
        "pl_sparse.app.explain:main",
        "print what a setting means: a group, an option (scorer=movement) or a key (schedule.every)",
    ),
    "init": ("pl_sparse.app.init:main", "make a project of your own: a module, data, settings and a test"),
    "test": ("pl_sparse.app.evaluate:scored", "test the model of a finished run"),
    "predict": ("pl_sparse.app.evaluate:predicted", "write the predictions of a finished run's model"),
    "pareto": (
        "pl_sparse.results.overview:main",
        "compare runs: fronts of accuracy and cost, the best model under a constraint",
    ),
    "study": ("pl_sparse.app.study:main", "compare methods over seeds, and find which differences are noise"),
    "sensitivity": (
        "pl_sparse.app.sensitivity:main",
        "measure what each layer of a finished run loses when it alone is pruned",
    ),
    "connectivity": (
        "pl_sparse.app.connectivity:main",
        "validate on the straight line between the weights of two runs",
    ),
    "slim": ("pl_sparse.app.slim_command:main", "make a trained network faster, and report the loss of accuracy"),
    "report": ("pl_sparse.integrations.wandb_report:main", "build a Weights & Biases report of runs"),
    "show": ("pl_sparse.results.inspection:show", "show settings, figures and layers of a run, and draw its masks"),
    "compare": ("pl_sparse.results.inspection:compare", "compare settings, figures and masks of two runs"),
    "overlap": (
        "pl_sparse.results.overlap:main",
        "show how masks changed over a run, and the overlap of those of two runs",
    ),
    "doctor": ("pl_sparse.app.doctor:main", "show versions, extras, devices, and which hardware targets work"),
    "export": ("pl_sparse.app.export_command:export", "write the model of a finished run in other formats"),
    "bench": (
        "pl_sparse.app.export_command:bench",
        "measure the model of a finished run, dense and exported side by side",
    ),
}
"""What each subcommand calls, imported when it is asked for, and a line of help."""
_MORE = (
    "pl-sparse COMMAND --help lists the options of a command, pl-sparse --version the versions.",
    "Completion of settings in the shell, by Hydra:",
    '  eval "$(pl-sparse train -sc install=bash)"    (or install=zsh, install=fish)',
)


def main() -> None:
    """Run the subcommand that the arguments name; without one they are settings of a training, and nothing is help."""
    first = sys.argv[1] if len(sys.argv) > 1 else "help"
    if first in ("-h", "--help", "help"):
        print(_help())
        return
    if first == "--version":
        print(version())
        return
    line = os.environ.get("COMP_LINE", "").split(" ")
    if first == "-sc" and line[1:2] in (["train"], ["sweep"]):  # Hydra completes settings, and knows no subcommands
        os.environ["COMP_LINE"] = " ".join(line[:1] + line[2:])
    if first in COMMANDS:
        del sys.argv[1:2]
    elif "=" in first or first.startswith(("-", "+", "~")):
        first = "train"
    else:
        print(f"error: {first!r} is not a command. {suggestion(first, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, _, function = COMMANDS[first][0].partition(":")
    try:
        with importing():
            command: Callable[[], object] = getattr(import_module(module), function)
    except RuntimeError as error:  # torchmetrics and timm import it, where it is installed
        if "torchvision::" not in str(error):
            raise
        print(
            f"error: torchvision cannot be imported: {error}\n"
            "  install the torchvision that belongs to this build of torch, or uninstall it",
            file=sys.stderr,
        )
        sys.exit(2)
    short_warnings()
    try:
        command()
    except KeyboardInterrupt:
        print("interrupted by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.filename is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def importing() -> Iterator[None]:
    """Within the block a signal ends the process with a line: libraries may swallow an exception while they load."""

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, f"interrupted by {signal.Signals(number).name} before anything was done\n".encode())
        os._exit(128 + number)

    earlier: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                earlier[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def short_warnings() -> None:
    """Print a warning of this package without its place in the code. Lightning sets a format, too: import it first."""
    others, package = warnings.formatwarning, Path(__file__).parents[1]

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if package in Path(filename).parents:
            return f"warning: {message}\n"
        return others(message, category, filename, lineno, line)

    warnings.formatwarning = short


def version() -> str:
    """A line with the version of this package and of what it stands on; none of it is imported."""
    below = []
    for name in ("torch", "lightning", "hydra-core"):
        try:
            below.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            below.append(f"no {name}")
    return f"pl_sparse {__version__} ({', '.join(below)})"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: pl-sparse COMMAND ...", "", *lines, "", *_MORE, "", version()])
