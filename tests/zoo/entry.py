"""What the zoo knows of a module: how it is made, called and trained, and by which axes it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["ENTRIES", "Case", "Entry", "entry", "params", "tensor_of"]

SCORERS = ("magnitude", "movement", "taylor", "wanda", "snip", "gradient", "random")
STRUCTURES = ("unstructured", "nm24", "row", "block4x4", "channel")
ALLOCATIONS = ("erk", "uniform", "global", "lamp")
MASKINGS = ("auto", "hard", "ste")


def tensor_of(output: Any) -> Tensor:
    """The first tensor of real numbers in what a module returns."""
    if isinstance(output, Tensor):
        return torch.view_as_real(output) if output.is_complex() else output
    for name in ("logits", "last_hidden_state", "prediction", "sample"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)  # type: ignore[no-any-return]
    values = output.values() if isinstance(output, Mapping) else output
    return tensor_of(next(value for value in values if value is not None))


def call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple) else module(batch)


def loss_of(output: Any) -> Tensor:
    """The module's own loss, if it has one, else the distance to fixed numbers."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    out = tensor_of(output)
    target = torch.arange(out.numel(), device=out.device).sin().reshape(out.shape).to(out.dtype)
    return (out - target).square().mean()


@dataclass
class Case:
    """One module and what it is fed.

    Attributes:
        module: the module, with new random weights; a LightningModule trains itself.
        draw: makes a batch.
        call: what the module returns of a batch.
        loss: what is minimized, of the module and a batch; None: `loss_of` what `call` returns.
        made: gives weights to a module that has none yet, in `configure_model`.
        unresumed: why a training of it cannot be resumed by Lightning, with or without a Sparsity callback.
        plain: whether the checkpoint loads with `weights_only=True`.
    """

    module: nn.Module
    draw: Callable[[], Any]
    call: Callable[[nn.Module, Any], Any] = call
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    made: Callable[[nn.Module], None] | None = None
    plain: bool = True
    unresumed: str | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: what the module is called.
        package: where it comes from; "torch" for the awkward ones, written here of what torch has.
        make: makes the case.
        options: of Sparsity: axes by rotation, and what the entry says itself.
        left_out: patterns of the reasons that are expected where less than 95 % of the weights are pruned.
        quick: whether it belongs to the tests that always run.
        fault: why it fails, for an entry that is known to.
    """

    name: str
    package: str
    make: Callable[[], Case]
    options: Mapping[str, Any]
    left_out: Sequence[str] = ()
    quick: bool = False
    fault: str | None = None

    @property
    def imported(self) -> str:
        """The package by the name that it is imported with."""
        return self.package.replace("-", "_")


ENTRIES: list[Entry] = []


def rotated(index: int) -> dict[str, Any]:
    """Axes whose cycles have lengths without a common divisor: each pair of values comes up in turn."""
    chosen = {
        axis: values[index % len(values)]
        for axis, values in (
            ("scorer", SCORERS),
            ("structure", STRUCTURES),
            ("allocation", ALLOCATIONS),
            ("masking", MASKINGS),
        )
    }
    if chosen["scorer"] == "movement":  # it is defined with weights that are frozen while they are pruned
        chosen["masking"] = "auto"
        if chosen["allocation"] == "lamp":  # its scores have a sign
            chosen["allocation"] = "global"
    return {**chosen, "sparsity": 0.5 if chosen["structure"] in ("nm24", "channel") else 0.75}


def entry(
    name: str,
    package: str,
    quick: bool = False,
    left_out: Sequence[str] = (),
    fault: str | None = None,
    **options: Any,
) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Put the module that a function makes into the zoo; `options` take the place of those of the rotation."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        ENTRIES.append(Entry(name, package, make, {**rotated(len(ENTRIES)), **options}, left_out, quick, fault))
        return make

    return register


def params() -> list[Any]:
    """The entries as parameters of a test; all but the quick ones are marked."""

    def marks(one: Entry) -> list[pytest.MarkDecorator]:
        marks = [] if one.quick else [pytest.mark.zoo]
        return marks if one.fault is None else [*marks, pytest.mark.xfail(strict=True, reason=one.fault)]

    return [pytest.param(one, id=one.name.replace(" ", "_"), marks=marks(one)) for one in ENTRIES]
