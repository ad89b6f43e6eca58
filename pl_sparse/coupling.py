"""Which channels belong together, and how they are taken out of a model.

A residual join adds channel i of one layer to channel i of another, a concatenation shifts it, a flattening spreads it
over several inputs of the next layer. What can be removed is a unit: all places, in all layers, that are one channel.
Torch-Pruning's dependency graph tells which places these are. Its tracing rests on rules, so nothing is believed that a
trial does not show: random weights, some units zero, those units removed, and the outputs must be the same.

Source: Fang et al., DepGraph: towards any structural pruning, 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pl_sparse.attention import Attention, attentions
from pl_sparse.masked import Cut
from pl_sparse.probe import undisturbed

__all__ = ["Coupling", "FewerHeads", "Plan", "Port", "called", "couplings", "difference"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_WEIGHTED = (nn.Linear, *_CONVS, *_TRANSPOSED)


@dataclass(frozen=True)
class Port:
    """Channels of a layer.

    Attributes:
        path: the name of the layer.
        side: "out", or "in" of a layer whose inputs and outputs are different channels.
        places: for each unit the indices of its channels.
    """

    path: str
    side: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coupling:
    """Units that go through the same layers.

    Attributes:
        ports: where the units are.
        reason: why none of them can be removed, or None.
    """

    ports: tuple[Port, ...]
    reason: str | None = None

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.ports[0].places)

    def sources(self, model: nn.Module) -> list[Port]:
        """The layers with weights that the units come out of."""
        modules = dict(model.named_modules())
        return [port for port in self.ports if port.side == "out" and isinstance(modules.get(port.path), _WEIGHTED)]

    def targets(self) -> list[Port]:
        """The layers that take the units in."""
        return [port for port in self.ports if port.side == "in"]


# Tracing


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs of a model for an example of its inputs: a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(example, Mapping):
        out = model(**example)
    elif isinstance(example, (tuple, list)):
        out = model(*example)
    else:
        out = model(example)
    return list(_tensors(out))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def couplings(model: nn.Module, example: Any) -> list[Coupling]:
    """The channels of a model in groups that can be removed only together, each with why it cannot, if so.

    Args:
        example: inputs, as the model is called with; a batch of two is enough.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model cannot be called with the example.
    """
    found = _traced(model, example)
    open_ = [coupling for coupling in found if coupling.reason is None]
    if open_ and not _holds(model, example, open_):
        failed = {id(coupling) for coupling in open_ if not _holds(model, example, [coupling])}
        why = "a trial showed that its channels depend on each other in ways that cannot be followed"
        found = [Coupling(c.ports, why) if id(c) in failed else c for c in found]
        open_ = [coupling for coupling in found if coupling.reason is None]
        if open_ and not _holds(model, example, open_):  # each alone can be removed, all together cannot
            found = [Coupling(c.ports, c.reason or why) for c in found]
    return found


def _traced(model: nn.Module, example: Any) -> list[Coupling]:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("removing channels needs Torch-Pruning: pip install 'pl_sparse[shrink]'") from error
    paths = {module: path for path, module in model.named_modules()}
    units = _Units()
    ends: list[Any] = []
    made: list[tuple[Tensor, nn.Module]] = []

    def forward(model: nn.Module, example: Any) -> list[Tensor]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                made.append((out, module))

        handles = [module.register_forward_hook(note) for module in paths if not list(module.children())]
        try:
            outputs = called(model, example)
        finally:
            for handle in handles:
                handle.remove()
        ends.extend(module for tensor, module in made if any(tensor is out for out in outputs))
        return [out for out in outputs if out.grad_fn is not None]

    graph = torch_pruning.DependencyGraph()
    with undisturbed(model), _differentiable(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's remarks on what it guesses; the trial judges that
        try:
            graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced with the example of its inputs: {error}. Give the inputs it "
                "is called with as example_input_array"
            ) from error
    heads = {layer for each in attentions(model) if isinstance(each, Attention) for layer, _, _ in each.weights[:-1]}
    seen: set[tuple[str, str]] = set()
    for module in list(graph.module2node):
        if not isinstance(module, _WEIGHTED) or (paths[module], "out") in seen or module in heads:
            continue
        count = module.weight.shape[1 if isinstance(module, _TRANSPOSED) else 0]
        pruner = graph.get_pruner_of_module(module)
        for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(count))):
            target = item.dep.target.module
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            if target in paths and _sides(target) == ("out",):
                side = "out"
            if target in paths:
                key = (paths[target], side)
            elif isinstance(target, nn.Parameter):
                key = (f"the parameter of shape {tuple(target.shape)}", side)
            elif isinstance(target, torch_pruning.ops._OutputOp):
                key = ("", side)
            else:
                continue
            roots = item.root_idxs if item.root_idxs is not None else [None] * len(item.idxs)
            for root, index in zip(roots, item.idxs, strict=True):
                if root is None:
                    units.block((*key, index), "its channels are repeated")
                else:
                    units.join((paths[module], "out", root), (*key, index))
            if side == "out" and len(item.idxs) == count and target is module:
                seen.add(key)
    names = {id(parameter): 0 for parameter in model.parameters()}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] += 1
    layers = {path: module for module, path in paths.items() if path}
    for path, side in list(units.ports):
        layer = layers.get(path)
        _joined_groups(units, path, side, layer)
        if path == "" or (layer is not None and any(layer is end for end in ends) and side == "out"):
            units.block_port((path, side), "its channels are outputs of the model")
        elif layer is None or not _sides(layer):
            what = path if layer is None else f"{path} ({type(layer).__name__})"
            units.block_port((path, side), f"its channels go through {what}, which needs all of them")
        elif any(names[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            units.block_port((path, side), f"the weights of {path} are used twice")
    return units.couplings()


def _sides(module: nn.Module) -> tuple[str, ...]:
    """The sides of a layer that channels can be taken from: its outputs and inputs may be the same ones."""
    if isinstance(module, (*_NORMS, nn.PReLU)) or _depthwise(module):
        return ("out",)
    if isinstance(module, _TRANSPOSED):
        return ("out", "in") if module.groups == 1 else ()
    return ("out", "in") if isinstance(module, _WEIGHTED) else ()


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def _joined_groups(units: _Units, path: str, side: str, module: nn.Module | None) -> None:
    """The groups of a grouped convolution stay equally wide: channel j of each group is one unit."""
    if isinstance(module, (*_CONVS, *_TRANSPOSED)) and module.groups > 1 and not _depthwise(module):
        width = (module.out_channels if side == "out" else module.in_channels) // module.groups
        for index in list(units.ports[path, side]):
            units.join((path, side, index % width), (path, side, index))


Slot = tuple[str, str, int]


class _Units:
    """Slots (layer, side, index) that are one unit: union and find."""

    def __init__(self) -> None:
        self.above: dict[Slot, Slot] = {}
        self.reasons: dict[Slot, str] = {}
        self.ports: dict[tuple[str, str], dict[int, None]] = {}

    def find(self, slot: Slot) -> Slot:
        if slot not in self.above:
            self.above[slot] = slot
            self.ports.setdefault(slot[:2], {})[slot[2]] = None
        while self.above[slot] != slot:
            self.above[slot] = self.above[self.above[slot]]
            slot = self.above[slot]
        return slot

    def join(self, a: Slot, b: Slot) -> None:
        a, b = self.find(a), self.find(b)
        self.above[b] = a
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons[b])

    def block(self, slot: Slot, reason: str) -> None:
        self.reasons.setdefault(self.find(slot), reason)

    def block_port(self, port: tuple[str, str], reason: str) -> None:
        for index in self.ports[port]:
            self.block((*port, index), reason)

    def couplings(self) -> list[Coupling]:
        """Units that have as many slots in the same ports, together."""
        members: dict[Slot, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
        for path, side in self.ports:
            for index in sorted(self.ports[path, side]):
                members[self.find((path, side, index))][path, side].append(index)
        alike: dict[tuple[Any, ...], list[Slot]] = defaultdict(list)
        for root, ports in members.items():
            alike[tuple((*port, len(places)) for port, places in ports.items())].append(root)
        found = []
        for roots in alike.values():
            shared = tuple(
                Port(path, side, tuple(tuple(members[root][path, side]) for root in roots))
                for path, side in members[roots[0]]
            )
            reason = next((self.reasons[root] for root in roots if root in self.reasons), None)
            if reason is None and not any(port.side == "in" for port in shared):
                reason = "nothing is known to take its channels in"
            if reason is None and len(roots) == 1:
                reason = "all its channels depend on each other"
            found.append(Coupling(shared, reason))
        return found


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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


def _of_heads(attention: Attention, chosen: Sequence[int]) -> Iterator[tuple[nn.Module, int, set[int]]]:
    """The weights of an attention layer: the dimension that its heads are in, and the indices there of some of them."""
    for layer, name, layout in attention.weights:
        shape = layer.get_parameter(name).shape
        dim = int(layout.columns)
        index = torch.arange(shape[dim]).unsqueeze(1 - dim).expand(shape)
        yield layer, dim, set(layout.view(index)[list(chosen)].flatten().tolist())


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


class FewerHeads(nn.MultiheadAttention):
    """Multi-head attention some heads of which were removed, so that they no longer fill the embedding.

    Attention weights, where they are asked for, are those of the heads that are left, or their mean.
    """

    @staticmethod
    def suit(module: nn.MultiheadAttention) -> None:
        """Make a layer this class, or the plain one, as its number of heads wants it."""
        fewer = module.num_heads * module.head_dim != module.embed_dim
        if fewer != isinstance(module, FewerHeads):
            module.__class__ = FewerHeads if fewer else nn.MultiheadAttention
            # The fused path of torch's encoder layers, which asks for this, knows only heads that fill the embedding.
            module._qkv_same_embed_dim = not fewer and module.in_proj_weight is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; a mask of each head on its own is not taken."""
        if attn_mask is not None and attn_mask.dim() == 3:
            raise ValueError("an attention layer whose heads were removed takes no mask of each head: give one for all")
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value)]
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        bias = _additive(attn_mask, q)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask if batched else key_padding_mask.unsqueeze(0), q)
            assert padding is not None
            padding = padding[:, None, None, :]
            bias = padding if bias is None else bias + padding
        weights_out = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = (scores if bias is None else scores + bias).softmax(-1)
            attention = nn.functional.dropout(attention, self.dropout, self.training)
            out = attention @ v
            weights_out = attention.mean(1) if average_attn_weights else attention
            weights_out = weights_out if batched else weights_out.squeeze(0)
        else:
            dropout = self.dropout if self.training else 0.0
            out = nn.functional.scaled_dot_product_attention(q, k, v, bias, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        return out if batched else out.squeeze(0 if self.batch_first else 1), weights_out


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to scores: in torch's attention layers True means that a position is left out."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


# Trials


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the very tensors, gradients and attributes that it has now."""
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in _named(model).values()]
    numbers = [(m, key, value) for m in model.modules() for key, value in vars(m).items() if isinstance(value, int)]
    with undisturbed(model), torch.no_grad():
        try:
            for tensor, _, _ in tensors:
                tensor.grad = None
            yield
        finally:
            for tensor, data, grad in tensors:
                tensor.data = data
                tensor.grad = grad
            for module, key, value in numbers:
                setattr(module, key, value)
            for module in model.modules():
                if isinstance(module, nn.MultiheadAttention):
                    FewerHeads.suit(module)


def _holds(model: nn.Module, example: Any, found: Sequence[Coupling]) -> bool:
    """Whether every third unit can be removed, where it is zero, without a change of the outputs."""
    chosen = [(coupling, range(0, coupling.units, 3)) for coupling in found]
    with _trial(model):
        model.eval()
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(0)
            for tensor in _named(model).values():
                if tensor.is_floating_point():
                    fan = tensor[0].numel() if tensor.dim() > 1 else 4
                    tensor.data = torch.randn_like(tensor) * fan**-0.5
            for module in model.modules():
                if isinstance(module, _NORMS) and isinstance(module.running_var, Tensor):
                    module.running_var.data = module.running_var.abs() + 0.5
            for coupling, gone in chosen:
                for port in coupling.ports:
                    if port.side == "out":
                        silence(model.get_submodule(port.path), [place for unit in gone for place in port.places[unit]])
            plan = Plan.of(model, chosen)
            return difference(model, example, plan.apply) <= 1e-4


def silence(module: nn.Module, channels: Sequence[int]) -> None:
    """Make output channels of a layer zero: weights, biases, scales and shifts."""
    for short, dim, _ in _cut_by(module, "out"):
        tensor = _own(module)[short]
        if not short.startswith("running_") and not isinstance(module, nn.PReLU):
            tensor.data = tensor.index_fill(dim, torch.tensor(list(channels), device=tensor.device), 0)


def difference(model: nn.Module, example: Any, change: Callable[[nn.Module], None]) -> float:
    """How far a change of a model moves its outputs, relative to the largest of them if that is above 1.

    The outputs are those for the example and for noise, in evaluation mode. The model is left as it is. Infinity: the
    changed model cannot be called, or its outputs have another shape.
    """
    inputs = [example, _noise(example)]
    with _trial(model):
        model.eval()
        before = [called(model, x) for x in inputs]
        change(model)
        try:
            after = [called(model, x) for x in inputs]
        except Exception:
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


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
