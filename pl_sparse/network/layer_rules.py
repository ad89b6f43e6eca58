"""The rules of what layers do: products with weights, norms, tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pl_sparse.core.upstream import CHANNEL_NORMS
from pl_sparse.network.couples import NONE, Call, Track, couples
from pl_sparse.network.layers import TABLES, is_depthwise, is_weighted, sides
from pl_sparse.network.rules import named

__all__ = ["weighted"]


def _layer(call: Call, weight: Tensor) -> tuple[str, nn.Module]:
    """The layer that a weight is of; where it is computed, the one that computes with it."""
    return call.owner(weight) or (call.path, call.module)


def weighted(call: Call, source: Tensor, weight: Tensor, dim: int, inputs: int, outputs: int) -> Track | None:
    """A layer takes channels in, and gives out channels of its own.

    Args:
        dim: the dimension of both.
    """
    track = call.track(source)
    path, layer = _layer(call, weight)
    if layer in call.heads and isinstance(layer, nn.MultiheadAttention):
        columns = call.claim(weight, 1, "in") if call.norms and track is not None and track.dim == dim else None
        if columns is None or track is None:
            call.need(track, path, layer)
        else:
            call.join(track.slots, columns)
        return None
    if not is_weighted(layer):
        return _own(call, track, weight, dim, inputs)
    depthwise = is_depthwise(layer)
    if track is not None and track.dim != dim:
        call.keep(track, f"its channels are not those that {path} ({type(layer).__name__}) takes in")
    elif track is not None and not depthwise:
        call.pass_to(track, path, "in")
    slots = call.units.port(path, "out", range(outputs))
    if track is not None and track.dim == dim and depthwise:
        for place, slot in enumerate(track.slots):
            for out in slots[place * outputs // inputs : (place + 1) * outputs // inputs] if slot != NONE else ():
                call.units.join(slot, out)
    if call.owner(weight) is None:  # by code that is in no module of its own
        call.units.block(slots, f"the weight of {path} is computed from other tensors")
        call.keep(track, f"the weight of {path} is computed from other tensors")
    if depthwise and (track is None or NONE in track.slots):
        call.units.block(slots, f"{path} reads what are no channels of a layer")
    return None if layer in call.heads else Track(dim, slots)


def _own(call: Call, track: Track | None, weight: Tensor, dim: int, inputs: int) -> Track | None:
    """A weight that is of no known layer: as the rows and columns of a parameter."""
    path, layer = _layer(call, weight)
    own, single = weight.shape[1] == inputs, weight.shape[1] == 1 < inputs == weight.shape[0]
    transposed = "transpose" in call.name or ("convolution" in call.name and call["transposed"])
    if transposed or not (own or single) or (track is not None and track.dim != dim) or not call.is_constant(weight):
        call.need(track, path or "the model", layer)
        return None
    if single:  # each channel has a filter of its own
        slots = call.claim(weight, 0, "scale")
        if track is None or slots is None:
            call.need(track, path or "the model", layer)
            return None
    else:
        if track is not None:
            reads = call.claim(weight, 1, "in")
            known = [index for index, slot in enumerate(track.slots) if slot != NONE]
            if reads is None:
                call.need(track, path or "the model", layer)
            else:
                call.join([track.slots[i] for i in known], [reads[i] for i in known])
        slots = call.claim(weight, 0, "out")
    if slots is None:
        return None
    shift = call.claim(call["bias"], 0, "shift") if isinstance(call["bias"], Tensor) else slots
    if shift is None:
        call.units.block(slots, f"its bias in {path or 'the model'} is computed")
    else:
        call.join(slots, shift)
    if single and track is not None:
        call.join(track.slots, slots)
    return Track(dim, slots)


@couples(*named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"))
def convolution(call: Call) -> Track | None:
    """Plain, grouped, depthwise and transposed ones."""
    source, weight = call["input"], call["weight"]
    dim = source.dim() - weight.dim() + 1
    return weighted(call, source, weight, dim, source.shape[dim], call.output.shape[dim])


@couples(*named("batch_norm instance_norm native_batch_norm"))
def channel_norm(call: Call) -> Track | None:
    """Each channel has a scale, a shift and statistics."""
    source: Tensor = call["input"]
    track = call.track(source)
    if track is None:
        return None
    mine = (call.owner(call[name]) for name in ("weight", "running_mean"))
    path, layer = next((owner for owner in mine if owner is not None), (call.path, call.module))
    if track.dim == 1 and not isinstance(layer, CHANNEL_NORMS):
        own = (("running_var", "scale"), ("weight", "scale"), ("running_mean", "shift"), ("bias", "shift"))
        slots = [call.claim(call[name], 0, side) for name, side in own if call[name] is not None]
        known = [each for each in slots if each is not None]
        if len(known) == len(slots):
            call.join(track.slots, *known)
            return track
    if track.dim != 1 or not isinstance(layer, CHANNEL_NORMS):
        call.need(track, path, layer)
        return None
    call.pass_to(track, path, "out")
    return track


@couples(*named("layer_norm rms_norm native_layer_norm"))
def layer_norm(call: Call) -> Track | None:
    """Over other dimensions than that of the channels, or over those that are left."""
    source: Tensor = call["input"]
    track = call.track(source)
    if track is not None and track.dim >= source.dim() - len(call["normalized_shape"]):
        call.need_here(track)
        for name, side in (("weight", "scale"), ("bias", "shift")) if call.module in call.norms else ():
            given = call[name] if name == "weight" or "layer" in call.name else None
            own = call.claim(given, 0, side) if isinstance(given, Tensor) else None
            if own is not None:
                call.join(track.slots, own)
    return track


@couples(*named("prelu _prelu_kernel"))
def prelu(call: Call) -> Track | None:
    """One slope for all channels, or one for each."""
    source: Tensor = call["self"]
    weight, track = call["weight"], call.track(source)
    if track is None or weight.numel() == 1:
        return track
    path, layer = _layer(call, weight)
    if not isinstance(layer, nn.PReLU) and track.dim == 1 and (slopes := call.claim(weight, 0, "scale")) is not None:
        call.join(track.slots, slopes)
        return track
    if track.dim != 1 or not sides(layer) or NONE in track.slots:
        call.need(track, path, layer)
        return None
    call.join(track.slots, call.units.port(path, "out", range(len(track.slots))))
    return track


@couples(*named("group_norm"))
def group_norm(call: Call) -> Track | None:
    """It looks at all channels of a group, which are one unit."""
    track, groups = call.track(call["input"]), call["num_groups"]
    if track is None:
        return None
    path, layer = _layer(call, call["weight"])
    if track.dim != 1 or not isinstance(layer, nn.GroupNorm) or groups == 1 or NONE in track.slots:
        call.need(track, path, layer)
        return track
    width = len(track.slots) // groups
    call.join(track.slots, call.units.port(path, "out", range(len(track.slots))))
    call.join(*(track.slots[place::width] for place in range(width)))
    return track


@couples(*named("embedding embedding_bag"))
def embedding(call: Call) -> Any:
    """The columns of a table."""
    weight, single = call["weight"], isinstance(call.output, Tensor)
    owner, out = call.owner(weight), call.output if single else call.output[0]
    track = None
    if owner is not None and isinstance(owner[1], TABLES):
        track = Track(out.dim() - 1, call.units.port(owner[0], "out", range(weight.shape[1])))
    elif (slots := call.claim(weight, 1, "out")) is not None:
        track = Track(out.dim() - 1, slots)
    return track if single else [track, *[None] * (len(call.output) - 1)]
