"""Weights that a model computes others from before it multiplies inputs: whether their zeros are zeros of those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.parametrized import is_computed, tried
from pl_sparse.core.upstream import compiled
from pl_sparse.core.used import PRODUCTS, memory
from pl_sparse.network.hooks import tensors

__all__ = ["ComputedWeights", "FirstCall"]

_RANDOM = ("rand", "normal", "bernoulli", "poisson", "multinomial")


@dataclass(frozen=True)
class _Call:
    """A function of parameters alone, and which of its outputs a tensor is."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    index: int | None
    output: Tensor  # as long as it is held no other tensor has its identity
    sources: frozenset[str]  # the weights that it is computed of


class ComputedWeights(TorchFunctionMode):
    """Within the block follows what is computed of parameters alone, up to products with inputs.

    A weight that a layer computes itself is known from a trial of the layer. This sees weights that other code reads:
    of a convolution that is not called, standardised by the module above it.

    Args:
        weights: those that are asked for, by name.
        model: that is called within the block.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        super().__init__()
        self._weights = dict(weights)
        self._parameters = {_place(parameter) for parameter in model.parameters()} - {None}
        self._names = {place: name for name, weight in weights.items() if (place := _place(weight)) is not None}
        self._calls: dict[int, _Call] = {}
        self._factors: dict[str, list[Tensor]] = {}
        self._plain: set[str] = set()  # that meet inputs as they are, or cannot be followed
        self._ended = False

    @classmethod
    def of(cls, params: Sequence[MaskedParameter], model: nn.Module) -> ComputedWeights | None:
        """Follows what is pruned, but for what its layer computes; None without such weights."""
        weights = {param.name: param.weight for param in params if not is_computed(param.module)}
        return cls(weights, model) if weights else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._ended:
            try:
                self._follow(func, args, kwargs or {}, out)
            except Exception:  # of a kind of tensor without memory: nothing is known, and the model goes on
                self._ended = True
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what a call has to do with weights."""
        name, given = getattr(func, "__name__", ""), [*tensors((args, kwargs))]
        if not given or any(word in name for word in _RANDOM):
            return
        if not all(id(tensor) in self._calls or _place(tensor) in self._parameters for tensor in given):
            self._met(given, name in PRODUCTS)
        elif name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__")):
            self._forget(memory(given[0]))
        else:
            if name in PRODUCTS:
                self._plain.update(*map(self._named, given))
            sources = frozenset[str]().union(*map(self._sources_of, given))
            for index, tensor in self._outputs(out):
                if any(tensor is each for each in given):  # as `contiguous` of what is
                    continue
                self._calls[id(tensor)] = _Call(func, args, kwargs, index, tensor, sources)

    def _met(self, given: list[Tensor], product: bool) -> None:
        """Note which weights, and what of them, an operation on inputs takes."""
        for tensor in given:
            self._plain |= self._named(tensor)
            for name in self._sources_of(tensor) if product else ():
                self._factors.setdefault(name, []).append(tensor)

    def _named(self, tensor: Tensor) -> frozenset[str]:
        """The weight that a tensor is, or a view of."""
        place = _place(tensor)
        return frozenset((self._names[place],)) if place in self._names else frozenset()

    def _sources_of(self, tensor: Tensor) -> frozenset[str]:
        call = self._calls.get(id(tensor))
        return self._named(tensor) or (frozenset() if call is None else call.sources)

    def _forget(self, written: int | None) -> None:
        """Say nothing of the weights that a tensor is computed of which is written to: it is another from then on."""
        for key in [key for key, call in self._calls.items() if memory(call.output) == written]:
            self._plain |= self._calls.pop(key).sources

    @staticmethod
    def _outputs(out: Any) -> Iterator[tuple[int | None, Tensor]]:
        if isinstance(out, Tensor):
            yield None, out
        elif isinstance(out, (tuple, list)):
            yield from ((index, tensor) for index, tensor in enumerate(out) if isinstance(tensor, Tensor))

    def lost(self) -> list[str]:
        """The weights whose zeros are no zeros of what multiplies inputs, in the order of the model.

        Of a weight that meets inputs as it is, or only what has another size than it, nothing is said.
        """
        return [
            name
            for name, weight in self._weights.items()
            if not self._ended
            and name not in self._plain
            and (made := [one for factor in self._factors.get(name, ()) for one in _turned(factor, weight)])
            and all(self._loses(weight, factor, turn) for factor, turn in made)
        ]

    def refuse_lost(self) -> None:
        """Refuse weights whose zeros are lost.

        Raises:
            ValueError: there are such weights.
        """
        if names := self.lost():
            raise ValueError(
                f"{', '.join(names[:5])}{', ...' if names[5:] else ''}: the model multiplies with weights that it "
                f"computes from them, where their zeros are no zeros. Leave them dense: exclude={names}"
            )

    def _loses(self, weight: nn.Parameter, factor: Tensor, turn: bool) -> bool:
        def trial() -> tuple[Tensor, Callable[[], Any]]:
            twin = weight.detach().clone()
            return twin, partial(compute, twin)

        def compute(twin: Tensor) -> Tensor:
            values: dict[int, Any] = {}
            made: Tensor = self._again(factor, _place(weight), twin, values)
            return made.mT if turn else made

        reason, _ = tried(weight, trial)
        return reason is not None and reason.startswith("its zeros")

    def _again(self, value: Any, read: int | None, twin: Tensor, values: dict[int, Any]) -> Any:
        """What a value is if a weight, known by its place, is its twin."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._again(each, read, twin, values) for each in value)
        if not isinstance(value, Tensor):
            return value
        call = self._calls.get(id(value))
        if call is None:
            return twin if _place(value) == read else value.detach()
        if id(value) not in values:
            args = self._again(tuple(call.args), read, twin, values)
            kwargs = {key: self._again(each, read, twin, values) for key, each in call.kwargs.items()}
            out = call.function(*args, **kwargs)
            values[id(value)] = out if call.index is None else out[call.index]
        return values[id(value)]


class FirstCall:
    """Follows the weights of the next call of a model, and refuses, at its end, those whose zeros it loses.

    A copy of the model, or what is loaded of it, is not watched.

    Args:
        model: that will be called; compiled, it is not watched.
        params: those that are pruned.
    """

    def __init__(self, model: nn.Module | None = None, params: Sequence[MaskedParameter] = ()) -> None:
        self._model = model
        self._params = params
        self._following: ComputedWeights | None = None
        self._followed: ComputedWeights | None = None  # once the call is over
        self._handles: list[RemovableHandle] = []
        if model is not None and params and not compiled(model):
            self._handles = [
                model.register_forward_pre_hook(self._before),
                model.register_forward_hook(self._after, always_call=True),
                model.register_forward_hook(self._judge),
            ]

    def __reduce__(self) -> tuple[type[FirstCall], tuple[()]]:
        return FirstCall, ()

    def release(self) -> None:
        """Watch no longer."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and model is self._model and self._following is None:
            self._following = ComputedWeights.of(self._params, model)
            if self._following is not None:
                self._following.__enter__()  # type: ignore[no-untyped-call]

    def _after(self, model: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling() and self._following is not None:
            self._following.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._followed, self._following = self._following, None

    def _judge(self, model: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling() and self._followed is not None:  # a call that fails is not judged
            followed, self._followed = self._followed, None
            self.release()
            followed.refuse_lost()


def _place(tensor: Tensor) -> int | None:
    """Where the first number of a tensor is: several weights may share their memory, as those of a recurrent layer."""
    return None if memory(tensor) is None else tensor.data_ptr()


def _turned(factor: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """A factor of the shape of a weight, and whether it is transposed for that; of a square one both."""
    if factor.shape == weight.shape:
        yield factor, False
    if factor.dim() == 2 and factor.mT.shape == weight.shape:
        yield factor, True
