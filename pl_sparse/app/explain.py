"""`pl-sparse explain scorer=movement`: what a group, an option or a key of the configuration means."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pl_sparse.app.reference import GROUPS, Option, Parameter, groups, option, options, top
from pl_sparse.app.settings import ConfigError
from pl_sparse.core.registry import suggestion

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The arguments of `pl-sparse explain`."""
    made = argparse.ArgumentParser(
        prog="pl-sparse explain",
        description="Print what settings mean: their defaults, a sentence for each, equation and source.",
    )
    made.add_argument(
        "settings",
        nargs="*",
        metavar="SETTING",
        help="a group (scorer), an option (scorer=movement) or a key (schedule.every, sparsity); default: all groups",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """`pl-sparse explain [GROUP | GROUP=OPTION | KEY ...]`"""
    asked = parser().parse_args(arguments).settings
    console = Console(highlight=False, soft_wrap=False)
    try:
        for number, setting in enumerate(asked or [""]):
            if number:
                console.print()
            _explain(setting, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _explain(setting: str, console: Console) -> None:
    group, equals, name = setting.partition("=")
    if not setting:
        _rows(console, ((group, GROUPS.get(group, "")) for group in groups()), "group", "what it decides")
        console.print("\npl-sparse explain GROUP lists the options of a group.", soft_wrap=True)
    elif equals and name and group in groups():
        _option(option(group, name), console)
    elif not equals and setting in groups():
        console.print(f"{setting}: {GROUPS.get(setting, '')}\n", soft_wrap=True)
        _rows(console, ((f"{setting}={name}", option(setting, name).summary) for name in options(setting)), "option")
        console.print(f"\npl-sparse explain {setting}=OPTION prints its keys and sources.", soft_wrap=True)
    else:
        _key(group, console)


def _option(found: Option, console: Console) -> None:
    console.print(Text(f"{found.group}={found.name}", style="bold"), found.target or "", soft_wrap=True)
    for paragraph in (*found.text, *found.sources):
        console.print(Text("\n".join(textwrap.wrap(paragraph, min(console.width, 100)))))
    for word, text in found.notes.items():
        console.print(Text("\n".join(textwrap.wrap(f"{word}: {text}", min(console.width, 100)))))
    if found.choices:
        console.print("\n" + " ".join(f"{group}={name}" for group, name in found.choices.items()), soft_wrap=True)
    if found.parameters:
        prefix = "" if found.group in ("method", "target", "experiment") else f"{found.group}."
        _parameters(console, ((f"{prefix}{p.key}", p) for p in found.parameters))
    else:
        console.print("\nIt has no keys.")


def _key(key: str, console: Console) -> None:
    """A key of the run, or of the options of a group that have it."""
    if key in top():
        _parameters(console, [(key, top()[key])], title=False)
        return
    group, _, rest = key.partition(".")
    if rest and group in groups():
        known = {name: {p.key: p for p in option(group, name).parameters} for name in options(group)}
        found = [(f"{group}={name}", keys[rest]) for name, keys in known.items() if rest in keys]
        if not found:
            names = {name for keys in known.values() for name in keys}
            raise ConfigError(f"no option of {group} has a key {rest!r}. {suggestion(rest, names)}")
        console.print(Text(key, style="bold"))
        _parameters(console, found, first="option", title=False)
        return
    raise ConfigError(f"{key!r} is neither a group nor a key. {suggestion(group, {*groups(), *top()})}")


def _parameters(
    console: Console, rows: Iterator[tuple[str, Parameter]] | Sequence[tuple[str, Parameter]], *, first: str = "key",
    title: bool = True,
) -> None:  # fmt: skip
    if title:
        console.print()
    table = Table(first, "default", "", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, parameter in rows:
        table.add_row(Text(name), Text(parameter.default), Text(parameter.sentence))
    console.print(table)


def _rows(console: Console, rows: Iterator[tuple[str, str]], *titles: str) -> None:
    table = Table(*titles, *[""] * (2 - len(titles)), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for first, second in rows:
        table.add_row(Text(first), Text(second))
    console.print(table)
