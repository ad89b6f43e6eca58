"""The rules of torch's operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pl_sparse.network.couples import NONE, RULES, Call, Rule, Track, couples

__all__ = ["MOVING", "elementwise", "moved", "named", "rule_of", "unknown"]


def named(names: str) -> list[Any]:
    """The operations of torch with these names; those of other versions are left out."""
    return [getattr(torch.ops.aten, name) for name in names.split() if hasattr(torch.ops.aten, name)]


def rule_of(operation: Any) -> Rule | None:
    """The rule of an operation: its own, or that of all pointwise ones; None if there is none."""
    own = RULES.get(operation) or RULES.get(getattr(operation, "overloadpacket", None))
    return elementwise if own is None and torch.Tag.pointwise in getattr(operation, "tags", ()) else own


# Element by element


@couples(
    *named(
        "hardswish hardswish_ hardsigmoid hardsigmoid_ relu6 relu6_ selu selu_ celu dropout dropout_ "
        "feature_dropout alpha_dropout clone contiguous detach alias to _to_copy zeros_like "
        "ones_like empty_like rand_like randn_like full_like leaky_relu leaky_relu_ log_sigmoid softplus "
        "mish square square_ float_power where masked_fill masked_fill_"
    )
)
def elementwise(call: Call) -> Track | None:
    """Channels at the same place are joined, as broadcasting pairs them."""
    out: Tensor = call.output
    tensors = call.tensors()
    tracks = [(tensor, track) for tensor in tensors if (track := call.track(tensor)) is not None]
    places = {id(tensor): track.dim + out.dim() - tensor.dim() for tensor, track in tracks}
    if not places:
        return None
    sizes = {place: out.shape[place] for place in places.values()}
    free = {places[id(tensor)] for tensor, track in tracks if not call.stay(track)}
    dim = max(sizes, key=lambda place: (place in free, sizes[place]))
    for tensor, track in tracks:
        if places[id(tensor)] != dim:
            call.keep(track, f"{call.name} joins channels along different dimensions")
    across = {id(tensor) for tensor, _ in tracks if places[id(tensor)] != dim}
    tracks = [(tensor, track) for tensor, track in tracks if id(tensor) not in across]
    size = out.shape[dim]
    joined = []
    for _, track in tracks:
        if len(track.slots) == size:
            joined.append(track.slots)
        else:
            call.keep(track, f"{call.name} repeats its only channel")
    for tensor in sorted(tensors, key=lambda tensor: _side(call, tensor)):  # what scales comes first
        place = dim - out.dim() + tensor.dim()
        if (
            (call.track(tensor) is None or id(tensor) in across)
            and place >= 0
            and tensor.stride(place)
            and tensor.shape[place] != 1
            and not call.is_same(tensor, place)
        ):
            slots = None if id(tensor) in across else call.claim(tensor, place, _side(call, tensor))
            if slots is not None:
                joined.append(slots)
                continue
            for _, track in tracks:
                if call.is_constant(tensor):
                    call.keep(track, f"{call.name} joins its channels with several dimensions of a parameter or buffer")
                else:
                    call.keep(track, f"{call.name} joins its channels with what are no channels of a layer")
    call.join(*joined)
    return Track(dim, joined[0]) if joined else None


@couples(*named("type_as"))
def type_as(call: Call) -> Track | None:
    """Of the second tensor nothing but the type is taken."""
    return call.track(call["self"])


def _side(call: Call, tensor: Tensor) -> str:
    """What a parameter or buffer is to the channels that it is joined with."""
    later = ("div" in call.name or "addc" in call.name) and tensor is not call.tensors()[0]
    return "scale" if later or call.name.startswith("aten.mul") else "shift"


# Elements moved


def _moving(call: Call) -> Any:
    return call.moved()


couples(
    *named(
        "permute transpose t movedim swapaxes unsqueeze squeeze numpy_T mT adjoint reshape flatten "
        "unflatten expand expand_as repeat tile broadcast_to reshape_as pixel_unshuffle view_as"
    )
)(_moving)


@couples(*named("view _unsafe_view _reshape_alias"))
def view(call: Call) -> Any:
    """As reshape, since slots are kept with other strides than the elements."""
    source = next(tensor for tensor in call.tensors())
    track = call.track(source)
    return None if track is None else call.read(call.labels(source, track).reshape(call.output.shape))


def moved(call: Call, which: int | None, tensors: dict[int, Tensor]) -> Tensor:
    """The elements of an output of an operation that only moves them, given those of what it is called with.

    Args:
        which: of several outputs.
    """
    if "view" in call.name and which is None:
        out: Tensor = call.output
        return next(iter(tensors.values())).reshape(out.shape)
    outs = call.again(tensors)
    return outs if which is None else outs[which]


@couples(*named("cat concat stack"))
def cat(call: Call) -> Track | None:
    """Channels side by side; along another dimension they are joined."""
    parts: list[Tensor] = [part for part in call["tensors"] if part.dim() > 1 or part.numel()]
    dim = call.dim(call.output)
    tracks = [call.track(part) for part in parts]
    known = [track for track in tracks if track is not None]
    if not known:
        return None
    stacked = call.output.dim() > parts[0].dim()
    along = known[0].dim
    if (stacked or along != dim) and all(track.dim == along for track in known):  # tokens of the model's own
        for place, part in enumerate(parts):
            if tracks[place] is None and call.is_same(part, along):
                tracks[place] = known[0]
                continue
            own = call.claim(part, along, "shift") if tracks[place] is None else None
            tracks[place] = tracks[place] if own is None else Track(along, own)
        known = [track for track in tracks if track is not None]
    if not stacked and all(track.dim == dim for track in known):
        slots = [(NONE,) * part.shape[dim] if t is None else t.slots for part, t in zip(parts, tracks, strict=True)]
        return Track(dim, tuple(slot for some in slots for slot in some))
    if len({track.dim for track in known}) > 1 or any(track.dim == dim and not stacked for track in known):
        for track in known:
            call.keep(track, f"{call.name} joins channels along different dimensions")
        return None
    if len(known) < len(parts):
        for track in known:
            call.keep(track, f"{call.name} joins its channels with what are no channels of a layer")
        return None
    call.join(*(track.slots for track in known))
    place = known[0].dim
    return Track(place + 1 if stacked and dim <= place else place, known[0].slots)


def _equal_parts(call: Call, source: Tensor, dim: int, width: int) -> None:
    """Let parts of the channels be equally wide: the channels at the same place of each are one unit."""
    track = call.track(source)
    if track is None or track.dim != dim:
        return
    if width < 1 or len(track.slots) % width:
        call.keep(track, f"{call.name} takes parts of its channels that differ in size")
    else:
        call.join(*(track.slots[start : start + width] for start in range(0, len(track.slots), width)))


@couples(*named("chunk split split_with_sizes tensor_split"))
def split(call: Call) -> Any:
    """Parts of the channels: those of a size stay equally wide; several sizes need attributes that have them, but for
    single channels, which stay."""
    source, dim = call["self"], call.dim(call["self"])
    sizes = {part.shape[dim] for part in call.output}
    if len(sizes) == 1 or not call.counted(sizes - {1}):
        _equal_parts(call, source, dim, sizes.pop() if len(sizes) == 1 else 0)
        return call.moved()
    tracks = call.moved()
    for size in sizes - {1}:
        of_size = [t.slots for t in tracks if t is not None and t.dim == dim and len(t.slots) == size]
        call.join(*of_size)
    return tracks


@couples(*named("slice"))
def slice_(call: Call) -> Any:
    """A part of the channels, one of several that stay equally wide; or every second, third, ... one."""
    source, out, dim = call["self"], call.output, call.dim(call["self"])
    width, size = out.shape[dim], source.shape[dim]
    if width != size:
        start, step = call["start"] or 0, call["step"]
        start += size if start < 0 else 0
        track = call.track(source)
        if step == 1:
            _equal_parts(call, source, dim, width if width and start % width == 0 else 0)
        elif track is not None and track.dim == dim:
            if start >= step or size % step:
                call.keep(track, f"{call.name} takes parts of its channels that differ in size")
            else:
                call.join(*(track.slots[rest::step] for rest in range(step)))
    return call.moved()


@couples(*named("select unbind"))
def select(call: Call) -> Any:
    """What is at one index of another dimension than that of the channels."""
    track = call.track(call["self"])
    if track is not None and track.dim == call.dim(call["self"]):
        call.keep(track, f"{call.name} takes single channels")
        return None if isinstance(call.output, Tensor) else [None] * len(call.output)
    return call.moved()


@couples(*named("index"))
def index(call: Call) -> Any:
    """Indices along other dimensions than that of the channels."""
    source, indices = call["self"], call["indices"]
    track = call.track(source)
    for place in [at for at, each in enumerate(indices) if each is not None and call.track(each) is not None]:
        call.keep(call.track(indices[place]), f"{call.name} takes them as indices")
    if track is None:
        return None
    if track.dim < len(indices) and indices[track.dim] is not None:
        call.keep(track, f"{call.name} takes single channels")
        return None
    return call.read(call.again({id(source): call.labels(source, track)}))


@couples(*named("flip roll"))
def reorder(call: Call) -> Any:
    """Elements change places along other dimensions than that of the channels."""
    source = call["self"]
    track = call.track(source)
    dims = {dim % source.dim() for dim in call["dims"]} or set(range(source.dim()))
    if track is not None and track.dim in dims:
        call.keep(track, f"{call.name} changes the order of its channels")
        return None
    return track


@couples(*named("index_select gather cumsum sort topk"))
def along(call: Call) -> Any:
    """What works along another dimension than that of the channels."""
    source = call["self"]
    track = call.track(source)
    if track is not None and track.dim == call.dim(source):
        call.need_here(track)
        track = None
    return track if isinstance(call.output, Tensor) else [track] * len(call.output)


couples(*named("softmax log_softmax _softmax _log_softmax"))(along)


def _as_one(call: Call, track: Track, count: int) -> Track:
    """So many channels in a row become one: they are one unit."""
    runs = [track.slots[rest::count] for rest in range(count)]
    call.join(*runs)
    return Track(track.dim, runs[0])


@couples(*named("pixel_shuffle"))
def pixel_shuffle(call: Call) -> Track | None:
    """r x r channels become one, (.., C r r, H, W) -> (.., C, H r, W r): they are one unit."""
    track, out = call.track(call["self"]), call.output
    if track is None:
        return None
    if track.dim != out.dim() - 3:
        call.need_here(track)
        return None
    return _as_one(call, track, call["upscale_factor"] ** 2)


@couples(*named("channel_shuffle native_channel_shuffle"))
def channel_shuffle(call: Call) -> Any:
    """The groups stay equally wide."""
    source = call["self"]
    _equal_parts(call, source, 1, source.shape[1] // call["groups"])
    return call.moved(torch.ops.aten.channel_shuffle.default)


@couples(*named("pad constant_pad_nd"))
def pad(call: Call) -> Track | None:
    """Padding of other dimensions than that of the channels."""
    track, out = call.track(call["self"]), call.output
    if track is not None and out.shape[track.dim] != len(track.slots):
        call.keep(track, f"{call.name} adds channels by number")
        return None
    return track


# Over space


@couples(
    *named(
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
        "max_pool1d_with_indices fractional_max_pool2d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    )
)
def spatial(call: Call) -> Any:
    """Each channel of an image on its own: the channels come before the dimensions of space."""
    source = call.tensors()[0]
    track = call.track(source)
    channels = 0 if source.dim() == 2 else 1
    space = {"1d": 1, "2d": 2, "3d": 3}.get(next((s for s in ("1d", "2d", "3d") if s in call.name), ""))
    if space is not None:
        channels = source.dim() - space - 1
    if track is not None and track.dim != channels:
        call.need_here(track)
        track = None
    return track if isinstance(call.output, Tensor) else [track] * len(call.output)


@couples(*named("grid_sampler grid_sampler_2d grid_sampler_3d"))
def grid(call: Call) -> Any:
    """The same, at places that are given."""
    call.keep(call.track(call["grid"]), f"{call.name} takes them as places")
    return spatial(call)


@couples(*named("im2col"))
def windows(call: Call) -> Track | None:
    """(N, C, H, W) -> (N, C h w, places): the channels of a window one after the other, each at all of its places."""
    track = call.track(call["self"])
    if track is None or track.dim != 1 or call["self"].dim() != 4:
        call.need_here(track)
        return None
    count = math.prod(call["kernel_size"])
    return Track(1, tuple(slot for slot in track.slots for _ in range(count)))


@couples(*named("col2im"))
def sums_of_windows(call: Call) -> Track | None:
    """The inverse: the channels of a window that come to one channel are one unit."""
    track = call.track(call["self"])
    if track is None or track.dim != 1 or call["self"].dim() != 3:
        call.need_here(track)
        return None
    return _as_one(call, track, math.prod(call["kernel_size"]))


@couples(*named("_fft_r2c _fft_c2r _fft_c2c"))
def fourier(call: Call) -> Track | None:
    """Over other dimensions than that of the channels."""
    source: Tensor = call["self"]
    track = call.track(source)
    if track is not None and track.dim in {dim % source.dim() for dim in call["dim"]}:
        call.need_here(track)
        return None
    return track


@couples(
    *named("mean sum amax amin norm max min var std linalg_vector_norm logsumexp median any all prod argmax var_mean")
)
def reduction(call: Call) -> Any:
    """Over other dimensions than that of the channels."""
    source: Tensor = call.tensors()[0]
    track = call.track(source)
    single = isinstance(call.output, Tensor)
    if len(call.tensors()) > 1:  # torch.max(a, b)
        return elementwise(call)
    if track is None:
        return None if single else [None] * len(call.output)
    try:
        given: Any = call["dim"]
    except KeyError:
        given = None
    dims = [given] if isinstance(given, int) else list(given or range(source.dim()))
    dims = [dim % source.dim() for dim in dims]
    if track.dim in dims:
        sums = call.name.startswith(("aten.sum", "aten.linalg_vector_norm", "aten.norm"))
        if sums and call.module not in call.norms:  # what is zero adds nothing
            call.units.read(slot for slot in track.slots if slot != NONE)
        else:
            call.need_here(track)
        return None if single else [None] * len(call.output)
    out = call.output if single else call.output[0]
    place = track.dim if out.dim() == source.dim() else track.dim - sum(dim < track.dim for dim in dims)
    track = Track(place, track.slots)
    return track if single else [track] * len(call.output)


@couples(*named("glu"))
def glu(call: Call) -> Track | None:
    """One half is the gate of the other."""
    source = call["self"]
    track, dim = call.track(source), call.dim(source)
    if track is None or track.dim != dim:
        return track
    half = len(track.slots) // 2
    call.join(track.slots[:half], track.slots[half:])
    return Track(dim, track.slots[:half])


def unknown(call: Call) -> Any:
    """An operation without a rule keeps the channels that it reads."""
    for tensor in call.tensors():
        call.keep(call.track(tensor), f"keeps its channels: {call.name} has no rule")
    return None


MOVING = (_moving, view, split, slice_, select, reorder, index)
"""The rules of operations that only move elements."""
