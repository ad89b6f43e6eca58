"""Exact top-k over many tensors at once, without sorting them and without a copy of them.

The k-th largest score is found by radix selection on the bits of the floats: IEEE numbers of one sign are ordered
as their bit patterns are, so a histogram of the leading bits tells in which bin the k-th one lies, and only that bin is
looked into further. Where there are many scores, a sample first tells between which two values the k-th one almost
surely lies; what is above is counted, and only what is between needs the search. Scores are read in pieces; on a CPU
NumPy compares, counts and picks them, in a tenth of the time that torch takes. On another device the search stays
there: the host waits for it once per threshold, and not at all where one tensor is small enough to be sorted.

The rule for ties: among equal scores the one that comes first (tensor order, then flat index) is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 21  # few large pieces: each is work for all threads, who wait for each other after it
RUN = 1 << 17  # scores that stay in the cache with what is made of them
_RUN = 1 << 24  # the same on other devices, where each piece costs a few launches
SORTED = 1 << 22  # scores of one tensor that are sorted on another device: that needs 24 bytes for each
_SAMPLE = 1 << 18
_STRIDE = 61  # at least: what is sampled more densely is found by as many misses of the cache as all scores
_LARGE = 1 << 18
_DIGITS = {32: (20, 8, 0), 64: (52, 40, 28, 16, 4, 0)}  # shifts of the successive digits, at most 12 bits each


Run: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Scores, flat, and which of them are ranked at all; None: all are."""


def _runs(scores: Sequence[Tensor], index: int, step: int = 1) -> tuple[torch.Size, Iterator[Run]]:
    """The shape of a tensor of scores, and each `step`-th of them in order, piece by piece.

    A lazy sequence may make the pieces one by one (`runs`), so that each is in the cache from its making to its use.
    """
    own = getattr(scores, "runs", None)
    if own is not None and (runs := own(index, step)) is not None:
        return cast("tuple[torch.Size, Iterator[Run]]", runs)
    score = scores[index]
    flat = score.reshape(-1)[::step]
    length = _CHUNK if flat.device.type == "cpu" and not _in_numpy(flat) else run_length(flat)
    return score.shape, ((run, None) for run in flat.split(length))


def run_length(tensor: Tensor) -> int:
    """How many scores are made at once on a tensor's device."""
    return RUN if tensor.device.type == "cpu" else _RUN


def _filled(scores: Sequence[Tensor], index: int, step: int = 1) -> Iterator[Tensor]:
    """The same pieces with the lowest number where a score is not ranked."""
    for run, ranked in _runs(scores, index, step)[1]:
        yield run if ranked is None else torch.where(ranked, run, torch.finfo(run.dtype).min)


def _some(scores: Sequence[Tensor], index: int) -> Tensor:
    """A few scores of a tensor, for their type and device."""
    first = next(_filled(scores, index), None)
    return scores[index][:0] if first is None else first[:1].clone()  # a view would hold all of them


def _in_numpy(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64)


def _compared(run: Run, compare: Callable[[Any, float], Any], value: float) -> Tensor:
    """Which scores are above the value, or whatever `compare` says; none that is not ranked."""
    scores, ranked = run
    found = torch.from_numpy(compare(scores.detach().numpy(), value)) if _in_numpy(scores) else compare(scores, value)
    return found if ranked is None else _both(found, ranked)


def counted(chosen: Tensor) -> Tensor | int:
    """How many are true; on another device a tensor there."""
    return int(np.count_nonzero(chosen.numpy())) if chosen.device.type == "cpu" else torch.count_nonzero(chosen)


def count_each(masks: Iterable[Tensor]) -> list[int]:
    """How many are true in each. The host waits for other devices once."""
    numbers = [counted(mask) for mask in masks]
    there = [number for number in numbers if isinstance(number, Tensor)]
    if there:
        read = iter(torch.stack([number.to(there[0].device) for number in there]).tolist())
        return [next(read) if isinstance(number, Tensor) else number for number in numbers]
    return [int(number) for number in numbers]


def _both(one: Tensor, other: Tensor) -> Tensor:
    """Where both are true, in place of the first."""
    if one.device.type == "cpu":
        numbers = one.numpy()
        numbers &= other.numpy()
        return one
    return one.logical_and_(other)


def _picked(scores: Tensor, chosen: Tensor) -> Tensor:
    """The chosen elements, in order."""
    if _in_numpy(scores):
        return torch.from_numpy(scores.detach().numpy().compress(chosen.numpy()))
    return scores[chosen]


def _chunks(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for index in range(len(tensors)):
        for run in _filled(tensors, index):
            yield run.to(dtype) + 0.0  # -0.0 becomes 0.0: they compare equal, their bits must too


def _bits(chunk: Tensor) -> Tensor:
    return chunk.view(torch.int32 if chunk.dtype == torch.float32 else torch.int64)


def _order(width: int, first: bool, negative: bool, device: torch.device) -> Tensor:
    """The values of one digit from the largest score to the smallest."""
    size = 1 << width
    if first:  # the leading digit holds the sign: positives descending, then negatives, whose magnitudes ascend
        half = size // 2
        return torch.cat([torch.arange(half - 1, -1, -1, device=device), torch.arange(half, size, device=device)])
    digits = torch.arange(size, device=device)
    return digits if negative else digits.flip(0)


@dataclass(frozen=True)
class Threshold:
    """The k-th largest score of all: keep what is above `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int
    equal: int

    def masks(self, scores: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each tensor of scores the bool mask of what is kept, in order, one at a time."""
        left: int | Tensor = self.ties
        every = self.ties == self.equal  # of those that are equal to the value
        for index in range(len(scores)):
            shape, runs = _runs(scores, index)
            parts = []
            for scored, among in runs:
                run: Run = scored, among
                if among is not None and self.value == torch.finfo(scored.dtype).min:
                    run = scored.masked_fill(~among, self.value), None
                chosen = _compared(run, operator.ge if every else operator.gt, self.value)
                if isinstance(left, Tensor) or (left and not every):
                    tied = _compared(run, operator.eq, self.value)
                    if isinstance(left, Tensor) or tied.device.type != "cpu":
                        first, left = _first(tied, left)
                        chosen |= first
                    elif counted(tied):
                        places = tied.nonzero().squeeze(1)[:left]
                        chosen[places] = True
                        left -= places.numel()
                parts.append(chosen)
            yield (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


def _first(among: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """The first `count` of those that are true, and the count less what there is: the host waits for nothing.

    >>> first, left = _first(torch.tensor([True, False, True, True]), 2)
    >>> first.tolist(), left.tolist()
    ([True, False, True, False], [-1])
    """
    place = among.cumsum(0, dtype=torch.int32)
    left = count.to(place.device) if isinstance(count, Tensor) else place.new_full((1,), count)
    return among & (place <= left), left - place[-1:]


def _alone(histogram: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return histogram


def _bracketed(scores: Sequence[Tensor], keep: int) -> Threshold | None:
    """The threshold by way of two bounds from a sample; None if it is not between them.

    With p = k / total, a sample of n scores has the k-th largest of all at about rank p n, with a standard deviation of
    sqrt(n p (1 - p)). The bounds stand six of them to either side, so that they almost never miss it. What lies between
    them is gathered and searched, what is above is counted. A larger sample costs more, and leaves less between them.
    Scores that equal a bound are not gathered, so that many ties, as those of pruned units are, take no room.
    """
    total = sum(sizes(scores))
    if keep > total:
        return None
    stride = max(-(-total // _SAMPLE), _STRIDE) | 1  # odd: another column in each row
    # Both buffers first: what outlives a tensor of scores but lies behind it in memory would leave holes in the heap.
    like = _some(scores, 0)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    sample = like.new_empty(sum(-(-size // stride) for size in sizes(scores)), dtype=dtype)
    middle = keep / total * len(sample)
    margin = 6 * (middle * (1 - keep / total)) ** 0.5 + 10
    between = like.new_empty(int(total * min(3 * margin / len(sample), 1)), dtype=dtype)
    del like
    filled = 0
    for index in range(len(scores)):
        for piece in _filled(scores, index, stride):
            if dtype == torch.float32 and piece.dtype == torch.float64:
                return None
            sample[filled : filled + len(piece)] = piece
            filled += len(piece)
    places = [int(middle - margin)] * (middle > margin), [int(middle + margin)] * (middle + margin < len(sample))
    ranked = _ranked(sample, [*places[0], *places[1]])
    high, low = ranked[0] if places[0] else float("inf"), ranked[-1] if places[1] else float("-inf")
    over: Tensor | int = 0  # how many are above the lower bound
    under: Tensor | int = 0  # and below the upper one
    seen: Tensor | int = 0  # of all that are ranked
    filled = 0
    for index in range(len(scores)):
        for run in _runs(scores, index)[1]:
            above, below = _compared(run, operator.gt, low), _compared(run, operator.lt, high)
            over += counted(above)
            under += counted(below)
            seen += len(run[0]) if run[1] is None else counted(run[1])
            piece = _picked(run[0], _both(above, below))
            if filled + len(piece) > len(between):  # a sample that is not like the rest
                return None
            between[filled : filled + len(piece)] = piece
            filled += len(piece)
    above_high, above_low = int(over) - filled, int(over)  # the first counts what equals the upper bound
    if low < high and above_low + int(under) - filled != int(seen):  # NaN is neither above nor below
        return None
    if above_high < keep <= above_low and low < high:
        return _searched(between[:filled], keep - above_high)
    return _tied(scores, keep, low if keep > above_high else high)


def _ranked(scores: Tensor, places: Sequence[int]) -> list[float]:
    """The scores that stand at some places, the largest at place 0; the tensor is put in another order."""
    if not _in_numpy(scores):
        return [float(value) for value in descending(scores)[list(places)]]
    numbers = scores.numpy()
    if places:
        numbers.partition([len(numbers) - 1 - place for place in places])
    return [float(numbers[len(numbers) - 1 - place]) for place in places]


def _searched(scores: Tensor, keep: int) -> Threshold:
    """The threshold of one flat tensor, which is put in another order."""
    if not _in_numpy(scores):
        return threshold([scores], keep, lambda histogram: histogram)
    (value,) = _ranked(scores, [keep - 1])
    numbers = scores.numpy()
    return Threshold(value, keep - int((numbers > value).sum()), int((numbers == value).sum()))


def _tied(scores: Sequence[Tensor], keep: int, value: float) -> Threshold | None:
    """The threshold, if it is this value; else None. None too where a score is NaN."""
    counts: list[Tensor | int] = [0, 0, 0]
    for index in range(len(scores)):
        for run in _filled(scores, index):
            for place, compare in enumerate((operator.gt, operator.eq, operator.lt)):
                counts[place] += counted(_compared((run, None), compare, value))
    above, equal, below = map(int, counts)
    if not above < keep <= above + equal or above + equal + below != sum(sizes(scores)):
        return None
    return Threshold(value, keep - above, equal)


def living(scores: Sequence[Tensor], index: int) -> Tensor:
    """The scores of one tensor that are ranked and not the lowest number there is, flat and in order, a copy."""
    parts = []
    for run, ranked in _runs(scores, index)[1]:
        chosen = _compared((run, ranked), operator.ne, torch.finfo(run.dtype).min)
        parts.append(run if counted(chosen) == len(run) else _picked(run, chosen))
    return torch.cat(parts)


def above(scores: Tensor, value: float) -> Tensor:
    """Which of flat scores are larger than a value."""
    return _compared((scores, None), operator.gt, value)


def within(scores: Tensor, least: float, most: float) -> Tensor:
    """The flat scores from one value to another, in order."""
    chosen = _both(_compared((scores, None), operator.ge, least), _compared((scores, None), operator.le, most))
    return _picked(scores, chosen)


def descending(values: Tensor) -> Tensor:
    """The values of a flat tensor of floats, the largest first."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):  # ten times as fast
        return torch.from_numpy(np.sort(values.detach().numpy())).flip(0)
    return values.sort(descending=True).values


def threshold(scores: Sequence[Tensor], keep: int, reduce: Callable[[Tensor], Tensor] = _alone) -> Threshold:
    """The exact threshold that keeps `keep` of all the scores.

    Args:
        scores: tensors of any shape; indexed anew in each pass, so that a lazy sequence never holds them all.
        keep: how many to keep over all tensors, from 0 to the number of scores.
        reduce: sums a histogram over processes when each holds a part of the scores (an all-reduce).

    Raises:
        ValueError: a score is NaN, or `keep` is out of range.

    >>> t = threshold([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], keep=2)
    >>> [m.tolist() for m in t.masks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])])]
    [[True, False], [True, False]]
    """
    if keep < 0:
        raise ValueError(f"keep must be 0 or more, got {keep}")
    if keep == 0:
        return Threshold(float("inf"), 0, -1)
    home = next((device for device in devices(scores) if device.type != "cpu"), None)
    large = home is None and reduce is _alone and sum(sizes(scores)) > _LARGE
    if large and (bracketed := _bracketed(scores, keep)) is not None:
        return bracketed
    some = [_some(scores, index) for index in range(len(scores))]
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in some) else torch.float32
    if home is not None:
        return _on_device(scores, keep, reduce, dtype, home)
    bits = 64 if dtype == torch.float64 else 32
    pool: list[Tensor] | None = None  # the candidates, once they are few
    above, prefix, used = 0, 0, bits  # `used`: the shift down to which the bits of the threshold are known
    equal = 0
    for shift in _DIGITS[bits]:
        width = used - shift
        device = some[0].device
        histogram = torch.zeros(1 << width, dtype=torch.int64, device=device)
        gathered: list[Tensor] = []
        few = pool is None and used < bits and equal <= max(_CHUNK, sum(sizes(scores)) // 16)
        for key in pool if pool is not None else map(_bits, _chunks(scores, dtype)):
            if used < bits and pool is None:
                key = key[(key >> used) == prefix]
                if few:
                    gathered.append(key)
            histogram += torch.bincount((key >> shift) & ((1 << width) - 1), minlength=1 << width)
        if few:
            pool = [torch.cat(gathered)] if gathered else []  # of several processes one may count nothing
        histogram = reduce(histogram)
        first = used == bits
        if first:
            _refuse_nan(histogram, scores, bits, width, reduce)
        order = _order(width, first, prefix < 0, device)
        descending = histogram[order]
        running = descending.cumsum(0)
        if first and int(running[-1]) < keep:
            raise ValueError(f"keep={keep} is more than the {int(running[-1])} scores")
        at = int(torch.searchsorted(running, keep - above))
        digit, equal = int(order[at]), int(descending[at])
        above += int(running[at]) - equal
        if first and digit >= 1 << (width - 1):
            digit -= 1 << width  # the sign bit: the prefix is a signed number, as `key >> used` is
        prefix = (prefix << width) + digit
        if pool is not None and shift:
            pool = [key[(key >> shift) == prefix] for key in pool]
        used = shift
    as_int = torch.tensor([prefix], dtype=torch.int32 if bits == 32 else torch.int64)
    return Threshold(float(as_int.view(dtype)[0]), keep - above, equal)


def _on_device(
    scores: Sequence[Tensor], keep: int, reduce: Callable[[Tensor], Tensor], dtype: torch.dtype, home: torch.device
) -> Threshold:
    """The threshold by the same digits, without a look at any of them: what is known stays in tensors of one number.

    Scores may be on several devices; each counts its own.
    """
    bits = 64 if dtype == torch.float64 else 32
    integer = torch.int64 if bits == 64 else torch.int32
    prefix, above, equal = (torch.zeros(1, dtype=torch.int64, device=home) for _ in range(3))
    total, odd, used = prefix, prefix, bits
    for shift in _DIGITS[bits]:
        size, first = 1 << used - shift, used == bits
        histogram = torch.zeros(size, dtype=torch.int64, device=home)
        base = (prefix << used if not first else prefix).to(integer)  # of all that begin as the threshold does
        for chunk in _chunks(scores, dtype):
            key = _bits(chunk)
            if first:
                histogram += _histogram((key >> shift).add_(size // 2), size).to(home)
            else:  # others lie outside of the digits, also where the difference overflows
                histogram += _histogram((key - base.to(key.device)).bitwise_right_shift_(shift), size).to(home)
        histogram = reduce(histogram)
        order = torch.arange(size - 1, -1, -1, device=home)
        if first:  # the sign bit: a digit is a signed number, as the prefix is; negative scores fall as digits rise
            order = torch.cat([order[: size // 2], order.flip(0)[: size // 2]])
        else:
            order = torch.where(prefix < 0, order.flip(0), order)
        falling = histogram[order]
        running = falling.cumsum(0)
        at = torch.searchsorted(running, keep - above).clamp_max_(size - 1)
        digit, equal = order.gather(0, at), falling.gather(0, at)
        above = above + running.gather(0, at) - equal
        if first:
            digit, total = digit - size // 2, running[-1:]
            mantissa = used - shift - (9 if bits == 32 else 12)
            odd = histogram.unflatten(0, (2, -1))[:, -(1 << mantissa) :].sum().reshape(1)  # infinite, or NaN
        prefix = (prefix << used - shift) + digit
        used = shift
    known: list[int] = torch.cat([prefix, above, equal, total, odd]).tolist()
    if known[4]:
        _name_nan(scores, reduce)
    if known[3] < keep:
        raise ValueError(f"keep={keep} is more than the {known[3]} scores")
    return Threshold(float(torch.tensor([known[0]], dtype=integer).view(dtype)[0]), keep - known[1], known[2])


def _histogram(digits: Tensor, size: int) -> Tensor:
    """How often each number from 0 on and below `size` occurs among integers; others are left out.

    `bincount` reads the largest one, for which the host waits; `histc` does not, and is exact for integers.
    """
    if digits.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return torch.histc(digits, size + 1, 0, size + 1)[:size].long()
    return torch.bincount(digits.add(1).clamp_(0, size + 1), minlength=size + 2)[1:-1]


def sizes(scores: Sequence[Tensor]) -> list[int]:
    """How many scores each tensor holds."""
    counts: list[int] | None = getattr(scores, "sizes", None)  # of a lazy sequence, without computing the scores
    return counts if counts is not None else [score.numel() for score in scores]


def devices(scores: Sequence[Tensor]) -> list[torch.device]:
    """Where each tensor of scores is."""
    places: list[torch.device] | None = getattr(scores, "devices", None)  # of a lazy sequence, likewise
    return places if places is not None else [score.device for score in scores]


def _refuse_nan(
    histogram: Tensor, scores: Sequence[Tensor], bits: int, width: int, reduce: Callable[[Tensor], Tensor]
) -> None:
    """NaN and infinity have all exponent bits set: only where the histogram has such bits are scores looked at."""
    exponent = 8 if bits == 32 else 11
    mantissa = width - 1 - exponent
    start = ((1 << exponent) - 1) << mantissa
    half = 1 << (width - 1)
    if int(histogram[start:half].sum() + histogram[half + start :].sum()):
        _name_nan(scores, reduce)


def _name_nan(scores: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    """Refuse the first tensor with a score that is NaN, in any process, if there is one."""
    names: list[str] | None = getattr(scores, "names", None)
    counts = count_each(scores[index].isnan() for index in range(len(scores)))
    for index, nans in enumerate(reduce(torch.tensor(counts, device=devices(scores)[0])).tolist()):
        if nans:
            what = f"tensor {index}" if names is None else names[index]
            raise ValueError(
                f"the scores of {what} hold NaN: its weights or gradients "
                "have diverged before pruning. Lower the learning rate, or clip gradients"
            )


def top_k(scores: Tensor, keep: int) -> Tensor:
    """The bool mask of the `keep` largest scores of one tensor, ties to the lower flat index.

    >>> top_k(torch.tensor([0.1, 0.5, 0.5, 0.5]), 2).tolist()
    [False, True, True, False]
    """
    if keep >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type != "cpu" and scores.numel() <= SORTED:  # NaN, which its caller looks for, comes first
        order = scores.reshape(-1).sort(descending=True, stable=True).indices
        chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        return chosen.index_fill_(0, order[:keep], True).view(scores.shape)
    return next(threshold([scores], keep).masks([scores]))
