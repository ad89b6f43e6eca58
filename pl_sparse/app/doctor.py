"""`pl-sparse doctor`: versions, extras, devices, and what the hardware here makes of zeros."""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pl_sparse.core.optional import beginning, library

__all__ = ["extras", "main", "targets"]

_CORE = ("pl_sparse", "torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "numpy")


def extras() -> dict[str, list[str]]:
    """Each extra of this package and what is missing of it, such as "ray" or "SQLAlchemy<2.1 (2.1.0 is installed)"."""
    from packaging.requirements import Requirement

    missing: dict[str, list[str]] = {
        name: [] for name in metadata.metadata("pl_sparse").get_all("Provides-Extra") or []
    }
    for line in metadata.requires("pl_sparse") or []:
        requirement = Requirement(line)
        for extra in missing:
            if (
                requirement.marker is None
                or requirement.marker.evaluate({"extra": ""})
                or not requirement.marker.evaluate({"extra": extra})
            ):
                continue
            version = _version(requirement.name)
            if version is None:
                missing[extra].append(requirement.name)
            elif not requirement.specifier.contains(version, prereleases=True):
                missing[extra].append(f"{requirement.name}{requirement.specifier} ({version} is installed)")
    return {extra: list(dict.fromkeys(requirements)) for extra, requirements in missing.items()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# Each target is tried: a small product on the real thing, or the reason why not.
def _onnxruntime() -> str:
    runtime = library("onnxruntime", "it", "export")
    return ", ".join(runtime.get_available_providers())


def _csr() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is in beta
        weight = torch.eye(8).to_sparse_csr()
    _same(weight @ torch.ones(8, 2), torch.ones(8, 2))
    return "torch.sparse_csr on the CPU"


def _ampere() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("no NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise RuntimeError(f"compute capability {major}.{minor}, below 8.0")
    from torch.sparse import to_sparse_semi_structured

    dense = torch.tensor([0, 0, 1, 1], dtype=torch.float16, device="cuda").repeat(128, 32)
    _same(
        to_sparse_semi_structured(dense) @ torch.ones(128, 128, dtype=torch.float16, device="cuda"), dense.sum(1, True)
    )
    return f"2:4 on {torch.cuda.get_device_name()}"


def _int8() -> str:
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not engines:
        raise RuntimeError("this torch has no engine of quantized layers")
    return ", ".join(engines)


def _compile() -> str:
    def double(x: Tensor) -> Tensor:
        return x * 2

    _same(torch.compile(double)(torch.ones(2)), torch.full((2,), 2.0))
    return "torch.compile"


def _same(product: Tensor, expected: Tensor) -> None:
    if not torch.allclose(product, expected.expand_as(product)):
        raise RuntimeError("its results are wrong")


_TARGETS: dict[str, Callable[[], str]] = {
    "ONNX Runtime": _onnxruntime,
    "sparse CSR": _csr,
    "2:4 (hardware=ampere)": _ampere,
    "int8": _int8,
    "compiled": _compile,
}


def targets() -> Iterator[tuple[str, bool, str]]:
    """Try what a trained model may run on.

    Yields:
        the name of a target, whether it works here, and how or why not.
    """
    for name, attempt in _TARGETS.items():
        try:
            yield name, True, attempt()
        except Exception as error:
            yield name, False, beginning(error)


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if torch.backends.mps.is_available():
        yield "mps", platform.machine()


def main() -> None:
    """`pl-sparse doctor`"""
    argparse.ArgumentParser(
        prog="pl-sparse doctor", description="Show versions, extras, devices, and which hardware targets work here."
    ).parse_args()
    console = Console()
    table = Table("package", "version", box=None, padding=(0, 2), title="versions", title_justify="left")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _CORE:
        table.add_row(name, _version(name) or "[red]not installed[/]")
    console.print(table, "")
    table = Table("extra", "", box=None, padding=(0, 2), title="extras", title_justify="left")
    for name, missing in extras().items() if _version("pl_sparse") else ():
        install = f"[yellow]lacks {escape(', '.join(missing))}:[/] pip install 'pl_sparse\\[{name}]'"
        table.add_row(name, install if missing else "[green]installed[/]")
    console.print(table, "")
    table = Table("device", "", box=None, padding=(0, 2), title="devices", title_justify="left")
    for name, description in _devices():
        table.add_row(name, escape(description))
    console.print(table, "")
    table = Table("target", "", "", box=None, padding=(0, 2), title="hardware targets", title_justify="left")
    for name, works, reason in targets():
        table.add_row(name, "[green]works[/]" if works else "[yellow]no[/]", escape(reason))
    console.print(table)
