"""What a device can make of zeros: which structures it accelerates, in which number formats, run how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pl_sparse.core.registry import suggestion
from pl_sparse.network.runtimes import ELSEWHERE, RUNTIMES
from pl_sparse.structure import NM, Structure, structure

__all__ = ["Hardware"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device that the trained model is to run on, as data: each YAML of conf/hardware is one.

    Args:
        name: what messages call it.
        accelerates: structures whose zeros it skips, by name; "nm24" is that pattern, "n:4" those of four neighbours,
            "block" all sizes; None: any.
        least_sparsity: the sparsity below which skipping zeros costs more than it saves; or such by structure.
        multiple: it computes with channels in multiples of this; what a layer keeps is best one.
        dtypes: the types of weights it computes with, best first.
        exports: the formats that it runs, best first.
        strict: whether a structure that it cannot use is refused, or only warned about.
        runtime: what milliseconds are measured in: "torch", "onnxruntime", "openvino", or "elsewhere" for a device that
            is not this machine, whose milliseconds are not known; None: torch for a budget, ONNX Runtime for
            target=latency.
        device: what torch computes on: "cpu" or "cuda"; None: the device that trains.
        budget_kb: how many kilobytes (1000 bytes) the exported file may have; None: any size.
        budget_ms: how many milliseconds a batch of two may take; None: any time.
        macs: what may be left of the multiply-accumulates: a fraction, or above 1 their number for a sample; None: any.

    >>> ampere = Hardware(name="ampere", accelerates=["nm24", "channel"])
    >>> ampere.objection(structure("nm24"), 0.5) is None
    True
    >>> print(ampere.objection(structure("unstructured"), 0.9))
    hardware=ampere cannot use zeros of structure=unstructured: they make nothing faster. What it accelerates: \
structure=nm24, channel

    Raises:
        ValueError: an unknown structure, or a number that makes no sense.
    """

    name: str
    accelerates: Sequence[str] | None = None
    least_sparsity: float | Mapping[str, float] = 0.0
    multiple: int = 1
    dtypes: Sequence[str] = ("float32", "int8", "int4")
    exports: Sequence[str] = ("onnx",)
    strict: bool = True
    runtime: str | None = None
    device: str | None = None
    budget_kb: float | None = None
    budget_ms: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        by_name = self.least_sparsity if isinstance(self.least_sparsity, Mapping) else {}
        for name in (*(self.accelerates or ()), *by_name):
            _is(structure("unstructured"), name)
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple!r} must be 1 or more")
        if not self.dtypes or not self.exports:
            raise ValueError(f"hardware={self.name} needs at least one of dtypes and one of exports")
        if self.runtime is not None and self.runtime not in (ELSEWHERE, *RUNTIMES):
            known = suggestion(self.runtime, [*RUNTIMES, ELSEWHERE])
            raise ValueError(f"hardware.runtime={self.runtime} is unknown. {known}")
        for key in ("budget_kb", "budget_ms", "macs"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key}={value!r} must be above 0")

    def objection(self, pruned: Structure, sparsity: float) -> str | None:
        """Why zeros make nothing faster here, and what would; None if they do.

        Args:
            pruned: what is pruned together.
            sparsity: that training aims at; a structure with a sparsity of its own has that one.
        """
        if self.accelerates is not None and not any(_is(pruned, name) for name in self.accelerates):
            return (
                f"hardware={self.name} cannot use zeros of structure={pruned.label}: they make nothing faster. "
                f"What it accelerates: structure={', '.join(self.accelerates)}"
            )
        reached = sparsity if pruned.fixed is None else pruned.fixed
        least = self._least(pruned)
        if reached < least:
            return (
                f"hardware={self.name} gains from zeros at a sparsity of {least:g} or more, and this "
                f"will be {reached:g}: raise sparsity"
                + (f", with a structure other than {pruned.label}" if pruned.fixed is not None else "")
            )
        return None

    def _least(self, pruned: Structure) -> float:
        """The sparsity from which zeros of a structure pay."""
        if not isinstance(self.least_sparsity, Mapping):
            return self.least_sparsity
        return max((least for name, least in self.least_sparsity.items() if _is(pruned, name)), default=0.0)

    def refusal(self, dtype: str) -> str | None:
        """Why weights of this type cannot run here, and which can; None if they can."""
        if dtype in self.dtypes:
            return None
        ways = {"int8": "quantization=int8", "int4": "quantization=int4_weight"}
        possible = ", ".join(ways.get(name, "quantization=none") for name in self.dtypes)
        return f"hardware={self.name} does not compute with {dtype} weights: use {possible}"


def _is(pruned: Structure, name: str) -> bool:
    """Whether a structure is what a name stands for: "n:4" for each of four neighbours, "block" for all sizes."""
    if match := re.fullmatch(r"n:(\d+)", name):
        return type(pruned) is NM and pruned.m == int(match[1])
    named = structure(name)
    return named.label == pruned.label if any(map(str.isdigit, name)) else type(named) is type(pruned)
