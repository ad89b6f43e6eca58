"""A removal is tried before it is believed: random weights, some units zero, those units removed, the same outputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_sparse.core.upstream import CHANNEL_NORMS
from pl_sparse.network.attention import Attention
from pl_sparse.network.channels import short, traced_couplings
from pl_sparse.network.hooks import called, stand_ins
from pl_sparse.network.layers import held, numbers, own_tensors
from pl_sparse.network.units import Coupling, Port
from pl_sparse.surgery.heads import FewerHeads, head_indices
from pl_sparse.surgery.plan import RemovalPlan, named_tensors
from pl_sparse.surgery.random_weights import RandomWeights

__all__ = ["changed_by", "couplings", "difference", "heads_hold", "on_trial", "randomized"]

_TOLERANCE = 1e-4
_FAILED = "a trial showed that its channels depend on each other in ways that cannot be followed"
_UNCALLED = "a trial showed that the model cannot be called without some of its channels"


def couplings(model: nn.Module, example: Any) -> list[Coupling]:
    """The channels of a model in groups that can be removed only together, each with why it cannot, if so.

    Args:
        model: any model; it is left as it is.
        example: inputs, as the model is called with; a batch of two is enough.

    Raises:
        ValueError: the model cannot be called with the example.
    """
    coupled = traced_couplings(model, example)
    tried: dict[int, Coupling] = {}
    _find_failing(model, example, [coupling for coupling in coupled if coupling.reason is None], tried)
    coupled = [tried.get(id(coupling), coupling) for coupling in coupled]
    removable = [coupling for coupling in coupled if coupling.reason is None]
    if tried and removable and (reason := _fails(model, example, removable)):  # parts can be removed, all together not
        coupled = [replace(coupling, reason=coupling.reason or reason) for coupling in coupled]
    return coupled


def _find_failing(model: nn.Module, example: Any, removable: Sequence[Coupling], tried: dict[int, Coupling]) -> None:
    """Find the couplings that cannot be removed as they are, by halves of those that cannot together.

    Args:
        tried: gets what takes their place, by their identity: a coupling with a reason, or with what counts its units.
    """
    reason = _fails(model, example, removable) if removable else None
    if reason is None:
        return
    if len(removable) == 1:
        (coupling,) = removable
        counted = _counts(model, coupling) if reason.startswith(_UNCALLED) else ()
        others = (replace(coupling, counts=counts) for counts in counted)
        holds = next((other for other in others if _fails(model, example, [other]) is None), None)
        tried[id(coupling)] = holds or replace(coupling, reason=reason)
        return
    half, before = len(removable) // 2, len(tried)
    _find_failing(model, example, removable[:half], tried)
    _find_failing(model, example, removable[half:], tried)
    if len(tried) == before:  # either half can be removed, both cannot
        tried |= {id(coupling): replace(coupling, reason=reason) for coupling in removable}


def _counts(model: nn.Module, coupling: Coupling) -> Iterator[tuple[tuple[str, str, int], ...]]:
    """The attributes of the modules around the layers of a coupling that are as large as it has units, or channels in
    one of them: widths of slices and views, and of states that begin as zeros. The nearest come first, then more; at
    each distance all of them, then each alone, as others may be as large by chance."""
    paths = {port.path if port.tensor else port.path.rpartition(".")[0] for port in coupling.ports}
    sizes = {coupling.units: 1} | {coupling.units * len(p.places[0]): len(p.places[0]) for p in coupling.ports}
    found: dict[tuple[str, str], int] = {}
    while paths:
        nearer = len(found)
        for path in sorted(paths):
            for key, value in numbers(model.get_submodule(path)):
                if value in sizes and value > 1:
                    found[path, key] = sizes[value]
        counts = tuple((*place, each) for place, each in found.items())
        if counts[nearer:]:
            yield counts
        if len(counts) > 1:
            yield from ((count,) for count in counts[nearer:])
        paths = {path.rpartition(".")[0] for path in paths if path}


@contextmanager
def on_trial(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with tensors that may be changed; afterwards it is what it is now."""
    with stand_ins(model), torch.no_grad():
        try:
            yield
        finally:
            attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for module in attention:
        FewerHeads.suit(module)


def _fails(model: nn.Module, example: Any, removable: Sequence[Coupling]) -> str | None:
    """Why many of the units cannot be removed, where they are zero, without a change of the outputs; None if they can.

    Each coupling has units of its own drawn: were they the same ones, couplings that depend on each other would pass.
    """
    drawn = random.Random(0)
    removed = [(each, sorted(drawn.sample(range(each.units), each.units - _left(each.units)))) for each in removable]
    with on_trial(model):
        weights = randomized(model)
        for coupling, units in removed:
            for port in coupling.ports:
                places = [place for unit in units for place in port.places[unit]]
                _silence(model.get_submodule(port.path), port, places, weights)
        errors: list[Exception] = []
        try:
            plan = RemovalPlan.of(model, removed)
            with weights:
                gap = changed_by(model, example, partial(plan.apply, take=weights.cut), errors)
            if gap <= _TOLERANCE:
                return None
        except Exception as error:  # of a layer that is other than it looks
            return f"{_FAILED} ({short(error)})"
        return f"{_UNCALLED} ({short(errors[0])})" if errors else _FAILED


def heads_hold(
    model: nn.Module,
    example: Any,
    heads: Sequence[tuple[Attention, list[int]]],
    plan: RemovalPlan,
    errors: list[Exception],
) -> bool:
    """Whether a plan takes heads that add nothing out of attention layers without a change of the outputs.

    The weights are random: a last layer that is nearly zero, as that of a new diffusion model, would hide any change.

    Args:
        heads: those that go, by layer.
        errors: gets the error of a model that cannot be called without them.
    """
    with on_trial(model):
        weights = randomized(model)
        for attention, gone in heads:
            *_, (output, dim, places) = head_indices(attention, gone)
            weights.silence(output.get_parameter("weight"), dim, sorted(places))
        with weights:
            return changed_by(model, example, partial(plan.apply, take=weights.cut), errors) <= _TOLERANCE


def _left(units: int) -> int:
    """The largest prime number of units that is at most two thirds: code that needs a multiple fails."""
    most = max(1, 2 * units // 3)
    return next(n for n in range(most, 0, -1) if all(n % divisor for divisor in range(2, math.isqrt(n) + 1)))


def randomized(model: nn.Module) -> RandomWeights:
    """All tensors get random values, always the same ones, at which no channel is zero by chance."""
    weights = RandomWeights()
    torch.manual_seed(0)
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point() and tensor.dim() > 1 and isinstance(tensor, nn.Parameter) and tensor.numel():
            weights.randomize(tensor)
        elif tensor.is_floating_point():
            positive = not isinstance(tensor, nn.Parameter) and bool((tensor >= 0).all())  # as variances are
            fan = tensor.numel() // len(tensor) if tensor.dim() > 1 and tensor.numel() else 4
            tensor.data = torch.randn_like(tensor) * fan**-0.5
            if positive:
                tensor.data = tensor.abs() + 0.5
    for module in model.modules():
        if isinstance(module, CHANNEL_NORMS) and isinstance(module.running_var, Tensor):
            module.running_var.data = module.running_var.abs() + 0.5
    return weights


def _silence(module: nn.Module, port: Port, channels: Sequence[int], weights: RandomWeights) -> None:
    """Make channels of a layer zero: weights, biases, scales and shifts.

    Args:
        module: the layer.
        port: an end of it; where channels are taken in, or multiplied, nothing is done.
        channels: their places there.
        weights: those that are made when they are read.
    """
    if port.side not in ("out", "shift", "norm") or isinstance(module, nn.PReLU):
        return
    tensors = own_tensors(module)
    for each in held(module, port.end):
        tensor = tensors[each.name]
        if isinstance(tensor, nn.Parameter) or port.side == "shift":
            indices = each.indices(channels)
            if not weights.silence(tensor, each.dim, indices):
                index = torch.tensor(indices, device=tensor.device)
                tensor.data = tensor.index_fill(each.dim, index, 0)


def difference(
    model: nn.Module, example: Any, change: Callable[[nn.Module], None], errors: list[Exception] | None = None
) -> float:
    """How far a change of a model moves its outputs, relative to the largest of them if that is above 1.

    The outputs are those for the example and for noise, in evaluation mode. The model is left as it is.

    Args:
        example: inputs, as the model is called with.
        change: changes the model in place.
        errors: gets the error of a changed model that cannot be called.

    Returns:
        The largest difference; infinity if the changed model cannot be called, or its outputs have another shape.
    """
    with on_trial(model):
        return changed_by(model, example, change, errors)


def changed_by(
    model: nn.Module, example: Any, change: Callable[[nn.Module], None], errors: list[Exception] | None
) -> float:
    """The same of a model that may be changed for good."""
    inputs = [example, _noise(example)]
    before = [called(model, x) for x in inputs]
    try:
        change(model)
        with _RefusedEmptyAttention():
            after = [called(model, x) for x in inputs]
    except Exception as error:
        if errors is not None:
            errors.append(error)
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            if a.shape != b.shape:
                return float("inf")
            if a.is_floating_point() and a.numel():
                gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(float("inf"))
                size = a.abs().nan_to_num(0.0, 0.0).max()
                worst = max(worst, float(gap.max()) / max(1.0, float(size)))
    return worst


class _RefusedEmptyAttention(TorchFunctionMode):
    """Attention without a head raises: a torch before 2.13 divides by their number, which ends the process.

    Code that cuts one tensor into queries, keys and values at fixed places gets there if heads are taken from it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            for tensor in (*args, *(kwargs or {}).values()):
                if isinstance(tensor, Tensor) and not tensor.numel():
                    raise RuntimeError(f"attention gets a tensor of shape {tuple(tensor.shape)}")
        return function(*args, **(kwargs or {}))


def _noise(example: Any) -> Any:
    """Inputs of the same shapes: noise for floats, the same for what else there is."""
    if isinstance(example, Tensor):
        if not example.is_floating_point():
            return example
        generator = torch.Generator().manual_seed(1)
        return torch.randn(example.shape, generator=generator).to(example)
    if isinstance(example, Mapping):
        return {key: _noise(value) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(_noise(value) for value in example)
    return example
