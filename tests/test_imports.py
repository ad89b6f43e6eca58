"""Imports run downward, and only the upper floors know Lightning and Hydra."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pl_sparse"
FLOORS = [  # a module imports from the floors above it in this list only
    {"naming", "topk", "files", "trace", "pareto"},
    {"masked", "measure", "quantize"},
    {"probe", "attention"},
    {"coupling"},
    {"structure", "schedule", "cost"},
    {"gate"},
    {"scorer"},
    {"allocation", "hardware", "masking", "latency"},
    {"budget", "updater", "regularizer"},
    {"pruner"},
    {"report"},
    {"export.format", "export.shrink"},
    {"export.compressed", "export.csr", "export.onnx", "export.pt2"},
    {"export.semi_structured"},
    {"export"},
    {"callbacks.judging", "callbacks.calibration", "callbacks.whole"},
    {"callbacks.sparsity", "callbacks.quantize", "callbacks.random_state", "callbacks.distill"},
    {"callbacks.history", "callbacks.rewind", "callbacks.regularize", "callbacks.track"},
    {"callbacks.accuracy_budget", "callbacks.front", "callbacks.prefix", "callbacks.status", "callbacks.shrink"},
    {"callbacks.lines"},
    {"callbacks", "tasks", "tasks.lr", "tasks.models", "tasks.data"},
    {"tasks.classifier", "tasks.text"},
    {"overview", "inspection", "doctor"},
    {"boards"},
    {"hooks"},
    {"settings"},
    {"runs"},
    {"deploy", "outcome"},
    {"sweep", "sweep.identity", "sweep.launch"},
    {"sweep.prefix", "sweep.runs"},
    {"sweep.monitor"},
    {"app"},
    {"cli"},
]
WITH_LIGHTNING = ("callbacks", "tasks", "runs", "deploy", "outcome", "sweep", "app", "cli")
WITH_HYDRA = ("hooks", "settings", "runs", "deploy", "outcome", "sweep", "app", "cli")


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__").replace("__init__", "")] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    checked_only: set[ast.AST] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            checked_only |= {child for part in node.body for child in ast.walk(part)}
    for node in ast.walk(tree):
        if node in checked_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_imports_run_downward() -> None:
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for name, path in modules().items():
        if name == "":
            continue
        assert name in level, f"give pl_sparse.{name} a floor in this test"
        for target in imported(path):
            if target.startswith("pl_sparse."):
                short = target.removeprefix("pl_sparse.")
                while short not in level and "." in short:
                    short = short.rpartition(".")[0]
                if short in level and short != name and not name.startswith(short + "."):
                    assert level[short] < level[name], f"{name} imports {short}"


def test_upper_libraries_stay_on_the_upper_floors() -> None:
    for name, path in modules().items():
        top = name.partition(".")[0]
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
