"""Imports run one way without a circle, and only the upper rooms know Lightning and Hydra."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pl_sparse"
WITH_LIGHTNING = ("callbacks", "tasks", "app")
WITH_HYDRA = ("app",)


def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name."""
    paths = (path for path in PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imported(path: Path) -> set[str]:
    """What a module imports anywhere, for the type checker alone too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_no_circle() -> None:
    rooms = modules()
    # a package's face hands names on: an import of a name from it is one of the face, not of what is behind
    left = {name: {target for target in imported(path) if target in rooms} - {name} for name, path in rooms.items()}
    for name, path in rooms.items():  # `from package import module` needs the module, not the package's face
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and all(f"{node.module}.{alias.name}" in rooms for alias in node.names):
                left[name].discard(str(node.module))
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these modules import each other: {sorted(left)}"


def test_upper_libraries_stay_in_the_upper_rooms() -> None:
    for name, path in modules().items():
        top = (*name.split("."), "")[1]
        if name == "pl_sparse.__main__":
            continue
        for target in imported(path):
            library = target.partition(".")[0]
            assert library != "lightning" or top in WITH_LIGHTNING, f"{name} imports {target}"
            assert library not in ("hydra", "omegaconf") or top in WITH_HYDRA, f"{name} imports {target}"


def test_the_core_runs_without_lightning_and_hydra() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("lightning", "hydra", "omegaconf", "matplotlib", "sklearn")))
import torch
from pl_sparse import Pruner
model = torch.nn.Linear(4, 4)
pruner = Pruner("magnitude", "oneshot", "nm24", sparsity=0.5)
pruner.attach(model)
pruner.prepare(3)
print(pruner.sparsity)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.5"
