"""Times: fractions of training, optimizer steps, epochs."""

from __future__ import annotations

import math
import re
from typing import TypeAlias

__all__ = ["Time", "step_of"]

Time: TypeAlias = "float | int | str"
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)\s*")


def parse(time: Time, what: str) -> tuple[float, str]:
    """A time as (number, unit); the units are "fraction", "steps" and "epochs"."""
    if isinstance(time, str):
        match = _TIME.fullmatch(time)
        if not match:
            raise ValueError(f"{what}={time!r} is no time: write a fraction such as 0.1, '500 steps' or '2 epochs'")
        return float(match[1]), "epochs" if match[2].startswith("epoch") else "steps"
    if isinstance(time, bool) or not math.isfinite(time) or time < 0:
        raise ValueError(f"{what}={time!r} must not be negative: a fraction of training in [0, 1] or optimizer steps")
    if time <= 1:
        return float(time), "fraction"
    if time != int(time):
        raise ValueError(f"{what}={time!r}: a fraction of training is at most 1, and optimizer steps are whole")
    return float(time), "steps"


def step_of(time: Time, what: str, total: float, steps_per_epoch: int | None) -> int:
    """The optimizer step of a time in a training of `total` steps (infinity: not known).

    Raises:
        ValueError: it is no time, or a part of a length that is not known; `what` is its name in the message.
    """
    value, unit = parse(time, what)
    if unit == "steps" or value == 0:
        return int(value)
    length = steps_per_epoch if unit == "epochs" else total
    if length is None or length == float("inf"):
        raise ValueError(
            f"{what}={time!r} is a part of training or of an epoch, whose length is not known: give it in steps, or "
            "set max_epochs or max_steps"
        )
    return round(value * length)
