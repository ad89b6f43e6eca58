"""ExecuTorch: programs for phones, whose layers XNNPACK computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Traced, compared, require
from pl_sparse.network.graph import quiet, traced

__all__ = ["ExecuTorch"]


class ExecuTorch(Traced):
    """The model as an ExecuTorch program, delegated to XNNPACK and checked there against torch.

    XNNPACK multiplies zeros like other numbers; removed channels and heads make the model faster.

    Args:
        tolerance: the largest difference of outputs, as a part of their largest absolute value.
        batch: memory is planned for batches of 1 to so many samples.

    Raises:
        ValueError: `batch` is below 1.
    """

    file = "model.pte"
    runtime = "ExecuTorch"
    extra = "executorch"
    packages = ("executorch",)
    advice = "channels that are gone (structure=channel, structure=head): XNNPACK multiplies zeros like other numbers"

    def __init__(self, tolerance: float = 1e-4, batch: int = 32) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch!r} must be 1 or more: the most samples per call")
        self.tolerance = tolerance
        self.batch = batch

    @property
    def largest(self) -> int:
        return self.batch

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        self._save(net, example, path)
        return [compared(self.open(path, net), net, example, self.tolerance, f"{path} in ExecuTorch")]

    def _save(self, net: nn.Module, example: Tensor, path: Path) -> None:
        require("executorch", self.extra, *self.packages)
        with quiet("executorch"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            whole = example.repeat(-(-self.batch // len(example)), *(1,) * (example.dim() - 1))[: self.batch]
            program = traced(copy.deepcopy(net), whole, self.batch)  # a smaller example bounds the batch
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        with replacing(path) as temporary:
            temporary.write_bytes(lowered.buffer)

    def open(self, path: Path, net: nn.Module) -> Executable:
        require("executorch", self.extra, *self.packages)
        with quiet("executorch"):
            from executorch.runtime import Runtime

            method: Any = Runtime.get().load_program(path).load_method("forward")

        def run(x: Tensor) -> Tensor:
            return torch.cat([method.execute([part.contiguous()])[0].clone() for part in x.cpu().split(self.batch)])

        return run

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Executable:
        self._save(net, example, folder / "dense.pte")
        return self.open(folder / "dense.pte", net)
