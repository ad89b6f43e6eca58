"""What is taken out of a model, as data: applied, undone, joined, saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.cut import Cut
from pl_sparse.core.upstream import replace_data
from pl_sparse.network.attention import Attention, attentions, keeps_inputs_first
from pl_sparse.network.layers import (
    BARE,
    CONVS,
    RECURRENT,
    TABLES,
    TRANSPOSED,
    held,
    is_depthwise,
    own_tensors,
)
from pl_sparse.network.units import Coupling
from pl_sparse.surgery.heads import FewerHeads, head_indices
from pl_sparse.surgery.modules import Former, attribute, former_index, former_name, set_attribute, take_out

__all__ = ["RemovalPlan", "changed_attributes", "named_tensors"]

Indices = dict[str, dict[int, set[int]]]
"""What goes, by the name of a tensor and dimension."""


@dataclass
class RemovalPlan:
    """What is taken out of a model: indices by tensor and dimension, and the attributes of layers that change.

    Attributes:
        tensors: by the name of a parameter or buffer.
        layers: by the name of a layer, attributes with the value before and after; "config.key" is of its config.
        lists: by the name of a ModuleList or Sequential, the indices of the modules that leave it.
        skipped: the names of modules whose place one takes that returns its input.
    """

    tensors: dict[str, Cut] = field(default_factory=dict)
    layers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    lists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    _former: dict[int, list[Former]] = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.lists or self.skipped)

    def beside(self, other: RemovalPlan) -> RemovalPlan:
        """This plan and one of the same model as one."""
        tensors = dict(self.tensors)
        for name, cut in other.tensors.items():
            mine = tensors[name].removed if name in tensors else {}
            both = {dim: {*mine.get(dim, ()), *cut.removed.get(dim, ())} for dim in {*mine, *cut.removed}}
            tensors[name] = Cut(cut.shape, {dim: tuple(sorted(gone)) for dim, gone in sorted(both.items())})
        lists = {**self.lists, **other.lists}
        return RemovalPlan(tensors, _merged(self.layers, other.layers), lists, (*self.skipped, *other.skipped))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        removed: Iterable[tuple[Coupling, Sequence[int]]],
        heads: Mapping[str, Sequence[int]] | None = None,
        within: Mapping[str, Collection[str]] | None = None,
    ) -> RemovalPlan:
        """The plan that takes some units of each coupling, and some heads of attention layers, out of a model.

        Args:
            model: it is left as it is.
            removed: couplings of the model, each with the units that go.
            heads: the heads that go, by the path of the attention layer.
            within: what else of attention layers of other kinds than torch's loses heads, by path: "numbers" of heads,
                "tables" with an entry per head.
        """
        indices: Indices = defaultdict(lambda: defaultdict(set))
        removed = list(removed)
        _add_channels(indices, model, removed)
        layers = _merged(_bare_norms(model, removed), _counts(model, removed))
        by_path = {each.path: each for each in attentions(model) if isinstance(each, Attention)} if heads else {}
        for path, gone in (heads or {}).items():
            attention, module = by_path[path], model.get_submodule(path)
            if isinstance(module, nn.MultiheadAttention):
                _add_heads_of_torch(indices, path, module, gone)
                continue
            _add_heads(indices, model, attention, gone)
            more = (within or {}).get(path, ())
            if "numbers" in more:
                for part, changes in attention.numbers(module, attention.heads - len(gone)).items():
                    layers[_full(path, part)] = changes
            for name, dim, each in attention.tables(module) if "tables" in more else ():
                indices[_full(path, name)][dim] |= {head * each + i for head in gone for i in range(each)}
        tensors = _cuts(model, indices)
        return cls(tensors, _merged(changed_attributes(model, _everywhere(model, tensors)), layers))

    @torch.no_grad()
    def apply(
        self,
        model: nn.Module,
        prefix: str = "",
        take: Callable[[Tensor, Cut], Tensor] = lambda tensor, cut: cut.take(tensor.detach()),
    ) -> None:
        """Take it out of a model, in place: parameters stay the objects that they are, with less in them.

        Args:
            prefix: what the names of the model's tensors have before them that the plan's lack.
            take: what is left of a tensor.

        Raises:
            ValueError: the model is another one; nothing has changed then.
        """
        tensors = named_tensors(model)
        for name, cut in self.tensors.items():
            tensor = tensors.get(prefix + name)
            if tensor is None or tuple(tensor.shape) != cut.shape:
                has = "has no such tensor" if tensor is None else f"has one of shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"the plan belongs to another model: it shrinks {name} of shape {cut.shape}, and "
                    f"{type(model).__name__} {has}"
                )
        for path, changes in self.layers.items():
            for key, (before, _) in changes.items():
                value = attribute(model.get_submodule(prefix + path), key)
                if value != before:
                    raise ValueError(f"the plan belongs to another model: {path}.{key} is {value} there, not {before}")
        for name, cut in self.tensors.items():
            tensor = tensors[prefix + name]
            grad, tensor.grad = tensor.grad, None
            replace_data(tensor, take(tensor, cut))
            if grad is not None:
                tensor.grad = cut.take(grad)
        self._set_attributes(model, prefix, after=True)
        if self.lists or self.skipped:
            self._former[id(model)] = take_out(model, prefix, self.lists, self.skipped)

    @torch.no_grad()
    def undo(self, model: nn.Module, prefix: str = "") -> None:
        """Give a model its former shape back, with zeros in what was taken out.

        Args:
            prefix: as in `apply`.
        """
        for module, key, value in reversed(self._former.pop(id(model), [])):
            vars(module)[key] = value
        tensors = named_tensors(model)
        for name, cut in self.tensors.items():
            tensor = tensors[prefix + name]
            tensor.grad = None
            replace_data(tensor, cut.fill(tensor.detach()))
        self._set_attributes(model, prefix, after=False)

    def _set_attributes(self, model: nn.Module, prefix: str, after: bool) -> None:
        """Give layers the attributes that they have after the removal, or before it."""
        for path, changes in self.layers.items():
            module: Any = model.get_submodule(prefix + path)
            for key, values in changes.items():
                set_attribute(model, module, key, values[after])
                if isinstance(module, nn.MultiheadAttention):
                    FewerHeads.suit(module)
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()

    def then(self, later: RemovalPlan) -> RemovalPlan:
        """This plan and one of the model that it leaves, as one."""
        if self.lists:
            later = later.renamed(lambda name: former_name(name, self.lists))
        tensors = dict(self.tensors)
        for name, cut in later.tensors.items():
            tensors[name] = tensors[name].then(cut) if name in tensors else cut
        layers = {path: dict(changes) for path, changes in self.layers.items()}
        for path, changes in later.layers.items():
            for key, (before, after) in changes.items():
                first = layers.setdefault(path, {}).get(key, (before, after))[0]
                layers[path][key] = (first, after)
        lists = dict(self.lists)
        for path, gone in later.lists.items():
            lists[path] = tuple(sorted({*lists.get(path, ()), *(former_index(lists.get(path, ()), i) for i in gone)}))
        return RemovalPlan(tensors, layers, lists, (*self.skipped, *later.skipped))

    def below(self, prefix: str) -> RemovalPlan:
        """The plan of a part of the model, whose names lack the prefix."""
        return self.renamed(lambda name: name.removeprefix(prefix))

    def renamed(self, name_of: Callable[[str], str]) -> RemovalPlan:
        """The plan with other names of tensors and modules."""
        return RemovalPlan(
            {name_of(name): cut for name, cut in self.tensors.items()},
            {name_of(path): changes for path, changes in self.layers.items()},
            {name_of(path): gone for path, gone in self.lists.items()},
            tuple(map(name_of, self.skipped)),
        )

    def state_dict(self) -> dict[str, Any]:
        """The plan in plain types."""
        return {
            "tensors": {
                name: {"shape": list(cut.shape), "removed": {str(dim): list(gone) for dim, gone in cut.removed.items()}}
                for name, cut in self.tensors.items()
            },
            "layers": {
                path: {key: list(values) for key, values in changes.items()} for path, changes in self.layers.items()
            },
            **({"lists": {path: list(gone) for path, gone in self.lists.items()}} if self.lists else {}),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RemovalPlan:
        """The plan that `state_dict` gave."""
        return cls(
            {
                name: Cut(
                    tuple(entry["shape"]), {int(dim): tuple(gone) for dim, gone in sorted(entry["removed"].items())}
                )
                for name, entry in state["tensors"].items()
            },
            {
                path: {key: (int(before), int(after)) for key, (before, after) in changes.items()}
                for path, changes in state["layers"].items()
            },
            {path: tuple(gone) for path, gone in state.get("lists", {}).items()},
            tuple(state.get("skipped", ())),
        )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _full(path: str, short: str) -> str:
    """The name in the model of what is in a layer."""
    return f"{path}.{short}".strip(".")


def _add_channels(indices: Indices, model: nn.Module, removed: Iterable[tuple[Coupling, Sequence[int]]]) -> None:
    """Add the places of units in all layers of their coupling."""
    for coupling, units in removed:
        for port in coupling.ports:
            gone = {place for unit in units for place in port.places[unit]}
            for each in held(model.get_submodule(port.path), port.end):
                indices[_full(port.path, each.name)][each.dim] |= set(each.indices(gone))


def _bare_norms(
    model: nn.Module, removed: Iterable[tuple[Coupling, Sequence[int]]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """The sizes, before and after, of norms that have no tensors to lose."""
    gone: dict[str, set[int]] = defaultdict(set)
    for coupling, units in removed:
        for port in coupling.ports:
            module = model.get_submodule(port.path)
            if isinstance(module, BARE) and not port.tensor and not own_tensors(module):
                gone[port.path] |= {place for unit in units for place in port.places[unit]}
    layers = {}
    for path, places in gone.items():
        norm: Any = model.get_submodule(path)
        size = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        layers[path] = {key: (getattr(norm, key), value) for key, value in _width(norm, size - len(places)).items()}
    return layers


def _counts(
    model: nn.Module, removed: Iterable[tuple[Coupling, Sequence[int]]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """The attributes of modules that say how many channels there are, before and after."""
    changes: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for coupling, units in removed:
        for path, key, each in coupling.counts:
            before = int(getattr(model.get_submodule(path), key))
            changes[path][key] = (before, changes[path].get(key, (0, before))[1] - each * len(units))
    return changes


def _add_heads_of_torch(indices: Indices, path: str, attention: nn.MultiheadAttention, heads: Sequence[int]) -> None:
    """Add the rows of queries, keys and values, and the columns of the output projection."""
    size, count = attention.head_dim, attention.num_heads
    gone = {head * size + i for head in heads for i in range(size)}
    for short in own_tensors(attention):
        parts = 3 if short.startswith("in_proj") else 1
        indices[_full(path, short)][0] = {part * count * size + i for part in range(parts) for i in gone}
    indices[_full(path, "out_proj.weight")][1] |= gone


def _add_heads(indices: Indices, model: nn.Module, attention: Attention, heads: Sequence[int]) -> None:
    """The same for an attention layer of another kind."""
    paths = {module: path for path, module in model.named_modules()}
    output = attention.weights[-1][0]
    for layer, dim, gone in head_indices(attention, heads):
        indices[_full(paths[layer], "weight")][dim] |= gone
        if layer is not output and isinstance(getattr(layer, "bias", None), Tensor):
            indices[_full(paths[layer], "bias")][0] |= gone


def _cuts(model: nn.Module, indices: Indices) -> dict[str, Cut]:
    """The cuts of the tensors that lose something, in the model's order."""
    cuts = {}
    for name, tensor in named_tensors(model).items():
        gone = {dim: tuple(sorted(places)) for dim, places in sorted(indices.get(name, {}).items()) if places}
        if gone:
            cuts[name] = Cut(tuple(tensor.shape), gone)
    return cuts


def _everywhere(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, Cut]:
    """The cuts by all names that the tensors have: tied weights have several."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    every = model.named_parameters(remove_duplicate=False)
    return dict(cuts) | {name: cuts[names[id(p)]] for name, p in every if names[id(p)] in cuts}


def changed_attributes(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, dict[str, tuple[int, int]]]:
    """The attributes that cuts change, before and after, by the path of each layer that loses something."""
    layers = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in cuts):
        module = model.get_submodule(path)
        shapes = {short: tuple(tensor.shape) for short, tensor in own_tensors(module).items()}
        for short in shapes:
            cut = cuts.get(_full(path, short))
            if cut is not None:
                shapes[short] = cut.left
        after = _attributes(module, shapes).items()
        before: dict[str, int] = {key: int(attribute(module, key)) for key, _ in after}
        layers[path] = {key: (before[key], value) for key, value in after if before[key] != value}
    return layers


def _attributes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What a layer's attributes are with tensors of these shapes."""
    if isinstance(module, nn.Linear):
        return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}
    if is_depthwise(module):
        conv: Any = module
        each = conv.out_channels // conv.in_channels
        inputs = shapes["weight"][0] // each
        return {"in_channels": inputs, "out_channels": inputs * each, "groups": inputs}
    if isinstance(module, TRANSPOSED):
        return {"in_channels": shapes["weight"][0], "out_channels": shapes["weight"][1] * module.groups}
    if isinstance(module, CONVS):
        return {"in_channels": shapes["weight"][1] * module.groups, "out_channels": shapes["weight"][0]}
    if isinstance(module, nn.MultiheadAttention):
        if "in_proj_weight" in shapes:
            rows, width = shapes["in_proj_weight"][0] // 3, shapes["in_proj_weight"][1]
            inputs = {"embed_dim": width, "kdim": width, "vdim": width}
        else:
            rows, width = shapes["q_proj_weight"]
            inputs = {"embed_dim": width, "kdim": shapes["k_proj_weight"][1], "vdim": shapes["v_proj_weight"][1]}
        return {"num_heads": rows // module.head_dim, **inputs}
    if keeps_inputs_first(module):
        return {"nx": shapes["weight"][0], "nf": shapes["weight"][1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shapes["weight"][0]}
    if isinstance(module, TABLES):
        return {"embedding_dim": shapes["weight"][1]}
    if isinstance(module, RECURRENT):
        first = "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight_ih"
        before = own_tensors(module)[first].shape[0] // module.hidden_size
        sizes = {"input_size": shapes[first][1], "hidden_size": shapes[first][0] // before}
        projected = {"proj_size": shapes["weight_hr_l0"][0]} if "weight_hr_l0" in shapes else {}
        return sizes | projected
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape.0": shapes["weight"][0]}
    if isinstance(module, BARE):
        return _width(module, next(shape[0] for shape in shapes.values() if shape))
    return {}


def _merged(a: Mapping[str, dict[str, Any]], b: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The attributes of layers that one or the other names."""
    return {path: {**a.get(path, {}), **b.get(path, {})} for path in dict.fromkeys([*a, *b])}


def _width(module: nn.Module, channels: int) -> dict[str, int]:
    """What the attributes of a norm are with so many channels."""
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": channels, "num_groups": channels * module.num_groups // module.num_channels}
    return {"num_features": channels}
