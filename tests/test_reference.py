"""The reference of the configuration: every key has its default and a sentence, printed by `pl-sparse explain`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from pl_sparse import Pruner
from pl_sparse.app import explain
from pl_sparse.app.docstrings import docstring_of, sentence
from pl_sparse.app.hydra_api import composition
from pl_sparse.app.reference import GROUPS, NOTES, Option, _Reader, groups, option, options, top
from pl_sparse.app.settings import CONF, ConfigError, check
from pl_sparse.core import registry
from pl_sparse.scorer import Magnitude, Movement

ROOT = Path(__file__).parent.parent
EVERY = [(group, name) for group in groups() for name in options(group)]


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    explain.main(arguments)
    return capsys.readouterr().out


def test_every_key_has_a_sentence() -> None:
    assert set(groups()) == set(GROUPS)
    said = {f"{group}={name}: {p.key}": p.sentence for group, name in EVERY for p in option(group, name).parameters}
    said |= {f"train.yaml: {key}": p.sentence for key, p in top().items()}
    lacking = [key for key, text in said.items() if len(text.split()) < 2 or text.startswith("Of ")]
    assert lacking == []
    assert [f"{group}={name}" for group, name in EVERY if not option(group, name).text] == []


def leaves(node: object, prefix: str = "") -> set[str]:
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]} if prefix else set()
    return {
        leaf for key, value in node.items() if not str(key).startswith("_") for leaf in leaves(value, f"{prefix}{key}.")
    }


@pytest.mark.parametrize("group", groups())
def test_the_keys_are_those_of_the_yaml(group: str) -> None:
    """Read by OmegaConf: no key is left out, none is invented, and its default is the same value."""
    for name in options(group):
        path = CONF / group / f"{name}.yaml"
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert isinstance(raw, dict)
        raw.pop("defaults", None)
        if group == "method":
            assert raw.pop("method") == name
        found = {p.key: p.default for p in option(group, name).parameters}
        assert leaves(raw) <= set(found), name
        for key in leaves(raw):
            value = OmegaConf.select(OmegaConf.create(raw), key) if "${" not in found[key] else None
            if value is not None and not OmegaConf.is_config(value) and found[key] != "???":
                parsed = OmegaConf.create(f"x: {found[key]}").x
                assert parsed == value, (name, key)


def test_a_default_that_is_wrong_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("# What it is.\n_target_: pl_sparse.scorer.Movement\nlr: 0.5 # beside\nmore: {a: 1} # of none\n")
    found = _Reader(path, "scorer", "some").option()
    assert found.text[0] == "What it is." and found.target == "pl_sparse.scorer.Movement"
    assert [(p.key, p.default) for p in found.parameters] == [("lr", "0.5"), ("more.a", "1")]
    assert found.parameters[0].sentence == sentence(docstring_of(Movement).arguments["lr"])
    assert found.parameters[1].sentence == "Of none."


def test_docstrings_of_classes_and_of_those_above() -> None:
    class Above:
        """Above.

        Args:
            first: the first, which
                goes on. And more.
            second (int, optional): of :class:`torch.Tensor`.
        """

    class Below(Above):
        """One.
        Goes on.

        Two.

        Source: someone, 2020.

        Args:
            second: another.

        Raises:
            ValueError: never.
        """

    doc = docstring_of(Below)
    assert doc.text == ("One. Goes on.", "Two.") and doc.sources == ("Source: someone, 2020.",)
    assert doc.arguments == {"first": "the first, which goes on. And more.", "second": "another."}
    assert docstring_of(Above).arguments["second"] == "of `Tensor`."
    assert sentence(doc.arguments["first"]) == "The first, which goes on."


def test_explain_an_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(capsys, monkeypatch, "scorer=movement")
    assert "scorer=movement pl_sparse.scorer.Movement" in text and "arXiv:2005.07683" in text
    for parameter in option("scorer", "movement").parameters:
        assert re.search(
            rf"scorer\.{parameter.key} +{re.escape(parameter.default)} +{re.escape(parameter.sentence)}", text
        )
    text = told(capsys, monkeypatch, "method=rigl")
    assert "updater=dropgrow" in text and re.search(r"schedule\.every +100 +\S", text)
    assert all(f"{note}: " in text for note in ("Equation", "Use", "Avoid"))


def test_explain_groups_and_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(capsys, monkeypatch)
    assert all(re.search(rf"^ *{group} +{GROUPS[group][:20]}", text, re.M) for group in groups())
    text = told(capsys, monkeypatch, "schedule")
    assert all(f"schedule={name} " in text for name in options("schedule"))
    text = told(capsys, monkeypatch, "schedule.every", "sparsity")
    assert re.search(r"schedule=cubic +0\.05 +\S", text) and re.search(r"sparsity +0\.9 +Fraction", text)


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [
        ("scorr", "'scorer'"),
        ("scorer=movment", "'movement'"),
        ("schedule.evry", "'every'"),
        ("sparsty=0.5", "'sparsity'"),
    ],
)
def test_a_near_miss_is_suggested(asked: str, suggested: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        explain.main([asked])
    assert f"Did you mean {suggested}" in capsys.readouterr().err


def test_a_registered_class_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Own(Magnitude):
        """Of one's own.

        Args:
            power: the exponent.
        """

        power: float = 2.0
        axis: ClassVar[str] = "scorer"

    Own.__module__ = "elsewhere"
    monkeypatch.setitem(registry._ENTRIES["scorer"], "own", registry.Entry(Own))
    assert "own" in options("scorer")
    found: Option = option.__wrapped__("scorer", "own")
    assert found.summary == "Of one's own."
    assert [(p.key, p.default, p.sentence) for p in found.parameters] == [("power", "2.0", "The exponent.")]


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="no group is called 'nothing'"):
        options("nothing")


@pytest.mark.parametrize("name", options("method"))
def test_every_method_has_the_notes_of_its_card(name: str) -> None:
    found = option("method", name)
    assert set(found.notes) >= {"Equation", "Use", "Avoid"}, (
        "its YAML needs lines '# Equation: ', '# Use: ', '# Avoid: '"
    )
    assert set(found.notes) <= set(NOTES)
    assert name in ("dense", "random", "static", "magnitude_oneshot") or re.search(r"\b(19|20)\d\d\b", found.text[0])


SETTING = re.compile(r"(?<![\w.])([a-z_]+(?:\.[a-z_]+)*)=(\"[^\"]+\"|\[[^]]+\]|[\w.]*\w)")


def settings_of_cards() -> list[tuple[str, str]]:
    """What the comments of presets name as a setting, with the preset that it is for; a preset or recipe once."""
    found = {}
    for name in options("method"):
        comment = "\n".join(re.findall(r"^# (.*)", (CONF / "method" / f"{name}.yaml").read_text(), re.M))
        for key, value in SETTING.findall(comment):
            found.setdefault((key in ("method", "experiment") or name, f"{key}={value}"), name)
    return [(name, setting) for (_, setting), name in found.items()]


def composed(*overrides: str) -> DictConfig:
    with composition():
        cfg = hydra.compose("train", ["output_dir=somewhere", *overrides])
    OmegaConf.set_struct(cfg, False)
    return cfg


@pytest.mark.parametrize(("method", "setting"), settings_of_cards())
def test_a_setting_that_a_card_names_is_accepted(method: str, setting: str) -> None:
    teacher = ["distill=teacher", "distill.teacher=RUN"] if setting.startswith("distill") else []
    alone = setting.startswith(("method=", "experiment="))
    cfg = composed(*([] if alone else [f"method={method}"]), *teacher, setting)
    check(cfg)
    axes = ("scorer", "schedule", "structure", "allocation", "updater", "masking")
    Pruner(**{axis: hydra.utils.instantiate(cfg[axis]) for axis in axes})


def test_the_settings_of_cards_are_found() -> None:
    assert {("l0", "structure=channel"), ("gmp", "first=false"), ("lth", "schedule.to=0.05")} < set(settings_of_cards())


def test_methods_that_differ_from_their_papers_have_it_on_the_card() -> None:
    """The table of docs/methods.md names them."""
    text = (ROOT / "docs" / "methods.md").read_text().partition("## Where older presets differ")[2]
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 12 and [name for name in named if "Differs" not in option("method", name).notes] == []


def test_every_method_has_a_row_with_what_it_is_made_of() -> None:
    """The table of docs/methods.md: each preset but the baseline, with its axes and a result."""
    row = re.compile(
        r"^\| `(\w+)` \| (\w+)[^|]*\| (\w+)[^|]*\|[^|]*\| (\w+) \| (\w+) \|.*\| \d+ % \| [\d.]+ ± [\d.]+ \|$", re.M
    )
    rows = row.findall((ROOT / "docs" / "methods.md").read_text())
    assert sorted(row[0] for row in rows) == sorted(set(options("method")) - {"dense"})
    for name, scorer, schedule, updater, masking in rows:
        chosen = option("method", name).choices
        assert (scorer, schedule, updater, masking) == tuple(
            chosen[group] for group in ("scorer", "schedule", "updater", "masking")
        ), name


PACKAGES = (
    *("", ".scorer", ".schedule", ".structure", ".allocation", ".updater", ".masking", ".regularizer", ".quantize"),
    *(".export", ".callbacks", ".app", ".integrations.hugging_face", ".tasks.models", ".tasks.data"),
    ".tasks.classifier",
)
"""Those of the Python reference."""


def public() -> Iterator[tuple[str, Any]]:
    for package in PACKAGES:
        module = import_module(f"pl_sparse{package}")
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)


def test_public_names_are_documented() -> None:
    """What `__all__` of a package names has a docstring of its own."""
    lacking = []
    for name, named in public():
        if callable(named) and not (isinstance(named, type) or hasattr(named, "__wrapped__") or named.__doc__):
            lacking.append(name)
        if isinstance(named, type) and not vars(named).get("__doc__"):
            lacking.append(name)
    assert lacking == []


def test_arguments_of_public_names_are_documented() -> None:
    """Each has an entry in `Args:`, of the class or one above it; a sole argument may be named in the text."""
    lacking = []
    for name, named in public():
        is_class = isinstance(named, type) and not issubclass(named, Exception)
        if not (is_class or inspect.isfunction(inspect.unwrap(named))):
            continue
        classes = named.__mro__ if isinstance(named, type) else (named,)
        ours = [c for c in classes if (c.__module__ or "").startswith("pl_sparse")]
        text = "\n".join(inspect.cleandoc(c.__doc__ or "") for c in ours)
        kinds = inspect.signature(named).parameters.values()
        arguments = [p.name for p in kinds if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        for argument in arguments:
            if (
                not re.search(rf"^ +{argument}:|`{argument}`", text, re.M) and name != "pl_sparse.register"
            ):  # overloaded
                lacking.append(f"{name}({argument})")
    assert lacking == []
