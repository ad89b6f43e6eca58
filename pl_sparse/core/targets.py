"""Which weights of a model are pruned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

from torch import nn

from pl_sparse.core.candidates import CONVOLUTIONS, LAYOUTS, Candidate, candidates
from pl_sparse.core.group import Group
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import near_misses
from pl_sparse.core.sharded import masked
from pl_sparse.core.upstream import plain_name

__all__ = ["Choice", "Patterns", "TargetOptions", "Targets", "find", "select"]

Patterns = Sequence["str | type"]
"""Types (`nn.Conv2d`), names of types ("Conv2d"), or globs on the name of a weight or of its module, in full or from
any dot on ("encoder.*", "fc1", "blocks.0.*.weight")."""


def _matches(pattern: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    path = name.rpartition(".")[0]
    if any(pattern == cls.__name__ for cls in type(module).__mro__):
        return True
    return any(fnmatchcase(text, p) for text in (name, path) for p in (pattern, f"*.{pattern}", f"{pattern}.*"))


def _refuse_unmatched(what: str, pattern: str | type, model: nn.Module, weights: Sequence[Candidate]) -> None:
    """Refuse a pattern that matches nothing, and say what is there of that name, or of one like it."""
    if any(_matches(pattern, *name) for weight in weights for name in weight.names):
        return
    text = pattern.__name__ if isinstance(pattern, type) else pattern
    for path, module in model.named_modules():
        for short, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = plain_name(f"{path}.{short}" if path else short)
            if _matches(pattern, name, module) and text in (name, name.rpartition(".")[0]):
                kind = "a parameter" if isinstance(tensor, nn.Parameter) else "a buffer"
                raise ValueError(
                    f"{what} {text!r} matches no prunable weight: {name} is {kind} with {tensor.dim()} dimensions, and "
                    "only parameters with two or more are pruned"
                )
    listed = [weight.name for weight in weights if weight.role is None and weight.refusal is None]
    names = {name for weight in weights for name, _ in weight.names}
    names |= {name.rpartition(".")[0] for name in names}
    tails = {name.rpartition(".")[2] for name in names if not name.endswith(".weight")}
    tails |= {type(module).__name__ for weight in weights for _, module in weight.names}
    close = near_misses(text, (names | tails) - {""})
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
    raise ValueError(f"{what} {text!r} matches no prunable weight.{hint} The prunable weights are: {shown}")


def select(model: nn.Module, patterns: Patterns, what: str = "pattern") -> list[str]:
    """The names of the prunable weights that some pattern matches, in the model's order.

    Args:
        what: where the patterns were given, for messages.

    Raises:
        ValueError: a pattern matches nothing.
    """
    weights = candidates(model)
    for pattern in patterns:
        _refuse_unmatched(what, pattern, model, weights)
    return [weight.name for weight in weights if any(_selects(pattern, weight, weights) for pattern in patterns)]


def _selects(pattern: str | type, weight: Candidate, weights: Sequence[Candidate]) -> bool:
    """Whether a pattern means a weight.

    What is not a weight of a sum of products, and a further name of a tied weight, is meant by a pattern that matches
    nothing else: "encoder.*" does not mean the encoder's class token.
    """
    plain = weight.role is None or isinstance(weight.module, (nn.Embedding, nn.EmbeddingBag))
    if plain and _matches_first(pattern, weight):
        return True
    if not any(_matches(pattern, *other) for other in weight.names):
        return False
    return not any(_matches_first(pattern, other) for other in weights if other.role is None)


def _matches_first(pattern: str | type, weight: Candidate) -> bool:
    """Whether a pattern matches a weight by a name that it has in its own layer, the first of a tied weight's."""
    return any(_matches(pattern, name, module) for name, module in weight.names if module is weight.module)


@dataclass(frozen=True)
class Choice:
    """What of a model is pruned.

    Attributes:
        params: the weights, in the model's order, each with a mask of ones.
        left_out: why a weight stays dense that no pattern excludes, by name.
        spared: why the last layer stays dense where the structure removes whole outputs, by name.
        sizes: how many elements each weight of a sum of products has, and all else that is pruned, by name.
        frozen: the weights that are left out only because they are not trained, by name.
    """

    params: list[MaskedParameter] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    spared: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)


def find(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns = (),
    first: bool = True,
    last: bool = True,
    frozen: str = "skip",
) -> list[MaskedParameter]:
    """The weights to prune, in the model's order, tied weights once, each with a mask of ones.

    Every parameter with two or more dimensions is pruned by default but look-up tables, positions, tokens and scales,
    which `include` names. Biases and other vectors never are.

    Args:
        include: patterns; only what one of them matches is pruned. None: all weights that are pruned by default.
        exclude: patterns; what one of them matches stays dense.
        first: whether the first convolution (of a model that has any) is pruned.
        last: whether the last prunable layer (the classifier, as a rule) is pruned.
        frozen: "skip", "prune" or "error": what is done with weights that are not trained (`requires_grad=False`).

    Raises:
        ValueError: a pattern matches nothing, a weight is not materialised, or nothing is left to prune.
    """
    return Targets(include, exclude, first, last, frozen=frozen).choose(model).params


def _checked(what: str, patterns: Patterns, model: nn.Module, weights: Sequence[Candidate]) -> None:
    if isinstance(patterns, (str, type)):
        raise ValueError(f"{what} must be a list of patterns, got {patterns!r} alone: write [{patterns!r}]")
    for pattern in patterns:
        _refuse_unmatched(what, pattern, model, weights)


def _spared(weights: Sequence[Candidate], first: bool, last: bool) -> set[str]:
    """The names of the first convolution and of the last layer, where these are not to be pruned."""
    convolutions = [weight.name for weight in weights if isinstance(weight.module, CONVOLUTIONS)]
    spared = set() if first else set(convolutions[:1])
    return spared if last or not weights else spared | {weights[-1].name}


@dataclass(frozen=True)
class Targets:
    """Which weights of a model are pruned, and the sparsities of single weights.

    Args:
        include: patterns of the weights to prune; None for all that are pruned by default (see `find`).
        exclude: patterns of weights that stay dense.
        first: whether the first convolution is pruned.
        last: whether the last layer is pruned; None for yes, unless the structure removes whole outputs.
        overrides: sparsities of single weights by pattern. They are outside of the total that the others share; the
            first matching pattern counts. Before the schedule ends they rise in proportion to its level.
        misfit: "error", or "dense" to leave weights dense whose shape the structure does not divide.
        frozen: the treatment of weights that are not trained (`requires_grad=False`): "skip" leaves them unchanged and
            does not count them, "prune" prunes them, "error" refuses them.
        layouts: the order of dimensions of weights of unknown classes, by pattern: "out_in" or "in_out", the last two
            dimensions of a matrix or of a batch of them (experts); "out_in_kernel" or "in_out_kernel", the first two.
            Structures that tell outputs from inputs ask for it.

    Raises:
        ValueError: a value is out of range or unknown.
    """

    include: Patterns | None = None
    exclude: Patterns = ()
    first: bool = True
    last: bool | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    misfit: str = "error"
    frozen: str = "skip"
    layouts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.misfit not in ("error", "dense"):
            raise ValueError(f"misfit={self.misfit!r} is neither 'error' nor 'dense'")
        if self.frozen not in ("skip", "prune", "error"):
            raise ValueError(f"frozen={self.frozen!r} must be one of 'skip', 'prune', 'error'")
        for pattern, layout in self.layouts.items():
            if layout not in LAYOUTS:
                raise ValueError(f"layouts: {pattern}={layout!r} must be one of {', '.join(map(repr, LAYOUTS))}")
        for pattern, sparsity in self.overrides.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"overrides: {pattern}={sparsity!r} must be a sparsity in [0, 1]")

    def find(self, model: nn.Module, removes_outputs: bool = False) -> list[MaskedParameter]:
        """The weights to prune, in the model's order.

        Args:
            removes_outputs: whether whole outputs of a layer go, which the last one cannot spare by default.

        Raises:
            ValueError: as the function `find` does.
        """
        return self.choose(model, removes_outputs).params

    def choose(
        self,
        model: nn.Module,
        removes_outputs: bool = False,
        trained: Collection[str] = (),
        outputs: Collection[str] = (),
    ) -> Choice:
        """What of the model is pruned, and why other weights are not.

        Args:
            removes_outputs: whether whole outputs of a layer go, which the last one cannot spare by default.
            trained: names of weights that are not taken for frozen.
            outputs: names of weights that the model's outputs come out of; none: not known.

        Raises:
            ValueError: as the function `find` does.
        """
        weights = candidates(model)
        include = self.include
        _checked("include", include or (), model, weights)
        _checked("exclude", self.exclude, model, weights)
        self._lay_out(model, weights)
        able = [weight for weight in weights if weight.role is None and weight.refusal is None]
        excluded_ends = _spared(able, self.first, self.last is not False)
        output = _spared(able, True, self.last is not None or not removes_outputs)
        if output.isdisjoint(outputs):  # the last one in the model's order is another one than in that of its calls
            output = output and ({weight.name for weight in able}.intersection(outputs) or output)
        choice = Choice()
        for weight in weights:
            if weight.role is None:
                choice.sizes[weight.name] = weight.numel
            excluded = any(_matches(pattern, *name) for pattern in self.exclude for name in weight.names)
            if weight.name in excluded_ends or excluded:
                continue
            if include is None:
                reason = weight.role and f"{weight.role}, no weight of a sum of products; `include` takes it in"
            elif any(_selects(pattern, weight, weights) for pattern in include):
                reason = None
            else:
                continue
            if weight.name in output:
                choice.spared[weight.name] = "it is the last layer, whose outputs are the model's; last=True prunes it"
                continue
            reason = weight.refusal if weight.refusal is not None and reason is None else reason
            named = any(pattern in [name for name, _ in weight.names] for pattern in include or ())
            if reason is None and not weight.weight.requires_grad and weight.name not in trained:
                reason = self._frozen(weight.name)
                if reason is not None and not named:
                    choice.frozen[weight.name] = weight.weight
            if reason is not None:
                if named:
                    raise ValueError(f"include names {weight.name}, which cannot be pruned: {reason}")
                choice.left_out[weight.name] = reason
                continue
            if weight.unmade:
                what = "on the meta device" if weight.weight.is_meta else "a lazy parameter without a shape yet"
                raise ValueError(f"{weight.name} is {what}: run one batch through the model first, or exclude it")
            choice.sizes[weight.name] = weight.numel
            choice.params.append(
                masked(weight.name, weight.module, weight.weight, layout=weight.layout, norm_dim=weight.norm_dim)
            )
        if not choice.params:
            raise ValueError("nothing to prune: " + self._nothing(model, weights, choice))
        return choice

    def _frozen(self, name: str) -> str | None:
        """Why a weight that is not trained is left out."""
        if self.frozen == "error":
            raise ValueError(
                f"{name} is frozen (requires_grad=False): unfreeze it, exclude it, or give frozen='skip' to leave such "
                "weights as they are, frozen='prune' to prune them"
            )
        return "it is frozen (requires_grad=False); frozen='prune' prunes it" if self.frozen == "skip" else None

    def _lay_out(self, model: nn.Module, weights: Sequence[Candidate]) -> None:
        """Give weights the layouts that are declared for them; the first pattern that matches counts."""
        declared: set[str] = set()
        for pattern, layout in self.layouts.items():
            _refuse_unmatched("layouts", pattern, model, weights)
            for weight in weights:
                if weight.name not in declared and any(_matches(pattern, *name) for name in weight.names):
                    declared.add(weight.name)
                    weight.layout = LAYOUTS[layout]

    @staticmethod
    def _nothing(model: nn.Module, weights: Sequence[Candidate], choice: Choice) -> str:
        if reasons := {**choice.left_out, **choice.spared}:
            return "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        if weights:
            return "include, exclude, first and last leave none of " + ", ".join(weight.name for weight in weights)
        return f"{type(model).__name__} has no Linear, convolution or other parameter of two or more dimensions"

    def overrides_of(self, model: nn.Module, groups: Sequence[Group]) -> tuple[float | None, ...]:
        """The sparsity of each group that has one of its own, else None.

        Raises:
            ValueError: a pattern matches no weight, or none of them is pruned.
        """
        sparsities: dict[str, float] = {}
        for pattern, sparsity in self.overrides.items():
            for name in select(model, [pattern], "overrides"):
                sparsities.setdefault(name, sparsity)
        pruned = {param.name for group in groups for param, _ in group.members}
        if sparsities and not pruned & set(sparsities):
            raise ValueError(f"overrides {list(self.overrides)} match no weight that is pruned: {', '.join(pruned)}")
        members = [[param.name for param, _ in group.members] for group in groups]
        return tuple(next((sparsities[name] for name in names if name in sparsities), None) for names in members)


class TargetOptions(TypedDict, total=False):
    """The arguments of `Targets`, where a function takes them by keyword."""

    include: Patterns | None
    exclude: Patterns
    first: bool
    last: bool | None
    overrides: Mapping[str, float]
    misfit: Literal["error", "dense"]
    frozen: Literal["skip", "prune", "error"]
    layouts: Mapping[str, str]
