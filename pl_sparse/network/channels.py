"""Which channels belong together, read off a call of a model.

A residual join adds channel i of one layer to channel i of another, a concatenation shifts it, a flattening spreads it
over several inputs of the next layer. What can be removed is a unit: all places, in all layers, that are one channel.
The model is called once; a rule per operation says what becomes of channels (`couples`). What no rule follows stays.
What rules say passes a trial (`surgery.trial`) before it is believed.

Source: Fang et al., DepGraph: towards any structural pruning, 2023, arXiv:2301.12900, for the units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pl_sparse.core.parametrized import behind, is_computed
from pl_sparse.core.upstream import DispatchMode, below_autograd
from pl_sparse.network.attention import Attention, attentions
from pl_sparse.network.couples import NONE, Call, Rule, Track
from pl_sparse.network.hooks import called, hooked, stand_ins, uncallable, unfused
from pl_sparse.network.layers import CONVS, RECURRENT, TABLES, TRANSPOSED, End, held, is_depthwise, is_weighted, sides
from pl_sparse.network.norms import is_over_left, norm_over_all
from pl_sparse.network.origins import Origins
from pl_sparse.network.products import contract as _products  # noqa: F401  its rules are in the table then
from pl_sparse.network.rules import MOVING, elementwise, index, moved, rule_of, unknown
from pl_sparse.network.units import Coupling, Units
from pl_sparse.network.written_rules import copy, filled

__all__ = ["short", "traced_couplings"]


def traced_couplings(model: nn.Module, example: Any) -> list[Coupling]:
    """The couplings of a model, each with why its units cannot be removed, if the rules say so.

    Norms that take their statistics over the channels that are left (`norms.norm_over_left`) let them go.

    Args:
        model: it is left as it is.
        example: inputs, as the model is called with.

    Raises:
        ValueError: the model cannot be called with the example.
    """
    units = Units()
    scripted = next((path for path, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        return _all_stay(model, f"keeps its channels: {scripted or 'the model'} is a scripted module")
    try:
        with stand_ins(model), unfused():
            follow = _Follow(model, units)
            with hooked(model.modules(), pre=follow.enter, post=follow.leave), below_autograd(), follow:
                follow.block_outputs(called(model, example))
    except Exception as error:
        _check_call(model, example)
        return _all_stay(model, f"keeps its channels: they could not be followed ({short(error)})")
    follow.forget_heads()
    _name_norms(units)
    _block_ports(units, model, bool(follow.norms))
    return units.couplings()


def _check_call(model: nn.Module, example: Any) -> None:
    """Refuse an example that the model cannot be called with."""
    try:
        with stand_ins(model), torch.no_grad():
            called(model, example)
    except Exception as error:
        raise uncallable(model, error) from error


def short(error: Exception) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _all_stay(model: nn.Module, reason: str) -> list[Coupling]:
    """All layers keep all channels, for one reason."""
    couplings = []
    for path, module in model.named_modules():
        weight = behind(module, "weight") if is_weighted(module) else None
        if weight is not None:
            units = Units()
            units.block(units.port(path, "out", range(_outputs(module, weight))), reason)
            couplings += units.couplings()
    return couplings


def _outputs(module: nn.Module, weight: Tensor) -> int:
    """How many outputs a layer has."""
    first = not isinstance(module, (nn.Linear, *CONVS))
    groups: Any = module.groups if isinstance(module, TRANSPOSED) else 1
    return int(weight.shape[int(first)] * groups)


class _Follow(DispatchMode):
    """Within the block each operation has its rule applied. It takes hooks off norms.

    Operations that are made of others are seen whole; where one has no rule, those that it is made of are seen.

    Args:
        model: the one that is called.
        units: gets slots, joins and reasons.
    """

    def __init__(self, model: nn.Module, units: Units) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units = units
        self._tracks: Any = WeakTensorKeyDictionary()
        self._paths = {module: path for path, module in model.named_modules()}
        self._inside: list[nn.Module] = [model]
        self._origins = Origins(model)
        # units of attention layers are heads
        self._heads = {m for each in attentions(model) if isinstance(each, Attention) for m, _, _ in each.weights[:-1]}
        self.norms = {module for module in model.modules() if is_over_left(module)}
        for norm in self.norms:  # what its hooks do is not followed
            norm_over_all(norm)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        rule = rule_of(func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        module = self._inside[-1]
        place = self._paths[module], module
        call = Call(
            func, args, kwargs, out, self.units, self._tracks.get, place, self._origins, self._heads, self.norms
        )
        if any(call.track(tensor) is not None for tensor in call.tensors()) or rule is not None:
            self._note(call, rule or unknown)
        if rule is copy:
            self._note_written(call)
        self._note_origin(call, rule)
        return out

    def _note_origin(self, call: Call, rule: Rule | None) -> None:
        """Note of what a tensor is made, if of parameters and buffers alone, one by one or by moving elements."""
        if rule is filled:
            self._origins.note_filled(call.output)
        sources = (call["self"],) if rule is index else tuple(call.tensors())
        known = all(self._origins.known(source) for source in sources)
        for written in call.written() if rule is not elementwise or not known else ():
            self._origins.forget_written(written)
        if not sources or not known:
            return
        if rule in MOVING and len(sources) == 1:
            outs = [call.output] if isinstance(call.output, Tensor) else list(call.output)
            for which, out in enumerate(outs):
                self._origins.note(out, sources, partial(moved, call, None if out is call.output else which))
        elif rule is elementwise and isinstance(call.output, Tensor):
            shape = call.output.shape
            self._origins.note(call.output, sources, lambda places: next(iter(places.values())).expand(shape))

    def _note_written(self, call: Call) -> None:
        """Give a tensor that is filled in parts, such as one sample after another, the track of a part."""
        track = self._tracks.get(call.output)
        base = None if track is None else self._origins.whole(call.output, track.dim)
        if track is not None and base is not None:
            self._track(base[0], Track(base[1], track.slots))

    def _note(self, call: Call, rule: Callable[[Call], Any]) -> None:
        """Give the outputs of a call the tracks that its rule says; where it fails, the channels that it reads stay."""
        try:
            tracks = rule(call)
        except Exception as error:
            tracks = None
            for tensor in call.tensors():
                call.keep(call.track(tensor), f"keeps its channels: the rule of {call.name} failed ({short(error)})")
        if isinstance(call.output, Tensor):
            self._track(call.output, tracks)
        elif isinstance(tracks, list):
            for tensor, track in zip(call.output, tracks, strict=True):
                if isinstance(tensor, Tensor):
                    self._track(tensor, track)

    def _track(self, tensor: Tensor, track: Track | None) -> None:
        if track is None or all(slot == NONE for slot in track.slots):
            self._tracks.pop(tensor, None)
        else:
            self._tracks[tensor] = track

    def forget_heads(self) -> None:
        """Leave out what comes out of the layers before attention: it belongs to heads, and is removed as such."""
        for module in self._heads:
            self.units.ports.pop(End(self._paths[module], "out"), None)

    def block_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Note that the channels of some tensors are outputs of the model."""
        for tensor in outputs:
            track = self._tracks.get(tensor)
            if track is not None:
                self.units.block([s for s in track.slots if s != NONE], "its channels are outputs of the model")


def _name_norms(units: Units) -> None:
    """Give the scale of each norm over channels its side; one without a scale keeps them."""
    scaled = {end.path for end in units.ports if end.side == "scale"}
    for path, slots in units.norms.items():
        if path not in scaled:
            units.block(slots, f"its channels go through {path}, which has no scale that tells those that are left")
    units.ports = {
        end._replace(side="norm") if end.side == "scale" and end.path in units.norms else end: slots
        for end, slots in units.ports.items()
    }


def _block_ports(units: Units, model: nn.Module, tied: bool) -> None:
    """Block the units whose channels some layer does not let go, and join those that groups of a layer share.

    Args:
        tied: whether channels may go of a weight that several layers have, if it has them along the same dimension.
    """
    uses = {id(parameter): 0 for parameter in model.parameters()}
    tables = set()  # those of one weight have one end: T5's `shared` and what its encoder and its decoder read
    for module in model.modules() if tied else ():  # one that has several names counts once
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] += id(parameter) not in tables
            tables |= {id(parameter)} if isinstance(module, TABLES) else set()
    for _, parameter in () if tied else model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] += 1
    _block_buffers(units, model)
    lines = _lines(units, model)
    joined = _join_tied(units, lines, uses) if tied else set()
    for key, (first, *rest) in lines.items():  # of one layer: a weight that its code also reads transposed
        if uses.get(key[0], 1) == 1:
            _join_lines(units, first, rest)
    _block_crossed(units, model)

    def twice(layer: nn.Module, end: End) -> bool:
        keys = {(id(getattr(layer, part.name)), part.dim) for part in held(layer, end)}
        return any(uses.get(key[0], 1) > 1 and key not in joined for key in keys)

    for end, slots in units.ports.items():
        path, layer = end.path, model.get_submodule(end.path)
        own = [getattr(layer, end.tensor)] if isinstance(getattr(layer, end.tensor or "_", None), Tensor) else None
        if not own:
            _join_groups(units, slots, end.side, layer)
        if not own and not sides(layer):
            reason = f"its channels go through {path or 'the model'} ({type(layer).__name__}), which needs all of them"
        elif is_computed(layer) or (isinstance(layer, RECURRENT) and hasattr(layer, "parametrizations")):
            reason = f"the weight of {path} is computed from other tensors"
        elif twice(layer, end) if tied else any(uses.get(id(t), 1) > 1 for t in own or layer.parameters(recurse=False)):
            reason = f"the weights of {path} are used twice"
        else:
            continue
        units.block(slots.values(), reason)


def _block_buffers(units: Units, model: nn.Module) -> None:
    """Block the units that a buffer is added to which a checkpoint would not have as it is masked, or not alone."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            owners[id(buffer)].append(f"{path}.{name}".lstrip("."))
    for end, slots in units.ports.items():
        layer = model.get_submodule(end.path)
        names = owners.get(id(layer._buffers.get(end.tensor)), []) if end.side == "shift" else []
        if names and end.tensor not in layer.state_dict(keep_vars=True):
            units.block(slots.values(), f"{names[0]}, a buffer that checkpoints do not have, is added to its channels")
        elif len(names) > 1:  # each gets one of its own when the model is moved
            units.block(slots.values(), f"{names[0]} and {names[1]}, one buffer, are added to its channels")


_Lines = dict[tuple[int, int], list[dict[int, int]]]
"""By a tensor's identity and a dimension of it, for each end that has channels there: the slot of each index."""


def _lines(units: Units, model: nn.Module) -> _Lines:
    """Where the channels at all ends are in the tensors of the model."""
    lines: _Lines = defaultdict(list)
    for end, slots in units.ports.items():
        layer = model.get_submodule(end.path)
        for part in held(layer, end) if end.tensor or sides(layer) else ():
            if (tensor := _own(layer, part.name)) is not None:
                line = {index: slot for place, slot in slots.items() for index in part.indices([place])}
                lines[id(tensor), part.dim].append(line)
    return lines


def _own(layer: nn.Module, name: str) -> Any:
    """A tensor that a layer holds; None for one that it computes, which may write to others (`spectral_norm`)."""
    return layer._parameters.get(name, layer._buffers.get(name, vars(layer).get(name)))


def _join_lines(units: Units, first: Mapping[int, int], rest: Iterable[Mapping[int, int]]) -> None:
    """Make the channels at the same index of a tensor one unit."""
    for line in rest:
        for place in first.keys() & line.keys():
            units.join(first[place], line[place])


def _block_crossed(units: Units, model: nn.Module) -> None:
    """Let channels come out of each tensor along one dimension: a mask has units along one. That of the layer counts
    before others."""
    along: dict[int, int] = {}
    for end, slots in sorted(units.ports.items(), key=lambda port: bool(port[0].tensor)):
        layer = model.get_submodule(end.path)
        for part in held(layer, end) if end.side in ("out", "shift") and (end.tensor or sides(layer)) else ():
            tensor = _own(layer, part.name)
            if tensor is not None and along.setdefault(id(tensor), part.dim) != part.dim:
                name = f"{end.path}.{part.name}".lstrip(".")
                units.block(slots.values(), f"channels come out of {name} along its other dimension, too")


def _join_tied(units: Units, lines: _Lines, uses: Mapping[int, int]) -> set[tuple[int, int]]:
    """Make the channels at the same place of a tied weight one unit.

    Args:
        lines: where channels are.
        uses: by the identity of a parameter, how many modules have it.

    Returns:
        The tensors, by identity, and the dimensions along which all that have the tensor have its channels.
    """
    whole = {key for key, (first, *rest) in lines.items() if len(rest) + 1 == uses.get(key[0], 0) > 1}
    whole = {key for key in whole if len({frozenset(line) for line in lines[key]}) == 1}
    for key in whole:
        first, *rest = lines[key]
        _join_lines(units, first, rest)
    return whole


def _join_groups(units: Units, slots: dict[int, int], side: str, module: nn.Module) -> None:
    """The groups of a grouped convolution stay equally wide: channel j of each group is one unit."""
    if isinstance(module, (*CONVS, *TRANSPOSED)) and module.groups > 1 and not is_depthwise(module):
        width = (module.out_channels if side == "out" else module.in_channels) // module.groups
        for index, slot in slots.items():
            units.join(slots.get(index % width, slot), slot)
