"""What the subcommands that look at a finished run have in common: the run, whether it is trusted, errors in a line."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from pl_sparse.app.arguments import here
from pl_sparse.app.explanation import is_of_the_user, own_frames
from pl_sparse.app.settings import ConfigError

__all__ = ["guarded", "parser_of", "quiet"]


def quiet() -> None:
    """Leave out what Lightning says of every training."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data in memory needs none
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning uses a name that torch renamed
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `pl-sparse NAME RUN`, to which a subcommand adds its own options."""
    parser = argparse.ArgumentParser(prog=f"pl-sparse {name}", description=description)
    parser.add_argument("run", type=Path, help="the folder of a finished run (its output_dir)")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's config.yaml names")
    return parser


def guarded(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run a subcommand: what it refuses is a line and exit code 2, an error of the user's code its frames and 1."""
    quiet()
    here()
    try:
        command(options)
    except (ConfigError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_of_the_user(error):
            raise
        print(f"error: {own_frames(error)}", file=sys.stderr)
        sys.exit(1)
