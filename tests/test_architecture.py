"""docs/architecture.md says what is there."""

import re
from pathlib import Path

from pl_sparse import Pruner
from pl_sparse.allocation import Units
from pl_sparse.tasks.models import lenet300

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "pl_sparse"


def test_every_module_has_its_line() -> None:
    tree = PAGE.partition("## Packages")[2].partition("## Example")[0]
    words = set(re.findall(r"\w+", tree))
    for path in PACKAGE.rglob("*.py"):
        name = path.parent.name if path.stem == "__init__" else path.stem
        if "conf" in path.relative_to(PACKAGE).parts or name in ("pl_sparse", "__main__", "base"):
            continue
        assert name in words, f"{path.relative_to(ROOT)} has no place in the tree of docs/architecture.md"


def test_every_path_and_name_exists() -> None:
    for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.\w+)?)`", PAGE.partition("## Where does it live?")[2]):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    for module, name in re.findall(r"`(?:pl_sparse\.)?((?:[a-z_]+\.)+)([A-Za-z_]+)`", PAGE.partition("## A walk")[2]):
        place = PACKAGE / module.strip(".").replace(".", "/")
        if (place / f"{name}.py").exists():
            continue
        sources = [place.with_suffix(".py"), *place.glob("*.py")]
        if not any(source.exists() for source in sources):
            continue  # an attribute of an object, checked by the types
        assert any(re.search(rf"\b{name}\b", s.read_text()) for s in sources if s.exists()), f"{module}{name}"


def test_the_walk_s_figures() -> None:
    pruner = Pruner(sparsity=0.9)
    pruner.attach(lenet300(shape=(1, 8, 8), classes=10))
    level = pruner.schedule.curve(0.5)
    units = Units(pruner.groups, pruner.structure, pruner.scorer.score)
    kept = pruner.allocation.keep(pruner.groups, units, level)[0]
    assert f"`({level},)`" in PAGE and f"keeps {kept:,}" in PAGE and f"{units.sizes[0]:,} units" in PAGE
