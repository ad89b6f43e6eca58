"""What the zoo of removal knows of an architecture, and what is counted of it before and after."""

from __future__ import annotations

import copy
import io
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.hooks import unfused
from pl_sparse.network.units import Coupling
from zoo.entry import ENTRIES, Case, tensor_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Called",
    "architecture",
    "architectures",
    "everything",
    "heads_of",
    "macs",
    "milliseconds",
    "one_of",
    "share",
    "why",
    "without_labels",
]


@dataclass(frozen=True)
class Architecture:
    """An architecture whose channels and heads are removed.

    Attributes:
        name: what it is called.
        package: where it comes from; "torch" for what is written here.
        make: makes the case.
        quick: whether it belongs to the tests that always run.
        fault: why it fails, for one that is known to.
    """

    name: str
    package: str
    make: Callable[[], Case]
    quick: bool = False
    fault: str | None = None

    @property
    def imported(self) -> str:
        """The package by the name that it is imported with."""
        return self.package.replace("-", "_")


ARCHITECTURES: list[Architecture] = []

_QUICK = {"BERT", "GPT-2", "Llama", "ViT", "ConvNeXt", "Swin", "ResNet", "DistilBERT"}
"""Of the zoo of training, those that also lose channels in the tests that always run."""

_NOT_HERE = {"torchao", "complextorch", "lightning", "torch"}
"""Packages of the zoo of training whose modules are not architectures, or cannot lose channels."""


def architecture(name: str, package: str, quick: bool = False, fault: str | None = None) -> Any:
    """Put the architecture that a function makes into the zoo of removal."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        ARCHITECTURES.append(Architecture(name, package, make, quick, fault))
        return make

    return register


def everything() -> list[Architecture]:
    """Those of the zoo of training, and those that are in this one alone."""
    trained = [
        Architecture(one.name, one.package, one.make, one.name in _QUICK)
        for one in ENTRIES
        if one.package not in _NOT_HERE
    ]
    return trained + ARCHITECTURES


def architectures(quick: Collection[str] | None = None) -> list[Any]:
    """All of them as parameters of a test; all but the quick ones are marked.

    Args:
        quick: the names of those; None: that are so themselves.
    """

    def marks(one: Architecture) -> list[pytest.MarkDecorator]:
        marks = [] if (one.quick if quick is None else one.name in quick) else [pytest.mark.zoo]
        return marks if one.fault is None else [*marks, pytest.mark.xfail(strict=True, reason=one.fault)]

    return [
        pytest.param(one, id=f"{one.package}-{one.name}".replace(" ", "_"), marks=marks(one)) for one in everything()
    ]


class Called(nn.Module):
    """The module of a case, called with a batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net = case.module
        self.__dict__["case"] = case  # beside the modules

    def forward(self, batch: Any) -> Any:
        return self.case.call(self.net, batch)


class Outputs(nn.Module):
    """Its first tensor, of a batch whose tensors are given one by one, as exporters call it."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = torch.utils._pytree.tree_flatten(batch)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tensor_of(self.model(torch.utils._pytree.tree_unflatten(leaves, self.spec)))


def heads_of(model: nn.Module) -> int:
    """How many layers of attention have heads that can go one by one."""
    return sum(isinstance(each, Attention) and each.heads > 1 for each in attentions(model))


def without_labels(model: nn.Module, batch: Any) -> Any:
    """A batch as it is for predictions, where the model can be called with it."""
    if not isinstance(batch, Mapping) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def one_of(model: nn.Module, batch: Any) -> tuple[Any, bool]:
    """The first sample of a batch, and True; the batch and False where it has no samples, such as a graph."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() else value

    single = torch.utils._pytree.tree_map(first, batch)
    try:
        out, whole = tensor_of(model(single)), tensor_of(model(batch))
        return (single, True) if out.shape[1:] == whole.shape[1:] and len(out) == 1 else (batch, False)
    except Exception:  # of code that is not ours
        return batch, False


@torch.no_grad()
def macs(model: nn.Module, batch: Any) -> float:
    """Multiply-accumulates of a call."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:  # the counter asks for graphs of what has gradients
        weight.requires_grad_(False)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with unfused(), math, FlopCounterMode(display=False) as counter:
        model(batch)
    for weight in trained:
        weight.requires_grad_(True)
    return counter.get_total_flops() / 2


def milliseconds(models: Sequence[nn.Module], batch: Any) -> tuple[list[float], str]:
    """The median time of a call of each model, in turns, and the runtime: ONNX Runtime, or torch where it cannot."""
    try:
        runs, runtime = [_session(model, batch) for model in models], "ONNX Runtime"
    except Exception:  # of an exporter
        runs, runtime = [_eager(model, batch) for model in models], "torch"
    times: list[list[float]] = [[] for _ in models]
    for run in runs:
        run()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.6 or len(times[0]) < 5:
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return [1000 * median(spent) for spent in times], runtime


def _session(model: nn.Module, batch: Any) -> Callable[[], Any]:
    import onnxruntime

    outputs, file = Outputs(copy.deepcopy(model), batch).eval(), io.BytesIO()
    names = [f"x{i}" for i in range(len(outputs.inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(outputs, outputs.inputs, file, input_names=names, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    used = {given.name for given in session.get_inputs()}
    feed = {name: x.numpy() for name, x in zip(names, outputs.inputs, strict=True) if name in used}
    expected = tensor_of(outputs(*outputs.inputs)).detach()
    (found,) = session.run(None, feed)
    if not torch.allclose(torch.from_numpy(found), expected, atol=1e-3 * float(expected.abs().max().clamp(1))):
        raise ValueError("the exported model computes something else")
    return lambda: session.run(None, feed)


def _eager(model: nn.Module, batch: Any) -> Callable[[], Any]:
    def run() -> None:
        with torch.inference_mode():
            model(batch)

    return run


def share(couplings: Sequence[Coupling], model: nn.Module) -> tuple[float, Counter[str]]:
    """The share of the outputs of layers that can be removed, and how many stay, by reason."""
    able, stay = 0, Counter[str]()
    for coupling in couplings:
        count = sum(len(port.places) * len(port.places[0]) for port in coupling.sources(model))
        if coupling.reason is None:
            able += count
        else:
            stay[why(coupling.reason)] += count
    total = able + sum(stay.values())
    return (able / total if total else 0.0), stay


def why(reason: str) -> str:
    """A reason without the names of layers."""
    reason = re.sub(r"go through \S+ \((\w+)\), which needs", r"go through a \1, which needs", reason)
    reason = re.sub(r"a parameter or buffer of \S+ \((\w+)\)", r"a parameter or buffer of a \1", reason)
    reason = re.sub(r"the weights? of \S+", "its weight", reason)
    reason = re.sub(r"those of \S+,", "those of a layer,", reason)
    reason = re.sub(r"^\S+ reads", "its layer reads", reason)
    reason = re.sub(r"(\w+), a buffer of \S+ is", r"a buffer (\1) is", reason)
    reason = re.sub(r"\(((\w+Error)(: [^0-9\[\]]*)?).*", r"(\2)", reason)
    return reason.replace("keeps its channels: ", "").replace("|", "/").strip()
