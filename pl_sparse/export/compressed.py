"""A small file: for each sparse tensor one bit per weight and the values that are not zero, compressed."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pl_sparse.core.files import DamagedFileError, replacing
from pl_sparse.core.optional import missing
from pl_sparse.export.format import Executable, Export
from pl_sparse.structure import Structure

__all__ = ["Compressed", "load_compressed", "loaded", "save_compressed"]

_MASK, _VALUES, _SHAPE = ".bitmask", ".values", ".shape"
_VERSION = 2
_SKIPPABLE, _FRAME = 0x184D2A50, b"\x28\xb5\x2f\xfd"
"""How a skippable frame of zstd begins, and one with content (RFC 8878, sections 3.1.1 and 3.1.2)."""
_NAME = b"plsparse"
_HEADER = struct.Struct("<II8sIQQ")  # skippable, length, name, version, bytes unpacked, bytes of the tensors; SHA-256
_OVERHEAD = 1 << 20
"""Bytes of names and masks that come on top of those of the tensors."""


def save_compressed(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], level: int = 19) -> None:
    """Write tensors to `path`: safetensors, compressed by zstd, after a header that zstd's own tools skip.

    A tensor `name` of which more than 1 in 32 elements (for 32-bit ones) are zero is stored as `name.bitmask`, one bit
    per element in their order, lowest bit first, `name.values`, those that are not zero, and `name.shape`. The header
    has the version of the format, the bytes of the safetensors and of the tensors, and the SHA-256 of all else.

    Args:
        tensors: by name.
        path: the file; what was there is replaced.
        level: the level of zstd, 1 (fast) to 22 (small).

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
    content = save(stored)
    frame = zstandard.ZstdCompressor(level=level).compress(content)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    header = _HEADER.pack(_SKIPPABLE, _HEADER.size - 8 + 32, _NAME, _VERSION, len(content), size)
    with replacing(path) as temporary:
        temporary.write_bytes(header + hashlib.sha256(header + frame).digest() + frame)


def load_compressed(path: str | os.PathLike[str], limit: int = 1 << 32) -> dict[str, Tensor]:
    """The tensors in a file of `save_compressed`, by name, each element equal to what was saved (-0 has become 0).

    A file of version 0.1.0 has no checksum and loads with a warning: damage in it may load as other weights.

    Args:
        path: the file.
        limit: the largest number of bytes of all tensors together. A file whose header has more is not unpacked.

    Raises:
        DamagedFileError: it is no such file, not what was written, or of more bytes than the limit.
        ImportError: the package zstandard is missing.
    """
    zstandard = _zstandard()
    content = Path(path).read_bytes()
    try:
        frame, unpacked, size = _checked(content)
        declared = zstandard.frame_content_size(frame)
        if unpacked is None:
            warnings.warn(f"{path} has no checksum: it was written by version 0.1.0. Write it again", stacklevel=2)
            unpacked = declared
        if declared < 0 or declared != unpacked:
            raise DamagedFileError("it does not state its size")
        if max(unpacked - _OVERHEAD, size or 0) > limit:
            raise DamagedFileError(f"it would unpack to {max(unpacked, size or 0):,} bytes, and limit={limit:,}")
        return _tensors(load(zstandard.ZstdDecompressor().decompress(frame)), limit)
    except Exception as error:
        raise DamagedFileError(f"{path} is not a file of compressed weights, or is incomplete: {error}") from error


def _checked(content: bytes) -> tuple[bytes, int | None, int | None]:
    """The frame of zstd in a file, the bytes that it has unpacked, and those of the tensors; None of 0.1.0.

    Raises:
        DamagedFileError: it has another checksum or version.
    """
    if content.startswith(_FRAME):
        return content, None, None
    start = _HEADER.size + 32
    if len(content) < start:
        raise DamagedFileError("it ends in its header")
    skippable, length, name, version, unpacked, size = _HEADER.unpack_from(content)
    if (skippable, length, name) != (_SKIPPABLE, start - 8, _NAME):
        raise DamagedFileError("it does not begin like one")
    header, digest, frame = content[: _HEADER.size], content[_HEADER.size : start], content[start:]
    if hashlib.sha256(header + frame).digest() != digest:
        raise DamagedFileError("its checksum does not match")
    if version != _VERSION:
        raise DamagedFileError(f"it has version {version}, and this release reads version {_VERSION}")
    return frame, unpacked, size


def _tensors(stored: Mapping[str, Tensor], limit: int) -> dict[str, Tensor]:
    """The tensors of what is stored.

    Raises:
        DamagedFileError: a mask, its values and its shape do not belong together, or the tensors have too many bytes.
    """
    tensors: dict[str, Tensor] = {}
    masked: dict[str, tuple[Tensor, Tensor, list[int]]] = {}
    for key, value in stored.items():
        name = key.removesuffix(_MASK)
        if name != key and name + _SHAPE in stored:
            masked[name] = value, stored.get(name + _VALUES, value), _shape(name, value, stored)
        elif not (key.endswith((_VALUES, _SHAPE)) and key.rpartition(".")[0] + _MASK in stored):
            tensors[key] = value
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    size += sum(math.prod(shape) * values.element_size() for _, values, shape in masked.values())
    if size > limit:
        raise DamagedFileError(f"its tensors have {size:,} bytes, and limit={limit:,}")
    for name, (mask, values, shape) in masked.items():
        bits = np.unpackbits(mask.numpy(), bitorder="little")
        count = math.prod(shape)
        kept = torch.from_numpy(bits[:count]).bool()
        if bits[count:].any() or int(kept.sum()) != len(values):
            raise DamagedFileError(
                f"the mask of {name} keeps {int(kept.sum())} elements, and the file has {len(values)}"
            )
        tensors[name] = torch.zeros(count, dtype=values.dtype).masked_scatter_(kept, values).reshape(shape)
    return tensors


def _shape(name: str, mask: Tensor, stored: Mapping[str, Tensor]) -> list[int]:
    """The shape of a masked tensor, whose mask and values have a form that goes with it."""
    shape, values = stored[name + _SHAPE], stored.get(name + _VALUES)
    plain = shape.dtype == torch.int64 and shape.dim() == 1 and mask.dtype == torch.uint8 and mask.dim() == 1
    if not plain or values is None or values.dim() != 1 or bool((shape < 0).any()):
        raise DamagedFileError(f"{name} has no readable mask, values and shape")
    sizes: list[int] = shape.tolist()
    if len(mask) != -(-math.prod(sizes) // 8):
        raise DamagedFileError(f"the mask of {name} has {len(mask)} bytes for the shape {sizes}")
    return sizes


def loaded(path: str | os.PathLike[str], net: nn.Module) -> nn.Module:
    """A copy of a model with the weights of a file of `save_compressed`, in eval mode.

    The file may unpack to 8 bytes for each element of the model, and to some for the names.

    Raises:
        DamagedFileError: it is no such file, not what was written, or of another model.
    """
    net = copy.deepcopy(net).eval()
    state = net.state_dict()
    tensors = load_compressed(path, sum(8 * tensor.numel() for tensor in state.values()) + 1024 * len(state))
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise DamagedFileError(f"{path} has the weights of another model: {error}") from error
    return net


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("compressed weights need zstandard: pip install 'pl_sparse[export]'") from error
    return zstandard


class Compressed(Export):
    """The weights in a file that is as small as the zeros allow. Loaded weights compute like dense ones.

    Args:
        level: the level of zstd, 1 (fast) to 22 (small).
    """

    weights_alone = True
    file = "model.safetensors.zst"

    def __init__(self, level: int = 19) -> None:
        self.level = level

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        return missing("export", "zstandard")

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        save_compressed(net.state_dict(), path, self.level)
        return []

    def open(self, path: Path, net: nn.Module) -> Executable:
        return loaded(path, net)
