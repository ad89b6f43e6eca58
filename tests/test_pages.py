"""The Python of docs/start and docs/howto runs, block after block of a page in one namespace."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo.conftest import HEAD as ZOO
from zoo.conftest import REMOVAL_HEAD

from benchmarks.reproduce.__main__ import EXPERIMENTS, HEAD
from pl_sparse import Sparsity
from pl_sparse.core.registry import name_of

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted([*(DOCS / "start").glob("*.md"), *(DOCS / "howto").glob("*.md")])
BUILT = {"_build", "generated", "tutorials"}
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


class Net(LightningModule):
    """What the pages call one's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language that are not marked as not run."""
    found = BLOCK.finditer(page.read_text())
    return [textwrap.dedent(m["code"]) for m in found if m["language"] == language and not m["why"]]


def given(page: Path, folder: Path) -> dict[str, Any]:
    """What the pages leave to the reader."""
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), 16)
    names: dict[str, Any] = {"Net": Net, "model": Net(), "data": data, "Trainer": Trainer, "Sparsity": Sparsity}
    for number, text in reversed([*enumerate(blocks(page, "yaml"))]):  # the page's Python is of the first
        (folder / f"config{number}.yaml").write_text(text)
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(folder), version_base=None):
            names["cfg"] = hydra.compose(f"config{number}")
        (node,) = (value for value in names["cfg"].values() if OmegaConf.is_dict(value) and "_target_" in value)
        names[f"callback{number}"] = hydra.utils.instantiate(node)
    return names | {"hydra": hydra}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in "".join(blocks(page, "python")) or "hugging_face" in "".join(blocks(page, "python")):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = given(page, tmp_path)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    callbacks = [value for name, value in names.items() if isinstance(value, Sparsity)]
    assert page.stem != "hydra_project" or {name_of(c.pruner.scorer) for c in callbacks} == {"movement", "random"}


def with_included(page: Path) -> str:
    """The text of a page, and of those that it includes."""
    text = page.read_text()
    return text + "".join((page.parent / path).read_text() for path in re.findall(r"^```{include} (.+)$", text, re.M))


def test_links_lead_to_pages() -> None:
    """Also those to a heading; what `make docs` builds is left to it."""
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, heading = link.partition("#")
            target = page if not path else page.parent / path
            if BUILT & {*page.parts, *target.parts}:
                continue
            assert target.exists(), f"{page.relative_to(DOCS.parent)} links to {link}"
            text = with_included(target) if heading else ""
            headings = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
            }
            assert not heading or heading in headings | {*re.findall(r"^\((.+)\)=$", text, re.M)}, link


def test_examples_that_pages_name_are_there() -> None:
    root = DOCS.parent
    pages = [root / "README.md", *(path for path in DOCS.rglob("*.md") if not BUILT & {*path.parts})]
    named = {name for page in pages for name in re.findall(r"examples/\w+\.(?:py|yaml)", page.read_text())}
    assert len(named) > 5 and [name for name in sorted(named) if not (root / name).is_file()] == []


def test_each_word_of_the_glossary_is_there_once() -> None:
    text = (DOCS / "start" / "glossary.md").read_text()
    words = [w.strip() for row in re.findall(r"^\| ([^|]+) \|", text, re.M) for w in row.split(",")]
    words = [w for w in words if w != "word" and set(w) != {"-"}]
    assert len(words) == len(set(words)) > 60
    assert "start/glossary.md" in (DOCS / "architecture.md").read_text()
    assert {"mask", "unit", "group", "level", "gate", "ERK", "coverage"} <= set(words)


def rows_of(page: str) -> list[list[str]]:
    """The cells of the tables of a page of docs."""
    lines = (DOCS / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_readme_counts_what_the_pages_have() -> None:
    zoo = [row for row in rows_of("zoo.md") if row[0] != "module" and set(row[0]) != {"-"}]
    coupled = [row[3].split(" → ") for row in rows_of("zoo_removal.md") if row[2:3] == ["coupled"]]
    smaller = sum(len(sizes) == 2 and sizes[0] != sizes[1] for sizes in coupled)
    features = sum(bool(re.search(r"`test_\w+\.py::", row[-1])) for row in rows_of("trainers.md"))
    presets = {path.stem for path in (DOCS.parent / "conf" / "method").glob("*.yaml")} - {"dense"}
    readme = (DOCS.parent / "README.md").read_text()
    for text in (
        f"{features} features of trainers",
        f"{len(zoo)} modules of {len({row[1].split()[0] for row in zoo})} packages",
        f"channels of {smaller} of {len(coupled)} networks",
        f"| {len(presets)} presets on the same axes",
        f"one of {len(presets)} presets;",
    ):
        assert text in readme, f"the README's table should say {text!r}"


def test_the_table_of_groups_has_each_option() -> None:
    rows = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows_of("start/command_line.md")}
    for folder in (path for path in (DOCS.parent / "conf").iterdir() if path.is_dir()):
        options = {path.stem for path in folder.glob("*.yaml")} - {"shrunk"}  # an earlier name
        if folder.name not in ("method", "experiment", "__pycache__"):
            missing = options - rows.get(folder.name, set())
            assert not missing, f"docs/start/command_line.md has no {folder.name}={'|'.join(sorted(missing))}"


def test_pages_that_are_written_by_runs_have_the_prose_of_their_source() -> None:
    """A page edited alone would lose its text with the next run."""
    reproductions = (DOCS / "reproductions.md").read_text()
    assert reproductions.startswith(HEAD + "\n")
    for experiment in EXPERIMENTS.values():
        title, prose, *_ = experiment.section(range(0)).split("\n\n")
        assert title + "\n\n" + prose.partition(" The table has 0 of ")[0] in reproductions
    assert (DOCS / "zoo.md").read_text().startswith(ZOO)
    assert (DOCS / "zoo_removal.md").read_text().startswith(REMOVAL_HEAD)
