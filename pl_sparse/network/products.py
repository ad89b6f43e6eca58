"""The rules of products of tensors, attention and recurrent layers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pl_sparse.network.couples import NONE, Call, Track, couples
from pl_sparse.network.layer_rules import weighted
from pl_sparse.network.layers import is_weighted
from pl_sparse.network.rules import named, unknown

__all__ = ["contract"]


def contract(call: Call, operands: Sequence[tuple[Tensor, str]], out: str) -> Track | None:
    """A sum of products, as einsum writes it: what is at the same letter is joined.

    Channels that are summed over are taken in by the product. A parameter that they are multiplied with loses them,
    too, and gives out channels where it has a letter of its own.

    Args:
        operands: each with a letter per dimension.
        out: the letters of the output.
    """
    tracks: list[Track] = []
    where: dict[str, list[tuple[int, ...]]] = {}
    for tensor, letters in operands:
        track = call.track(tensor)
        if track is not None:
            where.setdefault(letters[track.dim], []).append(track.slots)
    for letter, slots in where.items():
        whole = len(slots[0])
        for tensor, letters in operands:
            track = call.track(tensor)
            if letter not in letters or (track is not None and letters[track.dim] == letter):
                continue
            place = letters.index(letter)
            if tensor.shape[place] == 1 < whole or call.is_same(tensor, place):  # the same for all channels
                continue
            claimed = call.claim(tensor, place, "scale" if letter in out else "in")
            slots.append((NONE,) * whole if claimed is None else claimed)
        if len({len(each) for each in slots}) > 1:
            for each in slots:
                call.units.block([slot for slot in each if slot != NONE], f"{call.name} repeats its only channel")
            continue
        call.join(*slots)
        if letter in out:
            tracks.append(Track(out.index(letter), slots[0]))
        else:
            call.units.read(slot for slot in slots[0] if slot != NONE)
    for tensor, letters in operands:
        free = [i for i in letters if i in out and sum(i in other for _, other in operands) == 1]
        if tensor.dim() > 1 and call.is_parameter(tensor) and not tracks and len(free) == 1:
            rows = call.claim(tensor, letters.index(free[0]), "out")
            if rows is not None:
                tracks.append(Track(out.index(free[0]), rows))
    for track in tracks[1:]:
        call.keep(track, f"{call.name} has channels along two dimensions of its output")
    return tracks[0] if tracks else None


def _letters(a: Tensor, b: Tensor) -> tuple[str, str, str]:
    """A product of matrices in letters."""
    batch = string.ascii_uppercase[: max(a.dim(), b.dim(), 2) - 2]
    left = batch[len(batch) - a.dim() + 2 :] + "ik" if a.dim() > 1 else "k"
    right = batch[len(batch) - b.dim() + 2 :] + "kj" if b.dim() > 1 else "k"
    return left, right, batch + "i" * (a.dim() > 1) + "j" * (b.dim() > 1)


@couples(*named("matmul bmm mm mv dot"))
def product(call: Call) -> Track | None:
    """Rows by columns, of single matrices or batches of them."""
    a, b = call.tensors()[:2]
    left, right, out = _letters(a, b)
    return contract(call, [(a, left), (b, right)], out)


@couples(*named("linear"))
def linear(call: Call) -> Track | None:
    """Rows of the weight are outputs, columns inputs; a vector is one row, and leaves no dimension."""
    source, weight = call["input"], call["weight"]
    if weight.dim() == 1:
        left, right, out = _letters(source, weight)
        return contract(call, [(source, left), (weight, right)], out)
    outputs, inputs = weight.shape
    return weighted(call, source, weight, source.dim() - 1, inputs, outputs)


@couples(*named("addmm baddbmm addbmm"))
def product_and_shift(call: Call) -> Track | None:
    """The same, with something added, as in GPT-2's linear layer: (inputs, outputs) is the shape of its weight."""
    added, a, b = call.tensors()[:3]
    owner = call.owner(b)
    if owner is not None and is_weighted(owner[1]) and a.dim() == 2:
        return weighted(call, a, b, 1, *b.shape)
    left, right, out = _letters(a, b)
    track = contract(call, [(a, left), (b, right)], out)
    if call.track(added) is not None:
        return unknown(call)
    place = None if track is None else track.dim - len(out) + added.dim()
    if track is not None and place is not None and place >= 0 and added.shape[place] != 1:
        shift = call.claim(added, place, "shift")
        call.join(track.slots, (NONE,) * len(track.slots) if shift is None else shift)
    return track


@couples(*named("cdist _cdist_forward _euclidean_dist"))
def distances(call: Call) -> None:
    """Between points, whose channels come last: what is zero in both adds nothing."""
    joined = []
    for points in call.tensors()[:2]:
        track = call.track(points)
        if track is None or track.dim == points.dim() - 1:
            own = call.claim(points, points.dim() - 1, "in") if track is None else track.slots
            joined.append((NONE,) * points.shape[-1] if own is None else own)
        else:
            call.need_here(track)
    call.join(*joined)
    call.units.read(slot for slots in joined for slot in slots if slot != NONE)


@couples(*named("einsum"))
def einsum(call: Call) -> Track | None:
    """As it is written."""
    equation, tensors = call["equation"].replace(" ", ""), call["tensors"]
    given, arrow, out = equation.partition("->")
    sides = given.split(",")
    names = [letter for letter in string.ascii_letters if letter not in equation]
    for place, tensor in enumerate(tensors):  # dimensions that stand for any number
        count = tensor.dim() - len(sides[place].replace("...", ""))
        sides[place] = sides[place].replace("...", "".join(names[:count][::-1]))
    if not arrow:
        once = sorted(letter for letter in set(given) - {",", "."} if given.count(letter) == 1)
        out = "..." * ("..." in given) + "".join(once)
    count = call.output.dim() - len(out.replace("...", ""))
    out = out.replace("...", "".join(names[:count][::-1]))
    if any(len(set(side)) < len(side) for side in sides):  # a diagonal
        return unknown(call)
    return contract(call, list(zip(tensors, sides, strict=True)), out)


@couples(*named("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu"))
def attention(call: Call) -> Any:
    """Queries and keys are multiplied, values are not changed but mixed over places."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    single = isinstance(call.output, Tensor)
    tracks = [call.track(tensor) for tensor in (query, key, value)]
    last = query.dim() - 1
    if call.track(call["attn_mask"]) is not None:
        for tensor in call.tensors():
            call.keep(call.track(tensor), f"{call.name} adds channels to scores")
        return None if single else [None] * len(call.output)
    for track in tracks[:2]:
        if track is not None and track.dim == last and call["scale"] is None:
            call.keep(track, f"{call.name} divides by the root of their number: give it a scale")
    batch = string.ascii_uppercase[: last - 1]
    contract(call, [(query, batch + "lk"), (key, batch + "sk")], batch + "ls")
    if any(track is not None and track.dim < last - 1 for track in tracks):
        out = contract(call, [(query, batch + "lx"), (key, batch + "sy"), (value, batch + "sv")], batch + "lv")
    else:
        mixed = tracks[2]
        if mixed is not None and mixed.dim == last - 1:
            call.need_here(mixed)
            mixed = None
        out = mixed
    return out if single else [out, *[None] * (len(call.output) - 1)]


@couples(*named("lstm gru rnn_tanh rnn_relu"))
def recurrent(call: Call) -> Any:
    """Hidden unit j is one unit in all layers and both directions, since they have one size."""
    source: Tensor = call.tensors()[0]
    path, layer = call.owner(call["params"][0]) or (call.path, call.module)
    if not isinstance(layer, nn.RNNBase):
        return unknown(call)
    slots, cells = _hidden(call, path, layer, source)
    hidden = [call["hx"]] if isinstance(call["hx"], Tensor) else list(call["hx"])
    for state, units in zip(hidden, (slots, cells), strict=False):
        _join_state(call, state, units)
    outs: list[Tensor] = list(call.output)
    both = slots * (2 if layer.bidirectional else 1)
    ends = [both, slots, cells]
    return [Track(out.dim() - 1, units) for out, units in zip(outs, ends, strict=False)]


@couples(*named("_pack_padded_sequence"))
def packed(call: Call) -> Any:
    """Steps of sequences one after the other: features stay where they are."""
    track, source = call.track(call["input"]), call["input"]
    if track is not None and track.dim < source.dim() - 1:
        call.need_here(track)
        track = None
    return [track and Track(1, track.slots), None]


@couples(*named("_pad_packed_sequence"))
def padded(call: Call) -> Any:
    """The inverse; zeros where a sequence has ended."""
    track = call.track(call["data"])
    if track is not None and call["padding_value"]:
        call.keep(track, f"{call.name} pads them with another number than zero")
    return [track and Track(2, track.slots), None]


@couples(*named("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"))
def cell(call: Call) -> Any:
    """One step of such a layer."""
    source: Tensor = call["input"]
    path, layer = call.owner(call["w_ih"]) or (call.path, call.module)
    if not isinstance(layer, nn.RNNCellBase):
        return unknown(call)
    slots, _ = _hidden(call, path, layer, source)
    for state in [call["hx"]] if isinstance(call["hx"], Tensor) else call["hx"]:
        _join_state(call, state, slots)
    single = isinstance(call.output, Tensor)
    return Track(1, slots) if single else [Track(out.dim() - 1, slots) for out in call.output]


def _hidden(call: Call, path: str, layer: Any, source: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slots of the outputs of a recurrent layer, and of the cells behind them, which are the same without
    projections."""
    track = call.track(source)
    if track is not None and track.dim != source.dim() - 1:
        call.need(track, path, layer)
    elif track is not None:
        call.pass_to(track, path, "in")
    projected = getattr(layer, "proj_size", 0)
    slots = call.units.port(path, "out", range(projected or layer.hidden_size))
    call.join(slots, call.units.port(path, "in", range(len(slots)), "hidden"))
    if not projected:
        return slots, slots
    cells = call.units.port(path, "out", range(layer.hidden_size), "cell")
    call.join(cells, call.units.port(path, "in", range(layer.hidden_size), "cell"))
    return slots, cells


def _join_state(call: Call, state: Any, slots: tuple[int, ...]) -> None:
    """Join the channels of a state that is given with the hidden units; one of zeros needs no track."""
    track = call.track(state)
    if track is not None and track.dim == state.dim() - 1:
        call.join(track.slots, slots)
    elif track is not None:
        call.need_here(track)
    elif call.is_constant(state) and not call.is_same(state, state.dim() - 1):
        start = call.claim(state, state.dim() - 1, "shift")
        call.join(slots, (NONE,) * len(slots) if start is None else start)
