"""Exact top-k over many tensors at once, without sorting them and without a copy of them.

The k-th largest score is found by radix selection on the bits of the floats: IEEE numbers of one sign are ordered
as their bit patterns are, so a histogram of the leading bits tells in which bin the k-th one lies, and only that bin is
looked into further. Where there are many scores, a sample first tells between which two values the k-th one almost
surely lies; what is above is counted, and only what is between needs the search. Scores are read in chunks.

The rule for ties: among equal scores the one that comes first (tensor order, then flat index) is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 21  # few large pieces: each is work for all threads, who wait for each other after it
_SAMPLE = 1 << 16
_LARGE = 1 << 18
_DIGITS = {32: (20, 8, 0), 64: (52, 40, 28, 16, 4, 0)}  # shifts of the successive digits, at most 12 bits each


def _chunks(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for index in range(len(tensors)):
        for chunk in tensors[index].reshape(-1).split(_CHUNK):
            yield chunk.to(dtype) + 0.0  # -0.0 becomes 0.0: they compare equal, their bits must too


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
        left = self.ties
        for index in range(len(scores)):
            score = scores[index]
            if self.ties == self.equal:
                yield score >= self.value
                continue
            mask = score > self.value
            if left:
                tied = (score == self.value).reshape(-1).nonzero().squeeze(1)[:left]
                flat = mask.reshape(-1)  # a copy where the scores are not contiguous, as those of channels_last are
                flat[tied] = True
                mask = flat.view(mask.shape)
                left -= tied.numel()
            yield mask


def _alone(histogram: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return histogram


def _bracketed(scores: Sequence[Tensor], keep: int) -> Threshold | None:
    """The threshold by way of two bounds from a sample; None if it is not between them.

    A sample of n scores has the k-th largest of all at about rank k n / total, with a standard deviation below
    sqrt(n) / 2. The bounds stand 5 sqrt(n) ranks to either side, so that they almost never miss it. What lies between
    them is 10 / sqrt(n) of all scores: that much is gathered and searched. What is above is counted. Scores that equal
    a bound are not gathered, so that many ties, as those of pruned units are, take no room.
    """
    total = sum(sizes(scores))
    if keep > total:
        return None
    stride = max(-(-total // _SAMPLE), 16)
    # Both buffers first: what outlives a tensor of scores but lies behind it in memory would leave holes in the heap.
    like = scores[0]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    sample = like.new_empty(sum(-(-size // stride) for size in sizes(scores)), dtype=dtype)
    between = like.new_empty(int(12 * total / len(sample) ** 0.5), dtype=dtype)
    del like
    filled = 0
    for index in range(len(scores)):
        piece = scores[index].reshape(-1)[::stride]
        if dtype == torch.float32 and piece.dtype == torch.float64:
            return None
        sample[filled : filled + len(piece)] = piece
        filled += len(piece)
    sample = descending(sample)
    middle, margin = keep / total * len(sample), 5 * len(sample) ** 0.5
    high = float(sample[int(middle - margin)]) if middle > margin else float("inf")
    low = float(sample[int(middle + margin)]) if middle + margin < len(sample) else float("-inf")
    over, under = torch.zeros((2,), dtype=torch.int64, device=sample.device)  # above the lower, below the upper bound
    filled = 0
    for index in range(len(scores)):
        for chunk in scores[index].reshape(-1).split(_CHUNK):
            above, below = chunk > low, chunk < high
            over += torch.count_nonzero(above)
            under += torch.count_nonzero(below)
            piece = _picked(chunk, above.logical_and_(below))
            if filled + len(piece) > len(between):  # a sample that is not like the rest
                return None
            between[filled : filled + len(piece)] = piece
            filled += len(piece)
    above_high, above_low = int(over) - filled, int(over)  # the first counts what equals the upper bound
    if low < high and above_low + int(under) - filled != total:  # NaN is neither above nor below
        return None
    if above_high < keep <= above_low and low < high:
        return threshold([between[:filled]], keep - above_high, lambda histogram: histogram)
    return _tied(scores, keep, low if keep > above_high else high)


def _tied(scores: Sequence[Tensor], keep: int, value: float) -> Threshold | None:
    """The threshold, if it is this value; else None. None too where a score is NaN."""
    above = equal = below = 0
    for index in range(len(scores)):
        score = scores[index]
        above += int(torch.count_nonzero(score > value))
        equal += int(torch.count_nonzero(score == value))
        below += int(torch.count_nonzero(score < value))
    if not above < keep <= above + equal or above + equal + below != sum(sizes(scores)):
        return None
    return Threshold(value, keep - above, equal)


def _picked(chunk: Tensor, chosen: Tensor) -> Tensor:
    """The chosen elements, in order."""
    if chunk.device.type == "cpu" and chunk.dtype in (torch.float32, torch.float64):  # NumPy is twice as fast
        return torch.from_numpy(chunk.detach().numpy()[chosen.numpy()])
    return chunk[chosen]


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
    if reduce is _alone and sum(sizes(scores)) > _LARGE and (bracketed := _bracketed(scores, keep)) is not None:
        return bracketed
    dtype = torch.float64 if any(scores[i].dtype == torch.float64 for i in range(len(scores))) else torch.float32
    bits = 64 if dtype == torch.float64 else 32
    pool: list[Tensor] | None = None  # the candidates, once they are few
    above, prefix, used = 0, 0, bits  # `used`: the shift down to which the bits of the threshold are known
    equal = 0
    for shift in _DIGITS[bits]:
        width = used - shift
        device = scores[0].device
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
            pool = [torch.cat(gathered)]
        histogram = reduce(histogram)
        first = used == bits
        if first:
            _refuse_nan(histogram, scores, bits, width)
        order = _order(width, first, prefix < 0, device)
        descending = histogram[order]
        running = descending.cumsum(0)
        if first and int(running[-1]) < keep:
            raise ValueError(f"asked to keep {keep} of {int(running[-1])} scores")
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


def sizes(scores: Sequence[Tensor]) -> list[int]:
    """How many scores each tensor holds."""
    counts: list[int] | None = getattr(scores, "sizes", None)  # of a lazy sequence, without computing the scores
    return counts if counts is not None else [score.numel() for score in scores]


def _refuse_nan(histogram: Tensor, scores: Sequence[Tensor], bits: int, width: int) -> None:
    """NaN and infinity have all exponent bits set: only where the histogram has such bits are scores looked at."""
    exponent = 8 if bits == 32 else 11
    mantissa = width - 1 - exponent
    start = ((1 << exponent) - 1) << mantissa
    half = 1 << (width - 1)
    if int(histogram[start:half].sum() + histogram[half + start :].sum()):
        for index in range(len(scores)):
            if bool(scores[index].isnan().any()):
                raise ValueError(
                    f"the scores of tensor {index} hold NaN: its weights or gradients have diverged before pruning. "
                    "Lower the learning rate, or clip gradients"
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
    return next(threshold([scores], keep).masks([scores]))
