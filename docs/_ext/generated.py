"""Pages that are made from the code when the site is built: configuration, command line, Python, cards of methods.

Nothing of it is kept in the repository (`docs/generated/` is ignored), so that it cannot go stale.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pl_sparse.app import cli
from pl_sparse.app.reference import GROUPS, NOTES, Option, groups, option, options, top
from pl_sparse.app.settings import CONF

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
OUT = DOCS / "generated"
PYTHON = {
    "pl_sparse": "the callback, the pruner, and `slim`",
    "pl_sparse.scorer": GROUPS["scorer"],
    "pl_sparse.schedule": GROUPS["schedule"],
    "pl_sparse.structure": GROUPS["structure"],
    "pl_sparse.allocation": GROUPS["allocation"],
    "pl_sparse.updater": GROUPS["updater"],
    "pl_sparse.masking": GROUPS["masking"],
    "pl_sparse.regularizer": GROUPS["regularizer"],
    "pl_sparse.quantize": GROUPS["quantization"],
    "pl_sparse.export": "files for a target, and how they are read back",
    "pl_sparse.app": "finished runs, loaded again",
    "pl_sparse.integrations.hugging_face": "a callback for the Trainer of Hugging Face",
    "pl_sparse.tasks.models": "small networks to try methods on",
    "pl_sparse.tasks.data": "data sets",
    "pl_sparse.tasks.classifier": "the LightningModule around a plain network",
}
"""Packages whose `__all__` is the Python reference; callbacks have a page of their own."""
PACKAGES = {"quantization": "pl_sparse.quantize", "data": "pl_sparse.tasks.data", "model": "pl_sparse.tasks.models"}
"""Packages whose name is not that of the group."""
EXTENSIONS = {
    "pl_sparse.core.parameter": ("MaskedParameter",),
    "pl_sparse.network.probe": ("Probe",),
    "pl_sparse.network.couples": ("couples", "Call"),
    "pl_sparse.network.macs": ("counted",),
    "pl_sparse.network.norms": ("norm_over_left",),
    "pl_sparse.export.measure": ("latencies", "ratio"),
    "pl_sparse.export.onnx": ("save_onnx", "open_onnx"),
    "pl_sparse.tasks.lr": ("CosineLR",),
    "pl_sparse.app.cli": ("main",),
}
"""Names of other modules that classes and scripts of one's own need."""
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
}
"""Pages of the repository's top, and where the site has them."""


def text_of(paragraph: str) -> str:
    """A paragraph of a docstring as Markdown: what is special there is escaped, code in backticks stays."""
    paragraph = re.sub(r"(?<![\w`=])([a-z_]+(?:\.[a-z_]+)*=[\w.\"]+\w)(?![\w`=])", r"`\1`", " ".join(paragraph.split()))
    parts = re.split(r"(`[^`]*`)", paragraph)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#|~$])", r"\\\1", part) for part in parts)


def cell(text: str) -> str:
    return text_of(text).replace("\\|", "|").replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def write(path: str, *lines: str) -> None:
    file = OUT / path
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:  # unchanged pages are not built again
        file.write_text(text, encoding="utf-8")


def parameters(found: Option) -> list[str]:
    if not found.parameters:
        return ["It has no keys.", ""]
    prefix = "" if found.group in ("method", "target", "experiment") else f"{found.group}."
    rows = [f"| {code(prefix + p.key)} | {code(p.default)} | {cell(p.sentence)} |" for p in found.parameters]
    return ["| key | default | meaning |", "|---|---|---|", *rows, ""]


def link(group: str, name: str) -> str:
    """A link to an option, from a page of the generated folder's subfolders."""
    known = name in options(group) if group in groups() else False
    return f"[`{group}={name}`](#{group}-{name})" if known else f"`{group}={name}`"


def pictures(group: str) -> list[str]:
    """The figure of a group, as docs/figures/index.md has it."""
    figure = {"structure": "masks", "schedule": "schedules", "method": "which_method"}.get(group)
    page = (DOCS / "figures" / "index.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```\{{image\}} {figure}_\w+\.svg\n.*?^```\n", page, re.MULTILINE | re.DOTALL)
    return [block.replace("{image} ", "{image} ../../figures/") for block in found]


def configuration() -> None:
    for group in groups():
        hint = f"`pl-sparse explain {group}` lists the options, `pl-sparse explain {group}=OPTION` prints one."
        lines = [f"# {group}", "", f"{GROUPS.get(group, '').capitalize()}.", "", hint, ""]
        module = {
            "quantization": "pl_sparse.quantize",
            "data": "pl_sparse.tasks.data",
            "model": "pl_sparse.tasks.models",
        }
        page = module.get(group, f"pl_sparse.{group}")
        if page in PYTHON:
            lines += [f"In Python: [{page}](../python/{page.replace('.', '_')}.md).", ""]
        lines += pictures(group)
        for name in options(group):
            found = option(group, name)
            lines += [f"({group}-{name})=", f"## {group}={name}", ""]
            if found.target:
                lines += [f"`{found.target}`", ""]
            for paragraph in (*found.text, *found.sources):
                lines += [text_of(paragraph), ""]
            if group == "method":
                lines += [f"[Its card](../methods/{name}.md).", ""]
            if found.choices:
                lines += ["Sets " + ", ".join(link(g, n) for g, n in found.choices.items()) + ".", ""]
            lines += parameters(found)
        write(f"configuration/{group}.md", *lines)
    rows = [f"| {code(p.key)} | {code(p.default)} | {cell(p.sentence)} |" for p in top().values()]
    names = [f"| [`{group}`]({group}.md) | {GROUPS.get(group, '')} | {len(options(group))} |" for group in groups()]
    write(
        "configuration/index.md",
        "# Configuration",
        "",
        "Every key of every group, from the YAML files and docstrings of this version. On the command line "
        "`scorer=movement` picks an option of a group, and `scorer.lr=0.1` sets a key of it. In Python an option is "
        "the class that it names, with its keys as arguments.",
        "",
        "## Groups",
        "",
        "| group | what it decides | options |",
        "|---|---|---|",
        *names,
        "",
        "## Keys of a run",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *groups(),
        "```",
    )


def help_of(name: str) -> str:
    """What `pl-sparse NAME --help` prints."""
    printed = io.StringIO()
    with (
        patch.object(sys, "argv", ["pl-sparse", name, "--help"]),
        patch.dict(os.environ, {"COLUMNS": "88"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        cli.main()
    return printed.getvalue().strip()


def command_line() -> None:
    lines = [
        "# Command line",
        "",
        "What `pl-sparse COMMAND --help` prints. `python train.py ...` is `pl-sparse train ...`.",
        "",
        "| exit code | means |",
        "|---|---|",
        "| 0 | success |",
        "| 1 | a training that ended early |",
        "| 2 | refused before anything was done |",
        "| 3 | trained, but an export failed |",
        "| 128 and more | ended by a signal, whose number is added |",
        "",
    ]
    for name, (_, text) in cli.COMMANDS.items():
        lines += [f"(command-{name})=", f"## pl-sparse {name}", "", f"{text_of(text[0].upper() + text[1:])}.", ""]
        if name in ("train", "sweep"):
            example = f"`pl-sparse {name} scorer=movement sparsity={'0.9' if name == 'train' else '0.8,0.9'}`"
            lines += [f"Its arguments are [groups and keys](configuration/index.md): {example}.", ""]
        else:
            lines += ["```text", help_of(name), "```", ""]
    write("command_line.md", *lines)


def directive(module: str, name: str) -> str:
    """The directive that documents a public name; empty for what is no class and no function."""
    named = getattr(import_module(module), name)
    if isinstance(named, type):
        return f".. autoclass:: {module}.{name}\n   :members:"
    return f".. autofunction:: {module}.{name}" if callable(named) else ""


def api(path: str, title: str, text: str, directives: list[str]) -> None:
    body = "\n\n".join(filter(None, directives))
    write(path, f"# {title}", "", text, "", "```{eval-rst}", body, "```")


def python() -> None:
    pages = []
    for module, what in PYTHON.items():
        names = import_module(module).__all__
        pages.append(module.replace(".", "_"))
        text = f"{what[0].upper() + what[1:]}."
        group = {package: key for key, package in PACKAGES.items()}.get(module, module.removeprefix("pl_sparse."))
        if group in groups():
            text += f" Its settings: [{group}](../configuration/{group}.md)."
        api(f"python/{pages[-1]}.md", module, text, [directive(module, name) for name in names])
    pages.append("extensions")
    directives = [directive(module, name) for module, names in EXTENSIONS.items() for name in names]
    api(
        "python/extensions.md",
        "For extensions",
        "What classes and scripts of your own may import beside it.",
        directives,
    )
    text = (
        "What `__all__` of each package names, and the names for extensions. Other names may change "
        "([stability](../../reference/stability.md))."
    )
    write("python/index.md", "# Python", "", text, "", "```{toctree}", "", *pages, "```")
    names = [name for name in import_module("pl_sparse.callbacks").__all__ if name != "Sparsity"]
    text = (
        "[`Sparsity`](python/pl_sparse.md) is the callback that prunes. These are added by hand, or by the application "
        "for a setting."
    )
    api("callbacks.md", "Callbacks", text, [directive("pl_sparse.callbacks", name) for name in names])


def results() -> dict[str, tuple[str, str]]:
    """Sparsity and accuracy of each method, from the first table of docs/methods.md."""
    table, _, _ = (DOCS / "methods.md").read_text(encoding="utf-8").partition("\n## ")
    found = re.findall(r"^\| `(\w+)` \|.*\| (\d+ %) \| ([^|]+) \|$", table, re.MULTILINE)
    return {name: (sparsity, accuracy) for name, sparsity, accuracy in found}


def _drawing(name: str) -> str:
    path = DOCS / "figures" / "cards" / f"{name}.svg"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def card_figure(name: str) -> list[str]:
    """The figure of a method, inlined, so that the page sets its colours; the dense network has none."""
    svg = _drawing(name)
    if not svg:
        return []
    (text,) = re.findall(r"<title>\w+: (.+?)</title>", svg)
    return [
        "```{raw} html",
        f'<div class="card-figure">{svg}</div>',
        "```",
        "",
        f"{text[0].upper() + text[1:]} The figure is of seed 0. Its lines are weights that are kept at some time, "
        f"evenly chosen among them (`python docs/figures/cards.py {name}`).",
        "",
    ]


def cards() -> None:
    measured = results()
    words = {"Differs": "Where it differs from the paper", "Use": "When to use it", "Avoid": "When not"}
    for name in options("method"):
        found = option("method", name)
        lines = (CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        yaml = "\n".join(line for line in lines if not line.startswith("#"))
        lines = [f"(card-{name})=", f"# {name}", "", *(text_of(paragraph) for paragraph in found.text), ""]
        if "Equation" in found.notes:
            lines += ["**Rule:** " + text_of(found.notes["Equation"]), ""]
        for word in NOTES[1:]:
            if word in found.notes:
                note = found.notes[word]
                lines += [f"**{words[word]}.** " + text_of(note[0].upper() + note[1:]), ""]
        lines += ["Made of " + ", ".join(link(g, n) for g, n in found.choices.items()) + ".", ""]
        if name in measured:
            lines += [
                "| sparsity | test accuracy %, digits | command |",
                "|---|---|---|",
                f"| {measured[name][0]} | {measured[name][1]} | `pl-sparse sweep method={name} seed=0,1,2` |",
                "",
                "Three seeds, 30 epochs each, 96.9 ± 0.3 dense ([all methods](../../methods.md)).",
                "",
            ]
        lines += card_figure(name)
        lines += ["```{code-block} yaml", f":caption: conf/method/{name}.yaml", "", yaml, "```", ""]
        if found.parameters:
            rows = [f"| {code(p.key)} | {code(p.default)} | {cell(p.sentence)} |" for p in found.parameters]
            lines += ["| key | set to | meaning |", "|---|---|---|", *rows]
        write(f"methods/{name}.md", *lines)


def overview() -> None:
    """The figures of all methods side by side, each with a link to its card."""
    drawn = [name for name in options("method") if card_figure(name)]
    figures = [
        f'<a class="card-figure" href="methods/{name}.html">{_drawing(name)}<code>{name}</code></a>' for name in drawn
    ]
    write(
        "overview.md",
        "# All methods at a glance",
        "",
        f"The trainings of {len(drawn)} presets on digits: the sparsity above, 60 weights below, each a line while it "
        "is kept. A figure leads to the card of its method.",
        "",
        "```{raw} html",
        f'<div class="card-grid">{"".join(figures)}</div>',
        "```",
        "",
        "Next: [which method](../howto/choose_method.md), [all methods with their accuracies](../methods.md).",
    )


def make(app: Any = None) -> None:
    configuration()
    command_line()
    python()
    cards()
    overview()
    for folder, keep in (("configuration", {*groups(), "index"}), ("methods", set(options("method")))):
        for path in (OUT / folder).glob("*.md"):
            if path.stem not in keep:
                path.unlink()


_SECTION = re.compile(r"(Args|Raises|Returns|Yields|Attributes|Example|Examples|Note):$")


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: escape what reStructuredText would take for markup."""
    of_ours = (getattr(obj, "__module__", "") or "").startswith("pl_sparse")
    if not of_ours and what in ("method", "attribute", "property"):
        return  # of a library, in its own markup
    doctest = False
    for number, line in enumerate(lines):
        doctest = (doctest and bool(line.strip())) or line.lstrip().startswith(">>>")
        if not doctest and not _SECTION.match(line.strip()):
            lines[number] = "".join(map(_escaped, re.split(r"(`+[^`]+`+)", line)))


def _escaped(part: str) -> str:
    if part.startswith("`") and part.strip("`"):
        return f"``{part.strip('`')}``"
    return re.sub(r"(?<!\\)([*|])", r"\\\1", re.sub(r"(\w)_(?=\W|$)", r"\1\\_", part))


def no_arguments(conf: Any, script: Any) -> list[str]:
    return []


def gallery(app: Any) -> dict[str, Any]:
    """The settings of the tutorials."""
    settings: dict[str, Any] = app.config.sphinx_gallery_conf
    return settings


def links(app: Any, docname: str, source: list[str]) -> None:
    """Links to files that are no pages of the site: those of the repository's top."""
    text = source[0]
    for name, page in TOP.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}", f"](/{page}", text)
    if docname == "methods":
        text = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](generated/methods/\1.md) |", text, flags=re.MULTILINE)
    folder, _, name = docname.partition("/")
    if folder == "tutorials" and name != "index" and not re.search(gallery(app)["filename_pattern"], f"/{name}.py"):
        text += f"\n.. note:: Not run when the site is built. ``python examples/{name}.py`` runs it.\n"
    lines = text.split("\n")  # a section may have no page yet
    source[0] = "\n".join(line for line in lines if not re.fullmatch(r"[\w/]+\*", line) or next(DOCS.glob(line), None))


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make, priority=100)
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("source-read", links)
    app.connect("include-read", lambda app, path, parent, content: links(app, parent, content))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    make()
