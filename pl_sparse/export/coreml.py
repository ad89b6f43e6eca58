"""Core ML: a mask of bits and the values that are not zero, for Apple's devices."""

from __future__ import annotations

import copy
import io
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Traced, require
from pl_sparse.network.graph import quiet, traced

__all__ = ["CoreML", "read_coreml"]

_SMALLEST = 1e-12
"""Below every number of float16: what is not zero stays."""
_ROUNDING = 2.0**-10
"""Relative error of a float16 that was rounded once for a factor and once for itself."""


class CoreML(Traced):
    """An ML program of float16 weights, in which sparse weights are a bit mask and their nonzero values.

    coremltools converts on Linux, but predicts only on macOS. So the saved program is read back: its decompressed
    weights equal those of the same program with dense weights bit for bit, and the model's own up to the rounding of
    float16 and a factor per output where a norm was folded in. The program takes single samples, because the Neural
    Engine needs fixed shapes. The file is the package in an archive without compression: unzip it for Xcode.

    Source: Core ML Tools, Pruning,
    https://apple.github.io/coremltools/docs-guides/source/opt-pruning-perf.html.

    Args:
        least: weights of which a smaller fraction is zero stay dense.
    """

    file = "model.mlpackage.zip"
    runtime = "Core ML"
    extra = "coreml"
    packages = ("coremltools",)

    def __init__(self, least: float = 0.1) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"least={least!r} must be above 0 and at most 1: the fraction of zeros of a sparse weight")
        self.least = least

    @property
    def largest(self) -> int:
        return 1

    def unmeasurable(self) -> str | None:
        return "Core ML runs on Apple's systems; Xcode's performance report of the package measures it there"

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        require("coreml", self.extra, *self.packages)
        with _silent():
            dense = _converted(net, example)
            with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
                sparse = Path(folder) / path.stem
                _sparsified(dense, self.least).save(str(sparse))
                _archive(sparse, temporary)
                packed, weights = _read(sparse)
                notes = _checked(_weights(dense), weights, net)
                dense.save(str(Path(folder) / "dense.mlpackage"))
                before = _bytes(Path(folder) / "dense.mlpackage")
        size = path.stat().st_size
        return [
            f"{len(packed)} weights are sparse in the program ({', '.join(sorted(set(packed))) or 'none'})",
            f"the same program with dense float16 weights: {before / 1e3:,.1f} kB ({before / size:.1f}x)",
            *notes,
        ]

    def open(self, path: Path, net: nn.Module) -> Executable:
        raise ValueError(f"{path}: {self.unmeasurable()}")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what coremltools says of versions, and without its bars, which go to stderr."""
    with quiet("coremltools"):
        from coremltools.optimize import coreml  # noqa: F401  # its loggers keep the stderr that they are made with

        with redirect_stderr(io.StringIO()):
            yield


def _converted(net: nn.Module, example: Tensor) -> Any:
    """The model as an ML program of dense float16 weights."""
    import coremltools

    program = traced(copy.deepcopy(net), example, largest=1).run_decompositions({})
    return coremltools.convert(
        program,
        outputs=[coremltools.TensorType(name="output")],
        minimum_deployment_target=coremltools.target.iOS17,
        skip_model_load=True,
    )


def _sparsified(program: Any, least: float) -> Any:
    from coremltools.optimize import coreml

    threshold = coreml.OpThresholdPrunerConfig(
        threshold=_SMALLEST, minimum_sparsity_percentile=least, weight_threshold=0
    )
    return coreml.prune_weights(program, coreml.OptimizationConfig(global_config=threshold))


def _decompressed(program: Any) -> Any:
    from coremltools.optimize import coreml

    return coreml.decompress_weights(program)


def _read(package: Path) -> tuple[list[str], dict[str, np.ndarray[Any, Any]]]:
    from coremltools.models import MLModel

    program = MLModel(str(package), skip_model_load=True)  # not compiled for a device
    return _sparse_operations(program), _weights(_decompressed(program))


def read_coreml(path: Path) -> tuple[list[str], dict[str, np.ndarray[Any, Any]]]:
    """The contents of a file that `CoreML` wrote.

    Args:
        path: the archive.

    Returns:
        The operations that make dense weights of sparse ones, by type, one per weight, and all weights of two and more
        dimensions by name, decompressed.

    Raises:
        ImportError: coremltools is missing.
    """
    require("coreml", CoreML.extra, *CoreML.packages)
    with tempfile.TemporaryDirectory() as folder, _silent():
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return _read(next(Path(folder).glob("*.mlpackage")))


def _sparse_operations(program: Any) -> list[str]:
    """The operations of a program that make dense weights of sparse ones, by type; one for each weight."""
    blocks = [
        block
        for function in program.get_spec().mlProgram.functions.values()
        for block in function.block_specializations.values()
    ]
    types = [operation.type for block in blocks for operation in block.operations]
    return [name for name in types if name.startswith("constexpr_sparse_")]


def _weights(program: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The floating-point constants of a program of two and more dimensions, by name."""
    from coremltools.optimize import coreml

    constants = coreml.get_weights_metadata(program, weight_threshold=0)
    weights = {name: np.asarray(constant.val) for name, constant in constants.items()}
    return {name: value for name, value in weights.items() if value.ndim > 1 and value.dtype.kind == "f"}


def _checked(dense: dict[str, Any], read: dict[str, Any], net: nn.Module) -> list[str]:
    """Notes of what was compared.

    Args:
        dense: weights of the program before they were made sparse.
        read: those of the saved one.
        net: the model.

    Raises:
        ValueError: they differ.
    """
    for name, value in dense.items():
        other = read.get(name, read.get(f"{name}_sparsified"))
        if other is None or not np.array_equal(value, other):
            raise ValueError(f"the weight {name} read back from the package is not the one that was converted")
    weights = {name: weight.detach().cpu().numpy() for name, weight in net.named_parameters() if weight.dim() > 1}
    lost = [name for name, weight in weights.items() if not any(_same(weight, value) for value in read.values())]
    if weights and len(lost) == len(weights):
        raise ValueError(f"none of the model's {len(weights)} weights is in the package as it is")
    notes = [
        f"{len(weights) - len(lost)} of {len(weights)} weights, read back, are the model's to float16's rounding; "
        f"all {len(dense)} matrices are those that were converted, bit for bit"
    ]
    if lost:
        notes.append(f"the converter split, joined or transposed {', '.join(lost)}: not compared with the model's")
    return notes


def _same(weight: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> bool:
    """Whether a value is a weight, but for a factor per output, to float16's rounding."""
    if value.shape != weight.shape:
        return False
    rows, values = weight.reshape(len(weight), -1).astype(np.float64), value.reshape(len(value), -1).astype(np.float64)
    norms = (rows**2).sum(1)
    factors = (rows * values).sum(1) / np.where(norms == 0, 1, norms)  # (outputs,)
    expected = factors[:, None] * rows
    # below 6e-5 float16 has fewer digits: steps of 6e-8
    return bool((np.abs(values - expected) <= 2 * _ROUNDING * np.abs(expected) + 1e-6).all())


def _archive(package: Path, path: Path) -> None:
    """A folder in an archive of its name, without compression, so that its size is that of the package."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in _files(package):
            archive.write(file, f"{package.name}/{file.relative_to(package)}")


def _files(folder: Path) -> Sequence[Path]:
    found: Iterable[Path] = folder.rglob("*")
    return sorted(file for file in found if file.is_file())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))
