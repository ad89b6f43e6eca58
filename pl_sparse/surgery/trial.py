"""A removal is tried before it is believed: random weights, some units zero, those units removed, the same outputs."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_sparse.core.upstream import CHANNEL_NORMS
from pl_sparse.network.attention import Attention
from pl_sparse.network.channels import short, traced_couplings
from pl_sparse.network.hooks import called, hooked, stand_ins
from pl_sparse.network.layers import held, numbers, own_tensors, sides
from pl_sparse.network.units import Coupling, Port
from pl_sparse.surgery.heads import FewerHeads, head_indices
from pl_sparse.surgery.plan import RemovalPlan, named_tensors
from pl_sparse.surgery.random_weights import RandomWeights

__all__ = ["changed_by", "couplings", "difference", "heads_hold", "on_trial", "randomized"]

_TOLERANCE = 1e-4
_NEAR = 8  # of the couplings where a call fails, so many are tried one by one
_FAILED = "a trial showed that its channels depend on each other in ways that cannot be followed"
_UNCALLED = "a trial showed that the model cannot be called without some of its channels"


def couplings(model: nn.Module, example: Any, asked: Callable[[Coupling], bool] | None = None) -> list[Coupling]:
    """The channels of a model in groups that can be removed only together, each with why it cannot, if so.

    Args:
        model: any model; it is left as it is.
        example: inputs, as the model is called with; a batch of two is enough.
        asked: which of them are tried; None: all. The others have the reasons of rules alone.

    Raises:
        ValueError: the model cannot be called with the example.
    """
    coupled = traced_couplings(model, example)
    candidates = [each for each in coupled if each.reason is None and (asked is None or asked(each))]
    failure = _fails(model, example, candidates)
    if failure is None:
        return coupled
    for find in (_find_by_place, _find_by_halves):
        tried: dict[int, Coupling] = {}
        find(model, example, candidates, failure, tried)
        found = {id(each): tried.get(id(each), each) for each in candidates}
        rest = _fails(model, example, [each for each in found.values() if each.reason is None])
        if rest is None:
            return [found.get(id(each), each) for each in coupled]
        reason = rest.reason  # parts can be removed, all together not
    found = {key: replace(each, reason=each.reason or reason) for key, each in found.items()}
    return [found.get(id(each), each) for each in coupled]


class _Failure(NamedTuple):
    """Why units cannot be removed.

    Attributes:
        reason: in words.
        place: the path of the module that was called last, where the model cannot be called without them; else None.
        operations: how many it had called by then.
    """

    reason: str
    place: str | None = None
    operations: int = 0

    def precedes(self, other: _Failure | None) -> bool:
        """Whether a call got further with another failure, or without one."""
        return other is None or other.place is None or other.operations > self.operations


def _find_by_place(
    model: nn.Module,
    example: Any,
    removable: Sequence[Coupling],
    failure: _Failure | None,
    tried: dict[int, Coupling],
) -> None:
    """Find the couplings that cannot be removed as they are by where a call of the model fails: one of those that are
    there gets what counts its units, or is left out and tried alone, so that the next call gets further.

    Args:
        failure: that of all of them.
        tried: as in `_find_failing`; nothing where outputs differ.
    """
    now = {id(coupling): coupling for coupling in removable}
    while failure is not None and failure.place is not None:
        near = _near(now, failure.place)
        counted = [
            now | {key: replace(now[key], counts=counts)}
            for key in near[:_NEAR]
            if not now[key].counts and (counts := tuple(_sizes_at(model, now[key], [failure.place])))
        ]
        fewer = [{key: each for key, each in now.items() if key not in gone} for gone in (*zip(near[:_NEAR]), near)]
        for others in (*counted, *fewer):
            further = _fails(model, example, list(others.values()))
            if failure.precedes(further):
                now, failure = others, further
                break
        else:
            return
    if failure is not None:
        return
    alone = {key: coupling for key, coupling in now.items() if coupling.counts}  # where others keep all of theirs
    while (failure := _fails(model, example, list(alone.values()))) is not None:
        near = [] if failure.place is None else _near(now, failure.place)
        gone = {key for key in near if any(_sizes_at(model, now[key], [failure.place or ""]))}
        gone |= set() if gone & alone.keys() else alone.keys()
        now, alone = ({key: each for key, each in some.items() if key not in gone} for some in (now, alone))
    failed: dict[Any, int | None] = {}
    for coupling in removable:
        if id(coupling) not in now:
            _find_failing(model, example, [coupling], tried, failed)
    tried |= alone


def _find_by_halves(
    model: nn.Module, example: Any, removable: Sequence[Coupling], failure: _Failure, tried: dict[int, Coupling]
) -> None:
    """The same by halves of those that cannot be removed together."""
    _find_failing(model, example, removable, tried, {})


def _near(couplings: Mapping[int, Coupling], path: str) -> list[int]:
    """The couplings that have a layer at or within a module, by their keys; those that are the nearest come first."""
    depths = {}
    for key, coupling in couplings.items():
        inside = [port.path for port in coupling.ports if f"{port.path}.".startswith(f"{path}." if path else "")]
        if inside:
            depths[key] = min(each.count(".") for each in inside)
    return sorted(depths, key=depths.__getitem__)


def _find_failing(
    model: nn.Module,
    example: Any,
    removable: Sequence[Coupling],
    tried: dict[int, Coupling],
    failed: dict[Any, int | None],
) -> None:
    """Find the couplings that cannot be removed as they are, by halves of those that cannot together.

    Args:
        removable: one, or several of which some are to be found.
        tried: gets what takes their place, by their identity: a coupling with a reason, or with what counts its units.
        failed: gets the kinds of those that cannot, each with which of `_counts` it holds with; the next ones of a kind
            are tried one by one, with the same.
    """
    if len(removable) > 1:
        for coupling in [each for each in removable if _kind(each) in failed]:
            _find_failing(model, example, [coupling], tried, failed)
        removable = [coupling for coupling in removable if id(coupling) not in tried]
    failure = _fails(model, example, removable)
    if failure is None:
        return
    reason = failure.reason
    if len(removable) == 1:
        (coupling,) = removable
        kind = _kind(coupling)
        counted = list(_counts(model, coupling, failure.place)) if failure.place is not None else []
        holding = (
            which
            for which, counts in enumerate(counted)
            if failed.get(kind, which) == which and _fails(model, example, [replace(coupling, counts=counts)]) is None
        )
        which = next(holding, None)
        failed.setdefault(kind, which)
        tried[id(coupling)] = replace(coupling, **({"reason": reason} if which is None else {"counts": counted[which]}))
        return
    half, before = len(removable) // 2, len(tried)
    _find_failing(model, example, removable[:half], tried, failed)
    _find_failing(model, example, removable[half:], tried, failed)
    if len(tried) == before:  # either half can be removed, both cannot
        tried |= {id(coupling): replace(coupling, reason=reason) for coupling in removable}


def _kind(coupling: Coupling) -> Any:
    """What the same channels of repeated blocks have in common."""
    ends = (port.end._replace(path=re.sub(r"\d+", "", port.path)) for port in coupling.ports)
    return coupling.units, frozenset(ends)


def _counts(model: nn.Module, coupling: Coupling, place: str) -> Iterator[tuple[tuple[str, str, int], ...]]:
    """The attributes of modules that are as large as a coupling has units, or channels in a layer: widths of slices and
    views, and of states that begin as zeros. Those of the module where a call fails come first, then those of modules
    around the layers, the nearest first, then more: all of them, those that count units and those that count channels,
    and each alone, as others may be as large by chance."""
    if here := tuple(_sizes_at(model, coupling, [place])):
        yield here
    paths = {port.path if port.tensor else port.path.rpartition(".")[0] for port in coupling.ports}
    found: dict[tuple[str, str], int] = {}
    while paths:
        nearer = len(found)
        found |= {(path, key): each for path, key, each in _sizes_at(model, coupling, sorted(paths))}
        counts = tuple((*at, each) for at, each in found.items())
        if counts[nearer:]:
            alike = [tuple(count for count in counts if count[2] == each) for each in dict.fromkeys(found.values())]
            yield from dict.fromkeys([counts, *alike, *((count,) for count in counts[nearer:])])
        paths = {path.rpartition(".")[0] for path in paths if path}


def _sizes_at(model: nn.Module, coupling: Coupling, paths: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Those of some modules: the path, the attribute, and how many of its number are a unit."""
    sizes = {coupling.units: 1} | {coupling.units * len(p.places[0]): len(p.places[0]) for p in coupling.ports}
    for path in paths:
        module = model.get_submodule(path)
        for key, value in numbers(module) if not sides(module) else ():  # a layer counts its own by itself
            if value in sizes and value > 1:
                yield path, key, sizes[value]


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


def _fails(model: nn.Module, example: Any, removable: Sequence[Coupling]) -> _Failure | None:
    """Why many of the units cannot be removed, where they are zero, without a change of the outputs; None if they can.

    Each coupling has units of its own drawn, and how many: were they the same ones, or as many, couplings that depend
    on each other would pass.
    The model without them is called first, since one that cannot be called fails early.
    """
    drawn = random.Random(0)
    removed = []
    for each in removable:
        left = drawn.choice(_left(each.units))
        removed.append((each, sorted(drawn.sample(range(each.units), each.units - left))))
    if not removable:
        return None
    calls = _Calls(model)
    try:
        plan = RemovalPlan.of(model, removed)
        try:
            after = calls.zeroed(example, removed, plan)
        except Exception as error:
            return _Failure(f"{_UNCALLED} ({short(error)})", calls.inside[-1], calls.operations)
        gap = _gap(calls.zeroed(example, removed), after)
    except Exception as error:  # of a layer that is other than it looks
        return _Failure(f"{_FAILED} ({short(error)})")
    return None if gap <= _TOLERANCE else _Failure(_FAILED)


class _Calls:
    """Calls of a model with random weights.

    Attributes:
        inside: the paths of the modules that the last one is, or was, in.
        operations: how many operations it called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inside = [""]
        self.operations = 0
        self._model = model
        self._paths = {module: path for path, module in model.named_modules()}

    def zeroed(
        self, example: Any, units: Sequence[tuple[Coupling, list[int]]], plan: RemovalPlan | None = None
    ) -> list[list[Tensor]]:
        """The outputs for the example and for noise, where some units are zero.

        Args:
            plan: takes the units out first.
        """
        model = self._model
        with on_trial(model):
            weights = randomized(model)
            for coupling, zero in units:
                for port in coupling.ports:
                    places = [place for unit in zero for place in port.places[unit]]
                    _silence(model.get_submodule(port.path), port, places, weights)
            with weights:
                if plan is not None:
                    plan.apply(model, take=weights.cut)
                begun = weights.operations
                try:
                    with hooked(model.modules(), pre=self._enter, post=self._leave), _RefusedEmptyAttention():
                        return [called(model, inputs) for inputs in (example, _noise(example))]
                finally:
                    self.operations = weights.operations - begun

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(self._paths[module])

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self.inside.pop()


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


def _left(units: int) -> list[int]:
    """The largest prime numbers of units that are at most two thirds: code that needs a multiple fails."""
    most = 2 * units // 3
    primes = (n for n in range(most, 1, -1) if all(n % divisor for divisor in range(2, math.isqrt(n) + 1)))
    return list(islice(primes, 3)) or [1]


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
    return _gap(before, after)


def _gap(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference of outputs, relative to the largest before if that is above 1."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if len(old) != len(new):
            return float("inf")
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
