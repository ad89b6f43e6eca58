"""2:4 weights for the sparse tensor cores of GPUs."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pl_sparse.core.optional import missing
from pl_sparse.export.compressed import loaded, save_compressed
from pl_sparse.export.format import Executable, Export
from pl_sparse.structure import Structure

__all__ = ["SemiStructured", "load_semi_structured", "to_semi_structured", "unfit"]

_OUT, _IN = 32, 64
"""Half-precision weights come in multiples of this many outputs and inputs."""


def unfit(name: str, layer: nn.Linear) -> str | None:
    """Why a linear layer cannot run on sparse tensor cores; None if it can."""
    out, inputs = layer.weight.shape
    if out % _OUT or inputs % _IN:
        return f"{name} stays dense: {out}x{inputs} is not a multiple of {_OUT}x{_IN}"
    kept = layer.weight.unflatten(1, (-1, 4)) != 0  # (out, in / 4, 4)
    if int(kept.sum(-1).max()) > 2:
        return f"{name} stays dense: some four neighbours have more than two non-zeros"
    return None


def to_semi_structured(net: nn.Module) -> tuple[nn.Module, list[str], list[str]]:
    """A copy of a model, in half precision on the GPU, whose 2:4 linear layers run on sparse tensor cores.

    Args:
        net: any model; it is left as it is.

    Returns:
        The copy in eval mode, the names of these layers, and why each other linear layer is dense.

    Raises:
        ValueError: there is no GPU with sparse tensor cores, or no layer fits.
    """
    refusal = _no_gpu()
    if refusal is not None:
        raise ValueError(refusal)
    from torch.sparse import to_sparse_semi_structured

    net = copy.deepcopy(net).eval().half().cuda()
    converted, notes = [], []
    for name, layer in net.named_modules():
        if type(layer) is not nn.Linear:  # a subclass may be one whose weight is read by another module
            continue
        reason = unfit(name, layer)
        if reason is not None:
            notes.append(reason)
            continue
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
        converted.append(name)
    if not converted:
        raise ValueError("no linear layer has a 2:4 weight that sparse tensor cores take: " + "; ".join(notes[:5]))
    return net, converted, notes


def _no_gpu() -> str | None:
    """Why there are no sparse tensor cores here; None if there are."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"export=semi_structured needs an NVIDIA GPU of compute capability 8.0 or more, and here is {device}. Train "
        "without it, and call `pl-sparse export RUN --to semi_structured` where there is one"
    )


class SemiStructured(Export):
    """A model whose 2:4 linear layers run on sparse tensor cores, in half precision.

    The file has the half-precision weights as `Compressed` stores them; they take their form for the GPU when loaded,
    by `load_semi_structured`.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378.
    """

    weights_alone = True
    file = "model_24.safetensors.zst"
    runtime = "torch, float16"
    advice = (
        "larger layers, larger batches and a CUDA graph (a call costs the host 0.4 ms and more), or structure=coupled, "
        "whose smaller dense layers pay earlier"
    )

    def refusal(self, net: nn.Module, example: Tensor | None, structure: Structure, sparsity: float) -> str | None:
        if not structure.label.startswith("2:4"):
            return f"sparse tensor cores know 2:4 alone, not structure={structure.label}: use structure=nm24"
        linear = [(name, layer) for name, layer in net.named_modules() if type(layer) is nn.Linear]
        if not any(layer.out_features % _OUT == 0 and layer.in_features % _IN == 0 for _, layer in linear):
            shapes = ", ".join(f"{n} {layer.out_features}x{layer.in_features}" for n, layer in linear[:5]) or "none"
            return f"no plain linear layer is a multiple of {_OUT}x{_IN} (out x in); there is {shapes}"
        return missing("export", "zstandard") or _no_gpu()

    def write(self, net: nn.Module, example: Tensor, path: Path) -> list[str]:
        _, _, notes = to_semi_structured(net)
        save_compressed({name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}, path)
        return notes

    def open(self, path: Path, net: nn.Module) -> Executable:
        return _on_gpu(load_semi_structured(path, net))

    def dense(self, net: nn.Module, example: Tensor, folder: Path) -> Executable:
        return _on_gpu(copy.deepcopy(net).eval().half().cuda())


def load_semi_structured(path: str | os.PathLike[str], net: nn.Module) -> nn.Module:
    """The model in a file that `SemiStructured` wrote.

    >>> net = load_semi_structured("outputs/.../model_24.safetensors.zst", Net(...))  # doctest: +SKIP

    Args:
        path: the file.
        net: a model of the same class, which is left as it is.

    Returns:
        A copy in eval mode, in half precision on the GPU, whose 2:4 linear layers run on sparse tensor cores.

    Raises:
        DamagedFileError: it is no such file, not what was written, or of another model.
        ValueError: there is no GPU with sparse tensor cores, or no layer fits.
        ImportError: the package zstandard is missing.
    """
    sparse, _, _ = to_semi_structured(loaded(path, net))
    return sparse


def _on_gpu(net: nn.Module) -> Executable:
    """A half-precision model on the GPU, from inputs to outputs on the CPU."""

    def run(x: Tensor) -> Tensor:
        out = net(x.half().cuda()).float().cpu()  # to the CPU: the time includes the work
        return out

    return run
