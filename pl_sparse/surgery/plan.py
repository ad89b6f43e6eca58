"""What is taken out of a model, as data: applied, undone, joined, saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.core.cut import Cut
from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.channels import _CONVS, _NORMS, _TRANSPOSED, _WEIGHTED, Coupling, _depthwise
from pl_sparse.surgery.heads import FewerHeads, _of_heads

__all__ = ["Plan"]


# Removing


@dataclass
class Plan:
    """What is taken out of a model: indices by tensor and dimension, and the attributes of layers that change.

    Attributes:
        tensors: by the name of a parameter or buffer.
        layers: by the name of a layer, attributes with the value before and after.
    """

    tensors: dict[str, Cut] = field(default_factory=dict)
    layers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        removed: Iterable[tuple[Coupling, Sequence[int]]],
        heads: Mapping[str, Sequence[int]] | None = None,
        counted: Collection[str] = (),
    ) -> Plan:
        """The plan that takes some units of each coupling, and some heads of attention layers, out of a model.

        Args:
            counted: those attention layers of other kinds than torch's whose own numbers of heads change, too.
        """
        cuts: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        module: Any
        for coupling, chosen in removed:
            for port in coupling.ports:
                module = model.get_submodule(port.path)
                gone = {place for unit in chosen for place in port.places[unit]}
                for short, dim, period in _cut_by(module, port.side):
                    cuts[f"{port.path}.{short}"][dim] |= {place % period for place in gone} if period else gone
        found = {each.path: each for each in attentions(model) if isinstance(each, Attention)} if heads else {}
        paths = {module: path for path, module in model.named_modules()}
        numbers = {}
        for path, chosen in (heads or {}).items():
            attention: Any = model.get_submodule(path)
            if not isinstance(attention, nn.MultiheadAttention):
                for layer, dim, gone in _of_heads(found[path], chosen):
                    cuts[f"{paths[layer]}.weight"][dim] |= gone
                    inside = layer is not found[path].weights[-1][0]
                    if inside and isinstance(getattr(layer, "bias", None), Tensor):
                        cuts[f"{paths[layer]}.bias"][0] |= gone
                if path in counted:
                    numbers[path] = found[path].numbers(attention, found[path].heads - len(chosen))
                continue
            size, count = attention.head_dim, attention.num_heads
            gone = {head * size + i for head in chosen for i in range(size)}
            for short in _own(attention):
                parts = 3 if short.startswith("in_proj") else 1
                cuts[f"{path}.{short}"][0] = {part * count * size + i for part in range(parts) for i in gone}
            cuts[f"{path}.out_proj.weight"][1] |= gone
        tensors = {name: tensor for name, tensor in _named(model).items() if name in cuts}
        plan = cls(
            {
                name: Cut(
                    tuple(tensor.shape), {dim: tuple(sorted(gone)) for dim, gone in sorted(cuts[name].items()) if gone}
                )
                for name, tensor in tensors.items()
            }
        )
        plan.tensors = {name: cut for name, cut in plan.tensors.items() if cut.removed}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in plan.tensors):
            module = model.get_submodule(path)
            shapes = {
                short: plan.tensors[f"{path}.{short}"] for short in _own(module) if f"{path}.{short}" in plan.tensors
            }
            after = _attributes(
                module,
                {
                    short: tuple(len(shapes[short].kept(d)) for d in range(tensor.dim()))
                    if short in shapes
                    else tuple(tensor.shape)
                    for short, tensor in _own(module).items()
                },
            )
            plan.layers[path] = {
                key: (int(getattr(module, key)), value) for key, value in after.items() if getattr(module, key) != value
            }
        plan.layers |= {path: changes for path, changes in numbers.items() if changes}
        return plan

    @torch.no_grad()
    def apply(self, model: nn.Module, prefix: str = "") -> None:
        """Take it out of a model, in place: parameters stay the objects that they are, with less in them.

        Args:
            prefix: what the names of the model's tensors have before them that the plan's lack.

        Raises:
            ValueError: the model is another one; nothing has changed then.
        """
        own = _named(model)
        for name, cut in self.tensors.items():
            found = own.get(prefix + name)
            if found is None or tuple(found.shape) != cut.shape:
                has = "has no such tensor" if found is None else f"has one of shape {tuple(found.shape)}"
                raise ValueError(
                    f"the plan is of another model: it shrinks {name} of shape {cut.shape}, and "
                    f"{type(model).__name__} {has}"
                )
        for path, changes in self.layers.items():
            for key, (before, _) in changes.items():
                value = getattr(model.get_submodule(prefix + path), key)
                if value != before:
                    raise ValueError(f"the plan is of another model: {path}.{key} is {value} there, not {before}")
        for name, cut in self.tensors.items():
            tensor = own[prefix + name]
            grad, tensor.grad = tensor.grad, None
            _put(tensor, cut.take(tensor.detach()))
            if grad is not None:
                tensor.grad = cut.take(grad)
        self._set(model, prefix, 1)

    @torch.no_grad()
    def undo(self, model: nn.Module, prefix: str = "") -> None:
        """Give a model its former shape back, with zeros in what was taken out."""
        own = _named(model)
        for name, cut in self.tensors.items():
            own[prefix + name].grad = None
            _put(own[prefix + name], cut.fill(own[prefix + name].detach()))
        self._set(model, prefix, 0)

    def _set(self, model: nn.Module, prefix: str, which: int) -> None:
        for path, changes in self.layers.items():
            for key, values in changes.items():
                module: Any = model.get_submodule(prefix + path)
                setattr(module, key, values[which])
                if isinstance(module, nn.MultiheadAttention):
                    FewerHeads.suit(module)

    def then(self, later: Plan) -> Plan:
        """This plan and one of the model that it leaves, as one."""
        tensors = dict(self.tensors)
        for name, cut in later.tensors.items():
            tensors[name] = tensors[name].then(cut) if name in tensors else cut
        layers = {path: dict(changes) for path, changes in self.layers.items()}
        for path, changes in later.layers.items():
            for key, (before, after) in changes.items():
                first = layers.setdefault(path, {}).get(key, (before, after))[0]
                layers[path][key] = (first, after)
        return Plan(tensors, layers)

    def below(self, prefix: str) -> Plan:
        """The plan of a part of the model, whose names lack the prefix."""
        return Plan(
            {name.removeprefix(prefix): cut for name, cut in self.tensors.items()},
            {path.removeprefix(prefix): changes for path, changes in self.layers.items()},
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
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Plan:
        """The plan that `state_dict` told."""
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
        )


def _put(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer data of another shape, where a graph of its former self may still be alive.

    Autograd remembers a parameter's shape as long as any graph that used it lives. It forgets it at a change of type.
    """
    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cut_by(module: nn.Module, side: str) -> list[tuple[str, int, int]]:
    """The tensors of a layer that a side's channels are in: name, dimension, and period if groups share them."""
    if (
        isinstance(module, (*_NORMS, nn.PReLU))
        or _depthwise(module)
        or (isinstance(module, _WEIGHTED) and side == "out")
    ):
        first = 1 if isinstance(module, _TRANSPOSED) else 0
        dims = [(short, first if short == "weight" else 0) for short in _own(module)]
        return [(short, dim, 0) for short, dim in dims if _own(module)[short].dim() > 0]
    if isinstance(module, _TRANSPOSED):
        return [("weight", 0, 0)]
    period = module.in_channels // module.groups if isinstance(module, _CONVS) and module.groups > 1 else 0
    return [("weight", 1, int(period))]


def _attributes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What a layer's attributes are with tensors of these shapes."""
    if isinstance(module, nn.Linear):
        return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}
    if isinstance(module, _TRANSPOSED):
        return {"in_channels": shapes["weight"][0], "out_channels": shapes["weight"][1]}
    if isinstance(module, _CONVS):
        out = shapes["weight"][0]
        if _depthwise(module):
            return {"in_channels": out, "out_channels": out, "groups": out}
        return {"in_channels": shapes["weight"][1] * module.groups, "out_channels": out}
    if isinstance(module, nn.MultiheadAttention):
        rows = shapes["in_proj_weight"][0] // 3 if "in_proj_weight" in shapes else shapes["q_proj_weight"][0]
        return {"num_heads": rows // module.head_dim}
    if hasattr(module, "nf"):  # GPT-2's linear layer
        return {"nx": shapes["weight"][0], "nf": shapes["weight"][1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shapes["weight"][0]}
    return {"num_features": next(shape[0] for shape in shapes.values() if shape)}
