"""Graphs of torch operators, in torch's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Traced
from pl_sparse.network.graph import traced

__all__ = ["TorchExport"]


class TorchExport(Traced):
    """The model as a graph of torch operators (.pt2), which loads without the code of its class."""

    file = "model.pt2"

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        program = traced(net, example)
        with replacing(path) as temporary:
            torch.export.save(program, temporary)
        return []

    def open(self, path: Path, net: nn.Module) -> Executable:
        module: Any = torch.export.load(path).module()
        return module
