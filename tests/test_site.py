"""The pages of the site: links, pictures and tutorials; the build itself in `make test-docs`, where Sphinx is."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import pl_sparse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BUILT = ("_build", "generated", "tutorials")  # what building the site makes
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in BUILT)]
)


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of headings, as GitHub and the site make them, and those that are written."""
    text = page.read_text()
    if included := re.match(r"```\{include\} (\S+)", text):
        return anchors(page.parent / included[1])
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))


def test_every_link_within_the_pages_leads_somewhere() -> None:
    broken, seen = [], 0
    for page in PAGES:
        text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            if any(part in BUILT for part in path.resolve().relative_to(ROOT).parts):
                continue  # checked where the site is built
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert seen > 50 and broken == []


def test_every_picture_has_a_text_and_both_themes() -> None:
    seen = set()
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"!\[\s*\]\(", text), page
        for path, options in re.findall(r"^```\{(?:image|figure)\} (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert len(re.search(r"^:alt: (.*)$", options, re.MULTILINE)[1]) > 40, (page, path)  # type: ignore[index]
            theme = "dark" if path.endswith("_dark.svg") else "light"
            assert f":class: only-{theme}" in options, (page, path)
            assert (page.parent / path).is_file(), (page, path)
            seen.add(Path(path).name)
    assert seen == {path.name for path in (DOCS / "figures").glob("*.svg")}
    assert {name.replace("_light", "_dark") for name in seen} == {name for name in seen if "_dark" in name}


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_figures_can_be_told_from_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for theme in loaded(DOCS / "figures" / "themes.py", monkeypatch).THEMES:
        for ground in (theme.page, theme.box):
            assert contrast(theme.text, ground) >= 7, theme
            assert min(contrast(colour, ground) for colour in theme.lines) >= 4.5, theme
        assert contrast(theme.soft, theme.page) >= 3, theme


def test_the_figure_of_schedules_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = loaded(DOCS / "figures" / "schedules.py", monkeypatch)
    for name in set(figure.options("schedule")) - set(figure.LEARNED):
        assert figure.levels(name)[-1] == pytest.approx(90), name
    assert figure.levels("cubic")[342] == pytest.approx(90 - 90 * (1 - 342 / 750) ** 3)


def test_the_figure_of_methods_is_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = loaded(DOCS / "figures" / "methods.py", monkeypatch)
    assert len(figure.rows()) > 40
    for path in (DOCS / "figures").glob("methods_*.svg"):
        assert figure.source() in path.read_text(), "make figures"


def test_the_figure_of_fashion_mnist_is_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(DOCS / "figures" / "methods.py", monkeypatch)
    figure = loaded(DOCS / "figures" / "fashion.py", monkeypatch)
    assert ("gmp", 90, 84.85, 0.11) in figure.rows() and len(figure.rows()) == 17
    for path in (DOCS / "figures").glob("fashion_*.svg"):
        assert figure.source() in path.read_text(), "make figures"


def test_the_figure_of_targets_is_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = loaded(DOCS / "figures" / "targets.py", monkeypatch)
    first, _, second = (DOCS / "targets.md").read_text().partition("## One network")
    assert len(figure.cells()) > 8
    for key, value in figure.cells():
        row = re.search(rf"^\| {re.escape(key)}.*$", first, re.MULTILINE)
        assert row is not None and (value in row[0] or f" {value} " in second), (key, value)
    for path in (DOCS / "figures").glob("targets_*.svg"):
        assert figure.source() in path.read_text(), "make figures"


def test_a_card_has_the_result_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generated = loaded(DOCS / "_ext" / "generated.py", monkeypatch)
    results = generated.results()
    assert set(results) == set(generated.options("method")) - {"dense"}
    assert results["gmp"] == ("90 %", "96.9 ± 0.5") and results["l0_target"] == ("90 %", "97.1 ± 0.3")
    monkeypatch.setattr(generated, "OUT", tmp_path)
    generated.cards()
    assert {path.stem for path in (tmp_path / "methods").iterdir()} == set(generated.options("method"))
    card = (tmp_path / "methods" / "l0_target.md").read_text()
    assert "| 90 % | 97.1 ± 0.3 | `pl-sparse sweep method=l0_target seed=0,1,2` |" in card
    assert all(f"**{word}.**" in card for word in ("Where it differs from the paper", "When to use it", "When not"))
    assert "updater=lagrangian" in card and "`scorer.lr` | `0.1`" in card


def scripts() -> list[Path]:
    """The tutorials: scripts whose docstring begins with a title."""
    titled = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        if len(lines) > 1 and re.fullmatch(r"=+", lines[1]):
            assert len(lines[1]) >= len(lines[0]), path
            titled.append(path)
    return titled


def test_there_are_tutorials() -> None:
    assert len(scripts()) >= 5


@pytest.mark.docs
@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_a_tutorial_runs(script: Path, tmp_path: Path) -> None:
    """With the arguments that its docstring names, where the packages are that it imports."""
    for node in ast.walk(ast.parse(script.read_text())):
        for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
            pytest.importorskip(name)
    named = re.search(rf"^\s*python examples/{script.name}(.*)$", script.read_text(), re.MULTILINE)
    arguments = shlex.split(named[1]) if named is not None else []
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.docs
@pytest.mark.timeout(1800)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "furo", "myst_parser", "sphinx_gallery"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "searchindex.js").is_file() and (tmp_path / "generated/methods/rigl.html").is_file()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pl_sparse.__version__ and citation["license"] == "Apache-2.0"
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_each_method_has_a_figure_of_its_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python docs/figures/cards.py METHOD` draws it."""
    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    generated = loaded(DOCS / "_ext" / "generated.py", monkeypatch)
    table = generated.results()
    assert len(table) == len([*(DOCS / "figures" / "cards").glob("*.svg")]) > 40
    for name, (sparsity, _) in table.items():
        svg = "\n".join(generated.card_figure(name))
        found = re.search(rf"<title>{name}: the sparsity \D*(\d+) %", svg)
        assert found is not None and abs(int(found[1]) - int(sparsity.split()[0])) <= 2, name  # one seed of three
        assert len(svg) < 8000 and "#" not in svg, name  # colours are those of the page


def test_pages_and_examples_import_public_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/reference/stability.md."""
    generated = loaded(DOCS / "_ext" / "generated.py", monkeypatch)
    public = {module: {*import_module(module).__all__} for module in (*generated.PYTHON, "pl_sparse.callbacks")}
    public |= {module: {*names} for module, names in generated.EXTENSIONS.items()}
    seen = []
    for page in [*PAGES, *(ROOT / "examples").glob("*.py")]:
        for module, names in re.findall(
            r"^\s*from (pl_sparse[\w.]*) import (\([^)]*\)|[^\n#]+)", page.read_text(), re.M
        ):
            seen += [(page.name, module, name) for name in re.findall(r"\w+", names)]
    assert len(seen) > 50 and [one for one in seen if one[2] not in public.get(one[1], ())] == []
    for module, names in public.items():
        assert all(hasattr(import_module(module), name) for name in names), module


def test_no_page_is_a_dead_end() -> None:
    """Each links to another page, lists of pages and what the repository's top has excepted."""
    pages = [page for page in PAGES if page.is_relative_to(DOCS) and page.parent.name != "project"]
    texts = {page: page.read_text() for page in pages}
    ends = [page.name for page, text in texts.items() if not re.search(r"\]\([^):]+\.md|\{toctree\}", text)]
    assert len(pages) > 40 and ends == []
