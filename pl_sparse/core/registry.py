"""Names: what a string stands for on each axis, and suggestions for unknown names."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar, overload

__all__ = [
    "Axes",
    "Axis",
    "build",
    "catalogue",
    "name_of",
    "names",
    "near_misses",
    "register",
    "registered",
    "suggestion",
]

T = TypeVar("T")
A = TypeVar("A", bound="Axis")


def near_misses(word: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names most like `word`, best first.

    >>> near_misses("movment", ["magnitude", "movement", "taylor"])
    ['movement']
    """
    return get_close_matches(word, list(names), n=most, cutoff=0.5)


def suggestion(word: str, names: Iterable[str]) -> str:
    """A sentence for an error message: the near misses, else all that is known."""
    candidates = sorted(set(names))
    close = near_misses(word, candidates)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "Known: " + ", ".join(candidates) + "."


class Axes(Protocol):
    """What a Pruner is made of, as an axis sees it that has to go together with the others."""

    @property
    def scorer(self) -> Any: ...
    @property
    def schedule(self) -> Any: ...
    @property
    def structure(self) -> Any: ...
    @property
    def allocation(self) -> Any: ...
    @property
    def updater(self) -> Any: ...
    @property
    def masking(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def ablation(self) -> str | None: ...


class Axis:
    """A member of an axis: a scorer, a schedule, a structure, an allocation, an updater, a masking, a regularizer.

    Attributes:
        axis: which one it is; the base class of each axis sets it.
        elementwise: whether what it does at each step it does to each number of a weight on its own, sums but by
            `MaskedParameter.total`, so that of a weight that processes share each may do it to its part.
        sees_inputs: whether it looks at the whole model by the inputs of its layers alone (`Probe.activations`), which
            are there in full where FSDP alone shares the weights.
        renamed: class attributes that had another name in an earlier release, old name first.
    """

    axis: ClassVar[str]
    elementwise: ClassVar[bool] = False
    sees_inputs: ClassVar[bool] = False
    renamed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in cls.renamed.items():
            if old in vars(cls):
                warnings.warn(f"{cls.__qualname__}.{old} is called {new} now: rename it", FutureWarning, stacklevel=3)
                setattr(cls, new, vars(cls)[old])

    def refusal(self, axes: Axes) -> str | None:
        """Why it does not go together with the other axes of a Pruner, and what would; None if it does."""
        return None

    @property
    def needs_whole(self) -> str | None:
        """Why it cannot work where processes share weights, in words that follow its name; None if it can."""
        return None if self.elementwise else "does not say that it works on parts of weights (`elementwise`)"


def name_of(member: object) -> str:
    """What messages and tables call a member of an axis: its class in lower case.

    >>> from pl_sparse.schedule import OneShot
    >>> name_of(OneShot(final=0.5))
    'oneshot'
    """
    return type(member).__name__.lower()


@dataclass(frozen=True)
class Entry:
    """What a name stands for: a class, with arguments that differ from its defaults."""

    kind: type[Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def builtin(self) -> bool:
        return self.kind.__module__.partition(".")[0] == "pl_sparse"

    @property
    def path(self) -> str:
        return f"{self.kind.__module__}.{self.kind.__qualname__}"


_ENTRIES: dict[str, dict[str, Entry]] = {}  # by axis, by name
_LOADED: set[str] = set()  # axes whose entry points were read
_RENAMED = {("masking", "shrunk"): "softthresholded"}  # names of an earlier release


@overload
def register(kind: type[A], /) -> type[A]: ...
@overload
def register(name: str, /, **arguments: Any) -> Callable[[type[A]], type[A]]: ...
def register(kind: type[A] | str, /, **arguments: Any) -> type[A] | Callable[[type[A]], type[A]]:
    """Register a class under a name on its axis, as a decorator: `@register` or `@register("name", argument=value)`.

    The default name is the class's name in lower case. Case and underscores do not matter. A package can also register
    its classes by entry points, in the groups "pl_sparse.scorer", "pl_sparse.structure", and so on.

    Args:
        name: the name.
        arguments: arguments of the class that the name stands for.

    Raises:
        ValueError: another class has the name.
        TypeError: the object is not a class of an axis.

    >>> from pl_sparse.scorer import Magnitude, Scorer
    >>> @register
    ... class Magnitude(Scorer):
    ...     def score(self, param): ...
    Traceback (most recent call last):
        ...
    ValueError: scorer 'magnitude' is already pl_sparse.scorer.weights.Magnitude: pl_sparse.core.registry.Magnitude \
needs another name
    """
    if isinstance(kind, str):
        name = kind

        def decorate(kind: type[A]) -> type[A]:
            _add(name, Entry(kind, arguments))
            return kind

        return decorate
    if not inspect.isclass(kind):
        raise TypeError(f"register names a class, got {kind!r}")
    _add(kind.__name__, Entry(kind))
    return kind


def _add(name: str, entry: Entry) -> None:
    if not issubclass(entry.kind, Axis) or not hasattr(entry.kind, "axis"):
        raise TypeError(
            f"{entry.path} belongs to no axis: derive it from Scorer, Schedule, Structure, Allocation, Updater, "
            "Masking or Regularizer"
        )
    entries = _ENTRIES.setdefault(entry.kind.axis, {})
    key = _key(name)
    holder = entries.get(key)
    if holder is not None and (holder.builtin or holder.path != entry.path):  # a notebook's cell may run twice
        raise ValueError(
            f"{entry.kind.axis} {name.lower()!r} is already {holder.path}: {entry.path} needs another name"
        )
    entries[key] = entry


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _load(axis: str) -> None:
    """Register the classes that installed packages name in the group of an axis, once."""
    if axis in _LOADED:
        return
    _LOADED.add(axis)
    for point in entry_points(group=f"pl_sparse.{axis}"):
        kind = point.load()
        if _ENTRIES.get(axis, {}).get(_key(point.name), Entry(object)).kind is not kind:
            _add(point.name, Entry(kind))


def registered(axis: str) -> dict[str, Entry]:
    """All names of an axis with what they stand for, those of installed packages included."""
    _load(axis)
    return dict(_ENTRIES.get(axis, {}))


def names(kind: type[Axis]) -> list[str]:
    """All names of an axis, sorted."""
    return sorted(registered(kind.axis))


def catalogue(kind: type[T]) -> dict[str, type[T]]:
    """Every class of an axis under the name that is its own in lower case ("OneShot" is "oneshot")."""
    assert issubclass(kind, Axis)
    return {name: entry.kind for name, entry in registered(kind.axis).items() if name == entry.kind.__name__.lower()}


def build(kind: type[T], name: str, **arguments: Any) -> T:
    """The object that `name` stands for on the axis `kind`, e.g. `build(Scorer, "magnitude")`.

    Underscores and case do not matter. Arguments that the class does not take are an error of the caller.

    Raises:
        ValueError: the axis has no such name; the message has the near misses.
    """
    assert issubclass(kind, Axis)
    if (new := _RENAMED.get((kind.axis, _key(name)))) is not None:
        warnings.warn(f"{kind.axis}={name} is called {new} now", FutureWarning, stacklevel=3)
        name = new
    entry = _ENTRIES.get(kind.axis, {}).get(_key(name)) or registered(kind.axis).get(_key(name))
    if entry is None:
        raise ValueError(f"no {kind.axis} is called {name!r}. {suggestion(name, registered(kind.axis))}")
    made: T = entry.kind(**{**entry.arguments, **arguments})
    return made
