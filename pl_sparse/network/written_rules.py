"""The rules of tensors that code makes and writes to: states, and sums of samples."""

from __future__ import annotations

from pl_sparse.network.couples import Call, Track, couples
from pl_sparse.network.rules import named

__all__ = ["copy", "filled"]


@couples(*named("scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_"))
def scatter(call: Call) -> Track | None:
    """Sums, or largest values, of samples that go to the same place."""
    source, target = call.tensors()[-1], call["self"]
    track, onto, dim = call.track(source), call.track(target), call["dim"] % target.dim()
    if (track is not None and track.dim == dim) or (onto is not None and (track is None or onto.dim != track.dim)):
        for each in (track, onto):
            call.keep(each, f"{call.name} puts its channels among what are none")
        return None
    if track is not None and onto is not None:
        call.join(track.slots, onto.slots)
    return track


@couples(*named("copy_"))
def copy(call: Call) -> Track | None:
    """What is written takes the place of what was there."""
    source, out = call["src"], call.output
    track, there = call.track(source), call.track(call["self"])
    if track is None:
        return None
    track = Track(track.dim + out.dim() - source.dim(), track.slots)
    if there is not None and there.dim == track.dim:
        call.join(track.slots, there.slots)
    return track


@couples(*named("new_empty"))
def fresh(call: Call) -> None:
    """A tensor of its own."""


@couples(*named("zeros ones full new_zeros new_ones new_full"))
def filled(call: Call) -> None:
    """A tensor of its own, of one number."""
