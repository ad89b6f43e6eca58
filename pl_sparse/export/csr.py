"""Layers that skip zeros on a CPU: weights in compressed sparse rows."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pl_sparse.core.files import DamagedFileError, replacing
from pl_sparse.core.upstream import without_fused_layer
from pl_sparse.export.format import Executable, Export
from pl_sparse.network.hooks import hooked, unfused
from pl_sparse.structure import Structure

__all__ = ["CSR", "CSRConv2d", "CSRLinear", "load_csr", "to_csr"]


class CSRLinear(nn.Module):
    """y = x W^T + b with W (out, in) in compressed sparse rows: products with zeros are skipped.

    It computes (b + W x^T)^T, for which the kernels are fast; indices have 32 bits.

    >>> layer = nn.Linear(3, 2)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])), layer.bias.zero_()
    ...     CSRLinear.of(layer)(torch.tensor([[5.0, 7.0, 9.0]])).tolist()
    [[14.0, 5.0]]
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, inputs: int, bias: Tensor | None) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("values", values)
        self.register_buffer("bias", bias)
        self._matrix: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> CSRLinear:
        """The same layer, its zeros left out."""
        return cls(*_rows(layer.weight), layer.in_features, None if layer.bias is None else layer.bias.detach())

    @property
    def matrix(self) -> Tensor:
        """W, (out, in)."""
        if self._matrix is None:  # buffers are moved and loaded, a tensor made of them is not
            rows, columns, values = (self.get_buffer(name) for name in ("rows", "columns", "values"))
            size = (len(rows) - 1, self.inputs)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*beta state.*")
                self._matrix = torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)
        return self._matrix

    def times(self, x: Tensor) -> Tensor:
        """W x + b for x (in, samples), as (out, samples)."""
        matrix = self.matrix
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if bias is None:
            return matrix @ x
        return torch.addmm(bias[:, None].expand(-1, x.shape[1]), matrix, x)

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, self.inputs).t()  # (in, samples)
        return self.times(columns).t().reshape(*x.shape[:-1], -1)  # (*samples, out)


class CSRConv2d(nn.Module):
    """A convolution as a product of its weight, (out, in * kernel) in compressed sparse rows, with unfolded inputs."""

    def __init__(self, layer: nn.Conv2d, matrix: CSRLinear) -> None:
        super().__init__()
        self.matrix = matrix
        pads: Any = layer.padding
        self.shape = list(zip(layer.kernel_size, layer.stride, layer.dilation, pads, strict=True))

    @classmethod
    def of(cls, layer: nn.Conv2d) -> CSRConv2d:
        """The same layer, its zeros left out."""
        flat = layer.weight.flatten(1)  # (out, in * kernel)
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(layer, CSRLinear(*_rows(flat), flat.shape[1], bias))

    def forward(self, x: Tensor) -> Tensor:
        out = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, (kernel, stride, dilation, pad) in zip(x.shape[-2:], self.shape, strict=True)
        ]
        kernel, stride, dilation, pad = zip(*self.shape, strict=True)
        unfolded = F.unfold(x, kernel, dilation, pad, stride)  # (samples, in * kernel, positions)
        columns = unfolded.transpose(0, 1).flatten(1)  # (in * kernel, samples * positions)
        return self.matrix.times(columns).unflatten(1, (len(x), *out)).transpose(0, 1)  # (samples, out, *out size)


def _rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts, columns and values of the non-zeros of a matrix."""
    kept = (weight != 0).detach()  # (out, in)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return starts.int(), kept.nonzero()[:, 1].int(), weight.detach()[kept]


def _convertible(module: nn.Module) -> str | None:
    """Why a layer has no sparse form here; None if it has."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return "it is a grouped convolution"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"its padding is {module.padding_mode} {module.padding}"
    return None


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers and convolutions of a model that are called themselves, by name."""
    for name, module in net.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d):  # a subclass may be one whose weight is read by another module
            yield name, module


def _sparse(layer: nn.Module) -> nn.Module:
    """A layer's sparse form."""
    return CSRConv2d.of(layer) if isinstance(layer, nn.Conv2d) else CSRLinear.of(layer)  # type: ignore[arg-type]


def _replace(net: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of the one of this name."""
    parent = net.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], layer)
    without_fused_layer(parent)


@torch.no_grad()
def to_csr(
    net: nn.Module, example: Tensor, where: Literal["faster", "all"] = "faster"
) -> tuple[nn.Module, list[str], list[str]]:
    """A copy of a model whose linear layers and convolutions skip zeros.

    Args:
        net: any model; its weights are sparse.
        example: inputs, (samples, *shape); the speeds are compared on them.
        where: "faster" replaces the layers that are faster so on this machine, "all" every one that has zeros.

    Returns:
        The copy in eval mode, the names of the layers that were replaced, and why each other one was not.
    """
    net = copy.deepcopy(net).eval()
    names = {layer: name for name, layer in _layers(net)}
    inputs: dict[str, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(names[layer], args[0] if args else next(iter(kwargs.values())))

    with hooked(names, pre=note), unfused():
        net(example)
    replaced, notes = [], []
    for name, layer in list(_layers(net)):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        zeros = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        reason = _convertible(layer)
        if reason is None and name not in inputs:
            reason = "the model does not call it"
        if reason is None and not zeros:
            reason = "it has no zeros"
        if reason is None:
            sparse = _sparse(layer)
            if where == "faster" and (slower := _times(sparse, layer, inputs[name])) > 0.95:
                reason = f"at {zeros:.0%} sparsity its sparse form takes {slower:.2f} of the dense time"
            else:
                _replace(net, name, sparse)
                replaced.append(name)
                continue
        notes.append(f"{name or type(layer).__name__} stays dense: {reason}")
    return net, replaced, notes


def _times(sparse: nn.Module, dense: nn.Module, x: Tensor, rounds: int = 15) -> float:
    """How long `sparse` takes, in units of what `dense` takes: the median over rounds in which both run."""
    ratios = []
    for attempt in range(rounds + 3):
        spent = []
        for layer in (sparse, dense) if attempt % 2 else (dense, sparse):
            begin = time.perf_counter()
            layer(x)
            spent.append(time.perf_counter() - begin)
        first, second = spent
        ratios.append(first / second if attempt % 2 else second / first)
    ratios = sorted(ratios[3:])
    return ratios[len(ratios) // 2]


class CSR(Export):
    """A model for CPUs that skips zeros of any pattern: weights in compressed sparse rows (MKL's kernels).

    The file is safetensors; each layer that was replaced has `rows`, `columns`, `values` and `bias` in place of its
    weight. The metadata name these layers, and have a checksum. `load_csr` reads it.

    Args:
        where: "faster" replaces the layers that are faster so on this machine, "all" every one that has zeros.
    """

    weights_alone = True
    file = "model_csr.safetensors"
    runtime = "torch"
    advice = "more zeros (from about 90 % on), larger linear layers, larger batches, or structure=channel"

    def __init__(self, where: Literal["faster", "all"] = "faster") -> None:
        self.where = where

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        if not any(_convertible(layer) is None for _, layer in _layers(net)):
            return (
                f"{type(net).__name__} has no plain Linear or Conv2d layer, and only these have a sparse form. "
                "export=onnx and export=safetensors take any model"
            )
        return None

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        sparse, replaced, notes = to_csr(net, example, self.where)
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in sparse.state_dict().items()}
        names = json.dumps(replaced)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"csr": names, "sha256": _digest(names, tensors)})
        if not replaced:
            notes.insert(0, "no layer is faster with sparse kernels: this is the dense model")
        return notes

    def open(self, path: Path, net: nn.Module) -> Executable:
        return load_csr(path, net)


def load_csr(path: str | os.PathLike[str], net: nn.Module) -> nn.Module:
    """The model in a file that `CSR` wrote.

    >>> net = load_csr("outputs/.../model_csr.safetensors", Net(...))  # doctest: +SKIP

    Args:
        path: the file.
        net: a model of the same class, which is left as it is.

    Returns:
        A copy in eval mode, with the layers that skip zeros and the weights of the file.

    Raises:
        DamagedFileError: it is no such file, not what was written, or of another model.
    """
    net = copy.deepcopy(net).eval()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "csr" not in metadata or metadata.keys() - {"csr", "sha256"}:
            raise DamagedFileError("it has no layers in compressed sparse rows: write it with export=csr")
        if "sha256" not in metadata:
            warnings.warn(f"{path} has no checksum: it was written by version 0.1.0. Write it again", stacklevel=2)
        elif metadata["sha256"] != _digest(metadata["csr"], tensors):
            raise DamagedFileError("its checksum does not match")
        layers = dict(_layers(net))
        for name in json.loads(metadata["csr"]):
            if name not in layers or _convertible(layers[name]) is not None:
                raise DamagedFileError(f"{name} is not a layer of {type(net).__name__} that has a sparse form")
            _replace(net, name, _loaded(layers[name], name, tensors))
        net.load_state_dict(tensors)
    except OSError:
        raise
    except Exception as error:
        raise DamagedFileError(
            f"{path} is not a model in sparse rows, is incomplete, or belongs to another model: {error}"
        ) from error
    return net


def _digest(replaced: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names of the replaced layers, and of all tensors."""
    digest = hashlib.sha256(replaced.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _loaded(layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The sparse form of a layer, of what is in a file.

    Raises:
        DamagedFileError: the rows are none of a matrix of the layer's size. Kernels read what columns say unchecked.
    """
    inner = f"{name}.matrix" if isinstance(layer, nn.Conv2d) else name
    weight: Tensor = layer.weight  # type: ignore[assignment]
    out, inputs = len(weight), weight[0].numel()
    rows, columns, values = (tensors[f"{inner}.{part}"] for part in ("rows", "columns", "values"))
    bias = tensors.get(f"{inner}.bias")
    if rows.dtype != torch.int32 or columns.dtype != torch.int32 or values.dtype != weight.dtype:
        raise DamagedFileError(f"{name} has rows, columns and values of wrong types")
    if rows.shape != (out + 1,) or columns.dim() != 1 or columns.shape != values.shape:
        raise DamagedFileError(f"{name} has rows of another shape than {out} x {inputs}")
    if int(rows[0]) != 0 or int(rows[-1]) != len(columns) or bool((rows.diff() < 0).any()):
        raise DamagedFileError(f"{name} has rows that do not follow each other")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < inputs:
        raise DamagedFileError(f"{name} has columns beyond its {inputs} inputs")
    rising = columns.diff() > 0
    rising[rows[1:-1][(rows[1:-1] > 0) & (rows[1:-1] < len(columns))].long() - 1] = True  # from a row to the next
    if not bool(rising.all()):
        raise DamagedFileError(f"{name} has columns that are not in order")
    if (bias is None) != (layer.bias is None) or (bias is not None and bias.shape != (out,)):
        raise DamagedFileError(f"{name} has a bias of another size than {out}")
    linear = CSRLinear(rows, columns, values, inputs, bias)
    return CSRConv2d(layer, linear) if isinstance(layer, nn.Conv2d) else linear
