"""What the docstring of a class or function says: its text, its sources, a sentence per argument."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Docstring", "docstring_of", "sentence"]

_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Attributes|Keyword Args|Raises|Returns?|Yields|Examples?(\(\w+\))?|Note|Warning"
    r"|Warns|See Also)\s*:+\s*$"
)
_ARGUMENTS = ("Args", "Arguments", "Parameters", "Attributes", "Keyword Args")
_ENTRY = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_ROLE = re.compile(r":[\w:]+:`~?(?:[^`<]*\.)?([^`<]+?)(?:\s*<[^`>]*>)?`")
_SOURCE = ("Source:", "Sources:")


@dataclass(frozen=True)
class Docstring:
    """A docstring, read.

    Args:
        text: the paragraphs before the sections, sources left out.
        sources: the paragraphs that begin with "Source:".
        arguments: what is said of each argument, by its name.
    """

    text: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)


def sentence(text: str) -> str:
    """The first sentence of a text, with a capital letter and a full stop.

    >>> sentence("the share of the past, e.g. 0.9; 0 takes the last step. More.")
    'The share of the past, e.g. 0.9; 0 takes the last step.'
    """
    text = " ".join(text.split())
    first = re.split(r"(?<![.\s][a-z])(?<!e\.g)(?<!i\.e)(?<!et al)\.\s+(?=[A-Z`\"])", text, maxsplit=1)[0].strip()
    if not first:
        return ""
    if not re.match(r"[a-z]+\w*[_(=:]|[a-z]:", first):  # a name or a pattern stays as it is
        first = first[0].upper() + first[1:]
    return first if first.endswith((".", "?", "!")) else first.rstrip(":;,") + "."


def docstring_of(called: Any) -> Docstring:
    """The docstring of a class, with the arguments that the classes above it take, or of a function."""
    if not inspect.isclass(called):
        return _parsed(inspect.getdoc(called) or "")
    arguments: dict[str, str] = {}
    for kind in reversed(called.__mro__[:-1]):
        for text in (vars(kind).get("__doc__"), getattr(vars(kind).get("__init__"), "__doc__", None)):
            arguments |= _parsed(inspect.cleandoc(text or "")).arguments
    own = _parsed(inspect.cleandoc(vars(called).get("__doc__") or ""))
    return Docstring(own.text, own.sources, arguments)


def _parsed(doc: str) -> Docstring:
    text: list[str] = []
    sources: list[str] = []
    arguments: dict[str, str] = {}
    parts = re.split(r"\n(?=\S)", "\n" + doc)  # what is indented belongs to the line above it
    blocks: list[list[str]] = [[]]
    ended = False
    for part in (part.strip("\n") for part in parts):
        first, _, rest = part.partition("\n")
        if (found := _SECTION.fullmatch(first.strip())) is not None:
            ended = True
            if found[1] in _ARGUMENTS:
                arguments |= _entries(rest)
            continue
        if first.startswith((">>>", "..", "*")):
            ended = True
        if ended or not part.strip():
            continue
        blocks[-1].append(part)
    paragraphs = re.split(r"\n\s*\n", "\n".join(_joined(blocks[0], doc)))
    for paragraph in paragraphs:
        line = _plain(paragraph)
        if line:
            (sources if line.startswith(_SOURCE) else text).append(line)
    return Docstring(tuple(text), tuple(sources), arguments)


def _joined(parts: list[str], doc: str) -> list[str]:
    """The parts with the empty lines that are between them in the docstring."""
    lines: list[str] = []
    position = 0
    for part in parts:
        start = doc.index(part, position)
        if "\n\n" in doc[position:start] or (position and doc[position:start].count("\n") > 1):
            lines.append("")
        lines.append(part)
        position = start + len(part)
    return lines


def _entries(block: str) -> dict[str, str]:
    """The entries of a section of arguments."""
    lines = inspect.cleandoc("\n" + block).splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    paragraph = True
    for line in lines:
        if line and not line[0].isspace():
            entry = _ENTRY.match(line)
            names = [name.strip(" *") for name in entry[1].split(",")] if entry is not None else []
            paragraph = True
            for name in names:
                found[name] = entry[2] if entry is not None else ""
        elif not line.strip():
            paragraph = not any(found.get(name) for name in names)
        elif paragraph:
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return {name: plain for name, value in found.items() if (plain := _plain(value))}


def _plain(text: str) -> str:
    """Text without the markup of reStructuredText."""
    text = _ROLE.sub(r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").strip()
