"""A small file: for each sparse tensor one bit per weight and the values that are not zero, compressed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pl_sparse.core.files import replacing
from pl_sparse.export.format import Executable, Export, missing
from pl_sparse.structure import Structure

__all__ = ["Compressed", "load_compressed", "save_compressed"]

_MASK, _VALUES, _SHAPE = ".bitmask", ".values", ".shape"


def save_compressed(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], level: int = 19) -> None:
    """Write tensors to `path`: safetensors, compressed by zstd.

    A tensor `name` of which more than 1 in 32 elements (for 32-bit ones) are zero is stored as `name.bitmask`, one bit
    per element in their order, lowest bit first, `name.values`, those that are not zero, and `name.shape`.

    Args:
        tensors: by name.
        path: the file; what was there is replaced.
        level: of zstd, 1 (fast) to 22 (small).

    Raises:
        ImportError: the package zstandard is missing.
    """
    zstandard = _zstandard()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().reshape(-1)
        kept = flat != 0
        saved = (flat.numel() - int(kept.sum())) * flat.element_size()
        if saved * 8 > flat.numel():
            stored[name + _MASK] = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
            stored[name + _VALUES] = flat[kept]
            stored[name + _SHAPE] = torch.tensor(tensor.shape, dtype=torch.int64)
        else:
            stored[name] = flat.reshape(tensor.shape).clone()
    with replacing(path) as temporary:
        temporary.write_bytes(zstandard.ZstdCompressor(level=level).compress(save(stored)))


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file of `save_compressed`, by name, each element equal to what was saved (-0 has become 0).

    Raises:
        ValueError: it is no such file, or not whole.
        ImportError: the package zstandard is missing.
    """
    zstandard = _zstandard()
    try:
        stored = load(zstandard.ZstdDecompressor().decompress(Path(path).read_bytes()))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no file of compressed weights, or not whole: {error}") from error
    tensors: dict[str, Tensor] = {}
    for key, value in stored.items():
        name = key.removesuffix(_MASK)
        if name != key and name + _SHAPE in stored:
            shape = [int(size) for size in stored[name + _SHAPE]]
            count = int(np.prod(shape))
            kept = torch.from_numpy(np.unpackbits(value.numpy(), count=count, bitorder="little")).bool()
            values = stored[name + _VALUES]
            tensors[name] = torch.zeros(count, dtype=values.dtype).masked_scatter_(kept, values).reshape(shape)
        elif not (key.endswith((_VALUES, _SHAPE)) and key.rpartition(".")[0] + _MASK in stored):
            tensors[key] = value
    return tensors


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("compressed weights need zstandard: pip install 'pl_sparse[export]'") from error
    return zstandard


class Compressed(Export):
    """The weights in a file that is as small as the zeros allow. Once loaded they compute like dense ones.

    Args:
        level: of zstd, 1 (fast) to 22 (small).
    """

    file = "model.safetensors.zst"

    def __init__(self, level: int = 19) -> None:
        self.level = level

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        return missing("export", "zstandard")

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        save_compressed(net.state_dict(), path, self.level)
        return []

    def open(self, path: Path, net: nn.Module) -> Executable:
        copied = copy.deepcopy(net).eval()
        copied.load_state_dict(load_compressed(path))
        return copied
