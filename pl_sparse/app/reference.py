"""Groups, options and keys of the configuration, each with its default and a sentence.

A default is read from the YAML, its sentence from the `Args:` of what `_target_` names, else from the comment beside
it. `pl-sparse explain` prints what the reference of the documentation shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pl_sparse.app.docstrings import Docstring, docstring_of, sentence
from pl_sparse.app.plugins import AXES, settings_of
from pl_sparse.app.settings import CONF, ConfigError, options_of, target
from pl_sparse.core.registry import registered, suggestion

__all__ = ["GROUPS", "NOTES", "Option", "Parameter", "groups", "option", "options", "top"]

GROUPS: dict[str, str] = {
    "method": "a published method: a preset of the groups below",
    "scorer": "how important each weight is",
    "schedule": "when weights are removed, and how many",
    "structure": "what is removed together",
    "allocation": "how the sparsity is shared among layers",
    "updater": "how new masks are made of the old ones",
    "masking": "what a mask does to training",
    "regularizer": "a penalty that pulls weights towards zero",
    "rewind": "the weights at which a round of lottery tickets begins",
    "distill": "a teacher",
    "target": "what decides how sparse the model gets, in place of the schedule",
    "hardware": "the device that the model is for",
    "quantization": "integers that training simulates",
    "export": "the formats that are written after training",
    "data": "the data set",
    "model": "the network",
    "optimizer": "the optimizer of a plain network",
    "lr_schedule": "the learning rate over training",
    "trainer": "the Trainer of Lightning",
    "callbacks": "callbacks of Lightning",
    "logger": "where metrics are logged",
    "experiment": "a published experiment: data, model, training and method together",
}
"""Every group of the configuration, with what its options decide."""
NOTES = ("Equation", "Differs", "Use", "Avoid")
"""What a preset says of its method, in lines of its comment that begin with one of these words."""
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_")
_KEY = re.compile(r"\s*[\w\"'.]+:")


@dataclass(frozen=True)
class Parameter:
    """A key of an option.

    Args:
        key: with dots where it is in a node: `regularizer.strength`.
        default: as the YAML has it.
        sentence: what the key decides; empty where neither docstring nor comment says.
    """

    key: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Option:
    """An option of a group: `scorer=movement`.

    Args:
        group: the group.
        name: the name of the option.
        target: the class or function that it stands for, if it is one.
        text: paragraphs on what it is.
        sources: where it was published.
        choices: the options of other groups that a preset names.
        parameters: its keys.
        notes: on a method: its equation, where it differs from its paper, when to use it and when not.
    """

    group: str
    name: str
    target: str | None = None
    text: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of its text."""
        return sentence(self.text[0]) if self.text else ""


def groups() -> list[str]:
    """The groups of the configuration: those with a sentence first, in that order."""
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and next(path.glob("*.yaml"), None)}
    return [group for group in GROUPS if group in folders] + sorted(folders - set(GROUPS))


def options(group: str) -> list[str]:
    """The options of a group, those of installed packages included.

    Raises:
        ConfigError: there is no such group.
    """
    if group not in groups():
        raise ConfigError(f"no group is called {group!r}. {suggestion(group, groups())}")
    registered_here = registered(group).items() if group in AXES else ()
    return sorted({*options_of(group), *(name for name, entry in registered_here if not entry.builtin)})


@cache
def option(group: str, name: str) -> Option:
    """An option of a group.

    Raises:
        ConfigError: there is no such group or option.
    """
    known = options(group)
    if name not in known:
        raise ConfigError(f"{group} has no option {name!r}. {suggestion(name, known)}")
    path = CONF / group / f"{name}.yaml"
    if not path.is_file():
        entry = registered(group)[name]
        doc = docstring_of(entry.kind)
        parameters = tuple(
            Parameter(key, _shown(value), sentence(doc.arguments.get(key, "")))
            for key, value in settings_of(entry).items()
        )
        return Option(group, name, entry.path, doc.text, doc.sources, {}, parameters)
    return _Reader(path, group, name).option()


@cache
def top() -> dict[str, Parameter]:
    """The keys of train.yaml itself."""
    reader = _Reader(CONF / "train.yaml", "", "train")
    return {p.key: p for p in reader.parameters() if p.key.partition(".")[0] not in {"defaults", "hydra"}}


class _Reader:
    """A YAML with its comments."""

    def __init__(self, path: Path, group: str, name: str) -> None:
        self.group, self.name = group, name
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(self.root, yaml.MappingNode):
            self.root = None
        self.is_global = any("@package _global_" in line for line in self.lines[:1])
        self.choices, self.below = self._defaults()

    def option(self) -> Option:
        node = self._target(self.root)
        doc = self._doc(self.root)
        paragraphs, notes = self._header()
        paragraphs = [] if node is not None and paragraphs and doc.text and self.group == "method" else paragraphs
        text = (*paragraphs, *doc.text)
        found = tuple(self.parameters())
        if self.below is not None:
            known = {parameter.key for parameter in found}
            base = option(self.group, self.below)
            found += tuple(parameter for parameter in base.parameters if parameter.key not in known)
            node = node or base.target
        return Option(self.group, self.name, node, text, doc.sources, self.choices, found, notes)

    def parameters(self) -> Iterator[Parameter]:
        if self.root is not None:
            yield from self._walk(self.root, "", self._base(), "")

    def _base(self) -> Docstring:
        below = option(self.group, self.below).target if self.below is not None else None
        return _documented(self._target(self.root) or below)

    def _walk(self, node: Any, prefix: str, doc: Docstring, above: str) -> Iterator[Parameter]:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if key.value in _SPECIAL or (not prefix and key.value == "defaults"):
                continue
            if not prefix and self.is_global and key.value == "method" and self.group == "method":
                continue
            comment = self._comment(key.start_mark.line)
            said = doc.arguments.get(key.value, "") or comment
            if not isinstance(value, yaml.MappingNode) or not value.value:
                text = self._inherited(name)  # of a preset; its comment says why it has another value
                text = f"{text} Here: {comment}" if text and comment else text or sentence(said) or above
                yield Parameter(name, self._default(value), text)
                continue
            inner = self._doc(value)
            if (named := self._target(value)) is not None:
                said = said or comment or (sentence(inner.text[0]) if inner.text else "")
                yield Parameter(name, named, sentence(said))
            yield from self._walk(value, f"{name}.", inner, sentence(said))

    def _inherited(self, key: str) -> str:
        """What the group of a key that a preset sets says of it."""
        if not self.is_global:
            return ""
        group, _, rest = key.partition(".")
        if group in top() and (not rest or group not in GROUPS):
            return "" if self.name == "train" else top()[group].sentence
        choice = self.choices.get(group)
        if choice is None and (method := self.choices.get("method")) is not None:
            choice = option("method", method).choices.get(group)
        choice = choice or _chosen().get(group)
        if choice is None or not rest:
            return ""
        chosen = option(group, choice)
        said = {parameter.key: parameter.sentence for parameter in chosen.parameters}
        return said.get(rest) or said.get(rest.rpartition(".")[0]) or _argument(chosen, rest)

    def _target(self, node: Any) -> str | None:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        return next((value.value for key, value in pairs if key.value == "_target_"), None)

    def _doc(self, node: Any) -> Docstring:
        return _documented(self._target(node))

    def _defaults(self) -> tuple[dict[str, str], str | None]:
        """The options that a list of defaults overrides, and the option of the same group that this one rests on."""
        choices: dict[str, str] = {}
        below = None
        pairs = self.root.value if self.root is not None else ()
        for item in next((value.value for key, value in pairs if key.value == "defaults"), ()):
            if isinstance(item, yaml.MappingNode):
                for key, value in item.value:
                    choices[key.value.removeprefix("override ").removeprefix("/")] = self._default(value)
            elif item.value != "_self_":
                below = item.value
        return choices, below

    def _default(self, node: Any) -> str:
        """A value as the YAML has it."""
        text: str = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
        return " ".join(text.split()) or "null"

    def _comment(self, number: int) -> str:
        """The comment at the end of a line."""
        line = self.lines[number]
        found = re.search(r"\s# (.*)$", line) if _KEY.match(line) else None
        return found[1] if found is not None else ""

    def _header(self) -> tuple[list[str], dict[str, str]]:
        """The comment above the first key, and what it notes on a method."""
        text: list[str] = []
        notes: dict[str, str] = {}
        current = None
        for line in self.lines:
            if not line.startswith("#"):
                break
            line = line.lstrip("# ").rstrip()
            if line.startswith("@package") or not line:
                continue
            word, _, rest = line.partition(": ")
            if word in NOTES:
                current = word
                notes[word] = rest
            elif current is not None:
                notes[current] += f" {line}"
            else:
                text.append(line)
        return ([" ".join(text)] if text else []), notes


@cache
def _chosen() -> dict[str, str]:
    """The options of train.yaml."""
    return _Reader(CONF / "train.yaml", "", "train").choices


def _documented(path: str | None) -> Docstring:
    """What the docstring of a target says; nothing where that is not installed."""
    try:
        return docstring_of(target({"_target_": path}, path)) if path is not None else Docstring()
    except (ConfigError, ImportError):
        return Docstring()


def _argument(chosen: Option, name: str) -> str:
    """What the docstring of an option says of an argument that its YAML leaves out."""
    return sentence(_documented(chosen.target).arguments.get(name, ""))


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
